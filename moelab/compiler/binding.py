"""A launch as Triton would specialize it: what it binds, and the switches it compiles under."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import kernels, launches, scratch, targets
from ..specs import (
    AsyncCopy,
    CapturedLaunch,
    Configuration,
    KernelLaunch,
    Question,
    Source,
    Target,
)


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
    source = _source(question, target)
    return specialize_source(source, source.options | options, target, question.async_copy)


def _source(question: Configuration, target: Target) -> Source:
    kernel = kernels.load(question.kernel)
    try:
        return kernel.source(question.problem, question.tile, target)
    except ValueError as refused:
        raise CompileError(f"{question.kernel}: {refused}") from refused


def compile_key(question: Question, known: dict[tuple[Any, ...], str]) -> str:
    """Give `specialize`'s key, several times sooner where a launch that is bound alike had it.

    What is bound alike is one kernel to Triton's launcher, too: `jit.compute_cache_key`.

    Args:
        known: what this fills, and reads; of one Triton, whose settings stay as they are.
    Raises:
        ValueError, LaunchError, CompileError: as `specialize` does.
    """
    if isinstance(question, KernelLaunch):
        return specialize(question).key
    target = targets.get(question.target)
    source = _source(question, target)
    options = {"num_warps": question.num_warps, "num_stages": question.num_stages}
    bound = _bound(source, source.options | options, target)
    alike = hashlib.sha256(repr(bound[2:]).encode()).digest()
    same = source.fn, target.name, question.async_copy, alike
    if same not in known:
        known[same] = _specialized(source, *bound, target, question.async_copy).key
    return known[same]


def specialize_source(
    source: Source, options: dict[str, Any], target: Target, async_copy: AsyncCopy
) -> Launch:
    """Bind a launch with these arguments.

    Triton's own binder decides what is constant, what is divisible by 16 and what
    spans at most 2 GiB.
    """
    return _specialized(source, *_bound(source, options, target), target, async_copy)


def _bound(
    source: Source, options: dict[str, Any], target: Target
) -> tuple[dict[str, Any], dict[str, Any], list[Any], dict[str, Any]]:
    """Let Triton's binder take the arguments: what `_specialized` makes a launch of."""
    _, bind = _binder(source.fn, target.name)
    # JITFunction.run adds the debug knob to every launch.
    given = {**source.args, **options, "debug": False}
    if "NUM_STAGES" in source.fn.arg_names:
        given["NUM_STAGES"] = options["num_stages"]
    with _without_announcements():
        bound, specialization, excess = bind(**given)
    return given, bound, specialization, excess


def _specialized(
    source: Source,
    given: dict[str, Any],
    bound: dict[str, Any],
    specialization: list[Any],
    excess: dict[str, Any],
    target: Target,
    async_copy: AsyncCopy,
) -> Launch:
    backend, _ = _binder(source.fn, target.name)
    with _without_announcements(), _target_as_asked():
        parsed, signature, constants, attributes = source.fn._pack_args(
            backend, given, bound, specialization, excess
        )
    ast = _ast_source(source.fn)(source.fn, signature, constants, attributes)
    return bound_launch(ast, parsed, backend, target, async_copy)


def _ast_source(fn: Any) -> Any:
    """Give what Triton compiles a function as: one that goes through TTIR, or Gluon's."""
    from triton.compiler import ASTSource

    if not fn.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


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

    backend = backend_of(target.name)
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
    ast = _ast_source(fn)(fn, types, constants, attributes)
    with compile_errors(), _without_announcements(), _target_as_asked():
        parsed = backend.parse_options(options)
    launch = bound_launch(ast, parsed, backend, target, async_copy)
    texts = [path for path, value in constants.items() if isinstance(value, str)]
    if not texts:
        return launch
    # Triton's hash takes a text for what is spelled so: "None" for None, "1" for 1.
    return dataclasses.replace(
        launch, key=_digest([launch.key, texts]), ttir_key=_digest([launch.ttir_key, texts])
    )


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
    backend = backend_of(target)
    with _without_announcements(), _target_as_asked():
        return dict(backend.parse_options({}).__dict__)


@functools.cache
def backend_of(target: str) -> Any:
    from triton.compiler.compiler import make_backend

    return make_backend(gpu_target(targets.get(target)))


@contextlib.contextmanager
def _without_announcements() -> Iterator[None]:
    with warnings.catch_warnings():
        # 3.9 announces that 3.10 will stop fusing by default; launches hear it, and so
        # need not each sweep.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        yield


@contextlib.contextmanager
def _target_as_asked() -> Iterator[None]:
    """Pass over TRITON_OVERRIDE_ARCH, by which Triton compiles for one chip whatever is asked."""
    from triton import knobs

    if knobs.runtime.override_arch is None:
        yield
        return
    with knobs.runtime.scope():
        knobs.runtime.override_arch = None
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

    backend = backend_of(target)
    return backend, create_function_from_signature(fn.signature, fn.params, backend)


@contextlib.contextmanager
def settings(launch: Launch, cache: Path | None = None) -> Iterator[None]:
    """Apply a launch's compiler switches, and a cache that nobody else wrote to."""
    from triton import knobs

    with contextlib.ExitStack() as stack:
        folder = cache or stack.enter_context(scratch.folder())
        stack.enter_context(_environment(launch.environment))
        stack.enter_context(knobs.amd.scope())
        stack.enter_context(_target_as_asked())
        stack.enter_context(cache_at(folder))
        # Machine code of the user's takes the place of the compiler's; a dump may find no room.
        knobs.amd.swap_mir = knobs.amd.dump_mir = None
        if launch.async_copy is not None:
            knobs.amd.use_async_copy = launch.async_copy
        yield


@contextlib.contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Let the compiler, and launches, find in a cache what `full` left there, and nothing else.

    What a cache says is believed: edited metadata comes back as the compiler's answer. So do
    an overriding stage and what a cache manager of the user's fetches from elsewhere. Of a cache
    of binaries alone the registers can't be read, and a dump goes to a folder of the user's that
    may be full.
    """
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        knobs.cache.manager_class = FileCacheManager
        knobs.compilation.override = False
        knobs.compilation.store_binary_only = False
        knobs.compilation.dump_ir = False
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


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what Triton raises about a kernel into `CompileError`."""
    from triton.compiler.errors import TritonError

    try:
        yield
    except (TritonError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise CompileError(f"{type(error).__name__}: {error}") from error
