"""Which questions a grid asks, and how a wrong one is answered."""

import pytest

from moelab import compiler, plan, problems
from moelab.kernels import KERNELS
from moelab.parameters import ParameterError
from moelab.specs import Tile
from moelab.targets import TARGETS, get

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


def test_all_models_are_those_served_with_the_kernel_and_none_is_the_first():
    assert {c.problem.model for c in grid(models="all")} == {"Llama4 Maverick", "Qwen3-235B-A22B"}
    assert {c.problem.model for c in grid(models=None)} == {"Llama4 Maverick"}
    a8w4 = grid(kernels="moe_gemm_a8w4", models="all")
    assert {c.problem.model for c in a8w4} == {"GPT-OSS 120B", "Kimi-K2 Thinking"}


def test_the_published_table_is_3072_questions():
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
    # 4 models x 2 layers x 4 shardings x 16 token counts x 3 stage counts x 2.
    assert len(found) == len(set(found)) == 3072


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


@pytest.mark.parametrize("async_copy", plan.ASYNC_COPY)
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
def test_the_default_is_what_the_installed_compiler_does(target):
    (found,) = grid(targets=target, stages=1, async_copy="default")
    assert found.async_copy is compiler.default_async_copy(get(target))


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
    )


def test_each_launch_of_the_failing_tests_is_asked_under_every_policy():
    found = plan.aiter_tests()
    # 7 shapes of a8w4 and 2 of a8w8, 8 launches each, under 3 distinct settings.
    assert len(found) == len(set(found)) == 9 * 8 * 3
    by_problem = {}
    for c in found:
        by_problem.setdefault(c.problem, set()).add((c.num_stages, c.async_copy))
    assert set(map(frozenset, by_problem.values())) == {
        frozenset({(2, False), (2, True), (1, True)})
    }
    assert {c.target for c in found} == {"gfx950"}
