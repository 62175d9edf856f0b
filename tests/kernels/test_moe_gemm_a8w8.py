"""What is fp8 x fp8's own: both kinds of e4m3, a scale per expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_gemm import PLAIN, every_tile, make, spread

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
every_fp8 = pytest.mark.parametrize("fp8", FP8, ids=str)


@pytest.fixture
def fp8_device(fp8, device):
    """Skip the fp8 type that no NVIDIA GPU has."""
    if fp8 == torch.float8_e4m3fnuz and device == "cuda" and not torch.version.hip:
        pytest.skip("Triton takes fp8e4b8 (e4m3fnuz) on AMD's gfx942 and its interpreter alone")
    return device


@every_tile
@every_fp8
@pytest.mark.parametrize("swiglu", [None, PLAIN], ids=["linear", "swiglu"])
def test_both_kinds_of_e4m3(tile, fp8, swiglu, fp8_device, device_generator):
    expert = spread(device_generator, m=6, experts=3, top_k=2)
    n, k = tile.block_n + 8, tile.block_k + 36
    case = make(
        "moe_gemm_a8w8",
        device_generator,
        expert,
        tile,
        experts=3,
        n=n,
        k=k,
        bias=True,
        swiglu=swiglu,
        fp8=fp8,
    )
    assert case.x.dtype == case.w.dtype == fp8
    case.check(case.launch(tile))


@every_tile
@every_fp8
def test_every_code_comes_through_an_identity_exactly(tile, fp8, fp8_device, device_generator):
    codes = torch.arange(256, dtype=torch.uint8, device=fp8_device)
    values = codes.view(fp8).float()
    w = torch.where(values.isnan(), 0.0, values).to(fp8).reshape(1, 8, 32)
    case = one_expert_reading_the_identity(device_generator, tile, n=8, k=32, fp8=fp8)
    case = replace(case, w=w)
    assert torch.equal(case.launch(tile), 8.0 * w[0].float().T)


@every_tile
def test_each_expert_has_its_own_scale(tile, device_generator):
    expert = spread(device_generator, m=12, experts=3, top_k=1)
    case = make("moe_gemm_a8w8", device_generator, expert, tile, experts=3, n=40, k=64)
    scales = torch.tensor([2.0**-12, 1.0, 2.0**12], device=expert.device)
    scaled = replace(case, w_scale=case.w_scale * scales)
    of_row = scales[expert.flatten()[case.routing.scatter_index.long()]]
    # Powers of two round nothing.
    assert torch.equal(scaled.launch(tile), case.launch(tile) * of_row[:, None])


def one_expert_reading_the_identity(generator, tile, n, k, fp8):
    """Set x to the identity times 2 and w's scale to 4: y is w transposed, times 8."""
    device = generator.device
    expert = torch.zeros(k, 1, dtype=torch.int64, device=device)
    case = make("moe_gemm_a8w8", generator, expert, tile, experts=1, n=n, k=k, fp8=fp8)
    return replace(
        case,
        x=torch.eye(k, device=device).to(fp8),
        x_scale=torch.full((1,), 2.0, device=device),
        w_scale=torch.full((1,), 4.0, device=device),
    )


@every_tile
def test_fast_accumulation_is_as_good_where_sums_are_exact(tile, device_generator):
    """It changes what Hopper's fp8 tensor cores do, and nothing where there are none."""
    expert = spread(device_generator, m=12, experts=3, top_k=1)
    case = make("moe_gemm_a8w8", device_generator, expert, tile, experts=3, n=40, k=96)
    case.check(case.launch(tile, fast_accum=True), fast_accum=True)
