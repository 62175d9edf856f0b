"""Measured throughput against LDS and stages."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from .. import measurements, trade
from .style import KIB, PALETTE, RED, empty, mosaic, picture, stage_colour, subplots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels_of(
    groups: Sequence[Any], height: float, wide: Sequence[bool] = (), **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel per group, two in a row, or one where it is ``wide``."""
    rows: list[list[int | str]] = []
    for number, alone in enumerate(wide or [len(groups) == 1] * len(groups)):
        if alone:
            rows.append([number, number])
        elif rows and rows[-1][1] == ".":
            rows[-1][1] = number
        else:
            rows.append([number, "."])
    # One that stands by itself with many lines gets more height, too.
    heights = [1.6 if wide and row[0] == row[1] else 1 for row in rows]
    figure, axes = mosaic(
        rows, figsize=(9.5, height * sum(heights)), height_ratios=heights, **options
    )
    return figure, [axes[number] for number in range(len(groups))]


# What tells the lines of a panel apart, and in which words.
_LINE = {"tp": "TP {}", "tile": "{}", "num_warps": "{} warps"}
# More lines than this in a panel are not told apart; what is on the front is.
_LINES = 4


@picture
def lds_against_throughput(rows: pd.DataFrame) -> Figure:
    """Draw LDS against useful TFLOP/s, a panel per kernel, model and layer.

    The number in a marker is its stage count; stage counts of a tile are joined. Ringed is
    what nothing beats on both, square what is noisy. At the foot stands what doesn't fit.
    Where there are many tiles, only what is on the front stands out; the letter beside it
    is its tile's, and names of letters stand at the foot.

    Args:
        rows: of `trade.measured`, of one token count (`trade.at`).
    """
    panels = list(rows.groupby([*trade.KIND, "layer"], sort=False))
    if rows["tflops"].isna().all():
        return empty("nothing was timed")
    crowded = [len(panel[[*_LINE]].drop_duplicates()) > _LINES for _, panel in panels]
    figure, axes = panels_of(panels, 2.9, crowded)
    highest = rows["roof_tflops"].max()
    # Measured anew in each run: of each the highest is compute's.
    compute = rows.groupby("run", dropna=False)["roof_tflops"].transform("max")
    for axis, ((*kind, layer), panel), many in zip(axes, panels, crowded, strict=True):
        # What all lines share stands in the title.
        apart = [name for name in _LINE if panel[name].nunique() > 1]
        shared = [f"layer {layer}", *(panel["tile"].iloc[:1] if "tile" not in apart else [])]
        kernel, model = trade.named(*kind).split(", ", 1)
        axis.set_title(f"{kernel}\n{model}, {', '.join(shared)}", fontsize=9)
        marked = trade.front(panel).assign(noisy=measurements.noisy(panel))
        key: list[str] = []
        for number, (names, of_tile) in enumerate(panel.groupby([*_LINE], sort=False)):
            words = dict(zip(_LINE, names, strict=True))
            name = ", ".join(_LINE[what].format(words[what]) for what in apart)
            at = of_tile.sort_values("num_stages")
            if many and marked.loc[marked.index.isin(at.index), trade.FRONT].any():
                key.append(f"{ascii_lowercase[len(key) % 26]}  {name}")
                name = key[-1][0]
            _draw_tile(axis, at, marked, name, below=number % 2, many=many)
        if panel["tflops"].isna().all():
            axis.text(0.5, 0.5, "nothing fits", ha="center", transform=axis.transAxes)
        limit = panel["lds_limit"].iloc[0] / KIB
        axis.axvline(limit, color=RED, lw=1.5)
        _draw_roofs(axis, panel.assign(compute=compute))
        axis.set_xlim(0, max(limit, panel["lds_bytes"].max() / KIB) * 1.08)
        axis.set_yscale("log")
        # The key takes the foot of a panel, below all that was timed.
        foot = panel["tflops"].min() / 2.5 if many else panel["tflops"].fillna(highest / 10).min()
        axis.set_ylim(foot / 2.5, highest * 1.8)
        half = -(-len(key) // 2)
        for x, names in ((0.02, key[:half]), (0.35, key[half:])):
            axis.text(x, 0.02, "\n".join(names), fontsize=7, transform=axis.transAxes)
        axis.set_ylabel("TFLOP/s")
        _plain_ticks(axis)
    figure.supxlabel("LDS of one workgroup (KiB)", fontsize=10)
    axes[0].plot([], [], "o", mfc="white", mec="black", mew=1.8, label="nothing beats it on both")
    axes[0].plot([], [], "s", color="#aaaaaa", label="noisy")
    axes[0].plot([], [], "x", color="black", label="doesn't fit")
    axes[0].plot([], [], color=RED, lw=1.5, label="limit")
    axes[0].plot([], [], color="black", lw=1, ls="--", label="roof")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="outside upper left")
    return figure


def _draw_tile(
    axis: Axes, of_tile: pd.DataFrame, marked: pd.DataFrame, name: str, below: int, many: bool
) -> None:
    timed = of_tile.dropna(subset=["tflops"])
    kib = timed["lds_bytes"].astype(float) / KIB
    if not many:
        axis.plot(kib, timed["tflops"].astype(float), color="#aaaaaa", lw=1, zorder=1)
    for place, row in enumerate(timed.itertuples()):
        ringed, noisy = marked.loc[row.Index, [trade.FRONT, "noisy"]]
        faint = many and not ringed
        axis.plot(
            row.lds_bytes / KIB,
            row.tflops,
            "s" if noisy else "o",
            ms=8 if faint else 12,
            color=stage_colour(row.num_stages),
            mec="black" if ringed else "none",
            mew=1.8,
            alpha=0.5 if faint else 1,
            zorder=2 if faint else 3,
        )
        axis.annotate(
            "" if faint else str(row.num_stages),
            (row.lds_bytes / KIB, row.tflops),
            ha="center",
            va="center_baseline",
            fontsize=8,
            fontweight="bold",
            color="black" if row.num_stages in (1, 5, 6) else "white",
            zorder=4,
        )
        if many and ringed:
            _name(axis, row, name, (10, 0), ha="left", va="center")
        elif not many and place == 0:
            side = "top" if below else "bottom"
            _name(axis, row, name, (0, -9 if below else 9), ha="center", va=side)
    for row in of_tile[of_tile["tflops"].isna() & of_tile["lds_bytes"].notna()].itertuples():
        foot: Any = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        x = row.lds_bytes / KIB
        axis.plot(x, 0.05, "x", color=stage_colour(row.num_stages), mew=2, **foot)


def _name(axis: Axes, row: Any, name: str, offset: tuple[float, float], **looks: Any) -> None:
    at = (row.lds_bytes / KIB, row.tflops)
    axis.annotate(name, at, offset, textcoords="offset points", fontsize=7, zorder=4, **looks)


def _draw_roofs(axis: Axes, panel: pd.DataFrame) -> None:
    """Draw the roof of each problem, and say which of the two it is.

    Args:
        panel: with ``compute``, the roof that compute alone allows; bandwidth's is lower.
    """
    roofs = panel.dropna(subset=["roof_tflops"]).groupby("tp", sort=False).first()
    upper = roofs["roof_tflops"].max()
    for roof, of_roof in roofs.groupby("roof_tflops"):
        which = "compute" if roof == of_roof["compute"].iloc[0] else "bandwidth"
        shards = ", ".join(map(str, of_roof.index)) if roofs["roof_tflops"].nunique() > 1 else ""
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


@picture
def further_stages(steps: pd.DataFrame) -> Figure:
    """Draw what each further stage brings, a point per problem and a bar at the median.

    Args:
        steps: of `trade.further`.
    """
    timed = steps.dropna(subset=[trade.GAIN])
    panels = list(timed.groupby(trade.KIND, sort=False))
    if not panels:
        return empty("no two neighbouring stage counts were measured")
    figure, axes = panels_of(panels, 2.7)
    for axis, (kind, panel) in zip(axes, panels, strict=True):
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
        axis.set_title("\n".join(trade.named(*kind).split(", ", 1)), fontsize=9)
        axis.set_ylabel("throughput gained (%)")
    figure.supxlabel("stages, and the most KiB that the last adds", fontsize=10)
    return figure


@picture
def one_stage_loss(compared: pd.DataFrame) -> Figure:
    """Draw what one stage loses against the best stage count, over tokens.

    Args:
        compared: of `trade.stages`.
    """
    panels = list(compared.groupby(trade.KIND, sort=False))
    if not panels:
        return empty("no tile was measured with one stage")
    figure, axes = subplots(
        len(panels), 1, figsize=(9.5, 2.1 * len(panels)), sharex=True, sharey=True, squeeze=False
    )
    for axis, (kind, panel) in zip(axes[:, 0], panels, strict=True):
        lines = panel.groupby(["layer", "tp"], sort=False)
        for ((layer, tp), line), colour in zip(lines, PALETTE, strict=False):
            axis.plot(line["m"].astype(float), line[trade.LOSS], "o", ms=4, color=colour)
            # Through the middle where several tiles were timed.
            middle = line.groupby("m")[[trade.LOSS, trade.LOSS_LOW, trade.LOSS_HIGH]].median()
            m, (loss, low, high) = middle.index.astype(float), middle.to_numpy(float).T
            axis.plot(m, loss, "-", color=colour, marker="", label=f"layer {layer}, TP {tp}")
            axis.fill_between(m, low, high, color=colour, alpha=0.2, lw=0)
        axis.set_title(trade.named(*kind))
        axis.set_ylabel("loss (%)")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0, 0].set_ylim(-2, compared[trade.LOSS_HIGH].max() * 1.1)
    axes[-1, 0].set_xlabel("tokens before top-k")
    return figure
