"""Time configurations on the GPU at hand, problem by problem, whatever single launches do to it.

What can't fit is never launched. The others are launched by a process of its own (`workers`): what
crashes it, hangs it or loses it its GPU is tried once more, alone, and costs no row but its own.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import kernels, launcher, records, sweep, targets, workloads
from . import peers as others
from .launcher import Gpu, How, Roofs, gpu
from .specs import Configuration, Problem
from .timing import MeasureError
from .workers import TIMEOUT_S, Build, Worker, WorkerLost, peer_key, written

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Device", "MeasureError", "gpu", "measure"]

ROUNDS = 12
REPETITIONS = 10


def measure(
    configurations: Sequence[Configuration],
    store: Path | str,
    *,
    workload: str = "uniform",
    seed: int = 0,
    rounds: int = ROUNDS,
    repetitions: int = REPETITIONS,
    jobs: int | None = None,
    progress: bool = True,
    peers: Sequence[str] = (),
    resume: str | None = None,
    device: Device | None = None,
) -> pd.DataFrame:
    """Time every configuration that fits.

    Args:
        configurations: of MoE GEMMs that write bf16, for the target of the GPU at hand.
        store: folder of journals; each problem's rows are kept when its last round is over.
        workload: one of `workloads.WORKLOADS`.
        seed: of inputs and routing.
        rounds, repetitions: samples are ``rounds x repetitions``; a round is one turn of all
            configurations of a problem.
        jobs: processes that compile; None takes every core.
        peers: names of `peers.PEERS`, which take turns with ours of each problem that they
            are for. Problems must be `peers.plain`, and are measured one by one.
        resume: the run to go on with; problems of which it has all rows are not measured again.
        device: what launches, for who measures more than once.
    Returns:
        a row per configuration, in their order; those not launched say why. Rows of peers
        follow.
    Raises:
        MeasureError: no GPU, configurations that are not for it, or nothing can be launched.
        ValueError: an unknown workload or peer, too few rounds, a problem that peers don't
            compute, or a run to resume that was another.
        OSError: the store can't be written to.
        Interrupted: Ctrl-C; the rows that were finished are in the store.
    """
    if rounds < 2 or repetitions < 1:
        raise ValueError(f"rounds = {rounds}, repetitions = {repetitions}; give 2 and 1 or more")
    if workload not in workloads.WORKLOADS:
        raise ValueError(f"no workload {workload!r}; there are {', '.join(workloads.WORKLOADS)}")
    others.check(peers, configurations)
    store = Path(store)
    said = {"mode": "measured", "workload": f"{workload}, {seed}"}
    kept = [] if resume is None else _kept(store, resume, said["workload"])
    said["run"] = resume or f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    how = How(workload, seed, rounds, repetitions, tuple(peers))
    questions = [sweep.settled(configuration) for configuration in configurations]
    with contextlib.ExitStack() as opened:
        if device is None:
            device = opened.enter_context(contextlib.closing(Device()))
        here = device.gpu
        launcher.check(questions, here)
        said["gpu"] = here.name
        run = _Run(questions, said, kept, by_problem=bool(peers))
        compiled = {of: run.rows[of] for unit in run.left for of in unit}
        answers = sweep.compiled(compiled, store, device.cache, jobs, progress)
        for row in compiled.values():
            row |= answers[row["compile_key"]]
        try:
            with (
                records.Journal(store) as journal,
                records.room_at(store),
                sweep.progress_bar(len(run.rows), len(compiled), progress, "measure") as bar,
            ):
                for unit in run.left:
                    journal.append(*run.measured(unit, device, how))
                    bar.update(len(unit))
        except records.DiskFullError as error:
            raise records.DiskFullError(f"{error}, with --resume {said['run']}") from None
        except (MeasureError, KeyboardInterrupt) as error:
            rest = f"the rows that were finished are in {store}; --resume {said['run']} goes on"
            if isinstance(error, MeasureError):
                raise MeasureError(f"{error}; {rest}") from None
            raise sweep.Interrupted(f"interrupted; {rest}") from None
    return records.frame([*(run.rows[question] for question in questions), *run.of_peers])


def _kept(store: Path, run: str, workload: str) -> list[dict[str, Any]]:
    """Read what a store has of a run.

    Raises:
        ValueError: nothing, or of another workload.
    """
    measured = [row for row in records.journalled(store) if row.get("run") is not None]
    kept = [row for row in measured if row["run"] == run]
    if not kept:
        runs = ", ".join(sorted({row["run"] for row in measured})) or "none"
        raise ValueError(f"resume={run!r}: {store} has no row of it; it has rows of {runs}")
    if (of := kept[0]["workload"]) != workload:
        raise ValueError(f"resume={run!r}: that run's workload and seed are {of}, not {workload}")
    return kept


class _Run:
    """What is asked, and measured so far.

    Args:
        said: what every row says.
        kept: rows that an earlier call of this run has measured.
        by_problem: measure layers apart.

    ``left`` has what is measured together and was not yet.
    """

    def __init__(
        self,
        questions: Sequence[Configuration],
        said: dict[str, Any],
        kept: Sequence[dict[str, Any]],
        by_problem: bool,
    ):
        self.rows = {of: sweep.asked_row(of, "measured") | said for of in questions}
        self.of_peers = [row for row in kept if row.get("peer") is not None]
        self._said = said
        self.left: list[list[Configuration]] = []
        done = {records.key(row): row for row in kept}
        for unit in launcher.by_problem(self.rows) if by_problem else _units(self.rows):
            found = {of: done.get(records.key(self.rows[of])) for of in unit}
            if None in found.values():
                self.left.append(unit)
            else:
                self.rows |= {of: row for of, row in found.items() if row is not None}

    def measured(
        self, unit: Sequence[Configuration], device: Device, how: How
    ) -> list[dict[str, Any]]:
        """Measure a unit; returns its rows, those of peers last."""
        fitting = {of: self.rows[of] for of in unit if self.rows[of]["status"] == "ok"}
        rows = [self.rows[of] for of in unit]
        if fitting:
            roofs = device.roofs(how.rounds)
            found, beside = device.measure(
                {of: row["lds_bytes"] for of, row in fitting.items()}, how
            )
            for of, row in fitting.items():
                row |= found[of]
                row |= _rates(row, of, roofs)
            # Peers are measured with one problem.
            rows += [row | self._said | _rates(row, unit[0], roofs) for row in beside]
        self.of_peers += rows[len(unit) :]
        return rows


@dataclass(frozen=True)
class _Group:
    """Launches that are measured together.

    Args:
        members: configurations, and peers by name.
        blamed: what their rows say, if a worker was lost to them before.
    """

    members: tuple[Configuration | str, ...]
    blamed: Mapping[str, Any] | None = None


class Device:
    """The GPU at hand, through a worker; where that is lost, another one goes on.

    Args:
        timeout_s: of one step on the GPU, such as a turn.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="moelab-")
        # Of the compiler, to launch from.
        self.cache = Path(self._folder.name)
        self._worker: Worker | None = None
        self._roofs: dict[int, Roofs] = {}

    @property
    def gpu(self) -> Gpu:
        """What it is.

        Raises:
            MeasureError: there is none, or none that moelab knows.
        """
        found = self._ask("gpu")
        return Gpu(found["name"], targets.get(found["target"]))

    def roofs(self, rounds: int) -> Roofs:
        """Measure what it does at most, once."""
        if rounds not in self._roofs:
            self._roofs[rounds] = Roofs(**self._ask("roofs", rounds=rounds))
        return self._roofs[rounds]

    def measure(
        self, told: Mapping[Configuration, int], how: How
    ) -> tuple[dict[Configuration, dict[str, Any]], list[dict[str, Any]]]:
        """Time launches of one problem, or of both layers of a model, in turns.

        Nothing is taken from a worker that was lost: the launch that it was at is tried once
        more, alone in a process of its own, after all others were measured anew.

        Args:
            told: the LDS of each.
        Returns:
            what the row of each gains, and rows of peers.
        Raises:
            MeasureError: nothing can be launched.
        """
        ours: dict[Configuration, dict[str, Any]] = {}
        of_peers: list[dict[str, Any]] = []
        groups = [_Group((*told, *how.peers))]
        while groups:
            group = groups.pop(0)
            if group.blamed:
                self._end()
            try:
                found, beside = self._together(group, told, how)
            except WorkerLost as lost:
                keys = _keys(told, how.peers)
                guilty = [of for of in group.members if keys[of] in lost.keys] or group.members
                rest = [of for of in group.members if of not in guilty]
                if rest or not group.blamed:
                    groups = [_Group(tuple(rest))] * bool(rest) + groups
                    groups.append(_Group(tuple(guilty), lost.row))
                    continue
                again = f"{lost.row['reason']}; and so again, alone in a process of its own"
                failed = dict(lost.row) | {"reason": again}
                found = {of: failed for of in guilty if isinstance(of, Configuration)}
                first = next(iter(told))
                beside = [
                    others.Asked(first.kernel, first.problem, first.target, name).row() | failed
                    for name in guilty
                    if isinstance(name, str)
                ]
            ours |= found
            of_peers += beside
        return ours, of_peers

    def _together(
        self, group: _Group, told: Mapping[Configuration, int], how: How
    ) -> tuple[dict[Configuration, dict[str, Any]], list[dict[str, Any]]]:
        keys = _keys(told, how.peers)
        configurations = {keys[of]: of for of in group.members if isinstance(of, Configuration)}
        found = self._ask(
            "measure",
            suspects=[keys[of] for of in group.members],
            launches=[(key, written(of), told[of]) for key, of in configurations.items()],
            like=written(next(iter(told))),
            peers=[of for of in group.members if isinstance(of, str)],
            workload=how.workload,
            seed=how.seed,
            rounds=how.rounds,
            repetitions=how.repetitions,
        )
        if group.blamed:
            for row in (*found["ours"].values(), *found["peers"]):
                why = {"alone_after": group.blamed["reason"]}
                row["made_by"] = json.dumps(json.loads(row.get("made_by", "{}")) | why)
        return {configurations[key]: row for key, row in found["ours"].items()}, found["peers"]

    def _ask(self, do: str, *, suspects: Sequence[str] = (), **rest: Any) -> Any:
        if self._worker is None:
            self._worker = Worker(Build(), self.cache)
            try:
                self._worker.ask("hello", timeout_s=None)
            except WorkerLost as error:
                self._end()
                raise MeasureError(f"the process that launches did not start: {error}") from None
        try:
            return self._worker.ask(do, suspects=suspects, timeout_s=self._timeout_s, **rest)
        except WorkerLost:
            self._end()
            raise

    def close(self) -> None:
        """End its process, and forget what was compiled."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _keys(told: Iterable[Configuration], peers: Iterable[str]) -> dict[Configuration | str, str]:
    """Name launches to a worker."""
    return {of: str(at) for at, of in enumerate(told)} | {name: peer_key(name) for name in peers}


def _units(questions: Iterable[Configuration]) -> list[list[Configuration]]:
    """Put the two layers of a model together where both are asked; any other problem is alone."""
    found: dict[tuple[str, Problem], list[list[Configuration]]] = defaultdict(list)
    for part in launcher.by_problem(questions):
        # All that a layer decides left out.
        shared = replace(
            part[0].problem,
            layer=0,
            n=0,
            k=0,
            gather=False,
            swiglu=False,
            weighted=False,
            scatter=False,
        )
        found[part[0].kernel, shared].append(part)
    units = []
    for parts in found.values():
        both = sorted(part[0].problem.layer for part in parts) == [1, 2]
        units += [[of for part in parts for of in part]] if both else parts
    return units


def _rates(row: Mapping[str, Any], of: Configuration, roofs: Roofs) -> dict[str, Any]:
    """Give a row's TFLOP/s and the least that compute and bandwidth allow.

    The compute roof is that of fp8, which holds every value of x and w; of bf16 where the
    device multiplies no fp8.
    """
    if row.get("time_us") is None:
        return {}
    cost = kernels.load(of.kernel).cost(of.problem)
    peak = roofs.tflops.get("fp8", roofs.tflops["bf16"])
    return {
        "tflops": cost.flops / row["time_us"] / 1e6,
        "roof_tflops": min(peak, cost.flops / cost.bytes * roofs.tbps),
    }
