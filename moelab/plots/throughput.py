"""Measured throughput against LDS and stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import measurements, trade
from .style import KIB, PALETTE, RED, empty, stage_colour, subplots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels_of(groups: list[Any], height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel per group, two in a row where there are several."""
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    figure, axes = subplots(rows, columns, figsize=(9.5, height * rows), squeeze=False, **options)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    return figure, list(axes.flat[: len(groups)])


def lds_against_throughput(rows: pd.DataFrame) -> Figure:
    """Draw LDS against useful TFLOP/s, a panel per kernel, model and layer.

    The number in a marker is its stage count; stage counts of a tile are joined. Ringed is
    what nothing beats on both, square what is noisy. At the foot stands what doesn't fit.

    Args:
        rows: of `trade.measured`, of one token count (`trade.at`).
    """
    groups = rows.groupby(["kernel", "model", "layer"], sort=False)
    panels = list(groups)
    if rows["tflops"].isna().all():
        return empty("nothing was timed")
    figure, axes = panels_of(panels, 2.9)
    highest = rows["roof_tflops"].max()
    for axis, ((kernel, model, layer), panel) in zip(axes, panels, strict=True):
        # What all lines share stands in the title.
        by = [name for name in ("tp", "tile") if panel[name].nunique() > 1]
        shared = [f"layer {layer}", *(panel["tile"].iloc[:1] if "tile" not in by else [])]
        axis.set_title(f"{kernel}\n{model}, {', '.join(shared)}", fontsize=9)
        marked = trade.front(panel).assign(noisy=measurements.noisy(panel))
        for number, (names, of_tile) in enumerate(panel.groupby(by or "tile", sort=False)):
            words = dict(zip(by, names, strict=False))
            name = ", ".join(f"TP {of}" if what == "tp" else of for what, of in words.items())
            _draw_tile(axis, of_tile.sort_values("num_stages"), marked, name, below=number % 2)
        if panel["tflops"].isna().all():
            axis.text(0.5, 0.5, "nothing fits", ha="center", transform=axis.transAxes)
        limit = panel["lds_limit"].iloc[0] / KIB
        axis.axvline(limit, color=RED, lw=1.5)
        _draw_roofs(axis, panel, highest)
        axis.set_xlim(0, max(limit, panel["lds_bytes"].max() / KIB) * 1.08)
        axis.set_yscale("log")
        axis.set_ylim(panel["tflops"].fillna(highest / 10).min() / 2.5, highest * 1.8)
        axis.set_ylabel("TFLOP/s")
        _plain_ticks(axis)
    for axis in axes[-2:]:
        axis.set_xlabel("LDS of one workgroup (KiB)")
    axes[0].plot([], [], "o", mfc="white", mec="black", mew=1.8, label="nothing beats it on both")
    axes[0].plot([], [], "s", color="#aaaaaa", label="noisy")
    axes[0].plot([], [], "x", color="black", label="doesn't fit")
    axes[0].plot([], [], color=RED, lw=1.5, label="limit")
    axes[0].plot([], [], color="black", lw=1, ls="--", label="roof")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="outside upper left")
    return figure


def _draw_tile(
    axis: Axes, of_tile: pd.DataFrame, marked: pd.DataFrame, name: str, below: int
) -> None:
    timed = of_tile.dropna(subset=["tflops"])
    kib = timed["lds_bytes"].astype(float) / KIB
    axis.plot(kib, timed["tflops"].astype(float), color="#aaaaaa", lw=1, zorder=1)
    for row in timed.itertuples():
        ringed, noisy = marked.loc[row.Index, [trade.FRONT, "noisy"]]
        axis.plot(
            row.lds_bytes / KIB,
            row.tflops,
            "s" if noisy else "o",
            ms=12,
            color=stage_colour(row.num_stages),
            mec="black" if ringed else "none",
            mew=1.8,
        )
        axis.annotate(
            str(row.num_stages),
            (row.lds_bytes / KIB, row.tflops),
            ha="center",
            va="center_baseline",
            fontsize=8,
            fontweight="bold",
            color="black" if row.num_stages in (1, 5, 6) else "white",
        )
    for row in of_tile[of_tile["tflops"].isna() & of_tile["lds_bytes"].notna()].itertuples():
        x = row.lds_bytes / KIB
        place: Any = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(x, 0.05, "x", color=stage_colour(row.num_stages), mew=2, **place)
    if len(timed):
        axis.annotate(
            name,
            (kib.iloc[0], timed["tflops"].iloc[0]),
            (0, -9 if below else 9),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=7,
        )


def _draw_roofs(axis: Axes, panel: pd.DataFrame, highest: float) -> None:
    """Draw the roof of each problem, and say which of the two it is."""
    roofs = panel.dropna(subset=["roof_tflops"]).groupby("tp", sort=False)["roof_tflops"].first()
    upper = roofs.max()
    for roof, of_roof in roofs.groupby(roofs):
        # Compute's roof is the same for every problem, bandwidth's is lower.
        which = "compute" if roof == highest else "bandwidth"
        shards = ", ".join(map(str, of_roof.index)) if roofs.nunique() > 1 else ""
        axis.axhline(roof, color="black", lw=1, ls="--")
        axis.annotate(
            f"{which}{shards and f', TP {shards}'}: {roof:,.0f}",
            (0, roof),
            (3, 2 if roof == upper else -2),
            textcoords="offset points",
            va="bottom" if roof == upper else "top",
            fontsize=7,
        )


def _plain_ticks(axis: Axes) -> None:
    """Label a logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def further_stages(steps: pd.DataFrame) -> Figure:
    """Draw what each further stage brings, a point per problem and a bar at the median.

    Args:
        steps: of `trade.further`.
    """
    timed = steps.dropna(subset=[trade.GAIN])
    panels = list(timed.groupby(["kernel", "model"], sort=False))
    if not panels:
        return empty("no two neighbouring stage counts were measured")
    figure, axes = panels_of(panels, 2.7)
    for axis, ((kernel, model), panel) in zip(axes, panels, strict=True):
        at_each = list(panel.groupby(trade.STEP))
        for x, (step, of_step) in enumerate(at_each):
            colour = stage_colour(int(str(step).split(" -> ")[1]))
            gains = of_step[trade.GAIN].astype(float)
            # Side by side in order of M, so that points don't hide each other.
            order = of_step["m"].rank(method="first").to_numpy()
            spots = x + (order / (len(order) + 1) - 0.5) * 0.6
            axis.plot(spots, gains, "o", ms=3.5, color=colour, mec="none", alpha=0.8)
            axis.plot([x - 0.35, x + 0.35], [gains.median()] * 2, color="black", lw=2)
        axis.axhline(0, color="black", lw=0.8)
        labels = [f"{step}\n+{of_step[trade.ADDED].max() / KIB:.0f}" for step, of_step in at_each]
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.6, len(labels) - 0.4)
        axis.grid(axis="y")
        axis.grid(visible=False, axis="x")
        axis.set_title(f"{kernel}\n{model}", fontsize=9)
        axis.set_ylabel("throughput gained (%)")
    for axis in axes[-2:]:
        axis.set_xlabel("stages, and the most KiB that the last adds")
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
        len(panels), 1, figsize=(9.5, 2.1 * len(panels)), sharex=True, sharey=True, squeeze=False
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
