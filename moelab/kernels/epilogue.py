"""What every MoE GEMM does to its accumulator before it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SwiGLU:
    """Gated activation over interleaved (gate, up) column pairs.

    ``y = g * sigmoid(alpha * g) * (u + shift)`` with ``g = min(gate, limit)`` and
    ``u = clamp(up, -limit, limit)``. The defaults are the plain form; GPT-OSS has
    alpha 1.702, limit 7 and shift 1 (openai/gpt-oss, gpt_oss/torch/model.py).
    """

    alpha: float = 1.0
    limit: float = float("inf")
    shift: float = 0.0


@triton.jit
def finish(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    y_ptr,  # [rows, n_out] bf16, fp32 or fp8
    y_scale_ptr,  # None, [1] fp32 that divides y, or [rows, ceil(n_out / 32)] uint8, written
    bias_ptr,  # [experts, n] fp32 or None
    weight_ptr,  # [rows] fp32 routing weights or None
    rows,  # [BLOCK_M] in expert order
    row_mask,  # [BLOCK_M]
    y_rows,  # [BLOCK_M] of y
    expert,
    pid_n,
    n,
    alpha,
    limit,
    shift,
    BLOCK_N: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Add the bias, activate, weight by routing, quantize and store the tile."""
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * n + offs_n, mask=offs_n < n, other=0.0)[None, :]
    if SWIGLU:
        gate, up = tl.split(tl.reshape(acc, (acc.shape[0], BLOCK_N // 2, 2)))
        out = activate(gate, up, alpha, limit, shift)
        n_out = n // 2
        offs_n = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        out = acc
        n_out = n
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + rows)[:, None]
    if y_scale_ptr is not None:
        if y_scale_ptr.dtype.element_ty == tl.uint8:
            # Columns past n repeat others: they must not set the last group's scale.
            out = tl.where((offs_n < n_out)[None, :], out, 0.0)
            out, scale = mxfp8(out)
            GROUPS: tl.constexpr = scale.shape[1]
            groups = tl.cdiv(n_out, 32)
            offs_group = pid_n * GROUPS + tl.arange(0, GROUPS)
            tl.store(
                y_scale_ptr + y_rows[:, None] * groups + offs_group[None, :],
                scale,
                mask=row_mask[:, None] & (offs_group < groups)[None, :],
            )
        else:
            out /= tl.load(y_scale_ptr)
        out = saturate(out, y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + y_rows[:, None] * n_out + offs_n[None, :],
        out.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (offs_n < n_out)[None, :],
    )


@triton.jit
def activate(gate, up, alpha, limit, shift):
    """Apply `SwiGLU`."""
    # The plain minimum drops NaN: a model that diverged would look sound.
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(alpha * gate) * (up + shift)


@triton.jit
def saturate(out, dtype: tl.constexpr):
    """Limit to what an fp8 holds, as `formats.quantize_fp8`: an infinity becomes NaN."""
    LARGEST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 240.0
    finite = tl.abs(out) < float("inf")
    return tl.where(finite, tl.clamp(out, -LARGEST, LARGEST), float("nan"))


@triton.jit
def mxfp8(x):
    """Divide groups of 32 columns by their e8m0 scale, as `formats.quantize_mxfp8` does.

    Returns:
        the quotients ``[BLOCK_M, columns]`` and the scales ``[BLOCK_M, columns // 32]`` uint8.
    """
    groups = tl.reshape(x, (x.shape[0], x.shape[1] // 32, 32))
    # Magnitudes order as their bits do, and NaN above all: a NaN makes its group's scale NaN.
    largest = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    exponent = largest >> 23
    # e4m3's largest power of two is 2^8.
    scale = tl.where(exponent == 255, 255, tl.maximum(exponent - 8, 0))
    inverse = ((254 - tl.minimum(scale, 254)) << 23).to(tl.float32, bitcast=True)
    return tl.reshape(groups * inverse[:, :, None], x.shape), scale.to(tl.uint8)


def finish_reference(
    acc: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    swiglu: SwiGLU | None,
) -> Tensor:
    """Do what `finish` does to one expert's rows, in plain PyTorch, short of quantizing.

    Args:
        acc: ``[rows, n]`` float.
        bias: ``[n]``.
        weight: ``[rows]``.
    """
    import torch

    if bias is not None:
        acc = acc + bias
    if swiglu is not None:
        gate = acc[:, 0::2].clamp(max=swiglu.limit)
        up = acc[:, 1::2].clamp(-swiglu.limit, swiglu.limit)
        acc = gate * torch.sigmoid(swiglu.alpha * gate) * (up + swiglu.shift)
    if weight is not None:
        acc = acc * weight[:, None]
    return acc
