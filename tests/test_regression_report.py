"""Comparisons in; figures, tables and warnings that say no more than the rows."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import suites
from test_regress import HOSTILE, NOISY, QUIET, REFUSED, compared, row, simulated, timed

from moelab import baselines, cliffs, problems, published, regress, regression_report
from moelab.parameters import ParameterError
from moelab.regression_report import BASELINE, CANDIDATE, Case

CASE = Case("before", "after", "A title")
LONG = "x" * 5000
SCRIPT = "<script>alert(1)</script> $\\frac{ \x07\u202e"


def text(shown):
    """What a reader sees of HTML."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown.data))


def grid(by=1.0, ms=(512, 1536, 2560), **changed):
    return [timed(by=by, m=m, **changed) for m in ms]


# What is compared.


def test_every_case_is_of_rows_that_are_shipped():
    for name, case in regression_report.cases().items():
        assert re.fullmatch(r"[a-z_]+", name)
        assert case.title
        assert len(baselines.read(case.baseline)) and len(baselines.read(case.candidate))


def test_make_report_renders_every_case():
    makefile = (Path(regression_report.__file__).parents[1] / "Makefile").read_text()
    (named,) = re.findall(r"^CASES := (.*)$", makefile, re.MULTILINE)
    assert named.split() == [*regression_report.cases()]


def test_a_case_is_found_by_name_else_the_sources_are_it():
    name, case = next(iter(regression_report.cases().items()))
    assert regression_report.asked(name, "a", "b", "c") == case
    assert regression_report.asked("", "a", "b", "c") == Case("a", "b", "c")
    with pytest.raises(ParameterError, match=rf"case: no case 'x'; there are {name}, "):
        regression_report.asked("x", "a", "b", "c")


# The verdict.


def test_the_headline_says_the_verdict_how_many_moved_and_how_much_over_all():
    told = compared(grid(), [*grid(1.1, ms=(512,)), *grid(0.8, ms=(1536,)), *grid(ms=(2560,))])
    shown = regression_report.headline(told, CASE)
    assert 'class="verdict regressed"' in shown.data
    said = text(shown)
    for words in (
        "regressed A title",
        "slower by more than 3% 1 of 3",
        "faster by more than 3% 1 of 3",
        "times inconclusive 0 of 3",
        "no longer fit or fail 0 of 3",
        "Candidate after against baseline before",
    ):
        assert words in said
    assert f"\N{MULTIPLICATION SIGN}{(1.1 * 0.8) ** (1 / 3):.3f}" in said


def test_without_times_the_headline_tells_of_resources():
    told = compared([row(), row(m=2560)], [row(spilled_registers=9), row(m=2560, **REFUSED)])
    said = text(regression_report.headline(told, CASE))
    assert "no longer fit or fail 1 of 2" in said
    assert "spill more or have less occupancy 1 of 2" in said
    assert "slower" not in said


def test_a_headline_of_equal_code_is_clean():
    told = compared(*simulated(suites.MODERATE, np.zeros(40)))
    shown = regression_report.headline(told, CASE)
    assert 'class="verdict passed"' in shown.data
    assert "slower by more than 3% 0 of 40" in text(shown)
    assert regression_report.moved(told).empty


# What to beware of.


def warned(*sides):
    return " ".join(regression_report.warnings(compared(*sides)))


KNOWN = {"throttled": ""}


def test_of_sides_that_differ_in_one_thing_nothing_is_warned():
    assert warned(timed(**KNOWN), timed(by=1.001, **KNOWN)) == ""
    assert warned(timed(**KNOWN), timed(by=1.2, **KNOWN, num_stages=3, num_warps=8)) == ""
    named = [
        {"made_by": json.dumps({"driver": "580", "ab": f"stages={stages}"}), "num_stages": stages}
        for stages in (2, 3)
    ]
    assert warned(timed(**KNOWN | named[0]), timed(by=1.2, **KNOWN | named[1])) == ""


@pytest.mark.parametrize(
    ("changed", "subject"),
    [
        ({"made_by": json.dumps({"driver": "590"})}, "the driver (580 against 590)"),
        ({"made_by": json.dumps({"driver": "580", "torch": "2.12"})}, "PyTorch (none against"),
        ({"clock_mhz": 1500.0}, "the clocks (1980 against 1500)"),
        ({"throttled": "hw_slowdown"}, "what held the clocks down (none against hw_slowdown)"),
        ({"moelab": "0.2.0"}, "moelab (0.1.0 against 0.2.0)"),
    ],
)
def test_what_differs_beside_what_is_compared_is_warned_of(changed, subject):
    usual = KNOWN | {"clock_mhz": 1980.0}
    said = warned(timed(**usual), timed(**usual | {"num_stages": 3} | changed))
    assert "differ in more than one thing" in said
    assert "the configuration (2 against 3)" in said
    assert subject in said


def test_clocks_that_were_held_down_and_what_nobody_knows_are_told():
    held = warned(grid(throttled="sw_power_cap"), grid(throttled="sw_power_cap"))
    assert "(sw_power_cap) during 3 of the baseline's 3 times and 3 of the candidate's" in held
    assert "unknown of 3 of 3 times" in warned(grid(), grid())


def test_times_of_two_runs_and_single_figures_are_called_that():
    assert "3 times are of two runs" in warned(grid(), grid(run="second"))
    single = grid(samples_us=None, run=None)
    assert "3 times are one figure each" in warned(single, grid(1.2, samples_us=None, run=None))


def test_rows_that_are_on_both_sides_are_no_measurement():
    assert "In 1 of 2 timed cells both sides are one row" in warned(
        grid(ms=(512, 2560)), [*grid(ms=(512,)), *grid(1.1, ms=(2560,))]
    )


def test_cells_of_one_side_are_warned_of_and_listed():
    told = compared(grid(ms=(512, 1536)), grid(ms=(512, 2560, 3584)))
    assert "Only the baseline has 1 cells, only the candidate 2" in " ".join(
        regression_report.warnings(told)
    )
    listed = regression_report.one_sided(told)
    assert listed[["side", "cells", "M from", "to"]].to_numpy().tolist() == [
        [BASELINE, 1, 1536, 1536],
        [CANDIDATE, 2, 2560, 3584],
    ]
    assert regression_report.one_sided(compared(grid(), grid())).empty


# What moved.


def test_each_side_is_its_rows_in_the_order_of_the_cells():
    told = compared(grid(), [*grid(1.2, ms=(2560,), num_stages=3), *grid(ms=(512, 1536))])
    was, now = (regression_report.side(told, which) for which in (BASELINE, CANDIDATE))
    assert list(was["m"]) == list(now["m"]) == list(told.cells["m"])
    assert list(was["num_stages"]) == [2, 2, 2]
    assert list(now["num_stages"]) == [3, 2, 2]
    assert now["time_us"][0] == pytest.approx(1.2 * was["time_us"][0])


def test_the_summary_has_a_row_per_kernel_model_and_target():
    other = {"kernel": "moe_gemm_a8w4"}
    baseline = [*grid(), row(**other), row(**other, m=2560)]
    candidate = [*grid(1.1), row(**other, **REFUSED), row(**other, m=2560)]
    timed_kind, refused_kind = regression_report.summary(compared(baseline, candidate)).to_dict(
        "records"
    )
    assert timed_kind["what"] == "moe_gemm_a8w8, Llama4 Maverick"
    assert (timed_kind["timed"], timed_kind["slower"], timed_kind["faster"]) == (3, 3, 0)
    assert timed_kind["time (geometric mean)"].startswith("1.100 (")
    assert (refused_kind["cells"], refused_kind["no longer fits"]) == (2, 1)


def test_the_worst_cells_are_the_slowest_then_the_open_then_the_farthest():
    samples = {512: (QUIET, 1.1), 1536: (QUIET, 1.3), 2560: (NOISY, 1.0), 3584: (QUIET, 0.7)}
    told = compared(grid(ms=samples), [timed(of, by=by, m=m) for m, (of, by) in samples.items()])
    worst = regression_report.worst(told)
    assert list(worst["m"]) == [1536, 512, 2560, 3584]
    assert list(worst["speed"]) == ["regressed", "regressed", "inconclusive", "improved"]
    assert json.loads(worst["samples c"].iloc[1])[0] == pytest.approx([1100.0, 1101.1])


def test_no_kernel_crowds_the_others_out_of_the_worst():
    ms = range(512, 520)
    other = {"kernel": "moe_gemm_a8w4"}
    told = compared([*grid(ms=ms), *grid(**other)], [*grid(2.0, ms=ms), *grid(1.1, **other)])
    worst = regression_report.worst(told, most=4)
    assert list(worst["kernel"]) == ["moe_gemm_a8w8"] * 2 + ["moe_gemm_a8w4"] * 2


def test_cells_that_moved_are_named_with_time_and_what_they_take():
    (told,) = regression_report.moved(
        compared(timed(), timed(by=1.1, lds_bytes=200, spilled_registers=3))
    ).to_dict("records")
    assert told["cell"] == "moe_gemm_a8w8, Llama4 Maverick, layer 1, TP 1, M 512, 16x64x64"
    assert told["time"].startswith("\N{MULTIPLICATION SIGN}1.100 (")
    assert told["LDS (bytes)"] == "100 -> 200"
    assert told["spilled registers"] == "0 -> 3"
    assert "workgroups per CU" not in told


def test_fits_are_grouped_by_configuration_and_the_lost_come_first():
    baseline = [row(m=512), row(m=2560), row(m=8704, block_n=128, **REFUSED)]
    candidate = [
        *(row(m=m, num_stages=3, status="out_of_lds", lds_bytes=m) for m in (512, 2560)),
        row(m=8704, block_n=128),
    ]
    table = regression_report.fits(compared(baseline, candidate))
    lost, gained = table.to_dict("records")
    assert (lost["became"], gained["became"]) == ("no longer fits", "now fits")
    assert (lost["stages"], lost["status"], lost["cells"]) == ("2 -> 3", "ok -> out_of_lds", 2)
    assert (lost["LDS was (bytes)"], lost["is (bytes)"], lost["limit (bytes)"]) == (100, 2560, 1000)
    assert (gained["M from"], gained["to"]) == (8704, 8704)
    assert regression_report.fits(compared(row(), row())).empty


def test_resources_are_counted_where_both_sides_are_launched():
    baseline = [row(m=m, registers=64) for m in (512, 1536, 2560)]
    candidate = [
        row(m=512, registers=80),
        row(m=1536, registers=60),
        row(m=2560, registers=200, **REFUSED),
    ]
    (told,) = regression_report.resources(compared(baseline, candidate)).to_dict("records")
    assert (told["resource"], told["cells"], told["more"], told["less"]) == ("registers", 2, 1, 1)
    assert (told["largest rise"], told["largest fall"]) == ("64 -> 80", "64 -> 60")
    assert regression_report.resources(compared(row(), row())).empty


# Along M.


@pytest.fixture(scope="module")
def shipped():
    """The comparison of published stages, before the first fix and after."""
    case = regression_report.cases()["two_stages_to_one"]
    return regress.compare(baselines.read(case.baseline), baselines.read(case.candidate))


def test_published_figures_stand_on_the_side_that_has_their_launches(shipped):
    steps = regression_report.along_m(shipped)
    assert set(steps["side"]) == {CANDIDATE}
    assert set(steps[regression_report.SOURCE]) == {regression_report.PUBLISHED}
    launches = published.launches()
    cells = cliffs.cells(launches, published.PUBLISHED, published.CURVE)
    flagged = cliffs.steps(cells, published.CURVE)[cliffs.LOOK].sum()
    assert len(regression_report.flagged(steps)) == steps[cliffs.LOOK].sum() == flagged > 0
    assert "with no confidence" in text(regression_report.of_falls(steps))


def falling(at):
    """Rows whose tiles are almost full, at a throughput that is by half less at one M."""
    rows = []
    for m in problems.TOKENS[4:12]:
        tflops = 100.0 * (0.5 if m == at else 1.0)
        problem = vars(problems.problem("Qwen3-235B-A22B", 1, 1, m))
        rows.append(timed(tflops=tflops) | problem)
    return rows


def test_a_fall_is_flagged_on_the_side_where_it_is():
    told = compared(falling(None), falling(8704))
    flagged = regression_report.flagged(regression_report.along_m(told))
    assert list(flagged["M"]) == ["7,680 -> 8,704"]
    assert list(flagged["TFLOP/s"]) == ["100 -> 50"]
    assert list(flagged[regression_report.FLAGGED]) == [CANDIDATE]
    both = regression_report.flagged(
        regression_report.along_m(compared(falling(8704), falling(8704)))
    )
    assert list(both[regression_report.FLAGGED]) == ["baseline and candidate"]


@pytest.mark.parametrize("target", ["gfx_of_mine", "sm_90"])
def test_without_a_known_target_or_a_throughput_there_is_no_model(target):
    rows = [row(m=m, target=target) for m in (512, 1536)]
    steps = regression_report.along_m(compared(rows, rows))
    assert steps.empty
    assert regression_report.flagged(steps).empty
    assert "No two figures along M" in text(regression_report.of_falls(steps))


@pytest.mark.parametrize(
    "sizes", [{"m": 2**40}, {"experts": 2**30}, {"split_k": 0}, {"k": 0}, {"top_k": 1000}]
)
def test_a_batch_that_nobody_has_is_no_work_for_the_model(sizes):
    rows = [of | sizes for of in falling(None)[:1]]
    assert regression_report.along_m(compared(rows, rows)).empty


# Who made both sides.


def test_provenance_sets_both_sides_beside_each_other_and_marks_what_differs():
    told = regression_report.provenance(
        compared(
            timed(clock_mhz=1980.0, temperature_c=50.0),
            timed(clock_mhz=1979.0, temperature_c=60.0, made_by=json.dumps({"driver": "590"})),
        )
    ).set_index("what")
    assert list(told.loc["made by: driver"]) == ["580", "590", "differs"]
    assert told.loc["clock (MHz)", BASELINE].startswith("1980 in the median")
    # A MHz and some degrees are what any two runs differ by.
    assert set(told.index[told["differs"].notna()]) == {"made by: driver", "date"}


# Strangers' rows.


@pytest.mark.parametrize("name", [SCRIPT, LONG, HOSTILE])
def test_a_hostile_name_is_text_and_nothing_else(name):
    changed = {"kernel": name, "model": name, "gpu": name, "triton": name, "moelab": name}
    baseline = [timed(**changed), row(**{**changed, "gpu": None}, m=2560)]
    candidate = [timed(by=1.2, **changed), row(**{**changed, "gpu": None}, m=2560, **REFUSED)]
    candidate[0]["made_by"] = json.dumps({name: name})
    told = compared(baseline, candidate)
    steps = regression_report.along_m(told)
    pages = [
        regression_report.headline(told, Case(name, name, name)).data,
        regression_report.conclusion(told).data,
        regression_report.of_falls(steps).data,
    ]
    for table in (
        regression_report.summary(told),
        regression_report.moved(told),
        regression_report.fits(told),
        regression_report.resources(told),
        regression_report.provenance(told),
        regression_report.one_sided(told),
    ):
        pages.append(table.to_html())
    for page in pages:
        assert "<script" not in page and "<img" not in page
        assert not {"\x07", "\x1b", "\u202e"} & set(page)
        assert "x" * 1000 not in page


def test_interval_and_mean_are_those_of_the_comparison():
    told = compared(*simulated(suites.MODERATE, np.zeros(40)))
    (row_of,) = regression_report.summary(told).to_dict("records")
    mean, low, high = regress.overall(told)
    assert row_of["time (geometric mean)"] == f"{mean:.3f} ({low:.4f} to {high:.4f})"
    assert math.log(low) < 0 < math.log(high)
