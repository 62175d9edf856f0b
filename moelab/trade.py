"""What a pipeline's depth brings and what it costs: measured throughput against LDS.

Frames in, frames out; no compiler, no GPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import records, tables

if TYPE_CHECKING:
    import pandas as pd

# Measured by benchmarks/stage_sweep.py; what made each row is in its column `made_by`.
SHIPPED = Path(__file__).parent / "data" / "h200_stage_sweep.parquet"

_PROBLEM = ["kernel", "model", "layer", "tp", "m"]
TILING = [*_PROBLEM, "tile", "num_warps"]

LOSS, LOSS_LOW, LOSS_HIGH = "one stage loses (%)", "at least (%)", "at most (%)"


def measured(path: Path | str = "") -> pd.DataFrame:
    """Read measured rows, labelled; those that are shipped where no path is given.

    Raises:
        FileNotFoundError, ValueError: as `records.read`.
        ValueError: no row there was measured.
    """
    rows = records.read(path or SHIPPED)
    rows = rows[rows["mode"] == "measured"]
    if rows.empty:
        raise ValueError(f"{path}: no row was measured; see `moelab measure`")
    return tables.labelled(rows)


def stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Set a tile's stage counts beside each other, problem by problem.

    Returns:
        one row per problem and tile: TFLOP/s at each stage count, missing where it doesn't
        fit; ``best`` stage count; what one stage loses against it, with a 95% interval.
    """
    import pandas as pd

    timed = rows.dropna(subset=["time_us"])
    table = timed.pivot_table(index=TILING, columns="num_stages", values="tflops")
    found = []
    for names, of_tile in timed.groupby(TILING, sort=False):
        best = of_tile.loc[of_tile["time_us"].idxmin()]
        one = of_tile[of_tile["num_stages"] == 1]
        if one.empty:
            continue
        # Both intervals are of logarithms, and independent.
        halves = [_half(row) for row in (best, one.iloc[0])]
        middle = math.log(best["time_us"] / one.iloc[0]["time_us"])
        margin = 0.0 if best["num_stages"] == 1 else math.hypot(*halves)
        lost = [100 * (1 - math.exp(middle + by)) for by in (0, margin, -margin)]
        found.append((*names, best["num_stages"], *lost))
    lost_ = pd.DataFrame(found, columns=[*TILING, "best", LOSS, LOSS_LOW, LOSS_HIGH])
    table.columns = [f"{count} stage{'s' if count > 1 else ''}" for count in table.columns]
    return table.reset_index().merge(lost_, on=TILING)


def _half(row: Any) -> float:
    return math.log(row["time_high_us"] / row["time_low_us"]) / 2


def losses(compared: pd.DataFrame) -> pd.DataFrame:
    """Sum up what one stage everywhere loses, per kernel, model, layer and TP.

    Args:
        compared: of `stages`.
    Returns:
        the median, least and most over the token counts, in percent of throughput.
    """
    by = ["kernel", "model", "layer", "tp"]
    grouped = compared.groupby(by, sort=False)[LOSS]
    table = grouped.agg(median="median", least="min", most="max", problems="size")
    return table.rename(columns={n: f"{n} (%)" for n in ("median", "least", "most")}).reset_index()


def conclusion(rows: pd.DataFrame, compared: pd.DataFrame) -> str:
    """Sum the trade up in Markdown sentences, computed from the rows."""
    sentences = []
    launched = rows.dropna(subset=["loaded_lds_bytes"])
    equal = (launched["loaded_lds_bytes"] == launched["lds_bytes"]).sum()
    refused = (rows["status"] == "out_of_lds").sum()
    sentences.append(
        f"{', '.join(rows['gpu'].dropna().unique())}: {len(launched)} configurations were "
        f"launched and {equal} loaded the LDS that was told; {refused} were told not to fit and "
        "not launched."
    )
    for (kernel, model), of_model in compared.groupby(["kernel", "model"], sort=False):
        loss = of_model[LOSS]
        best = ", ".join(map(str, sorted(of_model["best"].unique())))
        sentences.append(
            f"**{kernel}, {model}**: one stage loses {loss.median():.1f}% of throughput in the "
            f"median of {len(loss)} problems, {loss.max():.1f}% at most; best are {best} stages."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)
