"""Narrow formats against the tables of OCP Microscaling Formats (MX) v1.0."""

from __future__ import annotations

import math

import pytest
import torch

from moelab.kernels.formats import dequantize_mxfp4, quantize_fp8, quantize_mxfp4

# Table 5, e2m1: sign, two bits of exponent with bias 1, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP8 = pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)


def codes(packed):
    """List elements' codes in order, the low half of a byte first."""
    return [code for byte in packed.flatten().tolist() for code in (byte & 15, byte >> 4)]


def group_of(*values):
    """Fill a group of 32 with zeros after ``values``."""
    return torch.tensor([*values, *[0.0] * (32 - len(values))])


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("exponent", [-127, -126, -30, -1, 0, 1, 20, 125])
def test_all_codes_return_exactly_at_any_scale(exponent):
    """125 is the largest that float32 holds times 6; at -127, 0.5 is a subnormal."""
    values = torch.ldexp(torch.tensor(E2M1 * 2), torch.tensor(exponent))
    packed, scale = quantize_mxfp4(values)
    assert scale.tolist() == [exponent + 127]
    assert codes(packed) == list(range(16)) * 2
    assert same_bits(dequantize_mxfp4(packed, scale, values.shape[-1]), values)


def test_every_byte_reads_as_the_standard_says():
    """e8m0 127 is 1; even elements lie in the low half of a byte."""
    byte = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    got = dequantize_mxfp4(byte, torch.full((16, 1), 127, dtype=torch.uint8), 32)
    expected = [E2M1[half] for b in range(256) for half in (b % 16, b // 16)]
    assert same_bits(got.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    ("scale", "factor"), [(0, 2.0**-127), (1, 2.0**-126), (126, 0.5), (128, 2.0), (252, 2.0**125)]
)
def test_a_scale_is_a_power_of_two_biased_by_127(scale, factor):
    packed = torch.tensor([[0x21] + [0x00] * 15], dtype=torch.uint8)
    got = dequantize_mxfp4(packed, torch.tensor([[scale]], dtype=torch.uint8), 32)
    assert got[0, :2].tolist() == [0.5 * factor, 1.0 * factor]


def test_each_group_of_32_has_its_own_scale():
    values = torch.cat([group_of(6.0), group_of(6.0 * 2.0**9), group_of(-1.0)])
    packed, scale = quantize_mxfp4(values.reshape(1, 96))
    assert packed.shape == (1, 48)
    assert scale.tolist() == [[127, 136, 125]]
    assert same_bits(dequantize_mxfp4(packed, scale, 96)[0], values)


# (midpoint of two neighbours, the one whose code is even).
TIES = (
    (0.25, 0.0),
    (0.75, 1.0),
    (1.25, 1.0),
    (1.75, 2.0),
    (2.5, 2.0),
    (3.5, 4.0),
    (5.0, 4.0),
)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("midpoint", "even"), TIES)
def test_a_tie_goes_to_the_even_code(midpoint, even, sign):
    # The 4.0 sets the scale to 1.
    packed, scale = quantize_mxfp4(group_of(4.0, sign * midpoint))
    assert scale.tolist() == [127]
    assert dequantize_mxfp4(packed, scale, 32)[1] == sign * even


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", range(7))
def test_beside_a_tie_the_nearer_value_wins(place, sign):
    below, above = E2M1[place], E2M1[place + 1]
    middle = torch.tensor((below + above) / 2)
    near = [torch.nextafter(middle, torch.tensor(to)).item() for to in (below, above)]
    packed, scale = quantize_mxfp4(group_of(4.0, *(sign * value for value in near)))
    got = dequantize_mxfp4(packed, scale, 32)[1:3]
    assert got.tolist() == [sign * below, sign * above]


@pytest.mark.parametrize("value", [6.5, 7.0, 7.99, -7.99])
def test_above_6_saturates(value):
    packed, scale = quantize_mxfp4(group_of(value))
    assert scale.tolist() == [127]
    assert dequantize_mxfp4(packed, scale, 32)[0] == math.copysign(6.0, value)


@pytest.mark.parametrize(
    ("largest", "scale"), [(4.0, 127), (7.99, 127), (8.0, 128), (3.99, 126), (1.0, 125), (6.0, 127)]
)
def test_the_scale_puts_the_largest_between_4_and_8(largest, scale):
    """Section 6.3: the largest power of two not above it, over e2m1's, which is 4."""
    assert quantize_mxfp4(group_of(largest))[1].tolist() == [scale]


def test_a_group_of_zeros_is_zero_and_leaves_the_next_alone():
    values = torch.cat([torch.zeros(32), group_of(1.5, -3.0)])
    packed, scale = quantize_mxfp4(values)
    assert packed[:16].tolist() == [0] * 16
    assert scale[0] == 0
    assert same_bits(dequantize_mxfp4(packed, scale, values.shape[-1]), values)


def test_negative_zero_keeps_its_sign():
    packed, scale = quantize_mxfp4(group_of(4.0, -0.0, 0.0, -0.1))
    assert codes(packed)[1:4] == [8, 0, 8]
    assert same_bits(dequantize_mxfp4(packed, scale, 32), group_of(4.0, -0.0, 0.0, -0.0))


def test_tiny_groups_keep_the_smallest_scale():
    """2^-127 is e8m0's least: what is far below it becomes zero, never NaN."""
    tiny = torch.finfo(torch.float32)
    values = torch.stack(
        [
            group_of(2.0**-125, 2.0**-126),
            group_of(2.0**-126, 2.0**-127),
            group_of(2.0**-128, -(2.0**-129)),
            group_of(tiny.smallest_normal * 2.0**-23),
        ]
    )
    packed, scale = quantize_mxfp4(values)
    assert scale.flatten().tolist() == [0, 0, 0, 0]
    expected = torch.stack([values[0], values[1], group_of(2.0**-128, -0.0), torch.zeros(32)])
    assert same_bits(dequantize_mxfp4(packed, scale, 32), expected)


def test_huge_values_saturate_below_infinity():
    largest = torch.finfo(torch.float32).max
    packed, scale = quantize_mxfp4(group_of(largest, -largest, 2.0**127))
    assert scale.tolist() == [252]
    got = dequantize_mxfp4(packed, scale, 32)[:3].tolist()
    assert got == [6.0 * 2.0**125, -6.0 * 2.0**125, 2.0**127]


def test_random_values_are_off_by_half_a_step_at_most(generator):
    """Half the gap of 4 and 6 is one scale; between 6 and 8 all saturate."""
    values = torch.randn(64, 96, generator=generator) * torch.logspace(-6, 6, 64)[:, None]
    values = values.bfloat16()
    packed, scale = quantize_mxfp4(values)
    assert packed.shape == (64, 48)
    assert scale.shape == (64, 3)
    unit = torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
    error = (dequantize_mxfp4(packed, scale, 96) - values.float()).abs() / unit
    assert error[values.float().abs() <= 6.0 * unit].max() <= 1.0
    assert error.max() < 2.0


def test_dimensions_before_the_last_are_kept(generator):
    values = torch.randn(2, 3, 5, 64, generator=generator)
    packed, scale = quantize_mxfp4(values)
    assert packed.shape == (2, 3, 5, 32)
    assert scale.shape == (2, 3, 5, 2)
    alone, alone_scale = quantize_mxfp4(values[1, 2, 4])
    assert torch.equal(packed[1, 2, 4], alone)
    assert torch.equal(scale[1, 2, 4], alone_scale)
    assert dequantize_mxfp4(packed, scale, 64).shape == values.shape


@pytest.mark.parametrize("k", [1, 2, 31, 33, 64, 101])
def test_zeros_fill_the_last_byte_and_group(k, generator):
    values = torch.randn(3, k, generator=generator)
    packed, scale = quantize_mxfp4(values)
    assert packed.shape == (3, -(-k // 2))
    assert scale.shape == (3, -(-k // 32))
    assert packed.is_contiguous()
    if k % 2:
        assert (packed[:, -1] >> 4 == 0).all()
    whole = torch.cat([values, torch.zeros(3, -k % 32)], dim=1)
    whole_packed, whole_scale = quantize_mxfp4(whole)
    assert torch.equal(scale, whole_scale)
    got = dequantize_mxfp4(packed, scale, k)
    assert got.shape == (3, k)
    assert same_bits(got, dequantize_mxfp4(whole_packed, whole_scale, whole.shape[1])[:, :k])


def test_a_partly_filled_group_takes_its_scale_from_its_own_elements():
    values = torch.cat([group_of(6.0), torch.tensor([-0.5, 0.25])])
    packed, scale = quantize_mxfp4(values)
    assert scale.tolist() == [127, 124]
    assert same_bits(dequantize_mxfp4(packed, scale, 34), values)


@FP8
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_fp8_spans_its_whole_range_at_any_magnitude(fp8, magnitude, generator):
    x = torch.randn(8, 33, generator=generator) * magnitude
    values, scale = quantize_fp8(x, fp8)
    assert values.dtype == fp8
    assert scale.dtype == torch.float32
    assert scale.shape == (1,)
    assert values.float().abs().max() == torch.finfo(fp8).max
    # 4 bits of significand: 2^-4 to nearest, and half the least subnormal near zero.
    least = torch.finfo(fp8).smallest_normal * 2**-3
    error = (values.float() * scale - x).abs()
    allowed = 2**-4 * x.abs() + least / 2 * scale
    assert (error <= allowed * (1 + 1e-6)).all(), f"{float((error / allowed).max())} > 1"


@FP8
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45])
def test_fp8_of_nearly_nothing_is_finite(fp8, value):
    values, scale = quantize_fp8(torch.full((4,), value), fp8)
    assert not values.float().isnan().any()
    assert 0 < scale.item() < math.inf
    assert (values.float() * scale).abs().max() <= 2e-45


@FP8
def test_fp8_of_the_largest_float_is_the_largest_fp8(fp8):
    largest = torch.finfo(torch.float32).max
    values, _ = quantize_fp8(torch.tensor([largest, -largest, 0.0]), fp8)
    end = torch.finfo(fp8).max
    assert values.float().tolist() == [end, -end, 0.0]


@FP8
def test_fp8_of_no_element_is_empty(fp8):
    values, scale = quantize_fp8(torch.zeros(0, 32), fp8)
    assert values.shape == (0, 32)
    assert values.dtype == fp8
    assert scale.shape == (1,)


def test_a_group_whose_scale_is_nan_is_nan():
    packed, scale = quantize_mxfp4(torch.ones(2, 64))
    scale[1, 0] = 255
    read = dequantize_mxfp4(packed, scale, 64)
    assert read[1, :32].isnan().all()
    assert read[1, 32:].eq(1).all()
    assert read[0].eq(1).all()
