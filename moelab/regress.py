"""Did it regress? Two sets of rows cell by cell: what fits, what it takes, how fast it is.

Frames in, verdicts out; no compiler, no GPU. A verdict says no more than the rows can know:
where noise hides the answer it is `inconclusive`, and a time against another run's is advice.

Speed is judged by `paired_rounds` where both sides took turns in one run. A time of another run,
or one that has no samples, decides nothing: it is listed, and a slower one is inconclusive.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import inert, paired_rounds, records, tables
from .baselines import listed
from .paired_rounds import LOOKS, THRESHOLD

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

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
    *("num_warps", "async_copy", "num_stages", "triton", "gpu", "workload", "side"),
)

_PROVENANCE = ("run", "moelab")

# Clocks are apart where the median cell's differ by more than this share.
CLOCKS_APART = 0.01

# How much a mode asks: what only the deeper of two tells, the other's `ok` does not deny.
_DEPTH = {"lds": 0, "map": 0, "full": 1, "measured": 2}
_TOLD_BY_ALL = ("ok", "out_of_lds", "out_of_tmem")

# These say nothing of the configuration.
_TRANSIENT = ("timeout", "out_of_host_memory", "out_of_memory", "unavailable")

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
        rows: what both sides said of each cell, in the same order: columns as `records` has them,
            but for ``matched_by`` with ``" b"`` (the baseline's) or ``" c"`` behind.
        only_baseline, only_candidate: rows of cells that the other side lacks.
        matched_by: the columns that told cells apart.
        differs: what else differs between the sides, ``{column: (baseline's, candidate's)}``.
        threshold: of speed, a fraction.
    """

    cells: pd.DataFrame
    rows: pd.DataFrame
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


def compare(
    baseline: pd.DataFrame, candidate: pd.DataFrame, threshold: float = THRESHOLD
) -> Comparison:
    """Set every cell of a candidate beside the baseline's.

    A cell is a kernel, its problem and target. Where a side has several rows of one, tile, ways,
    warps, async copy, stages, Triton, GPU and routing tell them apart, in this order and as
    far as is needed: what tells no two rows of a side apart is what may be compared. The sides
    of A/B runs (`moelab.ab`) are compared run by run.

    Args:
        baseline, candidate: rows as `records.read` or `baselines.read` gives them.
        threshold: of speed, a fraction of the baseline's time.
    Raises:
        ValueError: the threshold is not between 0 and 1, or no cell is in both; the message
            shows one of each.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold:g}: give a fraction between 0 and 1, such as 0.03")
    sides = [baseline, candidate]
    by = [*_CELL, "run"]
    if not _are_ab(*sides):
        sides = [
            _one_each(side, set(other["run"].dropna()))
            for side, other in ((baseline, candidate), (candidate, baseline))
        ]
        by = [*_CELL]
    for name in _SETTINGS:
        crowded = [side for side in sides if side.duplicated(by).any()]
        if not crowded:
            break
        if any(_tells_apart(side, by, name) for side in crowded):
            by.append(name)
    paired = sides[0].merge(
        sides[1], on=by, how="outer", suffixes=(" b", " c"), indicator="_in", sort=False
    )
    both = paired[paired["_in"] == "both"].drop(columns="_in").reset_index(drop=True)
    only_baseline, only_candidate = (
        tables.labelled(side.merge(paired.loc[paired["_in"] == where, by], on=by, sort=False))
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
    )
    return Comparison(
        cells.reset_index(drop=True),
        both.loc[cells.index].reset_index(drop=True),
        only_baseline,
        only_candidate,
        tuple(by),
        _differs(both, by),
        threshold,
    )


def _are_ab(baseline: pd.DataFrame, candidate: pd.DataFrame) -> bool:
    """Say whether rows are the two sides of A/B runs, each of which has one row of a question."""
    return bool(
        baseline["side"].notna().all()
        and candidate["side"].notna().all()
        and baseline["side"].nunique() == candidate["side"].nunique() == 1
        and set(baseline["run"]) & set(candidate["run"])
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
            # What can't be launched takes nothing that another could take more of.
            launched = row["status b"] == row["status c"] == "ok"
            resources, *more = _resources(row, decided or not launched)
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
    names = [*dict.fromkeys([*_CELL, *_SETTINGS, *by])]
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
    if {was, now} & {*_TRANSIENT} or was == "crashed":
        return "inconclusive", f"{said}: says nothing of the configuration, ask again"
    modes = row["mode b"], row["mode c"]
    ahead = _DEPTH[modes[0]] - _DEPTH[modes[1]]
    if ahead and (was if ahead > 0 else now) not in _TOLD_BY_ALL:
        return "inconclusive", f"{said}, asked as {modes[0]} and as {modes[1]}: ask both alike"
    if "ok" not in (was, now):
        return "changed", said
    figures = [row[name] for name in ("lds_bytes b", "lds_bytes c", "lds_limit c")]
    if "out_of_lds" in (was, now) and not any(map(_missing, figures)):
        said += " ({:,} -> {:,} of {:,} bytes)".format(*figures)
    return ("improved" if now == "ok" else "regressed"), said


def _resources(row: Mapping[str, Any], decided: bool) -> tuple[str, ...]:
    """Say what a cell takes more or less of, and in words.

    Args:
        decided: its speed was judged, which says what they cost, or a side is not launched.
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
    said = f"time x{time['ratio']:.3f} ({between}, {time['rounds']:.0f} rounds, {time['how']})"
    if time["how"] != PAIRED or time["speed"] != "inconclusive":
        return [said]
    needed = time["rounds_needed"]
    rounds = "more than 1000" if needed is None else f"about {needed:.0f}"
    return [f"{said}; {rounds} rounds would decide it if it goes on so"]


_SPEED = ("how", "ratio", "ratio_low", "ratio_high", "rounds", "spread", "rounds_needed", "speed")


def _speeds(both: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Judge the times of every cell; missing where a side has none or routings differ.

    Cells whose sides took turns and those that did not are families of their own.
    """
    import pandas as pd

    told: dict[int, dict[str, Any]] = {}
    paired: list[tuple[int, np.ndarray, np.ndarray]] = []
    apart: list[tuple[int, np.ndarray, np.ndarray]] = []
    for at, row in enumerate(both.to_dict("records")):
        times = [row[f"time_us {side}"] for side in "bc"]
        if any(map(_missing, times)) or _one(row, "workload", "b") != _one(row, "workload", "c"):
            continue
        samples = [row[f"samples_us {side}"] for side in "bc"]
        medians = [paired_rounds.medians("[]" if _missing(text) else text) for text in samples]
        # One round says nothing of the spread.
        if min(map(len, medians)) < 2:
            told[at] = {"how": SINGLE, "ratio": times[1] / times[0], "speed": "inconclusive"}
            continue
        runs = [_one(row, "run", side) for side in "bc"]
        together = runs[0] is not None and runs[0] == runs[1]
        (paired if together else apart).append((at, medians[0], medians[1]))
    if paired:
        judged = paired_rounds.judge_paired([sides for _, *sides in paired], threshold)
        for (at, *_), cell in zip(paired, judged.to_dict("records"), strict=True):
            answer = cell.pop("answer")
            cell |= {"how": PAIRED, "speed": answer}
            if answer == "inconclusive":
                cell["rounds_needed"] = paired_rounds.to_decide(
                    cell["ratio"], cell["spread"], len(paired), threshold
                )
            told[at] = cell
    if apart:
        for (at, *_), cell in zip(
            apart,
            paired_rounds.judge_apart([sides for _, *sides in apart], threshold).to_dict("records"),
            strict=True,
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


def _differs(both: pd.DataFrame, by: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Tell what differs between the sides, of settings and of what made the rows."""
    values: dict[str, list[set[str]]] = {}
    for name in (*_SETTINGS, *_PROVENANCE):
        if name not in (*by, "side"):
            values[name] = [set(both[f"{name} {s}"].dropna().astype(str)) for s in "bc"]
    for side, suffix in enumerate("bc"):
        for text in both[f"made_by {suffix}"].dropna().unique():
            for name, value in json.loads(text).items():
                if name != "date":
                    found = values.setdefault(f"made by: {name}", [set(), set()])
                    found[side].add(str(value))
    return {
        name: (listed(sides[0]), listed(sides[1]))
        for name, sides in values.items()
        if sides[0] != sides[1]
    } | _clocks(both)


def _clocks(both: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Tell the sides' clocks where they are apart, and what held one side's down alone."""
    told = {}
    mhz = [both[f"clock_mhz {side}"] for side in "bc"]
    apart = (mhz[1] / mhz[0] - 1).abs().median()
    if not _missing(apart) and apart > CLOCKS_APART:
        medians = [f"{of_side[mhz[0].notna() & mhz[1].notna()].median():.0f}" for of_side in mhz]
        told["clock_mhz"] = (medians[0], medians[1])
    held = [
        {why for text in both[f"throttled {side}"].dropna() for why in text.split(",") if why}
        for side in "bc"
    ]
    if held[0] != held[1]:
        told["throttled"] = (listed(held[0]), listed(held[1]))
    return told


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


def sentences(comparison: Comparison, quoted: Callable[[Any], str] = inert.line) -> list[str]:
    """Sum a comparison up: cells, speed, what these rounds can find, what else differs.

    Args:
        quoted: writes what comes from rows.
    """
    cells = comparison.cells
    counted = ", ".join(f"{number} {answer}" for answer, number in counts(comparison).items())
    said = [
        f"Cells in both: {len(cells)}, of them {counted}. Only the baseline has "
        f"{len(comparison.only_baseline)}, only the candidate {len(comparison.only_candidate)}."
    ]
    said += _of_speed(comparison)
    if comparison.differs:
        what = "; ".join(
            f"{quoted(name)} ({quoted(was)} against {quoted(now)})"
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
    apart = paired[paired["spread"] > 0]
    if apart.empty:
        return "Both sides have the same times: they are the same rows."
    rounds, spread = int(apart["rounds"].median()), float(apart["spread"].median())
    if rounds < LOOKS[0]:
        return f"Fewer than {LOOKS[0]} rounds decide nothing: measure with more."
    cells = len(paired)
    least = paired_rounds.found(rounds, spread, cells=cells, threshold=threshold)
    half = threshold + (least - threshold) / 2
    needed = paired_rounds.rounds_needed(half, spread, cells=cells, threshold=threshold)
    return (
        f"The median cell (rounds spread by {100 * spread:.2f}%) finds a slowdown of "
        f"{100 * least:.1f}% in 95 of 100 comparisons by its {rounds} rounds; one of "
        f"{100 * half:.1f}% needs {needed or 'more than 1000'} rounds. What is slower by less "
        "than the threshold is never called so: for that give a smaller one."
    )


def table(comparison: Comparison) -> pd.DataFrame:
    """List the cells that did not simply pass, the gravest first.

    Returns:
        ``verdict``; what tells the cells apart, as far as it varies, and ``kernel``; ``what``.
    """
    cells = comparison.cells
    moved = cells[cells["verdict"] != "passed"]
    return moved[["verdict", *telling(comparison), "what"]].reset_index(drop=True)


_NAMES = (
    *("kernel", "model", "target", "layer", "tp", "m", "x_format", "y_format", "scale_layout"),
    *("fast_accum", "args", "peer", "includes", "tile", "num_warps", "async_copy", "num_stages"),
    *("triton", "gpu", "workload", "run"),
)


def telling(comparison: Comparison) -> list[str]:
    """Name the columns that tell cells apart to a reader, those of one side alone too."""
    sides = (comparison.cells, comparison.only_baseline, comparison.only_candidate)

    def values(name: str) -> set[Any]:
        return {
            None if _missing(value) else value
            for side in sides
            if name in side
            for value in side[name].unique()
        }

    # Rows of one side have every column, cells those that told them apart.
    there = [name for name in _NAMES if name in comparison.cells]
    return [name for name in there if name == "kernel" or len(values(name)) > 1]


def text(comparison: Comparison) -> str:
    """Tell a comparison on a terminal or in a CI job's log."""
    lines = [f"{comparison.verdict}", *sentences(comparison)]
    moved = table(comparison)
    if len(moved):
        shown = moved.head(_LISTED).map(inert.line)
        lines += ["", shown.to_string(index=False)]
        if len(moved) > _LISTED:
            lines.append(f"and {len(moved) - _LISTED} more; --json has every cell")
    for title, rows in _one_sided(comparison):
        lines += ["", title, rows.head(_LISTED).map(inert.line).to_string(index=False)]
        if len(rows) > _LISTED:
            lines.append(f"and {len(rows) - _LISTED} more")
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """Tell a comparison in GitHub's Markdown, as for a job's summary.

    Whatever comes from rows stands in code spans: it makes no link, mention, tag or cell.
    """
    lines = [f"## moelab compare: {comparison.verdict}", ""]
    lines += [f"- {sentence}" for sentence in sentences(comparison, inert.code)]
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
            yield f"Only in the {side}: {len(rows)}", rows[[*telling(comparison), "status"]]


def _markdown_table(rows: pd.DataFrame) -> list[str]:
    lines = [" | ".join(("", *rows.columns, "")).strip(), "|---" * rows.shape[1] + "|"]
    for row in rows.head(_LISTED).itertuples(index=False):
        lines.append("| " + " | ".join(map(inert.code, row)) + " |")
    if len(rows) > _LISTED:
        lines += ["", f"and {len(rows) - _LISTED} more"]
    return lines


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
