"""Time configurations on the GPU at hand.

What can't fit is never launched. What is launched must load the LDS that was told and give
the reference's result before it is timed, in turns with the others of its problem (`timing`).
Where both layers of a model are asked, they are timed apart and one after the other. What
fails on the GPU is a row that says why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compiler, kernels, problems, records, sensors, sweep, targets, timing, workloads
from . import peers as others
from .answers import TIMEOUT_S, compile_all, cores
from .specs import Configuration, Problem, Target
from .timing import OUT_OF_MEMORY, ContextLost, Launch, MeasureError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from .kernels.inputs import Inputs

ROUNDS = 12
REPETITIONS = 10

_Asked = Configuration | others.Asked

# Of a roof: products of this size fill every chip.
_ROOF_SIZE = 8192


@dataclass(frozen=True)
class _How:
    """How samples are taken; see `measure`."""

    workload: str
    seed: int
    rounds: int
    repetitions: int
    peers: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """The device that launches go to.

    Args:
        name: as its driver calls it.
        target: what the compiler is asked for it.
    """

    name: str
    target: Target


def gpu() -> Gpu:
    """Find the GPU at hand.

    Raises:
        MeasureError: there is none, or none that moelab knows.
    """
    import torch

    if not torch.cuda.is_available():
        raise MeasureError("no GPU: torch.cuda.is_available() is False; see `moelab doctor`")
    chip = torch.cuda.get_device_properties(0)
    name = f"sm_{chip.major}{chip.minor}"
    if torch.version.hip:
        name = chip.gcnArchName.partition(":")[0]
    if name not in targets.TARGETS:
        raise MeasureError(f"{chip.name} is {name}, which is none of {', '.join(targets.TARGETS)}")
    return Gpu(chip.name, targets.get(name))


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
    Returns:
        a row per configuration, in their order; those not launched say why. Rows of peers
        follow.
    Raises:
        MeasureError: no GPU, or configurations that are not for it.
        ValueError: an unknown workload or peer, too few rounds, or a problem that peers
            don't compute.
        OSError: the store can't be written to.
    """
    if rounds < 2 or repetitions < 1:
        raise ValueError(f"rounds = {rounds}, repetitions = {repetitions}; give 2 and 1 or more")
    if workload not in workloads.WORKLOADS:
        raise ValueError(f"no workload {workload!r}; there are {', '.join(workloads.WORKLOADS)}")
    others.check(peers, configurations)
    here = gpu()
    questions = [sweep.settled(configuration) for configuration in configurations]
    _check(questions, here)
    how = _How(workload, seed, rounds, repetitions, tuple(peers))
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    said = {"mode": "measured", "gpu": here.name, "workload": f"{workload}, {seed}", "run": run}
    rows = {question: sweep.asked_row(question, "measured") | said for question in questions}
    of_peers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moelab-") as cache:
        answers = _compiled(rows, store, Path(cache), jobs, progress)
        for row in rows.values():
            row |= answers[row["compile_key"]]
        roofs = measured_roofs(rounds)
        left = sweep.progress_bar(len(rows), len(rows), progress, "measure")
        with records.Journal(Path(store)) as journal, compiler.cache_at(Path(cache)), left as bar:
            drawn: dict[int, Inputs] = {}
            for unit in _by_problem(rows) if peers else _units(rows):
                fitting = [of for of in unit if rows[of]["status"] == "ok"]
                # What has another shape must not take memory from what comes.
                shapes = {(of.kernel, replace(of.problem, m=0)) for of in fitting}
                drawn = {layer: d for layer, d in drawn.items() if d.drawn_for in shapes}
                try:
                    drawn, found = _measured(fitting, rows, drawn, how)
                except ContextLost as lost:
                    if isinstance(lost.of, Configuration):
                        journal.append(rows[lost.of] | lost.row)
                    if isinstance(lost.of, others.Asked):
                        journal.append(lost.of.row() | said | lost.row)
                    raise MeasureError(
                        f"{lost}. The rows that were finished are in {store}; measure the others "
                        "without it"
                    ) from None
                done: dict[_Asked, dict[str, Any]] = {of: rows[of] for of in unit}
                done |= {of: of.row() | said for of in found if isinstance(of, others.Asked)}
                for of, row in done.items():
                    row |= found.get(of, {})
                    row |= _rates(row, of, roofs)
                    journal.append(row)
                of_peers += [row for row in done.values() if row.get("peer")]
                bar.update(len(unit))
    return records.frame([*(rows[question] for question in questions), *of_peers])


def _check(questions: Sequence[Configuration], here: Gpu) -> None:
    for of in questions:
        if of.target != here.target.name:
            raise MeasureError(f"this is a {here.name}, {here.target.name}, not {of.target}")
        if of.async_copy != (default := compiler.default_async_copy(here.target)):
            # One process has one setting: what it launched is cached without it.
            raise MeasureError(
                f"async copy {'on' if of.async_copy else 'off'}: launches here have it "
                f"{'on' if default else 'off'}; set TRITON_HIP_USE_ASYNC_COPY for the whole command"
            )
        if of.kernel in problems.DENSE or of.problem.y_format != "bf16":
            raise MeasureError(
                f"{of.kernel} with y in {of.problem.y_format}: measured are MoE GEMMs, with y in "
                "bf16"
            )


def _compiled(
    rows: Mapping[Configuration, Mapping[str, Any]],
    store: Path | str,
    cache: Path,
    jobs: int | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Tell the LDS of every question, and compile to the end what fits.

    Returns:
        a row's second half by compile key.
    """
    # What can't fit is not compiled to the end either.
    told = sweep.run(list(rows), store, jobs=jobs, progress=progress).to_dict("records")
    answers = {row["compile_key"]: sweep.answer_of(row) for row in told}
    fitting = {
        row["compile_key"]: of
        for of, row in rows.items()
        if answers[row["compile_key"]]["status"] == "ok"
    }
    with sweep.progress_bar(len(fitting), len(fitting), progress) as bar:
        for key, answer in compile_all(fitting, "full", jobs or cores(), TIMEOUT_S, cache):
            # A compiler that dies later leaves what was told of the LDS.
            answers[key] |= answer
            bar.update()
    return answers


def _by_problem(questions: Iterable[Configuration]) -> list[list[Configuration]]:
    """Part questions by kernel and problem, in order of first appearance."""
    found: dict[tuple[str, Problem], list[Configuration]] = defaultdict(list)
    for of in questions:
        found[of.kernel, of.problem].append(of)
    return list(found.values())


def _units(questions: Iterable[Configuration]) -> list[list[Configuration]]:
    """Put the two layers of a model together where both are asked; any other problem is alone."""
    found: dict[tuple[str, Problem], list[list[Configuration]]] = defaultdict(list)
    for part in _by_problem(questions):
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


def _measured(
    fitting: Sequence[Configuration],
    rows: Mapping[Configuration, Mapping[str, Any]],
    before: dict[int, Inputs],
    how: _How,
) -> tuple[dict[int, Inputs], dict[_Asked, dict[str, Any]]]:
    """Measure a unit; where its two layers are too large together, one after the other.

    Args:
        before: inputs by layer, whose weights will do if their shape does; emptied where
            memory is short.
    Returns:
        this unit's inputs by layer, and what each row gains.
    Raises:
        ContextLost: nothing can be launched any more.
    """
    drawn, found = _timed(fitting, rows, before, how)
    parts = _by_problem(fitting)
    if len(parts) > 1 and any(row.get("status") == OUT_OF_MEMORY for row in found.values()):
        drawn = {}
        before.clear()
        for part in parts:
            found |= _timed(part, rows, before, how)[1]
    return drawn, found


def _timed(
    fitting: Sequence[Configuration],
    rows: Mapping[Configuration, Mapping[str, Any]],
    before: Mapping[int, Inputs],
    how: _How,
) -> tuple[dict[int, Inputs], dict[_Asked, dict[str, Any]]]:
    """Launch, check and time configurations of one problem or of both layers; see `_measured`."""
    import torch

    drawn: dict[int, Inputs] = {}
    launches: dict[_Asked, Launch] = {}
    found: dict[_Asked, dict[str, Any]] = {}
    for of_problem in _by_problem(fitting):
        layer = of_problem[0].problem.layer
        try:
            drawn[layer], ready, said = _checked(of_problem, rows, before.get(layer), how)
        except torch.OutOfMemoryError as error:
            return {}, dict.fromkeys(fitting, timing.failure(error, of_problem[0]))
        launches |= ready
        found |= said
    order = random.Random(how.seed)
    for of, gained in timing.in_turns(launches, how.rounds, how.repetitions, order).items():
        found[of] |= gained
    pairs = _pairs(
        {
            of: row["time_us"]
            for of, row in found.items()
            if "time_us" in row and isinstance(of, Configuration)
        }
    )
    together = {
        (first, second): functools.partial(_both, launches[first], launches[second])
        for first, second in pairs.values()
    }
    both = timing.in_turns(together, how.rounds, how.repetitions, order)
    for of, pair in pairs.items():
        found[of]["both_layers_us"] = both[pair].get("time_us")
    for of, row in found.items():
        row["made_by"] = json.dumps(_made_by() | _made_by_whom(of))
    return drawn, found


def _both(first: Launch, second: Launch) -> None:
    first()
    second()


def _pairs(
    times: Mapping[Configuration, float],
) -> dict[Configuration, tuple[Configuration, Configuration]]:
    """Find each launch its partner of the other layer: of as many stages, the fastest.

    Args:
        times: microseconds of each launch alone.
    Returns:
        layer 1 and layer 2 for each launch that has a partner.
    """
    pairs = {}
    for of in times:
        others = [
            other
            for other in times
            if (other.num_stages, other.problem.layer) == (of.num_stages, 3 - of.problem.layer)
        ]
        if others:
            both = (of, min(others, key=times.__getitem__))
            pairs[of] = both if of.problem.layer == 1 else both[::-1]
    return pairs


def _checked(
    of_problem: Sequence[Configuration],
    rows: Mapping[Configuration, Mapping[str, Any]],
    before: Inputs | None,
    how: _How,
) -> tuple[Inputs, dict[_Asked, Launch], dict[_Asked, dict[str, Any]]]:
    """Draw a problem's inputs and launch each of its configurations once, then its peers.

    Returns:
        the inputs, the launches that gave the reference's result, and what each row gains.
    Raises:
        torch.OutOfMemoryError: inputs or reference don't fit the GPU's memory.
    """
    import torch

    from .kernels import inputs
    from .kernels.router import route

    first = of_problem[0]
    problem, target = first.problem, targets.get(first.target)
    generator = torch.Generator("cuda").manual_seed(how.seed)
    expert, weight = workloads.draw(
        how.workload, problem.m, problem.experts, problem.top_k, generator
    )
    # Weights may be those of an earlier number of tokens: were x of the same random numbers, its
    # rows would be rows of w, and sums of squares where sums of both signs are meant.
    generator.manual_seed(how.seed + problem.m)
    fp8 = torch.float8_e4m3fnuz if target.fp8 == "fp8e4b8" else torch.float8_e4m3fn
    drawn = inputs.of_problem(
        first.kernel,
        problem,
        generator,
        expert,
        weight,
        first.tile.block_m,
        fp8,
        like=before,
    )
    expected = drawn.expected()
    launches: dict[_Asked, Launch] = {}
    found: dict[_Asked, dict[str, Any]] = {}
    for block_m in dict.fromkeys(of.tile.block_m for of in of_problem):
        routed = replace(drawn, routing=route(expert, weight, problem.experts, block_m))
        for of in of_problem:
            if of.tile.block_m == block_m:
                launch = functools.partial(
                    routed.run,
                    of.tile,
                    num_warps=of.num_warps,
                    num_stages=of.num_stages,
                    num_xcds=target.xcds,
                )
                try:
                    found[of] = _held_against(of, launch, expected, rows[of]["lds_bytes"], target)
                except Exception as error:
                    found[of] = timing.failure(error, of)
                if "status" not in found[of]:
                    launches[of] = launch
    against = functools.partial(_against, expected=expected, problem=problem)
    of_peers, said = others.ready(how.peers, first, drawn, against)
    return drawn, launches | of_peers, found | said


def _held_against(
    of: Configuration, launch: Launch, expected: Tensor, told: int, target: Target
) -> dict[str, Any]:
    """Launch once: the LDS that was told must be loaded, and the result be the reference's."""
    source = kernels.load(of.kernel).source(of.problem, of.tile, target)
    with _loaded(source.fn) as loaded:
        y = launch()
    lds = loaded[-1].metadata.shared
    found = {"loaded_lds_bytes": lds} | _against(y, expected, of.problem)
    if lds != told:
        return found | {"status": "lds_differs", "reason": f"told {told:,}, loaded {lds:,} bytes"}
    return found


def _against(y: Tensor, expected: Tensor, problem: Problem) -> dict[str, Any]:
    """Tell the largest error of y; status and reason too if it is not the reference's."""
    off = (y.double() - expected).abs() / expected.abs().max()
    allowed = tolerance(problem)
    found: dict[str, Any] = {"largest_error": float(off.max())}
    # NaN is not at most anything.
    if not found["largest_error"] <= allowed:
        share = float((~(off <= allowed)).double().mean())
        reason = (
            f"off by {found['largest_error']:.3g} of the largest element; {allowed:.3g} is "
            f"allowed, and exceeded by {share:.2g} of the elements"
        )
        return found | {"status": "wrong_result", "reason": reason}
    return found


def tolerance(problem: Problem) -> float:
    """Bound the error of a right y, as a share of the reference's largest element.

    A wrong result is off by whole products. bf16 rounds to 2^-8 of an element; another order
    of additions leaves 2e-3 of the largest. Where Hopper's tensor cores keep the sums
    (``fast_accum``), each of the k / 32 additions cuts off 2^-14: their error grows with k.
    tests/kernels/grouped_gemm.py derives both.
    """
    added = 2e-3
    if problem.fast_accum:
        added = max(added, problem.k / 32 * 2**-14)
    return 2**-8 + added


@contextlib.contextmanager
def _loaded(fn: Any) -> Iterator[list[Any]]:
    """Collect the compiled kernels that a ``triton.jit`` function launches."""
    launched, run = [], fn.run

    def keep(*args: Any, **kwargs: Any) -> Any:
        launched.append(run(*args, **kwargs))
        return launched[-1]

    fn.run = keep
    try:
        yield launched
    finally:
        del fn.run


@dataclass(frozen=True)
class Roofs:
    """What the device does at most, measured: dense products by type, and copying.

    Args:
        tflops: ``{"bf16": ..., "fp8": ...}``; a type without products is missing.
        tbps: bytes read and written.
    """

    tflops: dict[str, float]
    tbps: float


def measured_roofs(rounds: int = ROUNDS) -> Roofs:
    """Measure the device's ceilings: 8192^3 products through PyTorch, and a copy of 2 GiB.

    Raises:
        MeasureError: the device does not do them; it takes 4 GiB of its memory.
    """
    import torch

    try:
        bf16 = torch.randn(2, _ROOF_SIZE, _ROOF_SIZE, device="cuda", dtype=torch.bfloat16)
        fnuz = gpu().target.fp8 == "fp8e4b8"
        fp8 = bf16.to(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        source = torch.empty(2**30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
    except torch.OutOfMemoryError as error:
        raise MeasureError(f"the device's ceilings were not measured: {error}") from None
    scales = {"scale_a": one, "scale_b": one}
    launches: dict[str, Launch] = {
        "bf16": lambda: bf16[0] @ bf16[1].T,
        "fp8": lambda: torch._scaled_mm(
            fp8[0], fp8[1].T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "copy": lambda: target.copy_(source),
    }
    gained = timing.in_turns(launches, rounds, 3, random.Random(0))
    # Older chips multiply no fp8.
    times = {name: row["time_us"] for name, row in gained.items() if "time_us" in row}
    for name in ("bf16", "copy"):
        if name not in times:
            raise MeasureError(f"the device's ceilings were not measured: {gained[name]['reason']}")
    copied = 2 * source.numel() / times.pop("copy") / 1e6
    return Roofs({name: 2 * _ROOF_SIZE**3 / us / 1e6 for name, us in times.items()}, copied)


def _rates(row: Mapping[str, Any], of: _Asked, roofs: Roofs) -> dict[str, Any]:
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


@functools.cache
def _made_by() -> dict[str, Any]:
    import torch

    return {
        "driver": sensors.driver(),
        "torch": torch.__version__,
        "triton": compiler.triton_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _made_by_whom(of: _Asked) -> dict[str, Any]:
    if isinstance(of, others.Asked):
        return of.made_by()
    return {"kernel": kernels.source_hash(of.kernel)}
