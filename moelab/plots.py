"""Pictures of rows. Each function takes a frame and returns a matplotlib figure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import estimates, tables, trade
from .specs import Buffer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .lds_map import Told

KIB = 1024

# Okabe and Ito's palette, told apart by the colour-blind: jfly.uni-koeln.de/color.
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#666666"
_SWITCH = {"off": BLUE, "on": ORANGE, "no switch": BLUE}
_ROW_INCHES = 0.36


def use_style() -> None:
    """Set what all figures share."""
    import matplotlib as mpl

    mpl.rcParams |= {
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "savefig.facecolor": "white",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "grid.color": "#e4e4e4",
        "font.size": 10,
        "legend.frameon": False,
    }


def _subplots(*shape: int, **options: Any) -> tuple[Figure, Any]:
    """Make a figure that a notebook shows once: as the value of its cell."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, **options)
    plt.close(figure)
    return figure, axes


def _empty(why: str) -> Figure:
    """Say in a figure's place why there is none."""
    figure, axis = _subplots(figsize=(9.5, 3 * _ROW_INCHES + 1.2))
    axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes)
    axis.set_axis_off()
    return figure


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
        return _empty("no row whose LDS is known")
    panels = list(worst.groupby(["kernel", "target"]))
    heights = [max(len(panel.groupby(["tile", "num_warps"])), 2) for _, panel in panels]
    figure, axes = _subplots(
        len(panels),
        1,
        figsize=(9.5, sum(heights) * 2 * _ROW_INCHES + 1.1 * len(panels)),
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


def async_copy_difference(rows: pd.DataFrame, num_stages: int = 2) -> Figure:
    """Draw from LDS with async copy off to LDS with it on, at one stage count."""
    difference = tables.async_copy_difference(rows)
    difference = difference[difference["num_stages"] == num_stages].iloc[::-1]
    if difference.empty:
        return _empty(f"no row with {num_stages} stages and both settings of async copy")
    return _moves(
        difference,
        ["off (bytes)", "on (bytes)", "limit (bytes)"],
        ["async copy off", "async copy on"],
        f"LDS of one workgroup at {num_stages} stages (KiB)",
    )


def upgrade(paired: pd.DataFrame) -> Figure:
    """Draw from LDS under one Triton to LDS under the last other, where it changed.

    Args:
        paired: of `moelab.upgrade.pairs`.
    """
    before, after = paired[["Triton before", "Triton after"]].iloc[-1]
    paired = paired[paired["Triton after"] == after]
    figures = ["lds_bytes before", "lds_bytes after", "lds_limit"]
    asked = ["kernel", "target", "tile", "num_warps", "num_stages"]
    moved = paired[paired[figures[0]] != paired[figures[1]]].dropna(subset=figures)
    if moved.empty:
        return _empty(f"LDS is the same under Triton {before} and {after}")
    moved = moved[[*asked, *figures, "verdict"]].drop_duplicates()
    return _moves(
        tables.in_tile_order(moved).iloc[::-1],
        figures,
        [f"Triton {before}", f"Triton {after}"],
        "LDS of one workgroup (KiB)",
    )


def _moves(table: pd.DataFrame, ends: list[str], names: list[str], title: str) -> Figure:
    """Draw an arrow per row: from the first of ``ends`` to the second, the third as limit."""
    figure, axis = _subplots(figsize=(9.5, max(len(table), 3) * _ROW_INCHES + 1.2))
    in_kib: Any = table[ends].astype(float) / KIB
    for y, (row, end) in enumerate(
        zip(table.itertuples(), in_kib.itertuples(index=False), strict=True)
    ):
        start, stop, limit = end
        axis.annotate(
            "", (stop, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.5}
        )
        axis.plot(start, y, "o", ms=9, color=BLUE)
        filled = ORANGE if stop <= limit else "white"
        axis.plot(stop, y, "o", ms=9, mec=ORANGE, mew=1.5, mfc=filled)
        axis.plot([limit, limit], [y - 0.45, y + 0.45], color=RED, lw=1.5)
        # The box keeps the word readable where the limit's line passes behind it.
        box = {"facecolor": "white", "lw": 0, "pad": 1}
        axis.annotate(
            row.verdict,
            (max(start, stop), y),
            (9, 0),
            textcoords="offset points",
            va="center",
            bbox=box,
        )
    labels = [
        f"{row.kernel} {row.target}\n{row.tile}, {row.num_warps} warps, {row.num_stages} stages"
        for row in table.itertuples()
    ]
    axis.set_yticks(range(len(table)), labels, fontsize=8)
    axis.set_xlim(0, in_kib.to_numpy().max() * 1.22)
    axis.set_xlabel(title)
    for marker, colour, label in (
        ("o", BLUE, names[0]),
        ("o", ORANGE, names[1]),
        ("|", RED, "limit"),
    ):
        axis.plot([], [], marker, ms=9, mew=1.5, color=colour, label=label)
    axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


# Of kernels: Okabe and Ito's too, with a marker each.
_KERNEL_LOOKS = {
    "moe_gemm_a8w8": ("#0072B2", "o"),
    "moe_gemm_a8w8_blockscale": ("#56B4E9", "s"),
    "moe_gemm_a8w4": ("#E69F00", "^"),
    "moe_gemm_a4w4": ("#009E73", "D"),
}
_VERDICT_LOOKS = {
    estimates.RIGHT: "#BBBBBB",
    estimates.REJECTS: BLUE,
    estimates.ADMITS: RED,
}


def estimates_on_trial(judged: pd.DataFrame) -> Figure:
    """Draw estimated against compiled bytes, a row per estimate and a column per target.

    Args:
        judged: of `estimates.judge`. Hollow markers are not spoken of by the estimate; counts
            in the shaded quadrants are of what is spoken of, in brackets of the rest.
    """
    if judged.empty:
        return _empty("no row whose LDS is known")
    names = [of.name for of in estimates.ESTIMATES if of.name in set(judged["estimate"])]
    columns = list(dict.fromkeys(judged["target"]))
    figure, axes = _subplots(
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


def verdicts(judged: pd.DataFrame) -> Figure:
    """Draw how many configurations each estimate gets right, rejects and admits wrongly.

    Only what it speaks of counts; a bar per estimate and target.
    """
    spoken = judged[judged[estimates.SPOKEN_OF]]
    if spoken.empty:
        return _empty("no configuration that an estimate speaks of")
    bars = [
        (f"{of.name}\non {target}", group["verdict"].value_counts())
        for of in estimates.ESTIMATES
        for target, group in spoken[spoken["estimate"] == of.name].groupby("target", sort=False)
    ][::-1]
    figure, axis = _subplots(figsize=(9.5, max(len(bars), 3) * 1.5 * _ROW_INCHES + 1.2))
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


# What a buffer is, for its colour; sky blue, purple and green are of the same palette.
_KINDS = {
    "tile, a band for each copy": BLUE,
    "tile, one copy": "#56B4E9",
    "scratch of one operation": ORANGE,
    "barrier": "#CC79A7",
    "call or warp groups": "#009E73",
}
_LABEL = 8.5


def _kind(buffer: Buffer) -> str:
    if buffer.operation in ("call", "func", "warp_specialize"):
        return "call or warp groups"
    if buffer.operation != "local_alloc":
        return "scratch of one operation"
    if buffer.name.startswith("mbarrier"):
        return "barrier"
    return "tile, a band for each copy" if buffer.copies > 1 else "tile, one copy"


def lds_map(told: Told) -> Figure:
    """Draw where each buffer lies and when it lives: offset against program order."""
    buffers, lds_bytes, lds_limit = told.map.buffers, told.lds_bytes, told.lds_limit
    if not buffers:
        return _empty(f"{told.title}: {told.map.missing or 'no buffer in LDS'}")
    figure, axis = _subplots(figsize=(9.5, 5.6))
    first = min(buffer.first for buffer in buffers)
    last = max(told.map.positions, *(buffer.last for buffer in buffers))
    # Room on the left for what the limit's line is called.
    axis.set_xlim(first - (last - first) * 0.2, last)
    axis.set_ylim(0, max(lds_bytes, lds_limit) / KIB * 1.1)
    kinds = {kind: colour for kind, colour in _KINDS.items() if kind in map(_kind, buffers)}
    # Scratch lives for one operation of hundreds: drawn wide enough to be seen.
    widths = [max(buffer.last - buffer.first, (last - first) / 70) for buffer in buffers]
    for buffer, width in zip(buffers, widths, strict=True):
        _draw_bands(axis, buffer, width, kinds[_kind(buffer)])
    _label_buffers(axis, buffers, widths)
    axis.axhline(lds_limit / KIB, color=RED, lw=1.5)
    axis.annotate(
        f"limit {lds_limit / KIB:g} KiB",
        (0, lds_limit / KIB),
        (3, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=RED,
        bbox={"facecolor": "white", "lw": 0, "pad": 1},
    )
    for kind, colour in kinds.items():
        axis.bar(0, 0, color=colour, label=kind)
    if any(buffer.padding_bytes for buffer in buffers):
        axis.bar(0, 0, color="white", hatch="//////", edgecolor=GREY, lw=0, label="padding")
    axis.legend(ncols=len(kinds) + 1, loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=_LABEL)
    axis.set_title(f"{told.title}: {lds_bytes:,} bytes", fontsize=10)
    axis.set_xlabel("program order (operations)")
    axis.set_ylabel("offset (KiB)")
    return figure


def _draw_bands(axis: Axes, buffer: Buffer, width: float, colour: str) -> None:
    """Draw each copy, and the share of it that is padding, hatched at its end."""
    size = buffer.size_bytes / buffer.copies / KIB
    padding = buffer.padding_bytes / buffer.copies / KIB
    # A barrier has 8 bytes: drawn high enough to be seen, and without an edge over it.
    lowest = axis.get_ylim()[1] / 150
    edge: Any = {"edgecolor": "white", "lw": 1} if size > lowest else {"lw": 0, "zorder": 3}
    for copy in range(buffer.copies):
        bottom = buffer.offset / KIB + copy * size
        place: Any = {"width": width, "align": "edge", "color": colour}
        axis.bar(buffer.first, max(size, lowest), bottom=bottom, **edge, **place)
        axis.bar(
            buffer.first,
            padding,
            bottom=bottom + size - padding,
            hatch="//////",
            edgecolor="white",
            lw=0,
            **place,
        )


def _label_buffers(axis: Axes, buffers: Sequence[Buffer], widths: Sequence[float]) -> None:
    """Name buffers inside where there is room, else beside the picture, each on a line."""
    start, stop = axis.get_xlim()
    top = axis.get_ylim()[1]
    beside: dict[str, list[tuple[float, float]]] = {}
    for buffer, width in zip(buffers, widths, strict=True):
        size = buffer.size_bytes / buffer.copies
        each = f"{size / KIB:.1f} KiB" if size >= KIB else f"{size:g} B"
        # The file's name would take half the picture.
        name = buffer.name
        if buffer.line:
            name = name.replace(buffer.line, f"line {buffer.line.rpartition(':')[2]}")
        words = f"{name}: {f'{buffer.copies} x ' if buffer.copies > 1 else ''}{each}"
        # In the first of the bands, if it is high enough for a line.
        inside = size if size / KIB > top / 27 else buffer.size_bytes
        middle = (buffer.offset + inside / 2) / KIB
        # About 85 letters fit across the picture, 27 lines into its height.
        if width / (stop - start) > len(words) / 85 and inside / KIB > top / 27:
            box = {"facecolor": "white", "lw": 0, "pad": 1.5}
            centre = buffer.first + width / 2
            axis.text(centre, middle, words, ha="center", va="center", fontsize=_LABEL, bbox=box)
        else:
            beside.setdefault(words, []).append((buffer.first + width, middle))
    height = 0.0
    for words, ends in sorted(beside.items(), key=lambda item: item[1][0][1]):
        height = max(height + top / 27, ends[0][1])
        times = f"{len(ends)} buffers, " if len(ends) > 1 else ""
        for end in ends:
            axis.annotate(
                times + words if end == ends[0] else "",
                end,
                (1.02, height),
                textcoords=("axes fraction", "data"),
                va="center",
                fontsize=_LABEL,
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "relpos": (0, 0.5)},
            )


# Of tiles and models: Okabe and Ito's palette.
_PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", RED)


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
        return _empty(f"nothing was measured at {m} tokens")
    figure, axes = _subplots(
        -(-len(panels) // 2), 2, figsize=(10, 3.1 * -(-len(panels) // 2)), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((kernel, model, layer), panel) in zip(axes.flat, panels, strict=False):
        tilings = list(panel.groupby(["tp", "tile", "num_warps"], sort=False))
        for ((tp, tile, warps), of_tile), colour in zip(tilings, _PALETTE, strict=False):
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
        return _empty("no tile was measured with one stage")
    figure, axes = _subplots(
        len(panels), 1, figsize=(9.5, 2.3 * len(panels)), sharex=True, sharey=True, squeeze=False
    )
    for axis, ((kernel, model), panel) in zip(axes[:, 0], panels, strict=True):
        lines = panel.groupby(["layer", "tp"], sort=False)
        for ((layer, tp), line), colour in zip(lines, _PALETTE, strict=False):
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
