"""Is the candidate slower than the base? Both take turns on one GPU, in one run.

A side is what it changes of a grid: its stages, tile or warps, its Triton, the source of its
kernels. Each configuration of the grid makes a cell: the base's launch and the candidate's, of
the same kernel and problem. A round is one turn of every launch of a problem, in random order.

`paired_rounds` judges all cells of the run together, after 6, 12 and 24 rounds: first every
problem has 6, and only problems with cells that are still undecided are gone to again, where
only those cells take turns. That is the procedure its simulations are of; to go to a problem
again costs its inputs a second time.

Launches are made by a worker (`workers`), both sides' by one where Triton and source are the
same: they share their tensors. Otherwise each side has one, which draws the same inputs by
seed, and only one of them works at a time. Where its tensors lie may make what a process
launches slower or faster in every round (on an H200 one pair of equal code in 40, by 4.8%): each
round has processes of its own then.
"""

from __future__ import annotations

import itertools
import json
import random
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import (
    kernels,
    paired_rounds,
    records,
    regress,
    scratch,
    sweep,
    timing,
    workers,
    workloads,
)
from .parameters import ParameterError
from .specs import Configuration, Problem, Tile
from .timing import MeasureError
from .workers import Build, Worker, WorkerLost

if TYPE_CHECKING:
    import pandas as pd

SIDES = ("base", "candidate")

ROUNDS = paired_rounds.LOOKS[-1]

# Of a policy that names no number; more stages hide no more latency.
_MOST_STAGES = 8

_HELP = (
    "a side is `same`, or some of stages=2 (or most: as many as fit, up to 8; most4: up to 4), "
    "tile=128x256x128+tma, warps=8, group_m=8, triton=3.7.1 and source=FOLDER, comma-separated"
)


_HERE = Build()


@dataclass(frozen=True)
class Side:
    """What one side changes of a grid.

    Args:
        changes: of `Configuration`, and ``group_m`` of its tile.
        most: as many stages as fit, up to so many.
        build: the Triton and the source that it launches.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    most: int | None = None
    build: Build = _HERE

    @classmethod
    def parse(cls, text: str) -> Side:
        """Read ``NAME=VALUE,...``; ``same`` changes nothing.

        Raises:
            ParameterError: there is no such name or value; the message lists what there is.

        >>> str(Side.parse("stages=most4, warps=8"))
        'stages=most4,warps=8'
        >>> str(Side.parse("same"))
        'same'
        """
        changes: dict[str, Any] = {}
        most = triton = source = None
        given = [] if text.strip() in ("", "same") else text.split(",")
        named = [each.strip().partition("=") for each in given]
        if len({name for name, *_ in named}) < len(named):
            raise ParameterError(f"--ab {text!r} names one thing twice; {_HELP}")
        for name, equals, value in named:
            if not equals or not value:
                raise ParameterError(f"--ab {text!r}: {name!r} is not NAME=VALUE; {_HELP}")
            if name == "stages" and value.startswith("most"):
                most = _number(text, value.removeprefix("most") or str(_MOST_STAGES))
            elif name in _COUNTS:
                changes[_COUNTS[name]] = _number(text, value)
            elif name == "tile":
                try:
                    changes["tile"] = Tile.parse(value)
                except ValueError as error:
                    raise ParameterError(f"--ab {text!r}: {error}") from None
            elif name == "triton":
                triton = value
            elif name == "source":
                source = Path(value)
            else:
                raise ParameterError(f"--ab {text!r}: no {name!r}; {_HELP}")
        return cls(changes, most, Build(triton, source))

    def __str__(self) -> str:
        spelled = {name: self.changes.get(column) for name, column in _COUNTS.items()}
        spelled["tile"] = self.changes.get("tile")
        if self.most is not None:
            spelled["stages"] = "most" + (str(self.most) if self.most != _MOST_STAGES else "")
        spelled["triton"] = self.build.triton
        # Where it lies on this machine is nobody else's concern.
        spelled["source"] = self.build.source and self.build.source.resolve().name
        told = [f"{name}={value}" for name, value in spelled.items() if value is not None]
        return ",".join(told) or "same"

    def changed(self, of: Configuration) -> Configuration:
        """Change a configuration of the grid; ``most`` is not applied."""
        changes = dict(self.changes)
        tile = changes.pop("tile", of.tile)
        if "group_m" in changes:
            tile = replace(tile, group_m=changes.pop("group_m"))
        return replace(of, tile=tile, **changes)


_COUNTS = {"stages": "num_stages", "warps": "num_warps", "group_m": "group_m"}


def _number(text: str, value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise ParameterError(f"--ab {text!r}: {value!r} is not 1 or more; {_HELP}")
    return int(value)


# A cell's launches, the base's first.
_Pair = tuple[Configuration, Configuration]


def measure(
    configurations: Sequence[Configuration],
    base: Side,
    candidate: Side,
    store: Path | str,
    *,
    workload: str = "uniform",
    seed: int = 0,
    rounds: int = ROUNDS,
    repetitions: int = 10,
    threshold: float = paired_rounds.THRESHOLD,
    apart: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Let two sides take turns on the GPU at hand until each cell is decided.

    `regress.compare` of the two sides' rows has the verdict.

    Args:
        configurations: as `plan.grid` gives them, for the target of the GPU at hand.
        base, candidate: what they change of it.
        store: folder of journals; a problem's rows are kept whenever its turns are over.
        workload: one of `workloads.WORKLOADS`.
        seed: of inputs, routing and the order of turns.
        rounds: at most; 6 or more.
        repetitions: samples of each launch in a round.
        threshold: of the verdict; what is decided by it takes no more turns.
        apart: give each side a worker, also where one would do.
        jobs: processes that compile; None takes every core.
    Returns:
        two rows per cell, the base's first, told apart by ``side``. A launch whose partner
        doesn't fit is not made; its row says that it fits. What fails is a row that says why.
    Raises:
        ParameterError: a side makes several configurations one.
        ValueError: an unknown workload, too few rounds, or no such source.
        ToolchainError: no such Triton.
        MeasureError: no GPU, configurations that are not for it, or a worker that won't start.
        OSError: the store can't be written to.
    """
    looks = paired_rounds.looks(rounds)
    if repetitions < 1:
        raise ValueError(f"repetitions = {repetitions}; give 1 or more")
    if workload not in workloads.WORKLOADS:
        raise ValueError(f"no workload {workload!r}; there are {', '.join(workloads.WORKLOADS)}")
    sides = dict(zip(SIDES, (base, candidate), strict=True))
    store = Path(store).absolute()
    builds = {name: side.build.settled() for name, side in sides.items()}
    with (
        scratch.folder() as folder,
        _Team(builds, apart, folder) as team,
    ):
        pairs = _pairs(configurations, sides, team, str(store), jobs)
        run = _Run(team, pairs, _rows(pairs, sides, team, str(store), workload, seed, jobs))
        order = random.Random(seed)
        undecided = run.paired
        with records.Journal(store) as journal:
            run.keep(journal, [cell for cell in range(len(pairs)) if cell not in undecided])
            try:
                for before, look in itertools.pairwise((0, *looks)):
                    units = _units(pairs, undecided)
                    at_once = 1 if team.apart else look - before
                    turns = list(itertools.product(range(0, look - before, at_once), units))
                    with sweep.progress_bar(
                        len(turns), len(turns), progress, f"{look} rounds"
                    ) as bar:
                        for _, unit in turns:
                            if team.apart and unit is units[0]:
                                team.restart()
                            run.take_turns(unit, at_once, repetitions, order, (workload, seed))
                            run.keep(journal, unit)
                            bar.update()
                    undecided = run.undecided(undecided, threshold)
            except MeasureError as error:
                said = f"the rows that were finished are in {store}"
                raise MeasureError(f"{error}; {said}") from None
        return records.frame(run.rows[side, cell] for cell in range(len(pairs)) for side in SIDES)


class _Team:
    """The workers of both sides, which may be one; see `Worker`."""

    def __init__(self, builds: Mapping[str, Build], apart: bool, folder: Path):
        self._builds = builds
        alike = len(set(builds.values())) == 1 and not apart
        self.apart = not alike
        # Whose worker launches a side.
        self.host = {side: SIDES[0] if alike else side for side in SIDES}
        # What is built alike is compiled once.
        distinct = list(dict.fromkeys(builds.values()))
        self._caches = {
            host: folder / str(distinct.index(builds[host])) for host in self.host.values()
        }
        for cache in self._caches.values():
            cache.mkdir(exist_ok=True)
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> _Team:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def restart(self) -> None:
        """Start all anew: sides draw the same weights only if they drew alike before."""
        self.__exit__()
        try:
            for host, cache in self._caches.items():
                self._workers[host] = Worker(self._builds[host], cache)
            # All of them import meanwhile.
            for host, worker in self._workers.items():
                try:
                    worker.ask("hello", timeout_s=None)
                except WorkerLost as error:
                    raise MeasureError(f"the worker of the {host} did not start: {error}") from None
        except BaseException:
            self.__exit__()
            raise

    def worker(self, side: str) -> Worker:
        return self._workers[self.host[side]]

    def by_host(self, of_side: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Put together what one worker is asked for both sides."""
        asked: dict[str, list[Any]] = defaultdict(list)
        for side, items in of_side.items():
            asked[self.host[side]] += items
        return dict(asked)

    def answers(
        self, do: str, of_side: Mapping[str, Sequence[Configuration]], **rest: Any
    ) -> dict[str, dict[Configuration, Any]]:
        """Ask about every configuration once: what was answered of each, by side."""
        told = {}
        for host, asked in self.by_host(of_side).items():
            distinct = list(dict.fromkeys(asked))
            try:
                found = self._workers[host].ask(
                    do, timeout_s=None, configurations=[*map(workers.written, distinct)], **rest
                )
            except WorkerLost as error:
                raise MeasureError(f"the worker of the {host}: {error}") from None
            told[host] = dict(zip(distinct, found, strict=True))
        return {side: told[host] for side, host in self.host.items()}


def _pairs(
    configurations: Sequence[Configuration],
    sides: Mapping[str, Side],
    team: _Team,
    store: str,
    jobs: int | None,
) -> list[_Pair]:
    """Make every configuration of the grid a cell.

    Raises:
        ParameterError: a launch would be in two cells.
    """
    changed = {name: [side.changed(of) for of in configurations] for name, side in sides.items()}
    counts = {
        name: [replace(of, num_stages=n) for of in changed[name] for n in range(1, side.most + 1)]
        for name, side in sides.items()
        if side.most is not None
    }
    if counts:
        fits = team.answers(
            "fits", {name: counts.get(name, []) for name in SIDES}, store=store, jobs=jobs
        )
        for name, side in sides.items():
            if side.most is not None:
                changed[name] = [_most(of, side.most, fits[name]) for of in changed[name]]
    pairs = list(dict.fromkeys(zip(*changed.values(), strict=True)))
    for at, name in enumerate(SIDES):
        launches = [pair[at] for pair in pairs]
        if len(set(launches)) < len(launches):
            other = SIDES[1 - at]
            raise ParameterError(
                f"--ab {str(sides[name])!r} makes several configurations of the grid one, and "
                f"--ab {str(sides[other])!r} does not: let both name what differs, or give one "
                "value of it to the grid"
            )
    return pairs


def _most(of: Configuration, most: int, fits: Mapping[Configuration, bool]) -> Configuration:
    """Take the largest stage count that fits, else one, whose row says what is missing."""
    counts = [replace(of, num_stages=stages) for stages in range(most, 0, -1)]
    return next((each for each in counts if fits[each]), counts[-1])


def _rows(
    pairs: Sequence[_Pair],
    sides: Mapping[str, Side],
    team: _Team,
    store: str,
    workload: str,
    seed: int,
    jobs: int | None,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Compile every launch, and start its row."""
    of_side = {name: [pair[at] for pair in pairs] for at, name in enumerate(SIDES)}
    answers = team.answers("compiled", of_side, store=store, jobs=jobs)
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    said = {"workload": f"{workload}, {seed}", "run": run}
    return {
        (name, cell): answers[name][of]
        | said
        | {"side": name, "made_by": json.dumps({"ab": str(sides[name])})}
        for name, launches in of_side.items()
        for cell, of in enumerate(launches)
    }


def _units(pairs: Sequence[_Pair], cells: Sequence[int]) -> list[list[int]]:
    """Part cells by kernel and problem; those that share their weights follow one another."""
    shapes: dict[tuple[str, Problem], dict[Problem, list[int]]] = defaultdict(dict)
    for cell in cells:
        of = pairs[cell][0]
        of_shape = shapes[of.kernel, replace(of.problem, m=0)]
        of_shape.setdefault(of.problem, []).append(cell)
    return [unit for of_shape in shapes.values() for unit in of_shape.values()]


def _key(side: str, cell: int) -> str:
    return f"{side} {cell}"


def _of_key(key: str) -> tuple[str, int]:
    side, cell = key.split()
    return side, int(cell)


_TIMES = ("time_us", "time_low_us", "time_high_us", "samples_us", "tflops")


class _Run:
    """What was measured so far.

    Args:
        rows: by side and cell; they gain what is measured.
    """

    def __init__(
        self,
        team: _Team,
        pairs: Sequence[_Pair],
        rows: dict[tuple[str, int], dict[str, Any]],
    ):
        self._team, self._pairs, self.rows = team, pairs, rows
        self._taken = {at: timing.Taken() for at in rows}

    @property
    def paired(self) -> list[int]:
        """Cells whose launches can both be timed."""
        cells = dict.fromkeys(cell for _, cell in self.rows)
        return [
            cell for cell in cells if all(self.rows[side, cell]["status"] == "ok" for side in SIDES)
        ]

    def take_turns(
        self,
        unit: Sequence[int],
        rounds: int,
        repetitions: int,
        order: random.Random,
        drawn: tuple[str, int],
    ) -> None:
        """Give cells of one problem more rounds; without those that a worker is lost to.

        Args:
            drawn: workload and seed.
        """
        while cells := [cell for cell in unit if cell in self.paired]:
            try:
                self._prepare(cells, order, drawn)
                ready = [
                    _key(side, cell) for cell in cells if cell in self.paired for side in SIDES
                ]
                turns = workers.Turns(lambda key: self._team.worker(_of_key(key)[0]))
                taken = timing.rounds_of(turns, ready, rounds, repetitions, order)
            except WorkerLost as lost:
                for key in lost.keys:
                    self._gain(_of_key(key), lost.row)
                self._team.restart()
                continue
            for key, more in taken.items():
                self._add(_of_key(key), more)
            return

    def _prepare(self, cells: Sequence[int], order: random.Random, drawn: tuple[str, int]) -> None:
        """Let workers draw the inputs of a problem; what is not right is not timed."""
        asked = {
            side: [
                (
                    _key(side, cell),
                    workers.written(self._pairs[cell][at]),
                    self.rows[side, cell]["lds_bytes"],
                )
                for cell in cells
            ]
            for at, side in enumerate(SIDES)
        }
        workload, seed = drawn
        hosts = list(self._team.by_host(asked).items())
        # Who comes first has the choice of the memory.
        order.shuffle(hosts)
        for host, launches in hosts:
            keys = [key for key, *_ in launches]
            try:
                found = self._team.worker(host).ask(
                    "prepare", suspects=keys, launches=launches, workload=workload, seed=seed
                )
            except WorkerLost:
                raise
            except MeasureError as error:
                found = {key: {"status": "launch_error", "reason": str(error)} for key in keys}
            for key, gained in found.items():
                at = _of_key(key)
                made_by = json.loads(self.rows[at]["made_by"]) | gained.pop("made_by", {})
                self._gain(at, gained | {"made_by": json.dumps(made_by)})

    def _add(self, at: tuple[str, int], more: timing.Taken) -> None:
        taken = self._taken[at]
        taken.samples += more.samples
        taken.readings += more.readings
        taken.failed = more.failed
        self._gain(at, taken.row)
        if more.failed is None:
            of, row = self._pairs[at[1]][0], self.rows[at]
            row["tflops"] = kernels.load(of.kernel).cost(of.problem).flops / row["time_us"] / 1e6

    def _gain(self, at: tuple[str, int], said: Mapping[str, Any]) -> None:
        """Add to a row; the times of what fails later say nothing."""
        row = self.rows[at]
        row |= said
        if row["status"] != "ok":
            row |= dict.fromkeys(_TIMES)

    def keep(self, journal: records.Journal, cells: Sequence[int]) -> None:
        for cell in cells:
            for side in SIDES:
                journal.append(self.rows[side, cell])

    def undecided(self, cells: Sequence[int], threshold: float) -> list[int]:
        """Judge all cells together: which of some are still open."""
        timed = [
            cell
            for cell in self.paired
            if all(self.rows[side, cell].get("samples_us") for side in SIDES)
        ]
        sides = [
            [paired_rounds.medians(self.rows[side, cell]["samples_us"]) for side in SIDES]
            for cell in timed
        ]
        answers = paired_rounds.judge_paired(sides, threshold)["answer"]
        found = dict(zip(timed, answers, strict=True))
        return [cell for cell in cells if found.get(cell) == "inconclusive"]


def judged(rows: pd.DataFrame, threshold: float = paired_rounds.THRESHOLD) -> regress.Comparison:
    """Compare the two sides of a run's rows; see `regress.compare`."""
    base, candidate = (rows[rows["side"] == side] for side in SIDES)
    return regress.compare(base, candidate, threshold)
