"""Estimates on trial: estimated bytes beside compiled ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import estimates
from .style import BLUE, GREEN, GREY, KIB, ORANGE, RED, ROW_INCHES, SKY, empty, picture, subplots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of kernels, with a marker each.
_KERNEL_LOOKS = {
    "moe_gemm_a8w8": (BLUE, "o"),
    "moe_gemm_a8w8_blockscale": (SKY, "s"),
    "moe_gemm_a8w4": (ORANGE, "^"),
    "moe_gemm_a4w4": (GREEN, "D"),
}
_VERDICT_LOOKS = {
    estimates.RIGHT: "#BBBBBB",
    estimates.REJECTS: BLUE,
    estimates.ADMITS: RED,
}


@picture
def estimates_on_trial(judged: pd.DataFrame) -> Figure:
    """Draw estimated against compiled bytes, a row per estimate and a column per target.

    Args:
        judged: of `estimates.judge`. Hollow markers are not spoken of by the estimate; counts
            in the shaded quadrants are of what is spoken of, in brackets of the rest.
    """
    if judged.empty:
        return empty("no row whose LDS is known")
    names = [of.name for of in estimates.ESTIMATES if of.name in set(judged["estimate"])]
    columns = list(dict.fromkeys(judged["target"]))
    figure, axes = subplots(
        len(names),
        len(columns),
        figsize=(1.2 + 3.4 * len(columns), 0.9 + 2.9 * len(names)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    both = judged[[estimates.ESTIMATED, estimates.COMPILED]].to_numpy() / KIB
    ends = (both.min() / 1.5, both.max() * 1.5)
    for name, row_of_axes in zip(names, axes, strict=True):
        for target, axis in zip(columns, row_of_axes, strict=True):
            panel = judged[(judged["estimate"] == name) & (judged["target"] == target)]
            _draw_trial(axis, panel, ends)
            axis.set_title(f"{name}\non {target}", fontsize=9)
        row_of_axes[0].set_ylabel("compiled (KiB)")
    for axis in axes[-1]:
        axis.set_xlabel("estimated (KiB)")
    kernels = [kernel for kernel in _KERNEL_LOOKS if kernel in set(judged["kernel"])]
    for kernel in kernels:
        colour, marker = _KERNEL_LOOKS[kernel]
        axes[0, 0].plot([], [], marker, color=colour, label=kernel)
    axes[0, 0].plot([], [], "o", mfc="none", color=GREY, label="not spoken of")
    axes[0, 0].plot([], [], color=RED, lw=1, label="limits")
    axes[0, 0].plot([], [], color=GREY, lw=0.8, ls="--", label="exact")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=4, loc="outside upper left")
    return figure


def _draw_trial(axis: Axes, panel: pd.DataFrame, ends: tuple[float, float]) -> None:
    limit, own = (panel[name].iloc[0] / KIB for name in (estimates.LIMIT, estimates.OWN_LIMIT))
    low, high = ends
    for verdict, x, y in (
        (estimates.REJECTS, (own, high), (low, limit)),
        (estimates.ADMITS, (low, own), (limit, high)),
    ):
        axis.fill_between(x, *y, color=_VERDICT_LOOKS[verdict], alpha=0.1, lw=0)
        wrong = panel.loc[panel["verdict"] == verdict, estimates.SPOKEN_OF]
        admits = verdict == estimates.ADMITS
        axis.annotate(
            f"{verdict}\n{wrong.sum()} ({(~wrong).sum()})",
            (0.03, 0.97) if admits else (0.97, 0.03),
            xycoords="axes fraction",
            ha="left" if admits else "right",
            va="top" if admits else "bottom",
            fontsize=8,
            color=_VERDICT_LOOKS[verdict],
        )
    axis.plot(ends, ends, color=GREY, lw=0.8, ls="--")
    axis.axhline(limit, color=RED, lw=1)
    axis.axvline(own, color=RED, lw=1)
    for (kernel, spoken), points in panel.groupby(["kernel", estimates.SPOKEN_OF]):
        colour, marker = _KERNEL_LOOKS[kernel]
        axis.plot(
            points[estimates.ESTIMATED] / KIB,
            points[estimates.COMPILED] / KIB,
            marker,
            ms=4,
            mec=colour,
            mfc=colour if spoken else "none",
            mew=0.5,
            alpha=0.6,
        )
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ticks = [4**power for power in range(-1, 8) if low <= 4**power <= high]
    for along in (axis.xaxis, axis.yaxis):
        along.set_major_locator(FixedLocator(ticks))
        along.set_major_formatter("{x:g}")
        along.set_minor_locator(NullLocator())


@picture
def verdicts(judged: pd.DataFrame) -> Figure:
    """Draw how many configurations each estimate gets right, rejects and admits wrongly.

    Only what it speaks of counts; a bar per estimate and target.
    """
    spoken = judged[judged[estimates.SPOKEN_OF]]
    if spoken.empty:
        return empty("no configuration that an estimate speaks of")
    bars = [
        (f"{of.name}\non {target}", group["verdict"].value_counts())
        for of in estimates.ESTIMATES
        for target, group in spoken[spoken["estimate"] == of.name].groupby("target", sort=False)
    ][::-1]
    figure, axis = subplots(figsize=(9.5, max(len(bars), 3) * 1.5 * ROW_INCHES + 1.2))
    for y, (_, counts) in enumerate(bars):
        share, left = 100 / counts.sum(), 0.0
        for verdict, colour in _VERDICT_LOOKS.items():
            count = counts.get(verdict, 0)
            axis.barh(y, count * share, left=left, color=colour, height=0.7)
            left += count * share
        rejected, admitted = counts.get(estimates.REJECTS, 0), counts.get(estimates.ADMITS, 0)
        axis.annotate(
            f"{rejected} rejected, {admitted} admitted of {counts.sum()}",
            (100, y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for verdict, colour in _VERDICT_LOOKS.items():
        axis.barh(0, 0, color=colour, label=verdict)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.set_xlim(0, 100)
    axis.set_xlabel("configurations that the estimate speaks of (%)")
    axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure
