"""Grouped GEMM over experts, mxfp4 x mxfp4: y[r] = act(x[token(r)] w[expert(r)]^T + b).

As `moe_gemm_a8w4`, but x is mxfp4 too: 32 elements along K of either operand share an
e8m0 scale, and two elements lie in a byte. Hopper has a kernel of its own, `mxfp4_hopper`,
for weights that are laid out for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import triton
import triton.language as tl

from ..specs import SCALE_LAYOUTS, Cost, Problem, Source, Target, TensorSpec, Tile
from . import grouped_gemm, mxfp4_hopper
from .epilogue import finish
from .formats import dequantize_mxfp4, mx_groups, mx_pairs, without_filler
from .grouped_gemm import Layer, Options
from .launch import check_sums, expect
from .operands import check_scales, in_rows, mx_rules, mxfp4_load, mxfp4_pointers, scale_shape
from .routing import Routing, expert_tile, tile_rows

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _moe_gemm_a4w4_kernel(
    y_ptr,  # [rows, n_out] bf16, fp32 or fp8
    y_scale_ptr,  # [1] fp32, [rows, ceil(n_out / 32)] uint8 or None
    x_ptr,  # [tokens, pairs] uint8 if gathered, else [rows, pairs]; two e2m1 each
    w_ptr,  # [experts, n, pairs] uint8, two e2m1 each
    x_scale_ptr,  # [rows of x, groups] uint8, e8m0
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
    offs_pair = tl.arange(0, BLOCK_K // 2)
    offs_group = tl.arange(0, BLOCK_K // 32)
    x_ptrs = x_ptr + x_rows[:, None] * pairs + offs_pair[None, :]
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
            x_scale = tl.load(x_scale_ptrs)
        else:
            in_pairs = offs_pair < pairs - start_k // 2
            in_groups = offs_group < groups - start_k // 32
            x = tl.load(x_ptrs, mask=in_pairs[None, :], other=0)
            x_scale = tl.load(x_scale_ptrs, mask=in_groups[None, :], other=0)
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
        acc = tl.dot_scaled(x, x_scale, "e2m1", w, w_scale, "e2m1", acc=acc, fast_math=True)
        x_ptrs += BLOCK_K // 2
        x_scale_ptrs += BLOCK_K // 32
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
        return mxfp4_hopper.source(problem, tile, target, row_scales=True)
    rows, pairs, groups = problem.x_rows, mx_pairs(problem.k), mx_groups(problem.k)
    w_scale = scale_shape(problem.experts, problem.n, problem.k, problem.scale_layout)
    return grouped_gemm.describe(
        _moe_gemm_a4w4_kernel,
        problem,
        tile,
        target,
        x=TensorSpec((rows, pairs), "u8"),
        w=TensorSpec((problem.experts, problem.n, pairs), "u8"),
        own={
            "x_scale_ptr": TensorSpec((rows, groups), "u8"),
            "w_scale_ptr": TensorSpec(w_scale, "u8"),
            "pairs": pairs,
            "groups": groups,
            "scale_stride": w_scale[-1],
            "CDNA4": problem.scale_layout == "cdna4",
        },
        rules=mx_rules(tile, problem.scale_layout),
        scale_layouts=SCALE_LAYOUTS,
    )


def moe_gemm_a4w4(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile | None = None,
    *,
    k: int | None = None,
    scale_layout: str = "rows",
    fast_accum: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Multiply each expert's rows by its weight.

    Args:
        x: ``[tokens, ceil(k / 2)]`` uint8, two e2m1 each, the even one in the low half;
            ``[rows, ceil(k / 2)]`` unless gathered.
        w: ``[experts, n, ceil(k / 2)]`` uint8, likewise.
        x_scale: ``[rows of x, ceil(k / 32)]`` uint8, e8m0.
        w_scale: ``[experts, n, ceil(k / 32)]`` uint8, e8m0, or shuffled for CDNA4.
        routing: with ``block_m`` of ``tile``, or one that was tuned: `tuned.block_m_for`.
        tile: None takes the best that was measured, or the published rules'; see `tuned`.
        k: elements of a row where they are odd; None takes every half byte.
        scale_layout: of w_scale: ``rows``, ``cdna4`` as `formats.shuffle_scales_cdna4` gives
            it, or ``hopper``: w and w_scale as `hopper_weights.pack` gives them, block_k 128
            and 3 stages or more (4 if not given).
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

    expect("x", x, (None, None), (torch.uint8,), of=w)
    rows, pairs = x.shape
    k = 2 * pairs if k is None else k
    if not isinstance(k, int) or k < 0 or mx_pairs(k) != pairs:
        raise ValueError(f"k is {k}; x has {pairs} bytes a row, which hold {2 * pairs} elements")
    expect("x_scale", x_scale, (rows, mx_groups(k)), (torch.uint8,), of=w)
    # What fills the last byte of x and of w must not meet; w's is left as it is.
    x = without_filler(x, k)
    if scale_layout == "hopper":
        mxfp4_hopper.check_w(w, w_scale, k)
    else:
        check_sums(fast_accum)
        expect("w", w, (None, None, pairs), (torch.uint8,), of=w)
        check_scales(w_scale, w, k, scale_layout)
    tile, options = grouped_gemm.choose(
        "moe_gemm_a4w4",
        tile,
        routing,
        options,
        w=w,
        k=k,
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
        "pairs": pairs,
        "groups": mx_groups(k),
        "scale_stride": w_scale.shape[-1],
        "CDNA4": scale_layout == "cdna4",
    }
    rules = mx_rules(tile, scale_layout)
    return grouped_gemm.launch(
        _moe_gemm_a4w4_kernel, x, w, own, routing, tile, k=k, rules=rules, **options
    )


def cost(problem: Problem) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move."""
    row_bytes = mx_pairs(problem.k) + mx_groups(problem.k)
    return grouped_gemm.cost(problem, x_row_bytes=row_bytes, w_bytes=problem.n * row_bytes)


def reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    *,
    k: int | None = None,
    scale_layout: str = "rows",
    **layer: Unpack[Layer],
) -> Tensor:
    """Say what correct means: one matrix product per expert, in float64.

    Arguments are those of `moe_gemm_a4w4`; returns ``[rows, n_out]`` float64.
    """
    k = 2 * x.shape[-1] if k is None else k
    return grouped_gemm.reference(
        dequantize_mxfp4(x, x_scale, k).double(),
        dequantize_mxfp4(*in_rows(w, w_scale, k, scale_layout), k).double(),
        routing,
        **layer,
    )
