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
    y_ptr,  # [rows, n_out]
    bias_ptr,  # [experts, n] fp32 or None
    weight_ptr,  # [rows] fp32 routing weights or None
    rows,  # [BLOCK_M] row of y
    row_mask,  # [BLOCK_M]
    expert,
    pid_n,
    n,
    alpha,
    limit,
    shift,
    BLOCK_N: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Add the bias, activate, weight by routing, and store the tile."""
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * n + offs_n, mask=offs_n < n, other=0.0)[None, :]
    if SWIGLU:
        gate, up = tl.split(tl.reshape(acc, (acc.shape[0], BLOCK_N // 2, 2)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        out = gate * tl.sigmoid(alpha * gate) * (up + shift)
        n_out = n // 2
        offs_n = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        out = acc
        n_out = n
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + rows, mask=row_mask, other=0.0)[:, None]
    mask = row_mask[:, None] & (offs_n < n_out)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_out + offs_n[None, :]
    tl.store(y_ptr + offsets, out.to(y_ptr.dtype.element_ty), mask=mask)


def finish_reference(
    acc: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    swiglu: SwiGLU | None,
) -> Tensor:
    """Do what `finish` does to one expert's rows, in plain PyTorch.

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
