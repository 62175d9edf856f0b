"""The kernels, by name. Each module reads top to bottom:

equation, kernel, ``source`` (its description for the compiler), launcher (named as the
module), ``cost`` and ``reference``. To add one, write such a module and name it here.
"""

from __future__ import annotations

import importlib
from types import ModuleType

KERNELS = (
    "moe_gemm_a8w8",
    "moe_gemm_a8w8_blockscale",
    "moe_gemm_a8w4",
    "moe_gemm_a4w4",
    "ff_a16w16_fused",
    "fused_gemm_afp4wfp4_a16w16",
)


def load(name: str) -> ModuleType:
    """Import a kernel's module, and Triton with it.

    Raises:
        ValueError: there is no such kernel; the message lists those there are.
    """
    if name not in KERNELS:
        raise ValueError(f"no kernel {name!r}; there are {', '.join(KERNELS)}")
    return importlib.import_module(f"{__name__}.{name}")
