"""Skip what needs a GPU where there is none."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch
    import triton

    if triton.knobs.runtime.interpret:
        reason = "TRITON_INTERPRET=1 runs kernels on the CPU; this shape needs a GPU"
    elif not torch.cuda.is_available():
        reason = "needs a GPU; torch.cuda.is_available() is False"
    else:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))
