"""Ask Triton's compiler what a launch needs, for any target, without its GPU.

The one place that knows Triton's compiler. `lds` runs the backend's own pipeline and
leaves it as soon as its own allocation pass has been scheduled: what is read is what
the full compile would have reported, several times sooner. Where a Triton's internals
have not been checked, it compiles in full and says so.
"""

from .binding import (
    CompileError,
    Ir,
    Launch,
    bound_launch,
    cache_at,
    compile_key,
    default_async_copy,
    default_options,
    environment_variables,
    gpu_target,
    settings,
    specialize,
    specialize_source,
    specialize_types,
    static_assertion,
    triton_version,
)
from .maps import MapError, buffers
from .pipeline import (
    CHECKED_LOWERINGS,
    TMEM_COLUMNS,
    Allocation,
    frontend,
    full,
    is_checked,
    lds,
    lowering_fingerprint,
)
from .resources import Resources

__all__ = [
    "CHECKED_LOWERINGS",
    "TMEM_COLUMNS",
    "Allocation",
    "CompileError",
    "Ir",
    "Launch",
    "MapError",
    "Resources",
    "bound_launch",
    "buffers",
    "cache_at",
    "compile_key",
    "default_async_copy",
    "default_options",
    "environment_variables",
    "frontend",
    "full",
    "gpu_target",
    "is_checked",
    "lds",
    "lowering_fingerprint",
    "settings",
    "specialize",
    "specialize_source",
    "specialize_types",
    "static_assertion",
    "triton_version",
]
