"""What a GPU's driver says while it is measured: clock, temperature, what holds the clock down.

NVIDIA's driver answers through nvidia-ml-py, AMD's through amdsmi. What is not installed, or
does not answer, is a missing figure and never ends a measurement.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons, as nvidia-smi spells them (nvml.h).
_NVML_REASONS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
# Idle, and clocks that the user set: neither takes from what was asked for.
_NVML_HARMLESS = 0x01 | 0x02

# Counters of amdsmi_get_gpu_metrics_info that grow while the clocks are held down (MI300
# and later; amdsmi's changelog of ROCm 6.3).
_AMD_COUNTERS = {
    "ppt_residency_acc": "power_cap",
    "prochot_residency_acc": "processor_hot",
    "socket_thm_residency_acc": "socket_thermal",
    "vr_thm_residency_acc": "voltage_regulator_thermal",
    "hbm_thm_residency_acc": "hbm_thermal",
}


@dataclass(frozen=True)
class Reading:
    """One look at the GPU; None is what isn't known.

    Args:
        clock_mhz: of the SMs (compute units).
        temperature_c: of the device.
        throttled: what holds the clocks down; empty where nothing does.
    """

    clock_mhz: float | None
    temperature_c: float | None
    throttled: frozenset[str] | None


def read() -> Reading:
    """Look at the current GPU; AMD's driver renews what it says every 100 ms."""
    throttled = _throttled()
    return Reading(
        _number("clock_rate"), _number("temperature"), throttled and _asked_gently(throttled)
    )


def driver() -> str | None:
    """Tell the version of the GPU's kernel driver."""
    # In a virtual machine the modules may not be listed.
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    return _asked_gently(_nvml_driver) or _asked_gently(_amd_driver)


def _asked_gently(ask: Callable[[], Any]) -> Any:
    """Ask a driver's library, of which each has errors of its own: None where it fails."""
    with contextlib.suppress(Exception):
        return ask()
    return None


def _number(name: str) -> float | None:
    import torch

    return _asked_gently(lambda: float(getattr(torch.cuda, name)()))


@functools.cache
def _throttled() -> Callable[[], frozenset[str]] | None:
    """Find whom to ask what holds the clocks down."""
    return _asked_gently(_nvml_throttled) or _asked_gently(_amd_throttled)


def _nvml_throttled() -> Callable[[], frozenset[str]]:
    import pynvml
    import torch

    # As torch.cuda.clock_rate finds the device, CUDA_VISIBLE_DEVICES heeded.
    device = torch.cuda._get_pynvml_handler()

    def ask() -> frozenset[str]:
        return _nvml_names(pynvml.nvmlDeviceGetCurrentClocksEventReasons(device))

    ask()
    return ask


def _nvml_names(reasons: int) -> frozenset[str]:
    """Name the bits; one that is not known yet is its number.

    >>> sorted(_nvml_names(0x01 | 0x04 | 0x4000))
    ['0x4000', 'sw_power_cap']
    """
    bits = (1 << place for place in range(reasons.bit_length()))
    held = (bit for bit in bits if bit & reasons & ~_NVML_HARMLESS)
    return frozenset(_NVML_REASONS.get(bit, hex(bit)) for bit in held)


def _nvml_driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def _amd_throttled() -> Callable[[], frozenset[str]]:
    import amdsmi
    import torch

    device = torch.cuda._get_amdsmi_handler()

    def counters() -> dict[str, int]:
        metrics = amdsmi.amdsmi_get_gpu_metrics_info(device)
        return {name: int(metrics[name]) for name in _AMD_COUNTERS}

    before = counters()

    def ask() -> frozenset[str]:
        now = counters()
        grown = frozenset(_AMD_COUNTERS[name] for name in now if now[name] > before[name])
        before.update(now)
        return grown

    return ask


def _amd_driver() -> str:
    import amdsmi
    import torch

    device = torch.cuda._get_amdsmi_handler()
    return str(amdsmi.amdsmi_get_gpu_driver_info(device)["driver_version"])
