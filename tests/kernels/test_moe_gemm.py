"""What every MoE GEMM promises, edge cases first, each against its float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allpairspy import AllPairs
from grouped_gemm import (
    GPT_OSS,
    GROUPED,
    LARGE,
    PLAIN,
    SMALL,
    Case,
    assert_close,
    counted,
    every_kernel,
    every_tile,
    make,
    spread,
)

from moelab.kernels import load
from moelab.kernels.formats import dequantize_mxfp8
from moelab.kernels.router import route
from moelab.problems import LAYERS, MODELS, Problem, problem
from moelab.specs import Y_FORMATS, Tile

# Tokens of each expert, by the tile's block_m.
DISTRIBUTIONS = {
    "an expert with no token": lambda block_m: (3, 0, 4),
    "no token first and last": lambda block_m: (0, 5, 0),
    "an expert with one token": lambda block_m: (block_m - 1, 1, 2),
    "one token in all": lambda block_m: (0, 0, 1),
    "all tokens on one expert": lambda block_m: (0, 2 * block_m + 1, 0),
    "only full tiles": lambda block_m: (block_m, 0, 2 * block_m),
}


@every_kernel
@every_tile
@pytest.mark.parametrize("counts", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_any_distribution_of_tokens_matches_the_reference(kernel, tile, counts, device_generator):
    counts = counts(tile.block_m)
    expert = counted(device_generator, counts)
    case = make(kernel, device_generator, expert, tile, experts=3, n=tile.block_n, k=tile.block_k)
    case.check(case.launch(tile))


@every_kernel
@every_tile
def test_empty_expert_leaves_its_neighbours_unchanged(kernel, tile, device_generator):
    expert = counted(device_generator, (3, 0, 4))
    case = make(
        kernel, device_generator, expert, tile, experts=3, n=tile.block_n, k=tile.block_k, bias=True
    )
    for tensor in (case.w, case.w_scale, case.bias):
        tensor[1:2].view(torch.uint8).fill_(0xFF)
    neighbours = torch.tensor([0, 2], device=expert.device)
    # Both routings sort alike, so rows stay where they are.
    alone = replace(
        case,
        w=case.w.view(torch.uint8)[neighbours].view(case.w.dtype),
        w_scale=case.w_scale[neighbours],
        bias=case.bias[neighbours],
        routing=route(expert // 2, torch.ones_like(expert), experts=2, block_m=tile.block_m),
    )
    y = case.launch(tile)
    assert torch.equal(y, alone.launch(tile))
    alone.check(y)


@every_kernel
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("swiglu", [None, PLAIN], ids=["linear", "swiglu"])
def test_no_tokens_give_an_empty_result(kernel, gather, swiglu, device_generator):
    expert = spread(device_generator, m=0, experts=4, top_k=2)
    case = make(
        kernel,
        device_generator,
        expert,
        SMALL,
        experts=4,
        n=40,
        k=64,
        gather=gather,
        swiglu=swiglu,
        bias=True,
    )
    y = case.launch(SMALL)
    assert y.shape == (0, 20 if swiglu else 40)
    assert y.dtype == torch.float32
    case.check(y)


# (m, n, k) by tile, where one of them does not fill its last block.
SHAPES = {
    "one token": lambda t: (1, t.block_n, t.block_k),
    "odd m": lambda t: (t.block_m - 3, t.block_n, t.block_k),
    "n below one block": lambda t: (4, t.block_n - 8, t.block_k),
    "n past a block": lambda t: (4, t.block_n + 8, t.block_k),
    "odd n": lambda t: (4, 2 * t.block_n + 5, t.block_k),
    "k below one block": lambda t: (4, t.block_n, t.block_k // 2),
    "k past a block": lambda t: (4, t.block_n, t.block_k + 32),
    "k past two blocks": lambda t: (4, t.block_n, 2 * t.block_k + 32),
    "m, n and k": lambda t: (t.block_m + 5, t.block_n + 6, t.block_k + 32),
}


@every_kernel
@every_tile
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_partly_filled_block_changes_nothing(kernel, tile, shape, device_generator):
    m, n, k = shape(tile)
    expert = spread(device_generator, m, experts=2, top_k=1)
    case = make(kernel, device_generator, expert, tile, experts=2, n=n, k=k, bias=True)
    case.check(case.launch(tile))


@every_kernel
@every_tile
@pytest.mark.parametrize("past_block", [False, True], ids=["k below a block", "k past a block"])
@pytest.mark.parametrize("k", [1, 33, 36])
def test_k_may_be_any_length(kernel, tile, k, past_block, device_generator):
    k += tile.block_k if past_block else 0
    expert = spread(device_generator, m=6, experts=2, top_k=1)
    case = make(kernel, device_generator, expert, tile, experts=2, n=tile.block_n, k=k)
    case.check(case.launch(tile))


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
@every_tile
@pytest.mark.parametrize("k", [1, 31, 33, 159])
def test_what_fills_the_last_byte_is_never_used(kernel, tile, k, device_generator):
    """k is odd: the high half of each row's last byte stands for no element."""
    expert = spread(device_generator, m=6, experts=2, top_k=1)
    case = make(kernel, device_generator, expert, tile, experts=2, n=40, k=k)
    filled = {"w": case.w.clone()}
    if kernel == "moe_gemm_a4w4":
        filled["x"] = case.x.clone()
    for tensor in filled.values():
        tensor[..., -1] |= 0xF0
    y = replace(case, **filled).launch(tile)
    case.check(y)
    assert torch.equal(y, case.launch(tile))


@every_kernel
@every_tile
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "sorted"])
@pytest.mark.parametrize("top_k", [1, 8])
def test_each_token_visits_its_top_k(kernel, tile, gather, top_k, device_generator):
    expert = spread(device_generator, m=5, experts=8, top_k=top_k)
    case = make(
        kernel,
        device_generator,
        expert,
        tile,
        experts=8,
        n=tile.block_n,
        k=tile.block_k,
        gather=gather,
        weighted=True,
    )
    case.check(case.launch(tile))


LAYER_OPTIONS = {
    "layer 1": {"gather": True, "swiglu": PLAIN},
    "layer 1 of GPT-OSS": {"gather": True, "swiglu": GPT_OSS},
    "layer 2": {"gather": False, "weighted": True, "scatter": True},
}


@every_kernel
@every_tile
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS)
def test_layer_with_and_without_bias(kernel, tile, bias, options, device_generator):
    expert = spread(device_generator, m=tile.block_m // 2 + 1, experts=3, top_k=2)
    n, k = tile.block_n + 6, tile.block_k + 32
    case = make(kernel, device_generator, expert, tile, experts=3, n=n, k=k, bias=bias, **options)
    case.check(case.launch(tile))


# The first values are what the others' pairs are counted from.
OPTIONS = {
    "gather": [True, False],
    "weighted": [False, True],
    "scatter": [False, True],
    "bias": [False, True],
    "swiglu": [None, PLAIN, GPT_OSS],
    "y_format": ["fp32", "bf16", "fp8", "mxfp8"],
    "wide": [False, True],
    "num_xcds": [1, 8],
    "num_stages": [1, 2],
}
OWN_OPTIONS = {
    "moe_gemm_a8w4": {"x_format": ["fp8", "mxfp8"], "scale_layout": ["rows", "cdna4"]},
    "moe_gemm_a4w4": {"scale_layout": ["rows", "cdna4"]},
}


def pairs():
    """Combine options so that any two values of two options meet in some row of a kernel."""
    for kernel in GROUPED:
        options = OPTIONS | OWN_OPTIONS.get(kernel, {})
        for values in AllPairs(list(options.values())):
            row = dict(zip(options, values, strict=True))
            yield pytest.param(kernel, row, id=f"{kernel} {' '.join(map(str, values))}")


@pytest.mark.parametrize(("kernel", "row"), list(pairs()))
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_options_work_together_in_pairs(kernel, row, large, device_generator, monkeypatch):
    # cdna4 scales lie in blocks of 32 columns by 256 elements.
    block_k = 128 if kernel == "moe_gemm_a8w8_blockscale" else 256
    tile = Tile(128, 128, block_k) if large else Tile(16, 64, block_k)
    row = dict(row)
    options = {name: row.pop(name) for name in ("y_format", "num_xcds", "num_stages")}
    if row.pop("wide"):
        monkeypatch.setattr("moelab.kernels.grouped_gemm.WIDE_ELEMENTS", 1)
    expert = spread(device_generator, m=9, experts=3, top_k=2)
    n, k = tile.block_n + 8, tile.block_k + 32
    case = make(kernel, device_generator, expert, tile, experts=3, n=n, k=k, **row)
    of_y = {}
    if options["y_format"] == "fp8":
        # An eighth of the range is cut off.
        of_y["y_scale"] = (case.expected().abs().amax() / 512).float().reshape(1)
    case.check(case.launch(tile, num_warps=4, **options, **of_y), **of_y)


@every_kernel
def test_y_is_bf16_unless_asked(kernel, device_generator):
    expert = spread(device_generator, m=2, experts=1, top_k=1)
    case = make(kernel, device_generator, expert, SMALL, experts=1, n=32, k=64)
    y = case.run(SMALL, num_warps=4)
    assert y.dtype == torch.bfloat16
    case.check(y)


@every_kernel
@pytest.mark.parametrize("swiglu", [None, PLAIN, GPT_OSS], ids=["linear", "plain", "GPT-OSS"])
@pytest.mark.parametrize("y_format", Y_FORMATS)
def test_a_nan_is_never_stored_as_a_number(kernel, swiglu, y_format, device_generator):
    """Limits of the activation and of fp8 must not hide that a model diverged."""
    tile = Tile(16, 64, 64)
    expert = spread(device_generator, m=5, experts=2, top_k=1)
    case = make(kernel, device_generator, expert, tile, experts=2, n=64, k=64, swiglu=swiglu)
    spoiled = {"bias": torch.zeros(2, 64, device=expert.device)}
    spoiled["bias"][1, :2] = float("nan")
    of_y = {"y_scale": torch.ones(1, device=expert.device)} if y_format == "fp8" else {}
    y = replace(case, **spoiled).run(tile, num_warps=4, y_format=y_format, **of_y)
    if y_format == "mxfp8":
        y = dequantize_mxfp8(*y)
    of_second = torch.arange(5, device=expert.device) >= case.routing.expert_end[0]
    assert y.float()[of_second, 0].isnan().all()
    assert not y.float()[~of_second].isnan().any()


@every_kernel
def test_an_infinity_in_a_static_fp8_is_nan(kernel, device_generator):
    expert = torch.zeros(3, 1, dtype=torch.int64, device=device_generator.device)
    case = make(kernel, device_generator, expert, SMALL, experts=1, n=32, k=64)
    bias = torch.zeros(1, 32, device=expert.device)
    bias[0, :3] = torch.tensor([float("inf"), -float("inf"), 1e9])
    y_scale = torch.ones(1, device=expert.device)
    y = replace(case, bias=bias).run(SMALL, num_warps=4, y_format="fp8", y_scale=y_scale).float()
    assert y[:, :2].isnan().all()
    assert (y[:, 2] == 448).all()


# Tokens of each expert and columns of tiles.
RENUMBERED = {
    "fewer tiles than xcds": (lambda block_m: (2, 0, block_m + 1), 1),
    "a last group of 3 tiles": (lambda block_m: (2 * block_m, block_m + 1, 0, 3, 1, 1), 2),
}


@every_kernel
@every_tile
@pytest.mark.parametrize(("counts", "columns"), RENUMBERED.values(), ids=RENUMBERED)
def test_renumbering_for_xcds_changes_no_bit(kernel, tile, counts, columns, device_generator):
    counts = counts(tile.block_m)
    expert = counted(device_generator, counts)
    case = make(
        kernel,
        device_generator,
        expert,
        tile,
        experts=len(counts),
        n=columns * tile.block_n - 8,
        k=tile.block_k,
    )
    y = case.launch(tile)
    case.check(y)
    assert torch.equal(case.launch(tile, num_xcds=8), y)


@every_kernel
@pytest.mark.parametrize("num_xcds", [1, 8])
def test_tiles_past_the_count_are_never_used(kernel, num_xcds, device_generator):
    expert = counted(device_generator, (7, 0, 0, 5))
    case = make(kernel, device_generator, expert, SMALL, experts=4, n=40, k=64)
    count = int(case.routing.tile_count)
    spare = case.routing.tile_expert.numel() - count
    assert spare, "the routing has no entry to spoil"
    for tensor in (case.routing.tile_expert, case.routing.tile_row):
        tensor[count:] = 2**30
    case.check(case.launch(SMALL, num_xcds=num_xcds))


@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("model", MODELS)
def test_scaled_down_layer_of_each_model(kernel, layer, model, device_generator):
    full = problem(model, layer, tp=4, m=3)
    experts = full.experts // 16
    expert = spread(device_generator, full.m, experts, full.top_k)
    # A 32nd of either side, within what is quick; n even.
    n, k = min(full.n // 64 * 2, 56), min(full.k // 32, 160)
    case = make(
        kernel,
        device_generator,
        expert,
        SMALL,
        experts=experts,
        n=n,
        k=k,
        gather=full.gather,
        weighted=full.weighted,
        scatter=full.scatter,
        bias=full.bias,
        swiglu=(GPT_OSS if "GPT-OSS" in model else PLAIN) if full.swiglu else None,
    )
    case.check(case.launch(SMALL))


# GPT-OSS's layer 2 has k = 720, which neither block_k nor mxfp4's groups of 32 divide.
@pytest.mark.gpu
@pytest.mark.parametrize("y_format", Y_FORMATS)
@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("model", ["Qwen3-235B-A22B", "GPT-OSS 120B"])
def test_layer_at_full_size(kernel, model, layer, y_format, device_generator):
    full = problem(model, layer, tp=4, m=512)
    expert = spread(device_generator, full.m, full.experts, full.top_k)
    case = make(
        kernel,
        device_generator,
        expert,
        LARGE,
        experts=full.experts,
        n=full.n,
        k=full.k,
        gather=full.gather,
        weighted=full.weighted,
        scatter=full.scatter,
        bias=full.bias,
        swiglu=(GPT_OSS if "GPT-OSS" in model else PLAIN) if full.swiglu else None,
    )
    of_y = {"y_scale": torch.full((1,), 2**-4, device=expert.device)} if y_format == "fp8" else {}
    case.check(case.launch(LARGE, y_format=y_format, **of_y), **of_y)


# The sizes at which x, one expert's w, or y has more than 2^31 elements.
BEYOND_32_BITS = {
    "x": {"m": 2**19 + 5, "n": 64, "k": 8192},
    "w": {"m": 40, "n": 2**19 + 8, "k": 8192},
    "y": {"m": 2**21 + 5, "n": 1024 + 8, "k": 128},
}


@pytest.mark.gpu
@every_kernel
@pytest.mark.parametrize("size", BEYOND_32_BITS.values(), ids=BEYOND_32_BITS)
def test_a_tensor_may_exceed_2_31_elements(kernel, size, device_generator):
    """Rows and columns near the end are right, each read through the largest offsets."""
    m, n, k = size.values()
    case = large_case(kernel, device_generator, m, n, k)
    y = case.run(LARGE)
    # The last 40 rows and columns, the latter from where a block of scales begins.
    first_row, first_column = m - 40, max(0, n - 136)
    x_scale, w_scale = case.x_scale, case.w_scale
    if w_scale.dim() > 1:
        per_scale = 128 if kernel == "moe_gemm_a8w8_blockscale" else 1
        w_scale = w_scale[:, first_column // per_scale :]
    rows = torch.zeros(40, 1, dtype=torch.int32, device=y.device)
    last = replace(
        case,
        x=case.x[first_row:],
        w=case.w[:, first_column:],
        x_scale=x_scale[first_row:] if x_scale.dim() > 1 else x_scale,
        w_scale=w_scale,
        routing=route(rows, rows.float(), 1, LARGE.block_m),
    )
    assert_close(y[first_row:, first_column:], last.expected(), k)


def large_case(kernel, generator, m, n, k):
    """Draw codes rather than values: one expert, whose rows are the tokens in order."""
    device = generator.device

    def codes(*shape, largest=256):
        return torch.randint(
            0, largest, shape, dtype=torch.uint8, generator=generator, device=device
        )

    def operand(rows, bits):
        if bits == 4:
            return codes(rows, k // 2)
        # Below 1 in magnitude: no NaN, and nothing that all else is small beside.
        return (codes(rows, k) & 0xB7).view(torch.float8_e4m3fn)

    x_bits, w_bits = (int(kernel[len("moe_gemm_") + at]) for at in (1, 3))
    x, w = operand(m, x_bits), operand(n, w_bits)[None]
    blocks, groups = -(-k // 128), -(-k // 32)
    x_scale, w_scale = torch.ones(1, device=device), torch.ones(1, device=device)
    if kernel == "moe_gemm_a8w8_blockscale":
        x_scale = torch.rand(m, blocks, generator=generator, device=device)
        w_scale = torch.rand(1, -(-n // 128), blocks, generator=generator, device=device)
    if w_bits == 4:
        w_scale = 120 + codes(1, n, groups, largest=8)
    if x_bits == 4:
        x_scale = 120 + codes(m, groups, largest=8)
    expert = torch.zeros(m, 1, dtype=torch.int32, device=device)
    return Case(
        kernel=kernel,
        x=x,
        w=w,
        x_scale=x_scale,
        w_scale=w_scale,
        routing=route(expert, torch.ones(m, 1, device=device), 1, LARGE.block_m),
        k=k,
        bias=None,
        gather=True,
        weighted=False,
        scatter=False,
        swiglu=None,
    )


@pytest.mark.gpu
@every_kernel
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_warps_and_stages_leave_the_result(kernel, num_warps, num_stages, device_generator):
    expert = spread(device_generator, m=200, experts=4, top_k=2)
    case = make(
        kernel, device_generator, expert, LARGE, experts=4, n=264, k=5 * 128 + 32, swiglu=GPT_OSS
    )
    case.check(case.launch(LARGE, num_warps=num_warps, num_stages=num_stages))


@every_kernel
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS)
def test_reference_is_the_equation(kernel, bias, options, generator):
    """Element by element, so that the reference is not trusted for its own sake."""
    expert = spread(generator, m=3, experts=4, top_k=2)
    case = make(kernel, generator, expert, SMALL, experts=4, n=6, k=32, bias=bias, **options)
    y = load(kernel).reference(*case.tensors, case.routing, **case.layer, **case.own)
    x, w = case.values
    for row, index in enumerate(case.routing.scatter_index.tolist()):
        token, slot = divmod(index, 2)
        e = int(expert[token, slot])
        acc = (w[e] * x[token if case.gather else row]).sum(1)
        acc = acc + case.bias[e].double() if bias else acc
        if case.swiglu:
            gate = acc[0::2].clamp(max=case.swiglu.limit)
            up = acc[1::2].clamp(-case.swiglu.limit, case.swiglu.limit)
            acc = gate / (1 + (-case.swiglu.alpha * gate).exp()) * (up + case.swiglu.shift)
        if case.weighted:
            acc = acc * case.routing.weight[row].double()
        got = y[index if case.scatter else row]
        assert torch.allclose(got, acc, rtol=1e-6, atol=1e-6), f"row {row}"


@every_kernel
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "sorted"])
def test_cost_is_the_work_and_the_bytes_of_the_tensors(kernel, gather, generator):
    m, experts, top_k, n, k = 8, 4, 2, 24, 45
    expert = torch.arange(m * top_k).reshape(m, top_k) % experts
    swiglu = PLAIN if gather else None
    case = make(
        kernel, generator, expert, SMALL, experts=experts, n=n, k=k, gather=gather, swiglu=swiglu
    )
    of = Problem("test", 1, 1, m, experts, top_k, n, k, gather, gather, weighted=False, bias=False)
    cost = load(kernel).cost(of)
    assert cost.flops == 2 * m * top_k * n * k
    # A scale for the whole tensor, or for each expert, is nothing beside it.
    scales = sum(scale.nbytes for scale in (case.x_scale, case.w_scale) if scale.dim() > 1)
    assert cost.bytes == case.x.nbytes + case.w.nbytes + scales + 2 * m * top_k * case.n_out
    for y_format, y_bytes in {"fp32": 4, "fp8": 1, "mxfp8": 1}.items():
        y_scales = -(-case.n_out // 32) if y_format == "mxfp8" else 0
        more = m * top_k * ((y_bytes - 2) * case.n_out + y_scales)
        assert load(kernel).cost(replace(of, y_format=y_format)).bytes == cost.bytes + more


@every_kernel
def test_cost_reads_only_the_experts_that_can_have_rows(kernel):
    of = Problem("test", 1, 1, 1, 64, 2, 24, 64, True, False, weighted=False)
    dense = load(kernel).cost(replace(of, experts=2))
    assert load(kernel).cost(of) == dense
