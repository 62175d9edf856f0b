"""Ask Triton's compiler what a launch needs, for any target, without its GPU.

The one module that knows Triton's compiler. `lds` runs the backend's own pipeline and
leaves it as soon as its own allocation pass has been scheduled: what is read is what
the full compile would have reported, several times sooner. Where a Triton's internals
have not been checked, it compiles in full and says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from . import kernels, launches, targets
from .specs import AsyncCopy, Buffer, CapturedLaunch, KernelLaunch, LdsMap, Question, Source, Target

# The last pass that allocates on-chip memory, in each backend's `make_llir`.
_LAST_ALLOCATION = {
    "hip": ("amd", "ttgpuir", "add_allocate_shared_memory"),
    "cuda": ("nvidia", "ttnvgpuir", "add_allocate_tensor_memory"),
}

# The pass that allocates LDS. AMD's is the same; on NVIDIA tensor memory comes later.
_LDS_ALLOCATION = {
    "hip": _LAST_ALLOCATION["hip"],
    "cuda": ("nvidia", "ttgpuir", "add_allocate_shared_memory_nv"),
}

# SHA-256 (12 digits) of the code of each backend's `make_ttir`, which must not look at
# stages or async copy, and `make_llir`, which must not change what was allocated after its
# last allocation pass. `make versions` holds each against the full compile.
CHECKED_LOWERINGS = {
    "122c624de514": "triton 3.6.0, hip",
    "bbcd761000cc": "triton 3.6.0, cuda",
    "26cfbefb012e": "triton 3.7.1, hip",
    "ca01439d139c": "triton 3.7.1, cuda",
    "56ba86d4d0e2": "triton 3.8.0, hip",
    "9fe3a121efd8": "triton 3.8.0, cuda",
    "c9496d70276b": "triton 3.9.0, hip",
    "01394945ab08": "triton 3.9.0, cuda",
}

# What the AMD backend rejects only after allocating, where matrix units take no scales: Triton
# 3.6 and 3.7 lower neither a scaled dot whose two operands have scales ("Unsupported
# DotScaleOp") nor the widening of mxfp4 with fewer than 4 groups a step.
_SCALED_MATRIX_UNITS = ("gfx950", "gfx1250")
_REJECTED_LATER = re.compile(r"tt\.dot_scaled|amdg\.upcast_mxfp .*tensor<\d+x[12]xi8")

# Tensor memory of an SM on sm_100, in columns (PTX ISA, tcgen05.alloc).
TMEM_COLUMNS = 512


@dataclass(frozen=True)
class Allocation:
    """What a kernel takes of the memory that bounds whether it launches.

    Args:
        lds_bytes: LDS / shared memory of one workgroup.
        tmem_columns: tensor memory; 0 where the target has none.
        method: ``allocation`` where the pipeline was left after allocating,
            ``full`` where it ran to the end.
    """

    lds_bytes: int
    tmem_columns: int
    method: str


@dataclass(frozen=True)
class Resources:
    """What the finished machine code takes. Per thread unless named otherwise.

    Args:
        registers: vector registers; VGPRs and AGPRs together on CDNA.
        scalar_registers: SGPRs of a wave; None on NVIDIA.
        spilled_registers: vector registers kept in memory; on NVIDIA the stack frame
            in words, as Triton itself counts.
        scratch_bytes: private memory, spills and stack.
        code_bytes: machine code of the kernel.
    """

    registers: int
    scalar_registers: int | None
    spilled_registers: int
    scratch_bytes: int
    code_bytes: int


class CompileError(Exception):
    """The compiler rejected the kernel, or the kernel the tile; the message is its own."""


@dataclass(frozen=True)
class Ir:
    """What Triton's frontend made of a kernel, as text.

    Args:
        stage: ``ttir``, or ``ttgir`` of a Gluon kernel.
    """

    text: str
    stage: str


@dataclass(frozen=True)
class Launch:
    """A launch as Triton would specialize it.

    Args:
        ast: Triton's source object, or an `Ir` where the frontend has run already.
        key: equal for launches that compile to the same code.
        ttir_key: equal for launches that are the same until they are pipelined.
        environment: variables that the compiler reads, where they are not this process's.
    """

    ast: Any
    options: dict[str, Any]
    backend: Any
    target: Target
    async_copy: bool | None
    key: str
    ttir_key: str
    environment: Mapping[str, str] = field(default_factory=dict)


def triton_version() -> str:
    """Name the installed Triton."""
    import triton

    return triton.__version__


def static_assertion() -> type[Exception]:
    """Name what Triton's frontend raises where a kernel refuses its constants."""
    from triton.compiler.errors import CompileTimeAssertionFailure

    return CompileTimeAssertionFailure


def gpu_target(target: Target) -> Any:
    """Name a target as Triton does."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp_size)


def default_async_copy(target: Target) -> bool | None:
    """Tell what the installed Triton does where nobody chose; None without the switch.

    Triton 3.8 turned it on for gfx950 and gfx1250 (triton-lang/triton#9087).
    """
    if not target.async_copy_switch:
        return None
    from triton import knobs
    from triton.backends.amd import compiler as amd

    decide = getattr(amd, "is_async_copy_enabled", lambda arch: knobs.amd.use_async_copy)
    return bool(decide(target.arch))


def specialize(question: Question | CapturedLaunch) -> Launch:
    """Bind a question as a launch on its target would; a captured launch is bound.

    Raises:
        ValueError: unknown kernel or target; the message lists those there are.
        LaunchError: the launch does not describe its kernel.
        CompileError: the kernel can't take the tile or a format.
    """
    if isinstance(question, CapturedLaunch):
        return _captured(question)
    target = targets.get(question.target)
    options = {"num_warps": question.num_warps, "num_stages": question.num_stages}
    if isinstance(question, KernelLaunch):
        own = json.loads(question.options)
        fn = launches.load(question.kernel)
        arguments = launches.bind(fn, json.loads(question.args))
        return specialize_types(fn, arguments, own | options, target, question.async_copy)
    kernel = kernels.load(question.kernel)
    try:
        source = kernel.source(question.problem, question.tile, target)
    except ValueError as refused:
        raise CompileError(f"{question.kernel}: {refused}") from refused
    return specialize_source(source, source.options | options, target, question.async_copy)


def specialize_source(
    source: Source, options: dict[str, Any], target: Target, async_copy: AsyncCopy
) -> Launch:
    """Bind a launch with these arguments.

    Triton's own binder decides what is constant, what is divisible by 16 and what
    spans at most 2 GiB.
    """
    from triton.compiler import ASTSource

    backend, bind = _binder(source.fn, target.name)
    # JITFunction.run adds the debug knob to every launch.
    given = {**source.args, **options, "debug": False}
    with _without_announcements():
        bound, specialization, excess = bind(**given)
        parsed, signature, constants, attributes = source.fn._pack_args(
            backend, given, bound, specialization, excess
        )
    ast = ASTSource(source.fn, signature, constants, attributes)
    return bound_launch(ast, parsed, backend, target, async_copy)


def specialize_types(
    fn: Any,
    arguments: Mapping[str, launches.Argument],
    options: dict[str, Any],
    target: Target,
    async_copy: AsyncCopy,
) -> Launch:
    """Bind a launch of which the types are known instead of the arguments.

    Args:
        fn: the ``triton.jit`` function; ``arguments`` has each of its parameters.
        options: Triton's, ``num_warps`` and ``num_stages`` among them.
    Raises:
        LaunchError: an option that the backend doesn't have.
        CompileError: an option's value that it refuses.
    """
    import triton.language as tl
    from triton.compiler import ASTSource

    backend = _backend(target.name)
    _check_options(options, target)
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def signature(path: tuple[int, ...], argument: launches.Argument) -> Any:
        if isinstance(argument, tuple):
            return tuple(signature((*path, i), part) for i, part in enumerate(argument))
        if isinstance(argument, launches.Type):
            # D: divisible by 16; S: spans less than 2 GiB, which AMD's backend alone asks.
            bounded = argument.name.startswith("*") and not argument.large
            known = "D" * argument.divisible + "S" * bounded
            if known:
                attributes[path] = backend.parse_attr(known)
            return argument.name
        if isinstance(argument, launches.DType):
            constants[path] = tl.dtype(argument.name)
        else:
            constants[path] = argument.value
        return "constexpr"

    types = {p.name: signature((i,), arguments[p.name]) for i, p in enumerate(fn.params)}
    ast = ASTSource(fn, types, constants, attributes)
    with _compile_errors(), _without_announcements():
        parsed = backend.parse_options(options)
    return bound_launch(ast, parsed, backend, target, async_copy)


def _check_options(options: Collection[str], target: Target) -> None:
    """Tell options that no backend has, the user's mistake, from those that this one lacks."""
    lacking = set(options) - set(default_options(target))
    others = {name for other in targets.TARGETS.values() for name in default_options(other)}
    launches.unknown("options", lacking - others, sorted(default_options(target)))
    if lacking:
        raise CompileError(
            f"the {target.backend} backend has no option {', '.join(sorted(lacking))}"
        )


def default_options(target: Target) -> dict[str, Any]:
    """Give every launch option that a backend has, with its default."""
    return dict(_default_options(target.name))


@functools.cache
def _default_options(target: str) -> dict[str, Any]:
    backend = _backend(target)
    with _without_announcements():
        return dict(backend.parse_options({}).__dict__)


@functools.cache
def _backend(target: str) -> Any:
    from triton.compiler.compiler import make_backend

    return make_backend(gpu_target(targets.get(target)))


@contextlib.contextmanager
def _without_announcements() -> Iterator[None]:
    with warnings.catch_warnings():
        # 3.9 announces that 3.10 will stop fusing by default; launches hear it, and so
        # need not each sweep.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        yield


def bound_launch(
    ast: Any, parsed: Any, backend: Any, target: Target, async_copy: AsyncCopy
) -> Launch:
    """Name what Triton has bound: its source object and its parsed options."""
    if async_copy == "default":
        async_copy = default_async_copy(target)
    unpipelined = dataclasses.replace(parsed, num_stages=1)
    environment = sorted(environment_variables().items())
    identity = [triton_version(), target.name, ast.hash(), environment]
    return Launch(
        ast,
        parsed.__dict__,
        backend,
        target,
        async_copy,
        key=_digest([*identity, parsed.hash(), async_copy]),
        ttir_key=_digest([*identity, unpipelined.hash()]),
    )


def environment_variables() -> dict[str, str]:
    """List what this process's environment tells the compiler."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return dict(get_cache_invalidating_env_vars())


def _captured(captured: CapturedLaunch) -> Launch:
    from triton.compiler.compiler import make_backend

    target = targets.get(captured.target)
    options = _tuples(json.loads(captured.options))
    identity = [triton_version(), *dataclasses.astuple(captured)]
    return Launch(
        Ir(captured.ir, captured.stage),
        options,
        make_backend(gpu_target(target)),
        target,
        captured.async_copy,
        key=_digest(identity),
        ttir_key=_digest(identity),
        environment=json.loads(captured.environment),
    )


def _tuples(value: Any) -> Any:
    """Give back the tuples that JSON made lists of: options are hashed."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _digest(identity: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


@functools.cache
def _binder(fn: Any, target: str) -> tuple[Any, Any]:
    """Make the backend and the function that binds a launch's arguments."""
    from triton.runtime.jit import create_function_from_signature

    backend = _backend(target)
    return backend, create_function_from_signature(fn.signature, fn.params, backend)


@contextlib.contextmanager
def settings(launch: Launch) -> Iterator[None]:
    """Apply a launch's compiler switches, and a cache that nobody else wrote to."""
    from triton import knobs

    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="moelab-"))
        stack.enter_context(_environment(launch.environment))
        stack.enter_context(knobs.amd.scope())
        stack.enter_context(knobs.cache.scope())
        knobs.cache.dir = cache
        if launch.async_copy is not None:
            knobs.amd.use_async_copy = launch.async_copy
        yield


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Allocated(Exception):
    """Leaves `make_llir` with the passes that were scheduled so far."""

    def __init__(self, passes: Any):
        self.passes = passes


def is_checked(target: Target) -> bool:
    """Tell whether the installed Triton's lowering is known, so that `lds` is quick."""
    return lowering_fingerprint(target.name) in CHECKED_LOWERINGS


@functools.cache
def lowering_fingerprint(target: str) -> str:
    """Fingerprint the code of a target's backend's `make_ttir` and `make_llir`."""
    backend = _backend(target)
    code = inspect.getsource(backend.make_ttir) + inspect.getsource(backend.make_llir)
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def lds(launch: Launch) -> Allocation:
    """Tell the exact LDS of a launch, by the shortest way that is known to be exact.

    Raises:
        CompileError: the compiler rejects the kernel.
    """
    return _allocated(launch)[0]


def _allocated(launch: Launch) -> tuple[Allocation, Any]:
    """Give a launch's allocation, and the module that it was read from or None."""
    if not is_checked(launch.target):
        return full(launch)[0], None
    with settings(launch), _compile_errors():
        module = _allocate(launch)
    if module is None or _may_be_rejected_later(module, launch.target):
        return full(launch)[0], module
    allocation = Allocation(
        lds_bytes=module.get_int_attr("ttg.shared"),
        tmem_columns=module.get_int_attr("ttg.tensor_memory_size") or 0,
        method="allocation",
    )
    return allocation, module


def _may_be_rejected_later(module: Any, target: Target) -> bool:
    if target.backend != "hip" or target.arch in _SCALED_MATRIX_UNITS:
        return False
    return bool(_REJECTED_LATER.search(str(module)))


def _allocate(launch: Launch) -> Any:
    """Run the pipeline until LDS is allocated; return the module.

    None where it never was: something, such as a hook, has replaced the stages.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import Language

    options = launch.backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    launch.backend.load_dialects(context)
    stages: dict[str, Any] = {}
    launch.backend.add_stages(stages, options, Language.TRITON)
    metadata = dict(options.__dict__)
    if isinstance(launch.ast, Ir):
        module = _parsed(launch.ast, context)
    else:
        module = _ttir(launch, options, stages["ttir"], metadata, context)
    if not (isinstance(launch.ast, Ir) and launch.ast.stage == "ttgir"):
        module = stages["ttgir"](module, metadata)
    with _leave_after_allocation(launch.target.backend):
        try:
            stages["llir"](module, metadata)
        except _Allocated as left:
            left.passes.run(module, "allocate")
            return module
    return None


# Stage counts and async copy part ways only after TTIR: a sweep asks for each TTIR
# several times in a row. Python makes it in a fifth of the probe's time.
_TTIR: dict[str, str] = {}
_TTIR_KEPT = 32


def _ttir(
    launch: Launch, options: Any, make_ttir: Any, metadata: dict[str, Any], context: Any
) -> Any:
    """Make a launch's TTIR, or read it back."""
    if launch.ttir_key in _TTIR:
        return _parsed(Ir(_TTIR[launch.ttir_key], "ttir"), context)
    module = make_ttir(_unoptimized(launch, options, context), metadata)
    if len(_TTIR) >= _TTIR_KEPT:
        _TTIR.pop(next(iter(_TTIR)))
    _TTIR[launch.ttir_key] = str(module)
    return module


def _unoptimized(launch: Launch, options: Any, context: Any) -> Any:
    """Make what the frontend hands to the first pass."""
    return launch.ast.make_ir(
        gpu_target(launch.target),
        options,
        launch.backend.get_codegen_implementation(options),
        launch.backend.get_module_map(),
        context,
    )


def _parsed(source: Ir, context: Any) -> Any:
    """Read a module back as Triton does from a file."""
    from triton._C.libtriton import ir

    with tempfile.NamedTemporaryFile("w", suffix=f".{source.stage}") as file:
        file.write(source.text)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    # Else Python frees the context while the module lives.
    module.context = context
    return module


def frontend(launch: Launch) -> Ir:
    """Make what depends on the kernel's Python: TTIR, or TTGIR of a Gluon kernel.

    Raises:
        Exception: whatever Triton's frontend raises; it is the kernel's own.
    """
    from triton._C.libtriton import ir

    options = launch.backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    launch.backend.load_dialects(context)
    stages: dict[str, Any] = {}
    launch.backend.add_stages(stages, options, launch.ast.language)
    stage = "ttir" if "ttir" in stages else "ttgir"
    module = stages[stage](_unoptimized(launch, options, context), dict(options.__dict__))
    return Ir(str(module), stage)


@contextlib.contextmanager
def _leave_after_allocation(backend: str) -> Iterator[None]:
    from triton._C import libtriton

    module, dialect, name = _LAST_ALLOCATION[backend]
    holder = getattr(getattr(libtriton, module).passes, dialect)
    schedule = getattr(holder, name)

    def schedule_and_leave(passes: Any, *arguments: Any) -> None:
        schedule(passes, *arguments)
        raise _Allocated(passes)

    setattr(holder, name, schedule_and_leave)
    try:
        yield
    finally:
        setattr(holder, name, schedule)


def full(launch: Launch) -> tuple[Allocation, Resources]:
    """Compile to machine code and read its resources.

    Raises:
        CompileError: the compiler rejects the kernel.
    """
    import triton

    with settings(launch), _compile_errors(), _compilable(launch.ast) as source:
        compiled = triton.compile(
            source, target=gpu_target(launch.target), options=dict(launch.options)
        )
        metadata = compiled.metadata
        allocation = Allocation(metadata.shared, getattr(metadata, "tmem_size", 0) or 0, "full")
        read = _amd_resources if launch.target.backend == "hip" else _nvidia_resources
        return allocation, read(compiled)


@contextlib.contextmanager
def _compilable(source: Any) -> Iterator[Any]:
    """Give `triton.compile` what it takes: a source object, or the path of a file."""
    if not isinstance(source, Ir):
        yield source
        return
    with tempfile.NamedTemporaryFile("w", suffix=f".{source.stage}") as file:
        file.write(source.text)
        file.flush()
        yield file.name


@contextlib.contextmanager
def _compile_errors() -> Iterator[None]:
    """Turn what Triton raises about a kernel into `CompileError`."""
    from triton.compiler.errors import TritonError

    try:
        yield
    except (TritonError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise CompileError(f"{type(error).__name__}: {error}") from error


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        """Read the code object's metadata (LLVM AMDGPUUsage, code object v5)."""
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return Resources(
        registers=metadata("vgpr_count"),
        scalar_registers=metadata("sgpr_count"),
        spilled_registers=metadata("vgpr_spill_count"),
        scratch_bytes=metadata("private_segment_fixed_size"),
        code_bytes=_code_bytes(compiled.asm["hsaco"]),
    )


def _nvidia_resources(compiled: Any) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    function = usage[usage.index(compiled.metadata.name) :]
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", function)}
    scratch = counts["STACK"] + counts["LOCAL"]
    return Resources(
        registers=counts["REG"],
        scalar_registers=None,
        spilled_registers=scratch // 4,
        scratch_bytes=scratch,
        code_bytes=_code_bytes(compiled.asm["cubin"]),
    )


def _code_bytes(binary: bytes) -> int:
    """Add up the executable sections of an ELF file."""
    from elftools.elf.constants import SH_FLAGS
    from elftools.elf.elffile import ELFFile

    sections = ELFFile(BytesIO(binary)).iter_sections()
    return sum(s["sh_size"] for s in sections if s["sh_flags"] & SH_FLAGS.SHF_EXECINSTR)


class MapError(Exception):
    """What the compiler printed of its buffers and what it did contradict each other."""


# The debug type of Triton's allocation pass, and a name that no pass has.
_ALLOCATION_DEBUG, _NO_DEBUG = "allocation-shared-memory", "none"


def buffers(launch: Launch) -> tuple[Allocation, LdsMap]:
    """Tell the exact LDS of a launch, and every buffer that it is made of.

    The allocation pass tells where and how long each buffer lies as LLVM debug output.
    It is run a second time, alone, to be heard: what `lds` gives never depends on it.

    Returns:
        the allocation, and its map or why there is none.
    Raises:
        CompileError: the compiler rejects the kernel.
        MapError: what was printed disagrees with the module.
    """
    with _noted(*_LDS_ALLOCATION[launch.target.backend]) as scheduled:
        allocation, module = _allocated(launch)
    if module is None or not scheduled:
        why = f"how Triton {triton_version()} allocates for {launch.target.name} is not checked"
        return allocation, LdsMap(missing=why)
    offsets = _allocated_offsets(module)
    schedule, arguments = scheduled[-1]
    printed = _allocate_aloud(module, schedule, arguments)
    if "Allocated: " not in printed:
        why = f"this build of Triton {triton_version()} prints no debug output"
        return allocation, LdsMap(missing=why)
    if (total := module.get_int_attr("ttg.shared")) != allocation.lds_bytes:
        raise MapError(f"{total:,} bytes when allocated again, {allocation.lds_bytes:,} before")
    if (again := _allocated_offsets(module)) != offsets:
        raise MapError(f"offsets {again} when allocated again, {offsets} before")
    return allocation, _read_map(module, printed, offsets)


@contextlib.contextmanager
def _noted(module: str, dialect: str, name: str) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Note each scheduling of a pass: the function, and its arguments after the manager."""
    from triton._C import libtriton

    holder = getattr(getattr(libtriton, module).passes, dialect)
    schedule = getattr(holder, name)
    noted: list[tuple[Any, tuple[Any, ...]]] = []

    def schedule_and_note(passes: Any, *arguments: Any) -> None:
        noted.append((schedule, arguments))
        schedule(passes, *arguments)

    setattr(holder, name, schedule_and_note)
    try:
        yield noted
    finally:
        setattr(holder, name, schedule)


def _allocate_aloud(module: Any, schedule: Any, arguments: tuple[Any, ...]) -> str:
    """Allocate a module's LDS once more; return what the pass printed."""
    from triton._C.libtriton import ir

    variable = "TRITON_LLVM_DEBUG_ONLY"
    before = os.environ.get(variable)

    def run(debug: str, schedule: Any, arguments: tuple[Any, ...]) -> None:
        os.environ[variable] = debug
        passes = ir.pass_manager(module.context)
        schedule(passes, *arguments)
        passes.run(module, "buffers")

    with tempfile.TemporaryFile("w+", errors="replace") as file, _stderr_to(file.fileno()):
        try:
            run(_ALLOCATION_DEBUG, schedule, arguments)
        finally:
            # LLVM keeps the last choice until a run makes another: one without passes.
            run(before or _NO_DEBUG, lambda passes: None, ())
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    """Send stderr to a file, with what compiled code prints there."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


_ATTRIBUTES = re.compile(r"allocation\.offset = (\d+) : i32(?:, allocation\.size = (\d+) : i32)?")


def _allocated_offsets(module: Any) -> list[tuple[int, int | None]]:
    """Read the kernel's offsets, and sizes where they are kept, in the order of its text."""
    # Functions of their own (`noinline`) have memory that their calls stand for.
    kernel = re.split(r"^  (?=tt\.func )", module.str_nodebug(), flags=re.MULTILINE)
    text = next(part for part in kernel if part.startswith("tt.func public"))
    return [
        (int(offset), int(size) if size else None) for offset, size in _ATTRIBUTES.findall(text)
    ]


def _read_map(module: Any, printed: str, offsets: list[tuple[int, int | None]]) -> LdsMap:
    """Match what the allocation pass printed of the kernel with the kernel's operations."""
    # Functions come before who calls them; each ends with its total.
    *_, kernel, _ = re.split(r"^Allocated: .*$", printed, flags=re.MULTILINE)
    owners = dict(re.findall(r"^-- buffer (\d+); value: (?:%[^=]* = )?\"?([\w.]+)", kernel, re.M))
    # Printed whenever buffers were moved; the last is where they stayed.
    ranges = re.findall(
        r"^-- (\d+) (\d+) (\d+) interval (\d+) (\d+)$", kernel.split("Dump bufferRange")[-1], re.M
    )
    # Buffers are numbered in the order of the text.
    rows = sorted(tuple(map(int, row)) for row in ranges)
    if len(rows) != len(offsets):
        raise MapError(f"{len(rows)} buffers were printed, {len(offsets)} are in the module")
    operations = _operations(module)
    found = []
    for (number, size, offset, first, last), attributes in zip(rows, offsets, strict=True):
        # Memory of the function itself: the last operation in program order, alive throughout.
        of_function = last > len(operations)
        position = len(operations) - 1 if of_function else first
        operation = operations[position]
        if attributes not in ((offset, size), (offset, None)):
            raise MapError(f"buffer {number}: {size} bytes at {offset}, in the module {attributes}")
        owner = "tt.func" if of_function else owners.get(str(number))
        if operation.get_name() != owner:
            raise MapError(f"buffer {number} of {owner}: {operation.get_name()} is at {position}")
        buffer = _buffer(operation, offset, size, first, min(last, len(operations)))
        if buffer.padding_bytes < 0:
            raise MapError(f"{buffer.name}: {size} bytes for {buffer.copies} x {buffer.shape}")
        found.append(buffer)
    found.sort(key=lambda buffer: (buffer.first, buffer.offset))
    return LdsMap(tuple(found), len(operations))


def _operations(module: Any) -> list[Any]:
    """List the kernel's operations in program order, as the allocation pass counts them."""
    functions: list[list[Any]] = [[]]
    names: list[str] = []

    def visit(operation: Any) -> None:
        functions[-1].append(operation)
        if operation.get_name() == "tt.func":
            names.append(operation.get_str_attr("sym_name"))
            functions.append([])

    module.walk(visit)
    return functions[names.index(module.get_entry_func_name())]


# MLIR's names of types that Triton's frontend calls otherwise.
_DTYPES = {
    "f8E4M3FN": "fp8e4nv",
    "f8E4M3FNUZ": "fp8e4b8",
    "f8E5M2": "fp8e5",
    "f8E5M2FNUZ": "fp8e5b16",
    "f16": "fp16",
    "f32": "fp32",
    "f64": "fp64",
}


def _buffer(operation: Any, offset: int, size: int, first: int, last: int) -> Buffer:
    kind = operation.get_name().rpartition(".")[2]
    line, dtype, rank = "", "", 0
    shape: tuple[int, ...] = ()
    if operation.get_num_results():
        result = operation.get_result(0)
        line = _source(result)[1]
        shape, dtype, rank = _type(str(result.get_type()))
    copies, padding = 1, 0
    if kind == "local_alloc":
        padding = size - math.prod(shape) * _bits(dtype) // 8
        # What is filled where it is made is one tile, whatever its rank.
        if not operation.get_num_operands() and len(shape) > rank:
            copies, shape = shape[0], shape[1:]
    dtype = _DTYPES.get(dtype, dtype)
    name = _name(operation, kind, line, shape, dtype)
    return Buffer(name, kind, line, shape, dtype, copies, padding, offset, size, first, last)


def _name(operation: Any, kind: str, line: str, shape: tuple[int, ...], dtype: str) -> str:
    """Name a buffer as the source does."""
    if kind == "func":
        return "states of warp groups"
    if kind == "call":
        # Triton mangles: module.function__types.
        callee = operation.get_flat_symbol_ref_attr("callee")
        function = re.search(r"\.(\w+?)__", callee)
        return f"call of {function[1] if function else callee}"
    if kind == "warp_specialize":
        return "captures of warp_specialize"
    # What is put there is known by its own name, not by that of what it becomes.
    values = [operation.get_operand(i) for i in range(min(operation.get_num_operands(), 1))]
    values += [operation.get_result(i) for i in range(min(operation.get_num_results(), 1))]
    variable = next((name for value in values if (name := _source(value)[0])), "")
    if kind == "local_alloc":
        if dtype == "i64" and math.prod(shape) == 1:
            kind = "mbarrier"
        elif variable:
            return variable
        else:
            kind = "buffer"
    return f"{kind} of {variable}" if variable else f"{kind} at {line}" if line else kind


def _source(value: Any) -> tuple[str, str]:
    """Read the variable, and the line, that a value comes from; either may be empty."""
    location = str(value.get_loc())
    # Names enclose places; of nested calls the innermost comes first.
    variable = re.search(r'"([^"]+)"\(', location)
    place = re.search(r'"(?:[^"]*/)?([^"/]+)":(\d+):\d+', location)
    return variable[1] if variable else "", f"{place[1]}:{place[2]}" if place else ""


def _type(written: str) -> tuple[tuple[int, ...], str, int]:
    """Read a type's shape and element type, and the rank that its layout has."""
    match = re.match(r"(?:!ttg\.memdesc|tensor)<((?:\d+x)*)(!?[\w.]+)(.*)", written)
    if not match:
        return (), written, 0
    shape = tuple(int(size) for size in match[1].split("x")[:-1])
    layout = match[3]
    if rank := re.search(r"\brank = (\d+)", layout):
        return shape, match[2], int(rank[1])
    # A layout lists its dimensions, or what each bit of an offset adds to each of them.
    listed = re.search(r"\border\s*=\s*\[([^\]]*)\]|\boffset\s*=\s*\[\[([^\]]*)\]", layout)
    # NVIDIA's matrix layouts say only if they are of another rank than 2.
    return shape, match[2], (listed[1] or listed[2]).count(",") + 1 if listed else 2


def _bits(dtype: str) -> int:
    """Count the bits of one element; of pointers, 64."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 64
