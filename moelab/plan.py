"""A grid of questions: which configurations a sweep asks the compiler about.

Checked before anything runs: a wrong value is answered with the right ones.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from . import compiler, problems
from .kernels import KERNELS
from .parameters import ParameterError, as_list
from .specs import SCALE_LAYOUTS, X_FORMATS, Y_FORMATS, Configuration, Target, Tile
from .targets import TARGETS

ASYNC_COPY = ("on", "off", "both", "default")
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
) -> list[Configuration]:
    """Expand a grid. Each argument takes a list, one value or comma-separated text.

    Args:
        kernels, targets: by name; ``all`` means every one.
        models: by name; None means the first that is served with each kernel, ``all``
            means every one that is.
        layers: 1, 2 or ``all``; what computes a shared expert has only the first.
        tp: tensor parallelism; ``all`` means `problems.TENSOR_PARALLEL`.
        m: tokens before top-k; ``all`` means `problems.TOKENS`.
        tiles: ``MxNxK``; None means the tile and warps that the published rules choose
            for each problem.
        warps: warps per workgroup, given together with ``tiles``.
        stages: ``num_stages``.
        async_copy: one of `ASYNC_COPY`; targets without the switch get one row.
        x_format, y_format, scale_layout: as in `Problem`; a kernel that doesn't take one
            gets rows that say so.
    Raises:
        ParameterError: a value is not one of the right ones; the message lists them.
    """
    kernel_names = _names("kernels", kernels, KERNELS)
    target_names = _names("targets", targets, TARGETS)
    served = models in (None, "", "all")
    model_names = [] if served else _names("models", models, problems.MODELS)
    given_tiles = _tilings(tiles, warps)
    shapes = itertools.product(
        _integers("layers", layers, problems.LAYERS),
        _integers("tp", problems.TENSOR_PARALLEL if tp == "all" else tp),
        _integers("m", problems.TOKENS if m == "all" else m),
    )
    stage_counts = _integers("stages", stages)
    formats = list(
        itertools.product(
            _names("x_format", x_format, X_FORMATS) if x_format else [None],
            _names("y_format", y_format, Y_FORMATS),
            _names("scale_layout", scale_layout, SCALE_LAYOUTS),
        )
    )
    if async_copy not in ASYNC_COPY:
        raise ParameterError(f"async_copy: {async_copy!r} is not one of {', '.join(ASYNC_COPY)}")
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
                of = replace(problem, x_format=x, y_format=y, scale_layout=scales)
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


def _switches(async_copy: str, target: Target) -> list[bool | None]:
    if not target.async_copy_switch:
        return [None]
    if async_copy == "default":
        return [compiler.default_async_copy(target)]
    switches: dict[str, list[bool | None]] = {"on": [True], "off": [False], "both": [False, True]}
    return switches[async_copy]


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


def _names(parameter: str, value: object, right: Collection[str]) -> list[str]:
    """Read names, each one of the right ones."""
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


# What alternatives change; block_m is also the layout of the routing.
CHANGED = ("num_stages", "block_k", "block_n", "block_m", "num_warps", "async_copy")

# Blocks below what matrix units multiply at once leave them partly idle.
_LEAST_BLOCK = 16


def alternatives(
    configuration: Configuration, keep: object = (), most: int = 60
) -> list[Configuration]:
    """List what lies nearest to a configuration, nearest first; see `neighbours`.

    Args:
        keep: of `CHANGED`, what must stay as it is.
    Raises:
        ParameterError: ``keep`` names something else.
    """
    kept = _names("keep", keep, CHANGED) if keep else []
    tile = asdict(configuration.tile)
    settings = {name: tile.get(name, getattr(configuration, name, None)) for name in CHANGED}
    found = []
    for changed in neighbours(settings, kept, most):
        blocks = {name: changed.pop(name) for name in tile if name in changed}
        of_tile = replace(configuration.tile, **blocks)
        found.append(replace(configuration, tile=of_tile, **changed))
    return found


def neighbours(
    settings: Mapping[str, Any], keep: Collection[str] = (), most: int = 60
) -> list[dict[str, Any]]:
    """Change one setting, or two; nearest first.

    A step is one stage more or fewer, a block halved, block_k doubled, warps halved or
    doubled, async copy off. Stages go down to one, blocks to a quarter. What asks for more
    LDS, a stage or block_k doubled, is paired with the other one made smaller, and with
    nothing else: a deeper step with fewer stages, and more stages of a shorter step.

    Args:
        settings: of `CHANGED`, those that there are, by name.
        keep: those that must stay as they are.
        most: the furthest beyond this many are left out.
    Returns:
        the settings that differ, by name.

    >>> neighbours({"num_stages": 2, "block_k": 32})
    [{'num_stages': 1}, {'num_stages': 3}, {'block_k': 16}, {'block_k': 64}, \
{'num_stages': 1, 'block_k': 16}, {'num_stages': 1, 'block_k': 64}, \
{'num_stages': 3, 'block_k': 16}]
    """
    moves = [
        (name, value, steps)
        for name in CHANGED
        if name not in keep and settings.get(name) is not None
        for value, steps in _moves(name, settings[name])
    ]
    found = [(steps, {name: value}) for name, value, steps in moves]
    for (name, value, steps), (other, to, more) in itertools.combinations(moves, 2):
        grown = [n for n, v in ((name, value), (other, to)) if _grows(n, v, settings)]
        traded = {name, other} == {"num_stages", "block_k"} and len(grown) == 1
        if name != other and (traded or not grown):
            found.append((steps + more, {name: value, other: to}))
    # Sorting is stable: of equally near ones a single change comes first.
    found.sort(key=lambda one: one[0] + len(one[1]))
    return [changed for _, changed in found[:most]]


def _moves(name: str, value: Any) -> Iterator[tuple[Any, int]]:
    """Yield what a setting may become, and how many steps away that is."""
    if name == "num_stages":
        yield from ((fewer, value - fewer) for fewer in range(value - 1, 0, -1))
        yield value + 1, 1
    elif name == "num_warps":
        yield from ((warps, 1) for warps in (value // 2, value * 2) if warps in WARPS)
    elif name == "async_copy":
        yield from [(False, 1)] if value else []
    else:
        halved = ((value // part, steps) for part, steps in ((2, 1), (4, 2)))
        yield from ((block, steps) for block, steps in halved if block >= _LEAST_BLOCK)
        if name == "block_k":
            yield value * 2, 1


def _grows(name: str, value: Any, settings: Mapping[str, Any]) -> bool:
    return name in ("num_stages", "block_k") and value > settings[name]
