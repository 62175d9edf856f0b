"""Two sides of a comparison: where over M and TP it moved, and the samples behind it."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from typing import TYPE_CHECKING, Any

from .. import cliffs, inert, published, regression_report, trade
from ..regress import ADVISORY, PAIRED, Comparison
from .cells import left_along_m
from .style import BLUE, GREY, ORANGE, RED, empty, picture, subplots
from .throughput import panels_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Inches of a square, of what stands around a panel's squares, and around all panels.
_HIGH, _AROUND, _ENDS = 0.25, 0.5, 0.9
_PANEL = [*trade.KIND, "target"]
# More panels than this are no picture any more.
_PANELS = 12
# A ratio of less than this is no strong colour.
_LEAST_SPAN = 1.1
_MOST_SPAN = 2.0

_HATCH: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": "#c4c4c4", "hatch": "////"}

# What a square without a time says, and its colours: the gravest first.
_SAID = {
    "lost": ("lost", RED, "white", "no longer fits or works"),
    "heavier": ("heavier", "#F3B391", "black", "fits, spills more or has less occupancy"),
    "gained": ("fits", BLUE, "white", "now fits or works"),
    "lighter": ("lighter", "#A6CDE8", "black", "fits, spills less or has more occupancy"),
    "open": ("?", "#ffffff", "black", "not answered"),
    "alike": ("=", "#ffffff", GREY, "as before"),
    "never": ("no", "#dddddd", GREY, "fits on neither side"),
}


@picture
def moves_over_m_and_tp(compared: Comparison) -> Figure:
    """Draw what became of each cell over M and TP, a panel per kernel, model and target.

    A square has the ratio of times, candidate over baseline, the geometric mean where several
    tiles share it; else what became of its fit. Hatched is what neither side has.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    squares = _squares(compared)
    if squares.empty:
        return empty("no cell has a model, a TP and a token count")
    figure, axes, panels = _panels(squares)
    ratios = squares["ratio"].dropna().astype(float)
    farthest = math.exp(ratios.map(math.log).abs().max()) if len(ratios) else 1.0
    span = min(max(farthest, _LEAST_SPAN), _MOST_SPAN)
    norm = LogNorm(1 / span, span)
    colours = _diverging()
    for axis, panel in zip(axes, panels, strict=True):
        _draw_squares(axis, panel, colours, span)
    said = [name for name in _SAID if name in set(squares["said"])]
    keys = [
        Patch(facecolor=_SAID[name][1], edgecolor=GREY, lw=0.5, label=_key(name)) for name in said
    ]
    if any(len(panel) < _room(panel) for panel in panels):
        keys.append(Patch(**_HATCH, lw=0, label="no such cell"))
    if len(ratios):
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            ax=list(axes),
            location="bottom",
            aspect=60,
            shrink=0.6,
            pad=0.015,
            extend="both" if farthest > span else "neither",
        )
        ticks = [1 / span, span**-0.5, 1, span**0.5, span]
        bar.set_ticks(ticks, labels=[f"\N{MULTIPLICATION SIGN}{tick:.2f}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.set_label("faster    time, candidate over baseline    slower", fontsize=9)
    if keys:
        figure.legend(handles=keys, ncols=min(len(keys), 4), loc="outside upper left", fontsize=8)
    if (there := squares.groupby(_PANEL, dropna=False).ngroups) > _PANELS:
        figure.suptitle(f"the first {_PANELS} of {there} kernels, models and targets", fontsize=9)
    return figure


def _key(name: str) -> str:
    word, _, _, meaning = _SAID[name]
    return f"{word}: {meaning}"


def _diverging() -> Colormap:
    """Give blue, white and red of the palette: faster, alike, slower."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("faster to slower", (BLUE, "#ffffff", RED))


def _squares(compared: Comparison) -> pd.DataFrame:
    """Put the cells of each square together: its ratio, or what became of its fit."""
    import numpy as np
    import pandas as pd

    cells, rows = compared.cells, compared.rows
    cells = cells.assign(
        refused=(rows["status b"] != "ok") & (rows["status c"] != "ok"),
        same=(rows["samples_us b"] == rows["samples_us c"]).fillna(False),
    )
    cells = cells.dropna(subset=["model", "layer", "tp", "m"])
    by = [*_PANEL, "layer", "tp", "m"]
    found = []
    for names, square in cells.groupby(by, sort=False, dropna=False):
        answers = {kind: set(square[kind].dropna()) for kind in ("fits", "resources", "speed")}
        timed = square["ratio"].dropna().astype(float)
        told = dict(zip(by, names, strict=True)) | {"said": _said(answers, square), "mark": ""}
        # One row on both sides has no ratio that was measured.
        if len(timed) and told["said"] != "lost" and not square["same"].all():
            told |= {
                "said": None,
                "ratio": float(np.exp(np.log(timed).mean())),
                "sure": bool({"regressed", "improved"} & answers["speed"]),
            }
            if "inconclusive" in answers["speed"]:
                told["mark"] = "?" if PAIRED in set(square["how"]) else "~"
            elif ADVISORY in set(square["how"]):
                told["mark"] = "~"
        found.append(told)
    return pd.DataFrame(found, columns=[*by, "said", "ratio", "sure", "mark"])


def _said(answers: dict[str, set[str]], square: pd.DataFrame) -> str:
    """Say the gravest of what became of a square's cells, by a name of `_SAID`."""
    if "regressed" in answers["fits"]:
        return "lost"
    if square["refused"].all():
        return "never"
    for name, kind, answer in (
        ("heavier", "resources", "regressed"),
        ("gained", "fits", "improved"),
        ("open", "fits", "inconclusive"),
        ("lighter", "resources", "improved"),
    ):
        if answer in answers[kind]:
            return name
    return "alike"


def _panels(squares: pd.DataFrame) -> tuple[Figure, list[Axes], list[pd.DataFrame]]:
    """Make a panel per kernel, model and target, its squares of the same size in all.

    Returns:
        also each panel's squares, with their places ``x`` and ``y``.
    """
    groups = list(squares.groupby(_PANEL, sort=False, dropna=False))[:_PANELS]
    panels = []
    for _, panel in groups:
        of_layers = panel["layer"].nunique() > 1
        lines = panel[["layer", "tp"]].drop_duplicates().sort_values(["layer", "tp"])
        names = [
            (f"layer {layer}, " if of_layers else "") + f"TP {tp}"
            for layer, tp in lines.itertuples(index=False)
        ]
        y = {pair: at for at, pair in enumerate(lines.itertuples(index=False, name=None))}
        x = {m: at for at, m in enumerate(sorted(panel["m"].unique()))}
        places = panel.assign(
            x=panel["m"].map(x),
            y=[y[pair] for pair in zip(panel["layer"], panel["tp"], strict=True)],
        )
        places.attrs |= {"m": [*x], "lines": names}
        panels.append(places)
    lines = [len(panel.attrs["lines"]) for panel in panels]
    figure, axes = subplots(
        len(panels),
        1,
        figsize=(9.5, sum(lines) * _HIGH + len(panels) * _AROUND + _ENDS),
        height_ratios=lines,
        squeeze=False,
    )
    widest = max(16, *(len(panel.attrs["m"]) for panel in panels))
    for axis, panel, (names, _) in zip(axes[:, 0], panels, groups, strict=True):
        *kind, target = names
        title = f"{trade.named(*kind)}, {target}"
        axis.set_title(inert.line(title, 120), fontsize=9)
        axis.set_xlim(-0.5, widest - 0.5)
        axis.set_ylim(len(panel.attrs["lines"]) - 0.5, -0.5)
        axis.set_xticks(range(len(panel.attrs["m"])), map(str, panel.attrs["m"]), fontsize=7)
        axis.set_yticks(range(len(panel.attrs["lines"])), panel.attrs["lines"], fontsize=8)
        axis.tick_params(length=0)
        axis.grid(visible=False)
        for edge in axis.spines.values():
            edge.set_visible(False)
    axes[-1, 0].set_xlabel("tokens before top-k", fontsize=9, loc="left")
    return figure, list(axes[:, 0]), panels


def _room(panel: pd.DataFrame) -> int:
    return len(panel.attrs["m"]) * len(panel.attrs["lines"])


def _draw_squares(axis: Axes, panel: pd.DataFrame, colours: Colormap, span: float) -> None:
    from matplotlib.colors import LogNorm, to_hex
    from matplotlib.patches import Rectangle

    norm = LogNorm(1 / span, span)
    there = set(zip(panel["x"], panel["y"], strict=True))
    for x in range(len(panel.attrs["m"])):
        for y in range(len(panel.attrs["lines"])):
            if (x, y) not in there:
                axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, lw=0, **_HATCH))
    for square in panel.itertuples():
        if isinstance(square.said, str):
            word, face, ink, _ = _SAID[square.said]
        else:
            ratio = float(square.ratio)
            word, face = f"{ratio:.2f}{square.mark}", to_hex(colours(norm(ratio)))
            far = abs(math.log(ratio)) / math.log(span)
            ink = "white" if far > 0.75 else "black"
        axis.add_patch(
            Rectangle((square.x - 0.48, square.y - 0.46), 0.96, 0.92, fc=face, ec="#b8b8b8", lw=0.5)
        )
        weight = "bold" if square.sure is True else "normal"
        looks: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": ink}
        axis.text(square.x, square.y, word, fontweight=weight, **looks)


@picture
def worst_samples(chosen: pd.DataFrame) -> Figure:
    """Draw both sides' samples round by round, a panel per cell.

    Args:
        chosen: of `regression_report.worst`.
    """
    from matplotlib.ticker import MaxNLocator

    if chosen.empty:
        return empty("no two times have samples on both sides")
    figure, axes = panels_of(list(chosen.index), 2.2)
    for axis, cell in zip(axes, chosen.to_dict("records"), strict=True):
        looks = (("baseline", BLUE, -0.17, "b"), ("candidate", ORANGE, 0.17, "c"))
        for name, colour, beside, behind in looks:
            rounds = json.loads(cell[f"samples {behind}"])
            for number, samples in enumerate(rounds, start=1):
                x = [number + beside] * len(samples)
                axis.plot(x, samples, "o", ms=3.5, mec="none", color=colour, alpha=0.55)
                middle = statistics.median(samples)
                ends = [number + beside - 0.13, number + beside + 0.13]
                axis.plot(ends, [middle] * 2, color=colour, lw=2)
            axis.plot([], [], "o", color=colour, label=name)
        axis.set_title(_of_cell(cell), fontsize=8)
        axis.set_ylabel("time (\N{MICRO SIGN}s)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(visible=False, axis="x")
        axis.grid(axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("round", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside upper left")
    return figure


def _of_cell(cell: dict[str, Any]) -> str:
    """Name a cell, and say how its times compare, in lines that a panel is wide enough for."""
    between = f"{cell['ratio_low']:.3f} to {cell['ratio_high']:.3f}"
    times = f"{cell['speed']}: \N{MULTIPLICATION SIGN}{cell['ratio']:.3f} ({between})"
    named = textwrap.wrap(regression_report.cell_in_words(cell), 62, max_lines=2)
    return "\n".join([*named, times])


@picture
def published_over_m_and_tp(compared: Comparison) -> Figure | None:
    """Draw the TFLOP/s that were published for the candidate's launches, of both layers.

    Framed are cells of which the baseline launches a layer not at all. None where no launch is
    the published table's.
    """
    import pandas as pd
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch, Rectangle

    candidate = regression_report.side(compared, regression_report.CANDIDATE)
    figures = published.figures(candidate)
    if figures.empty:
        return None
    was = regression_report.side(compared, regression_report.BASELINE)
    refused = was[was["status"] != "ok"][[*published.CELL, "target"]].drop_duplicates()
    cells = figures.drop_duplicates(published.CELL).merge(
        refused.assign(refused=True), on=[*published.CELL, "target"], how="left"
    )
    squares = cells.assign(layer=0, fast_accum=False, said=None, sure=False)
    figure, axes, panels = _panels(squares)
    colours = LinearSegmentedColormap.from_list("throughput", ("#ffffff", "#7fb3a2"))
    for axis, panel in zip(axes, panels, strict=True):
        highest = Normalize(0, panel[published.PUBLISHED].max())
        for square in panel.to_dict("records"):
            x, y, tflops = square["x"], square["y"], float(square[published.PUBLISHED])
            framed = not pd.isna(square["refused"])
            axis.add_patch(
                Rectangle(
                    (x - 0.46, y - 0.42),
                    0.92,
                    0.84,
                    fc=colours(highest(tflops)),
                    ec=BLUE if framed else "#b8b8b8",
                    lw=1.6 if framed else 0.5,
                )
            )
            axis.text(x, y, f"{tflops:.0f}", ha="center", va="center", fontsize=7)
    key = Patch(facecolor="white", edgecolor=BLUE, lw=1.6, label="the baseline does not launch")
    title = "published TFLOP/s of both layers, one figure a cell"
    figure.legend(handles=[key], loc="outside upper left", fontsize=8, title=title)
    return figure


@picture
def comparison_cliffs(steps: pd.DataFrame, source: str) -> Figure | None:
    """Draw what the model leaves of each of the candidate's changes along M.

    Args:
        steps: of `regression_report.along_m`.
        source: `regression_report.MEASURED` or `PUBLISHED`.
    Returns:
        None where no two cells are of one curve.
    """
    ours = (steps["side"] == regression_report.CANDIDATE) & (
        steps[regression_report.SOURCE] == source
    )
    drawn = steps[ours].dropna(subset=[cliffs.LEFT])
    return None if drawn.empty else left_along_m(drawn, regression_report.CURVE)
