import dataclasses

import pytest

from moelab.specs import Problem, TensorSpec, Tile

PROBLEM = Problem(
    model="hand-made",
    layer=1,
    tp=1,
    m=3,
    experts=4,
    top_k=2,
    n=10,
    k=7,
    gather=True,
    swiglu=True,
    weighted=False,
)


@pytest.mark.parametrize(
    "text",
    [
        *("1x1x1", "16x64x64", "128x512x256", "64x32x512/7", "64x32x512/7+group8"),
        *("128x256x128+tma", "128x256x128+group1+tma+tails2", "128x256x128+tma+persistent"),
        "128x256x128+group8+specialized",
    ],
)
def test_a_tile_reads_back_what_it_prints(text):
    assert str(Tile.parse(text)) == text


def test_spaces_around_a_tile_are_ignored():
    assert Tile.parse(" 128x512x256\n") == Tile(128, 512, 256)


def test_programs_share_a_reduction_only_where_the_tile_says_so():
    assert Tile.parse("64x32x512/7") == Tile(64, 32, 512, split_k=7)
    assert Tile.parse("64x32x512/1") == Tile.parse("64x32x512") == Tile(64, 32, 512)
    assert str(Tile(64, 32, 512, split_k=1)) == "64x32x512"


@pytest.mark.parametrize(
    "text",
    [
        *("", "128", "128x256", "128x256x128x1", "axbxc", "128X256X128", "128,256,128"),
        *("-16x16x16", "16x16x16/", "16x16x16/0", "16x16x16/-7", "16x16x16/x", "16x16x16/7/7"),
    ],
)
def test_what_is_no_tile_is_answered_with_an_example(text):
    with pytest.raises(ValueError) as error:
        Tile.parse(text)
    assert repr(text) in str(error.value)
    assert "for example 128x256x128, or 64x32x512/7" in str(error.value)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("0x16x16", "0"), ("16x100x64", "100"), ("6x4x3", "6"), ("64x32x500/7", "500")],
)
def test_a_block_that_is_no_power_of_two_is_named(text, wrong):
    with pytest.raises(ValueError, match=rf"{text}'\: {wrong} is not a power of two"):
        Tile.parse(text)


@pytest.mark.parametrize("way", ["TMA", "", "tails", "tails0", "group", "persist", "tma+"])
def test_a_way_that_no_tile_has_is_answered_with_those_there_are(way):
    with pytest.raises(ValueError, match="group8, tma, tails2"):
        Tile.parse(f"64x64x64+{way}")


def test_every_token_makes_a_row_for_each_of_its_experts():
    assert PROBLEM.rows == 6


def test_swiglu_halves_the_columns_and_nothing_else_does():
    assert PROBLEM.n_out == 5
    assert dataclasses.replace(PROBLEM, swiglu=False).n_out == 10


@pytest.mark.parametrize(
    ("dtype", "size"), [("fp8e4nv", 1), ("fp8e4b8", 1), ("u8", 1), ("bf16", 2), ("fp32", 4)]
)
def test_a_tensor_spans_its_elements_times_their_size(dtype, size):
    assert TensorSpec((3, 5, 7), dtype).ptr_range() == 105 * size


def test_a_problem_is_in_the_plainest_formats_unless_it_says_otherwise():
    assert (PROBLEM.x_format, PROBLEM.y_format, PROBLEM.scale_layout) == (None, "bf16", "rows")
    assert (PROBLEM.scatter, PROBLEM.n_bf16) == (False, 0)


def test_an_empty_tensor_spans_nothing():
    assert TensorSpec((0, 8), "bf16").ptr_range() == 0


def test_values_are_frozen_and_equal_by_content():
    assert len({Tile(16, 64, 64), Tile.parse("16x64x64")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROBLEM.m = 4
