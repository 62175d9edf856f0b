"""What block scales add: one for 128 elements of a row of x, one for 128 x 128 of w."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_gemm import LARGE, make, spread

from moelab.specs import Tile

KERNEL = "moe_gemm_a8w8_blockscale"
SMALL = Tile(16, 64, 128)
every_tile = pytest.mark.parametrize(
    "tile", [SMALL, pytest.param(LARGE, marks=pytest.mark.gpu)], ids=str
)


@pytest.fixture
def case(tile, device_generator):
    """Rows of x that see one block of k each: row i sees block i alone."""
    expert = torch.zeros(3, 1, dtype=torch.int64, device=device_generator.device)
    case = make(KERNEL, device_generator, expert, tile, experts=1, n=200, k=300)
    x = torch.zeros(case.x.shape, device=case.x.device)
    for block in range(3):
        x[block, 128 * block : 128 * (block + 1)] = 1.0
    return replace(case, x=x.to(case.x.dtype))


@every_tile
def test_a_scale_of_x_moves_its_own_row_and_block_alone(tile, case):
    y = case.launch(tile)
    case.check(y)
    doubled = case.x_scale.clone()
    doubled[1] = torch.tensor([7.0, 2 * doubled[1, 1], 5.0])
    expected = y.clone()
    # Of row 1 only the middle block is not zero.
    expected[1] *= 2
    assert torch.equal(replace(case, x_scale=doubled).launch(tile), expected)


@every_tile
@pytest.mark.parametrize(("block_n", "block_k"), [(0, 0), (1, 1), (1, 2), (0, 2)])
def test_a_scale_of_w_moves_its_own_128_by_128_alone(tile, case, block_n, block_k):
    y = case.launch(tile)
    doubled = case.w_scale.clone()
    doubled[0, block_n, block_k] *= 2
    expected = y.clone()
    expected[block_k, 128 * block_n : 128 * (block_n + 1)] *= 2
    assert not torch.equal(expected, y)
    assert torch.equal(replace(case, w_scale=doubled).launch(tile), expected)


@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_a_step_may_be_a_part_of_a_block(block_k, device_generator):
    tile = Tile(16, 64, block_k)
    expert = spread(device_generator, m=5, experts=3, top_k=2)
    case = make(KERNEL, device_generator, expert, tile, experts=3, n=136, k=333)
    case.check(case.launch(tile, num_warps=4))


def test_fnuz_is_taken_too(device, device_generator):
    if device == "cuda" and not torch.version.hip:
        pytest.skip("Triton takes fp8e4b8 (e4m3fnuz) on AMD's gfx942 and its interpreter alone")
    expert = spread(device_generator, m=5, experts=3, top_k=2)
    fp8 = torch.float8_e4m3fnuz
    case = make(KERNEL, device_generator, expert, SMALL, experts=3, n=40, k=200, fp8=fp8)
    assert case.x.dtype == case.w.dtype == fp8
    case.check(case.launch(SMALL, num_warps=4))
    y_scale = torch.full((1,), 2**-5, device=device)
    y = case.launch(SMALL, num_warps=4, y_format="fp8", y_scale=y_scale)
    assert y.dtype == fp8
    case.check(y, y_scale=y_scale)
