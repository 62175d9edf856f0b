"""What all figures share: size, colours, an empty one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .. import inert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
F = TypeVar("F")

KIB = 1024

# Okabe and Ito's palette, told apart by the colour-blind: jfly.uni-koeln.de/color.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, GREY = "#56B4E9", "#D55E00", "#666666"
# Of things without an order, such as tiles and models.
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
# Of stage counts, from 1: the palette without the red of limits.
_STAGES = (ORANGE, BLUE, GREEN, PURPLE, SKY, "#F0E442", "black", GREY)
ROW_INCHES = 0.36


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


def picture(draw: Callable[P, F]) -> Callable[P, F]:
    """Let a function draw the names in its frames as they are: short, on a line, no formulas.

    A name that is no formula (``$``) would end the drawing, a long one take all of it.
    """

    @functools.wraps(draw)
    def drawn(*given: P.args, **named: P.kwargs) -> F:
        import matplotlib as mpl

        with mpl.rc_context({"text.parse_math": False}):
            short = {name: _short(value) for name, value in named.items()}
            return draw(*map(_short, given), **short)

    return drawn


def _short(given: Any) -> Any:
    import pandas as pd

    if not isinstance(given, pd.DataFrame):
        return given
    short = inert.frame(given, most=inert.SHORT)
    # Samples are JSON, which is read and not drawn.
    return short.assign(**{name: given[name] for name in given if name[:7] == "samples"})


def subplots(*shape: int, **options: Any) -> tuple[Figure, Any]:
    """Make a figure that a notebook shows once: as the value of its cell."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, **options)
    plt.close(figure)
    return figure, axes


def mosaic(places: list[list[Any]], **options: Any) -> tuple[Figure, dict[Any, Any]]:
    """Make a figure with a panel for each name in ``places``; ``"."`` stays free."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(places, **options)
    plt.close(figure)
    return figure, axes


def empty(why: str) -> Figure:
    """Say in a figure's place why there is none."""
    figure, axis = subplots(figsize=(9.5, 3 * ROW_INCHES))
    axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes)
    axis.set_axis_off()
    return figure


def stage_colour(num_stages: int) -> str:
    """Give a stage count the same colour in every picture."""
    return _STAGES[min(num_stages, len(_STAGES)) - 1]
