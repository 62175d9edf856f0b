"""Hand-made rows in, literal answers out."""

from dataclasses import asdict, replace

import pandas as pd
import pytest

from moelab import problems, records, tables
from moelab.problems import AITER_TESTS
from moelab.specs import Tile

LIMIT = 1000
PROBLEM = asdict(problems.problem("Llama4 Maverick", 1, 1, 512))


def row(lds_bytes=100, **changed):
    """A row that fits, or doesn't, a limit of 1000 bytes."""
    fits = lds_bytes is not None and lds_bytes <= LIMIT
    return {
        "kernel": "moe_gemm_a8w8",
        **PROBLEM,
        "target": "gfx950",
        "triton": "3.9.0",
        "block_m": 16,
        "block_n": 64,
        "block_k": 64,
        "split_k": 1,
        "num_warps": 4,
        "num_stages": 1,
        "async_copy": True,
        "mode": "lds",
        "compile_key": "key",
        "status": "ok" if fits else "out_of_lds",
        "lds_bytes": lds_bytes,
        "lds_limit": LIMIT,
        "schema": 2,
        **changed,
    }


REJECTED = {"target": "sm_80", "async_copy": None, "status": "compile_error", "lds_bytes": None}


def frame(*rows):
    return records.frame(rows)


def pair(off, on, **changed):
    """The same configuration with async copy off and on."""
    return [row(off, async_copy=False, **changed), row(on, async_copy=True, **changed)]


def dicts(table, *columns):
    return table[list(columns)].to_dict("records")


# No rows, and rows that never compiled.


@pytest.mark.parametrize(
    "rows", [[], [row(**REJECTED)], [row(100, async_copy=None)], [row(100, async_copy=True)]]
)
def test_frames_without_pairs_raise_nowhere(rows):
    rows = frame(*rows)
    before = rows.copy()
    assert tables.async_copy_difference(rows).empty
    for question in (tables.statuses, tables.lds_by_stages, tables.largest_stages):
        assert len(question(rows)) <= len(rows)
        assert tables.shown(question(rows)).data
    assert set(tables.aiter_tests(rows).iloc[0, 1:5]) == {"not compiled here"}
    assert isinstance(tables.conclusion(rows), str)
    pd.testing.assert_frame_equal(rows, before)


def test_no_rows_conclude_nothing():
    assert tables.conclusion(frame()) == ""


# Labels.


def test_tiles_and_async_copy_are_put_in_words():
    labelled = tables.labelled(
        frame(row(async_copy=True), row(async_copy=False), row(async_copy=None, block_n=512))
    )
    assert list(labelled[tables.ASYNC_COPY]) == ["on", "off", "no switch"]
    assert list(labelled["tile"]) == ["16x64x64", "16x64x64", "16x512x64"]


def test_a_shared_reduction_is_part_of_the_tiles_name():
    labelled = tables.labelled(frame(row(), row(split_k=7), row(split_k=14)))
    assert list(labelled["tile"]) == ["16x64x64", "16x64x64/7", "16x64x64/14"]
    assert [str(Tile.parse(tile)) for tile in labelled["tile"]] == list(labelled["tile"])


def test_tiles_that_share_a_reduction_differently_have_rows_of_their_own():
    rows = frame(*[row(100 * split_k, split_k=split_k) for split_k in (1, 7, 14)])
    table = tables.lds_by_stages(rows)
    assert list(table["tile"]) == ["16x64x64", "16x64x64/7", "16x64x64/14"]
    assert list(table["1 stage (bytes)"]) == [100, 700, 1400]


def test_tiles_are_in_order_of_their_numbers_and_not_their_letters():
    rows = frame(*[row(block_m=m, block_n=n) for m, n in ((128, 64), (16, 512), (16, 64))])
    for table in (tables.lds_by_stages(rows), tables.largest_stages(rows)):
        assert list(table["tile"]) == ["16x64x64", "16x512x64", "128x64x64"]


# Statuses.


def test_statuses_are_counted_and_an_absent_one_has_no_column():
    rows = frame(row(), row(m=1536), row(2000, m=2560), row(num_stages=2), row(**REJECTED))
    assert tables.statuses(rows).to_dict("records") == [
        {
            "kernel": "moe_gemm_a8w8",
            "target": target,
            "triton": "3.9.0",
            "async copy": switch,
            "num_stages": stages,
            "compile_error": rejected,
            "ok": ok,
            "out_of_lds": out,
            "configurations": rejected + ok + out,
        }
        for target, switch, stages, rejected, ok, out in (
            ("gfx950", "on", 1, 0, 2, 1),
            ("gfx950", "on", 2, 0, 1, 0),
            ("sm_80", "no switch", 1, 1, 0, 0),
        )
    ]


# LDS by stages.


def test_lds_is_the_most_that_any_problem_needs():
    rows = frame(row(100), row(300, m=1536), row(200, m=2560), row(600, num_stages=2))
    assert tables.lds_by_stages(rows).to_dict("records") == [
        {
            "kernel": "moe_gemm_a8w8",
            "target": "gfx950",
            "triton": "3.9.0",
            "tile": "16x64x64",
            "num_warps": 4,
            "async copy": "on",
            "1 stage (bytes)": 300,
            "2 stages (bytes)": 600,
            "limit (bytes)": 1000,
        }
    ]


def test_a_stage_count_that_was_not_asked_of_a_tile_stays_missing():
    table = tables.lds_by_stages(frame(row(100), row(2000, block_n=128, num_stages=3)))
    assert table["1 stage (bytes)"].tolist() == [100, pd.NA]
    assert table["3 stages (bytes)"].tolist() == [pd.NA, 2000]


@pytest.mark.parametrize("name", ["num_warps", "triton", "target", "kernel"])
def test_tilings_that_differ_in_anything_have_rows_of_their_own(name):
    other = {"num_warps": 8, "triton": "3.8.0", "target": "gfx942", "kernel": "moe_gemm_a8w4"}
    rows = frame(row(100), row(200, **{name: other[name]}))
    assert sorted(tables.lds_by_stages(rows)["1 stage (bytes)"]) == [100, 200]


# Async copy.


@pytest.mark.parametrize(
    ("off", "on", "verdict"),
    [
        (400, 800, "fits"),
        (LIMIT, LIMIT, "fits"),
        (400, 2000, "no longer fits"),
        (LIMIT, LIMIT + 1, "no longer fits"),
        (1500, 2000, "never fits"),
        (2000, 400, "now fits"),
    ],
)
def test_async_copy_has_a_verdict_on_the_fit(off, on, verdict):
    (found,) = tables.async_copy_difference(frame(*pair(off, on))).to_dict("records")
    assert found == {
        "kernel": "moe_gemm_a8w8",
        "target": "gfx950",
        "triton": "3.9.0",
        "tile": "16x64x64",
        "num_warps": 4,
        "num_stages": 1,
        "off (bytes)": off,
        "on (bytes)": on,
        "added (bytes)": on - off,
        "limit (bytes)": LIMIT,
        "verdict": verdict,
    }


def test_only_pairs_are_compared_and_bytes_stay_whole():
    rows = frame(*pair(100, 200), row(300, num_stages=2), row(50, async_copy=None, target="sm_90"))
    found = tables.async_copy_difference(rows)
    assert dicts(found, "num_stages", "off (bytes)", "on (bytes)") == [
        {"num_stages": 1, "off (bytes)": 100, "on (bytes)": 200}
    ]
    assert {str(found[f"{name} (bytes)"].dtype) for name in ("off", "on", "added")} == {"Int64"}


def test_the_worst_problem_decides_on_either_side():
    found = tables.async_copy_difference(frame(*pair(100, 200), *pair(150, 2000, m=1536)))
    assert dicts(found, "off (bytes)", "on (bytes)", "verdict") == [
        {"off (bytes)": 150, "on (bytes)": 2000, "verdict": "no longer fits"}
    ]


# The largest stage count.


def largest(*rows):
    (found,) = dicts(
        tables.largest_stages(frame(*rows)),
        "largest stage count that fits",
        "LDS (bytes)",
        "free (bytes)",
        "asked up to",
    )
    return tuple(None if pd.isna(figure) else figure for figure in found.values())


def test_the_largest_stage_count_comes_with_what_it_needs_and_leaves():
    found = largest(row(300), row(600, num_stages=2), row(1200, num_stages=3))
    assert found == (2, 600, 400, 3)


def test_a_tile_that_fits_to_the_byte_fits():
    assert largest(row(LIMIT)) == (1, LIMIT, 0, 1)


def test_where_none_fits_the_count_is_0_and_its_bytes_are_missing():
    assert largest(row(1500), row(3000, num_stages=2)) == (0, None, None, 2)


def test_a_stage_count_that_fits_one_problem_only_does_not_count():
    found = largest(row(300), row(350, m=1536), row(900, num_stages=2), row(1100, m=1536))
    assert found[0] == 2
    found = largest(
        row(300), row(350, m=1536), row(900, num_stages=2), row(1100, m=1536, num_stages=2)
    )
    assert found == (1, 350, 650, 2)


@pytest.mark.parametrize("status", ["crashed", "timeout", "compile_error", "out_of_tmem"])
def test_a_stage_count_whose_answer_is_unknown_does_not_count(status):
    assert largest(row(300), row(None, num_stages=2, status=status)) == (1, 300, 700, 2)


def test_async_copy_on_and_off_have_their_own_largest():
    table = tables.largest_stages(frame(*pair(300, 600), *pair(600, 1200, num_stages=2)))
    assert dicts(table, "async copy", "largest stage count that fits") == [
        {"async copy": "off", "largest stage count that fits": 2},
        {"async copy": "on", "largest stage count that fits": 1},
    ]


# The tests that failed.

BEFORE_OFF, BEFORE_ON, FIRST_FIX, LATER_FIX = (
    "before #2723, async copy off",
    "before #2723, async copy on",
    "after #2723, async copy on",
    "after #3372, async copy on",
)
A8W8 = next(test for test in AITER_TESTS if test.name == "test_moe_gemm_a8w8")


def launches(test=A8W8, tile="128x256x256", **statuses):
    """Rows of a test's launches under 2 stages off, 2 on and 1 on."""
    problem = test.problems[0]
    settings = {"two_off": (2, False), "two_on": (2, True), "one_on": (1, True)}
    return [
        row(
            kernel=test.kernel,
            **asdict(replace(problem, m=m)),
            **asdict(Tile.parse(tile)),
            num_warps=8,
            num_stages=settings[name][0],
            async_copy=settings[name][1],
            status=status,
        )
        for name, each in statuses.items()
        for m, status in enumerate(each, start=1)
    ]


def verdicts(*rows, test=A8W8):
    table = tables.aiter_tests(frame(*rows)).set_index("test")
    return table.loc[test.name].to_dict()


def test_the_failing_test_is_told_under_every_policy():
    found = verdicts(
        *launches(
            two_off=["ok", "ok"],
            two_on=["ok", "out_of_lds"],
            one_on=["ok", "ok"],
        )
    )
    # After #3372 a tile with 128 rows has 1 stage.
    assert found == {
        BEFORE_OFF: "passes (2)",
        BEFORE_ON: "FAILS (1 of 2 out of LDS)",
        FIRST_FIX: "passes (2)",
        LATER_FIX: "passes (2)",
        "made to pass by": "#2723",
    }


def test_a_policy_whose_stages_were_not_compiled_says_so():
    found = verdicts(*launches(two_on=["out_of_lds"]))
    assert found[BEFORE_OFF] == "not compiled here"
    assert found[BEFORE_ON] == "FAILS (1 of 1 out of LDS)"
    assert found[FIRST_FIX] == found[LATER_FIX] == "not compiled here"


def test_a_launch_that_failed_otherwise_is_not_called_out_of_lds():
    found = verdicts(*launches(two_on=["crashed", "ok"], one_on=["compile_error", "out_of_lds"]))
    assert found[BEFORE_ON] == "FAILS (1 of 2 crashed)"
    assert found[FIRST_FIX] == "FAILS (2 of 2 compile_error, out of LDS)"


def test_a_test_is_judged_by_the_stages_of_its_own_tile():
    test = next(test for test in AITER_TESTS if test.kernel == "fused_gemm_afp4wfp4_a16w16")
    rows = launches(test, "64x32x512/7", two_on=["out_of_lds"], one_on=["ok"])
    found = verdicts(*rows, test=test)
    assert found[BEFORE_ON] == found[FIRST_FIX] == "FAILS (1 of 1 out of LDS)"
    assert found[LATER_FIX] == "passes (1)"
    assert found["made to pass by"] == "#2784"


def test_every_test_that_is_named_has_a_row_in_their_order():
    table = tables.aiter_tests(frame(*launches(two_off=["ok"])))
    assert list(table["test"]) == [test.name for test in AITER_TESTS]
    assert dict(zip(table["test"], table["made to pass by"], strict=True)) == {
        "test_moe_gemm_a4w4": "#2723",
        "test_moe_gemm_a8w4": "#2723",
        "test_moe_gemm_a8w8": "#2723",
        "test_moe_gemm_a8w8_blockscale": "not by #2723",
        "test_ff_a16w16_fused": "#2940",
        "test_fused_gemm_afp4wfp4_a16w16": "#2784",
    }
    others = table[table["test"] != "test_moe_gemm_a8w8"]
    assert set(others[BEFORE_OFF]) == {"not compiled here"}


# The conclusion.


def test_the_conclusion_sums_up_what_async_copy_costs_and_what_fits():
    conclusion = tables.conclusion(
        frame(
            *pair(200, 200),
            *pair(400, 1200, num_stages=2),
            *pair(100, 100, block_n=32),
            *pair(300, 450, block_n=32, num_stages=2),
        )
    )
    assert conclusion.splitlines() == [
        "- **moe_gemm_a8w8 on gfx950, 2 stages** (Triton 3.9.0): async copy multiplies LDS by "
        "2.25 (median over 2 tiles). No longer fitting: 16x64x64. The largest goes "
        "from 400 to 1,200 of 1,000 bytes.",
        "- **moe_gemm_a8w8 on gfx950**: the largest stage count that fits every problem is "
        "1 for 16x64x64; 2 for 16x32x64 (stage counts up to 2 were asked).",
    ]


def test_where_everything_fits_the_conclusion_blames_nothing():
    conclusion = tables.conclusion(frame(*pair(200, 400)))
    assert "multiplies" not in conclusion
    assert "1 for 16x64x64 (stage counts up to 1 were asked)" in conclusion


@pytest.mark.parametrize("async_copy", [True, False, None])
def test_a_sweep_with_one_setting_has_a_conclusion_too(async_copy):
    rows = frame(row(200, async_copy=async_copy), row(400, async_copy=async_copy, num_stages=2))
    assert "is 2 for 16x64x64" in tables.conclusion(rows)


def test_of_two_settings_the_conclusion_speaks_of_async_copy_on():
    conclusion = tables.conclusion(frame(*pair(300, 600), *pair(600, 1200, num_stages=2)))
    assert "is 1 for 16x64x64 (stage" in conclusion
    assert "2 for 16x64x64" not in conclusion


def test_rejected_rows_are_named_with_their_status():
    conclusion = tables.conclusion(frame(row(), row(**REJECTED), row(**REJECTED, m=1536)))
    assert "- **moe_gemm_a8w8 on sm_80**: 2 rows ended in `compile_error`." in conclusion


# How tables are shown.


def test_what_holds_throughout_is_said_once_above_the_table():
    table = pd.DataFrame({"kernel": ["a", "a"], "tile": ["x", "y"], "bytes": [1234567, 1]})
    html = tables.shown(table).data
    assert "<p>Throughout: kernel a.</p>" in html
    assert "<th>kernel</th>" not in html
    assert "<td>1,234,567</td>" in html


def test_shown_says_in_words_where_sums_are_kept():
    table = pd.DataFrame({"fast_accum": [True, False], "tflops": [2.0, 1.0]})
    page = tables.shown(table).data
    assert "<th>sums in</th>" in page and "fast_accum" not in page
    assert "<td>the tensor cores</td>" in page and "<td>fp32</td>" in page


@pytest.mark.parametrize(
    "table", [pd.DataFrame({"a": [1], "b": [2]}), pd.DataFrame({"a": [1, 1], "b": [2, 2]})]
)
def test_a_single_row_and_a_table_of_equals_are_shown_whole(table):
    html = tables.shown(table).data
    assert "Throughout" not in html
    assert "<th>a</th>" in html and "<th>b</th>" in html


def test_missing_figures_and_words_are_shown_empty():
    table = pd.DataFrame({"figure": [1234, None], "word": ["a", None]}).astype(
        {"figure": "Int64", "word": "string"}
    )
    html = tables.shown(table).data
    assert "<td>1,234</td>" in html
    assert html.count("<td></td>") == 2
    assert "NA" not in html and "nan" not in html


def test_shown_escapes_html_in_columns_cells_and_above():
    attack = "<script>alert(1)</script>"
    table = pd.DataFrame({"same": [attack] * 2, attack: [1, 2], "cell": [attack, "b"]})
    html = tables.shown(table).data
    assert attack not in html
    assert html.count("&lt;script&gt;") == 3


def test_a_table_without_rows_says_so():
    assert tables.shown(pd.DataFrame({"fast_accum": [], "tflops": []})).data == "<p>None.</p>"


def test_what_is_missing_throughout_is_not_shown():
    import pandas as pd

    table = pd.DataFrame({"tile": ["a", "b"], "limit": [1000, 1000], "free": [None, None]})
    page = tables.shown(table.astype({"free": "Int64"})).data
    assert "Throughout: limit 1,000." in page
    assert "free" not in page
    assert "NA" not in page
