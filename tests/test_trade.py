"""Measured rows in, what a stage brings and costs out; and the rows that are shipped."""

import json
import math

import pandas as pd
import pytest

from moelab import plots, problems, records, trade
from moelab.parameters import ParameterError
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
        "fast_accum": False,
        "mode": "measured",
        "gpu": "a GPU",
        "run": "a run",
        "status": "ok",
        "lds_bytes": 1024 * num_stages,
        "loaded_lds_bytes": 1024 * num_stages,
        "lds_limit": 4096,
        "time_us": time_us,
        "time_low_us": time_us and time_us * math.exp(-spread),
        "time_high_us": time_us and time_us * math.exp(spread),
        "tflops": time_us and 1000 / time_us,
        "roof_tflops": time_us and 200.0,
        "workgroups_per_cu": time_us and 4 // num_stages,
        "occupancy_limit": time_us and "lds",
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


def test_losses_along_m_are_medians_over_layers_and_tp(tmp_path):
    rows = [row(1, 20.0), row(2, 10.0), row(1, 20.0, tp=4), row(2, 16.0, tp=4)]
    (found,) = trade.losses_along_m(trade.stages(measured(tmp_path, *rows))).to_dict("records")
    assert found["model"] == "Qwen3-235B-A22B"
    assert found["M 512"] == pytest.approx(35)


def test_runs_are_not_mixed(tmp_path):
    rows = [row(1, 20.0), row(2, 10.0), row(1, 40.0, run="later"), row(2, 30.0, run="later")]
    compared = trade.stages(measured(tmp_path, *rows))
    assert list(compared[trade.LOSS]) == pytest.approx([50, 25])


def test_fast_sums_are_summed_up_apart(tmp_path):
    rows = [row(1, 20.0), row(2, 10.0), *(row(n, 9.0, fast_accum=True) for n in (1, 2))]
    rows = measured(tmp_path, *rows)
    compared = trade.stages(rows)
    assert list(trade.losses(compared)["median (%)"]) == pytest.approx([50, 0])
    told = trade.conclusion(rows, compared)
    assert "**moe_gemm_a8w8, Qwen3-235B-A22B**: one stage loses 50.0%" in told
    assert (
        "**moe_gemm_a8w8, Qwen3-235B-A22B, sums in the tensor cores**: one stage loses 0.0%" in told
    )
    assert len(plots.lds_against_throughput(rows).axes) == 2
    assert trade.fastest(rows)["time_us"].tolist() == [10, 9]


# What each further stage brings.


def test_a_further_stage_brings_throughput_and_costs_bytes(tmp_path):
    rows = measured(tmp_path, row(1, 20.0), row(2, 10.0), row(3, 11.0), row(5, None, **OUT))
    first, second = trade.further(rows).to_dict("records")
    assert [of[trade.STEP] for of in (first, second)] == ["1 -> 2", "2 -> 3"]
    assert first[trade.ADDED] == 1024
    assert first["of the limit (%)"] == 50
    assert first["gained (TFLOP/s)"] == pytest.approx(50)
    margin = math.exp(math.hypot(0.01, 0.01))
    assert [first[name] for name in (trade.GAIN, trade.GAIN_LOW, trade.GAIN_HIGH)] == pytest.approx(
        [100, 100 * (2 / margin - 1), 100 * (2 * margin - 1)]
    )
    assert second[trade.GAIN] == pytest.approx(100 * (10 / 11 - 1))
    assert (first["workgroups per CU"], first["stopped by"]) == (2, "lds")


def test_a_stage_that_does_not_fit_costs_bytes_and_brings_nothing(tmp_path):
    rows = measured(tmp_path, row(1, 20.0), row(2, None, **OUT))
    (found,) = trade.further(rows).to_dict("records")
    assert found[trade.ADDED] == 1024
    assert pd.isna(found[trade.GAIN])
    assert found["status"] == "out_of_lds"
    (summed,) = trade.gains(trade.further(rows)).to_dict("records")
    assert (summed["problems"], summed["doesn't fit"]) == (0, 1)


def test_gains_count_only_what_the_intervals_leave_no_doubt_of(tmp_path):
    rows = [
        *(row(1, 20.0), row(2, 10.0)),
        *(row(1, 20.0, m=1536), row(2, 19.9, m=1536)),
        *(row(1, 10.0, m=2560), row(2, 20.0, m=2560)),
    ]
    (found,) = trade.gains(trade.further(measured(tmp_path, *rows))).to_dict("records")
    assert found["problems"] == 3
    assert (found["surely faster"], found["surely slower"]) == (1, 1)
    assert [found[f"{n} (%)"] for n in ("least", "most")] == pytest.approx([-50, 100])


# What nothing beats.


def test_the_front_is_what_nothing_beats_on_both_lds_and_throughput(tmp_path):
    rows = measured(
        tmp_path,
        *(row(1, 20.0), row(2, 10.0), row(3, 11.0), row(4, 8.0)),
        # As much LDS as another and slower; and another problem, which beats nobody here.
        row(2, 10.5, block_n=128),
        row(1, 1.0, m=1536),
    )
    marked = trade.front(rows)
    assert list(marked[trade.FRONT]) == [True, True, False, True, False, True]
    listed = trade.configurations(marked)
    assert list(listed[trade.FRONT].eq("yes")) == [True, True, True, False, False, True]
    assert listed["of the roof (%)"].iloc[0] == 25
    (found,) = trade.fronts(marked).to_dict("records")
    assert [found[name] for name in ("1 stage", "2 stages", "3 stages", "4 stages")] == [
        *("2 of 2", "1 of 2", "0 of 1", "1 of 1")
    ]


def test_equals_are_both_on_the_front(tmp_path):
    rows = measured(tmp_path, row(2, 10.0), row(2, 10.0, block_n=128))
    assert trade.front(rows)[trade.FRONT].all()


def test_the_fastest_of_each_problem(tmp_path):
    rows = [row(1, 20.0), row(2, 10.0), row(3, None, **OUT), row(1, 5.0, m=1536)]
    assert list(trade.fastest(measured(tmp_path, *rows))["time_us"]) == [10, 5]


# Which rows.


def test_chosen_rows_are_of_the_kernels_models_layers_and_tp_asked_for(shipped):
    rows = trade.chosen(shipped, "moe_gemm_a8w8", "Qwen3-235B-A22B", "2", [4])
    assert len(rows)
    assert {*zip(rows["kernel"], rows["model"], rows["layer"], rows["tp"], strict=True)} == {
        ("moe_gemm_a8w8", "Qwen3-235B-A22B", 2, 4)
    }
    assert len(trade.chosen(shipped)) == len(shipped)
    assert set(trade.at(shipped, 512)["m"]) == {512}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tp": "3"}, "tp: no row has 3; there are 1, 4, or all"),
        ({"kernels": "moe_gemm"}, "kernels: no row has 'moe_gemm'; there are moe_gemm_a4w4,"),
        ({"layers": "one"}, "'one' in 'one' is not int"),
        ({"kernels": "moe_gemm_a4w4", "models": "GPT-OSS 120B"}, "no row has all"),
    ],
)
def test_a_choice_that_no_row_has_is_answered_with_what_there_is(shipped, wrong, message):
    with pytest.raises(ParameterError, match=message):
        trade.chosen(shipped, **wrong)


def test_a_token_count_that_no_row_has_is_answered_with_those_there_are(shipped):
    with pytest.raises(ParameterError, match="m: no row has 7 tokens; there are 512, 1536,"):
        trade.at(shipped, 7)


def test_a_peers_rows_are_left_out(tmp_path):
    rows = measured(tmp_path, row(1, 20.0), row(1, 10.0, peer="another"))
    assert list(rows["time_us"]) == [20]


def test_rows_that_were_not_measured_are_told_as_such(tmp_path):
    with pytest.raises(ValueError, match="no row was measured; see `moelab measure`"):
        measured(tmp_path, row(1, None, mode="lds"))


def test_the_pictures_show_what_there_is_and_say_where_there_is_nothing(tmp_path):
    plots.use_style()
    rows = measured(tmp_path, row(1, 20.0), row(2, 12.0), row(5, None, **OUT))
    (axis,) = plots.lds_against_throughput(rows).axes
    assert axis.get_title("left").endswith("Qwen3-235B-A22B, layer 1, 64x64x64")
    told = [text.get_text() for text in axis.texts]
    assert [text for text in told if text.isdigit()] == ["1", "2"]
    assert "compute: 200" in told
    crosses = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "x"]
    assert [5] in crosses, "what doesn't fit stands at its LDS"
    (axis,) = plots.further_stages(trade.further(rows)).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1 -> 2\n+1"]
    (axis,) = plots.one_stage_loss(trade.stages(rows)).axes
    assert axis.get_title("left") == "moe_gemm_a8w8, Qwen3-235B-A22B"
    (axis,) = plots.lds_against_throughput(measured(tmp_path, row(1, None, **OUT))).axes
    assert [text.get_text() for text in axis.texts] == ["nothing was timed"]


def test_each_run_has_its_own_roof_of_compute(tmp_path):
    problems = {"today": (200.0, 150.0), "before": (180.0, 150.0)}
    rows = measured(
        tmp_path,
        *(
            row(1, 20.0, run=run, layer=layer, kernel=f"of_{run}", roof_tflops=roof)
            for run, roofs in problems.items()
            for layer, roof in enumerate(roofs, start=1)
        ),
    )
    told = [
        text.get_text()
        for axis in plots.lds_against_throughput(rows).axes
        for text in axis.texts
        if ":" in text.get_text()
    ]
    assert told == ["compute: 200", "bandwidth: 150", "compute: 180", "bandwidth: 150"]


def test_a_noisy_time_is_marked_in_picture_table_and_conclusion(tmp_path):
    rows = measured(tmp_path, row(1, 20.0), row(2, 12.0, spread=0.05))
    listed = trade.configurations(trade.front(rows))
    assert list(listed["num_stages"][listed["noisy"].eq("noisy")]) == [2]
    (axis,) = plots.lds_against_throughput(rows).axes
    by_lds = {line.get_xdata()[0]: line for line in axis.lines if line.get_ms() == 12}
    assert [by_lds[count].get_marker() for count in (1, 2)] == ["o", "s"]
    told = trade.conclusion(rows, trade.stages(rows))
    assert "1 of these times are noisy" in told
    quiet = measured(tmp_path, row(1, 20.0), row(2, 12.0))
    assert "noisy" not in trade.conclusion(quiet, trade.stages(quiet))


def test_of_many_tiles_a_picture_names_what_is_on_the_front(tmp_path):
    tiles = [16 << at for at in range(6)]
    rows = measured(
        tmp_path,
        *(row(1, 20.0 + n, block_n=n) for n in tiles),
        *(row(2, 10.0 + n, block_n=n) for n in tiles),
    )
    (axis,) = plots.lds_against_throughput(rows).axes
    told = [text.get_text() for text in axis.texts]
    assert [text for text in told if "x" in text] == ["a  64x16x64"]
    assert told.count("a") == 2
    assert sorted(text for text in told if text.isdigit()) == ["1", "2"]
    points = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(points) == 12


def test_a_stage_count_has_one_colour_in_every_picture(tmp_path):
    rows = measured(tmp_path, *(row(count, 20.0 / count) for count in (1, 2, 3)))
    (axis,) = plots.lds_against_throughput(rows).axes
    by_lds = {line.get_xdata()[0]: line for line in axis.lines if line.get_ms() == 12}
    (steps,) = plots.further_stages(trade.further(rows)).axes
    points = [line for line in steps.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in points] == [by_lds[n].get_color() for n in (2, 3)]
    assert len({line.get_color() for line in by_lds.values()}) == 3


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
        taken = [len(of_round) for of_round in json.loads(row.samples_us)]
        assert taken == ([4] * 8 if row.fast_accum else [2] * 6)


def test_the_conclusion_counts_launches_and_names_each_model(shipped):
    told = trade.conclusion(shipped, trade.stages(shipped))
    launched = shipped["loaded_lds_bytes"].notna().sum()
    assert f"NVIDIA H200: {launched} configurations were launched and {launched} loaded" in told
    for model in shipped["model"].unique():
        assert model in told


# Stage policies.


def stages_of(rows, policy):
    return list(trade.under(records.frame(rows), policy)["num_stages"])


def test_the_most_stages_that_fit_are_kept_tile_by_tile():
    rows = [row(1, 10.0), row(2, 9.0), row(3, None, **OUT)]
    rows += [row(1, 10.0, block_n=128), row(2, None, **OUT, block_n=128)]
    assert stages_of(rows, "most") == [2, 1]
    assert stages_of(rows[::-1], "most") == [1, 2]


def test_where_nothing_fits_the_least_count_says_so():
    kept = trade.under(records.frame([row(2, None, **OUT), row(1, None, **OUT)]), "most")
    assert list(kept["num_stages"]) == [1]
    assert list(kept["status"]) == ["out_of_lds"]


def test_up_to_a_count_leaves_deeper_ones_out():
    rows = [row(count, 10.0) for count in (1, 2, 3)]
    assert stages_of(rows, "most2") == [2]
    assert stages_of([row(1, 10.0), row(2, None, **OUT)], "most2") == [1]


def test_a_run_that_asked_fewer_counts_does_not_bring_its_own_most():
    rows = [row(count, 10.0) for count in (1, 2, 3)]
    rows += [row(count, 10.0, run="later") for count in (1, 2)]
    assert stages_of(rows, "most") == [3]


def test_what_has_no_stages_is_left_out():
    assert stages_of([row(1, 10.0), row(1, 9.0, peer="torch") | {"num_stages": None}], "most") == [
        1
    ]


def test_a_published_policy_is_that_of_its_rules_whether_it_fits_or_not():
    tile = {"target": "gfx950", "block_m": 32, "block_n": 256, "block_k": 256}
    rows = [row(1, 10.0, **tile), row(2, None, **tile, **OUT)]
    assert stages_of(rows, problems.BEFORE) == [2]
    assert stages_of(rows, problems.FIRST_FIX) == [1]


def test_a_policy_that_speaks_of_another_target_says_so():
    with pytest.raises(ValueError, match=r"has no stage count for moe_gemm_a8w8.* on sm_90"):
        stages_of([row(1, 10.0)], problems.LATER_FIX)


@pytest.mark.parametrize("policy", ["", "least", "most0", "mosttwo", "most-1", "2most"])
def test_an_unknown_policy_is_answered_with_those_there_are(policy):
    with pytest.raises(ValueError, match="there are most, most2, before #2723, after #2723"):
        stages_of([row(1, 10.0)], policy)


def test_of_the_shipped_sweep_the_most_that_fits_is_what_a_further_stage_does_not(shipped):
    kept = trade.under(shipped, "most")
    assert not kept.duplicated([*trade.TILING, "fast_accum"]).any()
    told = shipped.merge(kept, on=[*trade.TILING], suffixes=("", " kept"))
    deeper = told[(told["num_stages"] > told["num_stages kept"]) & (told["status kept"] == "ok")]
    assert len(deeper) > 0
    assert set(deeper["status"]) == {"out_of_lds"}
