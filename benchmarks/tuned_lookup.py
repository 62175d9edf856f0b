"""What does a launch pay for leaving the tile out?

The launcher's work on the CPU where it looks the tuned tile up, beside the same launch with that
tile given. The kernel is stood in for by one that does nothing, so that only the launcher's own
checks are counted: what Triton adds to both makes the share smaller.
"""

import statistics
import time
from unittest import mock

import torch

from moelab import problems, tuned
from moelab.kernels import grouped_gemm, moe_gemm_a8w8, source_hash
from moelab.kernels.router import route

KERNEL, TARGET = "moe_gemm_a8w8", "sm_90"
LAUNCHES, ROUNDS = 1000, 11


class Nothing:
    """Stand in for a kernel: take a launch and return."""

    def __getitem__(self, grid):
        return self

    def __call__(self, **arguments):
        pass


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    of = problems.problem("Qwen3-235B-A22B", layer=1, tp=1, m=512)
    shape = tuned.Shape.of(KERNEL, of)
    block_m = tuned.block_m_for([shape], of.m, TARGET)
    choice = tuned.choose(shape, of.m, block_m, TARGET)
    fp8 = torch.float8_e4m3fn
    x = torch.empty((of.m, of.k), dtype=fp8, device=device)
    w = torch.empty((of.experts, of.n, of.k), dtype=fp8, device=device)
    scale = torch.ones(of.experts, device=device)
    expert = torch.rand((of.m, of.experts), device=device).topk(of.top_k).indices
    routing = route(expert, torch.ones(expert.shape, device=device), of.experts, block_m)
    given = {"num_warps": choice.num_warps, "num_stages": choice.num_stages or 2}
    # Before the kernel is stood in for.
    source_hash(KERNEL)
    ways = {"looked up": (None, {}), "given": (choice.tile, given)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    with (
        mock.patch.object(moe_gemm_a8w8, f"_{KERNEL}_kernel", Nothing()),
        mock.patch.object(grouped_gemm, "target_name", lambda device: TARGET),
    ):
        for _ in range(ROUNDS):
            for way, (tile, options) in ways.items():
                start = time.perf_counter()
                for _ in range(LAUNCHES):
                    moe_gemm_a8w8.moe_gemm_a8w8(
                        x, w, scale[:1], scale, routing, tile, y_format="bf16", **options
                    )
                times[way].append((time.perf_counter() - start) / LAUNCHES * 1e6)
    looked_up, with_tile = (statistics.median(times[way]) for way in ways)
    source = "measured" if choice.source else "published"
    print(
        f"{source} tile {choice.tile}: {looked_up:.1f} us looked up, {with_tile:.1f} us given, "
        f"ratio {looked_up / with_tile:.3f}"
    )


if __name__ == "__main__":
    main()
