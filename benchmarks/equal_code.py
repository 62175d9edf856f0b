"""Is equal code ever called changed on the GPU at hand?

An A/A comparison: both sides of more than 200 cells launch the same configuration. Four MoE
GEMMs with the models they are served with, both layers, M from 512 to 8704 at TP 4, the
published tiles and some of another shape; 20 of the cells through two processes a round, as two
Tritons or two sources of a kernel are compared. All cells are judged together, as one comparison.
Prints what was called changed, which should be nothing, and the noise that was met. Exits 1 if
something was, or if fewer than 200 cells were timed.

    python benchmarks/equal_code.py --out equal_code.parquet
"""

import argparse
import sys

import at_hand
import numpy as np
import pandas as pd

from moelab import ab, paired_rounds, plan, records, regress

SERVED = {
    "moe_gemm_a8w8": "Qwen3-235B-A22B,Llama4 Maverick",
    "moe_gemm_a8w8_blockscale": "DeepSeek-R1",
    "moe_gemm_a8w4": "GPT-OSS 120B",
    "moe_gemm_a4w4": "DeepSeek-R1",
}
# Of Qwen3-235B, besides the published one.
TILES = {4: "64x128x128", 8: "64x256x128,128x128x128,128x256x128,128x256x128+tma"}
LEAST = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="equal_code.parquet")
    parser.add_argument("--store", default="rows")
    parser.add_argument("--m", default="512,2560,4608,8704")
    parser.add_argument("--m-apart", default="512", help="through two processes a round")
    parser.add_argument("--rounds", type=int, default=ab.ROUNDS)
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    target = at_hand.target()
    same = {"targets": target, "layers": "all", "tp": 4}
    together, apart = (
        [
            of
            for kernel, models in SERVED.items()
            for of in plan.grid(kernels=kernel, models=models, m=m, stages="1,2", **same)
        ]
        for m in (given.m, given.m_apart)
    )
    for warps, tiles in TILES.items():
        together += plan.grid(
            kernels="moe_gemm_a8w8",
            models="Qwen3-235B-A22B",
            m=given.m,
            tiles=tiles,
            warps=warps,
            stages="1,2,3",
            **same,
        )
    how = {"rounds": given.rounds, "repetitions": given.repetitions}
    measured = []
    for asked, in_two in ((together, False), (apart, True)):
        # What was measured is worth keeping, whatever becomes of the rest.
        measured.append(ab.measure(asked, ab.Side(), ab.Side(), given.store, apart=in_two, **how))
        records.export(pd.concat(measured, ignore_index=True), given.out)
    rows = pd.concat(measured, ignore_index=True)
    compared = ab.judged(rows)
    print(regress.text(compared))
    for title, part in zip(("in one process", "in two processes"), measured, strict=True):
        tell(title, ab.judged(part).cells, part)
    timed = compared.cells[compared.cells["how"] == regress.PAIRED]
    changed = timed["speed"].isin(["regressed", "improved"]).sum()
    print(f"{len(timed)} pairs of equal code, {changed} called changed")
    return int(bool(changed) or len(timed) < LEAST)


def tell(title: str, cells: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Print the noise of one run's cells."""
    timed = cells[cells["how"] == regress.PAIRED]
    off = np.log(timed["ratio"].astype(float))
    low, high = (np.log(timed[name].astype(float)) for name in ("ratio_low", "ratio_high"))
    rounds = timed["rounds"].value_counts().sort_index()
    print(
        f"\n{title}: {len(timed)} pairs, after "
        + ", ".join(f"{number} rounds {count}" for number, count in rounds.items())
        + f"\n  times differ by {off.abs().median():.2%} in the median, {off.abs().max():.2%} at "
        f"most, {off.mean():+.3%} on average; intervals hold equality in "
        f"{((low <= 0) & (high >= 0)).mean():.1%}"
    )
    for name, value in paired_rounds.noise(rows).items():
        print(f"  {name}: {value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
