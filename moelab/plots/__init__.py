"""Pictures of rows. Each function takes a frame and returns a matplotlib figure.

One module for each thing that is drawn; notebooks call all of them as `plots.NAME`.
"""

from .maps import lds_map
from .moves import async_copy_difference, upgrade
from .stages import lds_against_limit
from .style import KIB, RED, use_style
from .throughput import lds_against_throughput, one_stage_loss
from .trial import estimates_on_trial, verdicts

__all__ = [
    "KIB",
    "RED",
    "async_copy_difference",
    "estimates_on_trial",
    "lds_against_limit",
    "lds_against_throughput",
    "lds_map",
    "one_stage_loss",
    "upgrade",
    "use_style",
    "verdicts",
]
