"""Two GEMMs over the same M and K in one launch, mxfp4 and bf16, with split K:
y_fp4 = x_fp4 w_fp4^T + b_fp4 and y_bf16 = x_bf16 w_bf16^T + b_bf16.

A narrow GEMM, such as the router's, leaves most of a chip idle: here its programs run
beside those of a wide one, such as the shared expert's. One grid holds both: each row of
blocks is first the mxfp4 weight's columns, then the bf16 weight's. A program computes one
BLOCK_M x BLOCK_N block of one product, so the launch needs the larger LDS of the two.

split_k programs share a block's reduction, each with as many steps of BLOCK_K, the last
ones perhaps with fewer or none. Each stores its fp32 partial, and a second kernel sums
them in their order, so that a result never depends on who came first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from ..specs import UNQUANTIZED, Cost, Problem, Source, Target, TensorSpec, Tile
from .formats import MX_GROUP, dequantize_mxfp4, mx_groups, mx_pairs, without_filler
from .launch import (
    AMD_OPTIONS,
    STREAMED_BLOCK_M,
    WIDE_ELEMENTS,
    TileRule,
    check_formats,
    check_schedule,
    check_tile,
    expect,
    expect_tile,
    one_of,
)
from .routing import grouped_block, near_programs

if TYPE_CHECKING:
    from torch import Tensor

# Elements that one program of the sum writes.
SUM_BLOCK = 1024


@triton.jit
def _mxfp4_product(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    rows,  # [BLOCK_M], all of them rows of x
    cols,  # [BLOCK_N], all of them rows of w
    first,
    last,
    pairs,
    groups,
    EVEN_K: tl.constexpr,
    W_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply over steps ``first`` up to ``last`` of BLOCK_K: ``[BLOCK_M, BLOCK_N]`` fp32."""
    offs_pair = tl.arange(0, BLOCK_K // 2)
    offs_group = tl.arange(0, BLOCK_K // 32)
    x_ptrs = x_ptr + rows[:, None] * pairs + offs_pair[None, :] + first * (BLOCK_K // 2)
    w_ptrs = w_ptr + cols[None, :] * pairs + offs_pair[:, None] + first * (BLOCK_K // 2)
    x_scale_ptrs = x_scale_ptr + rows[:, None] * groups + offs_group[None, :]
    w_scale_ptrs = w_scale_ptr + cols[:, None] * groups + offs_group[None, :]
    x_scale_ptrs += first * (BLOCK_K // 32)
    w_scale_ptrs += first * (BLOCK_K // 32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, cache_modifier=W_CACHE)
            x_scale = tl.load(x_scale_ptrs)
            w_scale = tl.load(w_scale_ptrs)
        else:
            in_pairs = offs_pair < pairs - step * (BLOCK_K // 2)
            in_groups = offs_group < groups - step * (BLOCK_K // 32)
            x = tl.load(x_ptrs, mask=in_pairs[None, :], other=0)
            w = tl.load(w_ptrs, mask=in_pairs[:, None], other=0, cache_modifier=W_CACHE)
            x_scale = tl.load(x_scale_ptrs, mask=in_groups[None, :], other=0)
            w_scale = tl.load(w_scale_ptrs, mask=in_groups[None, :], other=0)
        acc = tl.dot_scaled(x, x_scale, "e2m1", w, w_scale, "e2m1", acc=acc, fast_math=True)
        x_ptrs += BLOCK_K // 2
        w_ptrs += BLOCK_K // 2
        x_scale_ptrs += BLOCK_K // 32
        w_scale_ptrs += BLOCK_K // 32
    return acc


@triton.jit
def _bf16_product(
    x_ptr,
    w_ptr,
    rows,  # [BLOCK_M], all of them rows of x
    cols,  # [BLOCK_N], all of them rows of w
    first,
    last,
    k,
    EVEN_K: tl.constexpr,
    W_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply over steps ``first`` up to ``last`` of BLOCK_K: ``[BLOCK_M, BLOCK_N]`` fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * k + offs_k[None, :] + first * BLOCK_K
    w_ptrs = w_ptr + cols[None, :] * k + offs_k[:, None] + first * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, cache_modifier=W_CACHE)
        else:
            in_k = offs_k < k - step * BLOCK_K
            x = tl.load(x_ptrs, mask=in_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=in_k[:, None], other=0.0, cache_modifier=W_CACHE)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def _store_block(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    y_ptr,  # [m, n], or [splits, m, n]
    bias_ptr,  # [n] fp32 or None
    pid_k,
    rows,  # [BLOCK_M]
    cols,  # [BLOCK_N]
    m,
    n,
):
    """Add the bias and store the block, or the part of it that this split computed."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0)[None, :]
    y_ptrs = y_ptr + pid_k * m * n + rows[:, None] * n + cols[None, :]
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fused_gemm_afp4wfp4_a16w16_kernel(
    y_fp4_ptr,  # [m, n], or [SPLIT_K, m, n] fp32 partials
    y_bf16_ptr,  # [m, n_bf16], or [SPLIT_K, m, n_bf16] fp32 partials
    x_fp4_ptr,  # [m, pairs] uint8, two e2m1 each
    w_fp4_ptr,  # [n, pairs] uint8
    x_fp4_scale_ptr,  # [m, groups] uint8, e8m0
    w_fp4_scale_ptr,  # [n, groups] uint8
    x_bf16_ptr,  # [m, k] bf16
    w_bf16_ptr,  # [n_bf16, k] bf16
    bias_fp4_ptr,  # [n] fp32 or None
    bias_bf16_ptr,  # [n_bf16] fp32 or None
    m,
    n,
    n_bf16,
    k,
    pairs,  # ceil(k / 2)
    groups,  # ceil(k / 32)
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    W_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    num_pid_m = tl.cdiv(m, BLOCK_M)
    num_pid_fp4 = tl.cdiv(n, BLOCK_N)
    num_pid_n = num_pid_fp4 + tl.cdiv(n_bf16, BLOCK_N)
    blocks = num_pid_m * num_pid_n
    pid = near_programs(tl.program_id(0), blocks * SPLIT_K, NUM_XCDS)
    # Splits of one block read nothing in common: neighbours are blocks of one split.
    pid_k = pid // blocks
    pid_m, pid_n = grouped_block(pid % blocks, num_pid_m, num_pid_n, GROUP_M)
    steps = tl.cdiv(k, BLOCK_K)
    per_split = tl.cdiv(steps, SPLIT_K)
    first = tl.minimum(pid_k * per_split, steps)
    last = tl.minimum(first + per_split, steps)
    if WIDE:
        pid_k = pid_k.to(tl.int64)
        pid_m = pid_m.to(tl.int64)
        pid_n = pid_n.to(tl.int64)
    # Rows and columns past the last read an earlier one, so that no load needs their mask.
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Each branch stores its own block: accumulators of the two differ in their layout.
    if pid_n < num_pid_fp4:
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _mxfp4_product(
            x_fp4_ptr,
            w_fp4_ptr,
            x_fp4_scale_ptr,
            w_fp4_scale_ptr,
            rows % m,
            cols % n,
            first,
            last,
            pairs,
            groups,
            EVEN_K,
            W_CACHE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        _store_block(acc, y_fp4_ptr, bias_fp4_ptr, pid_k, rows, cols, m, n)
    else:
        cols = (pid_n - num_pid_fp4) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _bf16_product(
            x_bf16_ptr,
            w_bf16_ptr,
            rows % m,
            cols % n_bf16,
            first,
            last,
            k,
            EVEN_K,
            W_CACHE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        _store_block(acc, y_bf16_ptr, bias_bf16_ptr, pid_k, rows, cols, m, n_bf16)


@triton.jit
def _sum_splits(
    y_ptr,  # [m, n]
    partial_ptr,  # [SPLIT_K, m, n] fp32
    bias_ptr,  # [n] fp32 or None
    pid,
    n,
    elements,  # m * n
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the partials of one block of y's elements, first to last, and add the bias."""
    offsets = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        partial_ptr += elements
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offsets % n, mask=mask, other=0.0)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits_kernel(
    y_fp4_ptr,  # [m, n]
    y_bf16_ptr,  # [m, n_bf16]
    partial_fp4_ptr,  # [SPLIT_K, m, n] fp32
    partial_bf16_ptr,  # [SPLIT_K, m, n_bf16] fp32
    bias_fp4_ptr,  # [n] fp32 or None
    bias_bf16_ptr,  # [n_bf16] fp32 or None
    n,
    n_bf16,
    elements_fp4,  # m * n
    elements_bf16,  # m * n_bf16
    programs_fp4,  # ceil(elements_fp4 / BLOCK), which 32 bits can't always compute
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < programs_fp4:
        _sum_splits(y_fp4_ptr, partial_fp4_ptr, bias_fp4_ptr, pid, n, elements_fp4, SPLIT_K, BLOCK)
    else:
        _sum_splits(
            y_bf16_ptr,
            partial_bf16_ptr,
            bias_bf16_ptr,
            pid - programs_fp4,
            n_bf16,
            elements_bf16,
            SPLIT_K,
            BLOCK,
        )


def _rules(tile: Tile) -> list[TileRule]:
    least = f"{MX_GROUP} or more: as many mxfp4 elements share a scale"
    return [
        ("block_k", tile.block_k >= MX_GROUP, least),
        ("split_k", tile.split_k >= 1, "1 or more"),
    ]


def _arguments(
    y_fp4: Any,
    y_bf16: Any,
    x_fp4: Any,
    w_fp4: Any,
    x_fp4_scale: Any,
    w_fp4_scale: Any,
    x_bf16: Any,
    w_bf16: Any,
    tile: Tile,
    bias_fp4: Any,
    bias_bf16: Any,
    num_xcds: int,
) -> dict[str, Any]:
    """Bind the kernel's parameters: a launch with tensors, the compiler with shapes."""
    m, k = x_bf16.shape
    shared = tile.split_k > 1
    tensors = {
        "y_fp4_ptr": y_fp4,
        "y_bf16_ptr": y_bf16,
        "x_fp4_ptr": x_fp4,
        "w_fp4_ptr": w_fp4,
        "x_fp4_scale_ptr": x_fp4_scale,
        "w_fp4_scale_ptr": w_fp4_scale,
        "x_bf16_ptr": x_bf16,
        "w_bf16_ptr": w_bf16,
    }
    return {
        **tensors,
        # Partials go without: the sum adds the bias, once.
        "bias_fp4_ptr": None if shared else bias_fp4,
        "bias_bf16_ptr": None if shared else bias_bf16,
        "m": m,
        "n": w_fp4.shape[0],
        "n_bf16": w_bf16.shape[0],
        "k": k,
        "pairs": mx_pairs(k),
        "groups": mx_groups(k),
        "EVEN_K": k % tile.block_k == 0,
        # AMD's buffer loads take 32-bit offsets alone.
        "WIDE": max(math.prod(tensor.shape) for tensor in tensors.values()) >= WIDE_ELEMENTS,
        "W_CACHE": ".cg" if tile.block_m <= STREAMED_BLOCK_M else "",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SPLIT_K": tile.split_k,
        "GROUP_M": tile.group_m,
        "NUM_XCDS": num_xcds,
    }


def source(problem: Problem, tile: Tile, target: Target) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    Raises:
        ValueError: the kernel can't take the tile or a format.
    """
    check_tile(tile, _rules(tile))
    check_formats(problem, y_formats=UNQUANTIZED)
    m, n, n_bf16, k = problem.m, problem.n, problem.n_bf16, problem.k
    shared = tile.split_k > 1
    rows = (tile.split_k, m) if shared else (m,)
    y_dtype = "fp32" if shared else problem.y_format
    args = _arguments(
        y_fp4=TensorSpec((*rows, n), y_dtype),
        y_bf16=TensorSpec((*rows, n_bf16), y_dtype),
        x_fp4=TensorSpec((m, mx_pairs(k)), "u8"),
        w_fp4=TensorSpec((n, mx_pairs(k)), "u8"),
        x_fp4_scale=TensorSpec((m, mx_groups(k)), "u8"),
        w_fp4_scale=TensorSpec((n, mx_groups(k)), "u8"),
        x_bf16=TensorSpec((m, k), "bf16"),
        w_bf16=TensorSpec((n_bf16, k), "bf16"),
        tile=tile,
        bias_fp4=TensorSpec((n,), "fp32") if problem.bias else None,
        bias_bf16=TensorSpec((n_bf16,), "fp32") if problem.bias else None,
        num_xcds=target.xcds,
    )
    options = AMD_OPTIONS if target.backend == "hip" else {}
    return Source(_fused_gemm_afp4wfp4_a16w16_kernel, args, options)


def fused_gemm_afp4wfp4_a16w16(
    x_fp4: Tensor,
    w_fp4: Tensor,
    x_fp4_scale: Tensor,
    w_fp4_scale: Tensor,
    x_bf16: Tensor,
    w_bf16: Tensor,
    tile: Tile,
    *,
    bias_fp4: Tensor | None = None,
    bias_bf16: Tensor | None = None,
    num_warps: int = 8,
    num_stages: int = 1,
    num_xcds: int = 1,
    y_format: str = "bf16",
) -> tuple[Tensor, Tensor]:
    """Compute both products; k is that of ``x_bf16``.

    Args:
        x_fp4: ``[m, ceil(k / 2)]`` uint8, as `formats.quantize_mxfp4` packs it.
        w_fp4: ``[n, ceil(k / 2)]`` uint8, likewise.
        x_fp4_scale: ``[m, ceil(k / 32)]`` uint8, e8m0.
        w_fp4_scale: ``[n, ceil(k / 32)]`` uint8, e8m0.
        x_bf16: ``[m, k]`` bf16.
        w_bf16: ``[n_bf16, k]`` bf16.
        tile: of both products; ``split_k`` programs share each reduction.
        bias_fp4: ``[n]`` fp32, None adds nothing.
        bias_bf16: ``[n_bf16]`` fp32, None adds nothing.
        num_xcds: dies of the chip that share no L2 (8 on MI300X and MI355X).
        y_format: ``bf16`` or ``fp32``.
    Returns:
        y_fp4 ``[m, n]`` and y_bf16 ``[m, n_bf16]``.
    Raises:
        ValueError: shapes, types or devices disagree, or the kernel can't take the tile;
            the message shows what was given and what would fit.
        triton.runtime.errors.OutOfResources: tile and stages exceed the LDS.
    """
    import torch

    expect_tile(tile)
    check_tile(tile, _rules(tile))
    check_schedule(num_warps, num_stages, num_xcds)
    one_of("y_format", y_format, UNQUANTIZED)
    u8, bf16, fp32 = (torch.uint8,), (torch.bfloat16,), (torch.float32,)
    expect("x_bf16", x_bf16, (None, None), bf16, of=w_fp4)
    m, k = x_bf16.shape
    expect("w_bf16", w_bf16, (None, k), bf16, of=w_fp4)
    expect("w_fp4", w_fp4, (None, mx_pairs(k)), u8, of=w_fp4)
    n, n_bf16 = w_fp4.shape[0], w_bf16.shape[0]
    expect("x_fp4", x_fp4, (m, mx_pairs(k)), u8, of=w_fp4)
    expect("x_fp4_scale", x_fp4_scale, (m, mx_groups(k)), u8, of=w_fp4)
    expect("w_fp4_scale", w_fp4_scale, (n, mx_groups(k)), u8, of=w_fp4)
    if bias_fp4 is not None:
        expect("bias_fp4", bias_fp4, (n,), fp32, of=w_fp4)
    if bias_bf16 is not None:
        expect("bias_bf16", bias_bf16, (n_bf16,), fp32, of=w_fp4)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=w_fp4.device)

    y_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[y_format]
    y = empty(m, n, dtype=y_dtype), empty(m, n_bf16, dtype=y_dtype)
    parts = y
    if tile.split_k > 1:
        parts = tuple(empty(tile.split_k, *each.shape, dtype=torch.float32) for each in y)
    blocks = triton.cdiv(n, tile.block_n) + triton.cdiv(n_bf16, tile.block_n)
    programs = triton.cdiv(m, tile.block_m) * blocks * tile.split_k
    if not programs:
        return y
    # What fills the last byte of x and of w must not meet; w's is left as it is.
    x_fp4 = without_filler(x_fp4, k)
    args = _arguments(
        *parts,
        x_fp4,
        w_fp4,
        x_fp4_scale,
        w_fp4_scale,
        x_bf16,
        w_bf16,
        tile,
        bias_fp4,
        bias_bf16,
        num_xcds,
    )
    options = AMD_OPTIONS if torch.version.hip else {}
    with torch.cuda.device_of(w_fp4):
        _fused_gemm_afp4wfp4_a16w16_kernel[(programs,)](
            **args, **options, num_warps=num_warps, num_stages=num_stages
        )
        if tile.split_k > 1:
            sums = [triton.cdiv(each.numel(), SUM_BLOCK) for each in y]
            _sum_splits_kernel[(sum(sums),)](
                *y,
                *parts,
                bias_fp4,
                bias_bf16,
                n,
                n_bf16,
                m * n,
                m * n_bf16,
                sums[0],
                SPLIT_K=tile.split_k,
                BLOCK=SUM_BLOCK,
            )
    return y


def cost(problem: Problem) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move."""
    m, n, n_bf16, k = problem.m, problem.n, problem.n_bf16, problem.k
    y_bytes = {"bf16": 2, "fp32": 4}[problem.y_format] * m * (n + n_bf16)
    return Cost(
        flops=2 * m * (n + n_bf16) * k,
        bytes=(m + n) * (mx_pairs(k) + mx_groups(k)) + 2 * (m + n_bf16) * k + y_bytes,
    )


def reference(
    x_fp4: Tensor,
    w_fp4: Tensor,
    x_fp4_scale: Tensor,
    w_fp4_scale: Tensor,
    x_bf16: Tensor,
    w_bf16: Tensor,
    *,
    bias_fp4: Tensor | None = None,
    bias_bf16: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Say what correct means: two matrix products in float64.

    Arguments are those of `fused_gemm_afp4wfp4_a16w16`; returns ``[m, n]`` and
    ``[m, n_bf16]`` float64.
    """
    k = x_bf16.shape[1]
    x = dequantize_mxfp4(x_fp4, x_fp4_scale, k).double()
    y_fp4 = x @ dequantize_mxfp4(w_fp4, w_fp4_scale, k).double().T
    y_bf16 = x_bf16.double() @ w_bf16.double().T
    if bias_fp4 is not None:
        y_fp4 += bias_fp4
    if bias_bf16 is not None:
        y_bf16 += bias_bf16
    return y_fp4, y_bf16
