"""What to launch instead: the neighbours of a configuration that fit, cheapest first.

A row out of LDS has many ways back: fewer stages, a shorter step along K, a narrower
block, other warps, async copy off. `search` asks for them, and here their rows are put in
order: by measured time where there is one, else by `expected_cost`, and each row says by
which. Only rows that were compiled in full are ever proposed: registers spill where LDS
alone looks fine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import records, tables, targets
from .specs import Target, Tile

if TYPE_CHECKING:
    import pandas as pd


# Both from one H100 and four stage counts of one tile; `expected_cost` has the figures.
# Bandwidth of the cache that programs share, over that of memory.
_CACHE_OVER_MEMORY = 2.0
# From a load's issue to its data in LDS, beyond what its bytes take.
_LATENCY_US = 0.2

# What CDNA 4's 16x16 instructions for fp8 and mx formats take of K at once. Of fewer,
# Triton 3.9.0 makes 16x16x32 in fp8, as quick as in bf16, and widens mx formats to bf16.
_GFX950_K = 128

_Y_BYTES = {"bf16": 2.0, "fp32": 4.0, "fp8": 1.0, "mxfp8": 33 / 32}
_MXFP4 = 17 / 32  # half a byte, and a 32nd of its group's scale


def _products(row: Mapping[str, Any], target: Target) -> list[tuple[int, float, float, float]]:
    """List a launch's products: columns, bytes per element of x and of w, peak TFLOP/s.

    Empty where the kernel or the target's peaks are unknown.
    """
    if _missing(row["n"]):
        return []
    peaks = target.peak_tflops
    if target.arch == "gfx950" and row["block_k"] < _GFX950_K:
        peaks = {"bf16": peaks["bf16"]}
    bf16 = peaks.get("bf16", math.nan)
    fp8 = peaks.get("fp8", bf16)
    # Without matrix units for mx formats the compiler widens both operands to bf16.
    scaled, narrow = (fp8, peaks["mxfp4"]) if "mxfp4" in peaks else (bf16, bf16)
    n, x = row["n"], 1.0 if _missing(row["x_format"]) or row["x_format"] == "fp8" else 33 / 32
    products = {
        "moe_gemm_a8w8": [(n, 1.0, 1.0, fp8)],
        "moe_gemm_a8w8_blockscale": [(n, 1.0, 1.0, fp8)],
        "moe_gemm_a8w4": [(n, x, _MXFP4, scaled)],
        "moe_gemm_a4w4": [(n, _MXFP4, _MXFP4, narrow)],
        # The second product adds fp32 to y for every step where the first reads x.
        "ff_a16w16_fused": [(n, 2.0, 2.0, bf16), (n // (1 + row["swiglu"]), 4.0, 2.0, bf16)],
        "fused_gemm_afp4wfp4_a16w16": [
            (n, _MXFP4, _MXFP4, narrow),
            (row["n_bf16"], 2.0, 2.0, bf16),
        ],
    }
    known = target.compute_units and target.bandwidth_tbps and not math.isnan(bf16)
    return products.get(row["kernel"], []) if known else []


def expected_cost(row: Mapping[str, Any]) -> float:
    """Estimate a launch's time in microseconds, to order configurations of one problem by.

    It orders and does not predict: clocks, bank conflicts, instruction order and the cost
    of copying by way of registers are not in it. With r workgroups resident on a compute
    unit, and each program's steps along K as many as ceil(k / block_k)::

        multiply = 2 block_m block_n block_k / (peak / units) * max(1, SIMDs / (r warps))
        load     = (block_m block_k x_bytes + block_n block_k w_bytes + spills)
                   / (cache bandwidth / units)
        wait     = latency + load + multiply         with one stage
                   (latency + load) / (stages - 1)   with more
        step     = max(multiply, load, wait / r)
        program  = steps step + (latency + load + store) / r
        time     = max(ceil(programs / units) program, traffic / memory bandwidth)

    - ``multiply``, ``load``: the roofline of one compute unit (Williams et al., CACM 2009),
      peaks from `targets`, on gfx950 bf16's where block_k is less than 128. Tiles count
      whole, so that padding of rows, n and k is paid.
    - ``wait``: one stage loads, then multiplies; s stages have s - 1 loads in flight while
      one multiplies (Triton's pipeliner), and r workgroups as many again (Little's law).
    - ``spills``: each spilled register of each thread is written and read once a step,
      through the same cache. Part of them lie outside the loop, so this is the most.
    - ``programs``: rows spread by chance leave half a tile of each expert empty; each
      expert that has rows has a tile. The last wave is paid whole.
    - ``traffic``: x and y once, w once for every group of 4 row tiles of an expert, which
      share it through the cache.

    Where a launch has two products, the programs of both are counted as if apart.

    The cache's bandwidth, twice that of memory, and the latency of 0.2 us come from a plain
    fp8 kernel on one H100 (Qwen3-235B-A22B layer 1, M 8704, 128x256x128, 8 warps): 572, 798,
    1017 and 1021 TFLOP/s with 1 to 4 stages. The formula gives 542, 785, 936 and 936, and
    at M 2560 and 15872 the same order within 17%. It does not tell 3 stages from 4, which
    differ by up to 7%. Over the 256 cells of the table published for the MI355X
    (ROCm/aiter#2723, one stage) its rank correlation is 0.98, with registers as Triton 3.9.0
    compiles this project's kernels; its times are 1.2 to 1.9 times too short (medians by
    model).

    Args:
        row: of a sweep. Without registers (`mode` is ``lds``) it is a lower bound:
            occupancy is what the LDS alone allows, and nothing spills.
    Returns:
        NaN where the row has no LDS, or the kernel or a figure of the target is unknown.
    """
    target = targets.get(row["target"])
    products = _products(row, target)
    if not products or _missing(row["lds_bytes"]):
        return math.nan
    block_m, block_n, block_k = row["block_m"], row["block_n"], row["block_k"]
    warps, stages = row["num_warps"], row["num_stages"]
    resident, spilled = row["workgroups_per_cu"], row["spilled_registers"]
    if _missing(resident):
        resident = targets.occupancy(target, row["lds_bytes"], 0, warps).workgroups_per_cu
        spilled = 0
    if not resident:
        return math.nan
    units = target.compute_units or 0
    memory = (target.bandwidth_tbps or 0.0) * 1e6  # bytes/us
    cache = memory * _CACHE_OVER_MEMORY / units
    rows = row["m"] * row["top_k"]
    experts = min(row["experts"], rows)
    row_tiles = -(-rows // block_m)
    if row["experts"] > 1:
        row_tiles = max(experts, rows / block_m + experts / 2)
    steps = math.ceil(math.ceil(row["k"] / row["split_k"]) / block_k)
    idle = max(1.0, target.simds_per_cu / (resident * warps))
    scratch = 2 * 4 * spilled * warps * target.warp_size
    store = block_m * block_n * _Y_BYTES[row["y_format"]] / cache
    programs = work = 0.0
    traffic = rows * _Y_BYTES[row["y_format"]] * (row["n"] / (1 + row["swiglu"]) + row["n_bf16"])
    for columns, x_bytes, w_bytes, peak in products:
        multiply = 2 * block_m * block_n * block_k / (peak * 1e6 / units) * idle
        load = (block_k * (block_m * x_bytes + block_n * w_bytes) + scratch) / cache
        fill = _LATENCY_US + load
        wait = fill + multiply if stages == 1 else fill / (stages - 1)
        step = max(multiply, load, wait / resident)
        count = row_tiles * math.ceil(columns / block_n) * row["split_k"]
        programs += count
        work += count * (steps * step + (fill + store) / resident)
        passes = max(1.0, row_tiles / experts / Tile.group_m)
        traffic += row["k"] * (rows * x_bytes + experts * columns * w_bytes * passes)
    waves = math.ceil(programs / units)
    return max(waves * work / programs, traffic / memory)


def _missing(value: Any) -> bool:
    """Tell whether a row has no such figure: absent, None, NaN or pandas' NA."""
    import pandas as pd

    return bool(pd.isna(value))


_WORDS = {
    "num_stages": "stages",
    "block_k": "block_k",
    "block_n": "block_n",
    "block_m": "block_m",
    "num_warps": "warps",
    "async_copy": "async copy",
}

UNCHANGED = "unchanged"


def changed(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Say in words what a row changes of the base: ``["block_k 256 -> 128"]``.

    Routing is laid out for block_m: whoever changes it routes anew.
    """

    def shown(name: str, of: Mapping[str, Any]) -> str:
        return str(of[name]) if name != "async_copy" else ("on" if of[name] else "off")

    return [
        f"{words} {shown(name, base)} -> {shown(name, row)}"
        for name, words in _WORDS.items()
        if not (_missing(row[name]) and _missing(base[name])) and row[name] != base[name]
    ]


_FORMATS = ("x_format", "y_format", "scale_layout")


def tilings(rows: pd.DataFrame) -> list[list[int]]:
    """Group the launches that differ in nothing but their problem's shape.

    Returns:
        positions in ``rows``; in each group first the launch to ask of, the one that needs
        the most LDS, and of those the one with the most work.
    """
    work = rows["m"] * rows["top_k"] * rows["n"] * rows["k"]
    # A launch without an answer says least.
    asked = tables.labelled(rows.assign(lds_bytes=rows["lds_bytes"].fillna(-1), work=work))
    asked = asked.reset_index(drop=True)
    shared = [*tables.TILING, "num_stages", tables.ASYNC_COPY, *_FORMATS, "args", "options"]
    return [
        launches.sort_values(["lds_bytes", "work"], ascending=False).index.to_list()
        for _, launches in asked.groupby(shared, sort=False, dropna=False)
    ]


def shortlist(rows: pd.DataFrame, base: Mapping[str, Any], most: int = 40) -> list[int]:
    """Choose which neighbours that fit are worth compiling in full.

    Those that change one setting come first, then those that change two, by
    `expected_cost`, which bounds from below while registers are unknown.

    Args:
        rows: of the probe, in order of nearness.
    Returns:
        at most ``most`` positions in ``rows``.
    """
    fitting = [(at, row) for at, row in enumerate(rows.to_dict("records")) if row["status"] == "ok"]

    def order(one: tuple[int, Mapping[str, Any]]) -> tuple[bool, float]:
        cost = expected_cost(one[1])
        single = len(changed(one[1], base)) < 2
        return not single, 0.0 if single or math.isnan(cost) else cost

    return sorted(at for at, _ in sorted(fitting, key=order)[:most])


# What a measurement must name to be one of a row's configuration.
_MEASURED_OF = ("kernel", "target", "num_warps", "num_stages", "m", "n", "k")
_BLOCKS = ["block_m", "block_n", "block_k", "split_k"]


def read_measured(path: Path | str) -> pd.DataFrame:
    """Read measurements from a ``.parquet`` or ``.csv`` file; see `check_measured`.

    Raises:
        ValueError: it can't be read; the message has the path and says why.
    """
    import pandas as pd

    path = Path(path)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": lambda path: records.stored(path).to_pandas(),
        ".csv": lambda path: pd.read_csv(records.require_readable(path)),
    }
    if path.suffix not in readers:
        raise records.UnreadableError(f"{path}: measurements are read from a .parquet or a .csv")
    try:
        return check_measured(readers[path.suffix](path))
    except records.UnreadableError:
        raise
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise records.UnreadableError(f"{path}: {error}") from None


def check_measured(measured: pd.DataFrame) -> pd.DataFrame:
    """Check measurements, and give each its tile in words and the types of a row.

    Args:
        measured: a row per measurement: kernel, target, tile (or block_m, block_n,
            block_k), num_warps, num_stages, m, n, k, and time_us, or tflops of useful
            FLOPs. Of any other column of `records.KEY` that it has, such as async_copy,
            triton or top_k, the value must be the row's too.
    Raises:
        ValueError: columns are missing; the message lists them.
    """
    missing = [name for name in _MEASURED_OF if name not in measured]
    if "tile" not in measured and not {*_BLOCKS[:3]} <= {*measured}:
        missing.append("tile")
    if not {"time_us", "tflops"} & {*measured}:
        missing.append("time_us or tflops")
    if missing:
        wanted = f"{', '.join(_MEASURED_OF)}, tile and time_us or tflops"
        raise ValueError(
            f"measurements have no column {', '.join(missing)}; they need {wanted}, and have "
            f"{', '.join(map(str, measured))}"
        )
    if "tile" not in measured:
        blocks = measured.assign(split_k=measured.get("split_k", 1), async_copy=None)
        measured = measured.assign(tile=tables.labelled(blocks)["tile"])
    types = {
        name: of for name, of in records.COLUMNS.items() if name in records.KEY and name in measured
    }
    return measured.astype({**types, "tile": "string"})


def _measured_us(rows: pd.DataFrame, measured: pd.DataFrame) -> pd.Series:
    """Give each row its median measured time in microseconds; NaN where there is none."""
    # `tile` has the blocks; a model's name is free.
    apart = {"mode", "compile_key", "model", *_BLOCKS}
    shared = ["tile", *(name for name in records.KEY if name in measured and name not in apart)]
    figures = measured.reindex(columns=["time_us", "tflops"]).astype("Float64")
    medians = measured[shared].join(figures).groupby(shared, dropna=False).median().reset_index()
    found = rows[shared].merge(medians, how="left", on=shared).set_index(rows.index)
    useful = 2 * rows["m"] * rows["top_k"] * rows["k"] * _columns(rows)
    return found["time_us"].fillna(useful / (found["tflops"] * 1e6)).astype(float)


def _columns(rows: pd.DataFrame) -> pd.Series:
    """Count the columns of all products of a launch; the feed-forward's second has n's half."""
    second = rows["n"] // (1 + rows["swiglu"].astype("Int64"))
    return rows["n"] + rows["n_bf16"] + second.where(rows["kernel"] == "ff_a16w16_fused", 0)


def rank(
    rows: pd.DataFrame, base: Mapping[str, Any], measured: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Order what was compiled in full and fits, cheapest first.

    Args:
        rows: of `sweep.run` with ``full=True``, nearest first; others are left out.
        base: the row that they are alternatives to; it may be among them.
        measured: as `check_measured` gives them. What has a measured time comes first, in
            that order; what has none follows.
    Returns:
        the rows under their index, labelled (`tables.labelled`), with ``changed``: what
        differs from the base, in words, or `UNCHANGED`; ``free_bytes`` of LDS;
        ``expected_cost`` over the least of these rows, missing where it is unknown;
        ``measured_time_us``; ``ordered_by``: ``measured on gfx950``, ``expected``, or
        ``nearness`` where no cost is known: after what spills least, what still has a load
        under way while it multiplies comes before one stage. Expected costs that are equal
        to a tenth are ordered by nearness.
    """
    import pandas as pd

    fits = (rows["status"] == "ok") & (rows["mode"] == "full")
    table = tables.labelled(rows[fits])
    of_rows = table.to_dict("records")
    changes = [", ".join(changed(row, base)) or UNCHANGED for row in of_rows]
    cost = pd.Series([expected_cost(row) for row in of_rows], table.index, dtype=float)
    time_us = pd.Series(math.nan, table.index)
    if measured is not None:
        time_us = _measured_us(table, measured)
    by = pd.Series("expected", table.index).where(cost.notna(), "nearness")
    table = table.assign(
        changed=pd.Series(changes, table.index, dtype="string"),
        free_bytes=table["lds_limit"] - table["lds_bytes"],
        expected_cost=cost / cost.min(),
        measured_time_us=time_us,
        ordered_by=by.where(time_us.isna(), "measured on " + table["target"].astype(str)),
    )
    # The formula tells no tenth from the next: there the nearer comes first, as rows do.
    order = table[["measured_time_us", "expected_cost"]].round({"expected_cost": 1})
    unknown = cost.isna()
    order = order.assign(
        spilled=table["spilled_registers"].where(unknown, 0),
        unpipelined=(table["num_stages"] == 1) & unknown,
    )
    return table.loc[order.sort_values([*order], kind="stable").index]


def first(ranked: pd.DataFrame, base: Mapping[str, Any], top: int) -> pd.DataFrame:
    """Take the first ``top`` rows, and fewer stages alone, the quick fix, wherever it comes."""
    fix = ranked.index.isin(_fewer_stages(ranked, base).index[:1])
    fix[:top] = True
    return ranked[fix]


def _fewer_stages(ranked: pd.DataFrame, base: Mapping[str, Any]) -> pd.DataFrame:
    alone = ranked["changed"].str.fullmatch(r"stages \d+ -> \d+")
    return ranked[alone & (ranked["num_stages"] < base["num_stages"])]


def verdict(ranked: pd.DataFrame, base: Mapping[str, Any]) -> str:
    """Say in a sentence or two what is wrong with a configuration and what to do instead.

    Args:
        ranked: its alternatives, as `rank` gives them.
        base: its row.
    """
    known = not _missing(base["split_k"])
    tile = f" {tables.tile_of(base)}" if known else _constants(base["args"])
    stages = _counted(base["num_stages"], "stage")
    what = f"{base['kernel']}{tile}, {_counted(base['num_warps'], 'warp')}, {stages}"
    if not _missing(base["async_copy"]):
        what += f", async copy {'on' if base['async_copy'] else 'off'}"
    what += f", on {base['target']}"
    if base["status"] == "ok":
        said = f"{what} fits: {base['lds_bytes']:,} of {base['lds_limit']:,} bytes."
    elif base["status"] == "out_of_lds":
        said = f"{what} needs {base['lds_bytes']:,} of {base['lds_limit']:,} bytes."
    else:
        said = f"{what}: {base['status']}: {base['reason']}"
    if ranked.empty:
        return said if base["status"] == "ok" else f"{said} No neighbour that was compiled fits."
    best = ranked.iloc[0]
    if best["changed"] == UNCHANGED:
        return f"{said} No neighbour comes before it."
    said += f" First choice: {_proposed(best)}."
    fewer = _fewer_stages(ranked, base)
    if len(fewer) and fewer.index[0] != ranked.index[0]:
        said += f" Fewer stages alone: {_proposed(fewer.iloc[0])}."
    return said


def _constants(args: Any) -> str:
    """List the numbers among a launch's constants, which tell an autotuner's choices apart."""
    given = {} if _missing(args) else json.loads(args)
    return "".join(f", {name} {of}" for name, of in given.items() if isinstance(of, (int, float)))


def _proposed(row: Mapping[str, Any]) -> str:
    """Describe one alternative: what changes, what it needs, what it costs."""
    if row["ordered_by"] == "expected":
        cost = f"expected {row['expected_cost']:.2f}x of the least"
    elif row["ordered_by"] == "nearness":
        cost = "of unknown cost"
    else:
        cost = f"{row['measured_time_us']:,.4g} us {row['ordered_by']}"
    spilled = row["spilled_registers"]
    spills = f"{_counted(spilled, 'register')} spilled" if spilled else "nothing spilled"
    return f"{row['changed']} ({row['lds_bytes']:,} bytes, {spills}, {cost})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
