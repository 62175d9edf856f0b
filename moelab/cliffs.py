"""Where throughput falls although there is more to do, and what of it a model explains.

The model counts the work that a launch pays for beyond what is useful:

- **tiles** are paid whole. An expert's rows fill row tiles of block_m but for the last; under
  uniform routing an expert has binomial(m, top_k / experts) rows, which gives the expected
  number of row tiles exactly. n and k are rounded up to whole blocks.
- **waves** are paid whole. Programs spread over the compute units, and the busiest one sets
  the time: it runs ceil(programs / units) of them, in expectation over the row tiles.

`Tile.tails`, which halve an expert's last tile, are not in the model: it counts whole.

Between two token counts of a curve, tiles alone and tiles with waves each give a change of
throughput. What lies between the two is explained; what lies outside is left. Neither knows
of memory, which bounds small M and lets throughput rise by more; nor of what another tile
does to the code. It is therefore falls that are looked at. Where a cell is a single figure,
a flag says "look here" and has no confidence; that neighbouring curves fall at the same M is
what there is for evidence.

Frames in, frames out; no compiler, no GPU.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from . import inert, tables, targets

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# A fall is flagged beyond the larger of this and so many spreads of the curve's own steps.
MARGIN, SPREADS = 0.05, 3

CHANGE, TILES, WAVES, LEFT = "change (%)", "tiles (%)", "tiles and waves (%)", "left (%)"
LOOK, ALSO = "look here", "also falls at TP"
QUICKER, SAVED = "quicker by the table", "saved (%)"


@functools.lru_cache(maxsize=1024)
def row_tiles(m: int, experts: int, top_k: int, block_m: int) -> tuple[float, ...]:
    """Give the probability of each number of row tiles under uniform routing.

    Its mean is exact. The rest takes experts' rows as independent, while in truth they sum
    to ``m * top_k``.

    >>> row_tiles(m=1, experts=2, top_k=1, block_m=16)[1]
    0.5
    """
    import numpy as np
    from scipy import fft, stats

    rows = np.arange(m + 1)
    of_expert = np.bincount(-(-rows // block_m), weights=stats.binom.pmf(rows, m, top_k / experts))
    # The sum over experts: as many convolutions are one power of the transform.
    length = experts * (len(of_expert) - 1) + 1
    size = fft.next_fast_len(length, real=True)
    of_all = fft.irfft(fft.rfft(of_expert, size) ** experts, size)[:length]
    return tuple(of_all.clip(0).tolist())


def paid(rows: pd.DataFrame) -> pd.DataFrame:
    """Count the work that launches do and pay for.

    Args:
        rows: of MoE GEMMs, as `records` has them.
    Returns:
        the rows with ``useful_flops``; ``row_tiles`` and ``waves``, both expected;
        ``tiled_flops`` of all tiles whole, ``paid_flops`` of all waves whole.
    Raises:
        ValueError: of a row's target the number of compute units is unknown.
    """
    found = [_paid(row) for row in rows.to_dict("records")]
    columns = ["useful_flops", "row_tiles", "waves", "tiled_flops", "paid_flops"]
    return rows.assign(**dict(zip(columns, zip(*found, strict=True), strict=True)))


def _paid(row: dict[str, Any]) -> tuple[float, ...]:
    import numpy as np

    target = targets.get(row["target"])
    if target.compute_units is None:
        raise ValueError(f"{target.name}: no number of compute units is known, so no waves")
    m, experts, top_k, n, k, block_m, block_n, block_k, split_k = (
        int(row[name])
        for name in (
            *("m", "experts", "top_k", "n", "k"),
            *("block_m", "block_n", "block_k", "split_k"),
        )
    )
    chances: np.ndarray = np.array(row_tiles(m, experts, top_k, block_m))
    counts = np.arange(len(chances))
    # Programs of a row tile, and what each does.
    across = -(-n // block_n) * split_k
    of_program = 2.0 * block_m * block_n * block_k * math.ceil(k / split_k / block_k)
    tiles = float(chances @ counts)
    waves = float(chances @ np.ceil(counts * across / target.compute_units))
    return (
        2.0 * m * top_k * n * k,
        tiles,
        waves,
        tiles * across * of_program,
        waves * target.compute_units * of_program,
    )


def cells(rows: pd.DataFrame, tflops: str, curve: list[str]) -> pd.DataFrame:
    """Put the launches of each cell together.

    Args:
        rows: labelled; those of a cell agree in ``curve`` and ``m``, and have its throughput.
        tflops: the column that has it.
        curve: columns along which only m varies.
    Returns:
        one row per cell: ``tflops``, and ``time_us`` of its useful FLOPs; the shares of the
        paid work that are useful, ``filled`` of tiles alone and ``busy`` with waves; tiles,
        stages, LDS and spilled registers of its launches, these as the most of any.
    """
    by = [*curve, "m"]
    of_cell = paid(rows).assign(asked=_asked(rows)).groupby(by, sort=False)
    sums = of_cell[["useful_flops", "tiled_flops", "paid_flops"]].sum()
    first = of_cell[tflops].first().astype(float)
    table = sums.assign(
        tflops=first,
        time_us=sums["useful_flops"] / (first * 1e6),
        filled=sums["useful_flops"] / sums["tiled_flops"],
        busy=sums["useful_flops"] / sums["paid_flops"],
        configuration=of_cell["asked"].agg(lambda asked: ", ".join(dict.fromkeys(asked))),
        lds_bytes=of_cell["lds_bytes"].max(),
        spilled_registers=of_cell["spilled_registers"].max(),
    )
    return table.drop(columns=list(sums)).reset_index().sort_values(by, ignore_index=True)


def _asked(rows: pd.DataFrame) -> pd.Series:
    warps, counts = (rows[name].astype("string") for name in ("num_warps", "num_stages"))
    stages = (" stage" + (rows["num_stages"] > 1).map({True: "s", False: ""})).astype("string")
    return rows["tile"] + ", " + warps + " warps, " + counts + stages


def steps(of_cells: pd.DataFrame, curve: list[str]) -> pd.DataFrame:
    """Set each cell against the one before it, and what the model makes of the change.

    Args:
        of_cells: of `cells`.
        curve: as there. Curves that differ in ``tp`` alone are neighbours.
    Returns:
        the cells with what they were before, with ``(was)`` behind the name; `CHANGE` of
        throughput; what `TILES` and `WAVES` make of it; what is `LEFT`; ``spread`` of that
        over the other steps of the curve that keep the configuration, in percent; `LOOK`: the
        throughput falls, and by more than the model and the curve's spread explain; `ALSO`:
        the TP at which the figure falls by more than the model explains, at the same m.
    """
    import pandas as pd

    found = []
    for _, cells_ in of_cells.groupby(curve, sort=False):
        table = cells_.sort_values("m")
        was = table.shift()
        kept = ["m", "tflops", "configuration", "spilled_registers"]
        table = table.join(was[kept].add_suffix(" (was)"))
        change, tiles, waves = (table[name] / was[name] for name in ("tflops", "filled", "busy"))
        bounds = pd.concat([tiles, waves], axis=1)
        # 1 where the change lies between what the two make of it.
        left = change / change.clip(bounds.min(axis=1), bounds.max(axis=1))
        alike = table["configuration"] == table["configuration (was)"]
        spread = _spread((left - 1).abs().where(alike))
        falls = (change < 1) & (left < 1)
        ratios = {CHANGE: change, TILES: tiles, WAVES: waves, LEFT: left}
        table = table.assign(
            **{name: 100 * (ratio - 1) for name, ratio in ratios.items()},
            spread=100 * spread,
            falls=falls,
            **{LOOK: falls & (1 - left > (SPREADS * spread).clip(lower=MARGIN))},
        )
        found.append(table)
    table = pd.concat(found, ignore_index=True)
    return table.assign(**{ALSO: _neighbours(table, curve)}).drop(columns="falls")


def _spread(off: pd.Series) -> pd.Series:
    """Give each step the standard deviation of the others, not led by a few far off.

    Of a normal law the median distance is 1 / 1.4826 of its standard deviation.
    """
    return off.index.to_series().map(lambda at: 1.4826 * off.drop(at).median()).fillna(0.0)


def _neighbours(table: pd.DataFrame, curve: list[str]) -> list[str]:
    """Name the other TP whose figure falls at the same m, where this one's does."""
    if "tp" not in table:
        return [""] * len(table)
    same = [*(name for name in curve if name != "tp"), "m"]
    falling = table[table["falls"]].groupby(same)["tp"].agg(list).to_dict()
    return [
        ", ".join(str(tp) for tp in falling[key] if tp != row["tp"]) if row["falls"] else ""
        for row in table.to_dict("records")
        for key in [tuple(row[name] for name in same)]
    ]


def quicker(of_cells: pd.DataFrame, curve: list[str]) -> pd.DataFrame:
    """Find the cells whose work another cell of the curve would do sooner, by the figures alone.

    Either a larger m, filled up with tokens that nobody asked for, or several launches of a
    smaller one. No model is in this; it leaves out what routing and launching again take.

    Args:
        of_cells: of `cells`.
    Returns:
        the cells where that saves more than `MARGIN`: `QUICKER` how, and `SAVED` of the time.
    """
    import numpy as np
    import pandas as pd

    found = []
    for _, table in of_cells.groupby(curve, sort=False):
        m, time = table["m"].to_numpy(int), table["time_us"].to_numpy(float)
        times = -(-m[:, None] // m[None])
        instead = times * time[None]
        best = instead.argmin(axis=1)
        here = np.arange(len(m))
        found.append(
            table.assign(
                **{
                    QUICKER: [
                        f"{count} x {of}" if count > 1 else f"padded to {of}"
                        for count, of in zip(times[here, best], m[best], strict=True)
                    ],
                    SAVED: 100 * (1 - instead[here, best] / time),
                }
            )
        )
    table = pd.concat(found, ignore_index=True)
    return table[table[SAVED] > 100 * MARGIN].reset_index(drop=True)


def shown(table: pd.DataFrame, curve: list[str]) -> pd.DataFrame:
    """Choose and round the columns of `steps` that people read, falls only, worst first.

    The configuration is in words where it changes.
    """
    falls = table[table[CHANGE] < 0].sort_values(LEFT)
    changed = falls["configuration (was)"] + " -> " + falls["configuration"]
    alike = falls["configuration"] == falls["configuration (was)"]
    spills = falls[["spilled_registers (was)", "spilled_registers"]].astype("Int64")
    figures = falls[[CHANGE, TILES, WAVES, LEFT]].astype(float).round(1)
    return falls[curve].assign(
        **{
            "M (was)": falls["m (was)"].astype(int),
            "M": falls["m"],
            "TFLOP/s (was)": falls["tflops (was)"],
            "TFLOP/s": falls["tflops"],
            **figures,
            "spread (%)": falls["spread"].round(1),
            LOOK: falls[LOOK].map({True: "yes", False: None}),
            ALSO: falls[ALSO].replace("", None),
            "configuration": changed.where(~alike, "the same"),
            "spilled registers (was)": spills["spilled_registers (was)"],
            "spilled registers": spills["spilled_registers"],
        }
    )


def conclusion(table: pd.DataFrame, sooner: pd.DataFrame, curve: list[str]) -> str:
    """Sum the cliffs up in Markdown sentences, computed from the rows.

    Args:
        table: of `steps`.
        sooner: of `quicker`.
    """
    table, sooner = (inert.frame(of, inert.markdown) for of in (table, sooner))
    compared = table.dropna(subset=[CHANGE])
    falls = compared[compared[CHANGE] < 0]
    look = falls[falls[LOOK]].sort_values(LEFT)
    sentences = [
        f"In {len(falls)} of {len(compared)} steps along M throughput falls. "
        f"{(falls[LEFT] >= 0).sum()} of these falls are no deeper than tiles and waves make "
        f"them; {len(look)} are flagged."
    ]
    for (kernel, model, m), flagged in look.groupby(["kernel", "model", "m"], sort=False):
        here = compared[(compared[["kernel", "model", "m"]] == [kernel, model, m]).all(axis=1)]
        beyond = (here[CHANGE] < 0) & (here[LEFT] < 0)
        inner = [name for name in curve if name not in ("kernel", "model")]
        flagged = flagged.sort_values(inner)
        explained = flagged[[TILES, WAVES]].min(axis=1).min()
        by_model = f"explains at most {explained:.1f}%" if explained < 0 else "expects no fall"
        sentences.append(
            f"**{kernel}, {model}, M {flagged['m (was)'].iloc[0]:.0f} to {m}**: "
            f"{_each(flagged, CHANGE, inner)}; the model {by_model} and leaves "
            f"{_each(flagged, LEFT, inner)}; {_what_changed(flagged)}. Of {len(here)} curves "
            f"{beyond.sum()} fall here by more than the model explains."
        )
    if len(sooner):
        most = sooner.loc[sooner[SAVED].idxmax()]
        sentences.append(
            f"By the figures alone {len(sooner)} of {len(table)} cells would be done sooner as "
            f"others, most of all {_where(most, curve)}, M {most['m']}: {most[QUICKER]} saves "
            f"{most[SAVED]:.0f}%."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _each(flagged: pd.DataFrame, column: str, inner: list[str]) -> str:
    """List a column in percent, with the curve in brackets."""
    return ", ".join(
        f"{row[column]:.1f}% ({_where(row, inner)})" for row in flagged.to_dict("records")
    )


def _what_changed(flagged: pd.DataFrame) -> str:
    before, after = flagged["configuration (was)"], flagged["configuration"]
    if (before == after).all():
        return "the configuration is the same"
    told = " and ".join(
        dict.fromkeys(f"{a} becomes {b}" for a, b in zip(before, after, strict=True))
    )
    spilled = flagged[["spilled_registers (was)", "spilled_registers"]]
    if spilled.notna().all(axis=None):
        was, now = (", ".join(f"{of:.0f}" for of in spilled[name]) for name in spilled)
        told += f", and spilled registers {was} become {now}"
    return told


def _where(row: Any, curve: list[str]) -> str:
    return ", ".join(in_words(name, row[name]) for name in curve)


def in_words(name: str, value: Any) -> str:
    """Say what one column of a curve says: ``TP 4``."""
    if name == "fast_accum":
        return tables.SUMS[bool(value)]
    return {"tp": "TP {}", "layer": "layer {}"}.get(name, "{}").format(value)
