"""What a driver's library says is told by name; what it doesn't say is missing."""

import sys
from types import SimpleNamespace

import pytest

from moelab import sensors
from moelab.sensors import Reading


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """No library is there but those that a test puts there."""
    sensors._throttled.cache_clear()
    for name in ("pynvml", "amdsmi"):
        monkeypatch.setitem(sys.modules, name, None)
    yield
    sensors._throttled.cache_clear()


@pytest.fixture
def nvml(monkeypatch):
    """NVIDIA's library: `.reasons` is what it answers."""
    import torch

    library = SimpleNamespace(
        reasons=0,
        nvmlDeviceGetCurrentClocksEventReasons=lambda device: library.reasons,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "_get_pynvml_handler", lambda: "device 0")
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1980)
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 54)
    return library


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (0x0, set()),
        (0x1 | 0x2, set()),  # idle; clocks as the user set them
        (0x4, {"sw_power_cap"}),
        (0x1 | 0x8 | 0x40, {"hw_slowdown", "hw_thermal_slowdown"}),
        (0x20 | 0x80, {"sw_thermal_slowdown", "hw_power_brake_slowdown"}),
    ],
)
def test_what_holds_the_clocks_down_is_told_by_nvmls_names(nvml, reasons, told):
    nvml.reasons = reasons
    assert sensors.read() == Reading(1980.0, 54.0, frozenset(told))


def test_a_driver_that_stops_answering_leaves_the_figure_missing(nvml):
    assert sensors.read().throttled == frozenset()

    def fail(device):
        raise RuntimeError("GPU is lost")

    nvml.nvmlDeviceGetCurrentClocksEventReasons = fail
    assert sensors.read() == Reading(1980.0, 54.0, None)


def test_without_any_library_everything_is_missing(monkeypatch):
    import torch

    def absent():
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", absent)
    monkeypatch.setattr(torch.cuda, "temperature", absent)
    assert sensors.read() == Reading(None, None, None)


def test_amds_counters_hold_the_clocks_down_while_they_grow(monkeypatch):
    import torch

    metrics = dict.fromkeys(sensors._AMD_COUNTERS, 100)
    library = SimpleNamespace(
        amdsmi_get_gpu_metrics_info=lambda device: dict(metrics),
        amdsmi_get_gpu_driver_info=lambda device: {"driver_version": "6.12"},
    )
    monkeypatch.setitem(sys.modules, "amdsmi", library)
    monkeypatch.setattr(torch.cuda, "_get_amdsmi_handler", lambda: "device 0")
    told = []
    for grown in ((), ("ppt_residency_acc",), (), ("ppt_residency_acc", "hbm_thm_residency_acc")):
        for name in grown:
            metrics[name] += 1
        told.append(sensors.read().throttled)
    assert told == [set(), {"power_cap"}, set(), {"power_cap", "hbm_thermal"}]
    # This card has no such counters.
    metrics["ppt_residency_acc"] = "N/A"
    assert sensors.read().throttled is None


def test_torch_finds_the_device_for_both_libraries():
    import torch

    assert callable(torch.cuda._get_pynvml_handler)
    assert callable(torch.cuda._get_amdsmi_handler)


@pytest.fixture
def no_modules(monkeypatch):
    def absent(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(sensors.Path, "read_text", absent)


def test_the_drivers_version_is_the_modules_or_what_the_library_says(nvml, monkeypatch):
    monkeypatch.setattr(sensors.Path, "read_text", lambda self: "570.2\n")
    assert sensors.driver() == "570.2"


def test_where_modules_are_not_listed_the_library_is_asked(nvml, no_modules):
    assert sensors.driver() == "580.1"


def test_a_driver_that_nothing_tells_is_missing(no_modules):
    assert sensors.driver() is None


# On a GPU.


@pytest.mark.gpu
def test_this_gpus_driver_has_a_version(monkeypatch):
    monkeypatch.undo()
    assert sensors.driver()


@pytest.mark.gpu
def test_this_gpu_is_read_where_its_library_is_installed(monkeypatch):
    monkeypatch.undo()
    import torch

    pytest.importorskip("amdsmi" if torch.version.hip else "pynvml")
    reading = sensors.read()
    assert reading.clock_mhz > 0
    assert 0 < reading.temperature_c < 120
    assert reading.throttled is not None
