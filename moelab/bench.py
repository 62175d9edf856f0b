"""Time configurations on the GPU at hand, problem by problem, whatever single launches do to it.

What can't fit is never launched. The others are launched by a process of its own (`workers`): what
crashes it, hangs it or loses it its GPU is tried once more, alone, and costs no row but its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cluster, disk, kernels, launcher, records, scratch, sweep, targets, workloads
from . import peers as others
from .answers import cores, spread, stamped
from .launcher import Gpu, How, Roofs, gpu
from .specs import Configuration, Problem
from .timing import MeasureError
from .workers import TIMEOUT_S, Build, Worker, WorkerLost, peer_key, written

if TYPE_CHECKING:
    import distributed
    import pandas as pd

__all__ = ["Device", "Devices", "MeasureError", "devices", "gpu", "measure"]

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
    device: Device | Devices | None = None,
) -> pd.DataFrame:
    """Time every configuration that fits.

    Args:
        configurations: of MoE GEMMs that write bf16, for the target of the GPU at hand.
        store: folder of journals; each problem's rows are kept when its last round is over.
        workload: one of `workloads.WORKLOADS`.
        seed: of inputs and routing.
        rounds, repetitions: samples are ``rounds x repetitions``; a round is one turn of all
            configurations of a problem.
        jobs: processes that compile; None takes every core, and those of a cluster as many as
            a worker has threads.
        peers: names of `peers.PEERS`, which take turns with ours of each problem that they
            are for. Problems must be `peers.plain`, and are measured one by one.
        resume: the run to go on with; problems of which it has all rows are not measured again.
        device: what launches, for who measures more than once, or has several (`devices`).
    Returns:
        a row per configuration, in their order; those not launched say why. Rows of peers
        follow.
    Raises:
        MeasureError: no GPU, configurations that are not for it, or nothing can be launched.
        ClusterError: of several devices, the cluster can't answer, or is lost.
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
        device.prepare(run, store, jobs, progress)
        left = sum(map(len, run.left))
        try:
            with (
                records.Journal(store) as journal,
                disk.room_at(store),
                sweep.progress_bar(len(run.rows), left, progress, "measure") as bar,
                contextlib.closing(device.measured(run, how)) as done,
            ):
                for unit, rows in done:
                    journal.append(*rows)
                    bar.update(len(unit))
        except disk.DiskFullError as error:
            raise disk.DiskFullError(f"{error}, with --resume {said['run']}") from None
        except (MeasureError, cluster.ClusterError, KeyboardInterrupt) as error:
            rest = f"the rows that were finished are in {store}; --resume {said['run']} goes on"
            if isinstance(error, MeasureError):
                raise MeasureError(f"{error}; {rest}") from None
            if isinstance(error, cluster.ClusterError):
                raise type(error)(f"{error}\n{rest}") from None
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


# A unit, and its rows.
_Done = tuple[Sequence[Configuration], list[dict[str, Any]]]


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
        self.said = said
        self.left: list[list[Configuration]] = []
        done = {records.key(row): row for row in kept}
        for unit in launcher.by_problem(self.rows) if by_problem else _units(self.rows):
            found = {of: done.get(records.key(self.rows[of])) for of in unit}
            if None in found.values():
                self.left.append(unit)
            else:
                self.rows |= {of: row for of, row in found.items() if row is not None}

    def gain(
        self,
        unit: Sequence[Configuration],
        ours: Iterable[Mapping[str, Any]],
        of_peers: Iterable[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """Add what was measured of a unit; returns its rows, those of peers last."""
        for of, gained in zip(unit, ours, strict=True):
            self.rows[of] |= gained
        beside = [dict(row) | self.said for row in of_peers]
        self.of_peers += beside
        return [*(self.rows[of] for of in unit), *beside]


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

    ``abandoned`` is asked now and then whether nobody waits for what is measured.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self._timeout_s = timeout_s
        self.abandoned: Callable[[], bool] = lambda: False
        self._open = contextlib.ExitStack()
        # Of the compiler, to launch from.
        self.cache = self._open.enter_context(scratch.folder())
        self._worker: Worker | None = None
        self._roofs: dict[int, Roofs] = {}

    @functools.cached_property
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

    def prepare(self, run: _Run, store: Path, jobs: int | None, progress: bool) -> None:
        """Compile what is left of a run, as far as it fits."""
        rows = {of: run.rows[of] for unit in run.left for of in unit}
        answers = sweep.compiled(rows, store, self.cache, jobs, progress)
        for row in rows.values():
            row |= answers[row["compile_key"]]

    def measured(self, run: _Run, how: How) -> Generator[_Done, None, None]:
        """Measure what is left of a run, unit by unit; yields each with its rows."""
        for unit in run.left:
            fitting = [of for of in unit if run.rows[of]["status"] == "ok"]
            found: dict[Configuration, dict[str, Any]] = {}
            beside: list[dict[str, Any]] = []
            if fitting:
                roofs = self.roofs(how.rounds)
                told = {of: run.rows[of]["lds_bytes"] for of in fitting}
                found, beside = self.measure(told, how)
                for of, row in found.items():
                    row |= _rates(row, of, roofs)
                for row in beside:
                    # Peers are measured with one problem.
                    row |= _rates(row, unit[0], roofs)
            yield unit, run.gain(unit, (found.get(of, {}) for of in unit), beside)

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
            self._worker = Worker(Build(), self.cache, lambda: self.abandoned())
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
        self._open.close()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class Devices:
    """The GPUs of a cluster, as `Device`; `devices` gives them.

    A task is a unit, measured by the worker of one GPU with what it compiled itself.
    """

    def __init__(self, client: distributed.Client):
        self._client = client

    @functools.cached_property
    def gpu(self) -> Gpu:
        """What all of them are.

        Raises:
            MeasureError: they are not of one kind, or one can't be measured with.
        """
        asked = {
            worker: self._client.submit(_gpu_there, workers=[worker], resources=_GPU, pure=False)
            for worker in cluster.slots(self._client, _GPU)
        }
        told = self._client.gather(asked)
        kinds = {name: target for name, target in told.values()}
        if len(kinds) != 1 or None in kinds.values():
            each = "; ".join(f"{worker}: {name}" for worker, (name, _) in told.items())
            raise MeasureError(f"the workers' GPUs are not of one kind, which times need: {each}")
        ((name, target),) = kinds.items()
        return Gpu(name, targets.get(target))

    def prepare(self, run: _Run, store: Path, jobs: int | None, progress: bool) -> None:
        """Leave it to the workers, which launch what they compile."""

    def measured(self, run: _Run, how: How) -> Generator[_Done, None, None]:
        """Let workers measure what is left of a run; yields each unit with its rows."""
        units = {str(at): unit for at, unit in enumerate(run.left)}
        job = _Measure(run.said, how, cluster.here())
        with contextlib.closing(cluster.Tasks(self._client, job)) as tasks:
            for answers in spread(units, tasks):
                for key, found in answers.items():
                    yield units[key], run.gain(units[key], found["ours"], found["peers"])


@contextlib.contextmanager
def devices(dask: str) -> Iterator[Devices]:
    """Connect to the GPUs of a cluster.

    Args:
        dask: as `cluster.connected` takes it; ``local`` is every GPU of this machine.
    Raises:
        ClusterError: see `cluster.connected`.
        MeasureError: ``local``, and there is no GPU.
    """
    local = []
    if dask == "local":
        each = launcher.each_gpu()
        threads = max(1, cores() // len(each))
        local = [cluster.LocalWorker(threads, _GPU, environment) for environment in each]
    with cluster.connected(dask, resources=_GPU, local=local) as client:
        yield Devices(client)


# What a worker announces that has one, and a task takes.
_GPU = {"GPU": 1}


@dataclass(frozen=True)
class _Measure:
    """The job of a run; see `cluster.Job`. A question is a unit."""

    said: dict[str, Any]
    how: How
    needed: Mapping[str, str]
    resources: Mapping[str, int] = field(default_factory=lambda: _GPU)

    def do(
        self, unit: Sequence[Configuration], threads: int, abandoned: Callable[[], bool]
    ) -> dict[str, Any]:
        device = _device_here()
        device.abandoned = abandoned
        run = _Run(unit, self.said, [], by_problem=bool(self.how.peers))
        try:
            launcher.check(unit, device.gpu)
            if device.gpu.name != self.said["gpu"]:
                raise OSError(f"its GPU is {device.gpu.name}, not {self.said['gpu']}")
            with scratch.folder() as store:
                device.prepare(run, store, threads, progress=False)
            for _ in device.measured(run, self.how):
                pass
        except MeasureError as error:
            raise OSError(str(error)) from None
        finally:
            device.abandoned = lambda: False
        ours = [sweep.answer_of(run.rows[of]) for of in unit]
        return {"ours": ours, "peers": run.of_peers}

    def check(self, unit: Sequence[Configuration], answer: Any) -> None:
        if not isinstance(answer, dict) or set(answer) != {"ours", "peers"}:
            raise ValueError("expected rows of ours and of peers")
        if not all(isinstance(rows, list) for rows in answer.values()):
            raise ValueError("expected lists of rows")
        if len(answer["ours"]) != len(unit):
            raise ValueError(f"{len(answer['ours'])} rows of {len(unit)} configurations")
        for row in answer["ours"]:
            records.check_answer(row)
        for row in answer["peers"]:
            records.check_row(row)

    def crashed(self, unit: Sequence[Configuration], reason: str) -> dict[str, Any]:
        rows = [stamped("launch_error", reason, targets.get(of.target)) for of in unit]
        return {"ours": rows, "peers": []}


@functools.cache
def _device_here() -> Device:
    """Give this dask worker's GPU; its process ends with the worker."""
    return Device()


def _gpu_there() -> tuple[str, str | None]:
    """Name a dask worker's GPU and its target, or what is wrong with it."""
    try:
        here = _device_here().gpu
    except MeasureError as error:
        return str(error), None
    return here.name, here.target.name


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
