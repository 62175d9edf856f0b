"""Best configurations, measured on a GPU and kept as data that the launchers read.

`moelab tune` measures. Of its rows `winners` keeps the quickest configuration of each shape,
token count and block_m, and `save` writes them with what made them: one JSON file per target,
in ``data/`` as shipped, or in the folder ``$MOELAB_TUNED``, which comes first. `best` answers
for a shape that was measured, at the nearest number of tokens; for any other there is no
answer, and `choose`, which launchers ask, falls back to the published rules.

A launch waits for what is here: standard library alone until rows are reduced.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import disk, problems
from .specs import X_FORMATS, Problem, Tile

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parent / "data"

# Of the tile's largest stage count that fits: on an H200 it lost 4.3% against the tile's best in
# the median of 260 problems, and 2.9 times at most; capped at 4 it lost 1.5% (`trade.SHIPPED`).
MOST_STAGES = 4

# block_n and block_k of weights laid out for Hopper, of which no published rule speaks: four
# warps multiply 64 columns of w at once, and its steps are of 128.
_HOPPER_BLOCKS = (128, 128)


class Shape(NamedTuple):
    """What a choice is for, whatever its model: tokens and epilogue are left out.

    Args:
        kernel: by name.
        experts, top_k, n, k, gather, y_format, scale_layout: as in `Problem`.
        x_format: None where it is the kernel's only or first.
        fast_accum: sums are left to the tensor cores, as `moe_gemm_a8w8` has it.

    >>> Shape.of("moe_gemm_a8w8", problems.problem("Llama4 Maverick", 2, 4, 512))[:6]
    ('moe_gemm_a8w8', 128, 1, 5120, 2048, False)
    """

    kernel: str
    experts: int
    top_k: int
    n: int
    k: int
    gather: bool
    x_format: str | None = None
    y_format: str = "bf16"
    scale_layout: str = "rows"
    fast_accum: bool = False

    @classmethod
    def of(cls, kernel: str, problem: Problem) -> Shape:
        """Take what counts of a problem."""
        named = {name: value for name, value in vars(problem).items() if name in cls._fields}
        return cls(kernel=kernel, **named).settled()

    def settled(self) -> Shape:
        """Name the kernel's first format of x in one way."""
        return self._replace(x_format=None) if self.x_format == X_FORMATS[0] else self


@dataclass(frozen=True)
class Choice:
    """How to launch: the best that was measured, or what the published rules say.

    Args:
        num_stages: None: as many as fit, `MOST_STAGES` at most.
        m: tokens that it was measured with; None where it was not, and so below.
        time_us: its time.
        runner_up_us: of the next best of its block_m; None where no other was timed as long.
        compared: how many configurations of that block_m were timed.
        source: of the kernel then, as `kernels.source_hash` has it.
    """

    tile: Tile
    num_warps: int
    num_stages: int | None
    m: int | None = None
    time_us: float | None = None
    runner_up_us: float | None = None
    compared: int = 0
    source: str | None = None


def best(kernel: str, problem: Problem, target: str, block_m: int | None = None) -> Choice | None:
    """Find the best configuration that was measured for a problem; see `nearest`.

    Args:
        target: by name: ``sm_90``.
        block_m: the routing's; None takes the quickest of all that were measured.
    Returns:
        None where the shape, or ``block_m`` with it, was never measured on the target.
    Raises:
        ValueError: the target's file is not one of moelab's.
    """
    return nearest(Shape.of(kernel, problem), problem.m, target, block_m)


def nearest(shape: Shape, m: int, target: str, block_m: int | None = None) -> Choice | None:
    """Find the best of a shape, at the number of tokens measured nearest to ``m``.

    The nearest has the least ratio to ``m``, of two as near it is the smaller one. Where
    ``block_m`` is given, only what was measured with it counts. What fits at one number of
    tokens fits at any: no tile and no buffer depends on it.
    """
    measured = [
        choice for choice in _load(target).get(shape, ()) if block_m in (None, choice.tile.block_m)
    ]
    if not measured:
        return None
    return min(measured, key=lambda choice: (*_distance(choice, m), choice.time_us))


def _distance(choice: Choice, m: int) -> tuple[float, int]:
    at = choice.m or 0
    return abs(math.log(at / max(m, 1))), at


def block_m_for(shapes: Sequence[Shape], m: int, target: str) -> int:
    """Say what to lay the routing out for, which all of some GEMMs share: a layer's two.

    Args:
        shapes: of the GEMMs.
        m: tokens.
    Returns:
        the block_m of the least time in all, at the numbers of tokens measured nearest; where
        a shape was never measured, or no block_m with all of them, what the published rule
        gives.
    """
    totals: dict[int, list[float]] = {}
    for shape in shapes:
        at = nearest(shape.settled(), m, target)
        for choice in _load(target).get(shape.settled(), ()):
            if at and choice.m == at.m and choice.time_us:
                totals.setdefault(choice.tile.block_m, []).append(choice.time_us)
    shared = {size: sum(times) for size, times in totals.items() if len(times) == len(shapes)}
    if not shared:
        return problems.routed_block_m(_problem(shapes[0], m))
    return min(shared, key=lambda size: (shared[size], size))


def _problem(shape: Shape, m: int) -> Problem:
    """Make a problem of a shape; what its epilogue does counts for no tile."""
    named = {name: value for name, value in shape._asdict().items() if name != "kernel"}
    known = {name: named[name] for name in _PROBLEM_FIELDS & named.keys()}
    return Problem("", 1, 1, m, swiglu=False, weighted=False, **known)


_PROBLEM_FIELDS = {field.name for field in fields(Problem)}


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, m: int, block_m: int, target: str | None) -> Choice:
    """Choose for a launch whose routing was laid out for ``block_m``.

    What was measured, else the tile of the published rules with as many stages as fit.

    Args:
        target: None where it is no target of moelab's.
    Raises:
        ValueError: the shape was measured, but not with ``block_m``, or no rule speaks of
            it; the message says what to route with.
    """
    if target is not None:
        if found := nearest(shape, m, target, block_m):
            return found
        if known := sorted({choice.tile.block_m for choice in _load(target).get(shape, ())}):
            raise ValueError(
                f"routing was laid out for block_m = {block_m}; {shape.kernel} of this shape "
                f"(experts {shape.experts}, top_k {shape.top_k}, n {shape.n}, k {shape.k}) was "
                f"tuned on {target} with {', '.join(map(str, known))}: route with "
                f"{block_m_for([shape], m, target)}, the best at {m} tokens, or give a tile"
            )
    if shape.scale_layout == "hopper":
        return Choice(Tile(block_m, *_HOPPER_BLOCKS), 4 if block_m <= 128 else 8, MOST_STAGES)
    tile, num_warps = problems.ruled_tile(shape.kernel, _problem(shape, m), block_m)
    return Choice(tile, num_warps, None)


# The data.

_TILE = {field.name: field.default for field in fields(Tile)}
_OF_CHOICE = ("num_warps", "num_stages", "m", "time_us", "runner_up_us", "compared")


def path_of(target: str, folder: Path | str | None = None) -> Path:
    """Name a target's file: in a folder, or where it is looked for first."""
    return Path(folder or os.environ.get("MOELAB_TUNED") or SHIPPED) / f"tuned_{target}.json"


def files() -> list[Path]:
    """List every target's files, those that launchers look at first in front."""
    folders = dict.fromkeys((path_of("").parent, SHIPPED))
    return [path for folder in folders for path in sorted(folder.glob("tuned_*.json"))]


@functools.cache
def _load(target: str) -> dict[Shape, list[Choice]]:
    """Read a target's choices once; a shape in ``$MOELAB_TUNED`` hides the shipped one's."""
    found: dict[Shape, list[Choice]] = {}
    for path in dict.fromkeys((path_of(target), path_of(target, SHIPPED))):
        if not path.is_file():
            continue
        file = read(path)
        of_file: dict[Shape, list[Choice]] = {}
        for row in file["rows"]:
            source = file["made_by"][row["by"]]["source"]
            named = {name: row[name] for name in _OF_CHOICE}
            choice = Choice(_tile(row), **named, source=source)
            of_file.setdefault(_shape(row), []).append(choice)
        found = of_file | found
    return found


def forget() -> None:
    """Read the files anew at the next question."""
    _load.cache_clear()
    choose.cache_clear()


def read(path: Path | str) -> dict[str, Any]:
    """Read a file of choices.

    Returns:
        ``{"schema", "target", "made_by": [...], "rows": [...]}``; a row's ``by`` is its place
        in ``made_by``, and names the GPU, versions, date, workload and the kernel's source.
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of moelab's, or a later one's.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text())
        later = found["schema"] > SCHEMA_VERSION
        # A later moelab's rows may be of another kind.
        for row in [] if later else found["rows"]:
            missing = {*Shape._fields, *_OF_CHOICE, "block_m", "block_n", "block_k", "by"} - {*row}
            if missing:
                raise KeyError(*sorted(missing))
            found["made_by"][row["by"]]["source"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a file of tuned configurations ({type(error).__name__}: {error}); "
            "`moelab tune --out` writes them"
        ) from None
    if later:
        raise ValueError(
            f"{path} has schema {found['schema']}; this moelab reads up to {SCHEMA_VERSION}: "
            "upgrade moelab"
        )
    return found


def save(rows: Iterable[Mapping[str, Any]], target: str, path: Path | str) -> Path:
    """Write choices, whole or not at all, into a target's file.

    Rows of an existing file stay, but for those of the same shape: its choices were compared
    with each other, not with the new ones.

    Args:
        rows: of `winners`.
    Raises:
        ValueError: there are none, or what is there is not such a file, or another target's.
        DiskFullError: there is no room; what was there before stays.
    """
    path, new = Path(path), [dict(row) for row in rows]
    if not new:
        raise ValueError(f"no measured configuration to write to {path}")
    kept: list[dict[str, Any]] = []
    if path.exists():
        there = read(path)
        if there["target"] != target:
            raise ValueError(f"{path} is of {there['target']}; name another file for {target}")
        replaced = {_shape(row) for row in new}
        kept = [
            {**row, "made_by": there["made_by"][row["by"]]}
            for row in there["rows"]
            if _shape(row) not in replaced
        ]
    ordered = sorted(
        [*kept, *new], key=lambda row: (*map(str, _shape(row)), row["m"], row["block_m"])
    )
    makers = [json.loads(text) for text in dict.fromkeys(map(_maker, ordered))]
    lines = [
        json.dumps(
            {name: value for name, value in row.items() if name != "made_by"}
            | {"by": makers.index(row["made_by"])}
        )
        for row in ordered
    ]
    head = json.dumps({"schema": SCHEMA_VERSION, "target": target, "made_by": makers}, indent=1)
    body = ",\n  ".join(lines)
    disk.make_folder(path.parent)
    disk.replace(path, f'{head[:-2]},\n "rows": [\n  {body}\n ]\n}}\n')
    forget()
    return path


def _shape(row: Mapping[str, Any]) -> Shape:
    return Shape(*(row[name] for name in Shape._fields))


def _tile(row: Mapping[str, Any]) -> Tile:
    return Tile(**{name: row.get(name, default) for name, default in _TILE.items()})


def _maker(row: Mapping[str, Any]) -> str:
    return json.dumps(row["made_by"])


def stale(found: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, str]:
    """Tell which kernels changed since a file's choices were measured.

    Args:
        found: of `read`.
        sources: of each kernel as it is, by `kernels.source_hash`.
    Returns:
        the source that was measured, by kernel; empty where all are as they were.
    """
    return {
        row["kernel"]: measured
        for row in found["rows"]
        for measured in [found["made_by"][row["by"]]["source"]]
        if measured != sources.get(row["kernel"], measured)
    }


# From measured rows.

_NAMES = ["kernel", "model", "fast_accum", "layer", "tp", "m"]


def winners(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Reduce measured rows to the quickest of each shape, token count and block_m.

    Of problems that differ in what their epilogue does alone, the one counts for which most
    configurations were compared.

    Args:
        rows: of `bench.measure`; what was not timed is left out.
    Returns:
        rows for `save`.
    """
    found: dict[tuple[Shape, int, int], dict[str, Any]] = {}
    for of_one in _comparable(rows, "block_m"):
        timed = of_one.sort_values("time_us", kind="stable").to_dict("records")
        row = timed[0]
        shape = Shape.of(row["kernel"], _problem_of(row))
        known = found.get(key := (shape, row["m"], row["block_m"]))
        if known is None or row["compared"] > known["compared"]:
            found[key] = (
                shape._asdict()
                | {"m": row["m"], "of": f"{row['model']}, layer {row['layer']}, TP {row['tp']}"}
                | {name: row[name] for name in (*_TILE, "num_warps", "num_stages") if name in row}
                | {
                    "time_us": round(row["time_us"], 2),
                    "low_us": round(row["time_low_us"], 2),
                    "high_us": round(row["time_high_us"], 2),
                    "runner_up_us": round(timed[1]["time_us"], 2) if timed[1:] else None,
                    "compared": row["compared"],
                    "made_by": _made_by(row),
                }
            )
    return list(found.values())


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Set the best configuration of each problem beside the published rules' tile.

    That tile counts with its own best stage count. A problem where it was not timed in the
    same run is left out.

    Args:
        rows: of `bench.measure`.
    Returns:
        one row per problem: its names, ``tuned_us``, ``published_us``, and ``gain``, how many
        times longer the published tile takes.
    """
    import pandas as pd

    found = []
    for of_one in _comparable(rows):
        timed = of_one.to_dict("records")
        ruled = [row["time_us"] for row in timed if _is_published(row)]
        if ruled:
            tuned = min(row["time_us"] for row in timed)
            names = [timed[0][name] for name in _NAMES]
            found.append([*names, tuned, min(ruled), min(ruled) / tuned])
    return pd.DataFrame(found, columns=[*_NAMES, "tuned_us", "published_us", "gain"])


def mean_gains(compared: pd.DataFrame) -> pd.DataFrame:
    """Take the geometric mean of `gains` per kernel, model and way to sum, least and most."""
    grouped = compared.groupby(["kernel", "model", "fast_accum"], sort=False)["gain"]
    return grouped.agg(
        problems="size",
        mean=lambda gain: math.exp(sum(map(math.log, gain)) / len(gain)),
        least="min",
        most="max",
    ).reset_index()


def _comparable(rows: pd.DataFrame, *also: str) -> Iterator[pd.DataFrame]:
    """Yield each problem's timed rows of one run, as plain objects, with how many there were.

    Only configurations that took turns are compared: those of the run with the most samples
    of each, of several such runs the last. ``compared`` counts those of every run.

    Args:
        also: columns that are told apart besides the problem.
    """
    by = ["kernel", *(name for name in _PROBLEM_FIELDS if name in rows), *also]
    settings = [name for name in (*_TILE, "num_warps", "num_stages") if name in rows]
    # A peer's kernel has no configuration.
    timed = rows[rows["peer"].isna()].dropna(subset=["time_us"]).astype(object)
    timed = timed.where(timed.notna(), None)
    for _, of_one in timed.groupby(by, sort=False, dropna=False):
        samples = of_one["samples_us"].map(lambda text: sum(map(len, json.loads(text))))
        _, run = max(zip(samples, of_one["run"], strict=True))
        compared = len(of_one[settings].drop_duplicates())
        yield of_one[of_one["run"] == run].assign(compared=compared)


def _problem_of(row: Mapping[str, Any]) -> Problem:
    return Problem(**{name: row[name] for name in _PROBLEM_FIELDS if name in row})


def _is_published(row: Mapping[str, Any]) -> bool:
    return problems.ruled_tile(row["kernel"], _problem_of(row)) == (_tile(row), row["num_warps"])


def _made_by(row: Mapping[str, Any]) -> dict[str, Any]:
    """Name what made a row, in words that its other rows share."""
    made_by = json.loads(row["made_by"])
    rounds = json.loads(row["samples_us"])
    return {
        "source": made_by["kernel"],
        "gpu": row["gpu"],
        **{name: made_by.get(name) for name in ("driver", "triton", "torch", "date")},
        "moelab": row["moelab"],
        "workload": row["workload"],
        "async_copy": row["async_copy"],
        "samples": f"{len(rounds)} rounds of {len(rounds[0])}",
    }
