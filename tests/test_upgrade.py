"""Hand-made rows of two Tritons in, verdicts out."""

from dataclasses import asdict

import pytest

from moelab import plots, problems, records, upgrade

PROBLEM = asdict(problems.problem("Llama4 Maverick", 1, 1, 512))


def row(triton, lds_bytes=100, *, status=None, **changed):
    """A row that fits, or doesn't, a limit of 1000 bytes."""
    return {
        "kernel": "moe_gemm_a8w8",
        **PROBLEM,
        "target": "gfx950",
        "triton": triton,
        "block_m": 16,
        "block_n": 64,
        "block_k": 64,
        "split_k": 1,
        "num_warps": 4,
        "num_stages": 2,
        "async_copy": True,
        "mode": "full",
        "compile_key": triton,
        "status": status or ("ok" if lds_bytes <= 1000 else "out_of_lds"),
        "lds_bytes": lds_bytes,
        "lds_limit": 1000,
        "registers": 64,
        "spilled_registers": 0,
        "schema": 3,
        **changed,
    }


REJECTED = {"status": "compile_error", "lds_bytes": None, "registers": None}
REJECTED |= {"spilled_registers": None}


def pairs(*rows):
    return upgrade.pairs(records.frame(rows))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ({}, {}, "unchanged"),
        ({}, {"lds_bytes": 2000, "status": "out_of_lds"}, "no longer fits"),
        ({"lds_bytes": 2000, "status": "out_of_lds"}, {}, "now fits"),
        ({}, REJECTED, "no longer compiles"),
        (REJECTED, {}, "now compiles"),
        (REJECTED, {"lds_bytes": 2000, "status": "out_of_lds"}, "now compiles"),
        (REJECTED, REJECTED, "unchanged"),
        ({}, {"lds_bytes": 200}, "more LDS"),
        ({}, {"lds_bytes": 50}, "less LDS"),
        ({}, {"spilled_registers": 1}, "more spills"),
        ({"spilled_registers": 2}, {"spilled_registers": 1, "lds_bytes": 200}, "fewer spills"),
        ({}, {"registers": 70}, "other registers"),
        ({}, {"registers": 60}, "other registers"),
        ({}, {"status": "crashed", "lds_bytes": None}, "unanswered"),
        ({"status": "out_of_lds"}, {"status": "out_of_tmem"}, "unchanged"),
        ({"registers": None, "spilled_registers": None}, {}, "unchanged"),
    ],
)
def test_a_pair_has_the_gravest_verdict(before, after, verdict):
    (pair,) = pairs(row("3.7.1") | before, row("3.9.0") | after).to_dict("records")
    assert pair["verdict"] == verdict
    assert pair["verdict"] in upgrade.VERDICTS


def test_async_copy_left_to_the_compiler_is_part_of_the_answer():
    rows = [row("3.7.1", async_copy=False), row("3.9.0", 200, async_copy=True)]
    (pair,) = pairs(*rows).to_dict("records")
    assert (pair["async copy before"], pair["async copy after"]) == ("off", "on")
    assert pair["verdict"] == "more LDS"


def test_each_setting_of_async_copy_is_compared_with_itself_where_both_were_asked():
    rows = [row(v, 100 * (1 + on), async_copy=on) for v in ("3.7.1", "3.9.0") for on in (0, 1)]
    paired = pairs(*[of | {"async_copy": bool(of["async_copy"])} for of in rows])
    assert list(paired["verdict"]) == ["unchanged", "unchanged"]
    assert list(paired["async copy before"]) == list(paired["async copy after"])


def test_every_later_triton_is_set_against_the_first():
    paired = pairs(row("3.7.1"), row("3.8.0", 200), row("3.9.0", 2000))
    assert list(paired["Triton before"]) == ["3.7.1", "3.7.1"]
    assert list(paired["Triton after"]) == ["3.8.0", "3.9.0"]
    assert list(paired["verdict"]) == ["more LDS", "no longer fits"]


def test_what_one_alone_was_asked_is_listed_and_not_dropped():
    paired = pairs(row("3.7.1"), row("3.7.1", m=1536), row("3.9.0"), row("3.9.0", m=2560))
    assert sorted(paired["verdict"]) == ["asked of one alone", "asked of one alone", "unchanged"]
    assert paired["lds_limit"].notna().all()


def test_kernels_of_anybodys_are_paired_by_their_launch():
    def launch(triton, lds_bytes, args):
        of = {name: None for name in (*PROBLEM, "block_m", "block_n", "block_k", "split_k")}
        return row(triton, lds_bytes) | of | {"kernel": "a.py:b", "args": args, "options": "{}"}

    paired = pairs(*[launch(v, n, a) for v, n in (("3.7.1", 1), ("3.9.0", 2)) for a in ("1", "2")])
    assert list(paired["verdict"]) == ["more LDS", "more LDS"]
    assert list(upgrade.changes(paired)["args"]) == ["1", "2"]


@pytest.mark.parametrize("rows", [[], [row("3.9.0")]])
def test_one_triton_is_no_upgrade(rows):
    with pytest.raises(ValueError, match="an upgrade needs rows of two Tritons; these are of"):
        pairs(*rows)


def test_verdicts_are_counted_the_gravest_first():
    paired = pairs(
        *[row("3.7.1", m=m) for m in (1, 2, 3)],
        *[row("3.9.0", lds, m=m) for m, lds in ((1, 2000), (2, 100), (3, 2000))],
    )
    (counted,) = upgrade.counts(paired).to_dict("records")
    assert list(counted)[-3:] == ["no longer fits", "unchanged", "questions"]
    assert [counted[name] for name in list(counted)[-3:]] == [2, 1, 3]


def test_changes_list_both_sides_and_leave_out_what_is_unchanged():
    paired = pairs(
        *[row("3.7.1", m=m) for m in (1, 2, 3, 4)],
        *[row("3.9.0", lds, m=m) for m, lds in ((1, 200), (2, 2000), (3, 2000), (4, 100))],
    )
    first, second = upgrade.changes(paired).to_dict("records")
    assert (first["verdict"], first["questions"]) == ("no longer fits", 2)
    assert first["LDS (bytes)"] == "100 -> 2,000"
    assert (second["verdict"], second["LDS (bytes)"]) == ("more LDS", "100 -> 200")
    assert second["spills"] == "0"


def test_the_conclusion_names_the_largest_that_no_longer_fits():
    rows = [row("3.7.1", async_copy=False), row("3.9.0", 2000)]
    rows += [row("3.7.1", block_m=32, async_copy=False), row("3.9.0", 3000, block_m=32)]
    assert upgrade.conclusion(pairs(*rows)) == (
        "- **moe_gemm_a8w8 on gfx950**, Triton 3.7.1 to 3.9.0, 2 questions: no longer fits 2. "
        "The largest that no longer fits (32x64x64, 4 warps, 2 stages) goes from 100 to 3,000 "
        "of 1,000 bytes, async copy from off to on."
    )


def test_the_picture_has_an_arrow_for_each_change_of_lds():
    paired = pairs(
        *[row("3.7.1", block_n=n) for n in (64, 128, 256)],
        *[row("3.9.0", lds, block_n=n) for n, lds in ((64, 200), (128, 2000), (256, 100))],
    )
    (axis,) = plots.upgrade(paired).axes
    assert [label.get_text().split("\n")[1] for label in axis.get_yticklabels()] == [
        "16x128x64, 4 warps, 2 stages",
        "16x64x64, 4 warps, 2 stages",
    ]
    assert [text.get_text() for text in axis.texts if text.get_text()] == [
        "no longer fits",
        "more LDS",
    ]


def test_where_no_lds_changed_the_picture_says_so():
    (axis,) = plots.upgrade(pairs(row("3.7.1"), row("3.9.0"))).axes
    assert axis.texts[0].get_text() == "LDS is the same under Triton 3.7.1 and 3.9.0"
