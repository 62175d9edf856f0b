"""Every picture is a figure, of whatever rows there are."""

import statistics
from dataclasses import asdict, replace

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import test_regress as regressions
from matplotlib.figure import Figure

from moelab import estimates, plots, problems, records, regression_report, tables
from moelab.lds_map import Told
from moelab.specs import Buffer, LdsMap
from moelab.targets import get

PICTURES = (plots.lds_against_limit, plots.async_copy_difference)
PROBLEM = asdict(problems.problem("Llama4 Maverick", 1, 1, 512))


def rows(target="gfx950", stages=(1, 2), switches=(False, True), block_n=64, **changed):
    """Rows whose LDS grows with stages, and doubles with async copy."""
    limit = get(target).lds_limit
    return [
        {
            "kernel": "moe_gemm_a8w8",
            **PROBLEM,
            "target": target,
            "triton": "3.9.0",
            "block_m": 16,
            "block_n": block_n,
            "block_k": 64,
            "num_warps": 4,
            "num_stages": count,
            "async_copy": switch,
            "status": "ok",
            "lds_bytes": count * (2 if switch else 1) * limit // 3,
            "lds_limit": limit,
            **changed,
        }
        for count in stages
        for switch in switches
    ]


REJECTED = rows("sm_80", switches=(None,), status="compile_error", lds_bytes=None)
SETS = {
    "no row": [],
    "one row": rows(stages=(2,), switches=(True,)),
    "one target": rows() + rows(block_n=128),
    "several targets": rows() + rows("gfx942") + rows("sm_90", switches=(None,)),
    "several kernels": rows() + rows(kernel="moe_gemm_a8w4"),
    "no pairs": rows(switches=(True,)),
    "no switch": rows("sm_90", switches=(None,)),
    "one stage": rows(stages=(1,)),
    "none compiled": REJECTED,
    "some compiled": rows() + REJECTED,
}


def texts(axis):
    return [text.get_text() for text in axis.texts]


@pytest.fixture(autouse=True)
def default_style():
    with plt.rc_context():
        plots.use_style()
        yield


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("name", SETS)
def test_a_picture_is_a_figure_that_can_be_saved_and_leaves_none_open(picture, name, tmp_path):
    frame = records.frame(SETS[name])
    before = frame.copy()
    figure = picture(frame)
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert frame.equals(before)


@pytest.mark.parametrize("name", ["no row", "none compiled"])
def test_a_picture_of_nothing_says_so(name):
    frame = records.frame(SETS[name])
    assert texts(plots.lds_against_limit(frame).axes[0]) == ["no row whose LDS is known"]
    assert texts(plots.async_copy_difference(frame).axes[0]) == [
        "no row with 2 stages and both settings of async copy"
    ]


def test_each_kernel_and_target_has_a_panel_with_its_limit():
    figure = plots.lds_against_limit(records.frame(SETS["several targets"]))
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "moe_gemm_a8w8 on gfx942",
        "moe_gemm_a8w8 on gfx950",
        "moe_gemm_a8w8 on sm_90",
    ]
    legends = [[t.get_text() for t in axis.get_legend().get_texts()] for axis in figure.axes]
    assert legends == [
        ["async copy off", "async copy on", "limit 64 KiB"],
        ["async copy off", "async copy on", "limit 160 KiB"],
        ["no async-copy switch", "limit 227 KiB"],
    ]


def test_the_number_in_a_marker_is_its_stage_count_and_a_hollow_one_does_not_fit():
    (axis,) = plots.lds_against_limit(records.frame(rows())).axes
    # A third, two thirds with async copy off; two thirds, four thirds with it on.
    assert sorted(texts(axis)) == ["1", "1", "2", "2"]
    markers = [line for line in axis.lines if line.get_marker() == "o" and line.get_ms() == 13]
    hollow = [line for line in markers if line.get_mfc() == "white"]
    limit_kib = 160
    assert [float(line.get_xdata()[0]) > limit_kib for line in hollow] == [True]
    assert len(markers) == 4
    assert axis.get_xlim()[1] > limit_kib * 4 / 3


def test_panels_reach_as_far_as_the_furthest_marker_of_any():
    near = rows(kernel="moe_gemm_a8w8", stages=(1,), lds_bytes=1024)
    far = rows(kernel="moe_gemm_a4w4", stages=(1,), lds_bytes=1024 * 900)
    for frame in (near + far, far + near):
        figure = plots.lds_against_limit(records.frame(frame))
        assert {axis.get_xlim() for axis in figure.axes} == {(0, 900 * 1.06)}


def test_tiles_that_share_their_reduction_are_labelled_so():
    frame = records.frame(rows(block_k=512, split_k=7) + rows(block_k=512))
    (axis,) = plots.lds_against_limit(frame).axes
    labels = [label.get_text().split("\n")[0] for label in axis.get_yticklabels()]
    assert sorted(labels) == ["16x64x512", "16x64x512/7"]


def test_a_marker_shows_the_most_that_any_problem_needs():
    one = {"stages": (1,), "switches": (True,)}
    frame = records.frame(rows(**one, lds_bytes=1024) + rows(**one, lds_bytes=4096, m=1536))
    (axis,) = plots.lds_against_limit(frame).axes
    markers = [line for line in axis.lines if line.get_ms() == 13]
    assert [float(line.get_xdata()[0]) for line in markers] == [4.0]


def test_tiles_stand_in_order_of_their_numbers_smallest_on_top():
    frame = records.frame(rows(block_n=128) + rows(block_n=64) + rows(block_n=256))
    (axis,) = plots.lds_against_limit(frame).axes
    labels = [label.get_text().split("\n")[0] for label in axis.get_yticklabels()]
    assert labels == ["16x256x64", "16x128x64", "16x64x64"]


def test_async_copys_picture_has_a_line_with_verdict_per_tile_of_its_stage_count():
    frame = records.frame(rows(stages=(1, 2)) + rows(block_n=128, stages=(1,)))
    (axis,) = plots.async_copy_difference(frame, num_stages=1).axes
    assert len(axis.get_yticklabels()) == 2
    assert [text for text in texts(axis) if text] == ["fits", "fits"]
    (axis,) = plots.async_copy_difference(frame).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "moe_gemm_a8w8 gfx950\n16x64x64, 4 warps, 2 stages"
    ]
    assert [text for text in texts(axis) if text] == ["no longer fits"]


def test_a_stage_count_without_pairs_is_named():
    (axis,) = plots.async_copy_difference(records.frame(rows()), num_stages=7).axes
    assert texts(axis) == ["no row with 7 stages and both settings of async copy"]


# Estimates on trial.

TRIALS = (plots.estimates_on_trial, plots.verdicts)


def judged(*parts):
    return estimates.judge(records.frame([of for part in parts for of in part]))


@pytest.mark.parametrize("picture", TRIALS)
@pytest.mark.parametrize("name", SETS)
def test_a_trials_picture_is_a_figure_that_can_be_saved_and_leaves_none_open(
    picture, name, tmp_path
):
    figure = picture(judged(SETS[name]))
    assert plt.get_fignums() == []
    figure.savefig(tmp_path / "figure.png")


def test_a_trial_of_nothing_says_so():
    assert texts(plots.estimates_on_trial(judged([])).axes[0]) == ["no row whose LDS is known"]
    assert texts(plots.verdicts(judged([])).axes[0]) == [
        "no configuration that an estimate speaks of"
    ]


def test_each_estimate_has_a_panel_per_target_with_both_limits():
    figure = plots.estimates_on_trial(judged(rows(), rows("sm_90", switches=(None,))))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [
        f"{of.name}\non {target}" for of in estimates.ESTIMATES for target in ("gfx950", "sm_90")
    ]
    limits = {
        axis.get_title(loc="left"): sorted(
            float(value)
            for line in axis.lines
            if line.get_color() == plots.RED and len(line.get_xdata())
            for value in {*line.get_xdata(), *line.get_ydata()}
            if value > 1
        )
        for axis in figure.axes
    }
    assert limits["sglang #29484\non sm_90"] == [227, 227]
    assert limits["vLLM on ROCm\non gfx950"] == [64, 160]


def test_a_panel_counts_what_is_wrong_and_in_brackets_what_is_not_spoken_of():
    # 16x64x64 of fp8 are 5,120 bytes; the compiler says more than the limit.
    wrong = rows(stages=(2,), lds_bytes=200000)
    figure = plots.estimates_on_trial(judged(wrong))
    padded = figure.axes[0]
    assert texts(padded) == ["wrongly rejects\n0 (0)", "wrongly admits\n1 (1)"]
    faces = [line.get_mfc() for line in padded.lines if line.get_ms() == 4]
    assert sorted(face == "none" for face in faces) == [False, True]


def test_verdicts_have_a_bar_per_estimate_and_target_that_it_speaks_of():
    (axis,) = plots.verdicts(judged(rows(stages=(2,), lds_bytes=200000), rows("gfx942"))).axes
    assert [label.get_text() for label in axis.get_yticklabels()][::-1][:2] == [
        "aiter, tritonBLAS: padded\non gfx950",
        "aiter, tritonBLAS: padded\non gfx942",
    ]
    assert "0 rejected, 1 admitted of 1" in texts(axis)
    assert not any("sglang" in label.get_text() for label in axis.get_yticklabels())


def buffer(name="w", operation="local_alloc", **changed):
    made = {
        "line": "kernel.py:7",
        "shape": (128, 512),
        "dtype": "i8",
        "copies": 1,
        "padding_bytes": 0,
        "offset": 0,
        "size_bytes": 65536,
        "first": 100,
        "last": 200,
    }
    return Buffer(name, operation, **(made | changed))


W = buffer(copies=2, size_bytes=135136, padding_bytes=4064)
SCRATCH = buffer("convert_layout at kernel.py:7", "convert_layout", first=230, last=231)
BARRIER = buffer("mbarrier of acc", offset=135136, size_bytes=16, copies=2)
MAPS = {
    "no buffer": ([], 0),
    "one": ([buffer()], 65536),
    "copies": ([W], 135136),
    "scratch": ([W, SCRATCH, replace(SCRATCH, first=240, last=241)], 135136),
    "barriers": ([W, BARRIER], 135152),
    "a call alone": ([buffer("call of f", "call", first=0, last=1)], 65536),
}


def told(buffers, lds_bytes, lds_limit=163840, positions=0):
    return Told("a kernel", "", LdsMap(tuple(buffers), positions), lds_bytes, lds_limit)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_a_figure_that_can_be_saved_and_leaves_none_open(name, tmp_path):
    figure = plots.lds_map(told(*MAPS[name], positions=260))
    assert plt.get_fignums() == []
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_map_names_buffers_copies_bytes_and_the_limit():
    axis = plots.lds_map(told(*MAPS["scratch"], positions=260)).axes[0]
    assert axis.get_title("left") == "a kernel: 135,136 bytes"
    assert "w: 2 x 66.0 KiB" in texts(axis)
    assert "2 buffers, convert_layout at line 7: 64.0 KiB" in texts(axis)
    assert "limit 160 KiB" in texts(axis)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["tile, a band for each copy", "scratch of one operation", "padding"]


def test_a_map_shows_each_copy_as_a_band_and_what_does_not_fit_above_the_limit():
    axis = plots.lds_map(told([W], 135136, 102400)).axes[0]
    size = 135136 / 2 / plots.KIB
    bands = {bar.get_y() for bar in axis.patches if bar.get_height() == pytest.approx(size)}
    assert bands == {0, size}
    padding = [bar for bar in axis.patches if bar.get_hatch() and bar.get_height()]
    assert [bar.get_height() for bar in padding] == pytest.approx([2032 / plots.KIB] * 2)
    assert axis.get_ylim()[1] > 135136 / plots.KIB


def test_a_map_shows_barriers_though_they_are_small():
    axis = plots.lds_map(told(*MAPS["barriers"])).axes[0]
    top = axis.get_ylim()[1]
    drawn = [bar for bar in axis.patches if bar.get_y() >= 135136 / plots.KIB]
    assert max(bar.get_height() for bar in drawn) >= top / 200
    assert "mbarrier of acc: 2 x 8 B" in texts(axis)


def test_a_map_names_what_has_no_line():
    captures = buffer("captures of warp_specialize", "warp_specialize", line="", last=101)
    axis = plots.lds_map(told([captures], 65536)).axes[0]
    assert "captures of warp_specialize: 64.0 KiB" in texts(axis)


# Ours and peers.


def of_peers(peer, tflops, m=512, **changed):
    (ours,) = rows("sm_90", stages=(2,), switches=(None,), m=m)
    own = {"peer": peer, "includes": peer and "gather", "mode": "measured", "run": "today"}
    times = {"time_us": 1e5 / tflops, "time_low_us": 1e5 / tflops, "time_high_us": 1.2e5 / tflops}
    return ours | own | times | {"tflops": tflops, "roof_tflops": 900.0} | changed


def test_ours_and_peers_stand_in_a_panel_for_each_problem_along_m():
    timed = [
        of_peers(peer, tflops, m, fast_accum=fast)
        for fast in (False, True)
        for m in (512, 1536)
        for peer, tflops in ((None, 500.0), ("torch", 400.0), ("somebody", 300.0))
    ]
    figure = plots.ours_and_peers(tables.labelled(records.frame(timed)))
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left").split("\n")[0].split(", ")[1] for axis in panels] == [
        "sums in fp32",
        "sums in the tensor cores",
    ]
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert set(named) >= {"ours", "somebody", "torch", "roof"}
    highest = max(max(line.get_ydata()) for line in panels[0].get_lines() if len(line.get_ydata()))
    assert highest == 900


def test_without_a_time_the_picture_of_peers_says_so():
    (ours,) = records.frame([of_peers(None, 500.0)]).assign(tflops=None).to_dict("records")
    figure = plots.ours_and_peers(tables.labelled(records.frame([ours])))
    assert "nothing was timed" in [text.get_text() for text in figure.axes[0].texts]


# Comparisons.


def squares(figure):
    """The words of every square, panel by panel."""
    return [[text.get_text() for text in axis.texts] for axis in figure.axes if axis.texts]


def test_a_square_has_the_ratio_and_says_what_is_not_decided():
    slow, open_ = regressions.timed(by=1.2), regressions.timed(regressions.NOISY, m=2560)
    told = regressions.compared(
        [regressions.timed(), regressions.timed(m=2560), regressions.timed(m=8704)],
        [slow, open_, regressions.timed(m=8704, by=1.2, run="second")],
    )
    figure = plots.moves_over_m_and_tp(told)
    (words,) = squares(figure)
    ratio = told.cells.set_index("m")["ratio"]
    assert set(words) == {"1.20", f"{ratio[2560]:.2f}?", "1.20~"}
    bold = {t.get_text() for axis in figure.axes for t in axis.texts if t.get_weight() == "bold"}
    assert bold == {"1.20"}


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ({}, {}, "="),
        ({}, regressions.REFUSED, "lost"),
        (regressions.REFUSED, {}, "fits"),
        (regressions.REFUSED, regressions.REFUSED, "no"),
        ({}, {"spilled_registers": 3}, "heavier"),
        ({}, {"workgroups_per_cu": 3}, "lighter"),
        ({}, {"status": "timeout"}, "?"),
        (regressions.timed(), regressions.timed(), "="),
    ],
)
def test_without_times_a_square_says_what_became_of_the_fit(before, after, word):
    told = regressions.compared(regressions.row(**before), regressions.row(**after))
    assert squares(plots.moves_over_m_and_tp(told)) == [[word]]


def test_of_several_tiles_a_square_has_the_mean_and_the_gravest_fit():
    tiles = [{"block_n": 64}, {"block_n": 128}]
    before = [regressions.timed(**tile) for tile in tiles]
    after = [regressions.timed(by=by, **tile) for by, tile in zip((1.1, 1.3), tiles, strict=True)]
    told = regressions.compared(before, after)
    assert squares(plots.moves_over_m_and_tp(told)) == [[f"{(1.1 * 1.3) ** 0.5:.2f}"]]
    after[1] |= regressions.REFUSED | {"time_us": None, "samples_us": None}
    told = regressions.compared(before, after)
    assert squares(plots.moves_over_m_and_tp(told)) == [["lost"]]


def test_what_neither_side_has_is_hatched():
    cells = [regressions.row(), regressions.row(tp=4), regressions.row(tp=4, m=2560)]
    figure = plots.moves_over_m_and_tp(regressions.compared(cells, cells))
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert [patch.get_xy() for patch in hatched] == [(1 - 0.48, 0 - 0.46)]
    assert "no such cell" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_samples_of_both_sides_are_drawn_round_by_round():
    told = regressions.compared(regressions.timed(), regressions.timed(by=1.2))
    figure = plots.worst_samples(regression_report.worst(told))
    (axis,) = figure.axes
    times = sorted(y for line in axis.lines if line.get_marker() == "o" for y in line.get_ydata())
    of_side = [us for turn in regressions.QUIET for us in turn]
    assert times == pytest.approx(sorted([*of_side, *(1.2 * us for us in of_side)]))
    bars = {y for line in axis.lines if line.get_marker() == "None" for y in line.get_ydata()}
    assert {statistics.median(turn) for turn in regressions.QUIET} <= bars
    assert "regressed: \N{MULTIPLICATION SIGN}1.200" in axis.get_title(loc="left")


def test_a_comparison_without_problems_times_or_figures_still_has_its_pictures(tmp_path):
    own = regressions.row(model=None, layer=None, tp=None, experts=None, m=None) | {"m": None}
    told = regressions.compared(own, own)
    for figure in (
        plots.moves_over_m_and_tp(told),
        plots.worst_samples(regression_report.worst(told)),
    ):
        figure.savefig(tmp_path / "figure.png")
    assert plots.published_over_m_and_tp(told) is None
    assert plots.fits(regression_report.fits(told)) is None
    steps = regression_report.along_m(told)
    assert plots.comparison_cliffs(steps, regression_report.MEASURED) is None


@pytest.mark.parametrize("name", ["$\\frac{", "<b>\n", "x" * 5000])
def test_a_hostile_name_is_drawn_as_it_is(tmp_path, name):
    changed = {"kernel": name, "model": name}
    told = regressions.compared(regressions.timed(**changed), regressions.timed(by=1.2, **changed))
    for figure in (
        plots.moves_over_m_and_tp(told),
        plots.worst_samples(regression_report.worst(told)),
    ):
        figure.savefig(tmp_path / "figure.png")


def test_the_arrows_of_fits_start_where_the_baseline_was():
    told = regressions.compared(
        regressions.row(**regressions.REFUSED), regressions.row(num_stages=1)
    )
    figure = plots.fits(regression_report.fits(told))
    (axis,) = figure.axes
    start, end = axis.lines[0], axis.lines[1]
    assert (start.get_xdata()[0], end.get_xdata()[0]) == (2000 / 1024, 100 / 1024)
    assert (start.get_markerfacecolor(), end.get_markerfacecolor() != "white") == ("white", True)
    assert "2 -> 1 stages" in axis.get_yticklabels()[0].get_text()
