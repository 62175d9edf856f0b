"""Launch, check and time configurations on the GPU at hand, in this process.

What is launched must load the LDS that was told and give the reference's result before it is
timed, in turns with the others of its problem (`timing`). Both layers of a model are timed apart
and one after the other. What fails on the GPU is a row that says why.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from . import compiler, kernels, problems, sensors, targets, timing, workloads
from . import peers as others
from .specs import Configuration, Problem, Target
from .timing import OUT_OF_MEMORY, Launch, MeasureError

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels.inputs import Inputs

Asked = Configuration | others.Asked

# Of a roof: products of this size fill every chip.
_ROOF_SIZE = 8192


def _nobody(launches: Iterable[Asked]) -> None:
    """Be told what is done next."""


@dataclass(frozen=True)
class How:
    """How samples are taken.

    Args:
        workload: one of `workloads.WORKLOADS`.
        seed: of inputs, routing and the order of turns.
        rounds, repetitions: samples are ``rounds x repetitions``.
        peers: names of `peers.PEERS`, which take turns with ours.
        tell: called with what is done next, which is to blame if this process then ends: the
            launches of a problem whose inputs are drawn, or those of one turn.
    """

    workload: str
    seed: int
    rounds: int = 2
    repetitions: int = 1
    peers: tuple[str, ...] = ()
    tell: Callable[[Iterable[Asked]], None] = _nobody


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


def each_gpu() -> list[dict[str, str]]:
    """Give, for each GPU that this process may use, the environment that leaves only that one.

    Raises:
        MeasureError: there is none.
    """
    import torch

    if not (count := torch.cuda.device_count()):
        raise MeasureError("no GPU: torch.cuda.device_count() is 0; see `moelab doctor`")
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    given = os.environ.get(variable)
    names = given.split(",") if given else map(str, range(count))
    return [{variable: name.strip()} for name in itertools.islice(names, count)]


def check(questions: Iterable[Configuration], here: Gpu) -> None:
    """Refuse what can't be measured here.

    Raises:
        MeasureError: another target, the other setting of async copy, or no MoE GEMM.
    """
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


def by_problem(questions: Iterable[Configuration]) -> list[list[Configuration]]:
    """Part questions by kernel and problem, in order of first appearance."""
    found: dict[tuple[str, Problem], list[Configuration]] = defaultdict(list)
    for of in questions:
        found[of.kernel, of.problem].append(of)
    return list(found.values())


def measured(
    fitting: Sequence[Configuration],
    told: Mapping[Configuration, int],
    before: dict[int, Inputs],
    how: How,
) -> tuple[dict[int, Inputs], dict[Asked, dict[str, Any]]]:
    """Measure a unit; where its two layers are too large together, one after the other.

    Args:
        fitting: configurations of one problem, or of both layers.
        told: bytes of LDS of those that are to be launched.
        before: inputs by layer, whose weights will do if their shape does; emptied where
            memory is short.
    Returns:
        this unit's inputs by layer, and what each row gains.
    Raises:
        ContextLost: nothing can be launched any more.
    """
    drawn, found = _timed(fitting, told, before, how)
    parts = by_problem(fitting)
    if len(parts) > 1 and any(row.get("status") == OUT_OF_MEMORY for row in found.values()):
        drawn = {}
        before.clear()
        for part in parts:
            found |= _timed(part, told, before, how)[1]
    return drawn, found


def _timed(
    fitting: Sequence[Configuration],
    told: Mapping[Configuration, int],
    before: Mapping[int, Inputs],
    how: How,
) -> tuple[dict[int, Inputs], dict[Asked, dict[str, Any]]]:
    """Launch, check and time configurations of one problem or of both layers; see `measured`."""
    import torch

    drawn: dict[int, Inputs] = {}
    launches: dict[Asked, Launch] = {}
    found: dict[Asked, dict[str, Any]] = {}
    for of_problem in by_problem(fitting):
        layer = of_problem[0].problem.layer
        how.tell(of_problem)
        try:
            drawn[layer], ready, said = checked(of_problem, told, before.get(layer), how)
        except torch.OutOfMemoryError as error:
            return {}, dict.fromkeys(fitting, timing.failure(error, of_problem[0]))
        launches |= ready
        found |= said
    order = random.Random(how.seed)
    timed = timing.in_turns(launches, how.rounds, how.repetitions, order, lambda of: how.tell([of]))
    for of, gained in timed.items():
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
    both = timing.in_turns(together, how.rounds, how.repetitions, order, how.tell)
    for of, pair in pairs.items():
        found[of]["both_layers_us"] = both[pair].get("time_us")
    for of, row in found.items():
        row["made_by"] = json.dumps(made_by(of))
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


def checked(
    of_problem: Sequence[Configuration],
    told: Mapping[Configuration, int],
    before: Inputs | None,
    how: How,
) -> tuple[Inputs, dict[Asked, Launch], dict[Asked, dict[str, Any]]]:
    """Draw a problem's inputs and launch each of its configurations once, then its peers.

    Args:
        told: bytes of LDS of those that are to be launched.
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
    launches: dict[Asked, Launch] = {}
    found: dict[Asked, dict[str, Any]] = {}
    for block_m in dict.fromkeys(of.tile.block_m for of in of_problem):
        routed = replace(drawn, routing=route(expert, weight, problem.experts, block_m))
        for of in of_problem:
            if of in told and of.tile.block_m == block_m:
                launch = functools.partial(
                    routed.run,
                    of.tile,
                    num_warps=of.num_warps,
                    num_stages=of.num_stages,
                    num_xcds=target.xcds,
                )
                how.tell([of])
                try:
                    found[of] = _held_against(of, launch, expected, told[of], target)
                except Exception as error:
                    found[of] = timing.failure(error, of)
                if "status" not in found[of]:
                    launches[of] = launch
    against = functools.partial(_against, expected=expected, problem=problem)
    of_peers, said = others.ready(how.peers, first, drawn, against, tell=lambda of: how.tell([of]))
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


def measured_roofs(rounds: int) -> Roofs:
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


@functools.cache
def _made_by() -> dict[str, Any]:
    import torch

    return {
        "driver": sensors.driver(),
        "torch": torch.__version__,
        "triton": compiler.triton_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def made_by(of: Asked) -> dict[str, Any]:
    """Name the driver, packages and source that a launch is made with."""
    if isinstance(of, others.Asked):
        return _made_by() | of.made_by()
    return _made_by() | {"kernel": kernels.source_hash(of.kernel)}
