"""Each formula against numbers worked by hand from its source, then hand-made rows."""

from dataclasses import asdict

import pytest

from moelab import estimates, problems, records
from moelab.estimates import (
    ADMITS,
    COMPILED,
    DIFFERENCE,
    ESTIMATED,
    ESTIMATES,
    REJECTS,
    RIGHT,
    SPOKEN_OF,
    Operands,
)
from moelab.kernels import KERNELS
from moelab.specs import Tile
from moelab.targets import TARGETS

PADDED, UNPIPELINED, VLLM, ALL_STAGES, ONE_LESS, WITH_SCALES = (of.name for of in ESTIMATES)
FP8, A8W4, FP4 = Operands(8, 8), estimates.OPERANDS["moe_gemm_a8w4"], Operands(4, 4, True, True)


def lds_bytes(name, operands, tile, num_stages):
    (estimate,) = [of for of in ESTIMATES if of.name == name]
    return estimate.lds_bytes(operands, Tile.parse(tile), num_stages)


# The formulas.


@pytest.mark.parametrize(
    ("elements", "every", "by", "expected"),
    [
        (1, 32, 4, 1),
        (32, 32, 4, 32),
        (33, 32, 4, 37),
        (64, 32, 4, 68),
        (8192, 32, 4, 8192 + 1024 - 4),
        (8192, 256, 8, 8192 + 256 - 8),
    ],
)
def test_padding_lies_between_rows_and_not_at_the_end(elements, every, by, expected):
    assert estimates.padded(elements, every, by) == expected


@pytest.mark.parametrize("every,by", [(32, 4), (16, 8), (512, 8)])
@pytest.mark.parametrize("elements", [1, 31, 32, 48, 512, 1000, 65536])
def test_padding_is_that_of_the_shifts_in_the_source(elements, every, by):
    # ROCm/tritonBLAS#72: a block of padding for each full interval, less one where it divides.
    pad = (elements >> every.bit_length() - 1) << by.bit_length() - 1
    if elements % every == 0 and pad >= by:
        pad -= by
    assert estimates.padded(elements, every, by) == elements + pad


@pytest.mark.parametrize(
    ("operands", "tile", "num_stages", "expected"),
    [
        # A 8,192 + 1,020 of fp8; B 131,072 + 16,380 of mxfp4: 9,212 + 73,726 for each stage.
        (A8W4, "32x512x256", 2, 165876),
        (A8W4, "32x512x256", 1, 82938),
        # Rows of 32 elements: 8 between rows is more than 4 between every 32. A 512 + 15 x 8;
        # rows of 64 of B are not: 2,048 + 63 x 4.
        (FP8, "16x64x32", 1, 632 + 2300),
        # Rows of 16 of both: A 256 + 15 x 8, B 256 + 15 x 8.
        (FP8, "16x16x16", 3, 3 * (376 + 376)),
        # (632 + 2,300) x 4 bits.
        (FP4, "16x64x32", 1, 1466),
    ],
)
def test_the_padded_estimate(operands, tile, num_stages, expected):
    assert lds_bytes(PADDED, operands, tile, num_stages) == expected


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    # Those of origami's own test: A and B of 128 x 32 fp16 are 8,192 bytes each.
    [(1, 8192), (2, 16384), (3, 32768)],
)
def test_without_async_copy_one_stage_holds_the_larger_tile(num_stages, expected):
    assert lds_bytes(UNPIPELINED, Operands(16, 16), "128x128x32", num_stages) == expected


@pytest.mark.parametrize(("num_stages", "expected"), [(2, 131072), (3, 262144)])
def test_without_async_copy_further_stages_are_those_that_tritonblas_gives(num_stages, expected):
    assert lds_bytes(UNPIPELINED, Operands(16, 16), "256x256x128", num_stages) == expected


def test_without_async_copy_the_larger_tile_may_be_either():
    assert lds_bytes(UNPIPELINED, FP8, "128x64x64", 1) == 128 * 64
    assert lds_bytes(UNPIPELINED, FP8, "64x128x64", 1) == 128 * 64


@pytest.mark.parametrize(
    ("operands", "tile", "num_stages", "expected"),
    [
        # As sgl-project/sglang#28038 tests it: fp8, int8 x 16 bit, int4 x 16 bit.
        (FP8, "128x256x128", 4, 147456),
        (Operands(16, 8), "128x256x128", 4, 196608),
        (Operands(16, 4), "64x128x128", 3, 49152),
        # max(stages - 1, 1).
        (FP8, "128x256x128", 2, 49152),
        (FP8, "128x256x128", 1, 49152),
    ],
)
def test_sglangs_clamp_counts_one_stage_less_but_at_least_one(operands, tile, num_stages, expected):
    assert lds_bytes(ONE_LESS, operands, tile, num_stages) == expected


@pytest.mark.parametrize(("num_stages", "expected"), [(1, 49152), (2, 98304), (4, 196608)])
def test_sglangs_filter_counts_every_stage(num_stages, expected):
    assert lds_bytes(ALL_STAGES, FP8, "128x256x128", num_stages) == expected


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_vllm_counts_one_stage_whatever_is_asked(num_stages):
    assert lds_bytes(VLLM, FP8, "128x256x128", num_stages) == 128 * (128 + 256)


def test_vllm_alone_has_a_limit_of_its_own():
    assert {of.name: of.limit for of in ESTIMATES if of.limit} == {VLLM: 65536}


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        (FP8, 64 * 256 + 256 * 128),
        # 8 scales for each of 128 columns.
        (A8W4, 64 * 256 + 128 * 128 + 8 * 128),
        (Operands(8, 4, True, True), 64 * 256 + 128 * 128 + 8 * (64 + 128)),
        (FP4, 64 * 128 + 128 * 128 + 8 * (64 + 128)),
    ],
)
def test_triton_kernels_counts_scales_beside_the_tiles(operands, expected):
    assert lds_bytes(WITH_SCALES, operands, "64x128x256", 1) == expected
    assert lds_bytes(WITH_SCALES, operands, "64x128x256", 3) == 3 * expected


def test_every_moe_gemm_has_its_operands():
    assert set(estimates.OPERANDS) == set(KERNELS) - set(problems.DENSE)


@pytest.mark.parametrize(
    ("kernel", "target", "async_copy", "spoken"),
    [
        ("moe_gemm_a8w8", "gfx950", True, {PADDED, VLLM}),
        ("moe_gemm_a8w8", "gfx942", False, {UNPIPELINED, VLLM}),
        ("moe_gemm_a8w4", "gfx950", True, {PADDED}),
        ("moe_gemm_a4w4", "gfx950", False, {UNPIPELINED}),
        ("moe_gemm_a8w8_blockscale", "sm_90", None, {ALL_STAGES, ONE_LESS, WITH_SCALES}),
        ("moe_gemm_a8w4", "sm_90", None, {WITH_SCALES}),
    ],
)
def test_each_estimate_speaks_of_what_its_source_does(kernel, target, async_copy, spoken):
    asked = (estimates.OPERANDS[kernel], TARGETS[target], async_copy)
    assert {of.name for of in ESTIMATES if of.speaks_of(*asked)} == spoken


def test_every_estimate_is_shown_with_formula_and_source():
    shown = estimates.formulas()
    assert list(shown["estimate"]) == [of.name for of in ESTIMATES]
    assert shown.map(len).gt(0).all(axis=None)


# The trial.

PROBLEM = asdict(problems.problem("GPT-OSS 120B", 1, 1, 512))


def row(lds_bytes, **changed):
    """A row of a8w4 at 32x512x256 with 2 stages and async copy."""
    limit = TARGETS[changed.get("target", "gfx950")].lds_limit
    fits = lds_bytes is not None and lds_bytes <= limit
    return {
        "kernel": "moe_gemm_a8w4",
        **PROBLEM,
        "target": "gfx950",
        "triton": "3.9.0",
        "block_m": 32,
        "block_n": 512,
        "block_k": 256,
        "split_k": 1,
        "num_warps": 8,
        "num_stages": 2,
        "async_copy": True,
        "mode": "lds",
        "status": "ok" if fits else "out_of_lds",
        "lds_bytes": lds_bytes,
        "lds_limit": limit,
        **changed,
    }


def judge(*rows):
    return estimates.judge(records.frame(rows))


def of(judged, name):
    return judged[judged["estimate"] == name]


def test_each_row_is_judged_by_each_estimate():
    judged = judge(row(160192), row(77824, async_copy=False))
    assert len(judged) == 2 * len(ESTIMATES)
    first = of(judged, PADDED).iloc[0]
    assert (first[ESTIMATED], first[COMPILED], first[DIFFERENCE]) == (165876, 160192, 5684)
    assert first["verdict"] == REJECTS
    assert first[SPOKEN_OF]
    assert not of(judged, PADDED).iloc[1][SPOKEN_OF]


@pytest.mark.parametrize(
    ("compiled", "verdict"),
    [(1, RIGHT), (163840, RIGHT), (163841, ADMITS)],
)
def test_what_just_fits_fits(compiled, verdict):
    # Two stages of A + B are 147,456 bytes.
    assert list(of(judge(row(compiled)), ALL_STAGES)["verdict"]) == [verdict]


def test_what_both_refuse_is_right_however_far_off():
    assert list(of(judge(row(400000, num_stages=4)), ALL_STAGES)["verdict"]) == [RIGHT]


def test_vllms_estimate_is_held_to_its_own_limit_and_the_compiler_to_the_targets():
    (found,) = of(judge(row(100000)), VLLM).to_dict("records")
    # A + B are 73,728 bytes: below 163,840, above 65,536.
    assert found["verdict"] == REJECTS
    assert found[estimates.OWN_LIMIT] == 65536
    assert found[estimates.LIMIT] == 163840


def test_scales_of_mxfp8_are_counted_where_scales_are():
    plain, scaled = judge(row(1)), judge(row(1, x_format="mxfp8"))
    added = scaled[ESTIMATED] - plain[ESTIMATED]
    # Two stages of 32 rows with 8 scales.
    assert dict(zip(plain["estimate"], added, strict=True)) == {
        name.name: 512 if name.name == WITH_SCALES else 0 for name in ESTIMATES
    }


def test_what_did_not_compile_and_other_kernels_are_left_out():
    rejected = row(None, status="compile_error")
    assert judge(rejected, row(1, kernel="ff_a16w16_fused")).empty
    assert len(judge(rejected, row(1))) == len(ESTIMATES)


def test_the_trial_counts_verdicts_per_kernel_target_and_async_copy():
    judged = judge(
        row(160192),
        row(200000),
        row(160000, num_stages=1),
        row(200000, num_stages=1, m=1536),
        row(77824, async_copy=False),
        row(10, target="gfx942"),
    )
    table = estimates.trial(judged)
    assert table["configurations"].sum() == len(judged)
    padded = table[(table["estimate"] == PADDED) & table[SPOKEN_OF]]
    # One stage is estimated at 82,938.
    assert padded[["target", "configurations", "fit", RIGHT, REJECTS, ADMITS]].to_dict(
        "split", index=False
    )["data"] == [["gfx950", 4, 2, 2, 1, 1], ["gfx942", 1, 1, 0, 1, 0]]
    first = padded.iloc[0]
    off = sorted([165876 - 160192, 165876 - 200000, 82938 - 160000, 82938 - 200000])
    assert first["least (bytes)"] == off[0]
    assert first["most (bytes)"] == off[-1]
    assert first["median difference (bytes)"] == (off[1] + off[2]) / 2


def test_the_trial_shows_first_what_is_spoken_of_in_the_order_of_the_estimates():
    table = estimates.trial(judge(row(1, async_copy=False), row(1), row(1, target="sm_90")))
    assert list(table[SPOKEN_OF]) == sorted(table[SPOKEN_OF], reverse=True)
    spoken = table.loc[table[SPOKEN_OF], "estimate"]
    assert list(spoken) == [PADDED, UNPIPELINED, WITH_SCALES]


def test_mistakes_are_listed_furthest_off_first_and_only_what_is_spoken_of():
    judged = judge(
        row(160192),
        row(1),
        row(200000),
        row(300000, num_stages=1),
        row(1, async_copy=False, block_n=256),
    )
    found = estimates.mistakes(judged)
    assert found[["estimate", "verdict", COMPILED]].to_dict("split", index=False)["data"] == [
        [PADDED, ADMITS, 300000],
        [PADDED, REJECTS, 1],
        [PADDED, REJECTS, 160192],
    ]
    assert list(estimates.mistakes(judged, most=1)[COMPILED]) == [300000, 1]
    assert dict(found.iloc[0][["tile", "num_warps", "num_stages", "async copy"]]) == {
        "tile": "32x512x256",
        "num_warps": 8,
        "num_stages": 1,
        "async copy": "on",
    }


def test_the_conclusion_counts_what_each_estimate_gets_wrong_and_where_it_does_not_speak():
    conclusion = estimates.conclusion(judge(row(160192), row(200000, num_stages=1)))
    assert conclusion.splitlines()[:2] == [
        f"- **{PADDED}**, stages x (padded A + padded B): of 2 configurations that it speaks of, "
        "1 fit. It rejects 1 that fit and admits 1 that don't (both, by stages: 1 at 1, 1 at 2). "
        "It is -117,062 to +5,684 bytes off.",
        f"- **{UNPIPELINED}**, (stages - 1) x (A + B), the larger of both for one stage: speaks "
        "of none of the 2 configurations.",
    ]
    both = judge(row(160192), row(160192, async_copy=False))
    assert (
        f"- Where **{PADDED}** does not speak, on gfx950 it rejects 1 that fit and admits 0 that "
        "don't (1 of 1 fit)."
    ) in estimates.conclusion(both).splitlines()


def test_of_no_rows_there_are_tables_and_every_estimate_says_so():
    judged = judge()
    assert judged.empty
    assert estimates.trial(judged).empty
    assert estimates.mistakes(judged).empty
    assert estimates.conclusion(judged).count("speaks of none of the 0 configurations") == len(
        ESTIMATES
    )
