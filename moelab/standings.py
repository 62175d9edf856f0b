"""How our kernels stand against their peers, read from measured rows.

A cell is one problem of one kernel and one way to sum: sums that are left to the tensor cores
are never set against sums in fp32, but where fp32 sums are the quicker of a peer's two. Ours
always gather, pad and scatter as they go; a peer counts twice: with all of that, which is what
a user waits for, and its matmul alone.

Frames in, frames and sentences out; no compiler, no GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from . import inert, measurements, records, tables

if TYPE_CHECKING:
    import pandas as pd

# Measured by benchmarks/peers.py; what made each row is in its column `made_by`.
SHIPPED = Path(__file__).parent / "data" / "h200_peers.parquet"
# Why ours lose where they do, found by hand.
REASONS = SHIPPED.with_name("h200_peers_reasons.csv")

CELL = ["kernel", "fast_accum", "model", "layer", "tp", "m"]
# Along which only M varies.
CURVE = CELL[:-1]

OURS, CONFIGURATION, PEERS = "ours", "configuration", "peers: all inside / matmul alone"
ALL_INSIDE, ALONE = "over the best peer", "over the best matmul alone"
LOW, HIGH, BEST = "at least", "at most", "best peer"
OF_ROOF, REASON = "of the roof", "why it is slower"


def measured(path: Path | str = "") -> pd.DataFrame:
    """Read measured rows of ours and of peers; those that are shipped where no path is given.

    Raises:
        FileNotFoundError, ValueError: as `records.read`.
        ValueError: no peer was measured there.
    """
    rows = records.read(path or SHIPPED)
    rows = rows[rows["mode"] == "measured"]
    with_peers = rows[rows["peer"].notna()]
    if with_peers.empty:
        raise ValueError(f"{path}: no peer was measured; see `moelab measure --peers`")
    # Of each cell the last run with peers: only what took turns is compared.
    last = with_peers.groupby(CELL, dropna=False)["run"].last().rename("last run")
    kept = rows.join(last, on=CELL)["last run"] == rows["run"]
    return tables.labelled(rows[kept.fillna(False)])


def launches(rows: pd.DataFrame) -> pd.DataFrame:
    """Name whose each timed launch is, and what it includes.

    Args:
        rows: of `measured`.
    Returns:
        the timed rows, with ``whose`` (`OURS` or the peer), ``alone`` (it is a peer's matmul
        without what y takes besides) and ``noisy``.
    """
    timed = rows.assign(noisy=measurements.noisy(rows)).dropna(subset=["tflops"])
    is_peer = timed["peer"].notna()
    return timed.assign(whose=timed["peer"].fillna(OURS), alone=is_peer & (timed["includes"] == ""))


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the fastest launch of each: of ours in each cell, and of each peer both ways.

    Args:
        rows: of `measured`.
    """
    timed = launches(rows)
    best = timed.groupby([*CELL, "whose", "alone"], sort=False)["tflops"].idxmax()
    return timed.loc[best]


def cells(rows: pd.DataFrame, reasons: Path | None = None) -> pd.DataFrame:
    """Set ours beside the peers, cell by cell.

    Args:
        rows: of `measured`.
        reasons: a CSV as `because` reads it, found by hand for these rows.
    Returns:
        a row per cell in which ours were timed: TFLOP/s of our fastest and what configuration
        that is; what each peer reaches, with all inside / its matmul alone; how many times as
        fast ours is as the best of them, with all inside and its 95% interval, and alone; the
        share of the measured roof; and why ours is slower than either, where it is and that
        was found.
    """
    import pandas as pd

    found = []
    for names, of_cell in fastest(rows).groupby(CELL, sort=False):
        ours = of_cell[of_cell["whose"] == OURS]
        if ours.empty:
            continue
        ours, peers = ours.iloc[0], of_cell[of_cell["whose"] != OURS]
        inside, alone = (
            peers[peers["alone"] == is_alone].sort_values("tflops", ascending=False)
            for is_alone in (False, True)
        )
        low = high = math.nan
        if len(inside):
            _, low, high = measurements.faster(inside.iloc[0], ours)
        found.append(
            dict(zip(CELL, names, strict=True))
            | {OURS: ours["tflops"], CONFIGURATION: _configuration(ours)}
            | {PEERS: _reached(inside, alone), BEST: next(iter(inside["whose"]), None)}
            | {ALL_INSIDE: _over(ours, inside), ALONE: _over(ours, alone)}
            | {LOW: low, HIGH: high}
            | {OF_ROOF: ours["tflops"] / ours["roof_tflops"]}
        )
    columns = [*CELL, OURS, CONFIGURATION, PEERS, BEST, ALL_INSIDE, LOW, HIGH, ALONE, OF_ROOF]
    table = pd.DataFrame(found, columns=columns)
    return table.assign(**{REASON: because(table, reasons).where(_lost(table), None)})


def _lost(table: pd.DataFrame) -> pd.Series:
    """Mark the cells where a peer is faster, with all inside or its matmul alone."""
    return (table[[ALL_INSIDE, ALONE]] < 1).any(axis=1)


def _over(ours: pd.Series, peers: pd.DataFrame) -> float:
    return ours["tflops"] / peers["tflops"].iloc[0] if len(peers) else math.nan


def _configuration(row: pd.Series) -> str:
    layout = "" if row["scale_layout"] == "rows" else f", {row['scale_layout']} weights"
    return f"{row['tile']}, {row['num_warps']} warps, {row['num_stages']} stages{layout}"


def _reached(inside: pd.DataFrame, alone: pd.DataFrame) -> str:
    """Spell out what each peer reaches both ways: ``torch 625 / 647``."""
    both = [dict(zip(each["whose"], each["tflops"], strict=True)) for each in (inside, alone)]
    spelled = []
    for name in dict.fromkeys([*both[0], *both[1]]):
        figures = (_spelled(each.get(name, math.nan), ".0f") for each in both)
        spelled.append(f"{name} {' / '.join(figures)}")
    return ", ".join(spelled)


def _spelled(figure: float, how: str) -> str:
    return "-" if math.isnan(figure) else format(figure, how)


def reasons_for(rows_path: str, reasons_path: str) -> Path | None:
    """Choose the reasons that belong to rows: those given, or the shipped rows' own."""
    if reasons_path:
        return Path(reasons_path)
    return None if rows_path else REASONS


def because(table: pd.DataFrame, reasons: Path | None) -> pd.Series:
    """Look up the reason of each cell.

    Args:
        table: with the columns of `CELL`.
        reasons: a CSV of them and ``reason``; what a line leaves empty holds for all. Of
            lines that fit, the last counts. None knows no reason.
    Raises:
        FileNotFoundError: there is no such file.
    """
    import pandas as pd

    lines = []
    if reasons:
        lines = pd.read_csv(records.require_readable(reasons), dtype="string").to_dict("records")
    found = []
    for cell in table[CELL].astype("string").to_dict("records"):
        fits = [
            line["reason"]
            for line in lines
            if all(pd.isna(line[name]) or line[name] == cell[name] for name in CELL)
        ]
        found.append(fits[-1] if fits else None)
    return pd.Series(found, table.index, dtype=object)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Choose and round the columns of `cells` that people read; `losses` tells the reasons."""
    rounded = table.round({OURS: 0, ALL_INSIDE: 2, ALONE: 2, OF_ROOF: 2}).astype({OURS: int})
    rounded.insert(rounded.columns.get_loc(LOW), "95% interval", _spans(table[LOW], table[HIGH]))
    return rounded.drop(columns=[BEST, LOW, HIGH, REASON]).rename(columns={OURS: "ours (TFLOP/s)"})


def _spans(low: pd.Series, high: pd.Series) -> list[str | None]:
    """Spell out ranges of ratios: ``1.10 to 1.49``; None where there is none."""
    return [
        None if math.isnan(least) else f"{least:.2f} to {most:.2f}"
        for least, most in zip(low, high, strict=True)
    ]


def losses(table: pd.DataFrame) -> str:
    """List in Markdown the cells where a peer is faster, and why, where that was found.

    Args:
        table: of `cells`.
    """
    lost = inert.frame(table[_lost(table)], inert.markdown, inert.LONG)
    told = lost.assign(**{REASON: lost[REASON].fillna("no reason was found yet")})
    sentences = []
    by = ["kernel", "fast_accum", "model", "tp", REASON]
    for (kernel, fast, model, tp, reason), group in told.groupby(by, sort=False):
        each = ", ".join(
            f"layer {row['layer']} M {row['m']}: {_spelled(row[ALL_INSIDE], '.2f')} / "
            f"{_spelled(row[ALONE], '.2f')}"
            for row in group.to_dict("records")
        )
        shards = f", TP {tp}" if tp > 1 else ""
        named = f"**{kernel}, {tables.SUMS[fast]}, {model}{shards}**"
        sentences.append(f"- {named} ({each}): {reason}.")
    return "\n".join(sentences) or "- A peer is faster in no cell."


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Take geometric means of the ratios, per kernel, way to sum, model and layer.

    Args:
        table: of `cells`.
    Returns:
        also in how many cells ours are faster, with all inside, and from which ratio to which.
    """
    import pandas as pd

    by = ["kernel", "fast_accum", "model", "layer"]
    found = []
    for names, group in table.groupby(by, sort=False):
        inside = group[ALL_INSIDE].dropna()
        (span,) = _spans(pd.Series([inside.min()]), pd.Series([inside.max()]))
        faster = f"{(inside > 1).sum()} of {len(inside)}"
        figures = [round(_mean(each), 2) for each in (inside, group[ALONE], group[OF_ROOF])]
        found.append([*names, faster, figures[0], span, *figures[1:]])
    return pd.DataFrame(found, columns=[*by, "faster in", ALL_INSIDE, "range", ALONE, OF_ROOF])


def _mean(ratios: pd.Series) -> float:
    """Take the geometric mean of what is there; NaN of nothing."""
    import numpy as np

    return float(np.exp(np.log(ratios.astype(float)).mean()))


def left_out(rows: pd.DataFrame) -> pd.DataFrame:
    """List the peers' launches that were not timed, and why.

    Args:
        rows: of `measured`.
    """
    failed = rows[rows["peer"].notna() & rows["time_us"].isna()]
    return failed[[*CELL, "peer", "includes", "status", "reason"]].reset_index(drop=True)


def versions(rows: pd.DataFrame) -> pd.DataFrame:
    """Name the package of each peer and its version.

    Args:
        rows: of `measured`.
    """
    import pandas as pd

    found = rows.loc[rows["peer"].notna() & rows["made_by"].notna(), ["peer", "made_by"]]
    ours = set().union(*map(json.loads, rows.loc[rows["peer"].isna(), "made_by"].dropna()))
    told = []
    for peer, made_by in found.itertuples(index=False):
        said = json.loads(made_by)
        own = {name: value for name, value in said.items() if name not in ours}
        own = own or {"torch": said.get("torch")}
        told.append((peer, ", ".join(f"{name} {value}" for name, value in own.items())))
    return pd.DataFrame(list(dict.fromkeys(told)), columns=["peer", "package"])


def _unmeasured(table: pd.DataFrame) -> list[str]:
    """Name the curves that lack token counts which others have, and which."""
    every = {*table["m"]}
    found = []
    for (kernel, fast, model, layer, _), group in table.groupby(CURVE, sort=False):
        if lacks := sorted(every - {*group["m"]}):
            counts = " and ".join(map(str, lacks))
            found.append(f"{kernel}, {tables.SUMS[fast]}, {model}, layer {layer}, M {counts}")
    return found


def conclusion(rows: pd.DataFrame, table: pd.DataFrame) -> str:
    """Answer in Markdown sentences, computed from the rows.

    Args:
        rows: of `measured`.
        table: of `cells`, of these rows.
    """
    if table.empty:
        return "- Ours were timed beside a peer in no cell."
    rows, table = (inert.frame(of, inert.markdown) for of in (rows, table))
    timed = rows.dropna(subset=["time_us"])
    ratios = table[ALL_INSIDE].dropna()
    alone = table[ALONE].dropna()
    sentences = [
        f"Peers that were timed: {', '.join(timed['peer'].dropna().unique()) or 'none'}.",
        f"With all inside, ours are faster than the best peer in {(ratios > 1).sum()} of "
        f"{len(ratios)} cells, {_mean(ratios):.2f} times as fast in the geometric mean; against "
        f"the best matmul alone in {(alone > 1).sum()} of {len(alone)}, {_mean(alone):.2f} times.",
        f"With all inside, they are surely faster in {(table[LOW] > 1).sum()} and surely slower "
        f"in {(table[HIGH] < 1).sum()}: the 95% interval of the ratio lies on one side of 1.",
    ]
    for (kernel, fast), group in table.groupby(["kernel", "fast_accum"], sort=False):
        inside = group[ALL_INSIDE].dropna()
        told = f"**{kernel}, {tables.SUMS[fast]}**: "
        if inside.empty:
            sentences.append(told + "no peer was timed.")
            continue
        worst = group.loc[inside.idxmin()]
        sentences.append(
            f"{told}faster in {(inside > 1).sum()} of {len(inside)} cells, "
            f"{_mean(inside):.2f} times as fast in the mean, from {inside.min():.2f} "
            f"({worst['model']}, layer {worst['layer']}, M {worst['m']}, against {worst[BEST]}) "
            f"to {inside.max():.2f}; {100 * _mean(group[OF_ROOF]):.0f}% of the roof."
        )
    if lacks := _unmeasured(table):
        sentences.append(f"Not measured: {'; '.join(lacks)}.")
    held = timed["throttled"].fillna("")
    if (held != "").any():
        why = ", ".join(sorted({each for of in held for each in of.split(",") if each}))
        sentences.append(
            f"The GPU held its clocks down ({why}) during {(held != '').sum()} of {len(timed)} "
            f"times; {measurements.noisy(timed).sum()} are noisy: a second measurement may miss "
            f"them by {measurements.AGREEMENT:.0%} or more."
        )
    unexplained = (_lost(table) & table[REASON].isna()).sum()
    if unexplained:
        sentences.append(f"Of {unexplained} cells where a peer is faster, no reason was found yet.")
    return "\n".join(f"- {sentence}" for sentence in sentences)
