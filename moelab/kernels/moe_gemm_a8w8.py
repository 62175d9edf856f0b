"""Grouped GEMM over experts, fp8 x fp8: y[r] = act(s_x s_w x[token(r)] w[expert(r)]^T + b).

One program computes one BLOCK_M x BLOCK_N tile of one expert: x and w tiles pass
through LDS along K, accumulated in fp32. Scales are static: one for x, one per expert
for w, both applied once to the accumulator. Layer 1 gathers x by token and ends in
SwiGLU; layer 2 reads rows in expert order and weights them by routing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..specs import Cost, Problem, Source, Target, TensorSpec, Tile
from .epilogue import SwiGLU, finish, finish_reference
from .launch import describe, expect, launch
from .routing import Routing, expert_tile, per_expert, tile_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@triton.jit
def _moe_gemm_a8w8_kernel(
    y_ptr,  # [rows, n_out] bf16
    x_ptr,  # [tokens, k] fp8 if gathered, else [rows, k]
    w_ptr,  # [experts, n, k] fp8
    x_scale_ptr,  # [1] fp32
    w_scale_ptr,  # [experts] fp32
    bias_ptr,  # [experts, n] fp32 or None
    weight_ptr,  # [rows] fp32 routing weights or None
    row_index_ptr,  # [rows] int32 token * top_k + slot, or None: x is in expert order
    expert_end_ptr,  # [experts] int32
    tile_count_ptr,  # [1] int32
    tile_expert_ptr,  # [max_tiles] int32
    tile_row_ptr,  # [max_tiles] int32
    n,
    k,
    alpha,
    limit,
    shift,
    top_k,
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    W_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    exists, expert, row, pid_n = expert_tile(
        tile_count_ptr, tile_expert_ptr, tile_row_ptr, n, BLOCK_N, GROUP_M, NUM_XCDS
    )
    if not exists:
        return
    rows, row_mask, x_rows = tile_rows(row, expert, expert_end_ptr, row_index_ptr, top_k, BLOCK_M)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    offs_k = tl.arange(0, BLOCK_K)
    # Weights of all experts together can exceed 2^31 elements; one expert's do not.
    expert = expert.to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * k + offs_k[None, :]
    w_ptrs = w_ptr + expert * n * k + offs_n[None, :] * k + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, cache_modifier=W_CACHE)
        else:
            in_k = offs_k < k - start_k
            x = tl.load(x_ptrs, mask=in_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=in_k[:, None], other=0.0, cache_modifier=W_CACHE)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    acc *= tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
    finish(
        acc,
        y_ptr,
        bias_ptr,
        weight_ptr,
        rows,
        row_mask,
        expert,
        pid_n,
        n,
        alpha,
        limit,
        shift,
        BLOCK_N,
        SWIGLU,
    )


def source(problem: Problem, tile: Tile, target: Target) -> Source:
    """Describe the kernel to the compiler; needs no GPU."""
    return describe(
        _moe_gemm_a8w8_kernel,
        problem,
        tile,
        target,
        x_dtype=target.fp8,
        w=TensorSpec((problem.experts, problem.n, problem.k), target.fp8),
        own={
            "x_scale_ptr": TensorSpec((1,), "fp32"),
            "w_scale_ptr": TensorSpec((problem.experts,), "fp32"),
        },
    )


def moe_gemm_a8w8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    gather: bool = True,
    weighted: bool = False,
    swiglu: SwiGLU | None = None,
    num_warps: int = 8,
    num_stages: int = 2,
    num_xcds: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply each expert's rows by its weight.

    Args:
        x: ``[tokens, k]`` fp8 e4m3 if ``gather``, else ``[rows, k]`` in expert order.
        w: ``[experts, n, k]``, dtype of ``x``.
        x_scale: ``[1]`` fp32.
        w_scale: ``[experts]`` fp32.
        routing: with ``block_m`` of ``tile``.
        bias: ``[experts, n]`` fp32.
        weighted: multiply each row by its routing weight.
        swiglu: activation over interleaved pairs of columns; n must be even.
        num_xcds: dies of the chip that share no L2 (8 on MI300X and MI355X).
        out_dtype: ``torch.bfloat16`` (the default) or ``torch.float32``.
    Returns:
        ``[rows, n]`` in expert order, ``n // 2`` columns with ``swiglu``.
    Raises:
        ValueError: shapes, types or devices disagree; the message shows both.
        triton.runtime.errors.OutOfResources: tile and stages exceed the LDS.
    """
    import torch

    expect("w", w, (None, None, None), (torch.float8_e4m3fn, torch.float8_e4m3fnuz), of=w)
    experts, _, k = w.shape
    expect("x_scale", x_scale, (1,), (torch.float32,), of=w)
    expect("w_scale", w_scale, (experts,), (torch.float32,), of=w)
    return launch(
        _moe_gemm_a8w8_kernel,
        x,
        (w.dtype,),
        w,
        {"x_scale_ptr": x_scale, "w_scale_ptr": w_scale},
        routing,
        tile,
        k=k,
        bias=bias,
        gather=gather,
        weighted=weighted,
        swiglu=swiglu,
        num_warps=num_warps,
        num_stages=num_stages,
        num_xcds=num_xcds,
        out_dtype=out_dtype,
    )


def cost(problem: Problem) -> Cost:
    """Useful FLOPs and the bytes that any implementation must move."""
    weights = min(problem.experts, problem.rows)
    return Cost(
        flops=2 * problem.rows * problem.n * problem.k,
        bytes=(
            (problem.m if problem.gather else problem.rows) * problem.k
            + weights * problem.n * problem.k
            + problem.rows * problem.n_out * 2
        ),
    )


def reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    *,
    bias: Tensor | None = None,
    gather: bool = True,
    weighted: bool = False,
    swiglu: SwiGLU | None = None,
) -> Tensor:
    """Say what correct means: one matrix product per expert, in float64.

    Arguments are those of `moe_gemm_a8w8`; returns ``[rows, n_out]`` float64.
    """
    return per_expert(
        x.double() * x_scale.double(),
        w.double() * w_scale.double()[:, None, None],
        routing,
        gather=gather,
        finish=lambda acc, expert, rows: finish_reference(
            acc,
            bias[expert] if bias is not None else None,
            routing.weight[rows] if weighted else None,
            swiglu,
        ),
    )
