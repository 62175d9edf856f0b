"""Throughput of our kernels and their peers'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import standings, tables
from .style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, empty, picture
from .throughput import panels_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each the same in every picture.
_COLOURS = {
    standings.OURS: BLUE,
    "torch": RED,
    "torch_precise": ORANGE,
    "triton_kernels": GREEN,
    "triton_kernels_bf16": GREEN,
    "deep_gemm": PURPLE,
    "torch_bf16": SKY,
}


@picture
def ours_and_peers(rows: pd.DataFrame) -> Figure:
    """Draw TFLOP/s over tokens, a panel per kernel, way to sum, model and layer.

    Solid lines have all inside, dashed ones are a peer's matmul alone. Square is noisy.

    Args:
        rows: of `standings.measured`.
    """
    panels = list(standings.fastest(rows).groupby(standings.CURVE, sort=False))
    if not panels:
        return empty("nothing was timed")
    figure, axes = panels_of(panels, 2.7)
    drawn: dict[str, str] = {}
    for axis, (names, panel) in zip(axes, panels, strict=True):
        kernel, fast_accum, model, layer, tp = names
        shards = f", TP {tp}" if tp > 1 else ""
        axis.set_title(
            f"{kernel}, {tables.SUMS[fast_accum]}\n{model}{shards}, layer {layer}", fontsize=9
        )
        for (whose, alone), line in panel.groupby(["whose", "alone"], sort=False):
            colour = drawn[whose] = _COLOURS.get(whose, GREY)
            _draw_line(axis, line.sort_values("m"), colour, alone)
        roof = panel.drop_duplicates("m").sort_values("m")
        axis.plot(*_points(roof, "roof_tflops"), color="black", lw=1, ls=":")
        axis.set_ylim(0, None)
        # Panels that stand side by side are read as one, also where token counts are missing.
        axis.set_xlim(0, rows["m"].max() * 1.05)
        axis.locator_params(axis="x", nbins=5)
        axis.set_ylabel("TFLOP/s")
        axis.grid(axis="y")
    for axis in axes[-2:]:
        axis.set_xlabel("tokens before top-k")
    for whose, colour in drawn.items():
        axes[0].plot([], [], "o-", ms=4, color=colour, label=whose)
    axes[0].plot([], [], "--", color=GREY, label="its matmul alone")
    axes[0].plot([], [], "s", color="#aaaaaa", label="noisy")
    axes[0].plot([], [], ":", color="black", lw=1, label="roof")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="outside upper left")
    return figure


def _draw_line(axis: Axes, line: pd.DataFrame, colour: str, alone: bool) -> None:
    axis.plot(*_points(line, "tflops"), color=colour, lw=1.4, ls="--" if alone else "-")
    for noisy, points in line.groupby("noisy"):
        filled = "none" if alone else colour
        at = _points(points, "tflops")
        axis.plot(*at, "s" if noisy else "o", ms=4, color=colour, mfc=filled)


def _points(line: pd.DataFrame, of: str) -> tuple[pd.Series, pd.Series]:
    return line["m"].astype(float), line[of].astype(float)
