"""How programs read their tiles of w: columns that wrap, mxfp4 and its scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..specs import SCALE_LAYOUTS, Tile
from . import hopper_weights
from .formats import mx_groups, unshuffle_scales_cdna4
from .launch import TileRule, expect, one_of

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def columns(pid_n, n, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Find the tile's columns of w; those past n read an earlier one, so no load needs a mask.

    Offsets within a tensor are 32-bit unless WIDE: AMD's buffer loads take no others.
    """
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    if WIDE:
        offs_n = offs_n.to(tl.int64)
    return offs_n


@triton.jit
def mxfp4_pointers(
    w_ptr,  # [experts, n, pairs] uint8, two e2m1 each
    w_scale_ptr,  # e8m0: [experts, n, groups], or shuffled [experts, ceil(n / 32), ...]
    expert,
    pid_n,
    n,
    pairs,  # ceil(k / 2)
    scale_stride,  # bytes between two rows of w_scale
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CDNA4: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Point at the first step's ``[BLOCK_K // 2, BLOCK_N]`` of w, and at its scales."""
    offs_n = columns(pid_n, n, BLOCK_N, WIDE)
    offs_pair = tl.arange(0, BLOCK_K // 2)
    w_ptrs = w_ptr + expert * n * pairs + offs_n[None, :] * pairs + offs_pair[:, None]
    if CDNA4:
        # A row holds the scales of 32 columns, a byte for each element of K.
        scale_rows = tl.cdiv(n, 32)
        offs_row = columns(pid_n, scale_rows, BLOCK_N // 32, WIDE)
        offs_scale = tl.arange(0, BLOCK_K)
    else:
        scale_rows = n
        offs_row = offs_n
        offs_scale = tl.arange(0, BLOCK_K // 32)
    w_scale_ptrs = w_scale_ptr + expert * scale_rows * scale_stride
    w_scale_ptrs += offs_row[:, None] * scale_stride + offs_scale[None, :]
    return w_ptrs, w_scale_ptrs


@triton.jit
def mxfp4_load(
    w_ptrs,
    w_scale_ptrs,
    start_k,
    pairs,
    scale_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CDNA4: tl.constexpr,
    EVEN_K: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Load one step of w, its scales ``[BLOCK_N, BLOCK_K // 32]``, and move on."""
    scale_step: tl.constexpr = BLOCK_K if CDNA4 else BLOCK_K // 32
    if EVEN_K:
        w = tl.load(w_ptrs, cache_modifier=CACHE)
        w_scale = tl.load(w_scale_ptrs)
    else:
        # Differences, not quotients of what is left: the compiler sees how they align.
        in_pairs = tl.arange(0, BLOCK_K // 2) < pairs - start_k // 2
        in_scales = tl.arange(0, scale_step) < scale_stride - start_k // BLOCK_K * scale_step
        w = tl.load(w_ptrs, mask=in_pairs[:, None], other=0, cache_modifier=CACHE)
        w_scale = tl.load(w_scale_ptrs, mask=in_scales[None, :], other=0)
    if CDNA4:
        # The order in `formats.shuffle_scales_cdna4`, undone.
        w_scale = tl.reshape(w_scale, (BLOCK_N // 32, BLOCK_K // 256, 4, 16, 2, 2))
        w_scale = tl.permute(w_scale, (0, 5, 3, 1, 4, 2))
        w_scale = tl.reshape(w_scale, (BLOCK_N, BLOCK_K // 32))
    return w, w_scale, w_ptrs + BLOCK_K // 2, w_scale_ptrs + scale_step


def scale_shape(experts: int, n: int, k: int, layout: str) -> tuple[int, int, int]:
    """Give the shape of w's scales; ``cdna4`` packs those of 32 columns into a row.

    ``hopper`` weights have a kernel of their own, `mxfp4_hopper`.

    Raises:
        ValueError: there is no such layout; the message lists those there are.

    >>> scale_shape(128, 5760, 2880, "cdna4")
    (128, 180, 3072)
    """
    one_of("scale_layout", layout, SCALE_LAYOUTS)
    if layout == "rows":
        return experts, n, mx_groups(k)
    return experts, -(-n // 32), -(-mx_groups(k) // 8) * 256


def check_scales(w_scale: Tensor, w: Tensor, k: int, layout: str) -> None:
    """Check w's scales against w ``[experts, n, ...]``.

    Raises:
        ValueError: they disagree; the message shows both.
    """
    import torch

    experts, n = w.shape[:2]
    expect("w_scale", w_scale, scale_shape(experts, n, k, layout), (torch.uint8,), of=w)


def in_rows(w: Tensor, w_scale: Tensor, k: int, layout: str) -> tuple[Tensor, Tensor]:
    """Read w and its scales of any layout as ``[experts, n, pairs]`` and ``..., groups]``."""
    if layout == "hopper":
        return hopper_weights.unpack(w, w_scale, k)
    if layout == "cdna4":
        w_scale = unshuffle_scales_cdna4(w_scale, w.shape[1], mx_groups(k))
    return w, w_scale


def mx_rules(tile: Tile, layout: str) -> list[TileRule]:
    """Say what tiles the layout of w's scales allows; see `launch.check_tile`."""
    if layout == "rows":
        return []
    return [
        ("block_n", tile.block_n >= 32, "32 or more: cdna4 scales lie by 32 columns"),
        ("block_k", tile.block_k >= 256, "256 or more: cdna4 scales lie by 256 elements of K"),
    ]
