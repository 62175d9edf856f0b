"""Is one launch slower than another? Answers from rounds in which both took turns.

A round is the sample, for repetitions within a round are not independent (Kalibera and Jones,
Rigorous Benchmarking in Reasonable Time, ISMM 2013):
d_r = ln(median of the candidate's repetitions / median of the baseline's) in round r. With mean
d and standard error se of R rounds, L = ln(1 + threshold), and T of Student's distribution with
R - 1 degrees of freedom:

    regressed   P(T > (d - L) / se) small, by Benjamini and Hochberg (1995) over all cells
    improved    P(T < (d + L) / se) likewise
    passed      P(T < (d - L) / se) small: it is not slower by more than the threshold

Small is 0.05 / 3: whoever measures may look after 6, 12 and 24 rounds, and go on with the cells
that are still undecided. Fewer rounds decide nothing.

What that assumes, and what 208 pairs of equal code on one H200 say to it (6 rounds of 5
repetitions; `noise(baselines.read("h200_equal_code"))`):

- Rounds are independent and d_r about normal: the lag-1 autocorrelation of d_r is -0.15, where
  as many independent rounds would give -0.17, for their mean is taken off. A pair's d_r spreads
  by 0.21% (standard deviation, median over pairs), a tenth of pairs by more than 0.52%.
- Medians leave outliers out: the first repetition of a turn is slower by 0.0% in the median, but
  more than 3% off in 9% of turns.
- What drifts meets both sides: they took turns in the same run. Another run's time is off by
  up to 1.9% for the same build (`benchmarks/same_build.py`), which no threshold tells
  apart from a slowdown.
- Nothing shifts one side for a whole run, where its tensors lie in memory, say: no number of
  rounds shows it. Sides that `moelab.ab` can launch in one process share their tensors; others
  have processes of their own in each round, so that such shifts are noise of the rounds. With
  the same two processes in every round, one pair of equal code in 40 differed by 4.8%.
- Cells that share a baseline's rounds depend on each other positively, which leaves the control
  of false discoveries as it is (Benjamini and Yekutieli, Annals of Statistics 29, 2001).
- The events that keep time tick every 0.032 us, so that se is no less than what that rounds off.

`tests/test_paired_rounds.py` simulates 60 suites of 300 cells with drift, outliers, two modes and
autocorrelation, a round's d_r spreading by 1% (moderate) or 2% (noisy). Equal code: none of 18,000
cells is called changed, after 6.0 or 8.5 rounds on average. A slowdown of 5% (moderate) or 7%
(noisy) is found in 100.0% of slow cells, be they a tenth of all or one alone. Intervals hold the
truth in 93 to 96%, whatever it is; just below the threshold in 92%, for there luck decides when
to stop.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import records

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

THRESHOLD = 0.03

# Rounds after which one may look, and the error that each look may make.
LOOKS = (6, 12, 24)
_ERROR = 0.05 / len(LOOKS)

# Of the H200's events, as its samples show.
TICK_US = 0.032

# Of a standard error, so that one can divide by it.
_LEAST = 1e-12

# Columns of what is measured in turns.
_TOGETHER = (
    *itertools.takewhile(lambda name: name != "triton", records.COLUMNS),
    *("gpu", "workload", "run"),
)


def judge(
    differences: np.ndarray, floor: np.ndarray | float = 0.0, threshold: float = THRESHOLD
) -> pd.DataFrame:
    """Judge the speed of cells whose sides took turns.

    Args:
        differences: ``[cells, rounds]``: d_r, NaN where a cell has fewer rounds.
        floor: the least standard error of each cell, in the same logarithms.
        threshold: a fraction of the baseline's time.
    Returns:
        per cell ``rounds``, ``ratio``, ``ratio_low``, ``ratio_high``, ``spread`` and ``answer``.

    >>> import numpy as np
    >>> rounds = np.log(1 + np.array([[5, 6, 5, 6, 5, 6], [0, 1, 0, 1, 0, 1]]) / 100)
    >>> list(judge(rounds)["answer"])
    ['regressed', 'passed']
    """
    import numpy as np

    rounds = (~np.isnan(differences)).sum(axis=1)
    taken = np.where(np.isnan(differences), 0, differences)
    mean = taken.sum(axis=1) / np.maximum(rounds, 1)
    off = np.where(np.isnan(differences), 0, differences - mean[:, None])
    spread = np.sqrt((off**2).sum(axis=1) / np.maximum(rounds - 1, 1))
    error = np.maximum(spread / np.sqrt(np.maximum(rounds, 1)), floor)
    return _answered(mean, error, rounds - 1.0, rounds, threshold).assign(spread=spread)


def judge_paired(
    sides: Sequence[Sequence[np.ndarray]], threshold: float = THRESHOLD
) -> pd.DataFrame:
    """Judge times of rounds in which both sides took turns.

    Args:
        sides: of each cell the baseline's `medians` and the candidate's, round by round; what
            only one has at the end is left out.
    Returns:
        as `judge`.
    """
    import numpy as np

    rounds = [min(map(len, cell)) for cell in sides]
    differences = np.full((len(sides), max(rounds, default=0)), np.nan)
    for cell, (baseline, candidate) in enumerate(sides):
        together = rounds[cell]
        differences[cell, :together] = candidate[:together] - baseline[:together]
    # Two uniform errors of a tick, that no number of rounds takes away.
    least = [min(np.median(side) for side in cell) for cell in sides]
    return judge(differences, TICK_US / math.sqrt(6) / np.exp(least), threshold)


def looks(rounds: int) -> tuple[int, ...]:
    """Tell after how many rounds one may look, if there are to be no more than so many.

    The error is spent on as many looks as `LOOKS` has; where the last one lies doesn't matter.

    Raises:
        ValueError: fewer rounds than decide anything.

    >>> looks(24), looks(8), looks(100)
    ((6, 12, 24), (6, 8), (6, 12, 100))
    """
    if rounds < LOOKS[0]:
        raise ValueError(f"rounds = {rounds}: give {LOOKS[0]} or more, fewer decide nothing")
    return (*(look for look in LOOKS[:-1] if look < rounds), rounds)


def _answered(
    mean: np.ndarray, error: np.ndarray, freedom: np.ndarray, rounds: np.ndarray, threshold: float
) -> pd.DataFrame:
    """Give the answers to differences with their standard errors and degrees of freedom."""
    import numpy as np
    import pandas as pd
    from scipy import stats

    limit = math.log1p(threshold)
    # Equal rounds on a clock that rounds nothing off have no error, and no doubt.
    error = np.maximum(error, _LEAST)
    freedom = np.maximum(freedom, 1)
    enough = rounds >= LOOKS[0]
    slower = np.where(enough, stats.t.sf((mean - limit) / error, freedom), 1.0)
    faster = np.where(enough, stats.t.cdf((mean + limit) / error, freedom), 1.0)
    within = np.where(enough, stats.t.cdf((mean - limit) / error, freedom), 1.0)
    answer = np.full(len(mean), "inconclusive", dtype=object)
    answer[within <= _ERROR] = "passed"
    for name, chance in (("improved", faster), ("regressed", slower)):
        if len(chance):
            answer[stats.false_discovery_control(chance) <= _ERROR] = name
    margin = stats.t.ppf(0.975, freedom) * error
    return pd.DataFrame(
        {
            "rounds": rounds,
            "ratio": np.exp(mean),
            "ratio_low": np.exp(mean - margin),
            "ratio_high": np.exp(mean + margin),
            "answer": answer,
        }
    )


@functools.cache
def _reach(rounds: int, cells: int, power: float) -> float:
    """How many standard errors beyond the threshold an effect must lie to be found."""
    from scipy import optimize, stats

    # The least favourable: no other cell is slow.
    needed = stats.t.isf(_ERROR / cells, rounds - 1)
    return float(
        optimize.brentq(
            lambda beyond: stats.nct.sf(needed, rounds - 1, beyond) - power, 0, 3 * needed + 10
        )
    )


def found(
    rounds: int,
    spread: float,
    *,
    cells: int = 1,
    threshold: float = THRESHOLD,
    power: float = 0.95,
) -> float:
    """Tell the least slowdown that so many rounds find.

    Args:
        spread: standard deviation of d_r.
        cells: of the comparison, of which this is the only slow one.
        power: in which share of comparisons.
    Returns:
        a fraction of the baseline's time.

    >>> round(found(6, 0.0016, cells=300), 3), round(found(24, 0.0016, cells=300), 3)
    (0.041, 0.032)
    """
    beyond = _reach(rounds, cells, power) * spread / math.sqrt(rounds)
    return math.expm1(math.log1p(threshold) + beyond)


def rounds_needed(
    slowdown: float,
    spread: float,
    *,
    cells: int = 1,
    threshold: float = THRESHOLD,
    power: float = 0.95,
    most: int = 1000,
) -> int | None:
    """Tell how many rounds a slowdown needs to be found; None if more than ``most``.

    Args: as of `found`.

    >>> rounds_needed(0.04, 0.0094, cells=300)
    37
    """
    if slowdown <= threshold:
        return None
    rounds = range(LOOKS[0], most + 1)
    low, high = 0, len(rounds)
    while low < high:
        middle = (low + high) // 2
        least = found(rounds[middle], spread, cells=cells, threshold=threshold, power=power)
        if least <= slowdown:
            high = middle
        else:
            low = middle + 1
    return rounds[low] if low < len(rounds) else None


def noise(rows: pd.DataFrame) -> pd.Series:
    """Measure the noise of measured rows: what a threshold has to clear on that device.

    Two neighbours of the same problem and run are a pair; of A/B runs, the two sides of a cell.

    Returns:
        ``pairs``; ``spread`` of a pair's d_r, the median and the 90th percentile over pairs;
        its lag-1 ``autocorrelation``, and what independent rounds would give; how far the
        ``first repetition`` of a turn lies from the turn's median, and the share of turns
        where that is more than 3%; the least step between two samples, ``tick_us``.
    Raises:
        ValueError: no two rows of one problem have samples.
    """
    import numpy as np
    import pandas as pd

    timed = rows[rows["samples_us"].notna()]
    samples = {index: json.loads(text) for index, text in timed["samples_us"].items()}
    middle = {index: medians(text) for index, text in timed["samples_us"].items()}
    together = timed.groupby([*_TOGETHER], sort=False, dropna=False)
    sides = timed["side"].fillna("").to_dict()
    pairs = []
    for _, of_problem in together:
        for first, second in itertools.pairwise(of_problem.index):
            if (sides[first], sides[second]) in (("", ""), ("base", "candidate")):
                rounds = min(len(middle[first]), len(middle[second]))
                pairs.append(middle[second][:rounds] - middle[first][:rounds])
    if not pairs:
        raise ValueError("no two rows of one problem and run have samples")
    off = [pair - pair.mean() for pair in pairs]
    spread = np.array([np.std(pair, ddof=1) for pair in pairs])
    # Each pair counts alike, however noisy it is.
    alike = [each / by for each, by in zip(off, spread, strict=True) if by > 0]
    first_off = np.concatenate(
        [[math.log(turn[0]) - np.median(np.log(turn)) for turn in of] for of in samples.values()]
    )
    every = np.unique(np.concatenate([np.concatenate(of) for of in samples.values()]))
    return pd.Series(
        {
            "pairs": len(pairs),
            "spread": np.median(spread),
            "spread, 90th percentile": np.quantile(spread, 0.9),
            "autocorrelation": sum((of[1:] * of[:-1]).sum() for of in alike)
            / sum((of**2).sum() for of in alike),
            "autocorrelation if independent": -1 / np.mean([len(pair) for pair in pairs]),
            "first repetition": np.median(first_off),
            "first repetition, share beyond 3%": (np.abs(first_off) > 0.03).mean(),
            "tick_us": np.diff(every).min(),
        }
    )


def medians(samples_us: str) -> np.ndarray:
    """Give the logarithms of rounds' medians.

    Args:
        samples_us: as rows have it.
    """
    import numpy as np

    return np.log([np.median(of_round) for of_round in json.loads(samples_us)])


def judge_apart(
    sides: Sequence[Sequence[np.ndarray]], threshold: float = THRESHOLD
) -> pd.DataFrame:
    """Judge times that were measured apart, by Welch's test of rounds' medians.

    It knows nothing of what shifted a whole run: of two runs of equal code it calls many changed.

    Args:
        sides: of each cell the baseline's `medians` and the candidate's.
    Returns:
        as `judge`, without ``spread``.
    """
    import numpy as np

    counts = np.array([[len(side) for side in cell] for cell in sides])
    means = np.array([[side.mean() for side in cell] for cell in sides])
    squares = np.array([[side.var(ddof=1) / len(side) for side in cell] for cell in sides])
    squares = np.maximum(squares, _LEAST**2)
    freedom = squares.sum(axis=1) ** 2 / (squares**2 / (counts - 1)).sum(axis=1)
    error = np.sqrt(squares.sum(axis=1))
    return _answered(means[:, 1] - means[:, 0], error, freedom, counts.min(axis=1), threshold)


def to_decide(ratio: float, spread: float, cells: int, threshold: float = THRESHOLD) -> int | None:
    """Tell how many rounds would decide an inconclusive cell, if what was seen is the truth.

    Args:
        ratio: of the times, as seen.
        spread, cells, threshold: as of `found`.
    """
    seen, limit = math.log(ratio), math.log1p(threshold)
    if seen > limit:
        return rounds_needed(ratio - 1, spread, cells=cells, threshold=threshold)
    # As far below the limit as a slowdown would be above it; other cells don't matter to it.
    return rounds_needed(math.expm1(2 * limit - seen), spread, threshold=threshold)
