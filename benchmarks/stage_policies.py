"""What do stage policies bring on the GPU at hand, each beside another in one run?

One stage everywhere, two where two fit, and as many as fit: three comparisons by
`moelab.ab`, of four MoE GEMMs with the models they are served with, both layers and the
published tiles. Prints each verdict and writes each comparison's rows as Parquet.

    python benchmarks/stage_policies.py --out policies
"""

import argparse
import sys
from pathlib import Path

import at_hand
import pandas as pd

from moelab import ab, plan, records, regress

SERVED = (
    ("moe_gemm_a8w8", "Qwen3-235B-A22B"),
    ("moe_gemm_a8w8", "Llama4 Maverick"),
    ("moe_gemm_a8w4", "GPT-OSS 120B"),
    ("moe_gemm_a4w4", "DeepSeek-R1"),
)
COMPARISONS = {
    "most_against_one": ("stages=most", "stages=1"),
    "two_against_one": ("stages=most2", "stages=1"),
    "most_against_two": ("stages=most", "stages=most2"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("policies"), help="folder of the rows")
    parser.add_argument("--store", default="rows")
    parser.add_argument("--only", default=",".join(COMPARISONS), help="of the comparisons")
    parser.add_argument("--tp", default="1,4")
    parser.add_argument("--m", default="512,2560,8704,15872")
    parser.add_argument("--rounds", type=int, default=ab.ROUNDS)
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    target = at_hand.target()
    asked = [
        of
        for kernel, model in SERVED
        for of in plan.grid(
            kernels=kernel,
            models=model,
            targets=target,
            layers="all",
            tp=given.tp,
            m=given.m,
            # Each side names its own.
            stages=1,
        )
    ]
    told = {}
    for name in given.only.split(","):
        base, candidate = map(ab.Side.parse, COMPARISONS[name])
        rows = ab.measure(
            asked,
            base,
            candidate,
            given.store,
            rounds=given.rounds,
            repetitions=given.repetitions,
        )
        records.export(rows, given.out / f"{name}.parquet")
        compared = ab.judged(rows)
        mean, low, high = regress.overall(compared) or (float("nan"),) * 3
        told[f"{candidate} against {base}"] = {
            **regress.counts(compared),
            "time": f"x{mean:.3f} ({low:.3f} to {high:.3f})",
        }
        print(f"\n{name}: {regress.text(compared)}", flush=True)
    print("\n" + pd.DataFrame(told).T.fillna(0).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
