"""Grouped GEMM over experts, fp8 x fp8: y[r] = act(s_x s_w x[token(r)] w[expert(r)]^T + b).

One program computes one BLOCK_M x BLOCK_N tile of one expert: x and w tiles pass
through LDS along K, accumulated in fp32. Scales are static: one for x, one per expert
for w, both applied once to the accumulator. Layer 1 gathers x by token and ends in
SwiGLU; layer 2 reads rows in expert order, weights them by routing and scatters them
back to their tokens. Hopper has a kernel of its own, `hopper_specialized`, for tiles that
say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import triton
import triton.language as tl

from ..specs import Cost, Problem, Source, Target, TensorSpec, Tile
from . import grouped_gemm, hopper_specialized
from .epilogue import finish
from .grouped_gemm import Layer, Options
from .launch import expect
from .operands import columns
from .routing import Routing, every_tile, tile_rows

if TYPE_CHECKING:
    from torch import Tensor

# Hopper's tensor cores add fp8 products with about 14 bits of significand (DeepSeek-V3
# report, arXiv:2412.19437, section 3.3.2). After this many products the sum moves to fp32.
PROMOTE_EVERY = 128


@triton.jit
def _tile(
    expert,
    row,
    pid_n,
    BLOCK_M: tl.constexpr,
    y_ptr,
    y_scale_ptr,
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    weight_ptr,
    gather_ptr,
    scatter_ptr,
    expert_end_ptr,
    n,
    k,
    alpha,
    limit,
    shift,
    MAX_IMPRECISE: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    W_STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W_TMA: tl.constexpr,
    X_TMA: tl.constexpr,
):
    """Compute one tile of one expert; the rest are the kernel's arguments."""
    W_CACHE: tl.constexpr = ".cg" if W_STREAMED else ""
    rows, row_mask, x_rows, y_rows = tile_rows(
        row, expert, expert_end_ptr, gather_ptr, scatter_ptr, BLOCK_M, WIDE
    )
    offs_k = tl.arange(0, BLOCK_K)
    if W_TMA:
        w_row = expert * n + pid_n * BLOCK_N
    # Weights of all experts together can exceed 2^31 elements where one expert's do not.
    expert = expert.to(tl.int64)
    if not X_TMA:
        x_ptrs = x_ptr + x_rows[:, None] * k + offs_k[None, :]
    if not W_TMA:
        offs_n = columns(pid_n, n, BLOCK_N, WIDE)
        w_ptrs = w_ptr + expert * n * k + offs_n[None, :] * k + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, k, BLOCK_K):
        in_k = offs_k < k - start_k
        if X_TMA:
            x = x_ptr.load([row, start_k])
        elif EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=in_k[None, :], other=0.0)
        if W_TMA:
            w = w_ptr.load([w_row, start_k]).T
        elif EVEN_K:
            w = tl.load(w_ptrs, cache_modifier=W_CACHE)
        else:
            w = tl.load(w_ptrs, mask=in_k[:, None], other=0.0, cache_modifier=W_CACHE)
        acc = tl.dot(x, w, acc, max_num_imprecise_acc=MAX_IMPRECISE)
        if not X_TMA:
            x_ptrs += BLOCK_K
        if not W_TMA:
            w_ptrs += BLOCK_K
    acc *= tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
    finish(
        acc,
        y_ptr,
        y_scale_ptr,
        bias_ptr,
        weight_ptr,
        rows,
        row_mask,
        y_rows,
        expert,
        pid_n,
        n,
        alpha,
        limit,
        shift,
        BLOCK_N,
        SWIGLU,
    )


@triton.jit
def _moe_gemm_a8w8_kernel(
    y_ptr,  # [rows, n_out] bf16, fp32 or fp8
    y_scale_ptr,  # [1] fp32, [rows, ceil(n_out / 32)] uint8 or None
    x_ptr,  # [tokens, k] fp8 if gathered, else [rows, k]
    w_ptr,  # [experts, n, k] fp8
    x_scale_ptr,  # [1] fp32
    w_scale_ptr,  # [experts] fp32
    bias_ptr,  # [experts, n] fp32 or None
    weight_ptr,  # [rows] fp32 routing weights or None
    gather_ptr,  # [rows] int32 token of each row, or None: x is in expert order
    scatter_ptr,  # [rows] int32 row of y of each row, or None: y is in expert order
    expert_end_ptr,  # [experts] int32
    tile_count_ptr,  # [1] int32
    tile_expert_ptr,  # [max_tiles] int32
    tile_row_ptr,  # [max_tiles] int32
    n,
    k,
    alpha,
    limit,
    shift,
    MAX_IMPRECISE: tl.constexpr,  # products summed before they move to fp32
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    W_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    W_TMA: tl.constexpr,
    X_TMA: tl.constexpr,
    TAILS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    # Tuples take no text.
    W_STREAMED: tl.constexpr = W_CACHE == ".cg"
    every_tile(
        _tile,
        # A variable would make tensors of the constants.
        (
            y_ptr,
            y_scale_ptr,
            x_ptr,
            w_ptr,
            x_scale_ptr,
            w_scale_ptr,
            bias_ptr,
            weight_ptr,
            gather_ptr,
            scatter_ptr,
            expert_end_ptr,
            n,
            k,
            alpha,
            limit,
            shift,
            MAX_IMPRECISE,
            SWIGLU,
            EVEN_K,
            WIDE,
            W_STREAMED,
            BLOCK_N,
            BLOCK_K,
            W_TMA,
            X_TMA,
        ),
        tile_count_ptr,
        tile_expert_ptr,
        tile_row_ptr,
        expert_end_ptr,
        n,
        BLOCK_M,
        BLOCK_N,
        GROUP_M,
        NUM_XCDS,
        TAILS,
        PERSISTENT,
    )


def source(problem: Problem, tile: Tile, target: Target) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    Raises:
        ValueError: the kernel can't take the tile.
    """
    scales = TensorSpec((1,), "fp32"), TensorSpec((problem.experts,), "fp32")
    if tile.specialized:
        return hopper_specialized.source(problem, tile, target, *scales, blockscale=False)
    return grouped_gemm.describe(
        _moe_gemm_a8w8_kernel,
        problem,
        tile,
        target,
        x=TensorSpec((problem.x_rows, problem.k), target.fp8),
        w=TensorSpec((problem.experts, problem.n, problem.k), target.fp8),
        own={
            "x_scale_ptr": scales[0],
            "w_scale_ptr": scales[1],
            "MAX_IMPRECISE": None if problem.fast_accum else min(PROMOTE_EVERY, tile.block_k),
        },
        ways=grouped_gemm.WAYS,
        fast_accum=True,
    )


def moe_gemm_a8w8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile | None = None,
    *,
    fast_accum: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Multiply each expert's rows by its weight.

    Args:
        x: ``[tokens, k]`` fp8 e4m3, OCP or FNUZ; ``[rows, k]`` unless gathered.
        w: ``[experts, n, k]``, dtype of ``x``.
        x_scale: ``[1]`` fp32.
        w_scale: ``[experts]`` fp32.
        routing: with ``block_m`` of ``tile``, or one that was tuned: `tuned.block_m_for`.
        tile: None takes the best that was measured, or the published rules'; see `tuned`.
            A ``specialized`` one is 128x256x128, with 4 warps, on Hopper.
        fast_accum: leave the whole sum to Hopper's tensor cores, with about 14 bits.
        options: see `grouped_gemm.Options`.
    Returns:
        y ``[rows, n]``, ``n // 2`` columns with ``swiglu``; for ``mxfp8`` its scales too.
    Raises:
        ValueError: shapes, types or devices disagree; the message shows both.
        triton.runtime.errors.OutOfResources: tile and stages exceed the LDS.
    """
    import torch

    expect("w", w, (None, None, None), (torch.float8_e4m3fn, torch.float8_e4m3fnuz), of=w)
    experts, _, k = w.shape
    expect("x", x, (None, k), (w.dtype,), of=w)
    expect("x_scale", x_scale, (1,), (torch.float32,), of=w)
    expect("w_scale", w_scale, (experts,), (torch.float32,), of=w)
    tile, options = grouped_gemm.choose(
        "moe_gemm_a8w8",
        tile,
        routing,
        options,
        w=w,
        k=k,
        fast_accum=fast_accum,
    )
    if tile.specialized:
        return hopper_specialized.launch(
            *(x, w, x_scale, w_scale, routing, tile),
            blockscale=False,
            fast_accum=fast_accum,
            **options,
        )
    own = {
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        "MAX_IMPRECISE": None if fast_accum else min(PROMOTE_EVERY, tile.block_k),
    }
    return grouped_gemm.launch(
        _moe_gemm_a8w8_kernel, x, w, own, routing, tile, k=k, ways=grouped_gemm.WAYS, **options
    )


def cost(problem: Problem) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move."""
    return grouped_gemm.cost(problem, x_row_bytes=problem.k, w_bytes=problem.n * problem.k)


def reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    **layer: Unpack[Layer],
) -> Tensor:
    """Say what correct means: one matrix product per expert, in float64.

    Arguments are those of `moe_gemm_a8w8`; returns ``[rows, n_out]`` float64.
    """
    return grouped_gemm.reference(
        x.double() * x_scale.double(),
        w.double() * w_scale.double()[:, None, None],
        routing,
        **layer,
    )
