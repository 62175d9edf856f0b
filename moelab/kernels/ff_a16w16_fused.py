"""Feed-forward layer in one launch, bf16: y = h w_down^T with h = act(x w_up^T).

One program computes one BLOCK_M x BLOCK_N tile of the up-projection over all of k, applies
the activation and rounds to bf16. It then walks the columns of y, BLOCK_K at a time:
multiplies its part of h with its part of w_down, and adds to y with atomics, for every
block of h's columns adds to all of y's. h never leaves the chip.

With a gate the up-projection's columns are interleaved (gate, up) pairs, each of which ends
as one column of h: h = act(gate) * up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from ..specs import UNQUANTIZED, Cost, Problem, Source, Target, TensorSpec, Tile
from .launch import (
    AMD_OPTIONS,
    STREAMED_BLOCK_M,
    WIDE_ELEMENTS,
    TileRule,
    check_even,
    check_formats,
    check_schedule,
    check_tile,
    expect,
    expect_tile,
    one_of,
)

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "relu", None)

# NVIDIA's tl.dot refuses to reduce over fewer bf16 (triton 3.6 to 3.9, min_dot_size). Here
# block_k is one product's reduction, the tile's columns of h the other's.
MIN_REDUCTION = 16


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Apply one of `ACTIVATIONS`; NaN stays NaN."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), here with 2 z = sqrt(8 / pi) (x + 0.044715 x^3).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def _ff_a16w16_fused_kernel(
    y_ptr,  # [m, k] fp32, zero
    x_ptr,  # [m, k] bf16
    w_up_ptr,  # [n, k] bf16
    w_down_ptr,  # [k, n_h] bf16
    m,
    n,
    k,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    W_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_H: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n_h = n // 2 if GATED else n
    pid = tl.program_id(0)
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:
        pid = pid.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    # Programs that run together share a block of the weights, and add to different rows.
    num_pid_m = tl.cdiv(m, BLOCK_M)
    rows = pid % num_pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_n = pid // num_pid_m
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    # Rows past the last read it again, so that no load of x needs a mask along m.
    x_ptrs = x_ptr + tl.minimum(rows, m - 1)[:, None] * k + offs_k[None, :]
    w_up_ptrs = w_up_ptr + offs_n[None, :] * k + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w_up = tl.load(w_up_ptrs, cache_modifier=W_CACHE)
        else:
            in_k = offs_k < k - start_k
            x = tl.load(x_ptrs, mask=in_k[None, :], other=0.0)
            w_up = tl.load(w_up_ptrs, mask=in_k[:, None], other=0.0, cache_modifier=W_CACHE)
        acc = tl.dot(x, w_up, acc)
        x_ptrs += BLOCK_K
        w_up_ptrs += BLOCK_K

    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_H, 2)))
        h = _activate(gate, ACTIVATION) * up
    else:
        h = _activate(acc, ACTIVATION)
    offs_h = pid_n * BLOCK_H + tl.arange(0, BLOCK_H)
    if not EVEN_N:
        # Columns past the last hold earlier ones; infinite, they would make NaN of a masked 0.
        h = tl.where((offs_h < n_h)[None, :], h, 0.0)
    h = h.to(w_down_ptr.dtype.element_ty)

    for start_k in range(0, k, BLOCK_K):
        cols = start_k + offs_k
        w_down_ptrs = w_down_ptr + cols[None, :] * n_h + offs_h[:, None]
        if EVEN_N and EVEN_K:
            w_down = tl.load(w_down_ptrs, cache_modifier=W_CACHE)
        else:
            in_w_down = (offs_h < n_h)[:, None] & (cols < k)[None, :]
            w_down = tl.load(w_down_ptrs, mask=in_w_down, other=0.0, cache_modifier=W_CACHE)
        y_ptrs = y_ptr + rows[:, None] * k + cols[None, :]
        in_y = (rows < m)[:, None] & (cols < k)[None, :]
        # Nobody reads y before the launch ends, so nothing needs to be ordered.
        tl.atomic_add(y_ptrs, tl.dot(h, w_down), mask=in_y, sem="relaxed")


def _rules(tile: Tile, gated: bool) -> list[TileRule]:
    least = f"{MIN_REDUCTION} or more: tl.dot reduces over no fewer"
    least_n = 2 * MIN_REDUCTION if gated else MIN_REDUCTION
    of_n = f"{least_n} or more with a gate, which halves it" if gated else least
    return [
        ("split_k", tile.split_k == 1, "1: the activation needs the whole sum over k"),
        ("block_n", tile.block_n >= least_n, of_n),
        ("block_k", tile.block_k >= MIN_REDUCTION, least),
    ]


def _arguments(
    y: Any,
    x: Any,
    w_up: Any,
    w_down: Any,
    tile: Tile,
    gated: bool,
    activation: str | None,
) -> dict[str, Any]:
    """Bind the kernel's parameters: a launch with tensors, the compiler with shapes."""
    m, k = x.shape
    n = w_up.shape[0]
    return {
        "y_ptr": y,
        "x_ptr": x,
        "w_up_ptr": w_up,
        "w_down_ptr": w_down,
        "m": m,
        "n": n,
        "k": k,
        "GATED": gated,
        "ACTIVATION": activation,
        "EVEN_N": n % tile.block_n == 0,
        "EVEN_K": k % tile.block_k == 0,
        "WIDE": max(m, n) * k >= WIDE_ELEMENTS,
        "W_CACHE": ".cg" if tile.block_m <= STREAMED_BLOCK_M else "",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def source(problem: Problem, tile: Tile, target: Target) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    ``problem.swiglu`` tells whether there is a gate; either way the activation is silu.

    Raises:
        ValueError: the kernel can't take the tile or a format.
    """
    check_formats(problem, y_formats=UNQUANTIZED)
    check_even("w_up", problem.n, problem.swiglu)
    check_tile(tile, _rules(tile, problem.swiglu))
    args = _arguments(
        y=TensorSpec((problem.m, problem.k), "fp32"),
        x=TensorSpec((problem.m, problem.k), "bf16"),
        w_up=TensorSpec((problem.n, problem.k), "bf16"),
        w_down=TensorSpec((problem.k, problem.n_out), "bf16"),
        tile=tile,
        gated=problem.swiglu,
        activation="silu",
    )
    options = AMD_OPTIONS if target.backend == "hip" else {}
    return Source(_ff_a16w16_fused_kernel, args, options)


def ff_a16w16_fused(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    tile: Tile,
    *,
    gated: bool = True,
    activation: str | None = "silu",
    num_warps: int = 8,
    num_stages: int = 1,
    y_format: str = "bf16",
) -> Tensor:
    """Compute a feed-forward layer; the hidden layer is never stored.

    y is added up in fp32 by atomics, so its last bits differ from call to call.

    Args:
        x: ``[m, k]`` bf16.
        w_up: ``[n, k]`` bf16; if ``gated``, rows alternate between gate and up.
        w_down: ``[k, n_h]`` bf16, where n_h is ``n // 2`` if ``gated``, else n.
        tile: of the up-projection; block_k is also the step along the columns of y.
        activation: ``"silu"``, ``"gelu"`` (by tanh), ``"relu"`` or None; of the gate if
            there is one.
        y_format: ``bf16`` or ``fp32``.
    Returns:
        ``[m, k]``.
    Raises:
        ValueError: shapes, types or devices disagree, or the kernel can't take the tile;
            the message shows what was given and what would fit.
        triton.runtime.errors.OutOfResources: tile and stages exceed the LDS.
    """
    import torch

    expect_tile(tile)
    check_tile(tile, _rules(tile, gated))
    one_of("activation", activation, ACTIVATIONS)
    one_of("y_format", y_format, UNQUANTIZED)
    bf16 = (torch.bfloat16,)
    expect("w_up", w_up, (None, None), bf16, of=w_up)
    n, k = w_up.shape
    check_even("w_up", n, gated)
    check_schedule(num_warps, num_stages)
    expect("w_down", w_down, (k, n // 2 if gated else n), bf16, of=w_up)
    expect("x", x, (None, k), bf16, of=w_up)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if y.numel() and n:
        grid = (triton.cdiv(x.shape[0], tile.block_m) * triton.cdiv(n, tile.block_n),)
        args = _arguments(y, x, w_up, w_down, tile, gated, activation)
        options = AMD_OPTIONS if torch.version.hip else {}
        kernel = _ff_a16w16_fused_kernel[grid]
        with torch.cuda.device_of(x):
            kernel(**args, **options, num_warps=num_warps, num_stages=num_stages)
    return y if y_format == "fp32" else y.bfloat16()


def cost(problem: Problem) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move."""
    m, n, k, n_h = problem.m, problem.n, problem.k, problem.n_out
    return Cost(
        flops=2 * m * n * k + 2 * m * n_h * k,
        bytes=2 * (m * k + n * k + k * n_h) + {"bf16": 2, "fp32": 4}[problem.y_format] * m * k,
    )


def reference(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    gated: bool = True,
    activation: str | None = "silu",
) -> Tensor:
    """Say what correct means: two matrix products in float64, h rounded to bf16 between.

    Arguments are those of `ff_a16w16_fused`; returns ``[m, k]`` float64.
    """
    import torch.nn.functional as F

    activate = {
        "silu": F.silu,
        "gelu": lambda z: F.gelu(z, approximate="tanh"),
        "relu": F.relu,
        None: lambda z: z,
    }[activation]
    acc = x.double() @ w_up.double().T
    h = activate(acc[:, 0::2]) * acc[:, 1::2] if gated else activate(acc)
    return h.bfloat16().double() @ w_down.double().T
