"""Time configurations on the GPU at hand: the one place that times anything.

What can't fit is never launched. What is launched must load the LDS that was told and give
the reference's result before it is timed. Configurations of a problem take turns in random
order, round after round, so that a drift of the clocks meets all of them; every sample
follows a flush of the L2.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import random
import secrets
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compiler, kernels, problems, records, sweep, targets, workloads
from .specs import Configuration, Problem, Target

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from .kernels.inputs import Inputs

ROUNDS = 12
REPETITIONS = 10

# Wrong results are off by whole products. bf16 rounds to 2^-8 of an element; another order
# of additions leaves 2e-3 of the largest (tests/kernels/grouped_gemm.py, `tolerance`).
TOLERANCE = 2**-8 + 2e-3

# Several times the L2 of every target (H200: 50 MiB, MI355X: 256 MiB with its cache), and
# long enough to write that the CPU has the next launch ready before the GPU asks for it.
_FLUSH_BYTES = 2**30

# Of a roof: products of this size fill every chip.
_ROOF_SIZE = 8192

_WARM_UP = 5


class MeasureError(Exception):
    """Nothing can be measured here; the message says what is missing."""


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
    Returns:
        a row per configuration, in their order; those not launched say why.
    Raises:
        MeasureError: no GPU, or configurations that are not for it.
        ValueError: an unknown workload, or too few rounds.
        OSError: the store can't be written to.
    """
    if rounds < 2 or repetitions < 1:
        raise ValueError(f"rounds = {rounds}, repetitions = {repetitions}; give 2 and 1 or more")
    if workload not in workloads.WORKLOADS:
        raise ValueError(f"no workload {workload!r}; there are {', '.join(workloads.WORKLOADS)}")
    here = gpu()
    questions = [sweep.settled(configuration) for configuration in configurations]
    _check(questions, here)
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    said = {"mode": "measured", "gpu": here.name, "workload": f"{workload}, {seed}", "run": run}
    rows = {question: sweep.asked_row(question, "measured") | said for question in questions}
    by_problem: dict[tuple[str, Problem], list[Configuration]] = defaultdict(list)
    for question in rows:
        by_problem[question.kernel, question.problem].append(question)
    # What can't fit is not compiled to the end either.
    told = sweep.run(list(rows), store, jobs=jobs, progress=progress).to_dict("records")
    answers = {row["compile_key"]: sweep.answer_of(row) for row in told}
    with tempfile.TemporaryDirectory(prefix="moelab-") as cache:
        of_key = {
            rows[question]["compile_key"]: question
            for question in rows
            if answers[rows[question]["compile_key"]]["status"] == "ok"
        }
        with sweep.progress_bar(len(of_key), len(of_key), progress) as bar:
            for key, answer in sweep.compile_all(
                of_key, "full", jobs or sweep.cores(), sweep.TIMEOUT_S, Path(cache)
            ):
                answers[key] = answer
                bar.update()
        roofs = measured_roofs(rounds)
        left = sweep.progress_bar(len(rows), len(rows), progress, "measure")
        with records.Journal(Path(store)) as journal, compiler.cache_at(Path(cache)), left as bar:
            drawn: Inputs | None = None
            for of_problem in by_problem.values():
                for question in of_problem:
                    rows[question] |= answers[rows[question]["compile_key"]]
                fitting = [q for q in of_problem if rows[q]["status"] == "ok"]
                drawn, timed = _timed(fitting, rows, drawn, workload, seed, rounds, repetitions)
                for question in of_problem:
                    rows[question] |= timed.get(question, {})
                    rows[question] |= _rates(rows[question], question, roofs)
                    journal.append(rows[question])
                bar.update(len(of_problem))
    return records.frame(rows[question] for question in questions)


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


def _timed(
    fitting: Sequence[Configuration],
    rows: Mapping[Configuration, Mapping[str, Any]],
    before: Inputs | None,
    workload: str,
    seed: int,
    rounds: int,
    repetitions: int,
) -> tuple[Inputs | None, dict[Configuration, dict[str, Any]]]:
    """Launch, check and time one problem's configurations.

    Args:
        before: the inputs of the problem before, whose weights will do if their shape does.
    Returns:
        this problem's inputs, and what each row gains.
    """
    import torch

    from .kernels import inputs
    from .kernels.router import route

    if not fitting:
        return before, {}
    first = fitting[0]
    problem, target = first.problem, targets.get(first.target)
    generator = torch.Generator("cuda").manual_seed(seed)
    expert, weight = workloads.draw(workload, problem.m, problem.experts, problem.top_k, generator)
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
    launches: dict[Configuration, Callable[[], Any]] = {}
    found: dict[Configuration, dict[str, Any]] = {}
    for block_m in dict.fromkeys(of.tile.block_m for of in fitting):
        routing = route(expert, weight, problem.experts, block_m)
        routed = replace(drawn, routing=routing)
        for of in fitting:
            if of.tile.block_m == block_m:
                launch = functools.partial(
                    routed.run,
                    of.tile,
                    num_warps=of.num_warps,
                    num_stages=of.num_stages,
                    num_xcds=target.xcds,
                )
                found[of] = _checked(of, launch, expected, rows[of]["lds_bytes"], target)
                if "status" not in found[of]:
                    launches[of] = launch
    # Of float64, as large as y four times over.
    del expected
    samples, state = _rounds(launches, rounds, repetitions, random.Random(seed))
    for of in launches:
        found[of] |= {"samples_us": json.dumps(samples[of])} | interval(samples[of]) | state
    source = inspect.getsource(kernels.load(first.kernel))
    made_by = _made_by() | {"kernel": hashlib.sha256(source.encode()).hexdigest()[:12]}
    return drawn, {of: gained | {"made_by": json.dumps(made_by)} for of, gained in found.items()}


def _checked(
    of: Configuration, launch: Callable[[], Tensor], expected: Tensor, told: int, target: Target
) -> dict[str, Any]:
    """Launch once: the LDS that was told must be loaded, and the result be the reference's."""
    source = kernels.load(of.kernel).source(of.problem, of.tile, target)
    with _loaded(source.fn) as loaded:
        y = launch()
    lds = loaded[-1].metadata.shared
    error = float((y.double() - expected).abs().max() / expected.abs().max())
    found: dict[str, Any] = {"loaded_lds_bytes": lds, "largest_error": error}
    if lds != told:
        return found | {"status": "lds_differs", "reason": f"told {told:,}, loaded {lds:,} bytes"}
    # NaN is not at most anything.
    if not error <= TOLERANCE:
        reason = f"off by {error:.3g} of the largest element; {TOLERANCE:.3g} is allowed"
        return found | {"status": "wrong_result", "reason": reason}
    return found


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


@functools.cache
def _flush() -> Tensor:
    import torch

    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _samples(launch: Callable[[], Any], count: int) -> list[float]:
    """Time launches one by one, each after a flush of the L2, in microseconds."""
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        _flush().zero_()
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events]


def _rounds(
    launches: Mapping[Any, Callable[[], Any]], rounds: int, repetitions: int, order: random.Random
) -> tuple[dict[Any, list[list[float]]], dict[str, Any]]:
    """Let launches take turns; returns each one's samples by round, and the device's state."""
    samples: dict[Any, list[list[float]]] = {of: [] for of in launches}
    clocks, temperatures = [], []
    for launch in launches.values():
        _samples(launch, _WARM_UP)
    for _ in range(rounds):
        turns = list(launches)
        order.shuffle(turns)
        for of in turns:
            samples[of].append([round(us, 2) for us in _samples(launches[of], repetitions)])
        clocks.append(_reading("clock_rate"))
        temperatures.append(_reading("temperature"))
    known, warm = (list(filter(None, readings)) for readings in (clocks, temperatures))
    state = {
        "clock_mhz": statistics.median(known) if known else None,
        "temperature_c": max(warm, default=None),
    }
    return samples, state


def _reading(name: str) -> float | None:
    """Read a sensor; PyTorch needs nvidia-ml-py, or amdsmi, for it."""
    import torch

    try:
        return float(getattr(torch.cuda, name)())
    except (ImportError, RuntimeError, AttributeError):
        return None


def interval(samples: Sequence[Sequence[float]]) -> dict[str, float]:
    """Take the median of rounds' medians, and its 95% interval.

    Repetitions within a round are not independent: a round is the sample. The interval is
    Student's, of the logarithms of rounds' medians.

    Args:
        samples: microseconds, a list for each round.

    >>> {name: round(us, 1) for name, us in interval([[10, 11], [10, 12], [11, 11]]).items()}
    {'time_us': 11.0, 'time_low_us': 10.1, 'time_high_us': 11.6}
    """
    import numpy as np
    from scipy import stats

    medians = np.log([statistics.median(of_round) for of_round in samples])
    margin = stats.t.ppf(0.975, len(medians) - 1) * stats.sem(medians)
    middle = float(medians.mean())
    return {
        "time_us": float(np.exp(np.median(medians))),
        "time_low_us": float(np.exp(middle - margin)),
        "time_high_us": float(np.exp(middle + margin)),
    }


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
    """Measure the device's ceilings: 8192^3 products through PyTorch, and a copy of 2 GiB."""
    import torch

    launches: dict[str, Callable[[], Any]] = {}
    bf16 = torch.randn(2, _ROOF_SIZE, _ROOF_SIZE, device="cuda", dtype=torch.bfloat16)
    launches["bf16"] = lambda: bf16[0] @ bf16[1].T
    fnuz = gpu().target.fp8 == "fp8e4b8"
    fp8 = bf16.to(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    launches["fp8"] = lambda: torch._scaled_mm(
        fp8[0], fp8[1].T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    launches["copy"] = lambda: target.copy_(source)
    for name in list(launches):
        # Older chips multiply no fp8.
        with contextlib.suppress(RuntimeError):
            launches[name]()
            continue
        del launches[name]
    samples, _ = _rounds(launches, rounds, 3, random.Random(0))
    times = {name: interval(of)["time_us"] for name, of in samples.items()}
    copied = 2 * source.numel() / times.pop("copy") / 1e6
    return Roofs({name: 2 * _ROOF_SIZE**3 / us / 1e6 for name, us in times.items()}, copied)


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


def _driver() -> str | None:
    """Read the kernel driver's version, where the system shows it."""
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    return None


@functools.cache
def _made_by() -> dict[str, Any]:
    import torch

    return {
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": compiler.triton_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
