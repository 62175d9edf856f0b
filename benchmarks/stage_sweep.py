"""What does each further stage bring and cost on the GPU at hand?

Every MoE GEMM with the models it is served with, both layers, TP 1 and 4: the tiles that
the published rules choose, from one stage to as many as fit and one beyond; and one layer
with many tiles, its sums left to the matrix units, which no rule was made for. Writes the
rows of `bench.measure` as Parquet, with their samples and what made them.
"""

import argparse
import sys
from dataclasses import replace

import at_hand
import pandas as pd

from moelab import bench, plan, problems, records, sweep

# Of Qwen3-235B's layer 1 at M 8704.
TILES = {
    4: "64x128x128,64x128x128+tma,64x256x128+tma,128x128x128+tma",
    8: (
        "64x128x256,64x256x128,128x64x128,128x128x64,128x128x128,128x128x256,128x256x64,"
        "128x256x128,128x256x128+tma,128x256x128+tma+tails2,256x128x128,256x128x128+tma"
    ),
}

STAGES = tuple(range(1, 9))
MODELS = "Qwen3-235B-A22B,Llama4 Maverick,GPT-OSS 120B,DeepSeek-R1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="stage_sweep.parquet")
    parser.add_argument("--store", default="rows")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--tp", default="1,4")
    parser.add_argument("--m", default="all")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    target = at_hand.target()
    asked = []
    for model in given.models.split(","):
        for kernel in problems.MODELS[model].kernels:
            if kernel not in problems.DENSE:
                asked += plan.grid(
                    kernels=kernel,
                    targets=target,
                    models=model,
                    layers="all",
                    tp=given.tp,
                    m=given.m,
                    stages=STAGES,
                )
    for warps, tiles in TILES.items():
        asked += plan.grid(
            kernels="moe_gemm_a8w8",
            targets=target,
            models="Qwen3-235B-A22B",
            m=8704,
            tiles=tiles,
            warps=warps,
            stages=STAGES,
            fast_accum=True,
        )
    status = sweep.run(asked, given.store)["status"]
    fits = dict(zip(asked, status == "ok", strict=True))
    # To as many as fit, and one beyond.
    chosen = [
        of
        for of in asked
        if all(fits[replace(of, num_stages=fewer)] for fewer in range(1, of.num_stages))
    ]
    # Problems that share their weights follow one another.
    models = given.models.split(",")
    chosen.sort(
        key=lambda of: (
            models.index(of.problem.model),
            of.kernel,
            of.problem.layer,
            of.problem.tp,
        )
    )
    rows = bench.measure(chosen, given.store, rounds=given.rounds, repetitions=given.repetitions)
    records.export(rows, given.out)
    with pd.option_context("display.max_rows", None, "display.width", 200):
        print(rows.groupby(["kernel", "model", "status"]).size())
    return 0


if __name__ == "__main__":
    sys.exit(main())
