"""Find the best configuration of each problem on the GPU at hand, by successive halving.

`space` proposes tiles, warps and stage counts around a problem; `pruned` asks the compiler and
leaves out what can't win: what doesn't fit, all but the deepest pipeline that does, and what
spills where something else doesn't. `halving` times few samples of all that is left, then many
of the best and of their `variants` (Jamieson and Talwalkar, arXiv:1502.07943), so that the
winner is not the luckiest. `tuned` keeps the winners.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench, plan, problems, sweep, tuned
from .parameters import ParameterError
from .specs import Configuration, Problem, Target, Tile

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("Qwen3-235B-A22B", "Llama4 Maverick", "GPT-OSS 120B", "DeepSeek-R1")

_BLOCK_N = (64, 128, 256)
# Steps along K: of x whole lines of 128 bytes, within a block of scales; half of one too where
# w is widened in registers.
_BLOCK_K = {
    "moe_gemm_a8w8": (128, 256),
    "moe_gemm_a8w8_blockscale": (128,),
    "moe_gemm_a8w4": (64, 128, 256),
    "moe_gemm_a4w4": (64, 128, 256),
}
# Weights laid out for Hopper lie by one.
_HOPPER_BLOCK_K = (128,)
_WARPS = (4, 8)
# Hopper has a kernel of its own, of one tile.
_SPECIALIZED = {
    kernel: (Tile(128, 256, 128, specialized=True), 4)
    for kernel in ("moe_gemm_a8w8", "moe_gemm_a8w8_blockscale")
}

# Of fp32 sums a thread may hold so many, half the registers that it has: the other half is for
# operands, addresses and, in two kernels, a second accumulator. On sm_90 (Triton 3.6.0) tiles
# beyond spilled 170 to 402 registers. Fewer than the least leave a warp without a whole
# product of matrix units.
_LEAST_SUMS = 8

# More spilled registers than those of the block_m's least, in which whole tiles differ by
# hundreds.
_SPILLED_MORE = 8


@dataclass(frozen=True)
class Rung:
    """One turn of a halving.

    Args:
        rounds, repetitions: as `bench.measure` takes them.
        keep: how many of a problem go on to the next, with their variants.
    """

    rounds: int
    repetitions: int
    keep: int = 1


RUNGS = (Rung(2, 1, keep=2), Rung(4, 2))


def cells(
    *,
    target: str,
    kernels: object = plan.MOE_GEMMS,
    models: object = MODELS,
    layers: object = "all",
    tp: object = (1, 4),
    m: object = (512, 2560, 8704, 15872),
    **formats: Any,
) -> list[tuple[str, Problem]]:
    """List the problems to tune: each kernel with the models that are served with it.

    Args:
        formats: x_format, scale_layout and fast_accum, as `plan.grid` takes them.
    Raises:
        ParameterError: a value is not one of the right ones, or nothing is left.
    """
    found = []
    for model in plan.named("models", models, problems.MODELS):
        for kernel in plan.named("kernels", kernels, plan.MOE_GEMMS):
            if kernel in problems.MODELS[model].kernels:
                asked = plan.grid(
                    kernels=kernel,
                    targets=target,
                    models=model,
                    layers=layers,
                    tp=tp,
                    m=m,
                    **formats,
                )
                found += [(of.kernel, of.problem) for of in asked]
    if not found:
        raise ParameterError(
            f"models: {models} is served with none of {kernels}; see moelab.problems.MODELS"
        )
    return list(dict.fromkeys(found))


def space(kernel: str, problem: Problem, target: Target) -> list[Configuration]:
    """Propose tiles and warps for a problem, each with `tuned.MOST_STAGES`.

    The published tile is among them. block_m is the one that the published rules route with
    or twice that, and half of the largest: less reads the weights more often, more computes
    rows that are not there.
    """
    routed = problems.routed_block_m(problem)
    sizes = (routed, 2 * routed, *([routed // 2] if routed == 128 else []))
    tilings = [problems.ruled_tile(kernel, problem)]
    steps = _HOPPER_BLOCK_K if problem.scale_layout == "hopper" else _BLOCK_K[kernel]
    for m, n, k, warps in itertools.product(sizes, _BLOCK_N, steps, _WARPS):
        sums = m * n / (warps * target.warp_size)
        most = target.registers_per_thread // 2 + 1
        if _LEAST_SUMS <= sums <= most:
            tilings.append((Tile(m, n, k), warps))
    hopper = target.name == "sm_90"
    if hopper and kernel in _SPECIALIZED and 128 in sizes and not problem.fast_accum:
        tilings.append(_SPECIALIZED[kernel])
    return [
        Configuration(kernel, problem, tile, warps, tuned.MOST_STAGES, "default", target.name)
        for tile, warps in dict.fromkeys(tilings)
    ]


def pruned(
    configurations: Sequence[Configuration],
    store: Path | str,
    *,
    jobs: int | None = None,
    progress: bool = True,
) -> list[Configuration]:
    """Leave out what can't win, by what the compiler says; see `sweep.run`.

    Of each tile stays the largest stage count that fits, at most the one asked: `variants`
    tries others of the best. Of the published tile every one stays. What spills more than the
    least of its problem and block_m goes.
    """
    # Tokens change nothing that is compiled but the width of offsets: the most ask for all.
    alike: dict[Configuration, list[Configuration]] = defaultdict(list)
    for of in configurations:
        alike[replace(of, problem=replace(of.problem, m=0))].append(of)
    left = {key: max(same, key=lambda of: of.problem.m) for key, same in alike.items()}
    kept: dict[Configuration, list[Configuration]] = {}
    while left:
        told = sweep.run(list(left.values()), store, jobs=jobs, progress=progress)
        refused = {}
        for (key, of), status in zip(left.items(), told["status"], strict=True):
            if status == "ok":
                published = any(map(_is_published, alike[key]))
                counts = range(1 if published else of.num_stages, of.num_stages + 1)
                kept[key] = [replace(of, num_stages=count) for count in counts]
            elif of.num_stages > 1:
                refused[key] = replace(of, num_stages=of.num_stages - 1)
        left = refused
    asked = [(key, of) for key, counts in kept.items() for of in counts]
    full = sweep.run([of for _, of in asked], store, full=True, jobs=jobs, progress=progress)
    spilled = {
        (key, of.num_stages): int(row["spilled_registers"])
        for (key, of), row in zip(asked, full.to_dict("records"), strict=True)
        if row["status"] == "ok"
    }
    least: dict[tuple[str, Problem, int], int] = {}
    for (key, _), registers in spilled.items():
        group = key.kernel, key.problem, key.tile.block_m
        least[group] = min(registers, least.get(group, registers))
    return [
        replace(of, num_stages=count)
        for (key, count), registers in spilled.items()
        for of in alike[key]
        if registers <= least[key.kernel, key.problem, key.tile.block_m] + _SPILLED_MORE
        or _is_published(of)
    ]


def _is_published(of: Configuration) -> bool:
    return problems.ruled_tile(of.kernel, of.problem) == (of.tile, of.num_warps)


def halving(
    configurations: Sequence[Configuration],
    measure: Callable[..., pd.DataFrame],
    rungs: Sequence[Rung] = RUNGS,
) -> pd.DataFrame:
    """Time all with few samples, then the best and their variants with more.

    The best of each block_m goes on too, for who routes with it, and the published tile's best
    stage count, to compare the winner with.

    Args:
        measure: takes configurations, ``rounds`` and ``repetitions``, and gives their rows in
            order, as `bench.measure`.
    Returns:
        every row of every rung: `tuned.winners` takes them.
    """
    import pandas as pd

    found = []
    left = list(configurations)
    for rung, following in itertools.zip_longest(rungs, rungs[1:]):
        times: dict[Configuration, float] = {}
        # Both layers in one call are timed one after the other, too, which nobody needs here.
        for layer in sorted({of.problem.layer for of in left}):
            part = [of for of in left if of.problem.layer == layer]
            rows = measure(part, rounds=rung.rounds, repetitions=rung.repetitions)
            found.append(rows)
            times |= dict(zip(part, rows["time_us"], strict=True))
        if following:
            timed = {of: float(us) for of, us in times.items() if not pd.isna(us)}
            left = list(_finalists(timed, rung.keep))
    return pd.concat(found, ignore_index=True)


def _finalists(times: Mapping[Configuration, float], keep: int) -> Iterator[Configuration]:
    """Yield each problem's best with their variants, each block_m's, and the published tile's."""
    by_problem: dict[tuple[str, Problem], list[Configuration]] = defaultdict(list)
    for of in sorted(times, key=times.__getitem__):
        by_problem[of.kernel, of.problem].append(of)
    for of_problem in by_problem.values():
        kept = dict.fromkeys(of_problem[:keep])
        for block_m in dict.fromkeys(of.tile.block_m for of in of_problem):
            kept[next(of for of in of_problem if of.tile.block_m == block_m)] = None
        kept |= dict.fromkeys(itertools.islice(filter(_is_published, of_problem), 1))
        for of in of_problem[:keep]:
            kept |= dict.fromkeys(variants(of))
        yield from kept


def variants(of: Configuration) -> Iterator[Configuration]:
    """Change a configuration by a stage or two, or by how programs go about tiles."""
    for more in (-2, -1, 1, 2):
        if of.num_stages + more > 0:
            yield replace(of, num_stages=of.num_stages + more)
    # What a kernel can't is a row that says so.
    ways: list[dict[str, Any]] = [{"group_m": 8}, {"tma": True}, {"persistent": True}]
    ways.append({"tma": True, "persistent": True})
    if tails := min(2, (of.tile.block_m // 16).bit_length() - 1):
        ways += [{"tails": tails}, {"tma": True, "tails": tails}]
    for way in ways:
        yield replace(of, tile=replace(of.tile, **way))


def run(
    of: Sequence[tuple[str, Problem]],
    store: Path | str,
    *,
    rungs: Sequence[Rung] = RUNGS,
    jobs: int | None = None,
    progress: bool = True,
    **drawn: Any,
) -> pd.DataFrame:
    """Tune on the GPU at hand.

    Args:
        of: kernels and problems, as `cells` lists them.
        store: folder of journals; what is finished stays there, whatever happens then.
        drawn: workload and seed, as `bench.measure` takes them.
    Returns:
        every measured row; `tuned.winners` reduces them.
    Raises:
        ValueError: nothing compiles for a problem.
        MeasureError, OSError: as `bench.measure`.
    """
    target = bench.gpu().target
    asked = [each for kernel, problem in of for each in space(kernel, problem, target)]
    likely = pruned(asked, store, jobs=jobs, progress=progress)
    if nothing := {kernel for kernel, _ in set(of) - {(one.kernel, one.problem) for one in likely}}:
        raise ValueError(
            f"no tile of {', '.join(sorted(nothing))} compiles and fits {target.name}; "
            "`moelab sweep` says why"
        )
    # Problems that share their weights follow one another.
    order = {cell: number for number, cell in enumerate(of)}
    likely.sort(key=lambda each: order[each.kernel, each.problem])
    with contextlib.closing(bench.Device()) as device:
        measure = functools.partial(
            bench.measure, store=store, jobs=jobs, progress=progress, device=device, **drawn
        )
        return halving(likely, measure, rungs)
