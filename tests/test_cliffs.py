"""What tiles and waves explain of a fall along M, and what is left to look at."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from moelab import cliffs, plots, published, tables, trade, workloads
from moelab.records import frame

CURVE = ["kernel", "model", "tp"]
UNITS = 256


def launch(m, tflops, tp=1, block_m=128, **changed):
    """A row of one launch: 8 experts, top 2, so many columns that each row tile is a wave."""
    return {
        "kernel": "moe_gemm_a8w8",
        "model": "a model",
        "layer": 1,
        "tp": tp,
        "m": m,
        "experts": 8,
        "top_k": 2,
        "n": 128 * UNITS,
        "k": 1024,
        "target": "gfx950",
        "block_m": block_m,
        "block_n": 128,
        "block_k": 128,
        "split_k": 1,
        "num_warps": 8,
        "num_stages": 1,
        "lds_bytes": 65536,
        "spilled_registers": 0,
        "tflops": tflops,
        **changed,
    }


def cells(*rows):
    return cliffs.cells(tables.labelled(frame(rows)), "tflops", CURVE)


def steps(*rows):
    return cliffs.steps(cells(*rows), CURVE)


def filled(m, block_m=128):
    return cells(launch(m, 1.0, block_m=block_m))["filled"].item()


# The model.


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(1, 128, 4), (512, 128, 1), (2560, 256, 8)])
def test_the_mean_of_row_tiles_is_that_of_the_binomial_law(m, experts, top_k, block_m):
    rows = np.arange(m + 1)
    of_expert = stats.binom.pmf(rows, m, top_k / experts) @ np.ceil(rows / block_m)
    chances = np.array(cliffs.row_tiles(m, experts, top_k, block_m))
    assert chances.sum() == pytest.approx(1)
    assert chances @ np.arange(len(chances)) == pytest.approx(experts * of_expert)


def test_row_tiles_are_those_of_uniform_routing_as_it_is_drawn():
    m, experts, top_k, block_m, draws = 1536, 128, 4, 64, 60
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(draws):
        expert, _ = workloads.draw("uniform", m, experts, top_k, generator)
        rows = np.bincount(expert.flatten(), minlength=experts)
        counts.append(int(np.ceil(rows / block_m).sum()))
    chances = np.array(cliffs.row_tiles(m, experts, top_k, block_m))
    numbers = np.arange(len(chances))
    mean = chances @ numbers
    assert np.mean(counts) == pytest.approx(mean, abs=4 * np.std(counts) / math.sqrt(draws))
    # Experts are taken as independent: near, not exact.
    across = 12
    waves = np.ceil(np.array(counts) * across / UNITS).mean()
    assert chances @ np.ceil(numbers * across / UNITS) == pytest.approx(waves, rel=0.03)


def test_a_decode_step_pays_for_a_tile_of_every_expert_that_it_visits():
    chances = cliffs.row_tiles(m=1, experts=128, top_k=1, block_m=16)
    assert chances[1] == pytest.approx(128 * (1 / 128) * (127 / 128) ** 127, rel=1e-6)


def test_paid_work_is_useful_work_where_tiles_and_waves_are_full():
    # Every token visits every expert, so that nothing is left to chance.
    full = launch(256, 1.0, experts=2, block_m=128)
    (of,) = cliffs.paid(frame([full])).to_dict("records")
    assert (of["row_tiles"], of["waves"]) == pytest.approx((4, 4))
    assert of["useful_flops"] == 2 * 256 * 2 * full["n"] * full["k"]
    assert of["tiled_flops"] == pytest.approx(of["useful_flops"])
    assert of["paid_flops"] == pytest.approx(of["useful_flops"])


def test_a_row_more_is_paid_with_a_tile_and_a_program_more_with_a_wave():
    full = launch(256, 1.0, experts=2)
    more, wider = {**full, "m": 257}, {**full, "n": full["n"] + 128}
    (row,) = cliffs.paid(frame([more])).to_dict("records")
    assert row["tiled_flops"] / row["useful_flops"] == pytest.approx(6 * 128 / (257 * 2))
    (row,) = cliffs.paid(frame([wider])).to_dict("records")
    # 4 row tiles times 257 columns of tiles are 1,028 programs: a fifth wave of 4.
    assert row["waves"] == pytest.approx(5)
    assert row["tiled_flops"] == pytest.approx(row["useful_flops"])
    assert row["paid_flops"] / row["useful_flops"] == pytest.approx(5 * UNITS / 1028)


def test_columns_and_steps_past_the_end_are_paid():
    full = launch(256, 1.0, experts=2)
    rows = [full, {**full, "n": full["n"] - 1}, {**full, "k": 1023}, {**full, "k": 896}]
    paid = cliffs.paid(frame(rows))["tiled_flops"]
    assert list(paid / paid[0]) == pytest.approx([1, 1, 1, 896 / 1024])


def test_programs_that_share_a_reduction_each_do_a_part_of_it():
    full = launch(256, 1.0, experts=2)
    whole, shared = cliffs.paid(frame([full, {**full, "split_k": 2}])).to_dict("records")
    assert shared["waves"] == 2 * whole["waves"]
    assert shared["paid_flops"] == pytest.approx(whole["paid_flops"])


def test_a_cell_is_of_all_its_launches():
    first, second = launch(512, 100.0), launch(512, 100.0, layer=2, k=512, spilled_registers=9)
    (cell,) = cells(first, second).to_dict("records")
    useful = 2 * 512 * 2 * first["n"] * (1024 + 512)
    assert cell["time_us"] == pytest.approx(useful / 100e6)
    assert cell["spilled_registers"] == 9
    assert cell["configuration"] == "128x128x128, 8 warps, 1 stage"
    other = launch(512, 100.0, layer=2, num_stages=2)
    assert cells(first, other)["configuration"].item().endswith("128x128x128, 8 warps, 2 stages")


def test_a_target_without_a_number_of_units_is_refused():
    with pytest.raises(ValueError, match="gfx1250: no number of compute units is known"):
        cells(launch(512, 1.0, target="gfx1250"))


# Falls.


def test_a_fall_that_tiles_explain_is_left_with_nothing():
    # About 360 rows of an expert fill 3 tiles well, about 400 of them 4 badly.
    small, large = 1440, 1600
    assert filled(large) < filled(small)
    table = steps(launch(small, 100.0), launch(large, 100.0 * filled(large) / filled(small)))
    first, second = table.to_dict("records")
    assert math.isnan(first[cliffs.CHANGE]) and not first[cliffs.LOOK]
    assert second[cliffs.CHANGE] < 0
    assert second[cliffs.LEFT] == pytest.approx(0)
    assert not second[cliffs.LOOK]
    assert second[cliffs.ALSO] == ""


def test_a_fall_beyond_the_model_is_flagged_with_what_is_left():
    # Here tiles and waves say the same: a row tile is a wave.
    expected = filled(4096) / filled(2048)
    _, second = steps(launch(2048, 100.0), launch(4096, 50.0 * expected)).to_dict("records")
    assert second[cliffs.TILES] == pytest.approx(100 * (expected - 1))
    assert second[cliffs.WAVES] == pytest.approx(second[cliffs.TILES])
    assert second[cliffs.LEFT] == pytest.approx(-50)
    assert second[cliffs.LOOK]


def test_what_lies_between_tiles_alone_and_tiles_with_waves_is_explained():
    # One tile of columns: all of a wave but the row tiles is idle.
    narrow = {"n": 128}
    before, after = launch(2048, 100.0, **narrow), launch(4096, 100.0, **narrow)
    (tiles, waves) = steps(before, after)[[cliffs.TILES, cliffs.WAVES]].iloc[1]
    assert waves > tiles + 50
    for change in (tiles, (tiles + waves) / 2, waves):
        figure = 100 * (1 + change / 100)
        left = steps(before, {**after, "tflops": figure})[cliffs.LEFT].iloc[1]
        assert left == pytest.approx(0, abs=1e-9)


def test_a_small_fall_and_a_rise_are_not_flagged():
    expected = filled(4096) / filled(2048)
    small = steps(launch(2048, 100.0), launch(4096, 97.0 * expected)).iloc[1]
    assert small[cliffs.LEFT] == pytest.approx(-3)
    assert not small[cliffs.LOOK]
    rise = steps(launch(2048, 100.0), launch(4096, 300.0)).iloc[1]
    assert rise[cliffs.LEFT] > 0 and not rise[cliffs.LOOK]


def test_a_restless_curve_is_flagged_only_beyond_its_own_spread():
    def curve(*factors):
        sizes = [2048 * (1 + at) for at in range(len(factors))]
        return [launch(m, 100 * filled(m) * by) for m, by in zip(sizes, factors, strict=True)]

    quiet = steps(*curve(1, 1, 1, 1, 1, 0.8))
    restless = steps(*curve(1, 1.2, 1, 1.2, 1, 0.8))
    assert quiet["tflops"].iloc[-1] == restless["tflops"].iloc[-1]
    assert quiet[cliffs.LOOK].iloc[-1] and not restless[cliffs.LOOK].iloc[-1]
    assert restless["spread"].iloc[-1] > 20 and quiet["spread"].iloc[-1] < 1


def test_neighbours_that_fall_at_the_same_m_are_named():
    def curve(tp, *figures):
        return [launch(2048 * (1 + at), of, tp=tp) for at, of in enumerate(figures)]

    table = steps(*curve(1, 100, 50), *curve(2, 90, 45), *curve(4, 80, 160), *curve(8, 60, 30))
    also = dict(zip(table["tp"], table[cliffs.ALSO], strict=True))
    assert also == {1: "2, 8", 2: "1, 8", 4: "", 8: "1, 2"}


def test_what_people_read_has_falls_only_worst_first():
    table = steps(
        launch(2048, 100.0),
        launch(4096, 50.0, block_m=64, spilled_registers=104),
        launch(8192, 10.0, block_m=64, spilled_registers=104),
        launch(16384, 90.0, block_m=64),
    )
    shown = cliffs.shown(table, CURVE)
    assert list(shown["M"]) == [8192, 4096]
    assert shown["configuration"].iloc[0] == "the same"
    assert shown["configuration"].iloc[1] == (
        "128x128x128, 8 warps, 1 stage -> 64x128x128, 8 warps, 1 stage"
    )
    assert list(shown["spilled registers"] - shown["spilled registers (was)"]) == [0, 104]


# By the figures alone.


def test_work_that_a_larger_or_several_smaller_cells_do_sooner_is_found():
    # In units of time: 512 takes 1, 1024 takes 10, 1536 takes 5, 2048 takes 4.
    taken = {512: 1.0, 1024: 10.0, 1536: 5.0, 2048: 4.0}
    sooner = cliffs.quicker(cells(*(launch(m, m / of) for m, of in taken.items())), CURVE)
    found = dict(zip(sooner["m"], sooner[cliffs.QUICKER], strict=True))
    assert found == {1024: "2 x 512", 1536: "3 x 512"}
    assert list(sooner[cliffs.SAVED]) == pytest.approx([80, 40])
    taken |= {512: 6.0}
    sooner = cliffs.quicker(cells(*(launch(m, m / of) for m, of in taken.items())), CURVE)
    found = dict(zip(sooner["m"], sooner[cliffs.QUICKER], strict=True))
    assert found == {512: "padded to 2048", 1024: "padded to 2048", 1536: "padded to 2048"}


def test_a_margin_is_not_worth_the_trouble():
    rows = [launch(512, 512 / 1.04), launch(1024, 1024 / 1.0)]
    assert cliffs.quicker(cells(*rows), CURVE).empty


# The published table.


@pytest.fixture(scope="module")
def published_steps():
    of_cells = cliffs.cells(published.launches(), published.PUBLISHED, published.CURVE)
    return of_cells, cliffs.steps(of_cells, published.CURVE)


def test_the_published_cliff_of_gpt_oss_is_found_at_every_tp(published_steps):
    _, table = published_steps
    cliff = table[(table["model"] == "GPT-OSS 120B") & (table["m"] == 2560)]
    assert len(cliff) == 4 and cliff[cliffs.LOOK].all()
    # block_m doubles there, which tiles explain a part of, and the code spills more.
    assert cliff["configuration (was)"].str.startswith("64x512x256").all()
    assert cliff["configuration"].str.startswith("128x512x256").all()
    assert (cliff[cliffs.TILES] < -10).all()
    assert (cliff[cliffs.LEFT] < -10).all()
    assert (cliff["spilled_registers"] > cliff["spilled_registers (was)"]).all()


def test_most_published_falls_are_explained(published_steps):
    _, table = published_steps
    falls = table[table[cliffs.CHANGE] < 0]
    assert len(falls) > 40
    assert (falls[cliffs.LEFT] >= 0).mean() > 0.7


def test_where_the_configuration_stays_the_model_goes_with_the_figures(published_steps):
    _, table = published_steps
    alike = table[table["configuration"] == table["configuration (was)"]]
    one_gpu = alike[alike["tp"] == 1]
    made = np.log1p(one_gpu[cliffs.WAVES].astype(float) / 100)
    was = np.log1p(one_gpu[cliffs.CHANGE].astype(float) / 100)
    assert np.corrcoef(made, was)[0, 1] > 0.9


def test_the_conclusion_names_each_flagged_step_and_counts_the_curves(published_steps):
    of_cells, table = published_steps
    sooner = cliffs.quicker(of_cells, published.CURVE)
    told = cliffs.conclusion(table, sooner, published.CURVE)
    falls = table[table[cliffs.CHANGE] < 0]
    assert f"In {len(falls)} of 240 steps along M throughput falls." in told
    for row in table[table[cliffs.LOOK]].to_dict("records"):
        assert f"**{row['kernel']}, {row['model']}, M {row['m (was)']:.0f} to {row['m']}**" in told
        assert f"{row[cliffs.CHANGE]:.1f}% (TP {row['tp']})" in told
    assert "Of 4 curves 4 fall here by more than the model explains." in told
    assert f"By the figures alone {len(sooner)} of 256 cells" in told


def test_measured_rows_make_cells_too():
    rows = trade.chosen(trade.measured(), models="GPT-OSS 120B")
    table = cliffs.steps(cliffs.cells(trade.fastest(rows), "tflops", trade.CURVE), trade.CURVE)
    assert len(table) == 2 * 2 * 16
    told = cliffs.conclusion(table, table.iloc[:0], trade.CURVE)
    assert "layer 1, TP 1" in told and "By the figures" not in told


def test_pictures_have_a_panel_per_curve_and_ring_what_is_flagged(published_steps):
    plots.use_style()
    _, table = published_steps
    pictures = [draw(table, published.CURVE) for draw in (plots.cliffs_along_m, plots.left_along_m)]
    assert len([axis for axis in pictures[0].axes if axis.axison]) == 16
    for figure in pictures:
        rings = [line for axis in figure.axes for line in axis.lines if line.get_mec() == plots.RED]
        assert sum(len(line.get_xdata()) for line in rings) == table[cliffs.LOOK].sum()


def test_a_curve_of_one_cell_has_no_panel():
    plots.use_style()
    rows = [launch(2048, 100.0), launch(4096, 90.0), launch(2048, 100.0, tp=2)]
    (axis,) = plots.cliffs_along_m(steps(*rows), CURVE).axes
    assert axis.get_title("left").endswith("TP 1")


def test_curves_are_told_apart_by_their_sums_where_they_differ():
    rows = [launch(m, 100.0, fast_accum=fast) for m in (2048, 4096) for fast in (False, True)]
    curve = [*CURVE, "fast_accum"]
    of_cells = cliffs.cells(tables.labelled(frame(rows)), "tflops", curve)
    plots.use_style()
    figure = plots.cliffs_along_m(cliffs.steps(of_cells, curve), curve)
    titles = [axis.get_title("left").split("\n")[-1] for axis in figure.axes]
    assert titles == ["TP 1, sums in fp32", "TP 1, sums in the tensor cores"]


def test_pictures_of_nothing_say_so():
    nothing = pd.DataFrame(columns=[*CURVE, "m", cliffs.LEFT])
    for picture in (plots.cliffs_along_m, plots.left_along_m):
        (axis,) = picture(nothing, CURVE).axes
        assert axis.texts
