"""What does summing fp8 products in fp32 cost on the GPU at hand, and what does it save?

moe_gemm_a8w8 moves partial sums to fp32 every 128 products unless `fast_accum` leaves them
to the tensor cores. Qwen3-235B-A22B's first layer, random routing; medians between CUDA
events, L2 flushed, and the error of the worst element against the float64 reference, over
the largest element. Exits 1 without a GPU.
"""

import argparse
import functools
import sys

import torch
from triton.testing import do_bench

from moelab.kernels.epilogue import SwiGLU, finish_reference
from moelab.kernels.formats import quantize_fp8
from moelab.kernels.moe_gemm_a8w8 import moe_gemm_a8w8
from moelab.kernels.router import route
from moelab.problems import problem
from moelab.specs import Tile
from moelab.workloads import draw

TILES = ((Tile(128, 128, 128), 4), (Tile(128, 128, 128), 8), (Tile(128, 256, 128), 8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=8704, help="tokens before top-k")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    of = problem("Qwen3-235B-A22B", layer=1, tp=1, m=given.m)
    generator = torch.Generator("cuda").manual_seed(given.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x, x_scale = quantize_fp8(normal(of.m, of.k), torch.float8_e4m3fn)
    w = torch.empty((of.experts, of.n, of.k), dtype=torch.float8_e4m3fn, device="cuda")
    w_scale = torch.empty(of.experts, device="cuda")
    for expert in range(of.experts):
        w[expert], w_scale[expert : expert + 1] = quantize_fp8(
            normal(of.n, of.k) * (3 / of.k**0.5), torch.float8_e4m3fn
        )
    chosen, weight = draw("uniform", of.m, of.experts, of.top_k, generator)
    flops = 2 * of.rows * of.n * of.k
    print(f"{torch.cuda.get_device_name()}, {of.model} layer 1, M {of.m}, {given.stages} stages")
    print("tile         warps  TFLOP/s fp32  TFLOP/s fast  fp32 / fast  error fp32  error fast")
    for tile, num_warps in TILES:
        routing = route(chosen, weight, of.experts, tile.block_m)
        # The first expert's rows are enough to see the error.
        rows = slice(0, int(routing.histogram[0]))
        acc = (x[routing.gather_index[rows].long()].double() * x_scale) @ (
            w[0].double() * w_scale[0]
        ).T
        expected = finish_reference(acc, None, None, SwiGLU())
        tflops, errors = [], []
        for fast in (False, True):
            run = functools.partial(
                moe_gemm_a8w8,
                *(x, w, x_scale, w_scale, routing, tile),
                swiglu=SwiGLU(),
                fast_accum=fast,
                num_warps=num_warps,
                num_stages=given.stages,
            )
            error = (run(y_format="fp32")[rows].double() - expected).abs().max()
            errors.append(float(error / expected.abs().max()))
            tflops.append(flops / do_bench(run, return_mode="median") / 1e9)
        print(
            f"{tile!s:<12} {num_warps:5} {tflops[0]:13.0f} {tflops[1]:13.0f} "
            f"{tflops[0] / tflops[1]:12.2f} {errors[0]:11.1e} {errors[1]:11.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
