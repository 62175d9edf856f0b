"""What measured rows say: the times, whether to believe them, and what was not timed.

Frames in, frames and sentences out; no compiler, no GPU.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from . import inert, records, tables

if TYPE_CHECKING:
    import pandas as pd

# Two measurements of the same build must agree within this share of the time.
AGREEMENT = 0.02

# What the FLOPs of two layers that follow each other depend on.
_LAYERS = ["model", "tp", "m"]
_PROBLEM = ["kernel", *_LAYERS, "layer", "fast_accum", "x_format", "scale_layout"]

DIFFERENCE = "difference (%)"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Tell each time with its interval, TFLOP/s, and the share of the roof.

    Args:
        rows: of `bench.measure`.
    Returns:
        a row for each, those of peers after ours of the same problem; both layers together
        where they were timed so, what held the clocks down, and which times are `noisy`, where
        there are any.
    """
    # Of equal keys the first comes first.
    of_problem = rows.groupby(_PROBLEM, sort=False, dropna=False).ngroup()
    rows = rows.loc[of_problem.sort_values(kind="stable").index]
    labelled = tables.labelled(rows)
    problem = [name for name in ("model", "layer", "tp", "m") if rows[name].nunique() > 1]
    half = (rows["time_high_us"] - rows["time_low_us"]) / 2 / rows["time_us"] * 100
    by = ["peer", "includes", "tile", "num_warps", "num_stages"]
    told = labelled[["kernel", *problem, *by, "lds_bytes", "status"]]
    figures = {
        "time (us)": rows["time_us"].round(1),
        "+- (%)": half.round(2),
        "TFLOP/s": rows["tflops"].round(1),
        "of the roof": (rows["tflops"] / rows["roof_tflops"]).round(3),
        "both layers (us)": rows["both_layers_us"].round(1),
        "TFLOP/s of both": both_layers_tflops(rows).round(1),
        "spills": rows["spilled_registers"],
        "throttled by": rows["throttled"].replace("", None),
        "noisy": noisy(rows).map({True: "noisy", False: None}),
    }
    return told.assign(**figures).dropna(axis="columns", how="all")


def both_layers_tflops(rows: pd.DataFrame) -> pd.Series:
    """Divide the FLOPs of both layers by the time of both.

    Args:
        rows: of `bench.measure`, of both layers where both were timed.
    Returns:
        TFLOP/s for each row; missing where its ``both_layers_us`` or the other layer is.
    """
    layers = rows.assign(flops=2 * rows["m"] * rows["top_k"] * rows["n"] * rows["k"])
    layers = layers[[*_LAYERS, "layer", "flops"]].drop_duplicates()
    of_both = layers.groupby(_LAYERS)["flops"].agg(["sum", "size"])
    flops = rows[_LAYERS].join(of_both[of_both["size"] == 2], on=_LAYERS)["sum"]
    return flops / rows["both_layers_us"] / 1e6


def noisy(rows: pd.DataFrame) -> pd.Series:
    """Mark times that a second measurement may miss by 2% or more.

    Rounds are independent, so two measurements differ by the root of two of what one is off
    by: a time is noisy where that times half its 95% interval reaches 2%. What changes from
    process to process is not in the rounds; `benchmarks/same_build.py` shows it.

    Args:
        rows: of `bench.measure`.
    Returns:
        True or False for each row; what was not timed is not noisy.
    """
    import numpy as np

    half = np.log((rows["time_high_us"] / rows["time_low_us"]).astype("Float64")) / 2
    return (half * math.sqrt(2) >= math.log1p(AGREEMENT)).fillna(False).astype(bool)


def faster(before: Any, after: Any) -> tuple[float, float, float]:
    """Say how many times faster a row is than another, and the 95% interval of that.

    Args:
        before, after: of `bench.measure`; both were timed.
    Returns:
        the ratio of the times, and its interval's two ends.
    """
    middle = math.log(before["time_us"] / after["time_us"])
    # Both intervals are of logarithms, and independent.
    halves = (math.log(row["time_high_us"] / row["time_low_us"]) / 2 for row in (before, after))
    margin = math.hypot(*halves)
    return math.exp(middle), math.exp(middle - margin), math.exp(middle + margin)


def tally(rows: pd.DataFrame) -> str:
    """Count what was asked, launched and left out; say what takes from the times' worth.

    Args:
        rows: of `bench.measure`.
    Returns:
        a sentence a line.
    """
    rows = inert.frame(rows)
    ours, timed = rows[rows["peer"].isna()], rows.dropna(subset=["time_us"])
    loaded = ours.dropna(subset=["loaded_lds_bytes"])
    launched = ours["loaded_lds_bytes"].notna() | (ours["status"] == "launch_error")
    fits = (ours["lds_bytes"] <= ours["lds_limit"]) & (ours["status"] != "out_of_tmem")
    refused = ours["reason"].str.startswith("OutOfResources").fillna(False)
    equal = (loaded["loaded_lds_bytes"] == loaded["lds_bytes"]).sum()
    others = ours.loc[ours["time_us"].isna(), "status"].value_counts()
    not_timed = ", ".join(f"{count} {status}" for status, count in others.items())
    lines = [
        f"{len(ours)} configurations asked, {launched.sum()} launched, "
        f"{ours['time_us'].notna().sum()} timed; not timed: {not_timed or 'none'}",
        f"LDS told = loaded in {equal} of {len(loaded)}; OutOfResources {refused.sum()}; "
        f"told to fit and left out {(fits.fillna(False) & ~launched).sum()}",
    ]
    of_peers = rows[rows["peer"].notna()]
    left_out = of_peers[of_peers["time_us"].isna()]
    if len(left_out):
        why = ", ".join(sorted(set(left_out["peer"] + " " + left_out["status"])))
        lines.append(f"{len(of_peers) - len(left_out)} launches of peers timed; not timed: {why}")
    held = timed[timed["throttled"].fillna("") != ""]
    if len(held):
        why = ", ".join(sorted({each for of in held["throttled"] for each in of.split(",")}))
        lines.append(
            f"THROTTLED: the GPU held its clocks down ({why}) during {len(held)} of "
            f"{len(timed)} times"
        )
    if unknown := timed["throttled"].isna().sum():
        lines.append(
            f"whether the GPU was throttled is not known of {unknown} times: install nvidia-ml-py, "
            "or amdsmi"
        )
    if count := noisy(rows).sum():
        lines.append(
            f"NOISY: {count} of {len(timed)} times may differ by {AGREEMENT:.0%} or more when "
            "measured again; give more --rounds"
        )
    return "\n".join(lines)


def made_by(rows: pd.DataFrame) -> str:
    """Name in Markdown what measured rows were made with: all that differs, from when to when.

    Args:
        rows: of `bench.measure`.
    """
    said = [json.loads(each) for each in rows["made_by"].dropna().unique()]
    told = []
    for name in dict.fromkeys(name for each in said for name in each):
        values = sorted({str(each[name]) for each in said if name in each})
        if name == "date":
            values = [" to ".join(dict.fromkeys([values[0], values[-1]]))]
        told.append(f"{inert.markdown(name)} {', '.join(map(inert.markdown, values))}")
    return "Measured with " + "; ".join(told)


def compare(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Set two measurements of the same grid side by side.

    Args:
        first, second: rows of two runs of `bench.measure` on one kind of GPU.
    Returns:
        a row for each cell that both timed, the largest difference first: its times, by how
        much the second differs, and whether either is `noisy`.
    """
    import pandas as pd

    cell = [name for name in records.KEY if name not in ("run", "compile_key")]
    sides = [rows.assign(noisy=noisy(rows)).dropna(subset=["time_us"]) for rows in (first, second)]
    both = tables.labelled(pd.merge(*sides, on=cell, suffixes=("", " again"), validate="1:1"))
    shown = ["kernel", "model", "layer", "tp", "m", "tile", "num_warps", "num_stages"]
    compared = both[shown].assign(
        **{
            "time (us)": both["time_us"],
            "again (us)": both["time_us again"],
            DIFFERENCE: 100 * (both["time_us again"] / both["time_us"] - 1),
            "noisy": both["noisy"] | both["noisy again"],
        }
    )
    return compared.sort_values(DIFFERENCE, key=abs, ascending=False, ignore_index=True)


def agreement(compared: pd.DataFrame) -> str:
    """Say how far two measurements agree, computed from the cells.

    Args:
        compared: of `compare`.
    """
    if compared.empty:
        return "no cell was timed in both"
    difference, marked = compared[DIFFERENCE].abs(), compared["noisy"]
    apart = difference >= 100 * AGREEMENT
    return (
        f"{len(compared)} cells were timed twice. They differ by {difference.median():.2f}% in the "
        f"median and by {difference.max():.2f}% at most; {apart.sum()} by {AGREEMENT:.0%} or more, "
        f"of which {(apart & marked).sum()} were marked noisy; {(~apart & marked).sum()} were "
        "marked and agree"
    )
