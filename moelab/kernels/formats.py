"""Narrow number formats: quantize, and read back exactly.

mxfp4 is OCP Microscaling Formats (MX) v1.0: groups of 32 e2m1 elements along K share
one e8m0 scale; two elements lie in a byte, the even one in the low half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype

MX_GROUP = 32
# OCP MX v1.0, table 5: the values of e2m1 by code, without the sign bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MAX_EXPONENT = 2
_E8M0_BIAS = 127
_E8M0_NAN = 255


def quantize_fp8(x: Tensor, to: dtype) -> tuple[Tensor, Tensor]:
    """Scale a whole tensor into the range of an fp8 type.

    Args:
        x: any shape, float.
        to: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
    Returns:
        the fp8 tensor and its fp32 scale ``[1]``: ``x`` is about ``fp8 * scale``.
    """
    import torch

    largest = torch.finfo(to).max
    # amax of nothing raises; no tokens are a batch like any other.
    magnitude = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    scale = (magnitude / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-largest, largest).to(to), scale.reshape(1)


def mx_groups(k: int) -> int:
    """Count the scales that k elements share, the last group perhaps in part."""
    return -(-k // MX_GROUP)


def mx_pairs(k: int) -> int:
    """Count the bytes that hold k fp4 elements, the last perhaps in part."""
    return -(-k // 2)


def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize along the last dimension.

    The scale is the largest power of two not above the group's largest magnitude,
    over the largest power of two of e2m1 (OCP MX v1.0, section 6.3); elements round to
    nearest, ties to even, and saturate.

    Args:
        x: ``[..., k]`` float. Where k ends within a group or a byte, zeros fill it.
    Returns:
        packed ``[..., ceil(k / 2)]`` uint8 and e8m0 scales ``[..., ceil(k / 32)]`` uint8.
    """
    import torch

    k = x.shape[-1]
    x = torch.nn.functional.pad(x.float(), (0, mx_groups(k) * MX_GROUP - k))
    groups = x.unflatten(-1, (-1, MX_GROUP))
    largest = groups.abs().amax(-1)
    # frexp gives mantissas in [0.5, 1): the power of two not above is exponent - 1.
    exponent = torch.frexp(largest).exponent - 1 - _E2M1_MAX_EXPONENT
    exponent = torch.where(largest == 0, -_E8M0_BIAS, exponent).clamp(-_E8M0_BIAS, _E8M0_BIAS)
    scaled = torch.ldexp(groups, -exponent[..., None])
    values = torch.tensor(_E2M1, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = scaled.abs()
    code = torch.bucketize(magnitude, middles)
    # A tie lies on a middle: bucketize rounds it down, which is right for even codes only.
    tie = (magnitude == middles[code.clamp(max=len(_E2M1) - 2)]) & (code % 2 == 1)
    code = code + tie.to(code.dtype)
    code = (code | (scaled.signbit().to(code.dtype) << 3)).flatten(-2).to(torch.uint8)
    packed = code[..., 0::2] | (code[..., 1::2] << 4)
    return packed[..., : mx_pairs(k)].contiguous(), (exponent + _E8M0_BIAS).to(torch.uint8)


def dequantize_mxfp4(packed: Tensor, scale: Tensor, k: int) -> Tensor:
    """Read mxfp4 back, exactly.

    Args:
        packed: ``[..., ceil(k / 2)]`` uint8.
        scale: ``[..., ceil(k / 32)]`` uint8, e8m0; 255 is NaN, and so is its group.
    Returns:
        ``[..., k]`` fp32.
    """
    import torch

    code = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :k].long()
    values = torch.tensor(_E2M1, device=packed.device)
    element = torch.where(code >= 8, -values[code % 8], values[code % 8])
    of_element = scale.repeat_interleave(MX_GROUP, dim=-1)[..., :k]
    scaled = torch.ldexp(element, of_element.int() - _E8M0_BIAS)
    return scaled.masked_fill(of_element == _E8M0_NAN, float("nan"))
