"""Did it regress? Two sets of rows cell by cell: what fits, what it takes, how fast it is.

Frames in, verdicts out; no compiler, no GPU. A verdict says no more than the rows can know:
where noise hides the answer it is `inconclusive`, and a time against another run's is advice.

How speed is judged. A round is the sample, for repetitions within a round are not independent:
d_r = ln(median of the candidate's repetitions / median of the baseline's) in round r. With mean
d and standard error se of R rounds, L = ln(1 + threshold), and T of Student's distribution with
R - 1 degrees of freedom:

    regressed   P(T > (d - L) / se) small, by Benjamini and Hochberg over all cells
    improved    P(T < (d + L) / se) likewise
    passed      P(T < (d - L) / se) small: it is not slower by more than the threshold

Small is 0.05 / 3: whoever measures may look after 6, 12 and 24 rounds, and go on with the cells
that are still undecided. Fewer rounds decide nothing.

What that assumes, and what a sweep of one H200 says to it (849 configurations, 6 rounds of 5
repetitions, `noise(records.read(trade.SHIPPED))`; two neighbours of a problem are a pair):

- Rounds are independent and d_r about normal: the lag-1 autocorrelation of d_r is -0.15, where
  6 independent rounds would give -0.17, for their mean is taken off. A pair's d_r spreads by
  0.16% (standard deviation, median over pairs), a tenth of pairs by more than 0.49%.
- Medians leave outliers out: the first repetition of a turn is slower by 1.3% in the median,
  and more than 3% off in 29% of turns.
- What drifts meets both sides: they took turns in the same run. Another run's time is off by
  up to 1.9% for the same build (`benchmarks/same_build.py`), more than many thresholds.
- Nothing shifts one side for a whole run, where its tensors lie in memory, say: no number of
  rounds shows it. Only another run does.
- Cells that share a baseline's rounds depend on each other positively, which leaves the control
  of false discoveries as it is (Benjamini and Yekutieli, Annals of Statistics 29, 2001).
- The events that keep time tick every 0.032 us, so that se is no less than what that rounds off.

`tests/test_regress.py` simulates it, with drift, outliers, two modes and autocorrelation.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import records, tables, trade

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

THRESHOLD = 0.03

# Rounds after which one may look, and the error that each look may make.
LOOKS = (6, 12, 24)
_ERROR = 0.05 / len(LOOKS)

# Of the H200's events, as its samples show.
_TICK_US = 0.032

# The gravest first. `changed` is neither better nor worse.
ANSWERS = ("regressed", "inconclusive", "improved", "changed", "passed")

EXIT_CODES = {"passed": 0, "regressed": 1, "inconclusive": 3}

KINDS = ("fits", "resources", "speed")

# How times were set beside each other.
PAIRED = "paired"
ADVISORY = "another run, advisory"
SINGLE = "one figure each, no confidence"

# What a cell is, whoever asks.
_PROBLEM = tuple(itertools.takewhile(lambda name: name != "triton", records.COLUMNS))
_CELL = (*_PROBLEM, "peer", "includes")

# What may tell the rows of a cell apart, or be what is compared.
_SETTINGS = (
    *("block_m", "block_n", "block_k", "split_k"),
    *("group_m", "tma", "tails", "persistent", "specialized"),
    *("num_warps", "async_copy", "num_stages", "triton", "gpu", "workload"),
)

_PROVENANCE = ("run", "moelab")

# Only a launch or a full compile tells these: another mode's `ok` does not deny them.
_TOLD_BY_LDS = ("ok", "out_of_lds", "out_of_tmem")
_TRANSIENT = ("timeout", "out_of_memory", "unavailable")

# What more of is worse, and what less of is; the rest is only told.
_WORSE_MORE = ("spilled_registers", "scratch_bytes")
_WORSE_LESS = ("workgroups_per_cu", "warps_per_simd")
RESOURCES = ("lds_bytes", "registers", *_WORSE_MORE, *_WORSE_LESS)

_LISTED = 30


@dataclass(frozen=True)
class Comparison:
    """What became of every cell.

    Args:
        cells: one row per cell that both sides have, the gravest first: what tells it apart;
            an answer for each of `KINDS`, missing where there was nothing to compare; of
            speed: ``ratio`` of the times, candidate over baseline, with its 95% interval
            ``ratio_low`` to ``ratio_high``, ``rounds``, ``spread`` (standard deviation of d_r),
            ``how`` the times were set beside each other, ``rounds_needed`` by what is
            inconclusive; ``what`` changed in words; and ``verdict``.
        only_baseline, only_candidate: rows of cells that the other side lacks.
        matched_by: the columns that told cells apart.
        differs: what else differs between the sides, ``{column: (baseline's, candidate's)}``.
        threshold: of speed, a fraction.
    """

    cells: pd.DataFrame
    only_baseline: pd.DataFrame
    only_candidate: pd.DataFrame
    matched_by: tuple[str, ...]
    differs: dict[str, tuple[str, str]]
    threshold: float

    @property
    def verdict(self) -> str:
        """One of `EXIT_CODES`."""
        found = set(self.cells["verdict"])
        return next((grave for grave in ANSWERS[:2] if grave in found), "passed")

    @property
    def exit_code(self) -> int:
        """What a CI job is told: 0 no regression, 1 regression, 3 inconclusive."""
        return EXIT_CODES[self.verdict]


# Speed.


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


def _answered(
    mean: np.ndarray, error: np.ndarray, freedom: np.ndarray, rounds: np.ndarray, threshold: float
) -> pd.DataFrame:
    """Give the answers to differences with their standard errors and degrees of freedom."""
    import numpy as np
    import pandas as pd
    from scipy import stats

    limit = math.log1p(threshold)
    # Equal rounds on a clock that rounds nothing off have no error, and no doubt.
    error = np.maximum(error, np.finfo(float).tiny)
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
    (0.043, 0.032)
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
    40
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

    Two neighbours of the same problem and run are a pair.

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
    samples = {index: _rounds(text) for index, text in timed["samples_us"].items()}
    medians = {index: _medians(of) for index, of in samples.items()}
    together = timed.groupby([*_CELL, "gpu", "workload", "run"], sort=False, dropna=False)
    pairs = [
        medians[second] - medians[first]
        for _, of_problem in together
        for first, second in itertools.pairwise(of_problem.index)
    ]
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


def _rounds(text: str) -> list[list[float]]:
    return json.loads(text)


def _medians(rounds: Sequence[Sequence[float]]) -> np.ndarray:
    """Give the logarithms of rounds' medians."""
    import numpy as np

    return np.log([np.median(of_round) for of_round in rounds])


# Cells.


def compare(
    baseline: pd.DataFrame, candidate: pd.DataFrame, threshold: float = THRESHOLD
) -> Comparison:
    """Set every cell of a candidate beside the baseline's.

    A cell is a kernel, its problem and target. Where a side has several rows of one, tile, ways,
    warps, async copy, stages, Triton, GPU and routing tell them apart, in this order and as
    far as is needed: what tells no two rows of a side apart is what may be compared.

    Args:
        baseline, candidate: rows as `records.read` or `read` gives them.
        threshold: of speed, a fraction of the baseline's time.
    Raises:
        ValueError: the threshold is not between 0 and 1, or no cell is in both; the message
            shows the nearest of each.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold:g}: give a fraction between 0 and 1, such as 0.03")
    sides = [
        _one_each(side, set(other["run"].dropna()))
        for side, other in ((baseline, candidate), (candidate, baseline))
    ]
    by = list(_CELL)
    for name in _SETTINGS:
        if any(side.duplicated(by).any() and _tells_apart(side, by, name) for side in sides):
            by.append(name)
    paired = sides[0].merge(
        sides[1], on=by, how="outer", suffixes=(" b", " c"), indicator="side", sort=False
    )
    both = paired[paired["side"] == "both"].drop(columns="side").reset_index(drop=True)
    only_baseline, only_candidate = (
        tables.labelled(side.merge(paired.loc[paired["side"] == where, by], on=by, sort=False))
        for side, where in zip(sides, ("left_only", "right_only"), strict=True)
    )
    if both.empty:
        raise ValueError(
            "no cell is in both: the baseline has "
            f"{_sample(only_baseline)}, the candidate {_sample(only_candidate)}"
        )
    cells = tables.labelled(_of_baseline(both, by))[[*by, "tile"]]
    cells = cells.join(_speeds(both, threshold))
    rows, timed = both.to_dict("records"), cells.to_dict("records")
    cells = cells.assign(**_told_of_each(rows, timed))
    cells = cells.sort_values(
        ["verdict", "ratio"],
        key=lambda c: c.map(ANSWERS.index) if c.name == "verdict" else -c.astype(float),
        kind="stable",
        ignore_index=True,
    )
    return Comparison(
        cells, only_baseline, only_candidate, tuple(by), _differs(both, by), threshold
    )


def _told_of_each(
    rows: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Give each cell its answers but that of speed, its verdict, and what changed in words."""
    told: dict[str, list[Any]] = {name: [] for name in ("fits", "resources", "what", "verdict")}
    for row, time in zip(rows, timed, strict=True):
        fit, *texts = _fit(row)
        resources: str | None = None
        if fit not in ("regressed", "inconclusive"):
            decided = time["how"] == PAIRED and time["speed"] != "inconclusive"
            resources, *more = _resources(row, decided)
            texts += more
        texts += _in_words(time)
        answers = (fit, resources, time["speed"])
        told["fits"].append(fit)
        told["resources"].append(resources)
        told["what"].append("; ".join(texts))
        told["verdict"].append(next((a for a in ANSWERS if a in answers), "passed"))
    return told


def _of_baseline(both: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Take the baseline's settings where both sides' stand beside each other."""
    names = [name for name in (*_CELL, *_SETTINGS)]
    return both[[name if name in by else f"{name} b" for name in names]].set_axis(names, axis=1)


def _tells_apart(side: pd.DataFrame, by: Sequence[str], name: str) -> bool:
    """Say whether a column differs within a cell."""
    return len(side[[*by, name]].drop_duplicates()) > len(side[[*by]].drop_duplicates())


def _sample(rows: pd.DataFrame) -> str:
    """Name what there is, for somebody who expected something else."""
    if rows.empty:
        return "nothing"
    first = rows.iloc[0]
    names = ["kernel", "model", "layer", "tp", "m", "target", "tile", "num_warps", "num_stages"]
    return f"{len(rows)}, such as " + ", ".join(
        f"{name} {first[name]}" for name in names if first[name] == first[name] is not None
    )


def _one_each(side: pd.DataFrame, runs_of_other: set[str]) -> pd.DataFrame:
    """Keep one row of each question.

    Of source that changed the last; of several runs one that the other side shares, else the
    last; of modes the one that tells most.
    """
    import pandas as pd

    own = ("mode", "gpu", "workload", "run", "compile_key")
    question = [name for name in records.KEY if name not in own]
    last = side.drop_duplicates(question, keep="last")[[*question, "compile_key"]]
    side = side.merge(last, on=[*question, "compile_key"], sort=False)
    order = side.assign(
        _mode=side["mode"].map(list(records.MODES).index),
        _shared=side["run"].isin(runs_of_other),
    ).sort_values(["_mode", "_shared", "run"], kind="stable", na_position="first")
    measured = order["gpu"].notna()
    kept = pd.concat(
        [
            order[measured].drop_duplicates([*question, "gpu", "workload"], keep="last"),
            order[~measured].drop_duplicates(question, keep="last"),
        ]
    )
    # What was measured says all that another mode would.
    kept = kept[kept["gpu"].notna() | ~kept.duplicated(question, keep=False)]
    return kept[list(records.COLUMNS)].sort_index(ignore_index=True)


def _fit(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what became of a cell's fit, and in words if it changed."""
    was, now = row["status b"], row["status c"]
    if was == now:
        return ("passed" if was not in records.UNANSWERED else "inconclusive",)
    said = f"{was} -> {now}"
    shallow, deep = sorted((row["mode b"], row["mode c"]), key=list(records.MODES).index)
    if {was, now} & {*_TRANSIENT} or was == "crashed":
        return "inconclusive", f"{said}: says nothing of the configuration, ask again"
    if shallow not in ("map", deep) and not {was, now} <= {*_TOLD_BY_LDS}:
        return "inconclusive", f"{said}, but one side was asked for {shallow}, the other {deep}"
    if "ok" not in (was, now):
        return "changed", said
    lds = [row[f"lds_bytes {side}"] for side in "bc"]
    if "out_of_lds" in (was, now) and not any(_missing(b) for b in lds):
        said += f" ({lds[0]:,} -> {lds[1]:,} of {row['lds_limit c']:,} bytes)"
    return ("improved" if now == "ok" else "regressed"), said


def _resources(row: Mapping[str, Any], decided: bool) -> tuple[str, ...]:
    """Say what a cell takes more or less of, and in words.

    Args:
        decided: its speed was judged, which says what they cost.
    """
    answers, texts = {"passed"}, []
    for name in RESOURCES:
        was, now = row[f"{name} b"], row[f"{name} c"]
        if _missing(was) or _missing(now) or was == now:
            continue
        texts.append(f"{name} {was:,} -> {now:,}")
        if decided or name not in (*_WORSE_MORE, *_WORSE_LESS):
            answers.add("changed")
        else:
            worse = now > was if name in _WORSE_MORE else now < was
            answers.add("regressed" if worse else "improved")
    return next(answer for answer in ANSWERS if answer in answers), *texts


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def _in_words(time: Mapping[str, Any]) -> list[str]:
    """Say how the times compare."""
    if time["how"] is None:
        return []
    if _missing(time["ratio_low"]):
        return [f"time x{time['ratio']:.3f} ({time['how']})"]
    between = f"{time['ratio_low']:.3f} to {time['ratio_high']:.3f}"
    said = f"time x{time['ratio']:.3f} ({between}, {time['rounds']} rounds, {time['how']})"
    if time["how"] != PAIRED or time["speed"] != "inconclusive":
        return [said]
    needed = time["rounds_needed"]
    rounds = "more than 1000" if needed is None else f"about {needed}"
    return [f"{said}; {rounds} rounds would decide it if it goes on so"]


_SPEED = ("how", "ratio", "ratio_low", "ratio_high", "rounds", "spread", "rounds_needed", "speed")


def _speeds(both: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Judge the times of every cell; missing where a side has none or routings differ.

    Cells whose sides took turns and those that did not are families of their own.
    """
    import numpy as np
    import pandas as pd

    told: dict[int, dict[str, Any]] = {}
    paired: list[tuple[int, np.ndarray, float]] = []
    apart: list[tuple[int, np.ndarray, np.ndarray]] = []
    for at, row in enumerate(both.to_dict("records")):
        times = [row[f"time_us {side}"] for side in "bc"]
        if any(map(_missing, times)) or _one(row, "workload", "b") != _one(row, "workload", "c"):
            continue
        samples = [row[f"samples_us {side}"] for side in "bc"]
        if any(map(_missing, samples)):
            told[at] = {"how": SINGLE, "ratio": times[1] / times[0], "speed": "inconclusive"}
            continue
        medians = [_medians(_rounds(text)) for text in samples]
        if not _missing(row["run b"]) and row["run b"] == row["run c"]:
            rounds = min(map(len, medians))
            # Two uniform errors of a tick, that no number of rounds takes away.
            floor = _TICK_US / math.sqrt(6) / min(times)
            paired.append((at, medians[1][:rounds] - medians[0][:rounds], floor))
        else:
            apart.append((at, medians[0], medians[1]))
    if paired:
        matrix = np.full((len(paired), max(len(d) for _, d, _ in paired)), np.nan)
        for place, (_, differences, _) in enumerate(paired):
            matrix[place, : len(differences)] = differences
        judged = judge(matrix, np.array([floor for *_, floor in paired]), threshold)
        for (at, *_), cell in zip(paired, judged.to_dict("records"), strict=True):
            answer = cell.pop("answer")
            cell |= {"how": PAIRED, "speed": answer}
            if answer == "inconclusive":
                cell["rounds_needed"] = _to_decide(cell, len(paired), threshold)
            told[at] = cell
    if apart:
        for (at, *_), cell in zip(
            apart, _welch([sides for _, *sides in apart], threshold).to_dict("records"), strict=True
        ):
            # Another run's shift may make a regression, or hide none.
            answer = cell.pop("answer")
            speed = {"regressed": "inconclusive", "improved": "changed"}.get(answer, answer)
            told[at] = cell | {"how": ADVISORY, "speed": speed}
    frame = pd.DataFrame([told.get(at, {}) for at in range(len(both))], columns=[*_SPEED])
    return frame.astype(object).where(frame.notna(), None)


def _one(row: Mapping[str, Any], name: str, side: str) -> Any:
    """Take a side's value of a column that may have told cells apart."""
    value = row[name] if name in row else row[f"{name} {side}"]
    return None if _missing(value) else value


def _welch(sides: Sequence[Sequence[np.ndarray]], threshold: float) -> pd.DataFrame:
    """Judge times that were measured apart, by Welch's test of rounds' medians."""
    import numpy as np

    counts = np.array([[len(side) for side in cell] for cell in sides])
    means = np.array([[side.mean() for side in cell] for cell in sides])
    squares = np.array([[side.var(ddof=1) / len(side) for side in cell] for cell in sides])
    squares = np.maximum(squares, np.finfo(float).tiny)
    freedom = squares.sum(axis=1) ** 2 / (squares**2 / (counts - 1)).sum(axis=1)
    error = np.sqrt(squares.sum(axis=1))
    return _answered(means[:, 1] - means[:, 0], error, freedom, counts.min(axis=1), threshold)


def _to_decide(cell: Mapping[str, Any], cells: int, threshold: float) -> int | None:
    """Tell how many rounds would decide an inconclusive cell, if what was seen is the truth."""
    seen, limit = math.log(cell["ratio"]), math.log1p(threshold)
    if seen > limit:
        return rounds_needed(cell["ratio"] - 1, cell["spread"], cells=cells, threshold=threshold)
    # As far below the limit as a slowdown would be above it, and no other cell matters.
    return rounds_needed(math.expm1(2 * limit - seen), cell["spread"], cells=1, threshold=threshold)


def _differs(both: pd.DataFrame, by: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Tell what differs between the sides, of settings and of what made the rows."""
    values: dict[str, list[set[str]]] = {}
    for name in (*_SETTINGS, *_PROVENANCE):
        if name not in by:
            values[name] = [set(both[f"{name} {s}"].dropna().astype(str)) for s in "bc"]
    for side, suffix in enumerate("bc"):
        for text in both[f"made_by {suffix}"].dropna().unique():
            for name, value in json.loads(text).items():
                if name != "date":
                    found = values.setdefault(f"made by: {name}", [set(), set()])
                    found[side].add(str(value))
    return {
        name: (_listed(sides[0]), _listed(sides[1]))
        for name, sides in values.items()
        if sides[0] != sides[1]
    }


def _listed(values: Iterable[str], most: int = 5) -> str:
    ordered = sorted(values, key=lambda text: (len(text), text))
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more


# What is said of a comparison.


def counts(comparison: Comparison) -> dict[str, int]:
    """Count the cells by verdict, the gravest first."""
    found = comparison.cells["verdict"].value_counts()
    return {answer: int(found[answer]) for answer in ANSWERS if answer in found}


def overall(comparison: Comparison) -> tuple[float, float, float] | None:
    """Give the geometric mean of paired cells' times over the baseline's, with its 95% interval.

    The interval is of these cells as they were measured, not of others like them. None where
    no times were paired.
    """
    import numpy as np

    paired = comparison.cells[comparison.cells["how"] == PAIRED]
    if paired.empty:
        return None
    mean = np.log(paired["ratio"].astype(float)).mean()
    errors = paired["spread"].astype(float) / np.sqrt(paired["rounds"].astype(float))
    margin = 1.96 * math.sqrt((errors**2).sum()) / len(paired)
    return math.exp(mean), math.exp(mean - margin), math.exp(mean + margin)


def sentences(comparison: Comparison) -> list[str]:
    """Sum a comparison up: cells, speed, what these rounds can find, what else differs."""
    cells = comparison.cells
    counted = ", ".join(f"{number} {answer}" for answer, number in counts(comparison).items())
    said = [
        f"{len(cells)} cells in both: {counted}. Only the baseline has "
        f"{len(comparison.only_baseline)}, only the candidate {len(comparison.only_candidate)}."
    ]
    said += _of_speed(comparison)
    if comparison.differs:
        what = "; ".join(
            f"{_inert(name)} ({_inert(was)} | {_inert(now)})"
            for name, (was, now) in comparison.differs.items()
        )
        said.append(f"The sides differ in {what}.")
    else:
        said.append("The sides differ in nothing that rows tell.")
    return said


def _of_speed(comparison: Comparison) -> Iterator[str]:
    cells = comparison.cells
    limit = f"{100 * comparison.threshold:g}%"
    if total := overall(comparison):
        paired = cells[cells["how"] == PAIRED]
        mean, low, high = total
        yield (
            f"Speed, {len(paired)} cells that took turns in one run, threshold {limit}: "
            f"{(paired['speed'] == 'regressed').sum()} slower, "
            f"{(paired['speed'] == 'improved').sum()} faster, "
            f"{(paired['speed'] == 'inconclusive').sum()} inconclusive; time over all "
            f"x{mean:.4f} ({low:.4f} to {high:.4f}, geometric mean)."
        )
        yield _of_power(paired, comparison.threshold)
    for how, advice in (
        (ADVISORY, "measure both in one run for a verdict"),
        (SINGLE, "a difference is a difference, no more"),
    ):
        if number := (cells["how"] == how).sum():
            yield f"Speed, {number} cells: {how}; {advice}."


def _of_power(paired: pd.DataFrame, threshold: float) -> str:
    """Say what so many rounds find, and how many a smaller slowdown would need."""
    rounds, spread = int(paired["rounds"].median()), float(paired["spread"].median())
    if rounds < LOOKS[0]:
        return f"Fewer than {LOOKS[0]} rounds decide nothing: measure with more."
    cells = len(paired)
    least = found(rounds, spread, cells=cells, threshold=threshold)
    half = threshold + (least - threshold) / 2
    needed = rounds_needed(half, spread, cells=cells, threshold=threshold)
    more = f"one of {100 * half:.1f}% needs {needed or 'more than 1000'} rounds"
    return (
        f"The median cell (rounds spread by {100 * spread:.2f}%) finds a slowdown of "
        f"{100 * least:.1f}% in 95 of 100 comparisons by its {rounds} rounds; {more}. Less than "
        f"the threshold is never called slower: give a smaller --threshold."
    )


def table(comparison: Comparison) -> pd.DataFrame:
    """List the cells that did not simply pass, the gravest first.

    Returns:
        ``verdict``; what tells the cells apart, as far as it varies, and ``kernel``; ``what``.
    """
    cells = comparison.cells
    moved = cells[cells["verdict"] != "passed"]
    return moved[["verdict", *_telling(cells), "what"]].reset_index(drop=True)


_NAMES = (
    *("kernel", "model", "target", "layer", "tp", "m", "x_format", "y_format", "scale_layout"),
    *("fast_accum", "args", "peer", "includes", "tile", "num_warps", "async_copy", "num_stages"),
    *("triton", "gpu", "workload"),
)


def _telling(rows: pd.DataFrame) -> list[str]:
    """Name the columns that tell cells apart to a reader."""
    there = [name for name in _NAMES if name in rows and rows[name].notna().any()]
    return [name for name in there if name == "kernel" or rows[name].nunique(dropna=False) > 1]


def text(comparison: Comparison) -> str:
    """Tell a comparison on a terminal or in a CI job's log."""
    lines = [f"{comparison.verdict}", *sentences(comparison)]
    moved = table(comparison)
    if len(moved):
        shown = moved.head(_LISTED).map(_inert)
        lines += ["", shown.to_string(index=False)]
        if len(moved) > _LISTED:
            lines.append(f"and {len(moved) - _LISTED} more; --json has every cell")
    for title, rows in _one_sided(comparison):
        lines += ["", title, rows.head(_LISTED).map(_inert).to_string(index=False)]
        if len(rows) > _LISTED:
            lines.append(f"and {len(rows) - _LISTED} more")
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """Tell a comparison in GitHub's Markdown, as for a job's summary.

    Whatever comes from rows stands in code spans: it makes no link, mention, tag or cell.
    """
    lines = [f"## moelab compare: {comparison.verdict}", ""]
    lines += [f"- {_escaped(sentence)}" for sentence in sentences(comparison)]
    moved = table(comparison)
    if len(moved):
        lines += ["", *_markdown_table(moved)]
    for title, rows in _one_sided(comparison):
        lines += ["", "<details>", f"<summary>{title}</summary>", ""]
        lines += [*_markdown_table(rows), "", "</details>"]
    return "\n".join(lines) + "\n"


def _one_sided(comparison: Comparison) -> Iterator[tuple[str, pd.DataFrame]]:
    for side, rows in (
        ("baseline", comparison.only_baseline),
        ("candidate", comparison.only_candidate),
    ):
        if len(rows):
            yield f"Only in the {side}: {len(rows)}", rows[[*_telling(rows), "status"]]


def _markdown_table(rows: pd.DataFrame) -> list[str]:
    lines = [" | ".join(("", *rows.columns, "")).strip(), "|---" * rows.shape[1] + "|"]
    for row in rows.head(_LISTED).itertuples(index=False):
        lines.append("| " + " | ".join(f"`{_code(value)}`" for value in row) + " |")
    if len(rows) > _LISTED:
        lines += ["", f"and {len(rows) - _LISTED} more"]
    return lines


def _code(value: Any) -> str:
    """Make a value inert within a code span of a table."""
    return _inert(value).replace("`", "'").replace("|", "\N{BROKEN BAR}")


def _escaped(sentence: str) -> str:
    """Make a sentence a code span where it has what Markdown might read, else leave it."""
    return sentence if re.fullmatch(r"[\w ,.;:%()+/-]*", sentence) else f"`{_code(sentence)}`"


def _inert(value: Any) -> str:
    """Make a value one line that commands neither a terminal nor a CI job.

    Control characters go, and those that turn the direction of writing; so do the starts of
    GitHub's and Azure's log commands, ``::`` and ``##[``.
    """
    if _missing(value):
        return "-"
    shown = "".join(
        " " if unicodedata.category(c)[0] in "CZ" else c for c in str(value)[:300]
    ).strip()
    return shown.replace("::", ": :").replace("##[", "## [") or "-"


def as_json(comparison: Comparison) -> str:
    """Tell all of a comparison to machines, as one object."""
    total = overall(comparison)
    return json.dumps(
        {
            "verdict": comparison.verdict,
            "exit_code": comparison.exit_code,
            "threshold": comparison.threshold,
            "counts": counts(comparison),
            "overall": None
            if total is None
            else dict(zip(("ratio", "low", "high"), total, strict=True)),
            "matched_by": list(comparison.matched_by),
            "differs": {name: list(sides) for name, sides in comparison.differs.items()},
            "sentences": sentences(comparison),
            "cells": _records(comparison.cells),
            "only_baseline": _records(comparison.only_baseline),
            "only_candidate": _records(comparison.only_candidate),
        }
    )


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(rows.to_json(orient="records"))


# Reading, where a damaged row must stop everything.

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_PYTHON: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "Int64": int,
    "boolean": bool,
    "Float64": (int, float),
}


def read(source: str | Path) -> pd.DataFrame:
    """Read one side of a comparison, every row checked.

    Args:
        source: a store's folder, a .parquet export, or the name of a baseline: one in the
            folder ``$MOELAB_BASELINES``, or the sweep that is shipped, ``h200_stage_sweep``.
            ``SOURCE@COLUMN=VALUE,...`` keeps the rows that have these values, as
            ``rows.parquet@num_stages=1`` or ``rows@run=20261123T172410-cf936c``.
    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a row is damaged, of a later schema or of another than the file's others,
            or there is none; the message names file and row.
    """
    name, wanted = _parted(str(source))
    path = _located(name)
    for where, row in _rows_at(path):
        _check(where, row)
    rows = records.read(path)
    if rows.empty:
        raise ValueError(f"{path} is empty: no row to compare")
    for column, value in wanted.items():
        if column not in rows:
            raise ValueError(f"{source}: rows have no column {column!r}; see moelab.records")
        spelled = rows[column].astype("string").fillna("none").str.casefold()
        kept = rows[spelled == value.casefold()]
        if kept.empty:
            there = _listed(map(_inert, set(spelled)), 8)
            raise ValueError(f"{source}: no row has {column} {value!r}; there are {there}")
        rows = kept
    return rows


def _parted(source: str) -> tuple[str, dict[str, str]]:
    """Part a source from what its rows are to have."""
    name, at, rest = source.rpartition("@")
    if not at or Path(source).exists() or "=" not in rest:
        return source, {}
    pairs = [each.partition("=") for each in rest.split(",")]
    if wrong := [column for column, equals, _ in pairs if not equals or not column]:
        raise ValueError(f"{source}: {wrong[0]!r} after @ is not COLUMN=VALUE")
    return name, {column.strip(): value.strip() for column, _, value in pairs}


def _located(name: str) -> Path:
    """Find a path, or a baseline by name."""
    path = Path(name)
    if path.exists():
        return path
    folder = os.environ.get("MOELAB_BASELINES")
    if _NAME.fullmatch(name) and folder and (kept := Path(folder) / f"{name}.parquet").is_file():
        return kept
    if name == trade.SHIPPED.stem:
        return trade.SHIPPED
    kept_names = sorted(kept.stem for kept in Path(folder).glob("*.parquet")) if folder else []
    named = ", ".join([*kept_names, trade.SHIPPED.stem])
    raise FileNotFoundError(
        f"{name}: no such file, store or baseline; give a store's folder, a .parquet export, or "
        f"one of {named}" + ("" if folder else "; $MOELAB_BASELINES names a folder of more")
    )


def _rows_at(path: Path) -> Iterator[tuple[str, Any]]:
    """Give every row of a store or an export as it lies there, and where."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():
        for file in sorted(path.glob("*.jsonl")):
            for number, line in enumerate(file.read_bytes().splitlines(), start=1):
                where = f"{file}, line {number}"
                try:
                    yield where, json.loads(line)
                except ValueError:
                    raise ValueError(f"{where}: not a row; the line is torn or damaged") from None
        return
    try:
        # Without checksums a flipped bit is another number.
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as Parquet: {reason}") from None
    if "schema" not in table.column_names or "status" not in table.column_names:
        raise ValueError(f"{path}: not rows of moelab: no column schema or status")
    first = None
    for number, row in enumerate(table.to_pylist(), start=1):
        where = f"{path}, row {number}"
        first = row["schema"] if first is None else first
        if row["schema"] != first:
            raise ValueError(
                f"{where}: schema {row['schema']}, while row 1 has {first}: two exports were "
                "mixed; compare them apart"
            )
        yield where, row


def _check(where: str, row: Any) -> None:
    """Refuse a row that doesn't say what a row says.

    Raises:
        ValueError: naming where it is, the column and its value.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a row: {_inert(row)}")
    schema = row.get("schema")
    if type(schema) is not int or not 1 <= schema <= records.SCHEMA_VERSION:
        raise ValueError(
            f"{where}: schema {_inert(schema)}; this moelab reads 1 to {records.SCHEMA_VERSION}"
        )
    for name, kind in records.COLUMNS.items():
        value = row.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        # To Python True is a number.
        if not isinstance(value, _PYTHON[kind]) or (kind != "boolean" and isinstance(value, bool)):
            raise ValueError(f"{where}: {name} is {_inert(value)!r}, not of type {kind}")
    for name, known in (("status", records.STATUSES), ("mode", records.MODES)):
        if row.get(name) not in known:
            raise ValueError(
                f"{where}: {name} {_inert(row.get(name))!r} is none of {', '.join(known)}"
            )
    for name in ("kernel", "target"):
        if row.get(name) is None:
            raise ValueError(f"{where}: says no {name}")
    time = row.get("time_us")
    if time is not None and (time <= 0 or math.isinf(time)):
        raise ValueError(f"{where}: time_us is {time}, not a time")
    for name, whole in (("samples_us", _are_samples), ("made_by", _is_made_by)):
        if (value := row.get(name)) is not None and not whole(value):
            raise ValueError(f"{where}: {name} is damaged: {_inert(value[:60])}")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _are_samples(text: str) -> bool:
    """Say whether a text is rounds of times."""
    rounds = _parsed(text)
    return (
        isinstance(rounds, list)
        and len(rounds) > 1
        and all(isinstance(of, list) and of for of in rounds)
        and all(
            type(us) in (int, float) and math.isfinite(us) and us > 0 for of in rounds for us in of
        )
    )


def _is_made_by(text: str) -> bool:
    return isinstance(_parsed(text), dict)
