"""Measured throughput against LDS and stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import trade
from .style import KIB, PALETTE, RED, empty, subplots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def lds_against_throughput(rows: pd.DataFrame, m: int) -> Figure:
    """Draw LDS against useful TFLOP/s at one token count, a panel per kernel, model and layer.

    The number in a marker is its stage count; stage counts of a tile are joined. Past the
    limit stands what doesn't fit, on the axis.

    Args:
        rows: of `trade.measured`.
    """
    groups = rows[rows["m"] == m].groupby(["kernel", "model", "layer"], sort=False)
    panels = [(names, panel) for names, panel in groups if panel["tflops"].notna().any()]
    if not panels:
        return empty(f"nothing was measured at {m} tokens")
    figure, axes = subplots(
        -(-len(panels) // 2), 2, figsize=(10, 3.1 * -(-len(panels) // 2)), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((kernel, model, layer), panel) in zip(axes.flat, panels, strict=False):
        tilings = list(panel.groupby(["tp", "tile", "num_warps"], sort=False))
        for ((tp, tile, warps), of_tile), colour in zip(tilings, PALETTE, strict=False):
            at = of_tile.sort_values("num_stages")
            timed = at.dropna(subset=["tflops"])
            kib = timed["lds_bytes"].astype(float) / KIB
            label = f"TP {tp}, {tile}, {warps} warps"
            axis.plot(kib, timed["tflops"], "o-", color=colour, ms=11, label=label)
            beyond = at[at["tflops"].isna() & at["lds_bytes"].notna()]
            axis.plot(beyond["lds_bytes"].astype(float) / KIB, [0] * len(beyond), "x", color=colour)
            for row in timed.itertuples():
                axis.annotate(
                    str(row.num_stages),
                    (row.lds_bytes / KIB, row.tflops),
                    ha="center",
                    va="center_baseline",
                    fontsize=8,
                    color="white",
                )
        limit = panel["lds_limit"].iloc[0] / KIB
        axis.axvline(limit, color=RED, lw=1.5)
        axis.set_title(f"{kernel}\n{model}, layer {layer}", fontsize=9)
        axis.set_ylim(0, panel["tflops"].max() * 1.15)
        axis.set_xlim(0)
        axis.set_xlabel("LDS of one workgroup (KiB); line: limit, cross: doesn't fit", fontsize=8)
        axis.set_ylabel("TFLOP/s")
        axis.legend(fontsize=7, loc="lower left")
    return figure


def one_stage_loss(compared: pd.DataFrame) -> Figure:
    """Draw what one stage loses against the best stage count, over tokens.

    Args:
        compared: of `trade.stages`.
    """
    panels = list(compared.groupby(["kernel", "model"], sort=False))
    if not panels:
        return empty("no tile was measured with one stage")
    figure, axes = subplots(
        len(panels), 1, figsize=(9.5, 2.3 * len(panels)), sharex=True, sharey=True, squeeze=False
    )
    for axis, ((kernel, model), panel) in zip(axes[:, 0], panels, strict=True):
        lines = panel.groupby(["layer", "tp"], sort=False)
        for ((layer, tp), line), colour in zip(lines, PALETTE, strict=False):
            line = line.sort_values("m")
            m, loss = line["m"].astype(float), line[trade.LOSS]
            axis.plot(m, loss, "o-", ms=4, color=colour, label=f"layer {layer}, TP {tp}")
            low, high = line[trade.LOSS_LOW], line[trade.LOSS_HIGH]
            axis.fill_between(m, low, high, color=colour, alpha=0.2, lw=0)
        axis.set_title(f"{kernel}, {model}")
        axis.set_ylabel("loss (%)")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0, 0].set_ylim(-2, compared[trade.LOSS_HIGH].max() * 1.1)
    axes[-1, 0].set_xlabel("tokens before top-k")
    return figure
