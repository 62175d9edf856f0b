"""LDS per stage count, against the limit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .. import tables
from .style import BLUE, KIB, ORANGE, RED, ROW_INCHES, empty, picture, subplots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
_SWITCH = {"off": BLUE, "on": ORANGE, "no switch": BLUE}


@picture
def lds_against_limit(rows: pd.DataFrame) -> Figure:
    """Draw each tile's LDS per stage count, async copy off and on, against the limit.

    The number in a marker is its stage count; hollow markers don't fit.
    """
    compiled = tables.labelled(rows).dropna(subset=["lds_bytes"])
    tilings = ["kernel", "target", "tile", "num_warps"]
    worst = (
        compiled.groupby([*tilings, tables.ASYNC_COPY, "num_stages", "lds_limit"])["lds_bytes"]
        .max()
        .reset_index()
    )
    if worst.empty:
        return empty("no row whose LDS is known")
    panels = list(worst.groupby(["kernel", "target"]))
    heights = [max(len(panel.groupby(["tile", "num_warps"])), 2) for _, panel in panels]
    figure, axes = subplots(
        len(panels),
        1,
        figsize=(9.5, sum(heights) * 2 * ROW_INCHES + 1.1 * len(panels)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
    )
    # Panels share the axis: all must reach as far as the furthest.
    edge = worst[["lds_bytes", "lds_limit"]].to_numpy().max() / KIB * 1.06
    for axis, ((kernel, target), panel) in zip(axes[:, 0], panels, strict=True):
        _draw_stages(axis, panel, edge)
        axis.set_title(f"{kernel} on {target}")
    axes[-1, 0].set_xlabel("LDS of one workgroup (KiB); the number is the stage count")
    return figure


def _draw_stages(axis: Axes, panel: pd.DataFrame, edge: float) -> None:
    limit = panel["lds_limit"].iloc[0]
    tilings = sorted(
        {(row.tile, row.num_warps) for row in panel.itertuples()}, key=_tile_numbers, reverse=True
    )
    switches = sorted(panel[tables.ASYNC_COPY].unique())
    for y, tiling in enumerate(tilings):
        for lane, switch in enumerate(switches):
            here = panel[
                (panel["tile"] == tiling[0])
                & (panel["num_warps"] == tiling[1])
                & (panel[tables.ASYNC_COPY] == switch)
            ]
            height = y + (0.5 - (lane + 0.5) / len(switches)) * 0.8
            colour = _SWITCH[switch]
            axis.plot(here["lds_bytes"] / KIB, [height] * len(here), color=colour, lw=1, alpha=0.5)
            for row in here.itertuples():
                fits = row.lds_bytes <= limit
                axis.plot(
                    row.lds_bytes / KIB,
                    height,
                    "o",
                    ms=13,
                    mfc=colour if fits else "white",
                    mec=colour,
                    mew=1.5,
                )
                axis.annotate(
                    str(row.num_stages),
                    (row.lds_bytes / KIB, height),
                    ha="center",
                    va="center_baseline",
                    fontsize=8,
                    color="white" if fits else "black",
                )
    for switch in switches:
        label = "no async-copy switch" if switch == "no switch" else f"async copy {switch}"
        axis.plot([], [], "o-", color=_SWITCH[switch], label=label)
    axis.axvspan(limit / KIB, edge, color=RED, alpha=0.08, lw=0)
    axis.axvline(limit / KIB, color=RED, lw=1.5, label=f"limit {limit / KIB:g} KiB")
    axis.set_xlim(0, edge)
    axis.set_yticks(range(len(tilings)), [f"{tile}\n{warps} warps" for tile, warps in tilings])
    axis.set_ylim(-0.7, len(tilings) - 0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _tile_numbers(tiling: tuple[str, int]) -> tuple[int, ...]:
    return (*map(int, re.findall(r"\d+", tiling[0])), tiling[1])
