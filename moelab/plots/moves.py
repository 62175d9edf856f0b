"""LDS before and after: another setting of async copy, another Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import tables
from .style import BLUE, GREY, KIB, ORANGE, RED, ROW_INCHES, empty, picture, subplots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# More arrows than this are no picture any more.
_MOST = 24


@picture
def async_copy_difference(rows: pd.DataFrame, num_stages: int = 2) -> Figure:
    """Draw from LDS with async copy off to LDS with it on, at one stage count."""
    difference = tables.async_copy_difference(rows)
    difference = difference[difference["num_stages"] == num_stages].iloc[::-1]
    if difference.empty:
        return empty(f"no row with {num_stages} stages and both settings of async copy")
    return _moves(
        difference,
        ["off (bytes)", "on (bytes)", "limit (bytes)"],
        ["async copy off", "async copy on"],
        f"LDS of one workgroup at {num_stages} stages (KiB)",
    )


@picture
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
        return empty(f"LDS is the same under Triton {before} and {after}")
    moved = moved[[*asked, *figures, "verdict"]].drop_duplicates()
    return _moves(
        tables.in_tile_order(moved).iloc[::-1],
        figures,
        [f"Triton {before}", f"Triton {after}"],
        "LDS of one workgroup (KiB)",
    )


@picture
def fits(table: pd.DataFrame) -> Figure | None:
    """Draw from the baseline's LDS to the candidate's, where the fit changed or there is none.

    Args:
        table: of `regression_report.fits`.
    Returns:
        None where no LDS moved.
    """
    ends = ["LDS was (bytes)", "is (bytes)", "limit (bytes)"]
    told = table.dropna(subset=ends) if len(table) else table
    moved = told[told[ends[0]] != told[ends[1]]] if len(told) else told
    if moved.empty:
        return None
    moved = moved.rename(columns={"became": "verdict", "stages": "num_stages"})
    names = ["baseline", "candidate"]
    return _moves(moved.head(_MOST).iloc[::-1], ends, names, "LDS of one workgroup (KiB)")


def _moves(table: pd.DataFrame, ends: list[str], names: list[str], title: str) -> Figure:
    """Draw an arrow per row: from the first of ``ends`` to the second, the third as limit."""
    figure, axis = subplots(figsize=(9.5, max(len(table), 3) * ROW_INCHES + 1.2))
    in_kib: Any = table[ends].astype(float) / KIB
    for y, (row, ends_of_row) in enumerate(
        zip(table.itertuples(), in_kib.itertuples(index=False), strict=True)
    ):
        start, stop, limit = ends_of_row
        axis.annotate(
            "", (stop, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.5}
        )
        for end, colour in ((start, BLUE), (stop, ORANGE)):
            filled = colour if end <= limit else "white"
            axis.plot(end, y, "o", ms=9, mec=colour, mew=1.5, mfc=filled)
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
