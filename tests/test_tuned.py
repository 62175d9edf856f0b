"""Measured rows become a file of best configurations; a launch finds its own there, or none."""

import json
from dataclasses import fields, replace

import pytest

from moelab import problems, records, tuned
from moelab.problems import problem
from moelab.specs import Configuration, Problem, Tile
from moelab.targets import TARGETS
from moelab.tuned import Shape

KERNEL, MODEL = "moe_gemm_a8w8", "Qwen3-235B-A22B"
FIRST, SECOND = (problem(MODEL, layer, tp=1, m=512) for layer in (1, 2))
SMALL, WIDE = Tile(32, 64, 128), Tile(64, 128, 128)
SHAPES = [Shape.of(KERNEL, of) for of in (FIRST, SECOND)]


def measured(of, tile, time_us, *, run="1", rounds=3, num_stages=3, source="aaa", **changed):
    """Give a row as `bench.measure` does."""
    asked = Configuration(KERNEL, of, tile, 4, num_stages, None, "sm_90").asked()
    made_by = {"driver": "580", "triton": "3.6.0", "torch": "2.11", "date": "a day"}
    return (
        asked
        | {
            "mode": "measured",
            "gpu": "a GPU",
            "workload": "uniform, 0",
            "run": run,
            "status": "ok",
            "time_us": time_us,
            "time_low_us": time_us and time_us * 0.99,
            "time_high_us": time_us and time_us * 1.01,
            "samples_us": json.dumps([[time_us]] * rounds),
            "made_by": json.dumps(made_by | {"kernel": source}),
            "moelab": "0.1.0",
            "schema": records.SCHEMA_VERSION,
        }
        | changed
    )


def winners(*rows):
    return tuned.winners(records.frame(rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, and nothing shipped."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "nothing")
    monkeypatch.setenv("MOELAB_TUNED", str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()


@pytest.fixture
def file(folder):
    """Both layers at two token counts: 512 is quickest with 32 rows, 8192 with 64."""
    times = {512: (100.0, 120.0), 8192: (900.0, 600.0)}
    rows = [
        measured(replace(of, m=m), tile, time_us)
        for of in (FIRST, SECOND)
        for m, both in times.items()
        for tile, time_us in zip((SMALL, WIDE), both, strict=True)
    ]
    return tuned.save(winners(*rows), "sm_90", tuned.path_of("sm_90"))


# Asked.


@pytest.mark.parametrize(("m", "tile"), [(512, SMALL), (8192, WIDE)])
def test_a_measured_problem_has_the_quickest_of_its_tiles(file, m, tile):
    found = tuned.best(KERNEL, replace(FIRST, m=m), "sm_90")
    assert (found.tile, found.num_warps, found.num_stages, found.m) == (tile, 4, 3, m)


# The least ratio: 2048 is as far from 512 as from 8192.
@pytest.mark.parametrize(
    ("m", "at"), [(1, 512), (0, 512), (2047, 512), (2048, 512), (2049, 8192), (10**6, 8192)]
)
def test_between_token_counts_the_nearest_by_ratio_answers(file, m, at):
    assert tuned.best(KERNEL, replace(FIRST, m=m), "sm_90").m == at


@pytest.mark.parametrize(
    "changed",
    [
        {"experts": 64},
        {"top_k": 4},
        {"n": 3104},
        {"k": 4128},
        {"gather": False},
        {"x_format": "mxfp8"},
        {"y_format": "fp8"},
        {"scale_layout": "cdna4"},
    ],
    ids=lambda changed: "".join(changed),
)
def test_a_shape_that_was_never_measured_has_no_answer(file, changed):
    assert tuned.best(KERNEL, FIRST, "sm_90") is not None
    assert tuned.best(KERNEL, replace(FIRST, **changed), "sm_90") is None


def test_neither_has_another_kernel_target_or_way_to_sum(file):
    assert tuned.best("moe_gemm_a8w8_blockscale", FIRST, "sm_90") is None
    assert tuned.best(KERNEL, FIRST, "sm_100") is None
    assert tuned.nearest(SHAPES[0]._replace(fast_accum=True), 512, "sm_90") is None


@pytest.mark.parametrize(
    "changed",
    [
        {"swiglu": False},
        {"weighted": True},
        {"bias": False},
        {"scatter": True},
        {"model": "another"},
        {"tp": 8},
        {"x_format": "fp8"},
    ],
    ids=lambda changed: "".join(changed),
)
def test_what_an_epilogue_does_and_names_count_for_nothing(file, changed):
    assert tuned.best(KERNEL, replace(FIRST, **changed), "sm_90") == tuned.best(
        KERNEL, FIRST, "sm_90"
    )


def test_a_given_block_m_is_kept_to_even_at_another_token_count(folder):
    rows = [
        measured(FIRST, SMALL, 100.0),
        measured(replace(FIRST, m=8192), SMALL, 900.0),
        measured(replace(FIRST, m=8192), WIDE, 600.0),
    ]
    tuned.save(winners(*rows), "sm_90", tuned.path_of("sm_90"))
    found = tuned.best(KERNEL, FIRST, "sm_90", block_m=64)
    assert (found.tile, found.m) == (WIDE, 8192)
    assert tuned.best(KERNEL, FIRST, "sm_90", block_m=16) is None


def test_the_block_m_to_route_with_is_the_best_for_both_layers_together(folder):
    rows = [
        measured(FIRST, SMALL, 100.0),
        measured(FIRST, WIDE, 110.0),
        measured(SECOND, SMALL, 90.0),
        measured(SECOND, WIDE, 60.0),
    ]
    tuned.save(winners(*rows), "sm_90", tuned.path_of("sm_90"))
    assert tuned.block_m_for(SHAPES[:1], 512, "sm_90") == 32
    assert tuned.block_m_for(SHAPES, 512, "sm_90") == 64


@pytest.mark.parametrize("m", [1, 512, 8704])
def test_the_block_m_of_what_was_never_measured_is_the_published_rules(folder, m):
    assert tuned.block_m_for(SHAPES, m, "sm_90") == problems.routed_block_m(replace(FIRST, m=m))


def test_a_launch_of_a_measured_shape_takes_its_routings_block_m(file):
    assert tuned.choose(SHAPES[0], 512, 64, "sm_90").tile == WIDE


def test_a_routing_for_no_measured_block_m_is_told_which_to_lay_out(file):
    with pytest.raises(ValueError) as error:
        tuned.choose(SHAPES[0], 512, 128, "sm_90")
    for words in ("block_m = 128", "with 32, 64", "route with 32", "best at 512 tokens"):
        assert words in str(error.value)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("target", ["sm_90", "gfx950", None])
def test_a_launch_of_any_other_shape_takes_the_published_tile_as_deep_as_fits(
    folder, block_m, target
):
    found = tuned.choose(SHAPES[0], 512, block_m, target)
    tile, num_warps = problems.ruled_tile(KERNEL, FIRST, block_m)
    assert tile.block_m == block_m
    assert (found.tile, found.num_warps) == (tile, num_warps)
    assert found.num_stages is None and found.source is None


def test_a_block_m_that_no_rule_speaks_of_is_told_the_largest(folder):
    with pytest.raises(ValueError, match=r"block_m 256; they end at 128: route with 128 or less"):
        tuned.choose(SHAPES[0], 512, 256, "sm_90")


def test_the_users_file_hides_the_shipped_one_shape_by_shape(folder, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", folder / "shipped")
    shipped = [measured(of, SMALL, 100.0) for of in (FIRST, SECOND)]
    tuned.save(winners(*shipped), "sm_90", tuned.path_of("sm_90", tuned.SHIPPED))
    tuned.save(winners(measured(FIRST, WIDE, 200.0)), "sm_90", tuned.path_of("sm_90"))
    assert tuned.best(KERNEL, FIRST, "sm_90").tile == WIDE
    assert tuned.best(KERNEL, SECOND, "sm_90").tile == SMALL


def test_files_are_read_once(file):
    assert tuned.choose(SHAPES[0], 512, 32, "sm_90").tile == SMALL
    file.unlink()
    assert tuned.choose(SHAPES[1], 600, 64, "sm_90").tile == WIDE


# Reduced.


def test_each_block_m_keeps_its_quickest_with_the_runner_up_and_how_many_there_were():
    rows = [
        measured(FIRST, SMALL, 110.0, num_stages=2),
        measured(FIRST, SMALL, 100.0, num_stages=3),
        measured(FIRST, SMALL, 130.0, num_stages=4),
        measured(FIRST, WIDE, 120.0),
        measured(FIRST, WIDE, None, num_stages=4, status="out_of_lds", samples_us=None),
    ]
    small, wide = winners(*rows)
    assert (small["block_m"], small["num_stages"], small["time_us"]) == (32, 3, 100.0)
    assert (small["runner_up_us"], small["compared"]) == (110.0, 3)
    assert (wide["block_m"], wide["runner_up_us"], wide["compared"]) == (64, None, 1)


def test_only_the_run_with_the_most_samples_decides():
    """A lucky time of few samples is not compared with one of many."""
    rows = [
        measured(FIRST, SMALL, 80.0, run="1", rounds=2, num_stages=2),
        measured(FIRST, SMALL, 90.0, run="1", rounds=2, num_stages=3),
        measured(FIRST, SMALL, 100.0, run="2", rounds=6, num_stages=2),
        measured(FIRST, SMALL, 95.0, run="2", rounds=6, num_stages=3),
        measured(FIRST, SMALL, 70.0, run="3", rounds=2, num_stages=2),
    ]
    (won,) = winners(*rows)
    assert (won["num_stages"], won["time_us"], won["compared"]) == (3, 95.0, 2)
    assert won["made_by"]["samples"] == "6 rounds of 1"


def test_a_problem_that_only_the_first_run_reached_keeps_its_result():
    rows = [
        measured(FIRST, SMALL, 80.0, run="1", rounds=2),
        measured(SECOND, SMALL, 50.0, run="1", rounds=2),
        measured(FIRST, SMALL, 85.0, run="2", rounds=6),
    ]
    assert {row["n"]: row["time_us"] for row in winners(*rows)} == {3072: 85.0, 4096: 50.0}


def test_the_gain_is_over_the_published_tile_at_its_own_best_stage_count():
    published, num_warps = problems.ruled_tile(KERNEL, FIRST)
    rows = [
        measured(FIRST, SMALL, 100.0),
        measured(FIRST, published, 240.0, num_stages=2, num_warps=num_warps),
        measured(FIRST, published, 200.0, num_stages=3, num_warps=num_warps),
        measured(SECOND, SMALL, 50.0),
    ]
    compared = tuned.gains(records.frame(rows))
    (row,) = compared.to_dict("records")
    assert (row["layer"], row["tuned_us"], row["published_us"], row["gain"]) == (1, 100, 200, 2)


def test_gains_are_averaged_as_ratios_are():
    published, num_warps = problems.ruled_tile(KERNEL, FIRST)
    rows = []
    for of, time_us in ((FIRST, 100.0), (SECOND, 800.0)):
        rows += [measured(of, SMALL, time_us), measured(of, published, 400.0, num_warps=num_warps)]
    (row,) = tuned.mean_gains(tuned.gains(records.frame(rows))).to_dict("records")
    # 4 times quicker, and the published tile itself.
    assert row["mean"] == pytest.approx(2)
    assert (row["problems"], row["least"], row["most"]) == (2, 1, 4)


# Kept.


def test_what_is_saved_is_read_back_with_what_made_it(file):
    found = tuned.read(file)
    assert (found["schema"], found["target"]) == (tuned.SCHEMA_VERSION, "sm_90")
    assert len(found["rows"]) == 8
    (made_by,) = found["made_by"]
    assert made_by == {
        "source": "aaa",
        "gpu": "a GPU",
        "driver": "580",
        "triton": "3.6.0",
        "torch": "2.11",
        "date": "a day",
        "moelab": "0.1.0",
        "workload": "uniform, 0",
        "async_copy": None,
        "samples": "3 rounds of 1",
    }
    assert {tuple(row) for row in found["rows"]} == {tuple(found["rows"][0])}
    assert file.read_text().count("\n  {") >= 8, "a choice is a line, for diffs"


def test_saving_replaces_the_shapes_that_it_has_and_keeps_the_others(file):
    new = measured(FIRST, WIDE, 50.0, source="bbb")
    tuned.save(winners(new), "sm_90", file)
    found = tuned.read(file)
    sources = {row["gather"]: found["made_by"][row["by"]]["source"] for row in found["rows"]}
    assert sources == {True: "bbb", False: "aaa"}
    assert [row["time_us"] for row in found["rows"] if row["gather"]] == [50.0]
    assert tuned.best(KERNEL, replace(FIRST, m=8192), "sm_90").tile == WIDE


def test_a_changed_kernel_is_told_by_the_source_that_was_measured(file):
    found = tuned.read(file)
    assert tuned.stale(found, {KERNEL: "aaa"}) == {}
    assert tuned.stale(found, {KERNEL: "bbb"}) == {KERNEL: "aaa"}


def test_nothing_measured_is_no_file(folder):
    with pytest.raises(ValueError, match="no measured configuration"):
        tuned.save([], "sm_90", folder / "new.json")
    assert not (folder / "new.json").exists()


def test_a_file_of_another_target_is_not_written_into(file):
    with pytest.raises(ValueError, match=r"is of sm_90; name another file for gfx950"):
        tuned.save(winners(measured(FIRST, WIDE, 50.0)), "gfx950", file)
    assert tuned.best(KERNEL, FIRST, "sm_90").tile == SMALL


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "JSONDecodeError"),
        (lambda text: "[]", "TypeError"),
        (lambda text: text.replace('"time_us"', '"time"'), "time_us"),
        (lambda text: text.replace('"by": 0', '"by": 7'), "IndexError"),
        (lambda text: text.replace('"schema": 1', '"schema": "1"'), "TypeError"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema 99; .* upgrade"),
        (lambda text: '{"schema": 99, "choices": []}', "schema 99; .* upgrade"),
    ],
)
def test_a_file_that_is_none_is_an_error_that_names_it(file, change, words):
    file.write_text(change(file.read_text()))
    tuned.forget()
    with pytest.raises(ValueError, match=words) as error:
        tuned.best(KERNEL, FIRST, "sm_90")
    assert str(file) in str(error.value)


SHIPPED = sorted(tuned.SHIPPED.glob("tuned_*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_is_shipped_says_where_it_comes_from_and_is_consistent(path):
    found = tuned.read(path)
    assert path == tuned.path_of(found["target"], tuned.SHIPPED)
    assert found["target"] in TARGETS
    for made_by in found["made_by"]:
        assert all(made_by[name] for name in ("gpu", "driver", "triton", "torch", "date"))
    once = set()
    for row in found["rows"]:
        assert 0 < row["low_us"] <= row["high_us"]
        assert row["compared"] >= 1
        assert row["runner_up_us"] is None or row["runner_up_us"] >= row["time_us"]
        once.add((tuned._shape(row), row["m"], row["block_m"]))
    assert len(once) == len(found["rows"]), "one choice for each shape, token count and block_m"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_who_routes_as_published_gets_a_choice_or_is_told_what_to_route_with(path):
    found = tuned.read(path)
    names = {field.name for field in fields(Problem)} & set(Shape._fields)
    for row in found["rows"]:
        of = Problem("", 1, 1, row["m"], swiglu=False, weighted=False, **{n: row[n] for n in names})
        routed = problems.routed_block_m(of)
        if tuned.best(row["kernel"], of, found["target"], routed) is None:
            with pytest.raises(ValueError, match=r"route with \d+, the best"):
                tuned.choose(Shape.of(row["kernel"], of), row["m"], routed, found["target"])
