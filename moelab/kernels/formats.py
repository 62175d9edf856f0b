"""Narrow number formats: quantize, read back, and lay scales out for the hardware.

    fp8     x is about q * scale, with one fp32 scale per tensor or per block
    mx      x is about q * 2^(scale - 127), with one e8m0 scale per 32 elements along K

fp8 is e4m3, OCP's (e4m3fn, up to 448) or AMD's of MI300X (e4m3fnuz, up to 240). mxfp4
(e2m1) and mxfp8 (e4m3fn) follow OCP Microscaling Formats (MX) v1.0. Two mxfp4 elements
lie in a byte, the even one in the low half.

Quantizing rounds to nearest, ties to even, and saturates. It computes in fp32: a float64
is rounded to that first. A NaN never becomes a number. None of these types has an
infinity, and the largest number in its place would hide where a model diverged: an Inf
becomes NaN as well. In fp8 it stays where it was, and scales come from the finite
elements alone. e2m1 has no NaN: in mx formats the group's scale becomes 255, e8m0's NaN,
and the whole group reads back as NaN. The standard leaves this to the implementation.

Wrong types and shapes raise a ValueError that names the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype

FP8_BLOCK = 128
MX_GROUP = 32
# OCP MX v1.0, table 5: the values of e2m1 by code, without the sign bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of the largest power of two that the element type holds: 4 and 256.
_E2M1_MAX_EXPONENT = 2
_E4M3_MAX_EXPONENT = 8
_E8M0_NAN = 255

_FLOATS = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
_FP8 = ("torch.float8_e4m3fn", "torch.float8_e4m3fnuz")


def quantize_fp8(x: Tensor, to: dtype) -> tuple[Tensor, Tensor]:
    """Scale a whole tensor into the range of an fp8 type.

    Args:
        x: any shape, float.
        to: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
    Returns:
        the fp8 tensor and its fp32 scale ``[1]``: ``x`` is about ``fp8 * scale``.
    """
    _expect("x", x, _FLOATS, (...,))
    _expect_fp8(to)
    x = x.float()
    # amax of nothing raises; no tokens are a batch like any other.
    largest = _finite_magnitude(x).amax() if x.numel() else x.new_zeros(())
    scale = _fp8_scale(largest, to)
    return _round_fp8(x / scale, to), scale.reshape(1)


def dequantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Read fp8 with one scale back; the product is rounded once, to fp32.

    Args:
        x: any shape, fp8 e4m3.
        scale: ``[1]`` fp32.
    Returns:
        fp32, of the shape of ``x``.
    """
    _expect("x", x, _FP8, (...,))
    _expect("scale", scale, ("torch.float32",), (1,))
    return x.float() * scale


def quantize_fp8_blocks(x: Tensor, to: dtype, rows: int) -> tuple[Tensor, Tensor]:
    """Scale each block of ``rows`` x 128 elements into the range of an fp8 type.

    Args:
        x: ``[..., n, k]`` float. The last blocks may be cut by n and k.
        to: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        rows: of a block; usually 1 for activations and 128 for weights.
    Returns:
        fp8 ``[..., n, k]`` and fp32 scales ``[..., ceil(n / rows), ceil(k / 128)]``. A
        block of zeros has a scale above 0.
    """
    _expect("x", x, _FLOATS, (..., None, None))
    _expect_fp8(to)
    _expect_rows(rows)
    x = x.float()
    largest = _group_amax(_finite_magnitude(x), FP8_BLOCK)
    scale = _fp8_scale(_group_amax(largest.mT, rows).mT.contiguous(), to)
    return _round_fp8(x / _of_blocks(scale, rows, x.shape), to), scale


def dequantize_fp8_blocks(x: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Read fp8 with a scale per block back; each product is rounded once, to fp32.

    Args:
        x: ``[..., n, k]`` fp8 e4m3.
        scale: ``[..., ceil(n / rows), ceil(k / 128)]`` fp32.
        rows: of a block.
    Returns:
        ``[..., n, k]`` fp32.
    """
    _expect("x", x, _FP8, (..., None, None))
    _expect_rows(rows)
    *before, n, k = x.shape
    blocks = (*before, _ceil_div(n, rows), fp8_blocks(k))
    _expect("scale", scale, ("torch.float32",), blocks)
    return x.float() * _of_blocks(scale, rows, x.shape)


def fp8_blocks(size: int) -> int:
    """Count the blocks that hold ``size`` elements, the last perhaps in part."""
    return _ceil_div(size, FP8_BLOCK)


def mx_groups(k: int) -> int:
    """Count the scales that k elements share, the last group perhaps in part."""
    return _ceil_div(k, MX_GROUP)


def mx_pairs(k: int) -> int:
    """Count the bytes that hold k fp4 elements, the last perhaps in part."""
    return _ceil_div(k, 2)


def without_filler(packed: Tensor, k: int) -> Tensor:
    """Clear the half byte that an odd k leaves at each row's end; a copy, if k is odd.

    Args:
        packed: ``[..., ceil(k / 2)]`` uint8.
    """
    if k % 2 == 0:
        return packed
    packed = packed.clone()
    packed[..., -1] &= 0xF
    return packed


def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to e2m1 in groups along the last dimension.

    A NaN or Inf makes its group's scale NaN; the elements of that group mean nothing.

    Args:
        x: ``[..., k]`` float. Where k ends within a group or a byte, zeros fill it.
    Returns:
        packed ``[..., ceil(k / 2)]`` uint8 and e8m0 scales ``[..., ceil(k / 32)]`` uint8.
    """
    import torch

    _expect("x", x, _FLOATS, (..., None))
    x = x.float()
    scale = _shared_scale(x, _E2M1_MAX_EXPONENT)
    scaled = x / _of_groups(scale, x.shape[-1])
    values = torch.tensor(_E2M1, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = scaled.abs()
    code = torch.bucketize(magnitude, middles, out_int32=True)
    # A tie lies on a middle: bucketize rounds it down, which is right for even codes only.
    tie = (magnitude == middles[code.clamp(max=len(_E2M1) - 2)]) & (code % 2 == 1)
    code = ((code + tie) | (scaled.signbit().int() << 3)).to(torch.uint8)
    code = torch.nn.functional.pad(code, (0, x.shape[-1] % 2))
    return code[..., 0::2] | (code[..., 1::2] << 4), scale


def dequantize_mxfp4(packed: Tensor, scale: Tensor, k: int) -> Tensor:
    """Read mxfp4 back, exactly, up to the largest fp32.

    Args:
        packed: ``[..., ceil(k / 2)]`` uint8.
        scale: ``[..., ceil(k / 32)]`` uint8, e8m0; 255 is NaN, and so is its group.
            Quantizing gives 252 at most; from 253 on the largest elements are Inf.
        k: elements along the last dimension.
    Returns:
        ``[..., k]`` fp32.
    """
    import torch

    before = packed.shape[:-1]
    _expect("packed", packed, ("torch.uint8",), (*before, mx_pairs(k)))
    _expect("scale", scale, ("torch.uint8",), (*before, mx_groups(k)))
    code = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :k].int()
    values = torch.tensor(_E2M1, device=packed.device)
    element = torch.where(code >= 8, -values[code % 8], values[code % 8])
    return element * _of_groups(scale, k)


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to e4m3fn in groups along the last dimension.

    A NaN or Inf makes its group's scale NaN, and every element of the group.

    Args:
        x: ``[..., k]`` float. The last group may be cut by k.
    Returns:
        ``[..., k]`` float8_e4m3fn and e8m0 scales ``[..., ceil(k / 32)]`` uint8.
    """
    import torch

    _expect("x", x, _FLOATS, (..., None))
    x = x.float()
    scale = _shared_scale(x, _E4M3_MAX_EXPONENT)
    return _round_fp8(x / _of_groups(scale, x.shape[-1]), torch.float8_e4m3fn), scale


def dequantize_mxfp8(x: Tensor, scale: Tensor) -> Tensor:
    """Read mxfp8 back, exactly, up to the largest fp32.

    Args:
        x: ``[..., k]`` float8_e4m3fn.
        scale: ``[..., ceil(k / 32)]`` uint8, e8m0; 255 is NaN, and so is its group.
            Quantizing gives 246 at most; from 247 on the largest elements are Inf.
    Returns:
        ``[..., k]`` fp32.
    """
    _expect("x", x, ("torch.float8_e4m3fn",), (..., None))
    *before, k = x.shape
    _expect("scale", scale, ("torch.uint8",), (*before, mx_groups(k)))
    return x.float() * _of_groups(scale, k)


def shuffle_scales_cdna4(scale: Tensor) -> Tensor:
    """Lay mx scales out as CDNA4's v_mfma_scale_f32_16x16x128 takes them.

    A lane of that instruction takes the scale of one row (of 16) and one group (of 4).
    Here a lane finds in 4 bytes side by side the scales of 2 x 16 rows and 2 x 4 groups:
    of four instructions. Scale (n, g) lies in row n // 32, at ::

        (g // 8) * 256 + ((g % 4 * 16 + n % 16) * 2 + g // 4 % 2) * 2 + n // 16 % 2

    Args:
        scale: ``[..., n, groups]`` uint8, e8m0.
    Returns:
        ``[..., ceil(n / 32), ceil(groups / 8) * 256]`` uint8; zeros fill the last rows
        and groups.
    """
    import torch

    _expect("scale", scale, ("torch.uint8",), (..., None, None))
    n, groups = scale.shape[-2:]
    whole = torch.nn.functional.pad(scale, (0, -groups % 8, 0, -n % 32))
    # n is (n // 32, n // 16 % 2, n % 16), groups are (g // 8, g // 4 % 2, g % 4).
    split = whole.unflatten(-1, (-1, 2, 4)).unflatten(-4, (-1, 2, 16))
    return split.movedim((-3, -1, -4, -2, -5), (-5, -4, -3, -2, -1)).flatten(-5)


def unshuffle_scales_cdna4(shuffled: Tensor, n: int, groups: int) -> Tensor:
    """Undo `shuffle_scales_cdna4`.

    Args:
        shuffled: ``[..., ceil(n / 32), ceil(groups / 8) * 256]`` uint8.
        n, groups: the shape before shuffling, which tells scales from filling.
    Returns:
        ``[..., n, groups]`` uint8.
    """
    whole = (_ceil_div(n, 32), _ceil_div(groups, 8) * 256)
    _expect("shuffled", shuffled, ("torch.uint8",), (*shuffled.shape[:-2], *whole))
    split = shuffled.unflatten(-1, (-1, 4, 16, 2, 2))
    split = split.movedim((-5, -4, -3, -2, -1), (-3, -1, -4, -2, -5))
    return split.flatten(-3).flatten(-4, -2)[..., :n, :groups].contiguous()


def _ceil_div(size: int, by: int) -> int:
    return -(-size // by)


def _group_amax(x: Tensor, group: int) -> Tensor:
    """Find the maximum of every ``group`` elements (none below 0): ``[..., ceil(k / group)]``."""
    import torch

    whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % group))
    return whole.unflatten(-1, (-1, group)).amax(-1)


def _spread(scale: Tensor, group: int, size: int, dim: int) -> Tensor:
    """Repeat each scale for its ``group`` elements along ``dim``, ``size`` in all."""
    return scale.repeat_interleave(group, dim).narrow(dim, 0, size)


def _finite_magnitude(x: Tensor) -> Tensor:
    """Take magnitudes, with 0 for NaN and Inf."""
    return x.abs().masked_fill(~x.isfinite(), 0.0)


def _fp8_scale(largest: Tensor, to: dtype) -> Tensor:
    """Map the largest magnitudes to the largest fp8; zeros get a scale above 0."""
    import torch

    # A subnormal scale has few bits: rounding it down could halve it and saturate much.
    tiny = torch.finfo(torch.float32).tiny
    return (largest / torch.finfo(to).max).clamp(min=tiny)


def _round_fp8(x: Tensor, to: dtype) -> Tensor:
    """Round scaled fp32 to fp8; large numbers saturate, Inf and NaN are NaN."""
    import torch

    end = torch.finfo(to).max
    return x.clamp(-end, end).masked_fill(x.isinf(), float("nan")).to(to)


def _of_blocks(scale: Tensor, rows: int, shape: Sequence[int]) -> Tensor:
    """Give each element of ``[..., n, k]`` its block's scale."""
    n, k = shape[-2:]
    return _spread(_spread(scale, rows, n, dim=-2), FP8_BLOCK, k, dim=-1)


def _shared_scale(x: Tensor, max_exponent: int) -> Tensor:
    """Choose the e8m0 scale of each group of fp32 elements (OCP MX v1.0, section 6.3).

    It is the largest power of two not above the largest magnitude, over the largest power
    of two of the element type (2^``max_exponent``); 2^-127 at least.
    """
    import torch

    # e8m0 is fp32's field of the exponent: bias 127, 255 for what is no number. It reads 0
    # for subnormals, less than 2^-126, whose scale is 2^-127 for any max_exponent above 0.
    field = _group_amax(x.abs(), MX_GROUP).view(torch.int32) >> 23 & 0xFF
    scale = (field - max_exponent).clamp(min=0)
    return scale.masked_fill(field == 255, _E8M0_NAN).to(torch.uint8)


def _of_groups(scale: Tensor, k: int) -> Tensor:
    """Give each of k elements its e8m0 scale as fp32, which holds them all.

    2^-127 is a subnormal. To multiply and to divide by a power of two is exact as long as
    the result is normal, and rounds once where it isn't.
    """
    import torch

    return _spread(scale.view(torch.float8_e8m0fnu).float(), MX_GROUP, k, dim=-1)


def _expect(name: str, tensor: Tensor, dtypes: Sequence[str], shape: Sequence[Any]) -> None:
    """Raise a ValueError unless type and shape fit.

    Args:
        shape: wanted sizes; None takes any, and a leading ``...`` any dimensions before.
    """
    if str(tensor.dtype) not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(dtypes)}")
    got, wanted = list(tensor.shape), list(shape)
    if wanted[0] is ...:
        wanted = wanted[1:]
        got = got[len(got) - len(wanted) :]
    fits = len(got) == len(wanted) and all(
        want in (None, size) for want, size in zip(wanted, got, strict=True)
    )
    if not fits:
        sizes = {None: "any", ...: "..."}
        expected = ", ".join(sizes.get(size, str(size)) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{expected}]")


def _expect_fp8(to: dtype) -> None:
    if str(to) not in _FP8:
        raise ValueError(f"to is {to}; expected {' or '.join(_FP8)}")


def _expect_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"rows is {rows}; a block has 1 or more")
