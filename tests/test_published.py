"""The published table, and what the compiler says of its launches."""

import pytest

from moelab import compiler, plots, problems, published, records, sweep
from moelab.targets import TARGETS


@pytest.fixture(scope="module")
def launches():
    return published.launches()


@pytest.fixture(scope="module")
def before():
    return published.launches(problems.BEFORE)


def test_the_table_has_a_figure_for_every_model_tp_and_token_count():
    table = published.throughputs()
    assert not table.duplicated(published.CELL).any()
    assert table["tflops"].gt(0).all()
    assert {*zip(table["tp"], table["m"], strict=True)} == {
        (tp, m) for tp in problems.TENSOR_PARALLEL for m in problems.TOKENS
    }
    # The published table's choice comes first; Kimi-K2 is not in it.
    served = {(model.kernels[0], model.name) for model in problems.MODELS.values()}
    assert {*zip(table["kernel"], table["model"], strict=True)} == served - {
        ("moe_gemm_a8w4", "Kimi-K2 Thinking")
    }
    assert len(table) == 256


def test_no_throughput_is_above_what_the_chip_can_do():
    highest = published.throughputs().groupby("kernel")["tflops"].max()
    peaks = TARGETS[published.TARGET].peak_tflops
    assert highest["moe_gemm_a8w8"] < peaks["fp8"]
    assert highest["moe_gemm_a4w4"] < peaks["mxfp4"]


def test_every_cell_has_a_launch_of_each_layer_with_its_throughput(launches):
    layers = launches.groupby(published.CELL)["layer"].agg(sorted)
    assert all(of == [1, 2] for of in layers)
    table = published.throughputs().set_index(published.CELL)["tflops"]
    of_cell = launches.groupby(published.CELL)[published.PUBLISHED].agg(["min", "max"])
    assert of_cell["min"].eq(table).all() and of_cell["max"].eq(table).all()


def test_nothing_of_it_passes_for_a_measurement_of_ours(launches):
    assert set(launches["mode"]) == {"full"}
    for name in ("gpu", "time_us", "tflops", "samples_us"):
        assert launches[name].isna().all(), name


def test_launches_are_those_that_the_published_rules_choose(launches):
    assert launches["async_copy"].all()
    assert set(launches["target"]) == {"gfx950"}
    for row in launches.to_dict("records"):
        of = problems.problem(row["model"], row["layer"], row["tp"], row["m"])
        tile, warps = problems.ruled_tile(row["kernel"], of)
        assert (row["tile"], row["num_warps"]) == (str(tile), warps)
        assert (row["n"], row["k"]) == (of.n, of.k)
        assert row["num_stages"] == problems.ruled_stages(
            published.POLICY, row["kernel"], "gfx950", tile
        )


def test_the_table_was_taken_with_one_stage_which_always_fits_and_two_seldom(launches, before):
    assert set(launches["num_stages"]) == {1}
    assert launches["status"].eq("ok").all()
    assert set(before["num_stages"]) == {2}
    assert set(before["status"]) == {"ok", "out_of_lds"}


def test_each_policy_has_a_shipped_row_for_every_launch():
    for policy in problems.POLICIES:
        assert len(published.launches(policy)) == 2 * len(published.throughputs())


def test_a_policy_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match=r"no policy 'after'; there are before #2723, after #2723"):
        published.launches("after")


def test_the_compiler_still_says_what_is_shipped(launches, before, tmp_path):
    if compiler.triton_version() != launches["triton"].iloc[0]:
        pytest.skip(f"rows of Triton {launches['triton'].iloc[0]}")
    asked = [
        of
        for of in published.questions()
        if (of.problem.m, of.problem.tp) == (1536, 4) and of.kernel != "moe_gemm_a4w4"
    ]
    told = sweep.run(asked, tmp_path, jobs=1, progress=False)
    shared = [*published.CELL, "layer", "num_stages"]
    shipped = [launches, before]
    expected = {
        tuple(row[name] for name in shared): row["lds_bytes"]
        for rows in shipped
        for row in rows.to_dict("records")
    }
    for row in told.to_dict("records"):
        assert row["lds_bytes"] == expected[tuple(row[name] for name in shared)]
    assert len(told) == 3 * 2 * 2


def test_configurations_say_which_cells_share_them_and_what_more_stages_take(launches, before):
    table = published.configurations(launches, before)
    by_layer = table.groupby("layer")["cells"].sum()
    assert list(by_layer) == [256, 256]
    of_tile = table[(table["model"] == "GPT-OSS 120B") & (table["tile"] == "128x512x256")]
    assert list(of_tile["M from"]) == [2560, 2560]
    for row in table.to_dict("records"):
        assert row["would take (bytes)"] > row["LDS (bytes)"]
        fits = row["would take (bytes)"] <= TARGETS["gfx950"].lds_limit
        assert row["fits"] == ("yes" if fits else "no")


def test_the_conclusion_counts_cells(launches, before):
    told = published.conclusion(launches, before)
    one = launches[launches["tile"] == "16x128x256"]
    assert "Of the 256 published cells" in told
    assert f"{one['lds_bytes'].max():,} bytes" in told
    two_fit = before.groupby(published.CELL)["status"].agg(lambda s: s.eq("ok").all()).sum()
    assert f"With 2 stages {two_fit} of them would fit" in told


def test_the_picture_has_every_cell_once_and_its_limit(launches, before):
    plots.use_style()
    figure = plots.published_lds(launches, before)
    assert len(figure.axes) == 4
    colour = plots.stage_colour(1)
    drawn = [line for axis in figure.axes for line in axis.lines if line.get_color() == colour]
    assert sum(len(line.get_xdata()) for line in drawn) == 256
    for axis in figure.axes:
        (limit,) = [line for line in axis.lines if line.get_color() == plots.RED]
        assert set(limit.get_xdata()) == {160}


def test_a_figure_belongs_to_the_launches_that_it_was_taken_with(launches):
    found = published.figures(records.read(published.LAUNCHES))
    assert len(found) == len(launches) == 512
    assert set(found["num_stages"]) == {1}


@pytest.mark.parametrize(
    "changed", [{"num_stages": 2}, {"async_copy": False}, {"block_n": 96}, {"target": "gfx942"}]
)
def test_other_launches_have_no_figure(changed):
    assert published.figures(records.read(published.LAUNCHES).assign(**changed)).empty


def test_a_figure_of_both_layers_is_not_one_of_either(launches):
    rows = records.read(published.LAUNCHES)
    assert published.figures(rows[rows["layer"] == 1]).empty
