"""A comparison told to people: the verdict in figures, what moved, who made both sides.

Comparisons of `regress` in, frames and HTML out; no compiler, no GPU. What comes from rows is
made one line (`inert.line`) and escaped: a name commands nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cliffs, inert, published, records, regress, tables, trade
from .baselines import listed
from .parameters import ParameterError
from .regress import PAIRED, SINGLE, Comparison

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML

CASES = Path(__file__).parent / "data" / "regression_cases.csv"

# Of a table that is read, not searched; `moelab compare --json` has every cell.
_SHOWN = 12
# Of a name in a table or a picture.
_NAME = 60

BASELINE, CANDIDATE = "baseline", "candidate"
SIDES = {BASELINE: "b", CANDIDATE: "c"}

# What `cell_in_words` says.
_IN_CELLS = ("kernel", "model", "layer", "tp", "m", "tile", "fast_accum")
# What a list of cells says that they take.
_TAKEN = {
    "lds_bytes": "LDS (bytes)",
    "spilled_registers": "spilled registers",
    "workgroups_per_cu": "workgroups per CU",
}

# Of the two together: what became of a cell's fit.
LOST, NEITHER, GAINED = "no longer fits", "never fits", "now fits"

# The model of `cliffs` takes memory by tokens and by row tiles: beyond is nobody's batch.
_MOST = 2**22

# Of throughput along M: where the figures are from.
SOURCE, MEASURED, PUBLISHED = "figures", "measured", "published"
FLAGGED = "flagged on"
CURVE = ["target", *trade.CURVE]

# What a reader calls that which may differ; settings of a launch are one thing.
_CONFIGURATION = (
    *("block_m", "block_n", "block_k", "split_k", "group_m", "tma", "tails", "persistent"),
    *("specialized", "num_warps", "async_copy", "num_stages"),
)
_SUBJECTS = {
    **dict.fromkeys(_CONFIGURATION, "the configuration"),
    **dict.fromkeys(("triton", "made by: triton"), "Triton"),
    "made by: kernel": "the kernels' source",
    "made by: torch": "PyTorch",
    "made by: driver": "the driver",
    "gpu": "the GPU",
    "workload": "the routing",
    "clock_mhz": "the clocks",
    "throttled": "what held the clocks down",
}


# Of provenance: what the GPU's sensors said.
_SENSED = ("clock (MHz)", "hottest (\N{DEGREE SIGN}C)")


# What is compared.


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sources as `baselines.read` takes them, and what a reader calls the question."""

    baseline: str
    candidate: str
    title: str


def cases() -> dict[str, Case]:
    """Read the comparisons that are shipped, by name."""
    import pandas as pd

    found = pd.read_csv(CASES, comment=None, skiprows=1, dtype=str)
    return {row.pop("case"): Case(**row) for row in found.to_dict("records")}


def asked(case: str, baseline: str, candidate: str, title: str) -> Case:
    """Make a notebook's parameters a case.

    Args:
        case: name of one that is shipped; empty: the other three say what is compared.
    Raises:
        ParameterError: there is no such case; the message lists them.
    """
    if not case:
        return Case(baseline, candidate, title)
    there = cases()
    if case not in there:
        raise ParameterError(f"case: no case {case!r}; there are {', '.join(there)}")
    return there[case]


# The verdict.


def headline(compared: Comparison, case: Case) -> HTML:
    """Say the verdict, how many cells moved, how much over all, and what to beware of."""
    from IPython.display import HTML

    figures = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}</dd></div>"
        for figure, label in _figures(compared)
    )
    beware = "".join(f"<li>{escape(warning)}</li>" for warning in warnings(compared))
    title = f'<p class="verdict-title">{escape(inert.line(case.title))}</p>' if case.title else ""
    return HTML(
        f'<div class="verdict {compared.verdict}">'
        f'<p class="verdict-word">{compared.verdict}</p>{title}'
        f'<dl class="figures">{figures}</dl>'
        f"<p>Candidate <code>{escape(inert.line(case.candidate))}</code> "
        f"against baseline <code>{escape(inert.line(case.baseline))}</code></p>"
        + (f'<ul class="beware">{beware}</ul>' if beware else "")
        + "</div>"
    )


def _figures(compared: Comparison) -> Iterator[tuple[str, str]]:
    """Give the figures of a headline, each with its label."""
    cells = compared.cells
    answered = {kind: cells[kind].value_counts() for kind in regress.KINDS}
    fits, speed, resources = (answered[kind] for kind in ("fits", "speed", "resources"))
    total = regress.overall(compared)
    if total:
        mean, low, high = total
        yield (
            f"\N{MULTIPLICATION SIGN}{mean:.3f}",
            f"time over all paired cells, geometric mean ({low:.4f} to {high:.4f})",
        )
    timed = cells["speed"].notna().sum()
    if timed:
        limit = f"by more than {100 * compared.threshold:g}%"
        for answer, label in (("regressed", "slower"), ("improved", "faster")):
            yield f"{speed.get(answer, 0)} of {timed}", f"{label} {limit}"
        yield f"{speed.get('inconclusive', 0)} of {timed}", "times inconclusive"
    yield f"{fits.get('regressed', 0)} of {len(cells)}", "no longer fit or fail"
    yield f"{fits.get('improved', 0)} of {len(cells)}", "now fit or work"
    # Where speed was judged it says what they cost.
    if not timed:
        yield (
            f"{resources.get('regressed', 0)} of {len(cells)}",
            "spill more or have less occupancy",
        )
        yield f"{resources.get('improved', 0)} of {len(cells)}", "spill less or have more occupancy"


def warnings(compared: Comparison) -> list[str]:
    """Say what a reader should beware of before believing the verdict, a sentence each."""
    said = []
    subjects: dict[str, str] = {}
    for name, (was, now) in compared.differs.items():
        subject = _SUBJECTS.get(name, inert.line(name, _NAME).removeprefix("made by: "))
        subjects.setdefault(subject, f"{inert.line(was, _NAME)} against {inert.line(now, _NAME)}")
    # Cells of two runs are advisory already; what a side was asked for is what is compared.
    for known in ("run", "ab"):
        subjects.pop(known, None)
    if len(subjects) > 1:
        told = "; ".join(f"{subject} ({values})" for subject, values in subjects.items())
        said.append(
            f"The sides differ in more than one thing: {told}. Any of them may have moved it."
        )
    alone = [len(of) for of in _alone(compared)]
    if any(alone):
        said.append(
            f"Only the baseline has {alone[0]} cells, only the candidate {alone[1]}: they are in "
            "no verdict, and listed below."
        )
    rows, timed = compared.rows, compared.cells["how"].notna()
    held = [rows.loc[timed, f"throttled {side}"] for side in SIDES.values()]
    times = [int((why.fillna("") != "").sum()) for why in held]
    if any(times):
        reasons = {each for why in held for text in why.dropna() for each in text.split(",")}
        said.append(
            f"The GPU held its clocks down ({inert.line(listed(reasons - {''}), _NAME)}) during "
            f"{times[0]} of the baseline's {len(held[0])} times and {times[1]} of the candidate's."
        )
    unknown = max(int(why.isna().sum()) for why in held)
    if unknown:
        said.append(
            f"Whether the GPU held its clocks down is unknown of {unknown} of {timed.sum()} times."
        )
    same = timed & (rows["samples_us b"] == rows["samples_us c"]).fillna(False)
    if number := int(same.sum()):
        said.append(
            f"In {number} of {timed.sum()} timed cells both sides are one row: nothing changed "
            "there, and nothing was measured of it."
        )
    found = compared.cells["how"].value_counts()
    if number := found.get(regress.ADVISORY, 0):
        said.append(f"{number} times are of two runs: advice, and no verdict rests on them.")
    if number := found.get(SINGLE, 0):
        said.append(
            f"{number} times are one figure each: a difference is a difference, with no confidence."
        )
    return said


def conclusion(compared: Comparison) -> HTML:
    """Sum the comparison up, computed from the rows."""
    from IPython.display import HTML

    said = "".join(f"<li>{escape(each)}</li>" for each in regress.sentences(compared))
    return HTML(f"<ul>{said}</ul>")


# What moved.


def side(compared: Comparison, which: str) -> pd.DataFrame:
    """Give one side's row of every cell, in the order of the cells.

    Args:
        which: `BASELINE` or `CANDIDATE`.
    """
    rows, behind = compared.rows, SIDES[which]
    there = {name: name if name in rows else f"{name} {behind}" for name in records.COLUMNS}
    return rows[[*there.values()]].set_axis([*there], axis=1)


def summary(compared: Comparison) -> pd.DataFrame:
    """Count per kernel, model and target what moved, and by how much over all.

    Returns:
        a row each: the geometric mean of paired times, candidate over baseline, with its 95%
        interval; how many cells are slower, faster, inconclusive and timed, of how many; how
        many no longer fit and now fit; the range of the paired times.
    """
    import pandas as pd

    by = [*trade.KIND, "target"]
    found = []
    for names, cells in compared.cells.groupby(by, sort=False, dropna=False):
        fits, speed = cells["fits"], cells["speed"]
        *kind, target = names
        told: dict[str, Any] = {"what": trade.named(*kind), "target": target}
        ratios = cells.loc[cells["how"] == PAIRED, "ratio"].astype(float)
        if total := regress.overall(dataclasses.replace(compared, cells=cells)):
            told["time (geometric mean)"] = f"{total[0]:.3f} ({total[1]:.4f} to {total[2]:.4f})"
        if speed.notna().any():
            told |= {
                "slower": (speed == "regressed").sum(),
                "faster": (speed == "improved").sum(),
                "inconclusive": (speed == "inconclusive").sum(),
                "timed": speed.notna().sum(),
            }
        told |= {
            "cells": len(cells),
            LOST: (fits == "regressed").sum(),
            GAINED: (fits == "improved").sum(),
        }
        if len(ratios):
            told["range of times"] = f"{ratios.min():.3f} to {ratios.max():.3f}"
        found.append(told)
    table = pd.DataFrame(found)
    counts = [name for name in ("slower", "faster", "inconclusive", "timed") if name in table]
    return inert.frame(table.astype(dict.fromkeys(counts, "Int64")))


def worst(compared: Comparison, most: int = 6) -> pd.DataFrame:
    """Choose the cells whose samples are worth a look, the worst first.

    Slower ones come before inconclusive ones, and those before the rest by distance from 1; the
    worst of each kernel and model before the second of any.

    Returns:
        of `Comparison.cells`, with both sides' ``samples_us`` as ``samples b`` and ``samples c``.
    """
    import numpy as np

    rows = compared.rows
    drawn = compared.cells.assign(
        **{f"samples {behind}": rows[f"samples_us {behind}"] for behind in SIDES.values()}
    )
    drawn = drawn[drawn["ratio_low"].notna()]
    if drawn.empty:
        return drawn
    ratios = np.log(drawn["ratio"].astype(float))
    grave = drawn["speed"].map({"regressed": 0, "inconclusive": 1}).fillna(2)
    drawn = drawn.assign(_grave=grave, _far=-np.where(grave < 2, ratios, ratios.abs()))
    drawn = drawn.sort_values(["_grave", "_far"], kind="stable")
    turn = drawn.groupby([*trade.KIND, "target"], dropna=False).cumcount()
    chosen = drawn.assign(_turn=turn).sort_values(["_grave", "_turn", "_far"], kind="stable")
    chosen = chosen.head(most).sort_values(["_grave", "_far"], kind="stable")
    return chosen.drop(columns=["_grave", "_far", "_turn"])


def moved(compared: Comparison) -> pd.DataFrame:
    """List the first cells that regressed or are inconclusive, the gravest first.

    Returns:
        ``verdict``; the cell in words; both statuses where they differ; its time over the
        baseline's with the 95% interval; what it takes more or less of, ``was -> is``.
    """
    import pandas as pd

    cells = compared.cells[compared.cells["verdict"].isin(regress.ANSWERS[:2])].head(_SHOWN)
    was, now = (side(compared, which).loc[cells.index] for which in SIDES)
    by = [name for name in regress.telling(compared) if name not in _IN_CELLS]
    found = []
    for at, cell in cells.iterrows():
        sides = (was.loc[at], now.loc[at])
        told = {"verdict": cell["verdict"], "cell": cell_in_words(cell.to_dict())}
        told |= {name: cell[name] for name in by}
        status = tuple(of["status"] for of in sides)
        told["status"] = " -> ".join(status) if status[0] != status[1] else None
        told["time"] = _ratio(cell)
        for name, said in _TAKEN.items():
            pair = pd.Series([of[name] for of in sides], index=["was", "is"])
            told[said] = None if pair.isna().any() or pair.nunique() == 1 else _from_to(pair)
        found.append(told)
    return inert.frame(pd.DataFrame(found)).dropna(axis="columns", how="all")


def cell_in_words(cell: Mapping[str, Any]) -> str:
    """Name a cell by kernel, problem and tile."""
    there = {name: value for name, value in cell.items() if not _missing(value)}
    words = [str(there[name]) for name in ("kernel", "model") if name in there]
    words += [cliffs.in_words(name, there[name]) for name in ("layer", "tp") if name in there]
    words += [f"M {there['m']}"] if "m" in there else []
    words += [str(there["tile"])] if "tile" in there else []
    words += [tables.SUMS[True]] if there.get("fast_accum") is True else []
    return ", ".join(inert.line(word, _NAME) for word in words)


def _ratio(cell: Mapping[str, Any]) -> str | None:
    if _missing(cell["ratio"]):
        return None
    said = f"\N{MULTIPLICATION SIGN}{cell['ratio']:.3f}"
    if _missing(cell["ratio_low"]):
        return said
    return f"{said} ({cell['ratio_low']:.3f} to {cell['ratio_high']:.3f})"


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def fits(compared: Comparison) -> pd.DataFrame:
    """Group the cells that don't fit on both sides by configuration, the gravest first.

    Returns:
        one row per kernel, target, tile and stage counts: what became of it; both statuses; the
        most LDS of either side and the limit, bytes; cells, their token counts and models.
    """
    import pandas as pd

    was, now = side(compared, BASELINE), side(compared, CANDIDATE)
    stages = [of["num_stages"].astype("string").fillna("-") for of in (was, now)]
    became = pd.Series(GAINED, was.index).mask(was["status"] == "ok", LOST)
    became = became.mask((was["status"] != "ok") & (now["status"] != "ok"), NEITHER)
    table = tables.labelled(was).assign(
        became=became,
        stages=stages[0].where(stages[0] == stages[1], stages[0] + " -> " + stages[1]),
        status=was["status"] + " -> " + now["status"],
        now_lds=now["lds_bytes"],
        limit=now["lds_limit"],
    )
    table = table[(was["status"] != "ok") | (now["status"] != "ok")]
    by = ["became", "kernel", "target", "tile", "num_warps", "stages", "status"]
    table = table.groupby(by, sort=False, dropna=False).agg(
        **{
            "LDS was (bytes)": ("lds_bytes", "max"),
            "is (bytes)": ("now_lds", "max"),
            "limit (bytes)": ("limit", "max"),
            "cells": ("m", "size"),
            "M from": ("m", "min"),
            "to": ("m", "max"),
            "models": ("model", lambda names: listed(map(inert.line, names.dropna().unique()))),
        }
    )
    table = tables.in_tile_order(table.reset_index())
    order = table["became"].map((LOST, NEITHER, GAINED).index)
    return inert.frame(table.loc[order.sort_values(kind="stable").index].reset_index(drop=True))


def one_sided(compared: Comparison) -> pd.DataFrame:
    """Group the cells that only one side has, for they are in no verdict.

    Returns:
        one row per side, kernel, model, target, tile, warps and stages: cells, their token
        counts and statuses.
    """
    import pandas as pd

    rows = pd.concat(
        [of.assign(side=which) for which, of in zip(SIDES, _alone(compared), strict=True)],
        ignore_index=True,
    )
    if rows.empty:
        return rows
    by = ["side", "kernel", "model", "target", "tile", "num_warps", "num_stages"]
    table = rows.groupby(by, sort=False, dropna=False).agg(
        **{
            "cells": ("status", "size"),
            "M from": ("m", "min"),
            "to": ("m", "max"),
            "statuses": ("status", lambda found: listed(found.unique())),
        }
    )
    return inert.frame(table.reset_index())


def _alone(compared: Comparison) -> tuple[pd.DataFrame, pd.DataFrame]:
    return compared.only_baseline, compared.only_candidate


def resources(compared: Comparison) -> pd.DataFrame:
    """Count what launches of both sides take more and less of, per kernel and target.

    Returns:
        one row per kernel, target and resource that changed anywhere: cells where both are
        launched and know it, in how many there is more and less, the median change over these
        cells, the largest rise and the largest fall, ``was -> is``.
    """
    import pandas as pd

    was, now = side(compared, BASELINE), side(compared, CANDIDATE)
    launched = (was["status"] == "ok") & (now["status"] == "ok")
    found = []
    for names, cells in was[launched].groupby(["kernel", "target"], sort=False, dropna=False):
        for name in regress.RESOURCES:
            pair = pd.DataFrame({"was": cells[name], "is": now.loc[cells.index, name]}).dropna()
            change = (pair["is"] - pair["was"]).astype(float)
            if not change.any():
                continue
            rise, fall = change.idxmax(), change.idxmin()
            found.append(
                {
                    "kernel": names[0],
                    "target": names[1],
                    "resource": name,
                    "cells": len(pair),
                    "more": (change > 0).sum(),
                    "less": (change < 0).sum(),
                    "median change": f"{change.median():+,.0f}",
                    "largest rise": _from_to(pair.loc[rise]) if change[rise] > 0 else None,
                    "largest fall": _from_to(pair.loc[fall]) if change[fall] < 0 else None,
                }
            )
    return inert.frame(pd.DataFrame(found))


def _from_to(pair: Any) -> str:
    return f"{pair['was']:,} -> {pair['is']:,}"


# Along M.


def along_m(compared: Comparison) -> pd.DataFrame:
    """Set each side's throughput against the model of `cliffs`, measured and published alike.

    Measured is the fastest configuration of each problem, each layer a curve. A published figure
    is one of both layers, and has a place only where a side has the very launches that gave it.

    Returns:
        of `cliffs.steps`, with the `SOURCE` of its figures and its ``side``; empty where there
        are no two cells of a curve whose target's compute units are known.
    """
    import pandas as pd

    found = []
    for which in SIDES:
        rows = side(compared, which)
        rows = tables.labelled(rows[(rows["status"] == "ok") & _is_modelled(rows)])
        for source, of_cells in (
            (MEASURED, _cells(trade.fastest(rows[rows["tflops"].notna()]), "tflops", CURVE)),
            (PUBLISHED, _published_cells(rows)),
        ):
            if of_cells is not None:
                steps = cliffs.steps(of_cells, CURVE)
                found.append(steps.assign(side=which, **{SOURCE: source}))
    columns = [*CURVE, "m", "m (was)", cliffs.CHANGE, cliffs.LEFT, cliffs.LOOK, "side", SOURCE]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def _is_modelled(rows: pd.DataFrame) -> pd.Series:
    """Mark rows of MoE GEMMs whose sizes are a batch's and not a mistake."""
    sizes = ["m", "experts", "top_k", "n", "k", "block_m", "block_n", "block_k", "split_k"]
    whole = (rows[sizes] > 0).fillna(False).all(axis=1) & (rows["top_k"] <= rows["experts"])
    tiles = rows["experts"].astype("Float64") * rows["m"] / rows["block_m"]
    return (whole & (rows["m"] <= _MOST) & (tiles <= _MOST)).fillna(False).astype(bool)


def _cells(rows: pd.DataFrame, tflops: str, curve: list[str]) -> pd.DataFrame | None:
    try:
        return cliffs.cells(rows, tflops, curve) if len(rows) else None
    except ValueError:
        # Of no target that anybody described: there is no model of it.
        return None


def _published_cells(rows: pd.DataFrame) -> pd.DataFrame | None:
    found = published.figures(rows)
    of_cells = _cells(found, published.PUBLISHED, ["target", *published.CURVE])
    return None if of_cells is None else of_cells.assign(fast_accum=False, layer="1 and 2")


def flagged(steps: pd.DataFrame) -> pd.DataFrame:
    """List the falls that the model does not explain, and on which sides each is flagged.

    Args:
        steps: of `along_m`.
    Returns:
        the candidate's where it is flagged there, else the baseline's, the worst first: the
        curve in words; token counts and throughputs, ``was -> is``; by how much it changed,
        what tiles and waves make of it, and what is left; the configuration.
    """
    import pandas as pd

    look = steps[steps[cliffs.LOOK].astype(bool)]
    if look.empty:
        return look
    by = [SOURCE, *CURVE, "m"]
    sides = look.groupby(by, dropna=False)["side"].agg(lambda names: " and ".join(names))
    # The candidate's come last.
    table = look.drop_duplicates(by, keep="last").join(sides.rename(FLAGGED), on=by)
    found = []
    for step in table.sort_values(cliffs.LEFT).to_dict("records"):
        inner = [name for name in CURVE if name != "fast_accum" or step[name]]
        made = sorted((step[cliffs.TILES], step[cliffs.WAVES]))
        was, now = step["configuration (was)"], step["configuration"]
        found.append(
            {
                "curve": ", ".join(
                    inert.line(cliffs.in_words(of, step[of]), _NAME) for of in inner
                ),
                "M": f"{step['m (was)']:,.0f} -> {step['m']:,}",
                "TFLOP/s": f"{step['tflops (was)']:,.0f} -> {step['tflops']:,.0f}",
                cliffs.CHANGE: f"{step[cliffs.CHANGE]:+.1f}",
                "by the model (%)": f"{made[0]:+.1f} to {made[1]:+.1f}",
                cliffs.LEFT: f"{step[cliffs.LEFT]:+.1f}",
                FLAGGED: step[FLAGGED],
                "configuration": now if was == now else f"{was} -> {now}",
                SOURCE: step[SOURCE],
            }
        )
    return inert.frame(pd.DataFrame(found))


def of_falls(steps: pd.DataFrame) -> HTML:
    """Count the falls along M on each side, how many are flagged, and the figures' worth."""
    from IPython.display import HTML

    said = []
    compared = steps[steps[cliffs.CHANGE].notna()]
    for (source, which), of_side in compared.groupby([SOURCE, "side"], sort=False):
        falls = of_side[of_side[cliffs.CHANGE] < 0]
        said.append(
            f"{which}, {source}: throughput falls in {len(falls)} of {len(of_side)} steps, "
            f"{(falls[cliffs.LEFT] >= 0).sum()} of them no deeper than tiles and waves make them; "
            f"{falls[cliffs.LOOK].sum()} are flagged."
        )
    if (compared[SOURCE] == PUBLISHED).any():
        said.append(
            "Published figures are of both layers together, of other kernels with the same tiles "
            "and stages, and one a cell: a fall is a fall, with no confidence. Of other launches "
            "nothing was published."
        )
    return HTML("".join(f"<p>{escape(each)}</p>" for each in said or ["No two figures along M."]))


# Who made both sides.


def provenance(compared: Comparison) -> pd.DataFrame:
    """Tell what made each side's rows, beside each other, and where they differ.

    Returns:
        ``what``; the two sides' values; ``differs``, said where they do.
    """
    import pandas as pd

    told = [_made(side(compared, which)) for which in SIDES]
    names = dict.fromkeys(name for of_side in told for name in of_side)
    table = pd.DataFrame(
        {
            "what": [*names],
            **{
                which: [of_side.get(name, "-") for name in names]
                for which, of_side in zip(SIDES, told, strict=True)
            },
        }
    )
    # Clocks never agree to the last MHz: they differ where `regress` says so.
    same = "clock_mhz" not in compared.differs
    alike = (table[BASELINE] == table[CANDIDATE]) | (table["what"].isin(_SENSED) & same)
    return inert.frame(table.assign(differs=alike.map({False: "differs", True: None})))


def _made(rows: pd.DataFrame) -> dict[str, str]:
    """Say what made one side's rows, by what a reader calls it."""
    told = {"rows": f"{len(rows):,}"}
    for name in ("target", "gpu", "triton", "num_stages", "async_copy", "workload", "run"):
        told[name] = listed(rows[name].dropna().astype(str).unique())
    made: dict[str, set[str]] = {}
    for text in rows["made_by"].dropna().unique():
        for name, value in json.loads(text).items():
            made.setdefault(name, set()).add(str(value))
    dates = sorted(made.pop("date", ()))
    told |= {f"made by: {name}": listed(values) for name, values in made.items()}
    if dates:
        told["date"] = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    clocks = rows["clock_mhz"].dropna()
    if len(clocks):
        told[_SENSED[0]] = (
            f"{clocks.median():.0f} in the median, {clocks.min():.0f} to {clocks.max():.0f}"
        )
        told[_SENSED[1]] = f"{rows['temperature_c'].max():.0f}"
    held = rows["throttled"].dropna()
    if len(held):
        reasons = {why for text in held for why in text.split(",") if why}
        told["clocks held down by"] = listed(reasons)
    told["moelab"] = listed(rows["moelab"].dropna().unique())
    return {name: value for name, value in told.items() if value != "none"}
