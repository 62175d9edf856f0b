"""Grouped GEMM over experts, fp8 x mxfp4: y[r] = act(s_x x[token(r)] w[expert(r)]^T + b).

One program computes one BLOCK_M x BLOCK_N tile of one expert: x, w and their scales pass
through LDS along K, accumulated in fp32. w is mxfp4: 32 elements along K share an e8m0
scale, which the matrix units (or, where they can't, the compiler's widening) apply. x is
mxfp8 and scaled likewise, or has one static scale, applied once to the accumulator. Hopper
has a kernel of its own, `mxfp4_hopper`, for weights that are laid out for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import triton
import triton.language as tl

from ..specs import (
    SCALE_LAYOUTS,
    X_FORMATS,
    Cost,
    Problem,
    Source,
    Target,
    TensorSpec,
    Tile,
)
from . import grouped_gemm, mxfp4_hopper
from .epilogue import finish
from .formats import dequantize_mxfp4, dequantize_mxfp8, mx_groups, mx_pairs
from .grouped_gemm import Layer, Options
from .launch import check_sums, expect
from .operands import check_scales, in_rows, mx_rules, mxfp4_load, mxfp4_pointers, scale_shape
from .routing import Routing, expert_tile, tile_rows

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _moe_gemm_a8w4_kernel(
    y_ptr,  # [rows, n_out] bf16, fp32 or fp8
    y_scale_ptr,  # [1] fp32, [rows, ceil(n_out / 32)] uint8 or None
    x_ptr,  # [tokens, k] fp8 if gathered, else [rows, k]
    w_ptr,  # [experts, n, pairs] uint8, two e2m1 each
    x_scale_ptr,  # [1] fp32, or e8m0 [rows of x, groups] uint8
    w_scale_ptr,  # e8m0: [experts, n, groups] uint8, or shuffled for CDNA4
    pairs,  # ceil(k / 2)
    groups,  # ceil(k / 32)
    scale_stride,  # bytes between two rows of w_scale
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
    CDNA4: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
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
    rows, row_mask, x_rows, y_rows = tile_rows(
        row, expert, expert_end_ptr, gather_ptr, scatter_ptr, BLOCK_M, WIDE
    )
    MX_X: tl.constexpr = x_scale_ptr.dtype.element_ty == tl.uint8
    offs_k = tl.arange(0, BLOCK_K)
    offs_group = tl.arange(0, BLOCK_K // 32)
    x_ptrs = x_ptr + x_rows[:, None] * k + offs_k[None, :]
    x_scale_ptrs = x_scale_ptr + x_rows[:, None] * groups + offs_group[None, :]
    # Weights of all experts together can exceed 2^31 elements where one expert's do not.
    expert = expert.to(tl.int64)
    w_ptrs, w_scale_ptrs = mxfp4_pointers(
        w_ptr,
        w_scale_ptr,
        expert,
        pid_n,
        n,
        pairs,
        scale_stride,
        BLOCK_N,
        BLOCK_K,
        CDNA4,
        WIDE,
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(offs_k < k - start_k)[None, :], other=0.0)
        w, w_scale, w_ptrs, w_scale_ptrs = mxfp4_load(
            w_ptrs,
            w_scale_ptrs,
            start_k,
            pairs,
            scale_stride,
            BLOCK_N,
            BLOCK_K,
            CDNA4,
            EVEN_K,
            W_CACHE,
        )
        if MX_X:
            if EVEN_K:
                x_scale = tl.load(x_scale_ptrs)
            else:
                in_groups = offs_group < groups - start_k // 32
                x_scale = tl.load(x_scale_ptrs, mask=in_groups[None, :], other=0)
            acc = tl.dot_scaled(x, x_scale, "e4m3", w, w_scale, "e2m1", acc=acc, fast_math=True)
            x_scale_ptrs += BLOCK_K // 32
        else:
            acc = tl.dot_scaled(x, None, "e4m3", w, w_scale, "e2m1", acc=acc, fast_math=True)
        x_ptrs += BLOCK_K
    if not MX_X:
        acc *= tl.load(x_scale_ptr)
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


def source(problem: Problem, tile: Tile, target: Target) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    Raises:
        ValueError: the kernel can't take the tile or a format.
    """
    if problem.scale_layout == "hopper":
        return mxfp4_hopper.source(problem, tile, target, row_scales=False)
    rows, groups = problem.x_rows, mx_groups(problem.k)
    x_scales = {
        "fp8": TensorSpec((1,), "fp32"),
        "mxfp8": TensorSpec((rows, groups), "u8"),
    }
    w_scale = scale_shape(problem.experts, problem.n, problem.k, problem.scale_layout)
    return grouped_gemm.describe(
        _moe_gemm_a8w4_kernel,
        problem,
        tile,
        target,
        # dot_scaled takes OCP e4m3 alone, also where the matrix units have another kind.
        x=TensorSpec((rows, problem.k), "fp8e4nv"),
        w=TensorSpec((problem.experts, problem.n, mx_pairs(problem.k)), "u8"),
        own={
            "x_scale_ptr": x_scales.get(problem.x_format or "fp8"),
            "w_scale_ptr": TensorSpec(w_scale, "u8"),
            "pairs": mx_pairs(problem.k),
            "groups": groups,
            "scale_stride": w_scale[-1],
            "CDNA4": problem.scale_layout == "cdna4",
        },
        rules=mx_rules(tile, problem.scale_layout),
        x_formats=(None, *X_FORMATS),
        scale_layouts=SCALE_LAYOUTS,
    )


def moe_gemm_a8w4(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile | None = None,
    *,
    scale_layout: str = "rows",
    fast_accum: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Multiply each expert's rows by its weight.

    Args:
        x: ``[tokens, k]`` fp8 e4m3 (OCP); ``[rows, k]`` unless gathered. k may be odd.
        w: ``[experts, n, ceil(k / 2)]`` uint8, two e2m1 each, the even one in the low half.
        x_scale: ``[1]`` fp32; for mxfp8 e8m0 ``[rows of x, ceil(k / 32)]`` uint8.
        w_scale: ``[experts, n, ceil(k / 32)]`` uint8, e8m0, or shuffled for CDNA4.
        routing: with ``block_m`` of ``tile``, or one that was tuned: `tuned.block_m_for`.
        tile: None takes the best that was measured, or the published rules'; see `tuned`.
        scale_layout: of w_scale: ``rows``, ``cdna4`` as `formats.shuffle_scales_cdna4` gives
            it, or ``hopper``: w and w_scale as `hopper_weights.pack` gives them, block_k 128,
            3 stages or more (4 if not given) and an x with one scale.
        fast_accum: leave the whole sum to Hopper's tensor cores, with about 14 bits, rather
            than add to fp32 every 128; of ``hopper`` weights alone.
        options: see `grouped_gemm.Options`.
    Returns:
        y ``[rows, n]``, ``n // 2`` columns with ``swiglu``; for ``mxfp8`` its scales too.
    Raises:
        ValueError: shapes, types or devices disagree; the message shows both.
        triton.runtime.errors.OutOfResources: tile and stages exceed the LDS.
    """
    import torch

    expect("x", x, (None, None), (torch.float8_e4m3fn,), of=w)
    rows, k = x.shape
    mx_x = getattr(x_scale, "dtype", None) == torch.uint8
    x_scale_shape = (rows, mx_groups(k)) if mx_x else (1,)
    expect("x_scale", x_scale, x_scale_shape, (torch.float32, torch.uint8), of=w)
    if scale_layout == "hopper":
        mxfp4_hopper.check_x(mx_x)
        mxfp4_hopper.check_w(w, w_scale, k)
    else:
        check_sums(fast_accum)
        expect("w", w, (None, None, mx_pairs(k)), (torch.uint8,), of=w)
        check_scales(w_scale, w, k, scale_layout)
    tile, options = grouped_gemm.choose(
        "moe_gemm_a8w4",
        tile,
        routing,
        options,
        w=w,
        k=k,
        x_format="mxfp8" if mx_x else None,
        scale_layout=scale_layout,
        fast_accum=fast_accum,
    )
    if scale_layout == "hopper":
        return mxfp4_hopper.launch(
            x, w, x_scale, w_scale, routing, tile, k=k, fast_accum=fast_accum, **options
        )
    own = {
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        "pairs": mx_pairs(k),
        "groups": mx_groups(k),
        "scale_stride": w_scale.shape[-1],
        "CDNA4": scale_layout == "cdna4",
    }
    rules = mx_rules(tile, scale_layout)
    return grouped_gemm.launch(
        _moe_gemm_a8w4_kernel, x, w, own, routing, tile, k=k, rules=rules, **options
    )


def cost(problem: Problem) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move."""
    groups = mx_groups(problem.k)
    return grouped_gemm.cost(
        problem,
        x_row_bytes=problem.k + (groups if problem.x_format == "mxfp8" else 0),
        w_bytes=problem.n * (mx_pairs(problem.k) + groups),
    )


def reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    *,
    scale_layout: str = "rows",
    **layer: Unpack[Layer],
) -> Tensor:
    """Say what correct means: one matrix product per expert, in float64.

    Arguments are those of `moe_gemm_a8w4`; returns ``[rows, n_out]`` float64.
    """
    import torch

    mx_x = x_scale.dtype == torch.uint8
    w, w_scale = in_rows(w, w_scale, x.shape[-1], scale_layout)
    return grouped_gemm.reference(
        dequantize_mxfp8(x, x_scale).double() if mx_x else x.double() * x_scale.double(),
        dequantize_mxfp4(w, w_scale, x.shape[-1]).double(),
        routing,
        **layer,
    )
