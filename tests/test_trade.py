"""Measured rows in, what a stage brings and costs out; and the rows that are shipped."""

import json
import math

import pytest

from moelab import plots, records, trade
from moelab.targets import TARGETS


@pytest.fixture(scope="module")
def shipped():
    return trade.measured()


def row(num_stages, time_us, spread=0.01, **changed):
    """A measured row whose interval is ``spread`` to each side."""
    return {
        "kernel": "moe_gemm_a8w8",
        "model": "Qwen3-235B-A22B",
        "layer": 1,
        "tp": 1,
        "m": 512,
        "target": "sm_90",
        "triton": "3.6.0",
        "block_m": 64,
        "block_n": 64,
        "block_k": 64,
        "split_k": 1,
        "num_warps": 4,
        "num_stages": num_stages,
        "mode": "measured",
        "gpu": "a GPU",
        "status": "ok",
        "lds_bytes": 1024 * num_stages,
        "loaded_lds_bytes": 1024 * num_stages,
        "lds_limit": 4096,
        "time_us": time_us,
        "time_low_us": time_us and time_us * math.exp(-spread),
        "time_high_us": time_us and time_us * math.exp(spread),
        "tflops": time_us and 1000 / time_us,
        "schema": 5,
        **changed,
    }


def measured(tmp_path, *rows):
    return trade.measured(records.export(records.frame(rows), tmp_path / "rows.parquet"))


OUT = {"status": "out_of_lds", "loaded_lds_bytes": None}


def test_what_one_stage_loses_is_against_the_best_with_the_interval_of_both(tmp_path):
    rows = measured(
        tmp_path, row(1, 20.0), row(2, 12.0), row(3, 10.0), row(4, 11.0), row(5, None, **OUT)
    )
    (found,) = trade.stages(rows).to_dict("records")
    assert found["best"] == 3
    assert found[trade.LOSS] == pytest.approx(50)
    margin = math.hypot(0.01, 0.01)
    assert found[trade.LOSS_LOW] == pytest.approx(100 * (1 - 0.5 * math.exp(margin)))
    assert found[trade.LOSS_HIGH] == pytest.approx(100 * (1 - 0.5 * math.exp(-margin)))
    assert [found[f"{n} stages"] for n in (2, 3, 4)] == pytest.approx([1000 / 12, 100, 1000 / 11])
    assert "5 stages" not in found


def test_where_one_stage_is_best_it_loses_nothing_for_certain(tmp_path):
    (found,) = trade.stages(measured(tmp_path, row(1, 10.0), row(2, 12.0))).to_dict("records")
    assert [found[name] for name in (trade.LOSS, trade.LOSS_LOW, trade.LOSS_HIGH)] == [0, 0, 0]


def test_a_tile_that_was_not_measured_with_one_stage_is_left_out(tmp_path):
    assert trade.stages(measured(tmp_path, row(2, 12.0), row(3, 10.0))).empty


def test_losses_are_summed_up_over_token_counts(tmp_path):
    rows = [row(1, 20.0), row(2, 10.0), row(1, 20.0, m=1536), row(2, 16.0, m=1536)]
    (found,) = trade.losses(trade.stages(measured(tmp_path, *rows))).to_dict("records")
    assert (found["median (%)"], found["least (%)"], found["most (%)"]) == pytest.approx(
        (35, 20, 50)
    )
    assert found["problems"] == 2


def test_rows_that_were_not_measured_are_told_as_such(tmp_path):
    with pytest.raises(ValueError, match="no row was measured; see `moelab measure`"):
        measured(tmp_path, row(1, None, mode="lds"))


def test_the_pictures_show_what_there_is_and_say_where_there_is_nothing(tmp_path):
    plots.use_style()
    rows = measured(tmp_path, row(1, 20.0), row(2, 12.0), row(5, None, **OUT))
    figure = plots.lds_against_throughput(rows, 512)
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["1", "2"]
    (axis,) = plots.one_stage_loss(trade.stages(rows)).axes
    assert axis.get_title("left") == "moe_gemm_a8w8, Qwen3-235B-A22B"
    nothing = plots.lds_against_throughput(rows, 7).axes[0].texts[0].get_text()
    assert nothing == "nothing was measured at 7 tokens"


# What is shipped.


def test_every_shipped_launch_loaded_the_lds_that_was_told_and_was_right(shipped):
    timed = shipped[shipped["status"] == "ok"]
    assert len(timed) > 800
    assert timed["loaded_lds_bytes"].eq(timed["lds_bytes"]).all()
    assert timed["lds_bytes"].le(TARGETS["sm_90"].lds_limit).all()
    refused = shipped[shipped["status"] != "ok"]
    assert set(refused["status"]) == {"out_of_lds"}
    assert refused["time_us"].isna().all()


def test_shipped_rows_go_from_one_stage_to_one_beyond_what_fits(shipped):
    for _, tile in shipped.groupby(trade.TILING):
        stages = tile.sort_values("num_stages")
        assert list(stages["num_stages"]) == list(range(1, len(stages) + 1))
        assert (stages["status"] == "ok").iloc[:-1].all()


def test_shipped_rows_say_what_made_them_and_keep_their_samples(shipped):
    timed = shipped[shipped["status"] == "ok"]
    assert set(timed["gpu"]) == {"NVIDIA H200"}
    for row in timed.itertuples():
        assert set(json.loads(row.made_by)) == {"driver", "torch", "triton", "date", "kernel"}
        assert [len(of_round) for of_round in json.loads(row.samples_us)] == [5] * 6


def test_the_conclusion_counts_launches_and_names_each_model(shipped):
    told = trade.conclusion(shipped, trade.stages(shipped))
    launched = shipped["loaded_lds_bytes"].notna().sum()
    assert f"NVIDIA H200: {launched} configurations were launched and {launched} loaded" in told
    for model in shipped["model"].unique():
        assert model in told
