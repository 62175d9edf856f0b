"""Hand-made rows of two sides in, cells and verdicts out."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import suites

from moelab import problems, records, regress
from moelab.regress import ADVISORY, PAIRED, SINGLE
from moelab.specs import Tile

QUIET = [[1000.0, 1001.0], [1002.0, 1001.0], [999.0, 1000.0]] * 2
NOISY = [
    [us * by for us in turn] for turn, by in zip(QUIET, [1, 1.2, 0.9, 1.1, 0.8, 1], strict=True)
]


def row(**changed):
    """A row that fits a limit of 1000 bytes; ``m`` makes it another cell."""
    return {
        "kernel": "moe_gemm_a8w8",
        **asdict(problems.problem("Llama4 Maverick", 1, 1, changed.pop("m", 512))),
        "target": "sm_90",
        "triton": "3.6.0",
        **asdict(Tile(16, 64, 64)),
        "num_warps": 4,
        "num_stages": 2,
        "mode": "full",
        "compile_key": "one",
        "status": "ok",
        "lds_bytes": 100,
        "lds_limit": 1000,
        "registers": 64,
        "spilled_registers": 0,
        "workgroups_per_cu": 2,
        "moelab": "0.1.0",
        "schema": records.SCHEMA_VERSION,
        **changed,
    }


def timed(samples=QUIET, by=1.0, run="first", **changed):
    """A measured row, its samples longer by a factor."""
    samples = [[us * by for us in turn] for turn in samples]
    measured = {"mode": "measured", "gpu": "NVIDIA H200", "workload": "uniform, 0", "run": run}
    measured |= {"time_us": float(np.median(samples)), "samples_us": json.dumps(samples)}
    made_by = json.dumps({"driver": "580", "date": "2026-11-23"})
    return row(**measured, made_by=made_by) | changed


def compared(baseline, candidate, **how):
    sides = [[side] if isinstance(side, dict) else side for side in (baseline, candidate)]
    return regress.compare(*map(records.frame, sides), **how)


def cell(baseline, candidate, **how):
    (found,) = compared(baseline, candidate, **how).cells.to_dict("records")
    return found


# Fit and resources.


REFUSED = {"status": "out_of_lds", "lds_bytes": 2000}
REJECTED = {"status": "compile_error", "lds_bytes": None}
WRONG = {"status": "wrong_result"}


@pytest.mark.parametrize(
    ("before", "after", "fits"),
    [
        ({}, {}, "passed"),
        ({}, REFUSED, "regressed"),
        (REFUSED, {}, "improved"),
        ({}, REJECTED, "regressed"),
        ({}, {"status": "crashed"}, "regressed"),
        ({}, WRONG, "regressed"),
        (WRONG, {}, "improved"),
        (REFUSED, REFUSED, "passed"),
        (REJECTED, REFUSED, "changed"),
        ({}, {"status": "timeout"}, "inconclusive"),
        ({}, {"status": "out_of_host_memory"}, "inconclusive"),
        ({"status": "crashed"}, {}, "inconclusive"),
        ({"status": "timeout"}, {"status": "timeout"}, "inconclusive"),
    ],
)
def test_what_fitted_and_no_longer_does_regressed_and_what_was_not_answered_is_open(
    before, after, fits
):
    assert cell(row(**before), row(**after))["fits"] == fits


def test_the_bytes_that_no_longer_fit_are_told():
    told = cell(row(), row(**REFUSED))
    assert told["verdict"] == "regressed"
    assert "ok -> out_of_lds (100 -> 2,000 of 1,000 bytes)" in told["what"]


def test_a_limit_that_nobody_told_is_left_out():
    assert cell(row(), row(**REFUSED, lds_limit=None))["what"] == "ok -> out_of_lds"


@pytest.mark.parametrize("failed", [WRONG, REJECTED])
def test_what_one_side_was_not_asked_is_no_change(failed):
    told = cell(row(mode="measured", **failed), row(mode="lds"))
    assert told["fits"] == "inconclusive"
    assert "asked as measured and as lds: ask both alike" in told["what"]
    # What the less asked of refuses, the other would have refused too; LDS is told by all.
    assert cell(row(mode="lds", **REJECTED), row(mode="measured"))["fits"] == "improved"
    assert cell(row(mode="lds"), row(mode="map", **REJECTED))["fits"] == "regressed"
    assert cell(row(mode="map"), row(mode="full", **REJECTED))["fits"] == "inconclusive"
    assert cell(row(mode="measured"), row(mode="lds", **REFUSED))["fits"] == "regressed"


@pytest.mark.parametrize(
    ("after", "resources", "what"),
    [
        ({}, "passed", ""),
        ({"lds_bytes": 200}, "changed", "lds_bytes 100 -> 200"),
        ({"registers": 70}, "changed", "registers 64 -> 70"),
        ({"spilled_registers": 3}, "regressed", "spilled_registers 0 -> 3"),
        ({"workgroups_per_cu": 1}, "regressed", "workgroups_per_cu 2 -> 1"),
        ({"workgroups_per_cu": 3}, "improved", "workgroups_per_cu 2 -> 3"),
        ({"registers": None}, "passed", ""),
    ],
)
def test_more_spills_or_less_occupancy_regressed_and_other_resources_are_told(
    after, resources, what
):
    told = cell(row(), row(**after))
    assert (told["resources"], told["what"]) == (resources, what)
    assert told["verdict"] == resources


def test_where_speed_was_judged_it_says_what_resources_cost():
    told = cell(timed(), timed(by=0.8, spilled_registers=3))
    assert (told["resources"], told["speed"], told["verdict"]) == (
        "changed",
        "improved",
        "improved",
    )
    assert "spilled_registers 0 -> 3" in told["what"]
    open_ = cell(timed(NOISY), timed(spilled_registers=3))
    assert (open_["resources"], open_["speed"]) == ("regressed", "inconclusive")


def test_what_was_not_launched_takes_nothing_that_could_grow():
    told = cell(row(**REFUSED, spilled_registers=0), row(spilled_registers=9))
    assert (told["fits"], told["resources"], told["verdict"]) == ("improved", "changed", "improved")
    assert "spilled_registers 0 -> 9" in told["what"]
    refused = cell(row(**REFUSED), row(**REFUSED, spilled_registers=9))
    assert refused["resources"] == "changed"


# Speed.


@pytest.mark.parametrize(
    ("candidate", "speed"),
    [
        (timed(), "passed"),
        (timed(by=1.05), "regressed"),
        (timed(by=0.9), "improved"),
        (timed(by=1.02), "passed"),
        (timed(NOISY), "inconclusive"),
        (timed(QUIET[:5], by=1.5), "inconclusive"),
    ],
)
def test_sides_that_took_turns_are_judged_by_their_rounds(candidate, speed):
    told = cell(timed(), candidate)
    assert (told["speed"], told["how"]) == (speed, PAIRED)


def test_the_threshold_is_what_a_slowdown_must_clear():
    assert cell(timed(), timed(by=1.05), threshold=0.1)["speed"] == "passed"
    assert cell(timed(), timed(by=1.02), threshold=0.01)["speed"] == "regressed"


def test_the_ratio_stands_between_its_bounds_and_is_told():
    told = cell(timed(), timed(NOISY, by=1.05))
    assert told["ratio_low"] < told["ratio"] < told["ratio_high"]
    assert f"time x{told['ratio']:.3f} ({told['ratio_low']:.3f} to" in told["what"]
    assert "rounds would decide it if it goes on so" in told["what"]


@pytest.mark.parametrize("by", [1.01, 1.5])
def test_another_runs_time_is_never_a_regression(by):
    told = compared(timed(), timed(by=by, run="second"))
    (only,) = told.cells.to_dict("records")
    assert only["how"] == ADVISORY
    assert told.verdict == ("inconclusive" if by == 1.5 else "passed")
    assert "measure both in one run for a verdict" in regress.text(told)


def test_of_one_figure_each_only_the_difference_is_told():
    published = timed(samples_us=None, run=None)
    told = compared(published, published | {"time_us": published["time_us"] * 1.2})
    (only,) = told.cells.to_dict("records")
    assert (only["how"], only["speed"]) == (SINGLE, "inconclusive")
    assert f"time x1.200 ({SINGLE})" in only["what"]


def test_a_single_round_is_one_figure():
    once = {"samples_us": json.dumps(QUIET[:1])}
    for sides in ((timed(), timed(**once)), (timed(**once), timed(**once, run="second"))):
        assert cell(*sides)["how"] == SINGLE


def test_times_of_other_routings_are_not_set_beside_each_other():
    told = cell(timed(), timed(by=2.0, workload="zipf, 0"))
    assert told["speed"] is None
    assert told["how"] is None


def simulated(noise, slowdown, runs=("first", "first"), shift=0.0):
    """A suite's rows as measured, 24 rounds each."""
    taken = noise.times(np.random.default_rng(0), slowdown)
    taken[:, :, 1] += shift
    samples = 1000 * np.exp(taken)
    return [
        [
            timed(samples[at, :, side].tolist(), run=run, m=None) | {"m": at}
            for at in range(len(slowdown))
        ]
        for side, run in enumerate(runs)
    ]


def test_rows_of_equal_code_come_out_clean():
    told = compared(*simulated(suites.MODERATE, np.zeros(40)))
    assert told.verdict == "passed"
    assert told.exit_code == 0
    mean, low, high = regress.overall(told)
    assert low < mean < high
    assert abs(mean - 1) < 0.003


def test_slow_cells_among_others_are_the_ones_named_first():
    slow = np.where(np.arange(40) < 2, 0.05, 0.0)
    told = compared(*simulated(suites.MODERATE, slow))
    assert told.exit_code == 1
    assert regress.counts(told) == {"regressed": 2, "passed": 38}
    assert set(told.cells["m"][:2]) == {0, 1}


def test_a_shift_between_runs_makes_no_regression():
    told = compared(*simulated(suites.MODERATE, np.zeros(40), ("first", "second"), shift=0.05))
    assert told.verdict == "inconclusive"
    assert "regressed" not in regress.counts(told)


def test_the_rounds_that_a_smaller_slowdown_needs_are_told():
    told = regress.text(compared(*simulated(suites.NOISY, np.zeros(40))))
    assert "in 95 of 100 comparisons by its 24 rounds; one of " in told


# Which rows are a cell.


def test_what_only_one_side_has_is_listed():
    told = compared([row(), row(m=2560)], [row(), row(m=8704)])
    assert list(told.cells["m"]) == [512]
    assert list(told.only_baseline["m"]) == [2560]
    assert list(told.only_candidate["m"]) == [8704]
    for said in (regress.text(told), regress.markdown(told), regress.as_json(told)):
        assert "2560" in said
        assert "8704" in said


def test_what_tells_no_rows_of_a_side_apart_is_what_is_compared():
    told = compared([row(num_stages=1)], [row(num_stages=3)])
    assert len(told.cells) == 1
    assert told.differs == {"num_stages": ("1", "3")}


def test_a_stage_policy_is_compared_tile_by_tile():
    tiles = [{"block_n": 64}, {"block_n": 128}]
    policy = [row(**tile, num_stages=n) for tile, n in zip(tiles, (1, 3), strict=True)]
    told = compared([row(**tile, num_stages=1) for tile in tiles], policy)
    assert list(told.cells["block_n"]) == [64, 128]
    assert "num_stages" not in told.matched_by
    assert told.differs == {"num_stages": ("1", "1, 3")}


def test_settings_that_both_sides_vary_tell_cells_apart():
    baseline = [row(num_stages=n, triton="3.6.0") for n in (1, 2)]
    candidate = [row(num_stages=n, triton="3.9.0") for n in (2, 3)]
    told = compared(baseline, candidate)
    assert list(told.cells["num_stages"]) == [2]
    assert list(told.only_baseline["num_stages"]) == [1]
    assert list(told.only_candidate["num_stages"]) == [3]
    assert told.differs["triton"] == ("3.6.0", "3.9.0")


@pytest.mark.parametrize(
    "other", [{"m": 2560}, {"kernel": "moe_gemm_a8w4"}, {"target": "gfx950"}, {"fast_accum": True}]
)
def test_another_problem_is_never_compared(other):
    with pytest.raises(ValueError, match=r"no cell is in both: the baseline has 1, such as kernel"):
        compared(row(), row(**other))


def test_of_a_store_that_answers_twice_the_row_counts_that_says_most():
    store = [row(mode="lds"), timed(), timed(by=3.0, run="zeroth", m=2560)]
    (told,) = compared(store, timed(by=1.1)).cells.to_dict("records")
    assert told["speed"] == "regressed"


def test_of_several_runs_the_shared_one_is_compared_else_the_last():
    runs = [timed(by=2.0, run="a"), timed(run="b"), timed(by=3.0, run="c")]
    assert cell(runs, timed(run="b"))["how"] == PAIRED
    assert cell(runs, timed(by=3.0, run="d"))["ratio"] == pytest.approx(1)


def test_of_source_that_changed_the_last_answer_counts():
    store = [row(**REFUSED, compile_key="old", mode="full"), row(compile_key="new", mode="lds")]
    assert cell(store, row())["fits"] == "passed"


def test_a_difference_in_what_made_the_rows_is_told():
    told = compared(timed(), timed(made_by=json.dumps({"driver": "590", "date": "2026-12-01"})))
    assert told.differs == {"made by: driver": ("580", "590")}
    assert "made by: driver (580 against 590)" in regress.text(told)
    assert "nothing that rows tell" in regress.text(compared(timed(), timed()))


def test_clocks_that_are_apart_differ_and_what_held_one_side_down():
    fast, slow = {"clock_mhz": 1980.0, "throttled": ""}, {"clock_mhz": 1800.0}
    told = compared(timed(**fast), timed(**slow, throttled="sw_power_cap"))
    assert told.differs == {
        "clock_mhz": ("1980", "1800"),
        "throttled": ("none", "sw_power_cap"),
    }
    assert compared(timed(**fast), timed(**fast | {"clock_mhz": 1970.0})).differs == {}
    assert compared(timed(), timed(**slow)).differs == {}


def test_both_sides_rows_stand_in_the_order_of_the_cells():
    candidate = [row(m=512), row(m=2560, **REFUSED, num_stages=3), row(m=8704, num_stages=3)]
    told = compared([row(m=512), row(m=2560), row(m=8704)], candidate)
    assert list(told.cells["m"][:1]) == [2560]
    assert list(told.rows["m"]) == list(told.cells["m"])
    assert list(told.rows["status c"]) == ["out_of_lds", "ok", "ok"]
    assert list(told.rows["num_stages b"]) == [2, 2, 2]
    assert list(told.rows["num_stages c"][:1]) == [3]


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 3, float("nan")])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match="give a fraction between 0 and 1"):
        compared(row(), row(), threshold=threshold)


# What is said.


@pytest.mark.parametrize(
    ("candidates", "verdict", "code"),
    [
        ([{}, {}], "passed", 0),
        ([{}, {"registers": 70}], "passed", 0),
        ([{}, {"status": "timeout"}], "inconclusive", 3),
        ([REFUSED, {"status": "timeout"}], "regressed", 1),
    ],
)
def test_the_gravest_cell_is_the_verdict(candidates, verdict, code):
    rows = [row(m=m, **changed) for m, changed in zip((512, 2560), candidates, strict=True)]
    told = compared([row(), row(m=2560)], rows)
    assert (told.verdict, told.exit_code) == (verdict, code)
    assert json.loads(regress.as_json(told))["exit_code"] == code
    assert regress.text(told).startswith(verdict)
    assert regress.markdown(told).startswith(f"## moelab compare: {verdict}\n")


HOSTILE = "a|b`<img src=x onerror=1>\n::error::x\x1b[31m[y](http://z) @org/team \u202e##[set]"


@pytest.mark.parametrize("column", ["kernel", "model", "args"])
def test_a_hostile_name_is_text_and_nothing_else(column):
    baseline = [row(**{column: HOSTILE}), row(**{column: HOSTILE}, m=2560)]
    candidate = [row(**{column: HOSTILE}, **REFUSED)]
    candidate[0]["model"], baseline[1]["model"] = baseline[0]["model"], "other\n# title"
    told = compared(baseline, candidate)
    markdown, text = regress.markdown(told), regress.text(told)
    for said in (markdown, text):
        assert "::error" not in said
        assert "##[" not in said
        assert not {"\x1b", "\u202e"} & set(said)
        assert "\n# title" not in said
    rows = [line for line in markdown.splitlines() if line.startswith("| `")]
    assert len(rows) == 2
    for line in rows:
        # All of it lies in code spans, between the table's own bars.
        spans = line.split("`")[1::2]
        assert line == "| " + " | ".join(f"`{span}`" for span in spans) + " |"
    header = [line for line in markdown.splitlines() if line.startswith("| verdict")]
    assert rows[0].count("|") == header[0].count("|")


@pytest.mark.parametrize(
    "driver", ["<b>@x</b>`[a](http://b)", "www.example.com", "https://example.com", "__x__ | *y*"]
)
def test_a_hostile_provenance_is_in_code_spans(driver):
    markdown = regress.markdown(compared(timed(), timed(made_by=json.dumps({"driver": driver}))))
    (line,) = [line for line in markdown.splitlines() if line.startswith("- The sides differ")]
    assert line.split("`")[::2] == ["- The sides differ in ", " (", " against ", ")."]


def test_long_lists_are_cut_and_counted():
    told = compared(
        [row(m=m) for m in range(512, 600)], [row(m=m, **REFUSED) for m in range(512, 600)]
    )
    assert "and 58 more; --json has every cell" in regress.text(told)
    assert "and 58 more" in regress.markdown(told)
    assert len(json.loads(regress.as_json(told))["cells"]) == 88


# The sides of A/B runs.


def ab_run(run, by, **changed):
    """One cell of an A/B run, its candidate slower by a factor."""
    return timed(run=run, side="base"), timed(run=run, side="candidate", by=by, **changed)


def test_ab_runs_of_one_file_are_cells_of_their_own():
    first, second = ab_run("first", 1.2, num_stages=3), ab_run("second", 1.0, num_stages=4)
    found = compared(*zip(first, second, strict=True))
    by_run = dict(zip(found.cells["run"], found.cells["speed"], strict=True))
    assert by_run == {"first": "regressed", "second": "passed"}
    assert set(found.cells["how"]) == {PAIRED}
    assert "run" in regress.table(found)
    assert found.differs["num_stages"] == ("2", "3, 4")


def test_a_side_of_one_ab_run_against_that_of_another_took_no_turns_with_it():
    base, _ = ab_run("first", 1.0)
    _, candidate = ab_run("second", 1.2)
    assert cell(base, candidate)["how"] == ADVISORY


def test_both_sides_of_ab_runs_against_those_of_later_ones_are_told_apart():
    found = compared(ab_run("first", 1.0), ab_run("second", 1.0))
    assert len(found.cells) == 2
    assert set(found.cells["side"]) == {"base", "candidate"}
