"""What mxfp4 weights add: codes, their packing, a scale per 32 along K, and its layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_gemm import every_tile, make, spread

from moelab.kernels.formats import dequantize_mxfp4, shuffle_scales_cdna4
from moelab.specs import Tile


@every_tile
def test_every_code_and_scale_comes_through_an_identity_exactly(tile, device_generator):
    """x is the identity times 2, so y is w transposed, times 2.

    Scales stay 2^100 from either end of bf16, into which chips without mxfp4 widen w.
    """
    device, n, k = device_generator.device, 40, 150
    expert = torch.zeros(k, 1, dtype=torch.int64, device=device)
    case = make("moe_gemm_a8w4", device_generator, expert, tile, experts=1, n=n, k=k)
    w = torch.randint(0, 256, case.w.shape, generator=device_generator, device=device)
    w_scale = torch.randint(27, 228, case.w_scale.shape, generator=device_generator, device=device)
    nibbles = torch.cat((w % 16, w // 16)).unique()
    assert len(nibbles) == 16, "not every code is in w"
    case = replace(
        case,
        x=torch.eye(k, device=device).to(case.x.dtype),
        x_scale=torch.full((1,), 2.0, device=device),
        w=w.to(torch.uint8),
        w_scale=w_scale.to(torch.uint8),
    )
    expected = 2.0 * dequantize_mxfp4(case.w, case.w_scale, k)[0].T
    assert torch.equal(case.launch(tile), expected)


@every_tile
def test_a_scale_moves_its_own_32_columns_alone(tile, device_generator):
    expert = torch.zeros(3, 1, dtype=torch.int64, device=device_generator.device)
    case = make("moe_gemm_a8w4", device_generator, expert, tile, experts=1, n=40, k=96)
    x = torch.zeros_like(case.x, dtype=torch.float32)
    # Row i of x sees group i of w alone.
    for group in range(3):
        x[group, 32 * group : 32 * (group + 1)] = 1.0
    case = replace(case, x=x.to(case.x.dtype))
    doubled = case.w_scale.clone()
    doubled[0, 7, 1] += 1
    y, moved = case.launch(tile), replace(case, w_scale=doubled).launch(tile)
    expected = y.clone()
    expected[1, 7] *= 2
    assert y[1, 7] != 0
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
@pytest.mark.parametrize("n", [32, 40, 72])
@pytest.mark.parametrize("k", [256, 288, 777])
def test_the_layout_of_scales_changes_no_bit(kernel, n, k, device_generator):
    tile = Tile(16, 64, 256)
    expert = spread(device_generator, m=6, experts=3, top_k=2)
    case = make(kernel, device_generator, expert, tile, experts=3, n=n, k=k)
    shuffled = replace(
        case,
        w_scale=shuffle_scales_cdna4(case.w_scale),
        own=case.own | {"scale_layout": "cdna4"},
    )
    assert torch.equal(shuffled.launch(tile, num_warps=4), case.launch(tile, num_warps=4))
    assert torch.equal(shuffled.expected(), case.expected())


@every_tile
def test_a_scale_of_x_moves_its_own_row_and_32_columns_alone(tile, device_generator):
    expert = torch.zeros(3, 1, dtype=torch.int64, device=device_generator.device)
    case = make(
        "moe_gemm_a8w4", device_generator, expert, tile, experts=1, n=40, k=96, x_format="mxfp8"
    )
    doubled = case.x_scale.clone()
    doubled[1, 2] += 1
    x = torch.zeros_like(case.x, dtype=torch.float32)
    # Row i of x sees group 2 of w alone.
    x[:, 64:] = 1.0
    case = replace(case, x=x.to(case.x.dtype))
    expected = case.launch(tile)
    expected[1] *= 2
    assert torch.equal(replace(case, x_scale=doubled).launch(tile), expected)
