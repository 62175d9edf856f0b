"""Launches take turns and each is timed alone, behind a flush; on a GPU that only keeps time."""

import json
import random
import re

import pytest

from moelab import sensors, timing
from moelab.timing import ContextLost


class Device:
    """Stands for the GPU: a clock that launches advance, and what happened in order."""

    def __init__(self):
        self.us = 0.0
        self.log = []
        self.lost = False

    def launch(self, name, *times):
        """A launch that takes the given microseconds, the last for ever after."""
        left = list(times)

        def run():
            self.log.append(name)
            self.us += left.pop(0) if len(left) > 1 else left[0]

        return run

    def fail(self, name, error, after=0, loses=False):
        """A launch that fails after so many that don't."""
        left = [after]

        def run():
            if not left[0]:
                self.lost = loses
                raise error
            left[0] -= 1
            self.us += 10

        return run

    def zero_(self):
        self.log.append("flush")
        self.us += 300

    def synchronize(self):
        self.log.append("synchronize")
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def read(self):
        self.log.append("read")
        return sensors.Reading(1980.0, 50.0, frozenset())


@pytest.fixture
def device(monkeypatch):
    import torch

    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.us = device.us

        def elapsed_time(self, stop):
            return (stop.us - self.us) / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(timing, "_flush", lambda: device)
    monkeypatch.setattr(sensors, "read", device.read)
    monkeypatch.setattr(timing, "_flushes", lambda launch: 1)
    return device


def timed(launches, rounds=3, repetitions=2, seed=0):
    return timing.in_turns(launches, rounds, repetitions, random.Random(seed))


def test_every_sample_is_one_launch_behind_a_flush_and_without_it(device):
    gained = timed({"a": device.launch("a", 20.0), "b": device.launch("b", 30.0)})
    assert json.loads(gained["a"]["samples_us"]) == [[20.0, 20.0]] * 3
    assert gained["b"]["time_us"] == pytest.approx(30)
    work = [what for what in device.log if what not in ("read", "synchronize")]
    assert set(work[::2]) == {"flush"}
    assert set(work[1::2]) == {"a", "b"}


@pytest.mark.parametrize(("host_us", "flushes"), [(20, 1), (149, 1), (151, 2), (1400, 10)])
def test_the_gpu_is_busy_for_twice_what_the_cpu_takes_to_launch(host_us, flushes, monkeypatch):
    import torch

    class Busy:
        """Stands for a GPU that writes a flush in 300 us, and for the CPU's clock."""

        now = pending = 0.0

        def zero_(self):
            self.pending += 300e-6

        def synchronize(self):
            self.now, self.pending = self.now + self.pending, 0.0

    busy = Busy()

    def launch():
        busy.now += host_us * 1e-6
        # What the GPU takes for it does not count.
        busy.pending += 5e-3

    monkeypatch.setattr(timing, "_flush", lambda: busy)
    monkeypatch.setattr(torch.cuda, "synchronize", busy.synchronize)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: busy.now)
    assert timing._flushes(launch) == flushes


def test_a_launch_that_the_cpu_is_slow_to_make_has_more_flushes_before_it(device, monkeypatch):
    heads = {"a": 1, "b": 3}
    monkeypatch.setattr(timing, "_flushes", lambda launch: heads[launch()])
    takes = {name: device.launch(name, 20.0) for name in heads}
    launches = {name: lambda name=name: takes[name]() or name for name in heads}
    timed(launches)
    signs = {"flush": "-", "read": "", "synchronize": ""}
    log = "".join(signs.get(what, what) for what in device.log)
    # Each was launched once to ask the CPU.
    assert re.fullmatch("(ab|ba)(---b|-a)+", log)


def turns(device, first):
    """The names that had their turns in rounds, each with a reading, after the warm-up."""
    log = device.log[device.log.index("read") - first :]
    return [log[i - 1] for i, what in enumerate(log) if what == "read"]


def test_in_each_round_every_launch_has_one_turn_in_an_order_of_its_own(device):
    names = "abcdef"
    timed({name: device.launch(name, 20.0) for name in names}, rounds=4)
    had = turns(device, first=1)
    rounds = [tuple(had[at : at + 6]) for at in range(0, 24, 6)]
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) == 4


def test_the_device_is_read_while_it_works(device):
    timed({"a": device.launch("a", 20.0)})
    after = {device.log[i + 1] for i, what in enumerate(device.log) if what == "read"}
    before = {device.log[i - 1] for i, what in enumerate(device.log) if what == "read"}
    assert (before, after) == ({"a"}, {"synchronize"})


def test_rounds_begin_when_times_have_settled_and_not_before(device):
    # Each of 60 launches is 1% faster than the one before.
    gained = timed({"a": device.launch("a", *(20 * 0.99**n for n in range(60)), 10.0)})
    assert set(json.loads(gained["a"]["samples_us"])[0]) == {10.0}


def test_what_never_settles_is_timed_all_the_same(device):
    restless = [20.0, 20.0, 20.0, 20.0, 20.0, 40.0, 40.0, 40.0, 40.0, 40.0] * 40
    gained = timed({"a": device.launch("a", *restless)}, rounds=5, repetitions=5)
    assert device.log.count("a") == 5 * (40 + 4 + 5)
    assert gained["a"]["time_us"] in (pytest.approx(20), pytest.approx(40))


def test_only_the_first_launch_of_a_problem_has_a_long_warm_up(device):
    timed({name: device.launch(name, 20.0) for name in "ab"}, rounds=2, repetitions=1)
    assert (device.log.count("a"), device.log.count("b")) == (20 + 10 + 2, 10 + 2)


def test_one_launch_that_fails_says_why_and_costs_no_other_its_time(device):
    torch = pytest.importorskip("torch")
    gained = timed(
        {
            "good": device.launch("good", 20.0),
            "large": device.fail(
                "large", torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB")
            ),
            "late": device.fail("late", ValueError("no such\ntile"), after=12),
        }
    )
    assert gained["good"]["time_us"] == pytest.approx(20)
    assert gained["large"] == {
        "status": "out_of_memory",
        "reason": "OutOfMemoryError: CUDA out of memory. Tried 9 GiB",
    }
    assert gained["late"] == {"status": "launch_error", "reason": "ValueError: no such"}


def test_a_lost_context_ends_everything_and_names_the_launch(device):
    wrong = RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it")
    launches = {"good": device.launch("good", 20.0), "bad": device.fail("bad", wrong, loses=True)}
    with pytest.raises(ContextLost, match="bad: RuntimeError: CUDA error: an illegal") as lost:
        timed(launches)
    assert lost.value.of == "bad"
    assert lost.value.row["status"] == "launch_error"
    assert "Search" not in lost.value.row["reason"]


def test_nothing_to_launch_is_nothing_timed(device):
    assert timed({}) == {}
    assert device.log == []


def reading(clock_mhz=1980.0, temperature_c=50.0, throttled=()):
    return sensors.Reading(clock_mhz, temperature_c, None if throttled is None else {*throttled})


def test_the_state_is_the_median_clock_the_highest_temperature_and_every_reason():
    state = timing._state(
        [
            reading(1980, 50),
            reading(1900, 58, {"sw_power_cap"}),
            reading(1950, 54, {"sw_power_cap", "hw_slowdown"}),
        ]
    )
    assert state == {
        "clock_mhz": 1950,
        "temperature_c": 58,
        "throttled": "hw_slowdown,sw_power_cap",
    }


@pytest.mark.parametrize(("known", "told"), [((), ""), (None, None)])
def test_not_throttled_differs_from_not_known(known, told):
    assert timing._state([reading(throttled=known)])["throttled"] == told


def test_what_no_sensor_told_is_missing():
    state = timing._state([reading(None, None, None)] * 2)
    assert set(state.values()) == {None}


def test_a_round_is_one_sample_however_many_repetitions_it_has():
    few = timing.interval([[10.0], [11.0], [12.0]])
    many = timing.interval([[10.0] * 50, [11.0] * 50, [12.0] * 50])
    assert few == many
    assert few["time_us"] == pytest.approx(11)
    # Student's t with 2 degrees of freedom is 4.30, of logarithms' standard error 0.0526.
    assert few["time_low_us"] == pytest.approx(10.97 / 1.254, rel=2e-3)
    assert few["time_high_us"] == pytest.approx(10.97 * 1.254, rel=2e-3)


def test_one_slow_sample_moves_nothing():
    steady = [[10.0, 10.1, 10.2]] * 4
    hit = [[10.0, 10.1, 900.0], *steady[1:]]
    assert timing.interval(hit)["time_us"] == pytest.approx(10.1)


# On a GPU.


@pytest.mark.gpu
def test_twice_the_work_takes_twice_the_time_and_the_device_is_read():
    import torch

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def twice():
        return x @ x, x @ x

    gained = timed({"once": lambda: x @ x, "twice": twice}, rounds=6, repetitions=5)
    assert gained["twice"]["time_us"] / gained["once"]["time_us"] == pytest.approx(2, rel=0.1)


@pytest.mark.gpu
def test_memory_that_is_not_there_is_a_row_of_its_own():
    import torch

    x = torch.ones(1024, device="cuda")
    gained = timed({"large": lambda: x.expand(2**40, 1024).clone(), "small": lambda: x + 1})
    assert gained["large"]["status"] == "out_of_memory"
    assert gained["small"]["time_us"] > 0
