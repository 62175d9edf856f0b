"""The throughputs published for an MI355X, beside what the compiler says of their launches.

256 figures: four models, TP 1 to 8, 16 token counts; each is of both layers' GEMMs together,
useful FLOPs over the sum of their times. They are a comment of 2026-04-14 on ROCm/aiter#2723,
taken with ``TRITON_HIP_USE_ASYNC_COPY=1`` and one stage forced: by its method a single figure
each, without warm-up or flushed caches, and so without a spread. Nothing here was measured by
moelab; what is compiled are moelab's kernels at the configurations that the published rules
choose (`problems`).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from . import problems, records, tables, trade
from .specs import Configuration

if TYPE_CHECKING:
    import pandas as pd

_DATA = Path(__file__).parent / "data"
THROUGHPUTS = _DATA / "mi355x_published.csv"
# Rows of `questions`, compiled in full by benchmarks/published_launches.py.
LAUNCHES = _DATA / "mi355x_launches.parquet"

TARGET = "gfx950"
# The stages with which the table was taken.
POLICY = problems.FIRST_FIX
# Along a curve only M varies.
CURVE = ["kernel", "model", "tp"]
CELL = [*CURVE, "m"]
PUBLISHED = "published TFLOP/s"
# What a figure depends on beside its cell and layer.
_LAUNCH = [
    *("target", "block_m", "block_n", "block_k", "split_k", "group_m"),
    *("num_warps", "num_stages", "async_copy"),
]


def throughputs() -> pd.DataFrame:
    """Read the table.

    Returns:
        one row per cell: kernel, model, tp, m (tokens before top-k), tflops.
    """
    import pandas as pd

    types = {name: records.COLUMNS[name] for name in (*CELL, "tflops")}
    return pd.read_csv(THROUGHPUTS, comment="#").astype(types)[list(types)]


def questions() -> list[Configuration]:
    """List the launches of every cell: both layers, with the stages of every policy.

    Async copy is on, as the table was taken.
    """
    found = []
    for cell, layer in itertools.product(throughputs()[CELL].to_dict("records"), problems.LAYERS):
        kernel, model = cell["kernel"], cell["model"]
        problem = problems.problem(model, layer, int(cell["tp"]), int(cell["m"]))
        tile, warps = problems.ruled_tile(kernel, problem)
        ruled = (problems.ruled_stages(of, kernel, TARGET, tile) for of in problems.POLICIES)
        found += [
            Configuration(kernel, problem, tile, warps, count, True, TARGET)
            for count in sorted(set(ruled))
        ]
    return found


def launches(policy: str = POLICY) -> pd.DataFrame:
    """Read what the compiler said of both launches of every cell, as a policy has them.

    Returns:
        labelled rows of mode ``full``, two per cell, with the cell's `PUBLISHED` throughput
        whatever the policy: it was taken under `POLICY` alone.
    Raises:
        ValueError: there is no such policy.
    """
    if policy not in problems.POLICIES:
        raise ValueError(f"no policy {policy!r}; there are {', '.join(problems.POLICIES)}")
    rows = trade.under(tables.labelled(records.read(LAUNCHES)), policy)
    return rows.merge(throughputs().rename(columns={"tflops": PUBLISHED}), on=CELL)


def figures(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the launches with which the table was taken, with its `PUBLISHED` throughput.

    Both launches of a cell are there or neither, for its figure is of both.

    Args:
        rows: of any source; what has another tile, stage count or target, or async copy off,
            has no figure.
    """
    said = ["layer", *_LAUNCH]
    of_table = launches()[[*CELL, *said, PUBLISHED]]
    ours = rows[rows["peer"].isna() & (rows["status"] == "ok")]
    ours = ours.drop_duplicates([*CELL, *said], keep="last")
    found = tables.labelled(ours).merge(of_table, on=[*CELL, *said])
    return found[found.groupby(CELL)["layer"].transform("nunique") == len(problems.LAYERS)]


def configurations(rows: pd.DataFrame, deeper: pd.DataFrame) -> pd.DataFrame:
    """List the configurations that cells share.

    Args:
        rows: of `launches`.
        deeper: the same under the policy that has more stages: what those would take.
    Returns:
        one row per kernel, model, layer, tile and stage count: cells and their token counts,
        published throughput; the most LDS that any of their launches needs, of registers and
        spilled registers per thread, the fewest workgroups per compute unit; what the
        stages of ``deeper`` would take, and whether that fits.
    """
    by = ["kernel", "model", "layer", "tile", "num_warps"]
    taken = ("lds_bytes", "max")
    found = rows.groupby([*by, "num_stages"], sort=False).agg(
        **{
            "cells": ("m", "size"),
            "M from": ("m", "min"),
            "to": ("m", "max"),
            "least TFLOP/s": (PUBLISHED, "min"),
            "most TFLOP/s": (PUBLISHED, "max"),
            "LDS (bytes)": taken,
            "registers": ("registers", "max"),
            "spilled registers": ("spilled_registers", "max"),
            "workgroups per CU": ("workgroups_per_cu", "min"),
        }
    )
    more = deeper.groupby(by, sort=False).agg(
        count=("num_stages", "first"), lds=taken, limit=("lds_limit", "first")
    )
    more = more.assign(fits=(more["lds"] <= more["limit"]).map({True: "yes", False: "no"}))
    more = more.drop(columns="limit").reset_index()
    more = more.rename(columns={"count": "more stages", "lds": "would take (bytes)"})
    return tables.in_tile_order(found.reset_index().merge(more, on=by))


def conclusion(rows: pd.DataFrame, deeper: pd.DataFrame) -> str:
    """Say in Markdown what the cells take of the LDS, and what more stages would.

    Args:
        rows, deeper: as in `configurations`.
    """
    fits = deeper.groupby(CELL)["status"].agg(lambda status: (status == "ok").all())
    alike = rows.groupby(CELL)["tile"].nunique() == 1
    by_lds = rows.groupby(CELL)["lds_bytes"].max().value_counts().sort_index()
    taken = ", ".join(f"{count} take {lds:,} bytes" for lds, count in by_lds.items())
    sentences = [
        f"Of the {len(alike)} published cells {taken} of {rows['lds_limit'].max():,}, by the "
        f"larger of their two launches; in {alike.sum()} both layers have the same tile.",
        f"With {deeper['num_stages'].max()} stages {fits.sum()} of them would fit in both "
        "layers, as this project's kernels compile.",
    ]
    return "\n".join(f"- {sentence}" for sentence in sentences)
