"""Triton without a driver: a launch is specialized as ever, then written down.

`JITFunction.run` stays Triton's own, so what is constant, divisible by 16 or within 2 GiB is
what a real launch would have found. Instead of compiling, the frontend alone runs: it needs
the kernel's Python, which no other process has. What it makes is compiled elsewhere.
"""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import compiler
from ..specs import Target
from . import recorder

# Keys of what the running autotuner has tried so far; None outside of one.
_tried: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("tried", default=None)


def install(target: Target) -> None:
    """Make Triton, which has just been imported, write its launches down."""
    import triton
    from triton import testing
    from triton.runtime import autotuner, driver, jit

    driver.set_active(_Driver(target))
    jit.JITFunction._do_compile = _do_compile
    autotuner.Autotuner.run = _try_every_config
    for name in ("do_bench", "do_bench_cudagraph"):
        setattr(testing, name, _call_once)
    # Scratch memory is asked for by launchers, of which there are none.
    triton.set_allocator(lambda size, alignment, stream: None)


def _do_compile(
    self: Any,
    key: Any,
    signature: Any,
    device: Any,
    constants: Any,
    options: Any,
    attributes: Any,
    warmup: bool,
) -> _Kernel:
    """Stand in for `JITFunction._do_compile`: run the frontend, keep what it makes."""
    from .. import targets

    kernels, _, gpu, backend, _ = self.device_caches[device]
    name = self.fn.__qualname__
    if name.rpartition(".")[2] != self.fn.__name__:
        # Made from text, in some function's name.
        name = self.fn.__name__
    target = next(
        one
        for one in targets.TARGETS.values()
        if (one.backend, one.arch) == (gpu.backend, gpu.arch)
    )
    said = {
        "kernel": f"{self.fn.__module__}:{name}",
        "target": target.name,
        "triton": compiler.triton_version(),
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
        "async_copy": compiler.default_async_copy(target),
    }
    source = self.ASTSource(self, signature, constants, attributes)
    try:
        made = compiler.frontend(compiler.bound_launch(source, options, backend, target, None))
    except Exception as error:
        refused = recorder.keep(said | {"error": _chain(error)})
        _launched(refused)
        raise
    kept = recorder.keep(
        said
        | {
            "ir": made.text,
            "stage": made.stage,
            "options": options.__dict__,
            "environment": compiler.environment_variables(),
        }
    )
    kernels[key] = kernel = _Kernel(kept, options)
    if warmup:
        recorder.event("launch", keys=[kept], times=0)
    return kernel


def _chain(error: BaseException) -> str:
    """Say what was raised, and at the end what it came from: the frontend wraps errors."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    said = f"{type(error).__name__}: {error}"
    return said if root is error else f"{said}\n{type(root).__name__}: {root}"


def _launched(key: str) -> None:
    """Write a launch down, or note it as one that the running autotuner tries."""
    tried = _tried.get()
    if tried is None:
        recorder.event("launch", keys=[key], times=1)
    else:
        tried.append(key)


class _Kernel:
    """Stands in for Triton's `CompiledKernel`."""

    function = packed_metadata = None

    def __init__(self, key: str, options: Any):
        self.key = key
        self._options = options
        self._told: dict[str, Any] | None = None

    def launch_metadata(self, grid: Any, stream: Any, *arguments: Any) -> None:
        """Give hooks nothing: none is called."""

    def run(
        self,
        grid_0: Any,
        grid_1: Any,
        grid_2: Any,
        stream: Any,
        function: Any,
        packed_metadata: Any,
        launch_metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        """Write the launch down."""
        import torch

        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor) and not argument.is_cuda:
                raise ValueError(
                    f"Pointer argument (at {position}) cannot be accessed from Triton (cpu tensor?)"
                )
        _launched(self.key)

    def __getitem__(self, grid: Any) -> Any:
        """Launch by the compiled kernel itself, which takes arguments by position."""
        return lambda *arguments, **_: self.run(*([None] * 9), *arguments)

    def _init_handles(self) -> None:
        """Load nothing."""

    @property
    def metadata(self) -> SimpleNamespace:
        """What Triton tells of a compiled kernel: its options and its shared memory."""
        return SimpleNamespace(**{**self._options.__dict__, "shared": self._tell()["shared"]})

    @property
    def n_regs(self) -> int:
        """Registers of a thread."""
        return self._tell()["n_regs"]

    @property
    def n_spills(self) -> int:
        """Spilled registers of a thread."""
        return self._tell()["n_spills"]

    @property
    def asm(self) -> Any:
        """Not there: nothing is compiled in this process."""
        recorder.refuse("compiled code was read (asm)")

    def _tell(self) -> dict[str, Any]:
        """Compile to the end, in a process that may die of it."""
        if self._told is None:
            environment = {
                name: value for name, value in os.environ.items() if name != "PYTHONPATH"
            }
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            done = subprocess.run(
                [sys.executable, "-c", "from moelab.stand_in import driver; driver.tell()"],
                input=str(recorder.kept(self.key)),
                capture_output=True,
                text=True,
                env=environment,
            )
            if done.returncode:
                recorder.refuse("registers of a kernel that does not compile were read")
            self._told = json.loads(done.stdout.splitlines()[-1])
        return self._told


def tell() -> None:
    """Compile the launch whose file stdin names, and print its resources as JSON."""
    asked = recorder.question(json.loads(Path(sys.stdin.read()).read_text()), "default")
    allocation, resources = compiler.full(compiler.specialize(asked))
    print()
    print(
        json.dumps(
            {
                "shared": allocation.lds_bytes,
                "n_regs": resources.registers,
                "n_spills": resources.spilled_registers,
            }
        )
    )


def _try_every_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for `Autotuner.run`: launch with each configuration, time none.

    One launch is written down, with every configuration that could serve it.
    """
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
    tried: list[str] = []
    launched, refusal = [], None
    token = _tried.set(tried)
    try:
        for config in configs:
            given = {**kwargs, **config.all_kwargs()}
            if config.pre_hook:
                config.pre_hook({**self.nargs, **given})
            self.pre_hook({**self.nargs, **given})
            try:
                launched.append((config, self.fn.run(*args, **given)))
            except compiler.static_assertion() as error:
                # The autotuner passes over these, and over nothing else that a frontend raises.
                refusal = error
    finally:
        _tried.reset(token)
        if tried:
            times = 0 if kwargs.get("warmup") else 1
            recorder.event("launch", keys=list(dict.fromkeys(tried)), times=times)
        self.nargs = None
    if not launched:
        assert refusal is not None, "an autotuner has one configuration at least"
        raise refusal
    self.best_config, kernel = launched[0]
    return kernel


def _call_once(
    function: Any,
    *_: Any,
    quantiles: Any = None,
    return_mode: str = "mean",
    **__: Any,
) -> Any:
    """Stand in for `do_bench`: nothing is timed, so every time is NaN."""
    function()
    nan = float("nan")
    if quantiles is not None:
        return [nan] * len(quantiles) if len(quantiles) > 1 else nan
    return [nan] if return_mode == "all" else nan


def _driver_base() -> Any:
    from triton.backends.driver import DriverBase

    return DriverBase


class _Driver(_driver_base()):  # type: ignore[misc]
    """Stands in for a GPU's driver."""

    def __init__(self, target: Target):
        self.target = target
        self.utils = SimpleNamespace(get_device_properties=self._properties)

    @classmethod
    def is_active(cls) -> bool:
        """Say that this is the driver."""
        return True

    def get_current_target(self) -> Any:
        """Name the target as Triton does."""
        return compiler.gpu_target(self.target)

    def get_active_torch_device(self) -> Any:
        """Name PyTorch's device."""
        import torch

        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        """Give PyTorch's module of the device."""
        import torch

        return torch.cuda

    def get_current_device(self) -> int:
        """Number the one device."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Stay on the one device."""

    def get_current_stream(self, device: int) -> int:
        """Name the one stream."""
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """Tell the capability as PyTorch does."""
        import torch

        capability: tuple[int, int] = torch.cuda.get_device_capability(device)
        return capability

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Refuse: there is no launcher to generate."""
        recorder.refuse("a launcher was to be generated")

    def get_benchmarker(self) -> Any:
        """Time nothing."""
        return _call_once

    def get_empty_cache_for_benchmark(self) -> Any:
        """Give what benchmarks clear between runs."""
        import torch

        return torch.empty(1, dtype=torch.int32, device="cuda")

    def clear_cache(self, cache: Any) -> None:
        """Clear nothing."""

    def _properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.lds_limit,
            "max_num_regs": self.target.registers_per_simd * self.target.simds_per_cu,
            "multiprocessor_count": self.target.compute_units or 1,
            "warpSize": self.target.warp_size,
        }
