"""The README's layer runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_layer_of_the_readme_gives_one_row_per_token(device):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (layer,) = [block for block in blocks if "reduce_top_k" in block]
    names = {"device": device}
    exec(layer, names)
    assert names["out"].shape == (names["tokens"], names["hidden"])
    assert torch.isfinite(names["out"]).all()
