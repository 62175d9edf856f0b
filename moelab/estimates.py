"""Published estimates of LDS on trial: each formula's bytes beside the compiler's.

Kernel libraries and tuners decide from a formula over tile, types and stages whether a
configuration fits. Here each formula stands with its source, its own limit and what it
speaks of; rows that the compiler answered tell where it rejects what fits and admits what
doesn't. Formulas are also evaluated where they don't speak, and counted apart.

A and B are the operand tiles, ``block_m x block_k`` and ``block_k x block_n`` elements at
packed widths, so that an element of mxfp4 is half a byte. Of mx scales only triton_kernels'
formula counts any bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import tables, targets
from .specs import Tile

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Operands:
    """What the tiles of a kernel hold.

    Args:
        a_bits, b_bits: of one element of x and of w.
        a_scaled, b_scaled: an e8m0 scale byte lies beside every 32 elements along K.
    """

    a_bits: int
    b_bits: int
    a_scaled: bool = False
    b_scaled: bool = False

    def tile_bytes(self, tile: Tile) -> tuple[int, int]:
        """Bytes of one A and one B.

        >>> Operands(8, 4).tile_bytes(Tile(32, 512, 256))
        (8192, 65536)
        """
        return (
            tile.block_m * tile.block_k * self.a_bits // 8,
            tile.block_k * tile.block_n * self.b_bits // 8,
        )


OPERANDS = {
    "moe_gemm_a8w8": Operands(8, 8),
    "moe_gemm_a8w8_blockscale": Operands(8, 8),
    "moe_gemm_a8w4": Operands(8, 4, b_scaled=True),
    "moe_gemm_a4w4": Operands(4, 4, a_scaled=True, b_scaled=True),
}


@dataclass(frozen=True)
class Estimate:
    """A published formula.

    Args:
        name: who uses it.
        source: where it was read.
        formula: in words.
        lds_bytes: of operands, tile and ``num_stages``.
        speaks_of: operands, target and async copy (None without the switch).
        limit: bytes that it compares with, where that isn't the target's own limit.
    """

    name: str
    source: str
    formula: str
    lds_bytes: Callable[[Operands, Tile, int], int]
    speaks_of: Callable[[Operands, targets.Target, bool | None], bool]
    limit: int | None = None


def padded(elements: int, every: int, by: int) -> int:
    """Count elements with ``by`` more between every ``every`` of them, and none at the end.

    >>> padded(8192, 32, 4)
    9212
    >>> padded(33, 32, 4)
    37
    """
    return elements + (elements - 1) // every * by


def _padded_tiles(operands: Operands, tile: Tile, num_stages: int) -> int:
    def most(elements: int, row: int) -> int:
        return max(padded(elements, 32, 4), padded(elements, row, 8))

    a = most(tile.block_m * tile.block_k, tile.block_k)
    b = most(tile.block_k * tile.block_n, tile.block_n)
    return num_stages * (a * operands.a_bits + b * operands.b_bits) // 8


def _all_stages(operands: Operands, tile: Tile, num_stages: int) -> int:
    return num_stages * sum(operands.tile_bytes(tile))


def _one_less(operands: Operands, tile: Tile, num_stages: int) -> int:
    return max(num_stages - 1, 1) * sum(operands.tile_bytes(tile))


def _one_less_or_largest(operands: Operands, tile: Tile, num_stages: int) -> int:
    if num_stages == 1:
        return max(operands.tile_bytes(tile))
    return _one_less(operands, tile, num_stages)


def _tiles(operands: Operands, tile: Tile, num_stages: int) -> int:
    return sum(operands.tile_bytes(tile))


def _with_scales(operands: Operands, tile: Tile, num_stages: int) -> int:
    scales = operands.a_scaled * tile.block_m + operands.b_scaled * tile.block_n
    return num_stages * (sum(operands.tile_bytes(tile)) + tile.block_k // 32 * scales)


def _amd_with_async_copy(of: Operands, target: targets.Target, async_copy: bool | None) -> bool:
    return target.backend == "hip" and async_copy is True


def _amd_without_async_copy(of: Operands, target: targets.Target, async_copy: bool | None) -> bool:
    return target.backend == "hip" and not async_copy


def _amd_fp8(of: Operands, target: targets.Target, async_copy: bool | None) -> bool:
    return target.backend == "hip" and of.a_bits == of.b_bits == 8


def _nvidia_fp8(of: Operands, target: targets.Target, async_copy: bool | None) -> bool:
    return target.backend == "cuda" and of.a_bits == of.b_bits == 8


def _nvidia(of: Operands, target: targets.Target, async_copy: bool | None) -> bool:
    return target.backend == "cuda"


ESTIMATES = (
    Estimate(
        "aiter, tritonBLAS: padded",
        "ROCm/aiter#3372, pick_gemm_num_stages with use_async_padding, which asks about 2 stages "
        "alone; ROCm/tritonBLAS#72, about any",
        "stages x (padded A + padded B)",
        _padded_tiles,
        _amd_with_async_copy,
    ),
    Estimate(
        "tritonBLAS: no async copy",
        "ROCm/tritonBLAS#87 and ROCm/rocm-libraries#6604, estimate_triton_lds_bytes; "
        "ROCm/aiter#3372 without use_async_padding",
        "(stages - 1) x (A + B), the larger of both for one stage",
        _one_less_or_largest,
        _amd_without_async_copy,
    ),
    Estimate(
        "vLLM on ROCm",
        "vllm-project/vllm, prune_rocm_configs of benchmarks/kernels/benchmark_moe.py",
        "A + B, whatever the stages, against 65,536",
        _tiles,
        # Its elements have one byte or two.
        _amd_fp8,
        limit=65536,
    ),
    Estimate(
        "sglang #29484",
        "sgl-project/sglang#29484: 8 and 16-bit operands; ROCm and int4 are skipped",
        "stages x (A + B)",
        _all_stages,
        _nvidia_fp8,
    ),
    Estimate(
        "sglang #28038",
        "sgl-project/sglang#28038: nothing is clamped but on CUDA; mxfp4 is none of its types",
        "(stages - 1) x (A + B), A + B for one stage",
        _one_less,
        _nvidia_fp8,
    ),
    Estimate(
        "triton_kernels",
        "triton-lang/triton at c643a7838b, compute_num_stages of triton_kernels' "
        "opt_flags_nvidia.py, for a kernel that is not persistent",
        "stages x (A + B + their mx scales)",
        _with_scales,
        _nvidia,
    ),
)

RIGHT, REJECTS, ADMITS = "right", "wrongly rejects", "wrongly admits"
VERDICTS = (REJECTS, ADMITS, RIGHT)
SPOKEN_OF = "spoken of"
ESTIMATED, COMPILED = "estimated (bytes)", "compiled (bytes)"
DIFFERENCE = "difference (bytes)"
LIMIT, OWN_LIMIT = "limit (bytes)", "estimate's limit (bytes)"
_CONFIGURATION = ["kernel", "target", "tile", "num_warps", "num_stages", tables.ASYNC_COPY]


def judge(rows: pd.DataFrame) -> pd.DataFrame:
    """Set every estimate beside every row whose LDS is known.

    Args:
        rows: of kernels in `OPERANDS`; others are left out.
    Returns:
        one row per row and estimate: bytes estimated and compiled, estimated less compiled,
        both limits, whether the estimate speaks of it, and its verdict there all the same,
        one of `VERDICTS`.
    """
    import pandas as pd

    known = tables.labelled(rows[rows["kernel"].isin(OPERANDS)].dropna(subset=["lds_bytes"]))
    mxfp8 = known["x_format"].eq("mxfp8").fillna(False)
    judged = []
    for row, scaled in zip(known.to_dict("records"), mxfp8, strict=True):
        operands = OPERANDS[row["kernel"]]
        if scaled:
            operands = replace(operands, a_scaled=True)
        target = targets.get(row["target"])
        tile = Tile(row["block_m"], row["block_n"], row["block_k"])
        switch = None if pd.isna(row["async_copy"]) else bool(row["async_copy"])
        compiled, limit = row["lds_bytes"], row["lds_limit"]
        for estimate in ESTIMATES:
            estimated = estimate.lds_bytes(operands, tile, row["num_stages"])
            own = estimate.limit or limit
            judged.append(
                {
                    "estimate": estimate.name,
                    **{name: row[name] for name in ("triton", *_CONFIGURATION)},
                    ESTIMATED: estimated,
                    COMPILED: compiled,
                    DIFFERENCE: estimated - compiled,
                    LIMIT: limit,
                    OWN_LIMIT: own,
                    SPOKEN_OF: estimate.speaks_of(operands, target, switch),
                    "verdict": _verdict(estimated <= own, compiled <= limit),
                }
            )
    columns = [
        *("estimate", "triton", *_CONFIGURATION),
        *(ESTIMATED, COMPILED, DIFFERENCE, LIMIT, OWN_LIMIT, SPOKEN_OF, "verdict"),
    ]
    return pd.DataFrame(judged, columns=columns).astype({SPOKEN_OF: bool})


def _verdict(admitted: bool, fits: bool) -> str:
    if admitted == fits:
        return RIGHT
    return ADMITS if admitted else REJECTS


def trial(judged: pd.DataFrame) -> pd.DataFrame:
    """Count verdicts per estimate, kernel, target and async copy.

    Returns:
        one row each: whether the estimate speaks of it, configurations, how many fit, a
        column per verdict, and the median, least and most of estimated less compiled bytes.
        What is not spoken of comes last.
    """
    import pandas as pd

    counted = []
    by = ["estimate", "kernel", "target", tables.ASYNC_COPY, SPOKEN_OF]
    for names, group in judged.groupby(by, sort=False):
        verdicts = group["verdict"].value_counts()
        counted.append(
            {
                **dict(zip(by, names, strict=True)),
                "configurations": len(group),
                "fit": int((group[COMPILED] <= group[LIMIT]).sum()),
                **{verdict: int(verdicts.get(verdict, 0)) for verdict in VERDICTS},
                "median difference (bytes)": round(group[DIFFERENCE].median()),
                "least (bytes)": group[DIFFERENCE].min(),
                "most (bytes)": group[DIFFERENCE].max(),
            }
        )
    columns = [*by, "configurations", "fit", *VERDICTS]
    columns += ["median difference (bytes)", "least (bytes)", "most (bytes)"]
    table = pd.DataFrame(counted, columns=columns)
    return table.sort_values(
        [SPOKEN_OF, "estimate"], key=_in_order, kind="stable", ignore_index=True
    )


def _in_order(column: pd.Series) -> pd.Series:
    """Sort estimates as `ESTIMATES` has them, and what is spoken of first."""
    if column.name == SPOKEN_OF:
        return ~column
    if column.name == "estimate":
        return column.map([estimate.name for estimate in ESTIMATES].index)
    return column


def mistakes(judged: pd.DataFrame, most: int | None = None) -> pd.DataFrame:
    """List what each estimate gets wrong of what it speaks of, furthest off first.

    Args:
        most: of each estimate and verdict only so many; None lists all.
    """
    wrong = judged[judged[SPOKEN_OF] & (judged["verdict"] != RIGHT)]
    furthest = wrong[DIFFERENCE].abs().sort_values(ascending=False, kind="stable").index
    wrong = wrong.loc[furthest].sort_values(["estimate", "verdict"], key=_in_order, kind="stable")
    if most is not None:
        wrong = wrong.groupby(["estimate", "verdict"], sort=False).head(most)
    columns = ["estimate", "verdict", "kernel", "target", "tile", "num_stages"]
    columns += [ESTIMATED, COMPILED, DIFFERENCE, LIMIT, "num_warps", tables.ASYNC_COPY]
    return wrong[columns].reset_index(drop=True)


def formulas() -> pd.DataFrame:
    """Show every estimate with its formula and source."""
    import pandas as pd

    return pd.DataFrame(
        [{"estimate": of.name, "formula": of.formula, "source": of.source} for of in ESTIMATES]
    )


def conclusion(judged: pd.DataFrame) -> str:
    """Sum the trial up in Markdown sentences, computed from the rows."""
    return "\n".join(f"- {sentence}" for sentence in _sentences(judged))


def _sentences(judged: pd.DataFrame) -> Iterator[str]:
    for estimate in ESTIMATES:
        of_it = judged[judged["estimate"] == estimate.name]
        spoken, others = of_it[of_it[SPOKEN_OF]], of_it[~of_it[SPOKEN_OF]]
        start = f"**{estimate.name}**, {estimate.formula}:"
        if spoken.empty:
            yield f"{start} speaks of none of the {len(others):,} configurations."
            continue
        low, high = spoken[DIFFERENCE].min(), spoken[DIFFERENCE].max()
        wrong = (spoken["verdict"] != RIGHT).groupby(spoken["num_stages"]).sum()
        by_stages = ", ".join(f"{count:,} at {stages}" for stages, count in wrong.items())
        yield (
            f"{start} of {len(spoken):,} configurations that it speaks of, {_fitting(spoken):,} "
            f"fit. It {_counted(spoken)} (both, by stages: {by_stages}). It is {low:+,} to "
            f"{high:+,} bytes off."
        )
        elsewhere = [
            f"on {target} it {_counted(of_target)} "
            f"({_fitting(of_target):,} of {len(of_target):,} fit)"
            for target, of_target in others.groupby("target")
        ]
        if elsewhere:
            yield f"Where **{estimate.name}** does not speak, {'; '.join(elsewhere)}."


def _fitting(judged: pd.DataFrame) -> int:
    return int((judged[COMPILED] <= judged[LIMIT]).sum())


def _counted(judged: pd.DataFrame) -> str:
    rejected, admitted = ((judged["verdict"] == verdict).sum() for verdict in (REJECTS, ADMITS))
    return f"rejects {rejected:,} that fit and admits {admitted:,} that don't"
