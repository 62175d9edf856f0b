"""Shapes and rules against the figures that were published with them."""

import itertools
from dataclasses import replace

import pytest

from moelab import kernels, problems
from moelab.specs import Problem, Tile

LARGE_N = 1 << 16


def asked(block_m, n, k=4096):
    """A problem with so many rows per expert, and a grid that is never small."""
    return Problem(
        model="hand-made",
        layer=1,
        tp=1,
        m=block_m * 128,
        experts=128,
        top_k=1,
        n=n,
        k=k,
        gather=True,
        swiglu=True,
        weighted=False,
    )


# Shapes.


@pytest.mark.parametrize(
    ("name", "experts", "dim1", "dim2", "top_k"),
    [
        ("DeepSeek-R1", 256, 7168, 4096, 8),
        ("GPT-OSS 120B", 128, 2880, 5760, 4),
        ("Llama4 Maverick", 128, 5120, 16384, 1),
        ("Qwen3-235B-A22B", 128, 4096, 3072, 8),
        ("Kimi-K2 Thinking", 384, 7168, 4096, 8),
    ],
)
def test_models_have_the_published_sizes(name, experts, dim1, dim2, top_k):
    model = problems.MODELS[name]
    assert (model.experts, model.dim1, model.dim2, model.top_k) == (experts, dim1, dim2, top_k)


def test_tokens_and_tensor_parallelism_are_those_of_the_table():
    assert problems.TENSOR_PARALLEL == (1, 2, 4, 8)
    assert (problems.TOKENS[0], problems.TOKENS[1], problems.TOKENS[-1]) == (512, 1536, 15872)
    assert len(problems.TOKENS) == 16


@pytest.mark.parametrize(
    ("tp", "n1", "k1", "n2", "k2"),
    [(1, 5760, 2880, 2880, 2880), (2, 2880, 2880, 2880, 1440), (8, 720, 2880, 2880, 360)],
)
def test_tensor_parallelism_shards_the_second_dimension_alone(tp, n1, k1, n2, k2):
    first = problems.problem("GPT-OSS 120B", 1, tp, 512)
    second = problems.problem("GPT-OSS 120B", 2, tp, 512)
    assert (first.n, first.k, second.n, second.k) == (n1, k1, n2, k2)
    assert first.tp == second.tp == tp


def test_layer_1_gathers_into_swiglu_and_layer_2_weights_rows_in_expert_order():
    first = problems.problem("Llama4 Maverick", 1, 1, 512)
    second = problems.problem("Llama4 Maverick", 2, 1, 512)
    assert (first.gather, first.swiglu, first.weighted) == (True, True, False)
    assert (second.gather, second.swiglu, second.weighted) == (False, False, True)
    # What layer 1 leaves is what layer 2 reduces over.
    assert first.n_out == second.k == 8192


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("tp", problems.TENSOR_PARALLEL)
def test_flops_of_both_layers_are_three_products_of_the_published_sizes(kernel, tp):
    cost = kernels.load(kernel).cost
    for model, m in itertools.product(problems.MODELS.values(), (1, 512, 15872)):
        flops = sum(cost(problems.problem(model.name, layer, tp, m)).flops for layer in (1, 2))
        assert flops == 3 * m * model.top_k * model.dim1 * model.dim2 // tp, model.name


def test_each_kernel_here_serves_some_model():
    served = {kernel for model in problems.MODELS.values() for kernel in model.kernels}
    assert set(kernels.KERNELS) <= served


# Rows per tile.


@pytest.mark.parametrize(
    ("m", "top_k", "experts", "block_m"),
    [
        (1, 1, 128, 16),
        (512, 8, 256, 16),
        (512, 4, 128, 16),
        (2048, 1, 128, 16),
        (17 * 128, 1, 128, 32),
        (512, 8, 128, 32),
        (1536, 8, 384, 32),
        (33 * 128, 1, 128, 64),
        (1536, 4, 128, 64),
        (65 * 128, 1, 128, 128),
        (15872, 1, 128, 128),
        (8704, 4, 128, 128),
        (15872, 8, 128, 128),
    ],
)
def test_block_m_is_the_mean_rows_rounded_up_from_16_to_128(m, top_k, experts, block_m):
    problem = replace(asked(16, n=512), m=m, top_k=top_k, experts=experts)
    assert problems.routed_block_m(problem) == block_m


# Tiles.


@pytest.mark.parametrize(
    ("kernel", "block_m", "n", "tile", "num_warps"),
    [
        ("moe_gemm_a4w4", 16, LARGE_N, "16x128x256", 4),
        ("moe_gemm_a4w4", 32, LARGE_N, "32x512x256", 8),
        ("moe_gemm_a4w4", 64, LARGE_N, "64x512x256", 8),
        ("moe_gemm_a4w4", 128, LARGE_N, "128x512x256", 8),
        ("moe_gemm_a8w4", 16, LARGE_N, "16x128x256", 4),
        ("moe_gemm_a8w4", 32, 1024, "32x128x256", 4),
        ("moe_gemm_a8w4", 32, 1025, "32x256x256", 8),
        ("moe_gemm_a8w4", 32, 4096, "32x256x256", 8),
        ("moe_gemm_a8w4", 32, 4097, "32x512x256", 8),
        ("moe_gemm_a8w4", 64, 1024, "64x512x256", 8),
        ("moe_gemm_a8w4", 128, 1024, "128x512x256", 8),
        ("moe_gemm_a8w8", 16, LARGE_N, "16x64x256", 4),
        ("moe_gemm_a8w8", 32, LARGE_N, "32x256x256", 8),
        ("moe_gemm_a8w8", 64, LARGE_N, "64x256x256", 8),
        ("moe_gemm_a8w8", 128, LARGE_N, "128x256x256", 8),
        ("moe_gemm_a8w8_blockscale", 16, LARGE_N, "16x256x128", 4),
        ("moe_gemm_a8w8_blockscale", 32, LARGE_N, "32x256x128", 8),
        ("moe_gemm_a8w8_blockscale", 128, LARGE_N, "128x256x128", 8),
    ],
)
def test_tiles_are_those_of_the_published_rules(kernel, block_m, n, tile, num_warps):
    assert problems.ruled_tile(kernel, asked(block_m, n)) == (Tile.parse(tile), num_warps)


@pytest.mark.parametrize(
    ("m", "experts", "top_k", "n", "block_n"),
    [
        # 16 tiles of rows: 8 columns of 128 make 128 programs, 16 of 64 make 256.
        (4, 128, 4, 1024, 64),
        # 32 tiles of rows: 8 columns of 128 are 256 programs already.
        (16, 32, 2, 1024, 128),
        # One tile of rows: below 64 nothing is halved, however few programs there are.
        (1, 128, 1, 1024, 32),
    ],
)
def test_a_small_grid_halves_block_n_until_it_has_256_programs(m, experts, top_k, n, block_n):
    problem = replace(asked(16, n), m=m, experts=experts, top_k=top_k)
    tile, num_warps = problems.ruled_tile("moe_gemm_a8w4", problem)
    assert (tile, num_warps) == (Tile(16, block_n, 256), 4)


def test_a_kernel_without_tile_rule_raises_with_those_that_have_one():
    with pytest.raises(ValueError) as error:
        problems.ruled_tile("moe_gemm_a16w16", asked(16, 512))
    assert "'moe_gemm_a16w16'" in str(error.value)
    assert "moe_gemm_a4w4, moe_gemm_a8w4, moe_gemm_a8w8, moe_gemm_a8w8_blockscale" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("rows", "experts", "block_m", "tiles"),
    [(0, 8, 16, 0), (1, 8, 16, 1), (8, 8, 16, 8), (9, 8, 16, 8), (24, 8, 16, 9), (64, 1, 16, 4)],
)
def test_the_worst_routing_gives_one_row_to_every_expert_but_one(rows, experts, block_m, tiles):
    assert problems.max_tiles(rows, experts, block_m) == tiles


def test_no_routing_needs_more_tiles_than_the_worst():
    most = max(
        sum(-(-rows // 4) for rows in routing)
        for routing in itertools.product(range(11), repeat=3)
        if sum(routing) == 10
    )
    assert problems.max_tiles(rows=10, experts=3, block_m=4) == most


# Stages.

KERNELS = ("moe_gemm_a4w4", "moe_gemm_a8w4", "moe_gemm_a8w8", "moe_gemm_a8w8_blockscale")


def stages(policy, kernel, target, block_n=512):
    """Stage counts for block_m 16, 32, 64 and 128."""
    return [
        problems.ruled_stages(policy, kernel, target, Tile(block_m, block_n, 256))
        for block_m in (16, 32, 64, 128)
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_before_the_fixes_there_were_two_stages_everywhere(kernel, target):
    assert stages(problems.BEFORE, kernel, target) == [2, 2, 2, 2]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_the_first_fix_left_one_stage_on_gfx950_but_for_blockscale(kernel, target):
    one = target == "gfx950" and kernel != "moe_gemm_a8w8_blockscale"
    assert stages(problems.FIRST_FIX, kernel, target) == ([1] * 4 if one else [2] * 4)


@pytest.mark.parametrize(
    ("kernel", "target", "block_n", "expected"),
    [
        ("moe_gemm_a4w4", "gfx950", 512, [2, 2, 1, 1]),
        ("moe_gemm_a4w4", "gfx942", 512, [2, 1, 1, 1]),
        ("moe_gemm_a8w4", "gfx950", 128, [2, 2, 1, 1]),
        ("moe_gemm_a8w4", "gfx950", 256, [2, 2, 1, 1]),
        ("moe_gemm_a8w4", "gfx950", 512, [2, 1, 1, 1]),
        ("moe_gemm_a8w4", "gfx942", 128, [2, 2, 1, 1]),
        ("moe_gemm_a8w4", "gfx942", 256, [2, 1, 1, 1]),
        ("moe_gemm_a8w8", "gfx950", 256, [2, 1, 1, 1]),
        ("moe_gemm_a8w8", "gfx942", 256, [2, 1, 1, 1]),
        ("moe_gemm_a8w8_blockscale", "gfx950", 256, [2, 2, 2, 2]),
        ("moe_gemm_a8w8_blockscale", "gfx942", 256, [2, 2, 2, 2]),
    ],
)
def test_the_later_fix_takes_two_stages_where_the_lds_allows(kernel, target, block_n, expected):
    assert stages(problems.LATER_FIX, kernel, target, block_n) == expected


def test_a_target_that_no_rule_speaks_of_raises_with_those_they_do():
    with pytest.raises(ValueError) as error:
        problems.ruled_stages(problems.LATER_FIX, "moe_gemm_a8w8", "sm_90", Tile(16, 64, 256))
    assert "on sm_90" in str(error.value)
    assert "gfx942, gfx950" in str(error.value)


def test_a_tile_beyond_the_rules_and_an_unknown_policy_raise():
    with pytest.raises(ValueError, match="tile 256x256x256"):
        problems.ruled_stages(problems.BEFORE, "moe_gemm_a8w8", "gfx950", Tile(256, 256, 256))
    with pytest.raises(ValueError, match="'yesterday'"):
        problems.ruled_stages("yesterday", "moe_gemm_a8w8", "gfx950", Tile(16, 64, 256))


# The tests that failed.


def test_each_shape_runs_with_and_without_gather_weights_and_swiglu():
    for test in problems.AITER_TESTS:
        found = list(test.problems())
        assert len(found) == len(set(found)) == 8 * len(test.shapes)
        assert {problem.model for problem in found} <= {test.name}


def test_every_kernel_here_has_its_failing_test():
    assert set(kernels.KERNELS) <= {test.kernel for test in problems.AITER_TESTS if test.shapes}
