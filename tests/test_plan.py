"""Which questions a grid asks, and how a wrong one is answered."""

import itertools

import pytest

from moelab import plan, problems
from moelab.kernels import KERNELS
from moelab.parameters import ParameterError
from moelab.specs import SCALE_LAYOUTS, X_FORMATS, Tile
from moelab.targets import TARGETS

SMALL = {"kernels": "moe_gemm_a8w8", "targets": "gfx950", "tiles": "16x64x64", "warps": 4}
SWITCHED = [name for name, target in TARGETS.items() if target.async_copy_switch]


def grid(**changed):
    return plan.grid(**SMALL | changed)


@pytest.mark.parametrize(
    ("parameter", "value", "right"),
    [
        ("kernels", "moe_gemm_a8w9", ["did you mean 'moe_gemm_a8w8'?", *KERNELS]),
        ("kernels", "moe_gemm_a8w8,all", ["'all'", *KERNELS]),
        ("kernels", "", KERNELS),
        ("kernels", [], KERNELS),
        ("kernels", None, ["kernels: None", "for example"]),
        ("targets", "gfx95", ["did you mean 'gfx950'?", *TARGETS]),
        ("targets", "", list(TARGETS)),
        ("models", "GPT-OSS", list(problems.MODELS)),
        ("layers", 3, ["layers: 3", "1, 2"]),
        ("layers", "", ["1, 2"]),
        ("layers", "first", ["layers: 'first'", "1,2"]),
        ("tp", 0, ["tp: 0", "1 or more"]),
        ("tp", "two", ["tp: 'two'", "[1, 2]"]),
        ("m", -512, ["m: -512", "1 or more"]),
        ("m", "", ["m is empty", "for example 1"]),
        ("tiles", "128x256", ["'128x256'", "128x256x128"]),
        ("tiles", "16x100x64", ["100", "power of two"]),
        ("tiles", "all", ["'all'", "128x256x128"]),
        ("tiles", None, ["tiles 128x256x256 and warps 4,8", "published rules"]),
        ("warps", None, ["tiles 128x256x256 and warps 4,8", "published rules"]),
        ("warps", 3, ["warps: 3", "1, 2, 4, 8, 16"]),
        ("warps", "four", ["warps: 'four'", "[1, 2]"]),
        ("stages", 0, ["stages: 0", "1 or more"]),
        ("stages", "1,x", ["stages: 'x'", "[1, 2]"]),
        ("stages", 1.5, ["stages: 1.5", "[1, 2]"]),
        ("stages", "", ["stages is empty", "for example 1"]),
        ("async_copy", "maybe", ["'maybe'", "on, off, both, default"]),
        ("async_copy", ["on"], ["on, off, both, default"]),
        ("async_copy", True, ["on, off, both, default"]),
        ("x_format", "mxfp9", ["did you mean 'mxfp8'?", "fp8, mxfp8"]),
        ("x_format", "bf16", ["'bf16'", "fp8, mxfp8"]),
        ("y_format", "fp16", ["did you mean", "bf16, fp32, fp8, mxfp8"]),
        ("y_format", "", ["y_format is empty", "bf16, fp32, fp8, mxfp8"]),
        ("scale_layout", "row", ["did you mean 'rows'?", "rows, cdna4"]),
        ("scale_layout", None, ["scale_layout: None"]),
    ],
)
def test_a_wrong_value_is_answered_with_its_parameter_and_the_right_ones(parameter, value, right):
    with pytest.raises(ParameterError) as error:
        grid(**{parameter: value})
    assert parameter.removesuffix("s") in str(error.value)
    for word in right:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"kernels": "moe_gemm_a8w8, moe_gemm_a8w4"},
        {"targets": "gfx950,sm_90,"},
        {"models": "Llama4 Maverick,Qwen3-235B-A22B"},
        {"layers": "1,2"},
        {"tp": "1,8"},
        {"m": "512,1536"},
        {"tiles": "16x64x64,32x64x64"},
        {"warps": "4,8"},
        {"stages": "1,2,3"},
        {"x_format": "fp8,mxfp8"},
        {"y_format": "bf16,mxfp8"},
        {"scale_layout": "rows,cdna4"},
    ],
)
def test_comma_separated_text_and_a_list_ask_the_same(changed):
    ((name, text),) = changed.items()
    parts = [part.strip() for part in text.split(",") if part]
    numbers = [int(part) if part.isdigit() else part for part in parts]
    asked = grid(**{"stages": 1} | changed)
    assert len(asked) == len(parts)
    assert asked == grid(**{"stages": 1, name: parts}) == grid(**{"stages": 1, name: numbers})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("layers", "2", 2), ("tp", "4", 4), ("m", "512", 512), ("warps", "8", 8), ("stages", "3", 3)],
)
def test_one_value_may_be_a_number_or_its_text(name, text, value):
    assert grid(**{name: text}) == grid(**{name: value}) == grid(**{name: [value]})


def test_configurations_come_problem_first_and_async_copy_last():
    found = grid(m="512,1536", stages="2,1", async_copy="both")
    seen = [(c.problem.m, c.num_stages, c.async_copy) for c in found]
    assert seen == [
        (512, 2, False),
        (512, 2, True),
        (512, 1, False),
        (512, 1, True),
        (1536, 2, False),
        (1536, 2, True),
        (1536, 1, False),
        (1536, 1, True),
    ]


def test_targets_come_in_the_order_given():
    found = grid(targets="sm_90,gfx950,gfx942", stages=1)
    assert [c.target for c in found] == ["sm_90", "gfx950", "gfx942"]


@pytest.mark.parametrize(
    "twice",
    [
        {"kernels": "moe_gemm_a8w8,moe_gemm_a8w8"},
        {"targets": ["gfx950", "gfx950"]},
        {"models": "Llama4 Maverick,Llama4 Maverick"},
        {"layers": "1,1"},
        {"tp": [1, 1]},
        {"m": "8704,8704"},
        {"tiles": "16x64x64, 16x64x64"},
        {"warps": [4, 4]},
        {"stages": "1,2,1"},
        {"y_format": "bf16,bf16"},
        {"scale_layout": ["rows", "rows"]},
    ],
)
def test_what_is_named_twice_is_asked_once(twice):
    assert grid(**twice) == grid()


def test_all_means_every_one():
    assert list(dict.fromkeys(c.kernel for c in grid(kernels="all"))) == list(KERNELS)
    assert list(dict.fromkeys(c.target for c in grid(targets="all"))) == list(TARGETS)
    assert list(dict.fromkeys(c.problem.layer for c in grid(layers="all"))) == [1, 2]
    assert list(dict.fromkeys(c.problem.tp for c in grid(tp="all"))) == [1, 2, 4, 8]
    assert tuple(dict.fromkeys(c.problem.m for c in grid(m="all"))) == problems.TOKENS


def test_each_format_is_asked_with_every_other():
    found = grid(stages=1, x_format="all", y_format="bf16,mxfp8", scale_layout="all")
    formats = [(c.problem.x_format, c.problem.y_format, c.problem.scale_layout) for c in found]
    every = itertools.product(X_FORMATS, ("bf16", "mxfp8"), SCALE_LAYOUTS)
    assert formats == list(every)


def test_without_formats_each_kernel_gets_its_first_in_the_plainest_layout():
    for c in grid(kernels="all", x_format="", layers="all"):
        formats = (c.problem.x_format, c.problem.y_format, c.problem.scale_layout)
        assert formats == (None, "bf16", "rows")


def test_all_models_are_those_served_with_the_kernel_and_none_is_the_first():
    assert {c.problem.model for c in grid(models="all")} == {"Llama4 Maverick", "Qwen3-235B-A22B"}
    assert {c.problem.model for c in grid(models=None)} == {"Llama4 Maverick"}
    a8w4 = grid(kernels="moe_gemm_a8w4", models="all")
    assert {c.problem.model for c in a8w4} == {"GPT-OSS 120B", "Kimi-K2 Thinking"}
    fused = grid(kernels="fused_gemm_afp4wfp4_a16w16", models="all")
    assert {c.problem.model for c in fused} == {"DeepSeek-R1"}


@pytest.mark.parametrize("kernel", problems.DENSE)
def test_what_computes_a_shared_expert_has_one_layer(kernel):
    (model,) = (model.name for model in problems.MODELS.values() if kernel in model.kernels)
    found = grid(kernels=kernel, tp="all")
    shared = [problems.shared_expert(kernel, model, tp, 8704) for tp in problems.TENSOR_PARALLEL]
    assert list(dict.fromkeys(c.problem for c in found)) == shared
    assert grid(kernels=kernel, tp="all", layers="all") == found
    with pytest.raises(ParameterError, match=f"layers: {kernel} has no layer 2.* give 1"):
        grid(kernels=kernel, layers=2)


def test_beside_what_has_one_layer_the_others_have_both():
    found = grid(kernels=f"moe_gemm_a8w8,{problems.DENSE[0]}", layers="1,2", stages=1)
    assert [(c.kernel, c.problem.layer) for c in found] == [
        ("moe_gemm_a8w8", 1),
        ("moe_gemm_a8w8", 2),
        (problems.DENSE[0], 1),
    ]
    (second,) = grid(kernels=f"moe_gemm_a8w8,{problems.DENSE[0]}", layers=2, stages=1)
    assert second == found[1]


def test_the_published_table_and_the_shared_experts_are_6912_questions():
    found = plan.grid(
        kernels="all",
        targets="gfx950",
        models="all",
        layers="all",
        tp="all",
        m="all",
        stages="1,2,3",
        async_copy="both",
    )
    # 8 pairs of MoE GEMM and model with 2 layers each, and 2 shared experts with 1; then
    # 4 shardings x 16 token counts x 3 stage counts x 2.
    assert len(found) == len(set(found)) == (8 * 2 + 2) * 4 * 16 * 3 * 2 == 6912
    assert {(c.kernel, c.problem.model) for c in found} == {
        (kernel, model.name) for model in problems.MODELS.values() for kernel in model.kernels
    }


def test_without_tiles_each_problem_gets_the_published_one():
    found = plan.grid(kernels="moe_gemm_a8w4", targets="gfx950", m="512,8704", stages=1)
    assert [(c.tile, c.num_warps) for c in found] == [
        (Tile(16, 128, 256), 4),
        (Tile(128, 512, 256), 8),
    ]
    assert found == plan.grid(
        kernels="moe_gemm_a8w4", targets="gfx950", m="512,8704", stages=1, tiles="", warps=""
    )


def test_each_tile_is_asked_with_each_number_of_warps():
    found = grid(tiles="16x64x64,32x64x64", warps="4,8", stages=1)
    assert [(str(c.tile), c.num_warps) for c in found] == [
        ("16x64x64", 4),
        ("16x64x64", 8),
        ("32x64x64", 4),
        ("32x64x64", 8),
    ]


@pytest.mark.parametrize("async_copy", ["on", "off", "both", "default"])
@pytest.mark.parametrize("target", [name for name in TARGETS if name not in SWITCHED])
def test_a_target_without_the_switch_gets_one_row_and_no_setting(target, async_copy):
    found = grid(targets=target, stages=1, async_copy=async_copy)
    assert [c.async_copy for c in found] == [None]


@pytest.mark.parametrize("target", SWITCHED)
@pytest.mark.parametrize(
    ("async_copy", "settings"), [("on", [True]), ("off", [False]), ("both", [False, True])]
)
def test_a_target_with_the_switch_gets_a_row_per_setting(target, async_copy, settings):
    found = grid(targets=target, stages=1, async_copy=async_copy)
    assert [c.async_copy for c in found] == settings


@pytest.mark.parametrize("target", SWITCHED)
def test_the_default_is_left_to_the_triton_that_compiles(target):
    (found,) = grid(targets=target, stages=1, async_copy="default")
    assert found.async_copy == "default"


def test_the_parameters_are_those_of_the_command_line_and_the_notebooks():
    assert plan.PARAMETERS == (
        "kernels",
        "targets",
        "models",
        "layers",
        "tp",
        "m",
        "tiles",
        "warps",
        "stages",
        "async_copy",
        "x_format",
        "y_format",
        "scale_layout",
        "fast_accum",
    )


def asked_of_tests():
    """The stage counts and async copy that each launch of aiter's tests is asked with."""
    by_launch = {}
    for c in plan.aiter_tests():
        by_launch.setdefault((c.kernel, c.problem), set()).add((c.num_stages, c.async_copy))
    return by_launch


def test_each_launch_of_the_tests_is_asked_with_its_own_tile_and_each_setting_once():
    found = plan.aiter_tests()
    # 3 settings for 120 launches of three MoE GEMMs, 4 of ff_a16w16_fused and 2 of
    # fused_gemm_afp4wfp4_a16w16; 2 for 32 of blockscale and the others' 40 and 4.
    assert len(found) == len(set(found)) == 3 * (120 + 4 + 2) + 2 * (32 + 38 + 4)
    assert {c.target for c in found} == {"gfx950"}
    assert list(asked_of_tests()) == [
        (test.kernel, problem) for test in problems.AITER_TESTS for problem in test.problems
    ]
    assert all((c.tile, c.num_warps) == problems.ruled_tile(c.kernel, c.problem) for c in found)


def test_the_settings_are_two_stages_and_one_where_a_policy_made_it_so():
    two = {(2, False), (2, True)}
    for (kernel, problem), settings in asked_of_tests().items():
        m = problem.m
        if kernel == "ff_a16w16_fused" and m > 8:
            # One stage from the start.
            assert settings == {(1, False), (1, True)}
            continue
        became_one = {
            "moe_gemm_a8w8_blockscale": False,
            "ff_a16w16_fused": m <= 4,
            "fused_gemm_afp4wfp4_a16w16": m == 64 or m > 256,
        }.get(kernel, True)
        assert settings == (two | {(1, True)} if became_one else two)


# What published estimates are tried on.


def test_estimates_are_tried_on_each_moe_gemm_each_setting_and_each_stage_count():
    asked = plan.estimates_trial()
    assert len(asked) == len(set(asked))
    assert {c.kernel for c in asked} == set(KERNELS) - set(problems.DENSE)
    for target, settings in {"gfx950": {True, False}, "sm_90": {None}}.items():
        assert {c.async_copy for c in asked if c.target == target} == settings
    assert {c.num_stages for c in asked} == {1, 2, 3, 4}


def test_no_trial_tile_is_one_that_its_kernel_does_not_take_or_larger_than_any_rules():
    asked = plan.estimates_trial()
    assert {c.tile.block_k for c in asked if c.kernel == "moe_gemm_a8w8_blockscale"} == {128}
    largest = max(c.tile.block_m * c.tile.block_n for c in asked)
    # A rule is for tiles of up to 128 rows.
    assert largest == max(128 * rule.block_n for rule in problems.TILE_RULES)


def test_trial_tiles_have_the_warps_of_the_published_rules():
    for configuration in plan.estimates_trial():
        first = configuration.tile.block_m == 16
        assert configuration.num_warps == (4 if first else 8)


@pytest.mark.parametrize(
    ("changed", "right"),
    [
        ({"kernels": "ff_a16w16_fused"}, ["ff_a16w16_fused", "moe_gemm_a8w4"]),
        ({"block_m": 100}, ["100", "power of two"]),
        ({"block_m": 256, "block_n": 512}, ["nothing is left", "65,536"]),
        ({"kernels": "moe_gemm_a8w8_blockscale", "block_k": 256}, ["nothing is left", "128"]),
    ],
)
def test_a_trial_of_nothing_and_of_what_is_not_there_is_refused(changed, right):
    with pytest.raises(ParameterError) as error:
        plan.estimates_trial(**changed)
    for text in right:
        assert text in str(error.value)
