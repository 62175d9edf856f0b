"""A grid of questions: which configurations a sweep asks the compiler about.

Checked before anything runs: a wrong value is answered with the right ones.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from . import launches as launches_
from . import problems
from .kernels import KERNELS
from .parameters import ParameterError, as_list
from .specs import (
    SCALE_LAYOUTS,
    X_FORMATS,
    Y_FORMATS,
    AsyncCopy,
    Configuration,
    KernelLaunch,
    Target,
    Tile,
    compact,
)
from .targets import TARGETS

ASYNC_COPY: dict[str, tuple[AsyncCopy, ...]] = {
    "on": (True,),
    "off": (False,),
    "both": (False, True),
    "default": ("default",),
}
WARPS = (1, 2, 4, 8, 16)


def grid(
    *,
    kernels: object,
    targets: object,
    models: object = None,
    layers: object = 1,
    tp: object = 1,
    m: object = 8704,
    tiles: object = None,
    warps: object = None,
    stages: object = (1, 2),
    async_copy: str = "default",
    x_format: object = None,
    y_format: object = "bf16",
    scale_layout: object = "rows",
    fast_accum: bool = False,
) -> list[Configuration]:
    """Expand a grid. Each argument takes a list, one value or comma-separated text.

    Args:
        kernels, targets: by name; ``all`` means every one.
        models: by name; None means the first that is served with each kernel, ``all``
            means every one that is.
        layers: 1, 2 or ``all``; what computes a shared expert has only the first.
        tp: tensor parallelism; ``all`` means `problems.TENSOR_PARALLEL`.
        m: tokens before top-k; ``all`` means `problems.TOKENS`.
        tiles: as `Tile.parse` reads them; None means the tile and warps that the published
            rules choose for each problem.
        warps: warps per workgroup, given together with ``tiles``.
        stages: ``num_stages``.
        async_copy: on, off, both, or default as the Triton that compiles has it; targets
            without the switch get one row.
        x_format, y_format, scale_layout, fast_accum: as in `Problem`; a kernel that doesn't
            take one gets rows that say so.
    Raises:
        ParameterError: a value is not one of the right ones; the message lists them.
    """
    if isinstance(kernels, str) and ":" in kernels:
        raise ParameterError(
            f"kernels: {kernels!r} is not one of moelab's; `moelab lds` asks about it, and "
            "`moelab advise --launch LAUNCH.json`"
        )
    kernel_names = named("kernels", kernels, KERNELS)
    target_names = named("targets", targets, TARGETS)
    served = models in (None, "", "all")
    model_names = [] if served else named("models", models, problems.MODELS)
    given_tiles = _tilings(tiles, warps)
    shapes = itertools.product(
        _integers("layers", layers, problems.LAYERS),
        _integers("tp", problems.TENSOR_PARALLEL if tp == "all" else tp),
        _integers("m", problems.TOKENS if m == "all" else m),
    )
    stage_counts = _integers("stages", stages)
    formats = list(
        itertools.product(
            named("x_format", x_format, X_FORMATS) if x_format else [None],
            named("y_format", y_format, Y_FORMATS),
            named("scale_layout", scale_layout, SCALE_LAYOUTS),
        )
    )
    configurations = []
    for kernel, (layer, shards, tokens) in itertools.product(kernel_names, shapes):
        for model in model_names or _served_with(kernel)[: None if models == "all" else 1]:
            if kernel not in problems.DENSE:
                problem = problems.problem(model, layer, shards, tokens)
            elif layer == 1:
                problem = problems.shared_expert(kernel, model, shards, tokens)
            else:
                continue
            if not problem.k:
                raise ParameterError(f"tp: {shards} leaves nothing of {model} to each shard")
            tilings = given_tiles or [problems.ruled_tile(kernel, problem)]
            for (x, y, scales), (tile, num_warps), target, stage_count in itertools.product(
                formats, tilings, target_names, stage_counts
            ):
                of = replace(
                    problem,
                    x_format=x,
                    y_format=y,
                    scale_layout=scales,
                    fast_accum=fast_accum,
                )
                configurations += [
                    Configuration(kernel, of, tile, num_warps, stage_count, switch, target)
                    for switch in _switches(async_copy, TARGETS[target])
                ]
    if not configurations:
        raise ParameterError(
            f"layers: {', '.join(kernel_names)} has no layer 2: its launch is the whole; give 1"
        )
    return configurations


PARAMETERS = tuple(inspect.signature(grid).parameters)


def launches(
    kernel: str,
    launch: Path,
    *,
    targets: object,
    stages: object = None,
    warps: object = None,
    async_copy: str = "default",
) -> list[KernelLaunch]:
    """Expand a grid over anybody's kernel; lists as in `grid`.

    Where ``triton.autotune`` sets what the launch leaves out, each of its configurations
    is asked.

    Args:
        kernel: ``FILE.py:KERNEL`` or ``package.module:KERNEL``.
        launch: a LAUNCH.json, as `moelab.launches` describes it.
        stages, warps: None means the launch's, the autotuner's, or Triton's default.
    Raises:
        LaunchError: the launch can't be read or does not describe the kernel.
        ParameterError: a value is not one of the right ones; the message lists them.
    """
    from . import compiler

    args, options = launches_.read(launch)
    fn = launches_.load(kernel)
    found = []
    for tuned in launches_.configurations(kernel, args):
        chosen = {**args, **tuned.args}
        launches_.bind(fn, chosen)
        for target in named("targets", targets, TARGETS):
            own = {**compiler.default_options(TARGETS[target]), **tuned.options, **options}
            schedule = ("num_warps", "num_stages")
            others = {n: v for n, v in {**tuned.options, **options}.items() if n not in schedule}
            found += [
                KernelLaunch(
                    kernel, compact(chosen), compact(others), num_warps, num_stages, switch, target
                )
                for num_warps in _integers("warps", warps or own["num_warps"], WARPS)
                for num_stages in _integers("stages", stages or own["num_stages"])
                for switch in _switches(async_copy, TARGETS[target])
            ]
    # Configurations of an autotuner become alike where stages or warps are given.
    return list(dict.fromkeys(found))


def aiter_tests(target: str = "gfx950") -> list[Configuration]:
    """Plan every launch of aiter's tests: before async copy, and under each policy since.

    Args:
        target: where the tests run, one with the async-copy switch.
    """
    configurations = []
    for test in problems.AITER_TESTS:
        for problem in test.problems:
            tile, num_warps = problems.ruled_tile(test.kernel, problem)
            scenarios = {
                (problems.ruled_stages(policy, test.kernel, target, tile), switch)
                for policy, switch in problems.AITER_SCENARIOS
            }
            configurations += [
                Configuration(test.kernel, problem, tile, num_warps, stages, switch, target)
                for stages, switch in sorted(scenarios)
            ]
    return configurations


def _served_with(kernel: str) -> list[str]:
    """Name the models that are served with a kernel."""
    return [model.name for model in problems.MODELS.values() if kernel in model.kernels]


def _switches(async_copy: str, target: Target) -> list[AsyncCopy]:
    """Read the switch; ``default`` is left to the Triton that will compile.

    Raises:
        ParameterError: it is something else; the message lists what there is.
    """
    if not isinstance(async_copy, str) or async_copy not in ASYNC_COPY:
        raise ParameterError(f"async_copy: {async_copy!r} is not one of {', '.join(ASYNC_COPY)}")
    return list(ASYNC_COPY[async_copy]) if target.async_copy_switch else [None]


def _tilings(tiles: object, warps: object) -> list[tuple[Tile, int]]:
    """Pair the given tiles with the given warps; none where none is given."""
    if not tiles and not warps:
        return []
    if not tiles or not warps:
        raise ParameterError(
            f"tiles = {tiles!r} with warps = {warps!r}; give both, for example "
            "tiles 128x256x256 and warps 4,8, or neither to take the published rules' choice"
        )
    try:
        parsed = [Tile.parse(text) for text in _list("tiles", tiles, str)]
    except ValueError as error:
        raise ParameterError(str(error)) from None
    return list(itertools.product(dict.fromkeys(parsed), _integers("warps", warps, WARPS)))


def _list(parameter: str, value: object, kind: type) -> list:
    """Read a list; an element of the wrong kind is answered with the parameter's name."""
    try:
        return as_list(value, kind)
    except ParameterError as error:
        raise ParameterError(f"{parameter}: {error}") from None


def named(parameter: str, value: object, right: Collection[str]) -> list[str]:
    """Read names, each one of the right ones.

    Raises:
        ParameterError: one is not; the message has the nearest, and all there are.
    """
    names = _list(parameter, value, str)
    if names == ["all"]:
        return list(right)
    for name in names:
        if name not in right:
            near = difflib.get_close_matches(name, right, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ParameterError(f"{parameter}: no {name!r}{hint} There are: {', '.join(right)}")
    if not names:
        raise ParameterError(f"{parameter} is empty; give one or more of {', '.join(right)}")
    return list(dict.fromkeys(names))


def _integers(parameter: str, value: object, right: Collection[int] = ()) -> list[int]:
    """Read positive integers, of the right ones where not any will do."""
    numbers = list(right) if right and value == "all" else _list(parameter, value, int)
    wanted = f"one of {', '.join(map(str, right))}" if right else "1 or more"
    for number in numbers:
        if number < 1 or (right and number not in right):
            raise ParameterError(f"{parameter}: {number} is not {wanted}")
    if not numbers:
        raise ParameterError(f"{parameter} is empty; give for example {right or '1'}")
    return list(dict.fromkeys(numbers))


MOE_GEMMS = tuple(kernel for kernel in KERNELS if kernel not in problems.DENSE)

# A step along K must not span two of its scales.
_MOST_BLOCK_K = {"moe_gemm_a8w8_blockscale": 128}
# Elements of the largest block of the output that a published rule chooses.
_MOST_ELEMENTS = 128 * 512


def estimates_trial(
    *,
    kernels: object = MOE_GEMMS,
    targets: object = ("gfx950", "gfx942", "sm_90"),
    block_m: object = (16, 32, 64, 128, 256),
    block_n: object = (64, 128, 256, 512),
    block_k: object = (128, 256, 512),
    stages: object = (1, 2, 3, 4),
) -> list[Configuration]:
    """Plan what published estimates are tried on: tiles around the published rules'.

    Every kernel gets every block that it takes, up to the largest output block of a rule,
    with the rules' warps: 4 where ``block_m`` is 16, else 8. Async copy is off and on where
    the target has the switch.

    Args:
        kernels, targets, stages: as in `grid`; kernels are of `MOE_GEMMS`.
        block_m, block_n, block_k: powers of two.
    Raises:
        ParameterError: a value is not one of the right ones, or nothing is left to ask.
    """
    configurations = []
    blocks = list(
        itertools.product(
            _integers("block_m", block_m),
            _integers("block_n", block_n),
            _integers("block_k", block_k),
        )
    )
    for kernel in named("kernels", kernels, MOE_GEMMS):
        most_k = _MOST_BLOCK_K.get(kernel)
        for m, n, k in blocks:
            if m * n > _MOST_ELEMENTS or (most_k and k > most_k):
                continue
            configurations += grid(
                kernels=kernel,
                targets=targets,
                tiles=f"{m}x{n}x{k}",
                warps=4 if m == 16 else 8,
                stages=stages,
                async_copy="both",
            )
    if not configurations:
        raise ParameterError(
            f"block_m, block_n, block_k: nothing is left of them; block_m x block_n is at most "
            f"{_MOST_ELEMENTS:,} and moe_gemm_a8w8_blockscale takes a block_k of 128 or less"
        )
    return configurations


ESTIMATES_TRIAL = tuple(inspect.signature(estimates_trial).parameters)
