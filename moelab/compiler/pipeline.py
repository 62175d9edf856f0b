"""The backend's own pipeline, left as soon as LDS is allocated, or run to the end."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..specs import Target
from . import resources
from .binding import Ir, Launch, backend_of, compile_errors, gpu_target, settings
from .resources import Resources

# The last pass that allocates on-chip memory, in each backend's `make_llir`.
LAST_ALLOCATION = {
    "hip": ("amd", "ttgpuir", "add_allocate_shared_memory"),
    "cuda": ("nvidia", "ttnvgpuir", "add_allocate_tensor_memory"),
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
    backend = backend_of(target)
    code = inspect.getsource(backend.make_ttir) + inspect.getsource(backend.make_llir)
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def lds(launch: Launch) -> Allocation:
    """Tell the exact LDS of a launch, by the shortest way that is known to be exact.

    Raises:
        CompileError: the compiler rejects the kernel.
    """
    return allocated(launch)[0]


def allocated(launch: Launch) -> tuple[Allocation, Any]:
    """Give a launch's allocation, and the module that it was read from or None."""
    if not is_checked(launch.target):
        return full(launch)[0], None
    with settings(launch), compile_errors():
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
    of_ir = isinstance(launch.ast, Ir)
    language = Language.TRITON if of_ir else launch.ast.language
    launch.backend.add_stages(stages, options, language)
    metadata = dict(options.__dict__)
    if of_ir:
        module = _parsed(launch.ast, context)
    elif language == Language.TRITON:
        module = _ttir(launch, options, stages["ttir"], metadata, context)
    else:
        module = _unoptimized(launch, options, context)
    if not (of_ir and launch.ast.stage == "ttgir"):
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

    module, dialect, name = LAST_ALLOCATION[backend]
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


def full(launch: Launch, cache: Path | None = None) -> tuple[Allocation, Resources]:
    """Compile to machine code and read its resources.

    Args:
        cache: folder of a Triton cache, where a launch will find the code; None keeps none.
    Raises:
        CompileError: the compiler rejects the kernel.
    """
    import triton

    with settings(launch, cache), compile_errors(), _compilable(launch.ast) as source:
        compiled = triton.compile(
            source, target=gpu_target(launch.target), options=dict(launch.options)
        )
        metadata = compiled.metadata
        allocation = Allocation(metadata.shared, getattr(metadata, "tmem_size", 0) or 0, "full")
        return allocation, resources.read(compiled, launch.target)


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
