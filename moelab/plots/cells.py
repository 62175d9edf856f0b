"""Cells of one throughput each: what they take of the LDS, and where they fall along M."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from .. import cliffs, published
from .style import GREY, KIB, PALETTE, RED, empty, picture, stage_colour, subplots
from .throughput import panels_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP"


@picture
def published_lds(rows: pd.DataFrame, deeper: pd.DataFrame) -> Figure:
    """Draw the published throughput of each cell against the LDS that its launches take.

    The larger of its two launches, a marker for each tile; TP stand side by side. At the foot:
    what the same tiles would take with more stages, of which nothing was published.

    Args:
        rows, deeper: of `published.launches`.
    """
    from matplotlib.lines import Line2D

    panels = list(rows.groupby(["kernel", "model"], sort=False))
    if not panels:
        return empty("no published cell")
    figure, axes = panels_of(panels, 3.1)
    edge = max(deeper["lds_bytes"].max(), rows["lds_limit"].max()) / KIB * 1.06
    for axis, ((kernel, model), panel) in zip(axes, panels, strict=True):
        tiles = panel.groupby("tile", sort=False)
        for (tile, of_tile), marker in zip(tiles, _MARKERS, strict=False):
            cells = of_tile.loc[of_tile.groupby(published.CELL)["lds_bytes"].idxmax()]
            count = cells["num_stages"].iloc[0]
            shards = cells["tp"].rank(method="dense").astype(float)
            beside = (shards - (1 + shards.max()) / 2) * edge / 80
            axis.plot(
                cells["lds_bytes"].astype(float) / KIB + beside,
                cells[published.PUBLISHED].astype(float),
                marker,
                ms=5,
                color=stage_colour(count),
                mec="black",
                mew=0.4,
                alpha=0.8,
            )
            axis.plot([], [], marker, color="white", mec="black", label=tile)
            more = deeper[(deeper["model"] == model) & (deeper["tile"] == tile)]
            _draw_deeper(axis, more, marker)
        limit = panel["lds_limit"].iloc[0] / KIB
        axis.axvline(limit, color=RED, lw=1.5)
        axis.set_title(f"{kernel}\n{model}", fontsize=9)
        axis.set_xlim(0, edge)
        axis.set_ylim(-0.14 * panel[published.PUBLISHED].max(), None)
        axis.set_ylabel("published TFLOP/s")
        box = {"frameon": True, "framealpha": 1, "edgecolor": "none"}
        axis.legend(fontsize=7, loc="upper right", **box)
    shards = ", ".join(map(str, sorted(rows["tp"].unique())))
    figure.supxlabel(f"LDS of one workgroup (KiB); side by side: TP {shards}", fontsize=10)
    keys = []
    for frame, what in ((rows, "published"), (deeper, "nothing published")):
        count = frame["num_stages"].max()
        name = f"{count} stage{'s' if count > 1 else ''}, {what}"
        keys.append(Line2D([], [], marker="o", ls="", color=stage_colour(count), label=name))
    keys.append(Line2D([], [], marker="o", ls="", mfc="white", mec="black", label="doesn't fit"))
    keys.append(Line2D([], [], color=RED, lw=1.5, label="limit"))
    figure.legend(handles=keys, ncols=4, loc="outside upper left")
    return figure


def _draw_deeper(axis: Axes, more: pd.DataFrame, marker: str) -> None:
    for (lds, count, limit), _ in more.groupby(["lds_bytes", "num_stages", "lds_limit"]):
        colour = stage_colour(count)
        axis.plot(
            lds / KIB,
            0.05,
            marker,
            transform=axis.get_xaxis_transform(),
            ms=6,
            mec=colour,
            mfc=colour if lds <= limit else "white",
            mew=1.5,
        )


@picture
def cliffs_along_m(steps: pd.DataFrame, curve: list[str]) -> Figure:
    """Draw throughput along M beside what the model makes of the cell before.

    A panel per curve of more than one cell. From a grey bar, all that tiles alone and tiles
    with waves make of the cell before, to the point is what is left; a ring is a flagged
    fall. A vertical line marks where the configuration changes.

    Args:
        steps: of `cliffs.steps`.
        curve: as there.
    """
    # A curve of one cell has no steps, and would take as much room as one that has.
    steps = steps[steps.groupby(curve)["m"].transform("size") > 1]
    groups = list(steps.groupby(["kernel", "model"], sort=False))
    if not groups:
        return empty("no curve has two cells")
    inner = _inner(steps, curve)
    columns = max(len(group[inner].drop_duplicates()) for _, group in groups)
    figure, axes = subplots(
        len(groups),
        columns,
        figsize=(9.5, 2.2 * len(groups) + 0.4),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row_of_axes, ((kernel, model), group) in zip(axes, groups, strict=True):
        for axis in row_of_axes:
            axis.set_axis_off()
        lines = group.groupby(inner, sort=False)
        for axis, (names, line) in zip(row_of_axes, lines, strict=False):
            axis.set_axis_on()
            _draw_cliffs(axis, line.sort_values("m"))
            axis.set_title(_named(inner, names), fontsize=8)
            axis.set_ylim(0, group["tflops"].max() * 1.08)
        row_of_axes[0].set_title(
            f"{model}, {kernel}\n{row_of_axes[0].get_title('left')}", fontsize=8
        )
        row_of_axes[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    # Not every panel has all there is to explain.
    keys = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(keys.values(), keys.keys(), ncols=4, loc="outside upper left", fontsize=8)
    return figure


def _inner(steps: pd.DataFrame, curve: list[str]) -> list[str]:
    """Name the columns that tell the curves of a kernel and model apart."""
    told = [name for name in curve if name not in ("kernel", "model")]
    shared = [name for name in ("fast_accum", "target") if name in told]
    return [name for name in told if name not in shared or steps[name].nunique() > 1]


def _named(inner: list[str], values: Any) -> str:
    return ", ".join(map(cliffs.in_words, inner, values))


def _draw_cliffs(axis: Axes, line: pd.DataFrame) -> None:
    m, tflops = line["m"].astype(float), line["tflops"].astype(float)
    was = line["tflops (was)"].astype(float)
    ends = [was * (1 + line[name].astype(float) / 100) for name in (cliffs.TILES, cliffs.WAVES)]
    compared = line.dropna(subset=["configuration (was)"])
    changes = compared[compared["configuration"] != compared["configuration (was)"]]
    for position, change in enumerate(changes["m"]):
        label = "another configuration" if position == 0 else None
        axis.axvline(float(change) - 512, color=GREY, lw=0.8, ls=":", label=label)
    axis.vlines(m, *ends, color="#999999", lw=4, alpha=0.6, label="what the model makes of it")
    axis.plot(m, tflops, "o-", ms=3, lw=1, color=PALETTE[0], label="throughput")
    look = line[cliffs.LOOK].to_numpy(bool)
    axis.plot(m[look], tflops[look], "o", ms=9, mfc="none", mec=RED, mew=1.8, label="look here")
    axis.set_xlim(0)
    axis.tick_params(labelsize=7)
    axis.set_xticks([0, 5000, 10000, 15000], ["0", "5k", "10k", "15k"])


@picture
def left_along_m(steps: pd.DataFrame, curve: list[str]) -> Figure:
    """Draw what the model leaves of each change along M, a panel per model, all curves in one.

    Args:
        steps, curve: as in `cliffs_along_m`.
    """
    inner = _inner(steps, curve)
    panels = list(steps.dropna(subset=[cliffs.LEFT]).groupby(["kernel", "model"], sort=False))
    if not panels:
        return empty("no two cells of a curve")
    figure, axes = panels_of(panels, 2.5, sharex=True, sharey=True)
    # Rises at small M leave hundreds of percent, which the model does not speak of.
    low, high = min(steps[cliffs.LEFT].min() * 1.15, -10), 30
    # A curve has the same colour in all panels, and each is in the key.
    names_of_all = steps[inner].drop_duplicates().sort_values(inner)
    colours = dict(
        zip(names_of_all.itertuples(index=False, name=None), itertools.cycle(PALETTE), strict=False)
    )
    for names, colour in colours.items():
        axes[0].plot([], [], "o-", ms=3, lw=0.8, color=colour, label=_named(inner, names))
    for axis, ((kernel, model), panel) in zip(axes, panels, strict=True):
        margin = 100 * cliffs.MARGIN
        axis.axhspan(-margin, margin, color="#eeeeee", lw=0)
        axis.axhline(0, color="black", lw=0.8)
        for names, line in panel.groupby(inner, sort=False):
            line = line.sort_values("m")
            m, left = line["m"].astype(float), line[cliffs.LEFT].astype(float)
            axis.plot(m, left, "o-", ms=3, lw=0.8, color=colours[names])
            look = line[cliffs.LOOK].to_numpy(bool)
            axis.plot(m[look], left[look], "o", ms=9, mfc="none", mec=RED, mew=1.8)
        axis.set_ylim(low, high)
        axis.set_title(f"{kernel}\n{model}", fontsize=9)
        axis.set_ylabel("left (%)")
    figure.supxlabel("tokens before top-k", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside upper left")
    return figure
