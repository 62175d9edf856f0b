"""One kernel's LDS, buffer by buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..specs import Buffer
from .style import BLUE, GREEN, GREY, KIB, ORANGE, PURPLE, RED, SKY, empty, picture, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..lds_map import Told

# What a buffer is, for its colour.
_KINDS = {
    "tile, a band for each copy": BLUE,
    "tile, one copy": SKY,
    "scratch of one operation": ORANGE,
    "barrier": PURPLE,
    "call or warp groups": GREEN,
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


@picture
def lds_map(told: Told) -> Figure:
    """Draw where each buffer lies and when it lives: offset against program order."""
    buffers, lds_bytes, lds_limit = told.map.buffers, told.lds_bytes, told.lds_limit
    if not buffers:
        return empty(f"{told.title}: {told.map.missing or 'no buffer in LDS'}")
    figure, axis = subplots(figsize=(9.5, 5.6))
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
