"""Shapes and rules against the figures that were published with them."""

import itertools
from dataclasses import replace

import pytest

from moelab import kernels, problems
from moelab.specs import Problem, Tile

LARGE_N = 1 << 16
MOE_KERNELS = [name for name in kernels.KERNELS if name not in problems.DENSE]


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


def test_layer_1_gathers_into_swiglu_and_layer_2_weights_rows_and_scatters_them_back():
    first = problems.problem("Llama4 Maverick", 1, 1, 512)
    second = problems.problem("Llama4 Maverick", 2, 1, 512)
    assert (first.gather, first.swiglu) == (True, True)
    assert (first.weighted, first.scatter) == (False, False)
    assert (second.gather, second.swiglu) == (False, False)
    assert (second.weighted, second.scatter) == (True, True)
    # What layer 1 leaves is what layer 2 reduces over.
    assert first.n_out == second.k == 8192


@pytest.mark.parametrize("kernel", MOE_KERNELS)
@pytest.mark.parametrize("tp", problems.TENSOR_PARALLEL)
def test_flops_of_both_layers_are_three_products_of_the_published_sizes(kernel, tp):
    cost = kernels.load(kernel).cost
    for model, m in itertools.product(problems.MODELS.values(), (1, 512, 15872)):
        flops = sum(cost(problems.problem(model.name, layer, tp, m)).flops for layer in (1, 2))
        assert flops == 3 * m * model.top_k * model.dim1 * model.dim2 // tp, model.name


@pytest.mark.parametrize(
    ("model", "kernel", "sizes"),
    [
        # (n, k, n_bf16): gate and up of one expert, the hidden size, a column per expert.
        ("DeepSeek-R1", "fused_gemm_afp4wfp4_a16w16", (4096, 7168, 256)),
        ("Llama4 Maverick", "ff_a16w16_fused", (16384, 5120, 0)),
    ],
)
def test_a_shared_expert_is_as_wide_as_one_expert_and_tp_shards_it_alone(model, kernel, sizes):
    assert kernel in problems.MODELS[model].kernels
    for tp in problems.TENSOR_PARALLEL:
        problem = problems.shared_expert(kernel, model, tp, m=512)
        n, k, n_bf16 = sizes
        # The router, whose weight is the bf16 one, is whole on every shard.
        assert (problem.n, problem.k, problem.n_bf16) == (n // tp, k, n_bf16)
        assert (problem.model, problem.layer, problem.tp) == (model, 1, tp)


@pytest.mark.parametrize("kernel", problems.DENSE)
def test_every_token_visits_the_shared_expert_once_and_nothing_routes_it(kernel):
    problem = problems.shared_expert(kernel, "DeepSeek-R1", tp=1, m=512)
    assert (problem.experts, problem.top_k, problem.rows) == (1, 1, 512)
    assert not (problem.gather or problem.weighted or problem.scatter or problem.bias)


@pytest.mark.parametrize(("gated", "n_out"), [(True, 150), (False, 300)])
def test_a_gate_halves_what_a_feed_forward_layer_reduces_over(gated, n_out):
    problem = problems.feed_forward("hand-made", m=7, n=300, k=500, gated=gated)
    assert (problem.m, problem.n, problem.k, problem.n_out) == (7, 300, 500, n_out)
    # Two products: into the hidden layer, and back out of it.
    assert kernels.load("ff_a16w16_fused").cost(problem).flops == (
        2 * 7 * 500 * 300 + 2 * 7 * 500 * n_out
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_gemm_has_columns_of_two_kinds_and_its_bias_is_no_flop(bias):
    problem = problems.fused_gemm("hand-made", m=7, n=300, n_bf16=20, k=500, bias=bias)
    assert (problem.n, problem.n_bf16, problem.k, problem.bias) == (300, 20, 500, bias)
    assert not problem.swiglu
    cost = kernels.load("fused_gemm_afp4wfp4_a16w16").cost
    assert cost(problem).flops == 2 * 7 * 500 * (300 + 20)


def test_each_kernel_here_serves_some_model():
    served = {kernel for model in problems.MODELS.values() for kernel in model.kernels}
    assert set(kernels.KERNELS) == served


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


@pytest.mark.parametrize(
    ("kernel", "m", "tile", "num_warps"),
    [
        ("ff_a16w16_fused", (1, 4), "4x256x256", 8),
        ("ff_a16w16_fused", (5, 8), "8x256x256", 8),
        ("ff_a16w16_fused", (9, 64, 65, 8192), "64x256x256", 8),
        ("fused_gemm_afp4wfp4_a16w16", (1, 8), "8x32x256/14", 2),
        ("fused_gemm_afp4wfp4_a16w16", (9, 16), "8x32x512/8", 2),
        ("fused_gemm_afp4wfp4_a16w16", (17, 32), "32x32x512/7", 8),
        ("fused_gemm_afp4wfp4_a16w16", (33, 64), "64x32x512/7", 8),
        ("fused_gemm_afp4wfp4_a16w16", (65, 128), "16x32x256/4", 2),
        ("fused_gemm_afp4wfp4_a16w16", (129, 256), "16x64x256/4", 4),
        ("fused_gemm_afp4wfp4_a16w16", (257, 8192), "128x64x256", 8),
    ],
)
def test_what_is_no_moe_gemm_takes_its_tile_by_tokens_alone(kernel, m, tile, num_warps):
    for tokens, model in itertools.product(m, ("DeepSeek-R1", "Llama4 Maverick")):
        problem = problems.shared_expert(kernel, model, 1, tokens)
        assert problems.ruled_tile(kernel, problem) == (Tile.parse(tile), num_warps), tokens


def test_a_kernel_without_tile_rule_raises_with_those_that_have_one():
    with pytest.raises(ValueError) as error:
        problems.ruled_tile("moe_gemm_a16w16", asked(16, 512))
    assert "'moe_gemm_a16w16'" in str(error.value)
    assert f"there are rules for {', '.join(sorted(kernels.KERNELS))};" in str(error.value)


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


def stages(policy, kernel, target, block_n=512):
    """Stage counts for block_m 16, 32, 64 and 128."""
    return [
        problems.ruled_stages(policy, kernel, target, Tile(block_m, block_n, 256))
        for block_m in (16, 32, 64, 128)
    ]


@pytest.mark.parametrize("kernel", MOE_KERNELS)
@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_before_the_fixes_there_were_two_stages_everywhere(kernel, target):
    assert stages(problems.BEFORE, kernel, target) == [2, 2, 2, 2]


@pytest.mark.parametrize("kernel", MOE_KERNELS)
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


@pytest.mark.parametrize(
    ("kernel", "m", "expected"),
    [
        # Stages under each of the policies, in their order.
        ("ff_a16w16_fused", 4, [2, 2, 1]),
        ("ff_a16w16_fused", 8, [2, 2, 2]),
        ("ff_a16w16_fused", 9, [1, 1, 1]),
        ("fused_gemm_afp4wfp4_a16w16", 8, [2, 2, 2]),
        ("fused_gemm_afp4wfp4_a16w16", 16, [2, 2, 2]),
        ("fused_gemm_afp4wfp4_a16w16", 32, [2, 2, 2]),
        ("fused_gemm_afp4wfp4_a16w16", 64, [2, 2, 1]),
        ("fused_gemm_afp4wfp4_a16w16", 128, [2, 2, 2]),
        ("fused_gemm_afp4wfp4_a16w16", 256, [2, 2, 2]),
        ("fused_gemm_afp4wfp4_a16w16", 257, [2, 2, 1]),
    ],
)
@pytest.mark.parametrize("target", ["gfx950", "gfx942"])
def test_what_is_no_moe_gemm_was_fixed_by_fixes_of_its_own(target, kernel, m, expected):
    tile, _ = problems.ruled_tile(kernel, problems.shared_expert(kernel, "DeepSeek-R1", 1, m))
    assert [
        problems.ruled_stages(policy, kernel, target, tile) for policy in problems.POLICIES
    ] == expected


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


@pytest.mark.parametrize("test", problems.AITER_TESTS, ids=lambda test: test.name)
def test_each_launch_of_a_test_has_its_name_and_is_listed_once(test):
    assert test.name == f"test_{test.kernel}"
    assert test.problems
    assert len(set(test.problems)) == len(test.problems)
    assert {problem.model for problem in test.problems} == {test.name}


def test_each_moe_shape_runs_with_and_without_gather_weights_and_swiglu():
    for test in problems.AITER_TESTS:
        if test.kernel in problems.DENSE:
            continue
        by_shape = {}
        for problem in test.problems:
            shape = replace(problem, layer=1, gather=False, swiglu=False, weighted=False)
            by_shape.setdefault(shape, []).append(
                (problem.gather, problem.swiglu, problem.weighted)
            )
        every = sorted(itertools.product((False, True), repeat=3))
        assert all(sorted(options) == every for options in by_shape.values()), test.name


def test_each_feed_forward_shape_runs_with_and_without_gate():
    (test,) = (test for test in problems.AITER_TESTS if test.kernel == "ff_a16w16_fused")
    by_shape = {}
    for problem in test.problems:
        by_shape.setdefault((problem.m, problem.n_out, problem.k), []).append(problem.swiglu)
    assert all(sorted(gates) == [False, True] for gates in by_shape.values())


def test_every_kernel_here_has_its_test_and_no_test_lacks_its_kernel():
    assert sorted(test.kernel for test in problems.AITER_TESTS) == sorted(kernels.KERNELS)


def test_every_launch_of_the_tests_has_a_tile_and_stages_under_every_policy():
    for test in problems.AITER_TESTS:
        for problem in test.problems:
            tile, _ = problems.ruled_tile(test.kernel, problem)
            for policy in problems.POLICIES:
                assert problems.ruled_stages(policy, test.kernel, "gfx950", tile) in (1, 2)
