"""Pictures of rows. Each function takes a frame and returns a matplotlib figure.

One module for each thing that is drawn; notebooks call all of them as `plots.NAME`.
"""

from .cells import cliffs_along_m, left_along_m, published_lds
from .comparison import (
    comparison_cliffs,
    moves_over_m_and_tp,
    published_over_m_and_tp,
    worst_samples,
)
from .maps import lds_map
from .moves import async_copy_difference, fits, upgrade
from .peers import ours_and_peers
from .stages import lds_against_limit
from .style import KIB, RED, stage_colour, use_style
from .throughput import further_stages, lds_against_throughput, one_stage_loss
from .trial import estimates_on_trial, verdicts

__all__ = [
    "KIB",
    "RED",
    "async_copy_difference",
    "cliffs_along_m",
    "comparison_cliffs",
    "estimates_on_trial",
    "fits",
    "further_stages",
    "lds_against_limit",
    "lds_against_throughput",
    "lds_map",
    "left_along_m",
    "moves_over_m_and_tp",
    "one_stage_loss",
    "ours_and_peers",
    "published_lds",
    "published_over_m_and_tp",
    "stage_colour",
    "upgrade",
    "use_style",
    "verdicts",
    "worst_samples",
]
