"""mxfp4 weights as Hopper's fp8 matrix units take them, and back: done once, when they are loaded.

Hopper multiplies fp8 but no mxfp4. Its fp8 holds an mxfp4 element together with what its
group's scale is below the row's largest: e2m1 times a power of two. So a row of w, a column of
y, is read as ::

    w[n, k] = fp8(code(n, k) * 2^(9 - below(n, k // 32))) * base(n)

with one fp32 ``base`` a row and one ``below`` (0 to 255) a group, chosen so that the largest
element comes to 256 or 384. Elements down to 2^-14 of the row's largest are exact; below that
fp8 is subnormal and rounds by at most 2^-18 of the row's largest. The eight magnitudes that a
``below`` can give are a row of `magnitudes`: 8 bytes, which a byte permutation looks codes up in.

Everything lies as a thread of `mxfp4_hopper` wants it, by blocks of 16 rows and steps of 128
along K, rows 2 g and 2 g + 1 being 8 apart (a pair of gate and up is one thread's) ::

    w        [n / 16, steps, 16 rows, 64 bytes]: a word of 8 elements has their magnitudes in
             place; bit 7 of its byte q is the sign of element q, bit 3 that of element q + 4
    w_scale  [n / 16, steps, 8 g, 4 groups, 2 rows] bytes ``below``, then 16 ``base``

A NaN among a row's scales makes its ``base`` NaN: whatever x is, all that the row gives is NaN.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .formats import MX_GROUP, dequantize_mxfp4, mx_groups, mx_pairs, without_filler
from .launch import expect

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Rows that lie together, and elements along K: what one wgmma takes of w, and four.
BLOCK_ROWS = 16
STEP = 128

_STEP_GROUPS = STEP // MX_GROUP
# Of `below`, what leaves an element as it is.
_AS_IT_IS = 9
_NO_GROUP = -(2**10)
_E8M0_NAN, _E8M0_BIAS = 255, 127


def steps(k: int) -> int:
    """Count the steps that k elements take, the last perhaps in part."""
    return -(-k // STEP)


def w_shape(experts: int, n: int, k: int) -> tuple[int, int, int]:
    """Give the shape of packed w, in bytes.

    >>> w_shape(128, 5760, 2880)
    (128, 5760, 1472)
    """
    return experts, n, steps(k) * STEP // 2


def w_scale_shape(experts: int, n: int, k: int) -> tuple[int, int, int]:
    """Give the shape of packed scales, in bytes; a row holds those of 16 rows of w.

    >>> w_scale_shape(128, 5760, 2880)
    (128, 360, 1536)
    """
    return experts, n // BLOCK_ROWS, (steps(k) + 1) * BLOCK_ROWS * _STEP_GROUPS


def check_rows(n: int) -> None:
    """Check that rows of w come in whole blocks.

    Raises:
        ValueError: they don't.
    """
    if n % BLOCK_ROWS:
        raise ValueError(
            f"w has n = {n}; hopper weights lie by {BLOCK_ROWS} rows: pad n to "
            f"{n + -n % BLOCK_ROWS}, or take scale_layout rows"
        )


def pack(w: Tensor, w_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lay mxfp4 weights out for ``scale_layout="hopper"``.

    Args:
        w: ``[experts, n, ceil(k / 2)]`` uint8, two e2m1 each; 16 divides n.
        w_scale: ``[experts, n, ceil(k / 32)]`` uint8, e8m0.
        k: elements of a row.
    Returns:
        both of the shapes that `w_shape` and `w_scale_shape` give, uint8; K is padded by zeros.
    Raises:
        ValueError: shapes or types disagree, or 16 doesn't divide n.
    """
    import torch

    expect("w", w, (None, None, mx_pairs(k)), (torch.uint8,), of=w)
    experts, n, _ = w.shape
    expect("w_scale", w_scale, (experts, n, mx_groups(k)), (torch.uint8,), of=w)
    check_rows(n)
    packed = w.new_empty(w_shape(experts, n, k))
    packed_scale = w.new_empty(w_scale_shape(experts, n, k))
    # One expert at a time: what is made on the way takes several times its size.
    for expert in range(experts):
        codes = without_filler(w[expert], k)
        codes = torch.nn.functional.pad(codes, (0, packed.shape[2] - codes.shape[1]))
        below, base = _relative(codes, w_scale[expert])
        packed[expert] = _blocked(_signs_apart(codes), STEP // 2).flatten(-3).view(n, -1)
        by_step = _blocked(below, _STEP_GROUPS).unflatten(2, (2, 8)).permute(0, 1, 3, 4, 2)
        of_block = base.unflatten(0, (-1, 8, 2)).mT.reshape(-1, BLOCK_ROWS)
        packed_scale[expert] = torch.cat((by_step.flatten(1), of_block.view(torch.uint8)), 1)
    return packed, packed_scale


def unpack(w: Tensor, w_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`, for a reference.

    What nothing depends on is not kept: the scale of a group of zeros, and which of a row's
    scales was NaN (all of them come back as NaN). A scale more than 2^240 below the row's
    largest comes back as 2^240 below it, or more.

    Args:
        w, w_scale: as `pack` gives them.
        k: elements of a row.
    Returns:
        w ``[experts, n, ceil(k / 2)]`` and its scales ``[experts, n, ceil(k / 32)]``.
    Raises:
        ValueError: shapes or types disagree.
    """
    import torch

    check(w, w_scale, k)
    experts, n, _ = w.shape
    codes = w.new_empty((experts, n, mx_pairs(k)))
    scale = w.new_empty((experts, n, mx_groups(k)))
    for expert in range(experts):
        words = w[expert].view(-1, steps(k), BLOCK_ROWS, STEP // 2)
        codes[expert] = _signs_in_place(_rows(words))[:, : codes.shape[2]]
        below, base = w_scale[expert].split([w_scale.shape[2] - 64, 64], dim=1)
        below = below.unflatten(1, (-1, 8, _STEP_GROUPS, 2)).permute(0, 1, 4, 2, 3).flatten(2, 3)
        base = base.contiguous().view(torch.float32).unflatten(1, (2, 8)).mT.reshape(n, 1)
        # A power of two, whose logarithm is exact; of NaN it is NaN.
        largest = torch.log2(base.double()) + _E8M0_BIAS
        e8m0 = (largest + _AS_IT_IS - _rows(below)).clamp(0, _E8M0_NAN - 1)
        e8m0 = e8m0.masked_fill(base.isnan(), _E8M0_NAN).to(torch.uint8)
        scale[expert] = e8m0[:, : scale.shape[2]]
    return codes, scale


def check(w: Tensor, w_scale: Tensor, k: int) -> None:
    """Check packed weights against each other and k.

    Raises:
        ValueError: they disagree; the message shows both.
    """
    import torch

    expect("w", w, (None, None, w_shape(1, 1, k)[2]), (torch.uint8,), of=w)
    experts, n, _ = w.shape
    check_rows(n)
    expect("w_scale", w_scale, w_scale_shape(experts, n, k), (torch.uint8,), of=w)


@functools.cache
def magnitudes(device: torch.device) -> Tensor:
    """Give the fp8 of each magnitude of e2m1 times 2^(9 - row).

    Returns:
        ``[256]`` int64, the 8 bytes of a row in one.
    """
    import torch

    codes = torch.tensor([0x10, 0x32, 0x54, 0x76], dtype=torch.uint8)
    one = torch.tensor([_E8M0_BIAS], dtype=torch.uint8)
    e2m1 = dequantize_mxfp4(codes, one, 8).double()
    exponent = _AS_IT_IS - torch.arange(256, dtype=torch.float64)
    # Where a product is too large, no code of a group with that `below` stands for it.
    products = (e2m1 * exponent.exp2()[:, None]).clamp(max=448).float()
    return products.to(torch.float8_e4m3fn).view(torch.int64).flatten().to(device)


def _relative(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Refer the scales of ``[n, groups]`` to their row: ``below`` of each group, and ``base``."""
    import torch

    scale = torch.nn.functional.pad(scale, (0, codes.shape[1] // 16 - scale.shape[1]))
    largest = torch.maximum(codes & 7, codes >> 4 & 7).unflatten(1, (-1, 16)).amax(2)
    # The scale that would bring a group's largest element to 256 or 384.
    wanted = scale.short() - _AS_IT_IS + largest // 2
    base = wanted.masked_fill(largest == 0, _NO_GROUP).amax(1).clamp(min=-_AS_IT_IS)
    below = (_AS_IT_IS + base[:, None] - scale).clamp(0, 255).to(torch.uint8)
    value = torch.exp2(base.double() - _E8M0_BIAS).float()
    return below, value.masked_fill((scale == _E8M0_NAN).any(1), float("nan"))


def _signs_apart(codes: Tensor) -> Tensor:
    """Order the signs of each 4 bytes as 8 elements are looked up: 4, then 4."""
    import torch

    signs = torch.stack((codes >> 3 & 1, codes >> 7), -1).unflatten(1, (-1, 4)).flatten(2)
    first, second = signs.split(4, dim=2)
    return codes & 0x77 | (second << 3 | first << 7).flatten(1)


def _signs_in_place(words: Tensor) -> Tensor:
    """Undo `_signs_apart`."""
    import torch

    words = words.unflatten(1, (-1, 4))
    signs = torch.cat((words >> 7, words >> 3 & 1), 2)
    return (words & 0x77 | signs[..., 0::2] << 3 | signs[..., 1::2] << 7).flatten(1)


def _blocked(rows: Tensor, width: int) -> Tensor:
    """Cut ``[n, steps * width]`` into ``[n / 16, steps, 16, width]``, even rows before odd."""
    cut = rows.unflatten(1, (-1, width)).unflatten(0, (-1, 8, 2))
    return cut.permute(0, 3, 2, 1, 4).flatten(2, 3)


def _rows(blocks: Tensor) -> Tensor:
    """Undo `_blocked`."""
    split = blocks.unflatten(2, (2, 8)).permute(0, 3, 2, 1, 4)
    return split.flatten(3).flatten(0, 2)
