"""What a pipeline's depth brings and what it costs: measured throughput against LDS.

Frames in, frames out; no compiler, no GPU. Compared is only what was measured in turns: the
same problem in the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import inert, measurements, problems, records, tables
from .parameters import ParameterError, as_list

if TYPE_CHECKING:
    import pandas as pd

# Measured by benchmarks/stage_sweep.py; what made each row is in its column `made_by`.
SHIPPED = Path(__file__).parent / "data" / "h200_stage_sweep.parquet"

# Along which only M varies.
CURVE = ["kernel", "model", "fast_accum", "layer", "tp"]
# What is summed up apart.
KIND = CURVE[:3]
_ALIKE = ["gpu", "triton", "run", "workload", "x_format", "y_format"]
_PROBLEM = [*_ALIKE, *CURVE, "m"]
TILING = [*_PROBLEM, "tile", "num_warps"]

# Of a policy of `under` that asks for what fits; a number behind it is the most stages.
MOST = "most"

# A notebook's parameters that say which rows.
PARAMETERS = ("rows_path", "kernels", "models", "layers", "tp")

LOSS, LOSS_LOW, LOSS_HIGH = "one stage loses (%)", "at least (%)", "at most (%)"
STEP, ADDED = "stages", "added (bytes)"
GAIN, GAIN_LOW, GAIN_HIGH = "gained (%)", LOSS_LOW, LOSS_HIGH
FRONT = "on the front"


def measured(path: Path | str = "") -> pd.DataFrame:
    """Read measured rows, labelled; those that are shipped where no path is given.

    Raises:
        FileNotFoundError, ValueError: as `records.read`.
        ValueError: no row there was measured.
    """
    rows = records.read(path or SHIPPED)
    # A peer's kernel has no tile and no stages that could be told apart.
    rows = rows[(rows["mode"] == "measured") & rows["peer"].isna()]
    if rows.empty:
        raise ValueError(f"{path}: no row was measured; see `moelab measure`")
    return tables.labelled(rows)


def chosen(
    rows: pd.DataFrame,
    kernels: object = "all",
    models: object = "all",
    layers: object = "all",
    tp: object = "all",
) -> pd.DataFrame:
    """Keep the rows of some problems; each argument takes a list, one value or text with commas.

    Raises:
        ParameterError: no row has such a value, or none has all of them; the message lists
            what there is.
    """
    columns = {"kernels": "kernel", "models": "model", "layers": "layer", "tp": "tp"}
    kept = rows
    for (argument, column), value in zip(
        columns.items(), (kernels, models, layers, tp), strict=True
    ):
        if value in ("all", "", None):
            continue
        known = sorted(rows[column].unique())
        values = as_list(value, str if isinstance(known[0], str) else int)
        if wrong := [value for value in values if value not in known]:
            raise ParameterError(
                f"{argument}: no row has {wrong[0]!r}; there are {', '.join(map(str, known))}, "
                "or all"
            )
        kept = kept[kept[column].isin(values)]
    if kept.empty:
        there = rows[[*columns.values()]].drop_duplicates().to_string(index=False)
        raise ParameterError(f"no row has all that was asked for; there are\n{there}")
    return kept


def at(rows: pd.DataFrame, m: int) -> pd.DataFrame:
    """Keep the rows of one token count.

    Raises:
        ParameterError: there are none; the message lists the token counts.
    """
    known = sorted(rows["m"].unique())
    if m not in known:
        raise ParameterError(f"m: no row has {m} tokens; there are {', '.join(map(str, known))}")
    return rows[rows["m"] == m]


def under(rows: pd.DataFrame, policy: str) -> pd.DataFrame:
    """Keep of each problem and tile the stage count that a policy chooses.

    Args:
        rows: with and without `tables.labelled`; what has no stages is left out.
        policy: ``most``, the largest count that fits; ``most2``, of at most two; or one of
            `problems.POLICIES`, as its rules have it whether it fits or not. Where nothing
            fits, the least count is kept, and says so.
    Raises:
        ValueError: there is no such policy, or it says nothing of a row's target.
    """
    rows = rows[rows["num_stages"].notna()]
    if policy in problems.POLICIES:
        ruled = [
            problems.ruled_stages(policy, row["kernel"], row["target"], tables.tile_of(row))
            for row in rows.to_dict("records")
        ]
        return rows[rows["num_stages"] == ruled]
    most = policy.removeprefix(MOST)
    if not policy.startswith(MOST) or (most and not (most.isdecimal() and int(most))):
        there = ", ".join((MOST, f"{MOST}2", *problems.POLICIES))
        raise ValueError(f"no stage policy {policy!r}; there are {there}")
    if most:
        rows = rows[rows["num_stages"] <= int(most)]
    # A run may have asked fewer counts than another.
    but = ("num_stages", "compile_key", "run")
    question = [name for name in records.KEY if name not in but]
    order = rows.assign(_fits=rows["status"] == "ok")
    # Of what fits the most, else the least.
    order["_rank"] = order["num_stages"].where(order["_fits"], -order["num_stages"])
    best = order.groupby(question, sort=False, dropna=False)["_rank"].transform("max")
    return rows[order["_rank"] == best]


def stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Set a tile's stage counts beside each other, problem by problem.

    Returns:
        one row per problem and tile: TFLOP/s at each stage count, missing where it doesn't
        fit; ``best`` stage count; what one stage loses against it, with a 95% interval.
        The best is the best of what was measured, so that a loss is never less than 0, and
        of counts that are alike the luckiest.
    """
    import pandas as pd

    timed = rows.dropna(subset=["time_us"])
    counts = sorted(timed["num_stages"].unique())
    found = []
    for names, of_tile in timed.groupby(TILING, sort=False, dropna=False):
        by_count = of_tile.set_index("num_stages")
        if 1 not in by_count.index:
            continue
        best = by_count["time_us"].idxmin()
        faster, low, high = measurements.faster(by_count.loc[1], by_count.loc[best])
        # Against itself there is nothing to be unsure of.
        lost = [100 * (1 - 1 / by) for by in (faster, low, high)] if best != 1 else [0.0] * 3
        at_counts = by_count["tflops"].reindex(counts)
        found.append((*names, *at_counts, best, *lost))
    columns = [_count_of_stages(count) for count in counts]
    return pd.DataFrame(found, columns=[*TILING, *columns, "best", LOSS, LOSS_LOW, LOSS_HIGH])


def losses(compared: pd.DataFrame) -> pd.DataFrame:
    """Sum up what one stage everywhere loses, along each `CURVE`.

    Args:
        compared: of `stages`.
    Returns:
        the median, least and most over the token counts, in percent of throughput.
    """
    grouped = compared.groupby(CURVE, sort=False)[LOSS]
    table = grouped.agg(median="median", least="min", most="max", problems="size")
    return table.rename(columns={n: f"{n} (%)" for n in ("median", "least", "most")}).reset_index()


def losses_along_m(compared: pd.DataFrame) -> pd.DataFrame:
    """Set what one stage loses at each token count beside each other, for each `KIND`.

    Args:
        compared: of `stages`.
    Returns:
        one row per kind, a column per token count: the median over layers and TP, in
        percent of throughput.
    """
    table = compared.groupby([*KIND, "m"], sort=False)[LOSS].median().unstack()
    table = table.sort_index(axis=1)
    table.columns = [f"M {m}" for m in table.columns]
    return table.reset_index()


def further(rows: pd.DataFrame) -> pd.DataFrame:
    """Say what each further stage costs in LDS and brings in throughput.

    Returns:
        one row per problem, tile and step, ``1 -> 2``: bytes added and needed, of the limit
        in percent; TFLOP/s reached, gained and in percent, with a 95% interval; workgroups
        that a compute unit then holds, and what stops more. No throughput where the stage
        doesn't fit.
    """
    import pandas as pd

    told = rows.dropna(subset=["lds_bytes"])
    found = []
    for names, of_tile in told.groupby(TILING, sort=False, dropna=False):
        by_count = of_tile.set_index("num_stages").sort_index()
        for count in by_count.index:
            if count - 1 not in by_count.index:
                continue
            before, after = by_count.loc[count - 1], by_count.loc[count]
            gains: list[Any] = [None] * 3
            if pd.notna(before["time_us"]) and pd.notna(after["time_us"]):
                gains = [100 * (by - 1) for by in measurements.faster(before, after)]
            found.append(
                (
                    *names,
                    f"{count - 1} -> {count}",
                    after["lds_bytes"] - before["lds_bytes"],
                    after["lds_bytes"],
                    100 * after["lds_bytes"] / after["lds_limit"],
                    after["tflops"],
                    after["tflops"] - before["tflops"],
                    *gains,
                    after["workgroups_per_cu"],
                    after["occupancy_limit"],
                    after["status"],
                )
            )
    columns = [STEP, ADDED, "LDS (bytes)", "of the limit (%)", "TFLOP/s", "gained (TFLOP/s)"]
    answers = [GAIN, GAIN_LOW, GAIN_HIGH, "workgroups per CU", "stopped by", "status"]
    table = pd.DataFrame(found, columns=[*TILING, *columns, *answers])
    floats = ["of the limit (%)", "TFLOP/s", "gained (TFLOP/s)", GAIN, GAIN_LOW, GAIN_HIGH]
    return table.astype(dict.fromkeys(floats, "Float64") | {ADDED: "Int64"})


def gains(steps: pd.DataFrame) -> pd.DataFrame:
    """Sum up what each further stage costs and brings, per `KIND` and tile.

    Args:
        steps: of `further`.
    Returns:
        over the problems where both stage counts fit: the most bytes that the stage adds,
        median, least and most gain in percent, and in how many problems the 95% interval
        lies above 0 and below; and in how many the stage doesn't fit.
    """
    by = [*KIND, "tile", "num_warps", STEP]
    marked = steps.assign(
        faster=steps[GAIN_LOW] > 0, slower=steps[GAIN_HIGH] < 0, refused=steps[GAIN].isna()
    )
    table = marked.groupby(by, sort=False).agg(
        **{
            ADDED: (ADDED, "max"),
            "median (%)": (GAIN, "median"),
            "least (%)": (GAIN, "min"),
            "most (%)": (GAIN, "max"),
            "problems": (GAIN, "count"),
            "surely faster": ("faster", "sum"),
            "surely slower": ("slower", "sum"),
            "doesn't fit": ("refused", "sum"),
        }
    )
    return tables.in_tile_order(table.reset_index())


def front(rows: pd.DataFrame) -> pd.DataFrame:
    """Mark the configurations that nothing beats on both LDS and throughput.

    Beaten is what another configuration of its problem beats on one of the two without being
    worse on the other, by the medians: within its interval a place on the front is luck.

    Returns:
        the rows that were timed, with `FRONT`.
    """
    timed = rows.dropna(subset=["lds_bytes", "tflops"])
    marked = timed.assign(**{FRONT: True})
    for _, problem in timed.groupby(_PROBLEM, sort=False, dropna=False):
        lds = problem["lds_bytes"].to_numpy(int)
        tflops = problem["tflops"].to_numpy(float)
        no_worse = (lds[None] <= lds[:, None]) & (tflops[None] >= tflops[:, None])
        better = (lds[None] < lds[:, None]) | (tflops[None] > tflops[:, None])
        marked.loc[problem.index, FRONT] = ~(no_worse & better).any(axis=1)
    return marked


def configurations(marked: pd.DataFrame) -> pd.DataFrame:
    """List what was timed, the front first in each problem, and which times are noisy.

    Args:
        marked: of `front`.
    Returns:
        LDS, throughput with half of its 95% interval, shares of limit and roof, occupancy,
        spilled registers per thread.
    """
    names = [*CURVE, "m", "tile", "num_warps", "num_stages"]
    problem = [*CURVE, "m"]
    ordered = marked.sort_values(
        [*problem, FRONT, "lds_bytes"], ascending=[*[True] * len(problem), False, True]
    )
    half = (ordered["time_high_us"] - ordered["time_low_us"]) / 2 / ordered["time_us"]
    return ordered[names].assign(
        **{
            "LDS (bytes)": ordered["lds_bytes"],
            "of the limit (%)": (100 * ordered["lds_bytes"] / ordered["lds_limit"]).round(1),
            "TFLOP/s": ordered["tflops"].round(1),
            "+- (%)": (100 * half).round(2),
            "of the roof (%)": (100 * ordered["tflops"] / ordered["roof_tflops"]).round(1),
            "workgroups per CU": ordered["workgroups_per_cu"],
            "stopped by": ordered["occupancy_limit"],
            "spilled registers": ordered["spilled_registers"],
            FRONT: ordered[FRONT].map({True: "yes", False: None}),
            "noisy": measurements.noisy(ordered).map({True: "noisy", False: None}),
        }
    )


def fronts(marked: pd.DataFrame) -> pd.DataFrame:
    """Count how often each stage count is on the front.

    Args:
        marked: of `front`.
    Returns:
        one row per kind, a column per stage count: so many configurations of those that
        were timed are on the front, ``64 of 64``.
    """
    by = [*KIND, "num_stages"]
    counted = marked.groupby(by, sort=False)[FRONT].agg(["sum", "size"]).astype("string")
    table = (counted["sum"] + " of " + counted["size"]).unstack().sort_index(axis=1)
    table.columns = [_count_of_stages(count) for count in table.columns]
    return table.reset_index()


def _count_of_stages(count: int) -> str:
    return f"{count} stage{'s' if count > 1 else ''}"


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the fastest configuration of each token count of each `CURVE`."""
    timed = rows.dropna(subset=["time_us"])
    return timed.loc[timed.groupby([*CURVE, "m"], sort=False)["time_us"].idxmin()]


def named(kernel: str, model: str, fast_accum: bool = False) -> str:
    """Name a `KIND` in words."""
    sums = f", {tables.SUMS[True]}" if fast_accum else ""
    return f"{kernel}, {model}{sums}"


def conclusion(rows: pd.DataFrame, compared: pd.DataFrame) -> str:
    """Sum the trade up in Markdown sentences, computed from the rows.

    Args:
        compared: of `stages`.
    """
    rows, compared = (inert.frame(of, inert.markdown) for of in (rows, compared))
    sentences = []
    launched = rows.dropna(subset=["loaded_lds_bytes"])
    equal = (launched["loaded_lds_bytes"] == launched["lds_bytes"]).sum()
    refused = (rows["status"] == "out_of_lds").sum()
    sentences.append(
        f"{', '.join(rows['gpu'].dropna().unique())}: {len(launched)} configurations were "
        f"launched and {equal} loaded the LDS that was told; {refused} were told not to fit and "
        "not launched."
    )
    if noisy := measurements.noisy(rows).sum():
        sentences.append(
            f"{noisy} of these times are noisy: a second measurement may miss them by "
            f"{100 * measurements.AGREEMENT:.0f}% or more."
        )
    steps, marked = further(rows), front(rows)
    for kind, of_kind in compared.groupby(KIND, sort=False):
        loss = of_kind[LOSS]
        best = ", ".join(map(str, sorted(of_kind["best"].unique())))
        second = steps[(steps[KIND] == list(kind)).all(axis=1) & (steps[STEP] == "1 -> 2")]
        second = second.dropna(subset=[GAIN])
        told = f"best are {best} stages"
        if len(second):
            told += (
                f"; the second stage adds up to {second[ADDED].max():,} bytes and brings "
                f"{second[GAIN].median():+.1f}%"
            )
        on_front = marked.loc[(marked[KIND] == list(kind)).all(axis=1), FRONT]
        sentences.append(
            f"**{named(*kind)}**: one stage loses {loss.median():.1f}% of throughput in the "
            f"median of {len(loss)} problems and tiles, {loss.max():.1f}% at most; {told}. "
            f"{(~on_front).sum()} of {len(on_front)} configurations are beaten on both LDS and "
            "throughput."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)
