"""A map is right where it explains the LDS to the last byte."""

from dataclasses import replace

import pytest

from moelab import lds_map, specs


def buffer(name="x", offset=0, size=1024, first=10, last=20, **changed):
    made = specs.Buffer(
        name=name,
        operation="local_alloc",
        line="kernel.py:7",
        shape=(16, 64),
        dtype="fp8e4nv",
        copies=1,
        padding_bytes=0,
        offset=offset,
        size_bytes=size,
        first=first,
        last=last,
    )
    return replace(made, **changed)


X = buffer("x")
W = buffer("w", offset=1024, size=4096, copies=2, padding_bytes=64)
SCRATCH = buffer(
    "convert_layout of acc", size=2048, first=25, last=26, operation="convert_layout", copies=1
)


def test_every_byte_has_its_owners_and_shared_bytes_say_when():
    regions = lds_map.explained([X, W, SCRATCH], 5120)
    assert [(region.offset, region.size_bytes) for region in regions] == [
        (0, 1024),
        (1024, 1024),
        (2048, 3072),
    ]
    assert [region.owners for region in regions] == [(X, SCRATCH), (W, SCRATCH), (W,)]
    assert "x until 20, convert_layout of acc from 25" in regions[0].why
    assert regions[2].why == ""


def test_one_operation_may_take_over_where_another_ends():
    lds_map.explained([X, replace(X, first=X.last, last=30)], 1024)


def test_nothing_explains_no_lds():
    assert lds_map.explained([], 0) == ()


@pytest.mark.parametrize("first", [10, 15, 19])
def test_two_that_live_in_the_same_bytes_are_found(first):
    late = buffer("late", offset=512, first=first, last=40)
    with pytest.raises(lds_map.UnexplainedError, match="both live in bytes 512 to 1,024"):
        lds_map.explained([X, late], 1536)


def test_a_long_life_is_held_against_all_that_follow_it():
    """The one in between ends before the last begins, the first does not."""
    first, between, last = (
        buffer("first", first=0, last=100),
        buffer("between", first=10, last=20),
        buffer("last", first=30, last=40),
    )
    with pytest.raises(lds_map.UnexplainedError, match=r"first .* and between"):
        lds_map.explained([last, between, first], 1024)


@pytest.mark.parametrize("lds_bytes", [5119, 5121])
def test_an_end_that_is_not_the_total_is_found(lds_bytes):
    with pytest.raises(lds_map.UnexplainedError, match="the buffers end at 5,120"):
        lds_map.explained([X, W], lds_bytes)


def test_a_gap_is_explained_by_alignment_alone():
    aligned = buffer("w", offset=1152)
    (gap,) = [r for r in lds_map.explained([replace(X, size_bytes=1056), aligned], 2176) if r.why]
    assert (gap.offset, gap.size_bytes, gap.owners) == (1056, 96, ())
    with pytest.raises(lds_map.UnexplainedError, match="no buffer owns bytes 1,024 to 1,152"):
        lds_map.explained([X, aligned], 2176)
    with pytest.raises(lds_map.UnexplainedError, match="no buffer owns bytes 1,024 to 4,096"):
        lds_map.explained([X, buffer("w", offset=4096)], 5120)


def test_the_table_has_a_line_for_each_buffer():
    table = lds_map.table([X, W])
    assert list(table["buffer"]) == ["x", "w"]
    assert list(table["shape"]) == ["16x64", "16x64"]
    assert list(table["padding (bytes)"]) == [0, 64]


def test_a_map_comes_back_from_json_on_one_line():
    of = specs.LdsMap((X, W, SCRATCH), 60)
    assert lds_map.from_json(lds_map.to_json(of)) == of
    assert "\n" not in lds_map.to_json(of)
    none = specs.LdsMap(missing="this build prints nothing")
    assert lds_map.from_json(lds_map.to_json(none)) == none


def test_the_sentence_names_what_takes_most():
    said = lds_map.sentence([X, W], 5120, 65536, 2)
    assert said == "w takes 4,096 of 5,120 bytes: 2 stages of 2,048."


def test_the_sentence_says_what_async_copy_added():
    one = replace(W, copies=1, size_bytes=2048)
    assert "async copy added one of them" in lds_map.sentence([X, W], 5120, 65536, 2, [X, one])
    assert "async copy added none of it" in lds_map.sentence([X, W], 5120, 65536, 2, [X, W])
    plain = replace(W, size_bytes=4032)
    assert "changed it by +64 bytes" in lds_map.sentence([X, W], 5120, 65536, 2, [X, plain])
    assert "there is no such buffer" in lds_map.sentence([X, W], 5120, 65536, 2, [X])


def test_padding_that_copies_share_unevenly_is_no_exact_size_of_each():
    padded = replace(W, size_bytes=4097)
    assert "2 stages of about 2,048" in lds_map.sentence([X, padded], 5121, 65536, 2)


def test_the_sentence_says_by_how_much_it_does_not_fit():
    said = lds_map.sentence([X, W], 5120, 4096, 3)
    assert "2 copies of 2,048 at num_stages = 3" in said
    assert "1,024 more than the limit of 4,096" in said


def test_the_sentence_names_scratch_that_rises_above_the_loop():
    high = replace(SCRATCH, size_bytes=8192)
    said = lds_map.sentence([X, W, high], 8192, 65536, 2)
    assert said == (
        "convert_layout of acc takes 8,192 of 8,192 bytes: scratch of one operation, "
        "where what outlives an operation ends at 5,120."
    )


def test_the_sentence_weighs_only_what_lives_where_the_lds_is_fullest():
    earlier = buffer("earlier", size=3000, first=0, last=5)
    late = buffer("late", offset=2048, size=2048, first=10, last=20)
    assert lds_map.sentence([earlier, X, late], 4096, 65536, 2).startswith("late takes 2,048")


@pytest.mark.parametrize(("buffers", "words"), [([], "No LDS"), ([X], "x takes 1,024 of 1,024")])
def test_the_sentence_of_one_buffer_or_none(buffers, words):
    assert lds_map.sentence(buffers, 1024 * len(buffers), 65536, 1).startswith(words)
