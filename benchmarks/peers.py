"""How do our kernels do against other people's on the GPU at hand?

Of each kernel the models it is served with, both layers, four token counts, and both ways to
sum where there are two: the configurations that were tuned for it and a few that are good on
an H200, in turns with every peer that is installed (`moelab.peers`). Writes the rows of
`bench.measure` as Parquet, with their samples and what made them.

    python benchmarks/peers.py --only blockscale,a8w4 --m 8704 --out peers.parquet
"""

import argparse
import sys
from dataclasses import dataclass, replace

import at_hand
import pandas as pd

from moelab import bench, peers, plan, records, standings, tuned

# Good on an H200: tiles, warps, stages.
FAST = """
    128x256x128+tma+tails2 8 4, 128x256x128+tma+persistent 8 3, 64x256x128+tma 4 5,
    32x128x128+tma 4 5, 32x128x256+tma 4 3, 16x128x256+tma 4 4"""
PRECISE = """
    128x256x128+specialized 4 4, 64x256x128+tma 8 4, 64x128x128+tma 4 4, 32x128x256+tma 4 3,
    16x128x256+tma 4 4"""
BLOCKSCALE = """
    128x256x128+specialized 4 4, 128x128x128+tma+tails1 8 4, 64x128x128+tma 4 3,
    64x128x128+tma 4 4, 32x128x128+tma 4 4"""
HOPPER_FAST = """
    256x128x128+tails2 8 4, 128x128x128+tails1 4 4, 128x128x128+tails2 4 4,
    128x128x128+group8 4 4, 32x256x128 4 5, 32x128x128+tails1 4 4"""
HOPPER_PRECISE = """
    128x128x128+tails1 8 4, 64x128x128+tails1 4 4, 32x128x128 4 6"""


@dataclass(frozen=True)
class Group:
    """Problems that share their candidates and their peers.

    Args:
        models: with their tensor parallelism.
        fast, precise: candidates; "" leaves the class out.
    """

    kernel: str
    models: tuple[tuple[str, int], ...]
    peers: tuple[str, ...]
    fast: str
    precise: str
    scale_layout: str = "rows"


_SPARSE = (("GPT-OSS 120B", 1), ("DeepSeek-R1", 1))
_MXFP4 = ("triton_kernels_bf16", "torch_bf16")
GROUPS = {
    "a8w8": Group(
        "moe_gemm_a8w8",
        (("Qwen3-235B-A22B", 1), ("Llama4 Maverick", 4)),
        ("torch", "torch_precise", "triton_kernels"),
        FAST,
        PRECISE,
    ),
    "blockscale": Group(
        "moe_gemm_a8w8_blockscale", (("DeepSeek-R1", 1),), ("deep_gemm",), "", BLOCKSCALE
    ),
    "a8w4": Group("moe_gemm_a8w4", _SPARSE, _MXFP4, HOPPER_FAST, HOPPER_PRECISE, "hopper"),
    "a4w4": Group("moe_gemm_a4w4", _SPARSE, _MXFP4, HOPPER_FAST, HOPPER_PRECISE, "hopper"),
}


def configurations(group, model, tp, layer, m, fast_accum, target):
    """Ask for the candidates, and for what was tuned for the shape."""
    asked = []
    for candidate in (group.fast if fast_accum else group.precise).split(","):
        tile, warps, stages = candidate.split()
        asked += plan.grid(
            kernels=group.kernel,
            targets=target,
            models=model,
            layers=layer,
            tp=tp,
            m=m,
            tiles=tile,
            warps=warps,
            stages=stages,
            scale_layout=group.scale_layout,
            fast_accum=fast_accum,
        )
    plain = peers.plain(asked[0].problem)
    if best := tuned.best(group.kernel, plain, target):
        settings = {"num_warps": best.num_warps, "num_stages": best.num_stages}
        asked.append(replace(asked[0], tile=best.tile, **settings))
    return list(dict.fromkeys(replace(of, problem=plain) for of in asked))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="peers.parquet")
    parser.add_argument("--store", default="rows")
    parser.add_argument("--only", default=",".join(GROUPS), help="of these")
    parser.add_argument("--models", help="of those; if not given, all")
    parser.add_argument("--layers", default="1,2")
    parser.add_argument("--m", default="512,2560,8704,15872")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=2)
    given = parser.parse_args()
    target = at_hand.target()
    asked, named = [], []
    for group in map(GROUPS.__getitem__, given.only.split(",")):
        named += group.peers
        # Problems that share their weights follow one another.
        asked += [
            of
            for model, tp in group.models
            if given.models is None or model in given.models.split(",")
            for layer in given.layers.split(",")
            for fast_accum in (True, False)
            if (group.fast if fast_accum else group.precise)
            for m in given.m.split(",")
            for of in configurations(group, model, tp, layer, m, fast_accum, target)
        ]
    rows = bench.measure(
        asked,
        given.store,
        rounds=given.rounds,
        repetitions=given.repetitions,
        peers=tuple(dict.fromkeys(named)),
    )
    records.export(rows, given.out)
    measured = standings.measured(given.out)
    table = standings.cells(measured)
    with pd.option_context("display.max_rows", None, "display.width", 250):
        print(rows.groupby(["kernel", "peer", "status"], dropna=False).size())
        print(standings.shown(table).to_string(index=False))
    print(standings.conclusion(measured, table))
    print(standings.losses(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
