"""PyTorch without its GPU: tensors on ``cuda`` have shape, type and address, but no values.

They are PyTorch's own fake tensors; tensors on the CPU stay real. Three layers make an
ordinary CPU build take part:

- PyTorch's C++ knows the device by another name, a backend registered from Python, for a
  CPU build has no guard, streams or autograd queue for ``cuda``. Python code sees ``cuda``.
- A function mode translates ``cuda`` where Python code names it.
- A dispatch mode sends what is made on the device to the fake tensors' mode, and says what
  can't be told: values, shapes that depend on them, comparisons.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ..specs import Target
from . import recorder

# The name under which PyTorch's C++ knows the device.
_NAME = "standin"

# In PyTorch's and Triton's eyes; scripts compare versions, and ask which of the two is there.
_VERSIONS = {"hip": "7.0.0", "cuda": "12.8"}

# No tensor takes memory here, so there is always enough.
_MEMORY_BYTES = 2**40


def install(target: Target) -> None:
    """Make PyTorch, which has just been imported, see the target's GPU."""
    import torch
    import torch.testing
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(_NAME)
    # Else `torch.tensor` moves what it makes past the modes.
    torch._C._set_only_lift_cpu_tensors(True)
    for name in _VERSIONS:
        version = _VERSIONS[name] if name == target.backend else None
        setattr(torch.version, name, version)
    for name, stand_in in _cuda(target).items():
        setattr(torch.cuda, name, stand_in)
    for name in ("mark", "range_push", "range_pop", "range_start", "range_end"):
        setattr(torch.cuda.nvtx, name, _always(0))
    device = torch.device("cuda", 0)
    for name, answer in {
        "current_accelerator": device,
        "is_available": True,
        "device_count": 1,
        "current_device_index": 0,
        "synchronize": None,
        "set_device_index": None,
        "empty_cache": None,
    }.items():
        setattr(torch.accelerator, name, _always(answer))
    torch.Stream, torch.Event = _Stream, _Event  # type: ignore[misc, assignment]
    torch.Generator = _generator()  # type: ignore[misc]
    torch.library.Library.impl = _remember(torch.library.Library.impl)  # type: ignore[method-assign]
    torch.testing.assert_close = _compare_nothing(torch.testing.assert_close)
    _profile_the_cpu(torch.autograd.profiler.profile)
    _describe(FakeTensor)
    _modes()


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _profile_the_cpu(profile: Any) -> None:
    """Let profilers note nothing of the device: each operator would complain of its events."""
    prepare = profile.__init__

    @functools.wraps(prepare)
    def prepare_for_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **{**kwargs, "use_cuda": False, "use_device": None, "use_cpu": True})

    profile.__init__ = prepare_for_cpu


def _describe(fake: Any) -> None:
    """Let fake tensors answer as tensors of the device do."""
    import torch
    from torch._subclasses import fake_tensor

    there = torch.device(_NAME, 0)
    dispatch: Any = fake.__torch_dispatch__

    def named_for_cpp(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = dispatch(func, types, args, kwargs or {})
        if func is torch.ops.prim.device.default and found.type == "cuda":
            return there
        return found

    # What PyTorch's own Python makes in the mode is asked for by the name that C++ knows.
    mode = fake_tensor.FakeTensorMode
    in_mode = mode.__torch_dispatch__

    def named_for_python(
        self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(kwargs.get("device"), "type", None) == _NAME:
            kwargs = {**kwargs, "device": torch.device("cuda", 0)}
        return in_mode(self, func, types, args, kwargs)

    mode.__torch_dispatch__ = named_for_python  # type: ignore[method-assign]

    def address(tensor: Any) -> int:
        # A view keeps its storage's address, and the alignment of its offset: allocators
        # align to 256 bytes and more. Storages lie 16 bytes apart at least in this process.
        if tensor.device.type != "cuda":
            recorder.refuse("an address was read (data_ptr)")
        return (tensor.untyped_storage()._cdata << 8) + (
            tensor.storage_offset() * tensor.element_size()
        )

    def unreadable(name: str) -> Callable[..., Any]:
        return lambda *_, **__: recorder.refuse(f"values were read ({name})")

    fake.__torch_dispatch__ = classmethod(named_for_cpp)
    # The same where the fake tensors' mode is entered.
    handlers: dict[Any, Any] = fake_tensor._DISPATCH_META_HANDLERS
    fake_device = handlers[torch.ops.prim.device.default]

    def named_for_cpp_in_mode(args: Any) -> Any:
        found = fake_device(args)
        return there if found.type == "cuda" else found

    handlers[torch.ops.prim.device.default] = named_for_cpp_in_mode
    fake.is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    fake.is_cpu = property(lambda tensor: tensor.device.type == "cpu")
    fake.data_ptr = address
    for name in ("numpy", "__array__", "__dlpack__"):
        setattr(fake, name, unreadable(name))
    # What pickles a tensor comes by its mode; what copies one does not.
    mode.__reduce_ex__ = unreadable("pickle")  # type: ignore[method-assign]

    def formatted(tensor: Any, how: str) -> str:
        return unreadable("format")() if how else repr(tensor)

    fake.__format__ = formatted
    # Nothing is to be initialized before a backward pass.
    setattr(fake_tensor, "init_gpu_context", _always(None))  # noqa: B010 (typed as a cache)


def _modes() -> None:
    """Enter the modes for good, in this thread and in every one that it starts."""
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedOperatorException,
    )
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    here, there = torch.device("cuda", 0), torch.device(_NAME, 0)
    # One mode serves all threads, and what it notes while it runs an operator is the thread's.
    running = threading.local()
    FakeTensorMode.in_kernel_invocation = property(  # type: ignore[assignment]
        lambda _: getattr(running, "operator", False),
        lambda _, value: setattr(running, "operator", value),
    )
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    aten = torch.ops.aten
    comparisons = {aten.equal.default: "torch.equal", aten.allclose.default: "torch.allclose"}

    def faked_once(tensor: Any) -> Any:
        return tensor if isinstance(tensor, FakeTensor) else fakes.from_tensor(tensor)

    def translated(value: Any) -> Any:
        if isinstance(value, torch.device):
            return there if value.type == "cuda" else value
        if isinstance(value, str) and value.partition(":")[0] == "cuda":
            return there
        return value

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.cuda:
                return args[0].to(there)
            if func is torch.Tensor.new_tensor and args[0].is_cuda:
                given = {"dtype": args[0].dtype, "device": here} | kwargs
                return torch.tensor(*args[1:], **given)
            if func is torch.Tensor.pin_memory:
                return args[0]
            if func is torch.Tensor.record_stream:
                return None
            if "device" in kwargs:
                kwargs = {**kwargs, "device": translated(kwargs["device"])}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            if func is torch.Tensor.to:
                args = tuple(map(translated, args))
            return func(*args, **kwargs)

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            device = kwargs.get("device")
            made_there = device is not None and torch.device(device).type in ("cuda", _NAME)
            faked = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
            if not (made_there or faked):
                return func(*args, **kwargs)
            if faked and func in comparisons:
                recorder.passed_over(f"a comparison ({comparisons[func]})")
                return True
            if custom := _implementation(func):
                with self:
                    return custom(*args, **kwargs)
            if made_there:
                kwargs = {**kwargs, "device": here}
            kwargs.pop("pin_memory", None)
            if isinstance(kwargs.get("generator"), torch.Generator):
                kwargs = {**kwargs, "generator": None}
            if func is not torch.ops.prim.device.default:
                if faked:
                    _refuse_to_write(func, args, kwargs, FakeTensor)
                # Else the mode takes real ones for constants, and would move their values.
                args, kwargs = tree_map_only(torch.Tensor, faked_once, (args, kwargs))
            try:
                with fakes if made_there else contextlib.nullcontext():
                    return func(*args, **kwargs)
            except DataDependentOutputException:
                reason = f"values were read ({_plain(func)})"
            except DynamicOutputShapeException:
                reason = f"a shape depends on values ({_plain(func)})"
            except (UnsupportedOperatorException, NotImplementedError):
                reason = f"an operator has no shape function ({func})"
            # Out here, so that tracebacks don't tell the way the refusal took.
            return recorder.refuse(reason)

    def enter() -> None:
        # Backward passes run on the thread that has the modes.
        torch.autograd.set_multithreading_enabled(False)
        Functions().__enter__()
        Dispatch().__enter__()

    start = threading.Thread.start

    @functools.wraps(start)
    def start_in_modes(thread: threading.Thread) -> None:
        run = thread.run

        def run_in_modes() -> None:
            enter()
            run()

        thread.run = run_in_modes  # type: ignore[method-assign]
        start(thread)

    enter()
    threading.Thread.start = start_in_modes  # type: ignore[assignment, method-assign]

    swap = torch.utils.swap_tensors

    def swap_forgotten(one: Any, other: Any) -> None:
        # `Module.to` swaps fake parameters, which may have no weak references: a memo of the
        # fake tensors' mode holds one, of use to nobody but compilers.
        fakes.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap(one, other)

    torch.utils.swap_tensors = swap_forgotten


def _plain(func: Any) -> str:
    """Name an operator as scripts write it."""
    name = func.overloadpacket.__name__
    return {"_local_scalar_dense": "item", "_unique2": "unique"}.get(name, name)


def _refuse_to_write(func: Any, args: Any, kwargs: Any, fake: Any) -> None:
    """Refuse to write what isn't there into a real tensor."""
    import torch

    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(written, torch.Tensor) and not isinstance(written, fake):
            recorder.refuse(f"values were copied to the CPU ({_plain(func)})")


def _compare_nothing(compare: Callable[..., Any]) -> Callable[..., Any]:
    """Make a comparison one that passes where a side has no values."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._pytree import tree_leaves

    @functools.wraps(compare)
    def compared(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((actual, expected))):
            return recorder.passed_over("a comparison (torch.testing.assert_close)")
        return compare(actual, expected, *args, **kwargs)

    return compared


# Python functions that libraries registered for operators of the device, by ``space::name``.
_registered: dict[str, Callable[..., Any]] = {}


def _remember(register: Callable[..., Any]) -> Callable[..., Any]:
    """Make a library's registration of a Python function one that is remembered."""

    @functools.wraps(register)
    def remembered(
        library: Any, name: Any, function: Any, dispatch_key: str = "", **kwargs: Any
    ) -> Any:
        there = dispatch_key in ("", "CUDA", "CompositeExplicitAutograd")
        if there and isinstance(name, str) and library.ns not in ("aten", "prims"):
            _registered[f"{library.ns}::{name.rpartition('::')[2].partition('.')[0]}"] = function
        return register(library, name, function, dispatch_key, **kwargs)

    return remembered


def _implementation(func: Any) -> Callable[..., Any] | None:
    """Find the Python function of an operator that a library registered for the device.

    Fake tensors know only its shapes; its launches are in here.
    """
    from torch._library.custom_ops import OPDEFS

    name = func._schema.name
    definition = OPDEFS.get(name)
    if definition is None:
        return _registered.get(name)
    for device in ("cuda", None):
        if device in definition._backend_fns:
            return definition._backend_fns[device]
    return definition._init_fn


def _generator() -> Any:
    """Make generators of the device, which has no values to draw, ones of the CPU."""
    import torch

    base: Any = torch.Generator

    class Generator(base):
        def __new__(cls, device: Any = "cpu") -> Any:
            generator = base.__new__(cls, "cpu")
            generator.device = torch.device(device)
            return generator

        device = None

    return Generator


def _cuda(target: Target) -> dict[str, Any]:
    """List what stands in for functions of `torch.cuda`."""
    import torch

    capability = _capability(target)
    properties = SimpleNamespace(
        name=target.chips[0] if target.chips else target.name,
        major=capability[0],
        minor=capability[1],
        total_memory=_MEMORY_BYTES,
        # Where no figure was published, one: it is the size of persistent kernels' grids.
        multi_processor_count=target.compute_units or 1,
        warp_size=target.warp_size,
        gcnArchName=f"{target.arch}:sramecc+:xnack-",
        # CUDA has an opt-in beyond its 48 KiB; HIP's limit is the hardware's.
        shared_memory_per_block=target.lds_limit if target.backend == "hip" else 49_152,
        shared_memory_per_block_optin=target.lds_limit,
        shared_memory_per_multiprocessor=target.lds_per_cu,
        regs_per_multiprocessor=target.registers_per_simd * target.simds_per_cu,
        max_threads_per_multi_processor=(
            target.max_warps_per_simd * target.simds_per_cu * target.warp_size
        ),
    )
    stream = _Stream()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_arch_list": [str(target.arch)],
        "mem_get_info": (_MEMORY_BYTES, _MEMORY_BYTES),
        "current_stream": stream,
        "default_stream": stream,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "memory_stats": {},
        "memory_summary": "",
        "initial_seed": 0,
        "is_current_stream_capturing": False,
        "can_device_access_peer": False,
    }
    nothing = (
        "init _lazy_init set_device synchronize empty_cache manual_seed manual_seed_all seed "
        "seed_all set_rng_state ipc_collect reset_peak_memory_stats reset_max_memory_allocated "
        "set_stream _sleep set_per_process_memory_fraction"
    )
    return (
        {name: _always(answer) for name, answer in answers.items()}
        | {name: _always(None) for name in nothing.split()}
        | {
            "Stream": _Stream,
            "ExternalStream": _Stream,
            "Event": _Event,
            "stream": _Stream.current,
            "CUDAGraph": _Graph,
            "graph": _Graph,
        }
    )


def _capability(target: Target) -> tuple[int, int]:
    """Tell a target's capability as PyTorch does.

    On ROCm it is the GFX number without its last digit: gfx90a is 9.0, gfx942 9.4, gfx1201 12.0.
    """
    if target.backend == "hip":
        digits = str(target.arch).removeprefix("gfx")
        return int(digits[:-2]), int(digits[-2])
    return divmod(int(target.arch), 10)


class _Stream:
    """Stands in for a stream, on which nothing waits."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    @classmethod
    def current(cls, stream: Any = None) -> Any:
        """Enter a stream, as `torch.cuda.stream` does."""
        return stream or cls()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        """Wait for nothing."""

    wait_stream = wait_event = lambda self, other: None

    def query(self) -> bool:
        """Say that everything is done."""
        return True

    def record_event(self, event: Any = None) -> Any:
        """Give the event that is said to be over."""
        return event or _Event()


class _Event:
    """Stands in for an event: everything is over, and no time was taken."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, stream: Any = None) -> None:
        """Note nothing."""

    wait = record

    def synchronize(self) -> None:
        """Wait for nothing."""

    def query(self) -> bool:
        """Say that it is over."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """Tell no time."""
        return float("nan")


class _Graph:
    """Refuses to record a graph: replaying it would launch nothing."""

    def __init__(self, *_: Any, **__: Any):
        recorder.refuse("a graph was recorded (CUDAGraph)")
