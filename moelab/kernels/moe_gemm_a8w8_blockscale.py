"""Grouped GEMM over experts, fp8 x fp8 with block scales: y[r] = act(sum_b s_x s_w x w^T + b).

As `moe_gemm_a8w8`, but every 128 elements of a row of x share an fp32 scale, and so do
every 128 x 128 elements of w (DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2). A
step along K stays within a block: its product is scaled once, then added in fp32. Hopper
has a kernel of its own, `hopper_specialized`, for tiles that say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import triton
import triton.language as tl

from ..specs import Cost, Problem, Source, Target, TensorSpec, Tile
from . import grouped_gemm, hopper_specialized
from .epilogue import finish
from .formats import FP8_BLOCK, dequantize_fp8_blocks, fp8_blocks
from .grouped_gemm import Layer, Options
from .launch import AMD_OPTIONS, TileRule, expect
from .operands import columns
from .routing import Routing, every_tile, tile_rows

if TYPE_CHECKING:
    from torch import Tensor

# ROCm/aiter launches this one so, unlike the others.
_AMD_OPTIONS = {**AMD_OPTIONS, "waves_per_eu": 1}


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
    blocks,
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
    offs_n = columns(pid_n, n, BLOCK_N, WIDE)
    offs_k = tl.arange(0, BLOCK_K)
    if W_TMA:
        w_row = expert * n + pid_n * BLOCK_N
    # Weights of all experts together can exceed 2^31 elements where one expert's do not.
    expert = expert.to(tl.int64)
    if not X_TMA:
        x_ptrs = x_ptr + x_rows[:, None] * k + offs_k[None, :]
    if not W_TMA:
        w_ptrs = w_ptr + expert * n * k + offs_n[None, :] * k + offs_k[:, None]
    x_scale_ptrs = x_scale_ptr + x_rows * blocks
    w_scale_ptrs = w_scale_ptr + expert * tl.cdiv(n, 128) * blocks
    # A tile of up to 128 columns lies within one block of w.
    ONE_SCALE: tl.constexpr = BLOCK_N <= 128
    if ONE_SCALE:
        w_scale_ptrs += pid_n * BLOCK_N // 128 * blocks
    else:
        w_scale_ptrs += offs_n // 128 * blocks
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
        x_scale = tl.load(x_scale_ptrs + start_k // 128)
        w_scale = tl.load(w_scale_ptrs + start_k // 128)
        if ONE_SCALE:
            acc += tl.dot(x, w) * (x_scale * w_scale)[:, None]
        else:
            acc += tl.dot(x, w) * x_scale[:, None] * w_scale[None, :]
        if not X_TMA:
            x_ptrs += BLOCK_K
        if not W_TMA:
            w_ptrs += BLOCK_K
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
def _moe_gemm_a8w8_blockscale_kernel(
    y_ptr,  # [rows, n_out] bf16, fp32 or fp8
    y_scale_ptr,  # [1] fp32, [rows, ceil(n_out / 32)] uint8 or None
    x_ptr,  # [tokens, k] fp8 if gathered, else [rows, k]
    w_ptr,  # [experts, n, k] fp8
    x_scale_ptr,  # [rows of x, blocks] fp32
    w_scale_ptr,  # [experts, ceil(n / 128), blocks] fp32
    blocks,  # ceil(k / 128)
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
            blocks,
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


def _rules(tile: Tile) -> list[TileRule]:
    within = tile.block_k <= FP8_BLOCK
    return [("block_k", within, f"{FP8_BLOCK} or less: a step must not span two scales")]


def source(problem: Problem, tile: Tile, target: Target) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    Raises:
        ValueError: the kernel can't take the tile.
    """
    blocks = fp8_blocks(problem.k)
    scales = (
        TensorSpec((problem.x_rows, blocks), "fp32"),
        TensorSpec((problem.experts, fp8_blocks(problem.n), blocks), "fp32"),
    )
    if tile.specialized:
        return hopper_specialized.source(problem, tile, target, *scales, blockscale=True)
    return grouped_gemm.describe(
        _moe_gemm_a8w8_blockscale_kernel,
        problem,
        tile,
        target,
        x=TensorSpec((problem.x_rows, problem.k), target.fp8),
        w=TensorSpec((problem.experts, problem.n, problem.k), target.fp8),
        own={"x_scale_ptr": scales[0], "w_scale_ptr": scales[1], "blocks": blocks},
        rules=_rules(tile),
        ways=grouped_gemm.WAYS,
        amd_options=_AMD_OPTIONS,
    )


def moe_gemm_a8w8_blockscale(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile | None = None,
    **options: Unpack[Options],
) -> Any:
    """Multiply each expert's rows by its weight.

    Args:
        x: ``[tokens, k]`` fp8 e4m3, OCP or FNUZ; ``[rows, k]`` unless gathered.
        w: ``[experts, n, k]``, dtype of ``x``.
        x_scale: ``[rows of x, ceil(k / 128)]`` fp32.
        w_scale: ``[experts, ceil(n / 128), ceil(k / 128)]`` fp32.
        routing: with ``block_m`` of ``tile``, or one that was tuned: `tuned.block_m_for`.
        tile: with ``block_k`` of 128 or less; None takes the best that was measured, or the
            published rules'; see `tuned`. A ``specialized`` one is 128x256x128, with 4 warps,
            on Hopper.
        options: see `grouped_gemm.Options`.
    Returns:
        y ``[rows, n]``, ``n // 2`` columns with ``swiglu``; for ``mxfp8`` its scales too.
    Raises:
        ValueError: shapes, types or devices disagree; the message shows both.
        triton.runtime.errors.OutOfResources: tile and stages exceed the LDS.
    """
    import torch

    expect("w", w, (None, None, None), (torch.float8_e4m3fn, torch.float8_e4m3fnuz), of=w)
    experts, n, k = w.shape
    blocks = fp8_blocks(k)
    expect("x", x, (None, k), (w.dtype,), of=w)
    expect("x_scale", x_scale, (x.shape[0], blocks), (torch.float32,), of=w)
    expect("w_scale", w_scale, (experts, fp8_blocks(n), blocks), (torch.float32,), of=w)
    tile, options = grouped_gemm.choose(
        "moe_gemm_a8w8_blockscale",
        tile,
        routing,
        options,
        w=w,
        k=k,
    )
    if tile.specialized:
        return hopper_specialized.launch(
            x, w, x_scale, w_scale, routing, tile, blockscale=True, **options
        )
    return grouped_gemm.launch(
        _moe_gemm_a8w8_blockscale_kernel,
        x,
        w,
        {"x_scale_ptr": x_scale, "w_scale_ptr": w_scale, "blocks": blocks},
        routing,
        tile,
        k=k,
        rules=_rules(tile),
        ways=grouped_gemm.WAYS,
        amd_options=_AMD_OPTIONS,
        **options,
    )


def cost(problem: Problem) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move."""
    blocks = fp8_blocks(problem.k)
    return grouped_gemm.cost(
        problem,
        x_row_bytes=problem.k + 4 * blocks,
        w_bytes=problem.n * problem.k + 4 * fp8_blocks(problem.n) * blocks,
    )


def reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    **layer: Unpack[Layer],
) -> Tensor:
    """Say what correct means: one matrix product per expert, in float64.

    Arguments are those of `moe_gemm_a8w8_blockscale`; returns ``[rows, n_out]`` float64.
    """
    return grouped_gemm.reference(
        dequantize_fp8_blocks(x, x_scale, rows=1).double(),
        dequantize_fp8_blocks(w, w_scale, rows=FP8_BLOCK).double(),
        routing,
        **layer,
    )
