"""Equal code is never called changed, true slowdowns are found, and intervals hold the truth."""

import json

import numpy as np
import pytest
import suites

from moelab import ab, baselines, paired_rounds, regress
from moelab.paired_rounds import LOOKS, found, judge, looks, rounds_needed

CELLS = 300
SUITES = [6, pytest.param(60, marks=pytest.mark.slow)]
# Each preset with a slowdown that it must find.
PRESETS = [(suites.MODERATE, 0.05), (suites.NOISY, 0.07)]
presets = pytest.mark.parametrize(("noise", "slowdown"), PRESETS, ids=["moderate, 5%", "noisy, 7%"])


def simulated(noise, slowdown, number):
    """Judge seeded suites of cells with their true slowdowns."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        yield suites.judged(noise.differences(rng, slowdown))


def slow_every(cells, slowdown):
    """A suite of which each so many-th cell is slow."""
    return np.where(np.arange(CELLS) % cells == 0, slowdown, 0.0)


def share(of):
    return float(np.mean(of))


@pytest.mark.parametrize("number", SUITES)
@presets
def test_no_suite_of_equal_code_has_a_cell_called_changed(noise, slowdown, number):
    truth = np.zeros(CELLS)
    changed, covered, rounds, inconclusive = 0, [], [], 0
    for cells in simulated(noise, truth, number):
        changed += cells["answer"].isin(["regressed", "improved"]).sum()
        inconclusive += (cells["answer"] == "inconclusive").sum()
        covered.append(suites.covered(cells, truth))
        rounds.append(cells["rounds"].mean())
    print(
        f"\n{number} suites of equal code: {changed} of {number * CELLS} cells changed, "
        f"{inconclusive} inconclusive, intervals hold the truth in {share(covered):.1%}, "
        f"{share(rounds):.1f} rounds on average"
    )
    assert changed == 0
    assert 0.93 <= share(covered) <= 0.97
    assert share(rounds) < LOOKS[1]


@pytest.mark.parametrize("number", SUITES)
@pytest.mark.parametrize("every", [10, CELLS], ids=["a tenth is slow", "one cell is slow"])
@presets
def test_a_true_slowdown_is_found_and_no_other_cell_is(noise, slowdown, every, number):
    truth = slow_every(every, slowdown)
    slow = truth > 0
    hit, covered, others = [], [], 0
    for cells in simulated(noise, truth, number):
        hit.append((cells["answer"] == "regressed")[slow])
        covered.append(suites.covered(cells, truth))
        others += cells["answer"][~slow].isin(["regressed", "improved"]).sum()
    print(
        f"\n{number} suites, {slow.sum()} of {CELLS} cells slower by {slowdown:.0%}: found "
        f"{share(hit):.1%}, {others} others called changed, intervals hold the truth in "
        f"{share(covered):.1%}"
    )
    assert share(hit) >= 0.95
    assert others == 0
    assert 0.93 <= share(covered) <= 0.97


@pytest.mark.slow
@presets
def test_intervals_hold_the_truth_whatever_it_is(noise, slowdown):
    held = {}
    for true in (-0.05, 0.02, 0.025, 0.03, 0.04, slowdown, 0.1):
        truth = slow_every(10, true)
        slow = truth != 0
        held[true] = share(
            [suites.covered(cells, truth)[slow] for cells in simulated(noise, truth, 60)]
        )
    print("\nintervals hold", ", ".join(f"{true:+.1%} in {of:.1%}" for true, of in held.items()))
    assert 0.93 <= share(list(held.values())) <= 0.97
    # Whoever stops at what was seen stops at luck too, just below the threshold the most.
    assert min(held.values()) > 0.92


@presets
def test_an_improvement_is_found_as_a_slowdown_is(noise, slowdown):
    truth = slow_every(10, 1 / (1 + slowdown) - 1)
    # In all rounds: whoever looks for regressions stops at what has passed.
    cells = judge(noise.differences(np.random.default_rng(0), truth))
    assert share((cells["answer"] == "improved")[truth < 0]) >= 0.95
    assert "regressed" not in set(cells["answer"])


def test_a_slowdown_below_the_threshold_is_not_called_one():
    (cells,) = simulated(suites.MODERATE, np.full(CELLS, 0.015), 1)
    assert set(cells["answer"]) <= {"passed", "inconclusive"}


@pytest.mark.parametrize(
    ("noise", "of_h200"),
    [(suites.MODERATE, "spread"), (suites.NOISY, "spread, 90th percentile")],
    ids=["moderate", "noisy"],
)
def test_the_simulated_noise_is_more_than_an_h200_has(noise, of_h200):
    spread = noise.differences(np.random.default_rng(0), np.zeros(CELLS)).std(axis=1, ddof=1)
    assert np.median(spread) > paired_rounds.noise(baselines.read("h200_equal_code"))[of_h200]


def test_rounds_of_an_h200_are_independent():
    h200 = paired_rounds.noise(baselines.read("h200_equal_code"))
    far = h200["autocorrelation"] - h200["autocorrelation if independent"]
    # A pair of 6 rounds has 5 neighbours, and each product of two a variance of 1.
    assert abs(far) < 3 / np.sqrt(5 * h200["pairs"])


def test_the_docstring_has_the_noise_of_the_shipped_rows():
    h200 = paired_rounds.noise(baselines.read("h200_equal_code"))
    said = " ".join(paired_rounds.__doc__.split())
    assert f"of d_r is {h200['autocorrelation']:.2f}" in said
    assert f"would give {h200['autocorrelation if independent']:.2f}" in said
    assert f"spreads by {h200['spread']:.2%}" in said
    assert f"more than {h200['spread, 90th percentile']:.2%}" in said
    assert f"slower by {h200['first repetition']:.1%} in the median" in said
    assert f"in {h200['first repetition, share beyond 3%']:.0%} of turns" in said
    # Samples are kept to the hundredth of a microsecond.
    assert abs(paired_rounds.TICK_US - h200["tick_us"]) < 0.005


def test_no_measured_pair_of_equal_code_is_called_changed():
    cells = ab.judged(baselines.read("h200_equal_code")).cells
    paired = cells[cells["how"] == regress.PAIRED]
    assert len(paired) >= 200
    assert set(paired["speed"]) == {"passed"}


def test_too_few_rounds_decide_nothing():
    slow = np.full((1, LOOKS[0] - 1), 0.5) + np.arange(LOOKS[0] - 1) * 1e-4
    assert list(judge(slow)["answer"]) == ["inconclusive"]


def test_equal_rounds_leave_no_doubt_but_the_clocks():
    alike = np.full((1, 6), np.log(1.05))
    assert list(judge(alike)["answer"]) == ["regressed"]
    assert list(judge(alike, floor=0.05)["answer"]) == ["inconclusive"]


def test_one_slow_cell_among_many_needs_more_evidence_than_one_alone():
    rounds = np.log(1.05) + 0.01 * np.array([[-1, 1, -0.5, 0.5, -1, 1]])
    quiet = np.tile(0.001 * np.array([-1, 1, -1, 1, -1, 1.0]), (300, 1))
    assert judge(rounds)["answer"][0] == "regressed"
    assert judge(np.vstack([rounds, quiet]))["answer"][0] == "inconclusive"


def test_what_was_decided_stays_decided_while_others_go_on():
    rng = np.random.default_rng(1)
    differences = suites.NOISY.differences(rng, slow_every(4, 0.07))
    first = judge(differences[:, :6])
    rounds = np.where(first["answer"] == "inconclusive", 12, 6)
    later = judge(np.where(np.arange(24) < rounds[:, None], differences, np.nan))
    decided = first["answer"] != "inconclusive"
    assert 0 < decided.sum() < len(decided)
    assert list(later["answer"][decided]) == list(first["answer"][decided])


def test_the_rounds_told_for_a_slowdown_do_find_it():
    spread, slowdown = 0.0094, 0.04
    rounds = rounds_needed(slowdown, spread, cells=CELLS)
    assert found(rounds, spread, cells=CELLS) <= slowdown < found(rounds - 1, spread, cells=CELLS)
    hits = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        differences = rng.normal(0, spread, (CELLS, rounds))
        differences[0] += np.log1p(slowdown)
        hits.append(judge(differences)["answer"][0] == "regressed")
    # 200 draws of 95%: 3 standard errors are 4.6%.
    assert share(hits) > 0.90


def test_smaller_slowdowns_need_more_rounds_and_none_shows_less_than_the_threshold():
    needed = [rounds_needed(slowdown, 0.01) for slowdown in (0.1, 0.05, 0.04, 0.035)]
    assert needed == sorted(needed)
    assert needed[0] < needed[-1]
    assert rounds_needed(0.03, 0.01) is None
    assert rounds_needed(0.0301, 0.05) is None


def test_noise_needs_two_rows_that_took_turns():
    rows = baselines.read("h200_equal_code").dropna(subset=["samples_us"]).head(1)
    with pytest.raises(ValueError, match="no two rows of one problem and run"):
        paired_rounds.noise(rows)


def test_of_ab_runs_the_two_sides_of_a_cell_are_a_pair():
    rows = baselines.read("h200_equal_code").dropna(subset=["samples_us"]).head(4)
    one = rows.iloc[[0, 0, 0, 0]].reset_index(drop=True)
    turns = [[[100.0], [by]] for by in (100.0, 110.0, 300.0, 330.0)]
    samples = [json.dumps(of) for of in turns]
    ab = one.assign(side=["base", "candidate"] * 2, samples_us=samples)
    assert paired_rounds.noise(ab)["pairs"] == 2
    assert paired_rounds.noise(ab.assign(side=None))["pairs"] == 3


def test_whoever_looks_at_most_three_times_may_choose_when_the_last_is():
    for rounds in (6, 8, 12, 24, 48):
        assert looks(rounds)[-1] == rounds
        assert len(looks(rounds)) <= len(LOOKS)
    assert looks(LOOKS[-1]) == LOOKS
    with pytest.raises(ValueError, match="rounds = 5: give 6 or more"):
        looks(5)
