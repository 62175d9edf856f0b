"""Let launches take turns on the GPU at hand, and sum up what each took.

Whose launches they are doesn't matter. Every sample lies between two events, behind a flush of
the L2, or behind as many as the CPU needs to have the launch ready. A round is one turn of
every launch, in random order, so that a drift of the clocks meets all of them; before the
first, each is launched until its time has settled.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import sensors

if TYPE_CHECKING:
    from torch import Tensor

Launch = Callable[[], Any]
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Several times the L2 of every target (H200: 50 MiB, MI355X: 256 MiB with its cache).
_FLUSH_BYTES = 2**30

# The GPU is kept busy with flushes for this many times what the CPU takes to launch. On the
# H200 a flush is written in 0.39 ms, and a launch of ours takes the CPU 0.16 ms; one of
# triton_kernels takes longer than the flush, and then its time would be the CPU's.
_HEAD_START = 2.0

# A launch has settled when the medians of its last windows lie this close together.
_SETTLED = 0.01
_WINDOW = 5

OUT_OF_MEMORY = "out_of_memory"


class MeasureError(Exception):
    """Nothing can be measured here, or no more; the message says why."""


class ContextLost(MeasureError):
    """A launch left the device unusable for this process, for every launch after it too.

    Args:
        of: what was launched.
        row: what its row says.
    """

    def __init__(self, of: Hashable, row: dict[str, Any]):
        super().__init__(f"{of}: {row['reason']}; the GPU takes no launch of this process any more")
        self.of, self.row = of, row


class LaunchFailed(MeasureError):
    """A launch failed, and others may still go on.

    Args:
        row: what its row says.
    """

    def __init__(self, row: dict[str, Any]):
        super().__init__(row["reason"])
        self.row = row


class Turns(Generic[K]):
    """Launches of this process, each timed when it is called.

    Args:
        tell: called with each launch before its turn.

    Every method raises `LaunchFailed` where the launch fails, and `ContextLost` where nothing
    can be launched any more.
    """

    def __init__(self, launches: Mapping[K, Launch], tell: Callable[[K], None] = lambda of: None):
        self._launches = launches
        self._tell = tell
        self._heads: dict[K, int] = {}

    def start(self, of: K) -> None:
        """Load its code, and learn how long the CPU takes to have it ready."""
        self._heads[of] = self._tried(of, lambda: _flushes(self._launches[of]))

    def settle(self, of: K, alike: int, most: int) -> None:
        """Launch it until its time has settled; see `_settle`."""
        self._tried(of, lambda: _settle(self._launches[of], self._heads[of], alike, most))

    def sample(self, of: K, repetitions: int) -> tuple[list[float], sensors.Reading]:
        """Time it, in microseconds, and look at the device meanwhile."""
        seen: list[sensors.Reading] = []
        taken = self._tried(
            of,
            lambda: _samples(
                self._launches[of],
                self._heads[of],
                repetitions,
                lambda: seen.append(sensors.read()),
            ),
        )
        return [round(us, 2) for us in taken], seen[0]

    def _tried(self, of: K, turn: Callable[[], T]) -> T:
        self._tell(of)
        try:
            return turn()
        except Exception as error:
            raise LaunchFailed(failure(error, of)) from error


@dataclass
class Taken:
    """What a launch's turns gave.

    Args:
        samples: microseconds, a list for each round.
        readings: of the device, one for each round.
        failed: what its row says, if it failed.
    """

    samples: list[list[float]] = field(default_factory=list)
    readings: list[sensors.Reading] = field(default_factory=list)
    failed: dict[str, Any] | None = None

    @property
    def row(self) -> dict[str, Any]:
        """What the row gains: samples by round, their `interval` and how the device was."""
        if self.failed is not None:
            return self.failed
        said = {"samples_us": json.dumps(self.samples)}
        return said | interval(self.samples) | _state(self.readings)


def rounds_of(
    turns: Any, launches: Iterable[K], rounds: int, repetitions: int, order: random.Random
) -> dict[K, Taken]:
    """Let launches take turns, wherever they run.

    Args:
        turns: whoever launches, with the methods of `Turns`.
        rounds, repetitions: samples of each are ``rounds x repetitions``.
        order: of the turns.
    Raises:
        ContextLost: nothing can be launched any more.
    """
    taken = {of: Taken() for of in launches}

    def take_turns(turn: Callable[[K], None]) -> None:
        left = [of for of in taken if taken[of].failed is None]
        order.shuffle(left)
        for of in left:
            try:
                turn(of)
            except LaunchFailed as error:
                taken[of].failed = error.row

    def sample(of: K) -> None:
        us, reading = turns.sample(of, repetitions)
        taken[of].samples.append(us)
        taken[of].readings.append(reading)

    # One launch brings the clocks to where the work holds them. The others have their code
    # and their y to load.
    first = next(iter(taken), None)
    take_turns(turns.start)
    take_turns(lambda of: turns.settle(of, 4, 40) if of == first else None)
    take_turns(lambda of: turns.settle(of, 2, 4))
    for _ in range(rounds):
        take_turns(sample)
    return taken


def in_turns(
    launches: Mapping[K, Launch],
    rounds: int,
    repetitions: int,
    order: random.Random,
    tell: Callable[[K], None] = lambda of: None,
) -> dict[K, dict[str, Any]]:
    """Time launches of this process in turns.

    Args:
        rounds, repetitions: samples are ``rounds x repetitions``, with 2 rounds or more.
        order: of the turns.
        tell: called with each launch before its turn.
    Returns:
        what the row of each gains: samples by round, their `interval` and how the device was
        meanwhile; or status and reason of a launch that failed.
    Raises:
        ContextLost: nothing can be launched any more.
    """
    taken = rounds_of(Turns(launches, tell), launches, rounds, repetitions, order)
    return {of: turns.row for of, turns in taken.items()}


def failure(error: Exception, of: Hashable) -> dict[str, Any]:
    """Say in a row why a launch failed.

    Raises:
        ContextLost: and nothing can be launched any more.
    """
    import torch

    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    # PyTorch's own error, or the driver's where Triton loads a kernel.
    row = {"status": OUT_OF_MEMORY if "out of memory" in reason else "launch_error"}
    row["reason"] = reason
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise ContextLost(of, row) from error
    return row


def _flushes(launch: Launch) -> int:
    """Count the flushes that keep the GPU busy until the CPU has made a launch ready."""
    import torch

    def elapsed(work: Launch) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def flushed() -> None:
        _flush().zero_()
        torch.cuda.synchronize()

    # The first launch of each may load its code.
    launch()
    _flush().zero_()
    host = statistics.median(elapsed(launch) for _ in range(3))
    flush = statistics.median(elapsed(flushed) for _ in range(3))
    return max(1, math.ceil(_HEAD_START * host / flush))


def _settle(launch: Launch, flushes: int, alike: int, most: int) -> None:
    """Launch until the medians of the last ``alike`` windows lie within 1% of each other.

    Args:
        flushes: before each launch.
        most: windows, settled or not; each has five launches.
    """
    medians: list[float] = []
    while len(medians) < most:
        medians.append(statistics.median(_samples(launch, flushes, _WINDOW)))
        last = medians[-alike:]
        if len(last) == alike and max(last) <= (1 + _SETTLED) * min(last):
            return


def _samples(
    launch: Launch, flushes: int, count: int, meanwhile: Callable[[], Any] = lambda: None
) -> list[float]:
    """Time launches one by one, in microseconds.

    Args:
        flushes: before each launch.
        meanwhile: called while the GPU works.
    """
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        for _ in range(flushes):
            _flush().zero_()
        start.record()
        launch()
        stop.record()
    meanwhile()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events]


@functools.cache
def _flush() -> Tensor:
    import torch

    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def interval(samples: Sequence[Sequence[float]]) -> dict[str, float]:
    """Take the median of rounds' medians, and its 95% interval.

    Repetitions within a round are not independent: a round is the sample. The interval is
    Student's, of the mean of the logarithms of rounds' medians: of few rounds it is wide, as
    two or three say little of the spread.

    Args:
        samples: microseconds, a list for each round.

    >>> {name: round(us, 1) for name, us in interval([[10, 11], [10, 12], [11, 11]]).items()}
    {'time_us': 11.0, 'time_low_us': 10.1, 'time_high_us': 11.6}
    """
    import numpy as np
    from scipy import stats

    medians = np.log([statistics.median(of_round) for of_round in samples])
    # One round says nothing of the spread.
    margin = math.nan
    if len(medians) > 1:
        margin = stats.t.ppf(0.975, len(medians) - 1) * stats.sem(medians)
    middle = float(medians.mean())
    return {
        "time_us": float(np.exp(np.median(medians))),
        "time_low_us": float(np.exp(middle - margin)),
        "time_high_us": float(np.exp(middle + margin)),
    }


def _state(readings: Sequence[sensors.Reading]) -> dict[str, Any]:
    """Sum up how the device was while a launch was timed."""
    clocks = [each.clock_mhz for each in readings if each.clock_mhz is not None]
    warm = [each.temperature_c for each in readings if each.temperature_c is not None]
    held = [each.throttled for each in readings if each.throttled is not None]
    return {
        "clock_mhz": statistics.median(clocks) if clocks else None,
        "temperature_c": max(warm, default=None),
        "throttled": ",".join(sorted(frozenset().union(*held))) if held else None,
    }
