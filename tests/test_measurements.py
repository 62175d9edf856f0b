"""What is said of measured rows is computed from them, whatever became of the launches."""

import json
import math

import pytest

from moelab import measurements, records

DIFFERENCE = measurements.DIFFERENCE


def row(time_us=100.0, spread=0.001, **changed):
    """A measured row of layer 1, whose interval is ``spread`` to each side."""
    return {
        "kernel": "moe_gemm_a8w8",
        "model": "Qwen3-235B-A22B",
        "layer": 1,
        "tp": 1,
        "m": 512,
        "top_k": 8,
        "n": 3072,
        "k": 4096,
        "target": "sm_90",
        "triton": "3.6.0",
        "block_m": 64,
        "block_n": 128,
        "block_k": 128,
        "split_k": 1,
        "num_warps": 4,
        "num_stages": 2,
        "mode": "measured",
        "run": "today",
        "status": "ok",
        "lds_bytes": 1024,
        "loaded_lds_bytes": 1024,
        "lds_limit": 4096,
        "time_us": time_us,
        "time_low_us": time_us and time_us * math.exp(-spread),
        "time_high_us": time_us and time_us * math.exp(spread),
        "throttled": "",
        **changed,
    }


def not_timed(status, reason=None, **changed):
    return row(None, status=status, reason=reason, **{"loaded_lds_bytes": None} | changed)


def tally(*rows):
    return measurements.tally(records.frame(rows)).splitlines()


# Tally.


def test_where_all_goes_well_the_tally_is_two_lines():
    assert tally(row(), row(num_stages=3)) == [
        "2 configurations asked, 2 launched, 2 timed; not timed: none",
        "LDS told = loaded in 2 of 2; OutOfResources 0; told to fit and left out 0",
    ]


def test_what_was_not_timed_is_counted_by_its_status_and_by_whether_it_fits():
    first, second = tally(
        row(),
        not_timed("out_of_lds", lds_bytes=5000),
        not_timed("compile_error", lds_bytes=None),
        not_timed("out_of_memory"),
        not_timed("timeout"),
        not_timed("wrong_result", loaded_lds_bytes=1024),
        not_timed("lds_differs", loaded_lds_bytes=2048),
        not_timed("launch_error", "OutOfResources: out of resource: shared memory, Required: 5000"),
        not_timed("launch_error", "RuntimeError: Triton Error [CUDA]: invalid argument"),
    )
    assert first.startswith("9 configurations asked, 5 launched, 1 timed; not timed: ")
    assert "2 launch_error" in first and "1 out_of_lds" in first and "ok" not in first
    # The memory and the timeout cost two that fit; what doesn't fit or isn't told is not left out.
    assert second == "LDS told = loaded in 2 of 3; OutOfResources 1; told to fit and left out 2"


def test_a_peers_row_is_no_configuration():
    peer = row(peer="DeepGEMM", lds_bytes=None, loaded_lds_bytes=None, block_m=None)
    first, second = tally(row(), peer)
    assert first.startswith("1 configurations asked, 1 launched, 1 timed")
    assert "1 of 1" in second and second.endswith("left out 0")


def test_throttling_is_said_with_its_reasons():
    lines = tally(row(throttled="sw_power_cap"), row(throttled="hw_slowdown,sw_power_cap"), row())
    assert lines[2:] == [
        "THROTTLED: the GPU held its clocks down (hw_slowdown, sw_power_cap) during 2 of 3 times"
    ]


def test_throttling_that_is_not_known_is_said_with_what_would_tell():
    lines = tally(row(throttled=None), not_timed("out_of_lds", throttled=None))
    assert lines[2:] == [
        "whether the GPU was throttled is not known of 1 times: install nvidia-ml-py, or amdsmi"
    ]


def test_noise_is_said_with_what_helps():
    assert tally(row(spread=0.02), row(num_stages=3))[2:] == [
        "NOISY: 1 of 2 times may differ by 2% or more when measured again; give more --rounds"
    ]


# Noise.


def test_a_time_is_noisy_where_two_of_its_kind_may_differ_by_2_percent():
    limit = math.log(1.02) / math.sqrt(2)
    rows = [row(spread=spread) for spread in (0, 0.99 * limit, 1.01 * limit, 0.2)]
    assert list(measurements.noisy(records.frame(rows))) == [False, False, True, True]


def test_what_was_not_timed_is_not_noisy():
    assert list(measurements.noisy(records.frame([not_timed("timeout")]))) == [False]


def test_a_ratio_of_two_times_has_the_interval_of_both():
    middle, low, high = measurements.faster(row(200.0, spread=0.03), row(100.0, spread=0.04))
    assert middle == pytest.approx(2)
    assert (low, high) == pytest.approx((2 * math.exp(-0.05), 2 * math.exp(0.05)))


# Tables.


def test_both_layers_share_one_throughput_and_one_layer_alone_has_none():
    both = {"both_layers_us": 300.0}
    second = {"layer": 2, "n": 4096, "k": 1536}
    rows = records.frame(
        [row(**both), row(**second, **both), row(**second, num_stages=3), row(m=1536, **both)]
    )
    flops = 2 * 512 * 8 * 4096 * (3072 + 1536)
    found = measurements.both_layers_tflops(rows)
    assert list(found[:2]) == [pytest.approx(flops / 300e6)] * 2
    assert found[2:].isna().all()


def test_the_table_has_what_there_is_and_marks_what_to_distrust():
    rows = records.frame([row(tflops=100.0, roof_tflops=200.0), not_timed("out_of_lds")])
    table = measurements.table(rows)
    assert table["of the roof"].iloc[0] == 0.5
    assert {"noisy", "throttled by", "both layers (us)", "TFLOP/s of both"} & set(table) == set()
    worse = row(spread=0.05, throttled="sw_power_cap")
    marks = measurements.table(records.frame([worse, row()]))[["noisy", "throttled by"]]
    assert list(marks.iloc[0]) == ["noisy", "sw_power_cap"]
    assert marks.iloc[1].isna().all()


def of_peer(**changed):
    no_tile = dict.fromkeys(("block_m", "block_n", "block_k", "split_k", "num_warps"))
    return row(peer="torch", includes="gather", **no_tile, **changed)


def test_peers_stand_in_the_table_after_ours_of_the_same_problem():
    rows = records.frame([row(), row(m=1536), of_peer(time_us=50.0), of_peer(m=1536)])
    table = measurements.table(rows)
    assert list(table["m"]) == [512, 512, 1536, 1536]
    assert list(table["peer"].fillna("ours")) == ["ours", "torch"] * 2
    assert list(table["tile"].fillna("none")) == ["64x128x128", "none"] * 2
    assert list(table["time (us)"]) == [100, 50, 100, 100]
    assert {"peer", "includes"} & set(measurements.table(rows[:2])) == set()


def test_peers_that_were_not_timed_are_counted_apart():
    missing = of_peer(time_us=None, status="unavailable", reason="no module torch")
    lines = tally(row(), of_peer(), missing)
    assert lines[0].startswith("1 configurations asked, 1 launched, 1 timed; not timed: none")
    assert lines[2:] == ["1 launches of peers timed; not timed: torch unavailable"]


def test_what_rows_were_made_with_names_all_that_differs():
    said = [
        {"torch": "2.11", "date": "2026-11-23 19:58 UTC", "kernel": "bb"},
        {"torch": "2.11", "date": "2026-11-23 17:24 UTC", "kernel": "aa"},
        {"torch": "2.11", "date": "2026-11-23 18:00 UTC", "kernel": "aa"},
    ]
    rows = records.frame([row(made_by=json.dumps(each)) for each in said])
    assert measurements.made_by(rows) == (
        "Measured with torch 2.11; date 2026-11-23 17:24 UTC to 2026-11-23 19:58 UTC; kernel aa, bb"
    )
    assert measurements.made_by(rows[:1]).endswith("date 2026-11-23 19:58 UTC; kernel bb")


# A second run.


def test_cells_of_two_runs_are_paired_and_the_worst_comes_first():
    first = records.frame([row(100.0), row(50.0, num_stages=3), row(70.0, num_stages=4)])
    second = records.frame([row(51.5, num_stages=3, run="later"), row(99.0, run="later")])
    compared = measurements.compare(first, second)
    assert list(compared["num_stages"]) == [3, 2]
    assert list(compared[DIFFERENCE]) == pytest.approx([3, -1])
    assert measurements.agreement(compared) == (
        "2 cells were timed twice. They differ by 2.00% in the median and by 3.00% at most; "
        "1 by 2% or more, of which 0 were marked noisy; 0 were marked and agree"
    )


def test_a_cell_is_noisy_if_either_run_marks_it():
    noisy = row(103.0, spread=0.05, run="later")
    compared = measurements.compare(records.frame([row()]), records.frame([noisy]))
    assert list(compared["noisy"]) == [True]
    assert "1 by 2% or more, of which 1 were marked noisy" in measurements.agreement(compared)


def test_runs_without_a_common_cell_are_told_as_such():
    runs = records.frame([row()]), records.frame([row(gpu="another")])
    assert measurements.agreement(measurements.compare(*runs)) == "no cell was timed in both"
