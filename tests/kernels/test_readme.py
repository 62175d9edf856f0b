"""The README's layer runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from moelab.kernels.moe_gemm_a8w4 import reference

README = Path(__file__).parents[2] / "README.md"


def test_the_layer_of_the_readme_gives_one_row_per_token(device):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (layer,) = [block for block in blocks if "reduce_top_k" in block]
    names = {}
    exec(layer.replace('device = "cuda"', f"device = {str(device)!r}"), names)
    of = SimpleNamespace(**names)
    second = {"gather": False, "weighted": True, "scatter": True}
    expected = reference(of.h, of.down, of.h_scale, of.down_scale, of.routing, **second)
    expected = expected.unflatten(0, (of.tokens, of.top_k)).sum(1)
    # A row and their sum are rounded to bf16 each.
    allowed = 2**-7 * of.y.double().abs().unflatten(0, (of.tokens, of.top_k)).sum(1)
    assert ((of.out.double() - expected).abs() <= allowed + 1e-3 * expected.abs().max()).all()
