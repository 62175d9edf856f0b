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

from . import measurements, records, tables

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
BEST, ROOF, OF_ROOF = "best peer", "roof", "of the roof"
NOISY, REASON = "noisy", "why it is slower"


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
        fast ours is as the best of them, both ways; the measured roof and the share of it;
        whether a time that decides is noisy; and why ours is slower, where it is and that was
        found.
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
        deciding = [ours["noisy"], *inside["noisy"][:1]]
        found.append(
            dict(zip(CELL, names, strict=True))
            | {OURS: ours["tflops"], CONFIGURATION: _configuration(ours)}
            | {PEERS: _reached(inside, alone), BEST: next(iter(inside["whose"]), None)}
            | {ALL_INSIDE: _over(ours, inside), ALONE: _over(ours, alone)}
            | {ROOF: ours["roof_tflops"], OF_ROOF: ours["tflops"] / ours["roof_tflops"]}
            | {NOISY: NOISY if any(deciding) else None}
        )
    columns = [*CELL, OURS, CONFIGURATION, PEERS, BEST, ALL_INSIDE, ALONE, ROOF, OF_ROOF, NOISY]
    table = pd.DataFrame(found, columns=columns)
    return table.assign(**{REASON: because(table, reasons).where(table[ALL_INSIDE] < 1, None)})


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
        figures = (f"{each[name]:.0f}" if name in each else "-" for each in both)
        spelled.append(f"{name} {' / '.join(figures)}")
    return ", ".join(spelled)


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

    lines = pd.read_csv(reasons, dtype="string").to_dict("records") if reasons else []
    found = []
    for cell in table[CELL].astype("string").to_dict("records"):
        fits = [
            line["reason"]
            for line in lines
            if all(pd.isna(line[name]) or line[name] == cell[name] for name in CELL)
        ]
        found.append(fits[-1] if fits else None)
    return pd.Series(found, table.index, dtype=object)


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round the figures of `cells` for a reader."""
    return table.round({OURS: 0, ROOF: 0, ALL_INSIDE: 2, ALONE: 2, OF_ROOF: 2})


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Take geometric means of the ratios, per kernel, way to sum, model and layer.

    Args:
        table: of `cells`.
    Returns:
        also in how many cells ours are faster, with all inside, and the least and the largest
        ratio.
    """
    import pandas as pd

    by = ["kernel", "fast_accum", "model", "layer"]
    found = []
    for names, group in table.groupby(by, sort=False):
        inside = group[ALL_INSIDE].dropna()
        over = [len(inside), (inside > 1).sum(), _mean(inside), inside.min(), inside.max()]
        found.append([*names, *over, _mean(group[ALONE].dropna()), _mean(group[OF_ROOF])])
    figures = ["cells", "faster in", ALL_INSIDE, "least", "most", ALONE, OF_ROOF]
    return pd.DataFrame(found, columns=[*by, *figures])


def _mean(ratios: pd.Series) -> float:
    """Take the geometric mean; NaN of nothing."""
    import numpy as np

    return float(np.exp(np.log(ratios.astype(float)).mean())) if len(ratios) else math.nan


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


def conclusion(table: pd.DataFrame) -> str:
    """Answer in Markdown sentences, computed from the cells.

    Args:
        table: of `cells`.
    """
    if table.empty:
        return "- Ours were timed beside a peer in no cell."
    ratios = table[ALL_INSIDE].dropna()
    alone = table[ALONE].dropna()
    sentences = [
        f"With all inside, ours are faster than the best peer in {(ratios > 1).sum()} of "
        f"{len(ratios)} cells, {_mean(ratios):.2f} times as fast in the geometric mean; against "
        f"the best matmul alone in {(alone > 1).sum()} of {len(alone)}, {_mean(alone):.2f} times."
    ]
    for (kernel, fast), group in table.groupby(["kernel", "fast_accum"], sort=False):
        inside = group[ALL_INSIDE].dropna()
        sums = "sums left to the tensor cores" if fast else "sums in fp32"
        told = f"**{kernel}, {sums}**: "
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
    if noisy := table[NOISY].notna().sum():
        sentences.append(f"{noisy} of {len(table)} cells rest on a noisy time.")
    unexplained = ((table[ALL_INSIDE] < 1) & table[REASON].isna()).sum()
    if unexplained:
        sentences.append(f"Of {unexplained} cells that ours lose, no reason was found yet.")
    return "\n".join(f"- {sentence}" for sentence in sentences)
