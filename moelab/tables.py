"""Answers in tables: what rows say about fitting, one question each.

Frames in, frames out; no compiler, no GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from . import inert, problems
from .specs import Tile

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML

_WAYS = ["group_m", "tma", "tails", "persistent", "specialized"]

# Where products are added up, by ``fast_accum``.
SUMS = {False: "sums in fp32", True: "sums in the tensor cores"}

# A tile with its warps, as one kernel on one target launches it.
TILING = ["kernel", "target", "triton", "tile", "num_warps"]

ASYNC_COPY = "async copy"

# What a full compile adds that a reader looks at first.
RESOURCES = ["registers", "spilled_registers", "workgroups_per_cu"]


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that people read: ``tile`` as `Tile.parse` does, async copy in words."""
    import pandas as pd

    tile = rows[["block_m", "block_n", "block_k", "split_k"]].astype("string")
    shared = ("/" + tile["split_k"]).where(rows["split_k"] > 1, "")
    blocks = {"block_m": 1, "block_n": 1, "block_k": 1}
    said = rows.reindex(columns=_WAYS).to_dict("records")
    ways = pd.Series([tile_of(blocks | of).ways for of in said], rows.index, dtype="string")
    words = rows["async_copy"].map({True: "on", False: "off"}).fillna("no switch")
    return rows.assign(
        tile=tile["block_m"] + "x" + tile["block_n"] + "x" + tile["block_k"] + shared + ways,
        **{ASYNC_COPY: words.astype("string")},
    )


def tile_of(row: Mapping[str, Any]) -> Tile:
    """Make a row's tile; of what an older or a foreign row doesn't say, the usual."""
    import pandas as pd

    said: dict[str, Any] = {item.name: row.get(item.name) for item in fields(Tile)}
    return Tile(**{name: value for name, value in said.items() if not pd.isna(value)})


def of_launches(rows: pd.DataFrame) -> pd.DataFrame:
    """Tell what was asked of anybody's kernel and the answer, as far as it varies or matters.

    Args:
        rows: of `plan.launches`.
    """
    import pandas as pd

    rows = labelled(rows)
    own = pd.DataFrame(
        [
            json.loads(args) | json.loads(options)
            for args, options in zip(rows["args"], rows["options"], strict=True)
        ],
        index=rows.index,
    )
    varying = own[[name for name in own if own[name].map(json.dumps).nunique() > 1]]
    asked = ["target", "triton", "num_warps", "num_stages", ASYNC_COPY]
    answer = ["lds_bytes", "lds_limit", "status", *RESOURCES]
    return varying.join(rows[[*asked, *answer]]).dropna(axis="columns", how="all")


def shown(table: pd.DataFrame) -> HTML:
    """Show a table in a notebook: what holds throughout above it, the rest with commas.

    ``fast_accum`` is said in words, and that there is no row.
    """
    from html import escape

    from IPython.display import HTML

    if table.empty:
        return HTML("<p>None.</p>")
    table = inert.frame(table, most=inert.LONG)
    if "fast_accum" in table:
        words = table["fast_accum"].map(
            {fast: said.removeprefix("sums in ") for fast, said in SUMS.items()}
        )
        table = table.assign(fast_accum=words).rename(columns={"fast_accum": "sums in"})
    constant = [name for name in table if table[name].nunique(dropna=False) == 1]
    if len(table) < 2 or len(constant) == table.shape[1]:
        constant = []
    # What is missing throughout says nothing, above the table or in it.
    stated = [name for name in constant if table[name].notna().all()]
    throughout = ", ".join(f"{name} {_with_commas(table[name].iloc[0])}" for name in stated)
    lines = f"<p>Throughout: {escape(throughout)}.</p>" if throughout else ""
    body = table.drop(columns=constant)
    commas = dict.fromkeys(body.select_dtypes("number"), _with_commas)
    # pandas prints <NA> of nullable types whatever `na_rep` says.
    body = body.astype(object).where(body.notna(), "")
    return HTML(lines + body.to_html(index=False, border=0, formatters=commas))


def _with_commas(value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{value:,}"


def in_tile_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort by all columns up to two after ``tile``, that by its numbers, not its letters."""

    def order(column: pd.Series) -> pd.Series:
        if column.name != "tile":
            return column
        return column.map(
            lambda tile: re.sub(r"\d+", lambda block: block[0].zfill(6), tile), na_action="ignore"
        )

    by = list(table.columns[: table.columns.get_loc("tile") + 3])
    return table.sort_values(by, key=order, ignore_index=True)


def statuses(rows: pd.DataFrame) -> pd.DataFrame:
    """Count configurations by status, per kernel, target, async copy and stage count."""
    counts = labelled(rows).pivot_table(
        index=["kernel", "target", "triton", ASYNC_COPY, "num_stages"],
        columns="status",
        values="lds_limit",
        aggfunc="size",
        fill_value=0,
        observed=True,
    )
    counts["configurations"] = counts.sum(axis=1)
    return counts.rename_axis(columns=None).reset_index()


def lds_by_stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Give the most LDS bytes that any problem needs, a column per stage count.

    Returns:
        one row per tile, warps and async copy: ``1 stage (bytes)``, ..., ``limit (bytes)``.
    """
    compiled = labelled(rows).dropna(subset=["lds_bytes"])
    table = compiled.pivot_table(
        index=[*TILING, ASYNC_COPY, "lds_limit"],
        columns="num_stages",
        values="lds_bytes",
        aggfunc="max",
    )
    table.columns = [
        f"{stages} stage{'s' if stages > 1 else ''} (bytes)" for stages in table.columns
    ]
    table = table.reset_index()
    table["limit (bytes)"] = table.pop("lds_limit")
    return in_tile_order(table)


def async_copy_difference(rows: pd.DataFrame) -> pd.DataFrame:
    """Set each tile's LDS with async copy on against off.

    Returns:
        one row per tile, warps and stage count whose target has the switch: bytes off
        and on (the most over all problems), what was added, and what became of the fit.
    """
    compiled = labelled(rows).dropna(subset=["lds_bytes", "async_copy"])
    pairs = compiled.pivot_table(
        index=[*TILING, "num_stages", "lds_limit"],
        columns=ASYNC_COPY,
        values="lds_bytes",
        aggfunc="max",
    )
    pairs = pairs.reindex(columns=["off", "on"]).dropna().rename_axis(columns=None).reset_index()
    limit = pairs.pop("lds_limit")
    fits = {(True, True): "fits", (True, False): "no longer fits", (False, True): "now fits"}
    verdict = [
        fits.get((off <= most, on <= most), "never fits")
        for off, on, most in zip(pairs["off"], pairs["on"], limit, strict=True)
    ]
    pairs = pairs.assign(added=pairs["on"] - pairs["off"], limit=limit)
    bytes_ = ["off", "on", "added", "limit"]
    return in_tile_order(
        pairs.rename(columns={name: f"{name} (bytes)" for name in bytes_}).assign(verdict=verdict)
    )


def largest_stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Find the largest stage count at which every problem of a tile fits.

    Returns:
        one row per tile, warps and async copy that compiled at all: ``largest stage count
        that fits`` (0 where none does), the LDS it needs, what stays free, and the largest
        that was asked.
    """
    import pandas as pd

    found = []
    for names, of_tile in labelled(rows).groupby([*TILING, ASYNC_COPY], sort=False):
        if of_tile["lds_bytes"].isna().all():
            continue
        fits = of_tile.groupby("num_stages")["status"].agg(lambda s: (s == "ok").all())
        best = max((stages for stages, ok in fits.items() if ok), default=0)
        used = of_tile.loc[of_tile["num_stages"] == best, "lds_bytes"].max()
        limit = of_tile["lds_limit"].iloc[0]
        found.append((*names, best, used, limit - used, fits.index.max()))
    columns = ["largest stage count that fits", "LDS (bytes)", "free (bytes)", "asked up to"]
    table = pd.DataFrame(found, columns=[*TILING, ASYNC_COPY, *columns])
    return in_tile_order(table.astype({name: "Int64" for name in columns}))


def aiter_tests(rows: pd.DataFrame) -> pd.DataFrame:
    """Re-derive which test files fail for want of LDS, under every stage policy.

    Args:
        rows: of `plan.aiter_tests`.
    Returns:
        one row per test file that ROCm/aiter#2723 names: the verdict with async copy
        off, then with it on under each policy; what made it pass in the end.
    """
    import pandas as pd

    rows = labelled(rows)
    table = []
    for test in problems.AITER_TESTS:
        of_test = rows[rows["model"] == test.name]
        verdicts = {}
        for policy, switch in problems.AITER_SCENARIOS:
            ruled = [
                problems.ruled_stages(policy, row.kernel, row.target, Tile.parse(row.tile))
                for row in of_test.itertuples()
            ]
            asked = (of_test["num_stages"] == ruled) & (of_test["async_copy"] == switch)
            name = f"{policy}, async copy {'on' if switch else 'off'}"
            verdicts[name] = _verdict(of_test.loc[asked, "status"])
        table.append({"test": test.name, **verdicts, "made to pass by": test.fixed_by})
    return pd.DataFrame(table)


def _verdict(status: pd.Series) -> str:
    """Say whether a test passes, from the status of each of its launches."""
    if status.empty:
        return "not compiled here"
    failed = status[status != "ok"]
    if failed.empty:
        return f"passes ({len(status)})"
    why = ", ".join("out of LDS" if name == "out_of_lds" else name for name in failed.unique())
    return f"FAILS ({len(failed)} of {len(status)} {why})"


def conclusion(rows: pd.DataFrame) -> str:
    """Sum the sweep up in Markdown sentences, computed from the rows."""
    rows = inert.frame(rows, inert.markdown)
    sentences = [*_async_copy_cost(rows), *_deepest_fits(rows), *_failures(rows)]
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _async_copy_cost(rows: pd.DataFrame) -> Iterator[str]:
    """Say by how much async copy grows LDS where it costs a tile its fit."""
    by = ["kernel", "target", "triton", "num_stages"]
    for (kernel, target, triton, stages), tiles in async_copy_difference(rows).groupby(by):
        lost = tiles[tiles["verdict"] == "no longer fits"]
        if lost.empty:
            continue
        factor = (tiles["on (bytes)"] / tiles["off (bytes)"]).median()
        worst = lost.loc[lost["on (bytes)"].idxmax()]
        yield (
            f"**{kernel} on {target}, {stages} stages** (Triton {triton}): async copy "
            f"multiplies LDS by {factor:.2f}{_median_over(len(tiles))}. No longer "
            f"fitting: {', '.join(lost['tile'])}. The largest "
            f"goes from {worst['off (bytes)']:,} to {worst['on (bytes)']:,} of "
            f"{worst['limit (bytes)']:,} bytes."
        )


def _median_over(tiles: int) -> str:
    return f" (median over {tiles} tiles)" if tiles > 1 else ""


def _deepest_fits(rows: pd.DataFrame) -> Iterator[str]:
    """Say which stage count fits which tiles, with async copy on where it was asked."""
    best = largest_stages(rows)
    switches = best.groupby(["kernel", "target"])[ASYNC_COPY].transform("nunique")
    best = best[(best[ASYNC_COPY] != "off") | (switches == 1)]
    for (kernel, target), tiles in best.groupby(["kernel", "target"]):
        listed = [
            f"{stages} for {', '.join(of_stages['tile'])}"
            for stages, of_stages in tiles.groupby("largest stage count that fits")
        ]
        yield (
            f"**{kernel} on {target}**: the largest stage count that fits every problem "
            f"is {'; '.join(listed)} (stage counts up to {tiles['asked up to'].max()} were asked)."
        )


def _failures(rows: pd.DataFrame) -> Iterator[str]:
    """Count what ended in neither a fit nor a lack of LDS."""
    failed = rows[~rows["status"].isin(["ok", "out_of_lds"])]
    for (kernel, target, status), group in failed.groupby(["kernel", "target", "status"]):
        yield f"**{kernel} on {target}**: {len(group)} rows ended in `{status}`."
