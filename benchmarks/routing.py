"""How much sooner are rows sorted by the kernels than by plain PyTorch, on the same GPU?

Both route the same logits, top-k included. Their results must agree first: every integer
exactly, weights within rounding. Times are medians between CUDA events, which include what
the host makes the device wait: plain PyTorch reads back how many tiles there are. Exits 1
without a GPU, or if results differ.
"""

import argparse
import itertools
import sys

import torch
from triton.testing import do_bench

from moelab.kernels.router import route_logits, route_reference, top_k_reference
from moelab.kernels.routing import Routing
from moelab.parameters import as_list

TOP_K = 8


def plain(logits: torch.Tensor, block_m: int) -> Routing:
    return route_reference(*top_k_reference(logits, TOP_K), logits.shape[1], block_m)


def differences(got: Routing, expected: Routing) -> list[str]:
    """Name the fields that differ where they mean anything."""
    count = int(expected.tile_count)
    different = []
    for name, b in vars(expected).items():
        a = getattr(got, name)
        if not isinstance(b, torch.Tensor):
            equal = a == b
        elif name == "weight":
            # Derived in tests/kernels/test_router.py: 30 * 2^-24 for either.
            equal = a.shape == b.shape and bool((a - b).abs().max() <= 2**-18)
        else:
            end = count if name in ("tile_expert", "tile_row") else None
            equal = torch.equal(a[:end], b[:end])
        if not equal:
            different.append(name)
    return different


def time_us(route, *arguments) -> float:
    return 1000 * do_bench(lambda: route(*arguments), return_mode="median")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="512,2560,8704,15872")
    parser.add_argument("--experts", default="128,256")
    parser.add_argument("--block-m", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    generator = torch.Generator("cuda").manual_seed(given.seed)
    print(f"{torch.cuda.get_device_name()}, top_k {TOP_K}, block_m {given.block_m}, fp32 logits")
    print(f"{'experts':>7} {'tokens':>7} {'plain us':>9} {'kernels us':>10} {'times faster':>12}")
    for experts, tokens in itertools.product(
        as_list(given.experts, int), as_list(given.tokens, int)
    ):
        logits = torch.randn((tokens, experts), generator=generator, device="cuda")
        different = differences(
            route_logits(logits, TOP_K, given.block_m), plain(logits, given.block_m)
        )
        if different:
            print(f"DIFFERENT: {experts} experts, {tokens} tokens: {', '.join(different)}")
            return 1
        before = time_us(plain, logits, given.block_m)
        after = time_us(route_logits, logits, TOP_K, given.block_m)
        print(f"{experts:7} {tokens:7} {before:9.1f} {after:10.1f} {before / after:12.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
