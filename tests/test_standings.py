"""What is said of ours and of peers is computed from rows, cell by cell, losses included."""

import json
import math

import pytest

from moelab import records, standings
from moelab.standings import ALL_INSIDE, ALONE, BEST, HIGH, LOW, OF_ROOF, OURS, PEERS, REASON


def row(tflops=100.0, spread=0.001, **changed):
    """A measured row of ours or of a peer, whose interval is ``spread`` to each side."""
    time_us = tflops and 1e5 / tflops
    ours = changed.get("peer") is None
    made_by = {"torch": "2.11.0", "date": "now"} | ({"kernel": "ab"} if ours else {})
    tile = {"block_m": 64, "block_n": 128, "block_k": 128, "split_k": 1, "tma": True}
    return {
        "kernel": "moe_gemm_a8w8",
        "model": "Qwen3-235B-A22B",
        "layer": 1,
        "tp": 1,
        "m": 512,
        "fast_accum": False,
        "scale_layout": "rows",
        "target": "sm_90",
        **(tile | {"num_warps": 4, "num_stages": 2} if ours else {}),
        "mode": "measured",
        "gpu": "a GPU",
        "run": "today",
        "status": "ok",
        "tflops": tflops,
        "roof_tflops": 400.0,
        "time_us": time_us,
        "time_low_us": time_us and time_us * math.exp(-spread),
        "time_high_us": time_us and time_us * math.exp(spread),
        "made_by": json.dumps(made_by),
        "schema": records.SCHEMA_VERSION,
        **changed,
    }


def peer(tflops, name="torch", includes="gather", **changed):
    return row(tflops, peer=name, includes=includes, **changed)


@pytest.fixture
def read(tmp_path):
    """Write rows and read them back as a notebook does."""

    def through(*rows):
        return standings.measured(records.export(records.frame(rows), tmp_path / "rows.parquet"))

    return through


# Cells.


def test_a_cell_sets_our_fastest_beside_every_peer_both_ways(read):
    rows = read(
        row(90.0),
        row(120.0, num_stages=3),
        peer(100.0),
        peer(110.0, includes=""),
        peer(80.0, "triton_kernels"),
        peer(150.0, "triton_kernels", includes=""),
    )
    (cell,) = standings.cells(rows).to_dict("records")
    assert cell[OURS] == 120
    assert cell[standings.CONFIGURATION] == "64x128x128+tma, 4 warps, 3 stages"
    assert cell[PEERS] == "torch 100 / 110, triton_kernels 80 / 150"
    assert cell[BEST] == "torch"
    assert cell[ALL_INSIDE] == pytest.approx(1.2)
    assert cell[ALONE] == pytest.approx(0.8)
    assert cell[OF_ROOF] == pytest.approx(0.3)


def test_ways_to_sum_are_never_mixed_and_layouts_of_weights_are(read):
    rows = read(
        row(90.0),
        peer(100.0),
        row(120.0, fast_accum=True),
        peer(200.0, fast_accum=True),
        row(130.0, scale_layout="hopper"),
    )
    precise, fast = standings.cells(rows).to_dict("records")
    assert (precise["fast_accum"], fast["fast_accum"]) == (False, True)
    assert precise[ALL_INSIDE] == pytest.approx(1.3)
    assert precise[standings.CONFIGURATION].endswith("2 stages, hopper weights")
    assert fast[ALL_INSIDE] == pytest.approx(0.6)


def test_what_took_no_turns_with_peers_is_left_out(read):
    rows = read(
        row(500.0, run="before"),
        peer(400.0, run="before"),
        row(90.0),
        peer(100.0),
        row(50.0, m=1536),
        row(80.0, mode="full", run=None),
    )
    (cell,) = standings.cells(rows).to_dict("records")
    assert (cell[OURS], cell["m"]) == (90, 512)


def test_rows_without_a_peer_are_refused(read):
    with pytest.raises(ValueError, match="no peer was measured; see `moelab measure --peers`"):
        read(row())


def test_a_peer_that_was_not_timed_leaves_a_cell_without_a_ratio(read):
    rows = read(row(), peer(None, includes=None, status="unavailable", reason="no module peer"))
    table = standings.cells(rows)
    assert table[[ALL_INSIDE, ALONE, BEST]].isna().all(axis=None)
    assert standings.left_out(rows)[["peer", "status", "reason"]].values.tolist() == [
        ["torch", "unavailable", "no module peer"]
    ]
    assert "no peer was timed" in standings.conclusion(rows, table)
    assert standings.losses(table) == "- A peer is faster in no cell."
    assert standings.shown(table)["95% interval"].isna().all()
    alone = read(peer(5.0))
    assert standings.conclusion(alone, standings.cells(alone)) == (
        "- Ours were timed beside a peer in no cell."
    )


def test_a_ratio_has_the_interval_of_the_two_times_that_decide(read):
    rows = read(
        *(row(100.0), peer(95.0, spread=0.1), peer(80.0, "triton_kernels")),
        *(row(100.0, m=1536), peer(95.0, m=1536), peer(80.0, "triton_kernels", m=1536, spread=0.1)),
        *(row(100.0, m=2560), peer(120.0, m=2560)),
    )
    table = standings.cells(rows)
    off = math.exp(math.hypot(0.1, 0.001))
    assert table[LOW][0] == pytest.approx(100 / 95 / off)
    assert table[HIGH][0] == pytest.approx(100 / 95 * off)
    assert standings.shown(table)["95% interval"][2] == "0.83 to 0.83"
    assert "surely faster in 1 and surely slower in 1" in standings.conclusion(rows, table)


def test_the_conclusion_names_the_peers_what_was_not_measured_and_what_held_the_clocks(read):
    rows = read(
        *(row(100.0, throttled="sw_power_cap"), peer(90.0, spread=0.1)),
        *(row(100.0, m=1536), peer(90.0, m=1536)),
        *(row(100.0, layer=2), peer(90.0, "deep_gemm", layer=2)),
    )
    told = standings.conclusion(rows, standings.cells(rows))
    assert "Peers that were timed: torch, deep_gemm." in told
    lacks = "Not measured: moe_gemm_a8w8, sums in fp32, Qwen3-235B-A22B, layer 2, M 1536."
    assert lacks in told
    assert "clocks down (sw_power_cap) during 1 of 6 times; 1 are noisy" in told


def test_every_shipped_cell_that_ours_lose_has_a_reason():
    table = standings.cells(standings.measured(), standings.REASONS)
    assert "no reason was found" not in standings.losses(table)


def test_versions_are_those_of_each_peers_package(read):
    made_by = {"torch": "2.11.0", "date": "now", "tokenspeed-deepgemm": "2.5"}
    rows = read(row(), peer(90.0), peer(80.0, "deep_gemm", made_by=json.dumps(made_by)))
    assert standings.versions(rows).values.tolist() == [
        ["torch", "torch 2.11.0"],
        ["deep_gemm", "tokenspeed-deepgemm 2.5"],
    ]


# Reasons.


def test_a_reason_stands_only_where_ours_are_slower_and_the_last_that_fits_counts(read, tmp_path):
    reasons = tmp_path / "reasons.csv"
    reasons.write_text(
        ",".join([*standings.CELL, "reason"])
        + "\nmoe_gemm_a8w8,,,,,,too few rows\n,False,,1,,1536,one wave too many\n,True,,,,,other\n"
    )
    rows = read(
        *(row(90.0), peer(100.0)),
        *(row(90.0, m=1536), peer(100.0, m=1536)),
        *(row(90.0, m=2560), peer(80.0, m=2560)),
    )
    table = standings.cells(rows, reasons)
    assert list(table[REASON][:2]) == ["too few rows", "one wave too many"]
    assert table[REASON].isna()[2]
    assert "no reason was found" not in standings.conclusion(rows, table)
    assert standings.losses(table).splitlines()[1] == (
        "- **moe_gemm_a8w8, sums in fp32, Qwen3-235B-A22B** (layer 1 M 1536: 0.90 / -): "
        "one wave too many."
    )
    unexplained = standings.cells(rows)
    assert "Of 2 cells where a peer is faster, no reason was found yet." in (
        standings.conclusion(rows, unexplained)
    )
    assert "M 512: 0.90 / -, layer 1 M 1536: 0.90 / -): no reason" in (
        standings.losses(unexplained)
    )


def test_a_cell_lost_to_a_matmul_alone_is_lost_too(read):
    rows = read(row(90.0), peer(80.0), peer(100.0, includes=""))
    assert "M 512: 1.12 / 0.90" in standings.losses(standings.cells(rows))


def test_shipped_reasons_belong_to_shipped_rows():
    assert standings.reasons_for("", "") == standings.REASONS
    assert standings.reasons_for("rows", "") is None
    assert standings.reasons_for("rows", "mine.csv").name == "mine.csv"
    header = standings.REASONS.read_text().splitlines()[0]
    assert header == ",".join([*standings.CELL, "reason"])


# Means and conclusion.


def test_means_are_geometric_and_count_what_is_faster(read):
    rows = read(
        *(row(200.0), peer(100.0), peer(200.0, includes="")),
        *(row(50.0, m=1536), peer(100.0, m=1536), peer(200.0, m=1536, includes="")),
    )
    (of_all,) = standings.means(standings.cells(rows)).to_dict("records")
    assert of_all["faster in"] == "1 of 2"
    assert of_all[ALL_INSIDE] == pytest.approx(1)
    assert of_all["range"] == "0.50 to 2.00"
    assert of_all[ALONE] == pytest.approx(0.5)
    told = standings.conclusion(rows, standings.cells(rows)).splitlines()
    assert "faster than the best peer in 1 of 2 cells, 1.00 times" in told[1]
    assert "matmul alone in 0 of 2, 0.50 times" in told[1]
    assert "from 0.50 (Qwen3-235B-A22B, layer 1, M 1536, against torch) to 2.00" in told[3]
