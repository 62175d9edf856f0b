"""Hand-made rows in: which alternative comes first, by which cost, and how it is told."""

import json
import math
import re
from dataclasses import asdict

import pandas as pd
import pytest

from moelab import advice, plan, problems, records
from moelab.specs import Tile
from moelab.targets import TARGETS, get, occupancy

LIMIT = get("gfx950").lds_limit
GPT = problems.problem("GPT-OSS 120B", 1, 1, 8704)


def row(tile="128x512x256", problem=GPT, **changed):
    """A row of the full compile; it fits, or not, by its bytes."""
    made = {
        "kernel": "moe_gemm_a8w4",
        **asdict(problem),
        "target": "gfx950",
        "triton": "3.9.0",
        **asdict(Tile.parse(tile)),
        "num_warps": 8,
        "num_stages": 2,
        "async_copy": True,
        "mode": "full",
        "compile_key": "key",
        "lds_bytes": 100_000,
        "registers": 200,
        "spilled_registers": 0,
        "workgroups_per_cu": 1,
        "schema": 2,
        **changed,
    }
    limit = get(made["target"]).lds_limit
    fits = made["lds_bytes"] is not None and made["lds_bytes"] <= limit
    return {"status": "ok" if fits else "out_of_lds", "lds_limit": limit, **made}


BASE = row(lds_bytes=210_880, mode="lds", registers=None, workgroups_per_cu=None)
ONE_STAGE = row(num_stages=1, lds_bytes=65_536)
SHORT = row("128x512x128", lds_bytes=105_408)
NARROW = row("128x256x256", lds_bytes=139_200)


def frame(*rows):
    return records.frame(rows)


def cost(*arguments, **changed):
    return advice.expected_cost(row(*arguments, **changed))


# Expected cost.


def on_h100(m, stages, **changed):
    """The plain fp8 kernel that was measured on an H100: 128x256x128, 8 warps."""
    given = {"kernel": "moe_gemm_a8w8", "target": "sm_90", "async_copy": None}
    problem = problems.problem("Qwen3-235B-A22B", 1, 1, m)
    return cost("128x256x128", problem, num_stages=stages, **given, **changed)


@pytest.mark.parametrize(
    ("m", "measured"),
    [
        (2560, [395, 530, 669, 714]),
        (8704, [572, 798, 1017, 1021]),
        (15872, [611, 929, 1099, 1136]),
    ],
)
def test_stage_counts_come_in_the_order_measured_on_an_h100(m, measured):
    """TFLOP/s with 1 to 4 stages; what it can't tell apart is within 7%."""
    costs = [on_h100(m, stages) for stages in (1, 2, 3, 4)]
    assert costs[0] > costs[1] > costs[2] >= costs[3]
    useful = 2 * m * 8 * 3072 * 4096 / 1e6
    for found, tflops in zip(costs, measured, strict=True):
        assert useful / found == pytest.approx(tflops, rel=0.17)


def test_a_spill_costs_as_much_as_on_an_h200():
    """M 8704, 3 stages: 387 TFLOP/s with 58 spilled registers, 968 without."""
    slower = on_h100(8704, 3, spilled_registers=58) / on_h100(8704, 3)
    assert 968 / 387 <= slower < 4


def test_one_stage_that_doubles_the_workgroups_halves_what_waits_for_loads():
    # A tile so small that latency is all there is.
    few = {"problem": problems.fused_gemm("a", 16, 64, 0, 8192, bias=False), "num_warps": 4}
    two = cost("16x16x32", **few, num_stages=2, workgroups_per_cu=1)
    one = cost("16x16x32", **few, num_stages=1, workgroups_per_cu=2)
    assert two / one == pytest.approx(2, rel=0.1)


def test_short_steps_in_two_stages_recover_what_one_stage_lost():
    assert cost("128x512x128", num_stages=2) < 0.7 * cost("128x512x256", num_stages=1)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_more_of_what_hides_latency_never_costs_more(stages):
    assert cost(num_stages=stages + 1) <= cost(num_stages=stages)
    assert cost(num_stages=stages, workgroups_per_cu=2) <= cost(num_stages=stages)


def test_padding_is_paid():
    # k = 2880 is 12 steps of 256, 3072, and 23 of 128, 2944; the first step is waited for.
    times = [cost(f"128x512x{k}", num_stages=4) for k in (256, 128)]
    assert 0.9 < times[1] / times[0] < 2944 / 3072
    few = problems.problem("GPT-OSS 120B", 1, 1, 512)
    # 16 rows to each expert.
    assert cost("128x128x256", few) > 1.2 * cost("16x128x256", few)


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w8", "moe_gemm_a8w4", "moe_gemm_a4w4"])
def test_steps_too_short_for_the_wide_instructions_of_gfx950_multiply_slower(kernel):
    lone = {"kernel": kernel, "num_stages": 4}
    short, wide = (cost(f"128x512x{k}", **lone) for k in (64, 128))
    assert short > 1.15 * wide
    on = {"target": "sm_90", "async_copy": None}
    assert cost("128x256x64", **lone, **on) <= cost("128x256x128", **lone, **on)


def test_warps_that_leave_simds_idle_multiply_slower():
    lone = {"num_stages": 4, "workgroups_per_cu": 1}
    assert cost(num_warps=2, **lone) > 1.5 * cost(num_warps=4, **lone)


def test_a_row_of_the_probe_is_bounded_from_below():
    probed = cost(mode="lds", registers=None, spilled_registers=None, workgroups_per_cu=None)
    for registers, spilled in ((100, 0), (256, 0), (256, 40)):
        resident = occupancy(get("gfx950"), 100_000, registers, 8).workgroups_per_cu
        of = {"registers": registers, "spilled_registers": spilled}
        assert probed <= cost(**of, workgroups_per_cu=resident)


def test_every_kernel_has_a_cost_on_every_target_whose_figures_are_known():
    for configuration in plan.grid(kernels="all", targets="all", m=512, stages=2, async_copy="off"):
        found = advice.expected_cost(
            row(
                str(configuration.tile),
                configuration.problem,
                kernel=configuration.kernel,
                target=configuration.target,
            )
        )
        target = TARGETS[configuration.target]
        known = target.compute_units and target.peak_tflops and target.bandwidth_tbps
        assert (found > 0) if known else math.isnan(found), configuration


@pytest.mark.parametrize(
    "unknown",
    [
        {"kernel": "somebodys_kernel"},
        {"target": "gfx1250"},
        {"lds_bytes": None},
        {"lds_bytes": 10**6},
    ],
)
def test_what_cannot_be_told_has_no_cost(unknown):
    assert math.isnan(cost(**{"workgroups_per_cu": None} | unknown))


# The order.


def test_only_what_was_compiled_in_full_and_fits_is_proposed():
    rows = frame(
        ONE_STAGE,
        row("128x512x128", mode="lds"),
        row("128x512x64", lds_bytes=LIMIT + 1),
        row("128x256x256", status="compile_error", lds_bytes=None),
        row("64x512x256", status="crashed", lds_bytes=None),
        row("128x128x256", lds_bytes=LIMIT),
    )
    ranked = advice.rank(rows, BASE)
    assert sorted(ranked["tile"]) == ["128x128x256", "128x512x256"]
    assert set(ranked["status"]) == {"ok"} and set(ranked["mode"]) == {"full"}
    # The index says which rows they were.
    assert rows.loc[ranked.index, "lds_bytes"].tolist() == ranked["lds_bytes"].tolist()
    assert (ranked["free_bytes"] == LIMIT - ranked["lds_bytes"]).all()


def test_a_spilling_alternative_comes_behind_its_twin():
    spilling = SHORT | {"num_warps": 16, "spilled_registers": 40}
    ranked = advice.rank(frame(spilling, SHORT), BASE)
    assert ranked["spilled_registers"].tolist() == [0, 40]
    assert ranked["expected_cost"].iloc[0] == 1 < ranked["expected_cost"].iloc[1]


def test_what_costs_the_same_is_ordered_by_nearness():
    twins = [SHORT | {"num_warps": 16}, SHORT]
    for first, second in (twins, twins[::-1]):
        ranked = advice.rank(frame(first, second), BASE)
        assert ranked["num_warps"].tolist() == [first["num_warps"], second["num_warps"]]


def test_without_a_cost_nearness_is_the_order_with_one_stage_as_the_last_resort():
    rows = [of | {"kernel": "somebodys_kernel"} for of in (ONE_STAGE, SHORT, NARROW)]
    ranked = advice.rank(frame(*rows), BASE | {"kernel": "somebodys_kernel"})
    assert ranked["tile"].tolist() == ["128x512x128", "128x256x256", "128x512x256"]
    assert set(ranked["ordered_by"]) == {"nearness"}
    assert ranked["expected_cost"].isna().all()


def test_changes_are_told_in_words():
    far = row("64x128x128", num_stages=1, num_warps=4, async_copy=False)
    assert advice.changed(far, BASE) == [
        "stages 2 -> 1",
        "block_k 256 -> 128",
        "block_n 512 -> 128",
        "block_m 128 -> 64",
        "warps 8 -> 4",
        "async copy on -> off",
    ]
    assert advice.changed(BASE, BASE) == []
    unswitched = {"target": "sm_90", "async_copy": None}
    (of,) = frame(row(**unswitched)).to_dict("records")
    assert advice.changed(of, of | {"num_stages": 3}) == ["stages 3 -> 2"]


def test_no_row_is_no_alternative():
    for measured in (None, advice.check_measured(times({}))):
        assert advice.rank(frame(), BASE, measured).empty


# Measured times.


def times(*changes):
    """A measurement for each change of the one-stage row."""
    of = {name: ONE_STAGE[name] for name in advice._MEASURED_OF}
    return pd.DataFrame([of | {"tile": "128x512x256", "time_us": 90.0} | c for c in changes])


def ranked_by(measured):
    ranked = advice.rank(frame(ONE_STAGE, SHORT, NARROW), BASE, advice.check_measured(measured))
    return list(zip(ranked["changed"], ranked["ordered_by"], strict=True))


MEASURED, EXPECTED = "measured on gfx950", "expected"


def test_what_was_measured_comes_first_by_its_time_and_the_rest_by_expected_cost():
    narrow = {"tile": "128x256x256", "num_stages": 2, "time_us": 80.0}
    assert ranked_by(times({}, narrow)) == [
        ("block_n 512 -> 256", MEASURED),
        ("stages 2 -> 1", MEASURED),
        ("block_k 256 -> 128", EXPECTED),
    ]
    assert ranked_by(times({}))[0] == ("stages 2 -> 1", MEASURED)


def test_throughput_is_time_too_and_the_median_counts():
    useful = 2 * 8704 * 4 * GPT.n * GPT.k / 1e6
    slow = {"tile": "128x256x256", "num_stages": 2, "time_us": math.nan, "tflops": useful / 100}
    measured = times({}, {"time_us": 9000.0}, {"time_us": 80.0}, slow)
    found = advice.rank(frame(ONE_STAGE, NARROW), BASE, advice.check_measured(measured))
    assert found["measured_time_us"].tolist() == pytest.approx([90, 100])


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": "moe_gemm_a8w8"},
        {"target": "gfx942"},
        {"tile": "128x512x128"},
        {"num_warps": 4},
        {"m": 512},
        {"k": 720},
        {"async_copy": False},
        {"triton": "3.6.0"},
        {"top_k": 8},
    ],
)
def test_a_measurement_of_something_else_orders_nothing(other):
    found = advice.rank(frame(ONE_STAGE), BASE, advice.check_measured(times(other)))
    assert found["ordered_by"].tolist() == [EXPECTED]
    assert found["measured_time_us"].isna().all()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_measurements_are_read_from_a_file_with_blocks_or_tiles(suffix, tmp_path):
    blocks = times({"async_copy": True}).drop(columns="tile")
    blocks = blocks.assign(block_m=128, block_n=512, block_k=256)
    path = tmp_path / f"times.{suffix}"
    blocks.to_csv(path) if suffix == "csv" else blocks.to_parquet(path)
    measured = advice.read_measured(path)
    found = advice.rank(frame(ONE_STAGE, SHORT), BASE, measured)
    assert found["ordered_by"].tolist() == [MEASURED, EXPECTED]


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        (["num_warps", "k"], "no column num_warps, k;"),
        (["tile"], "no column tile;"),
        (["time_us"], "no column time_us or tflops;"),
    ],
)
def test_measurements_without_a_column_are_refused_with_its_name(dropped, said, tmp_path):
    path = tmp_path / "times.csv"
    times({}).drop(columns=dropped).to_csv(path, index=False)
    with pytest.raises(ValueError, match=said) as error:
        advice.read_measured(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "said"), [("a.json", ".csv"), ("missing.csv", "No such file")])
def test_a_file_that_is_none_is_refused(name, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        advice.read_measured(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("wrong", [{"async_copy": "maybe"}, {"num_warps": "eight"}, {"m": 1.5}])
def test_a_value_of_the_wrong_kind_is_refused_with_the_file(wrong, tmp_path):
    path = tmp_path / "times.csv"
    times(wrong).to_csv(path, index=False)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        advice.read_measured(path)


# What is asked, what is compiled.


def test_launches_of_a_tile_are_asked_as_the_one_that_needs_most():
    small = problems.problem("GPT-OSS 120B", 2, 1, 8704)
    rows = frame(
        row(problem=small, lds_bytes=200_000),
        row("16x128x256", lds_bytes=44_000),
        row(problem=small, lds_bytes=210_880),
        row(lds_bytes=210_880),
        row(status="crashed", lds_bytes=None),
        row(async_copy=False),
        row(x_format="mxfp8"),
    )
    assert advice.tilings(rows) == [[3, 2, 0, 4], [1], [5], [6]]
    assert advice.tilings(rows.set_index(rows.index + 7)) == advice.tilings(rows)


def probed(**changed):
    return changed | {"mode": "lds", "registers": None, "workgroups_per_cu": None}


def test_what_fits_and_changes_one_setting_is_compiled_then_the_cheapest():
    rows = frame(
        row(**probed(num_stages=1, lds_bytes=65_536)),
        row(**probed(num_stages=3, lds_bytes=LIMIT + 1)),
        row("128x512x64", **probed(num_stages=1)),
        row("128x512x128", **probed(num_warps=4)),
        row("128x512x128", **probed(status="compile_error", lds_bytes=None)),
        row("128x256x256", **probed()),
    )
    assert advice.shortlist(rows, BASE, most=9) == [0, 2, 3, 5]
    assert advice.shortlist(rows, BASE, most=3) == [0, 3, 5]
    assert advice.shortlist(rows, BASE, most=1) == [0]


# The verdict.


def test_the_quick_fix_is_shown_wherever_it_comes():
    slow = ONE_STAGE | {"spilled_registers": 400}
    ranked = advice.rank(frame(slow, SHORT, NARROW, row("128x128x128", num_stages=1)), BASE)
    changes = ["block_k 256 -> 128", "stages 2 -> 1"]
    assert advice.first(ranked, BASE, top=1)["changed"].tolist() == changes
    assert advice.first(ranked, BASE, top=9).equals(ranked)
    assert advice.first(ranked[:0], BASE, top=1).empty


def test_the_verdict_has_the_bytes_the_first_choice_and_the_quick_fix():
    spilling = ONE_STAGE | {"spilled_registers": 104}
    said = advice.verdict(advice.rank(frame(spilling, SHORT), BASE), BASE)
    assert said.startswith(
        "moe_gemm_a8w4 128x512x256, 8 warps, 2 stages, async copy on, on gfx950 needs 210,880 of "
        "163,840 bytes. First choice: block_k 256 -> 128 (105,408 bytes, nothing spilled, expected "
        "1.00x of the least). Fewer stages alone: stages 2 -> 1 (65,536 bytes, 104 registers "
        "spilled, expected "
    )


def test_the_verdict_says_what_was_measured():
    ranked = advice.rank(frame(ONE_STAGE, SHORT), BASE, advice.check_measured(times({})))
    said = advice.verdict(ranked, BASE)
    assert "First choice: stages 2 -> 1 (65,536 bytes, nothing spilled, 90 us measured on" in said
    assert "Fewer stages alone" not in said


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (BASE, "No neighbour that was compiled fits."),
        (ONE_STAGE, "1 stage, async copy on, on gfx950 fits: 65,536 of 163,840 bytes."),
        (
            BASE | {"status": "compile_error", "reason": "block_k = 256; expected 128"},
            "compile_error: block_k = 256; expected 128 No neighbour",
        ),
    ],
)
def test_the_verdict_without_alternatives(base, said):
    assert said in advice.verdict(advice.rank(frame(), base), base)


def test_launches_of_an_autotuner_are_told_apart_by_their_constants():
    args = {"x_ptr": "*bf16:16", "BLOCK_M": 128, "BLOCK_N": 64}
    unknown = dict.fromkeys(("block_k", "split_k"))
    said = advice.verdict(advice.rank(frame(), BASE), BASE | unknown | {"args": json.dumps(args)})
    assert said.startswith("moe_gemm_a8w4, BLOCK_M 128, BLOCK_N 64, 8 warps")


def test_a_base_that_its_neighbours_do_not_better_says_so():
    ranked = advice.rank(frame(SHORT, ONE_STAGE), SHORT)
    assert ranked["changed"].iloc[0] == advice.UNCHANGED
    assert advice.verdict(ranked, SHORT).endswith("bytes. No neighbour comes before it.")


def test_ranked_rows_are_written_as_json():
    ranked = advice.rank(frame(ONE_STAGE, SHORT), BASE)
    first = json.loads(ranked.to_json(orient="records", lines=True).splitlines()[0])
    assert first["changed"] == "block_k 256 -> 128" and first["measured_time_us"] is None
