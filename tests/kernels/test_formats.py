"""Narrow formats against their tables: OCP Microscaling Formats (MX) v1.0, and fp8."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from moelab.kernels.formats import (
    FP8_BLOCK,
    dequantize_fp8,
    dequantize_fp8_blocks,
    dequantize_mxfp4,
    dequantize_mxfp8,
    quantize_fp8,
    quantize_fp8_blocks,
    quantize_mxfp4,
    quantize_mxfp8,
    shuffle_scales_cdna4,
    unshuffle_scales_cdna4,
)

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
def test_all_codes_return_exactly_at_any_scale(exponent, device):
    """125 is the largest that float32 holds times 6; at -127, 0.5 is a subnormal."""
    values = torch.tensor([math.ldexp(value, exponent) for value in E2M1 * 2], device=device)
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


def test_tiny_groups_keep_the_smallest_scale(device):
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
    packed, scale = quantize_mxfp4(values.to(device))
    assert scale.flatten().tolist() == [0, 0, 0, 0]
    expected = torch.stack([values[0], values[1], group_of(2.0**-128, -0.0), torch.zeros(32)])
    assert same_bits(dequantize_mxfp4(packed, scale, 32).cpu(), expected)


def test_huge_values_saturate_below_infinity(device):
    largest = torch.finfo(torch.float32).max
    packed, scale = quantize_mxfp4(group_of(largest, -largest, 2.0**127).to(device))
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


def e4m3(fp8):
    """Work out fp8's 256 values from their bits; NaN where the code is none.

    Sign, 4 bits of exponent, 3 of mantissa. OCP's has bias 7 and its NaNs at both ends;
    fnuz has bias 8 and its one NaN where -0 would be.
    """
    bias, nans = (7, (0x7F, 0xFF)) if fp8 == torch.float8_e4m3fn else (8, (0x80,))
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        significand = mantissa + 8 * (exponent > 0)
        value = math.ldexp(significand, max(exponent, 1) - bias - 3)
        sign = -1.0 if code >> 7 else 1.0
        values.append(math.nan if code in nans else sign * value)
    return values


def quantize_tensor(x, fp8):
    values, scale = quantize_fp8(x, fp8)
    return values, scale, dequantize_fp8(values, scale)


def quantize_rows(x, fp8):
    values, scale = quantize_fp8_blocks(x, fp8, 1)
    return values, scale, dequantize_fp8_blocks(values, scale, 1)


def quantize_squares(x, fp8):
    values, scale = quantize_fp8_blocks(x, fp8, 128)
    return values, scale, dequantize_fp8_blocks(values, scale, 128)


def quantize_groups(x, fp8):
    assert fp8 == torch.float8_e4m3fn
    values, scale = quantize_mxfp8(x)
    return values, scale, dequantize_mxfp8(values, scale)


FP8_SCALED = [
    pytest.param(quantize, fp8, id=f"{quantize.__name__}-{fp8}".replace("torch.", ""))
    for quantize in (quantize_tensor, quantize_rows, quantize_squares)
    for fp8 in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
]
fp8_scaled = pytest.mark.parametrize(("quantize", "fp8"), FP8_SCALED)
every_fp8 = pytest.mark.parametrize(
    ("quantize", "fp8"),
    [*FP8_SCALED, pytest.param(quantize_groups, torch.float8_e4m3fn, id="quantize_groups")],
)


def beside_the_end(values, fp8, scale=1.0):
    """Set 31 values a row beside the largest fp8, which makes every format's scale ``scale``."""
    whole = [*values, *[0.0] * (-len(values) % 31)]
    end = torch.finfo(fp8).max
    rows = [[end, *whole[start : start + 31]] for start in range(0, len(whole), 31)]
    return torch.tensor(rows, dtype=torch.float64).mul(scale).float()


def not_the_end(rows, count):
    """Undo `beside_the_end`."""
    return rows[:, 1:].flatten()[:count]


def wide(generator, *shape):
    """Draw elements of all magnitudes from 1e-12 to 1e12, and some -0."""
    decades = torch.rand(shape, generator=generator) * 24 - 12
    x = torch.randn(shape, generator=generator) * 10**decades
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.05, -0.0)


def of_element(scale, x):
    """Look each element's scale up by its place, whatever the format."""
    n, k = x.shape[-2:]
    if scale.dtype == torch.uint8:
        rows, columns, scale = 1, 32, torch.exp2(scale.double() - 127)
    elif scale.dim() == 1:
        return scale
    else:
        rows, columns = (1 if scale.shape[-2] == n else 128), FP8_BLOCK
    row = torch.arange(n, device=x.device) // rows
    column = torch.arange(k, device=x.device) // columns
    return scale[..., row[:, None], column]


def assert_within_half_a_step(read, x, scale, fp8):
    """Assert what rounding to nearest can leave.

    4 bits of significand: half a step is 2^-4 of a normal element, and below those half
    the least subnormal. What lies past the largest fp8 is off by the way back to it.
    Quotient and product each round by 2^-24, of which 1e-6 is several.

    Args:
        scale: fp32, broadcast to ``x``.
    """
    x, scale = x.double(), scale.double()
    end, least = torch.finfo(fp8).max, torch.finfo(fp8).smallest_normal * 2**-3
    error = (read.double() - x).abs()
    allowed = 2**-4 * x.abs() + least / 2 * scale + (x.abs() - end * scale).clamp(min=0)
    assert not error.isnan().any()
    worst = int((error / allowed).nan_to_num(nan=0.0).argmax())
    assert (error <= allowed * (1 + 1e-6)).all(), (
        f"element {worst}: {x.flatten()[worst]} was read back as {read.flatten()[worst]}, off "
        f"by {error.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed"
    )


def test_the_table_of_fp8_is_right_where_it_is_known_by_heart():
    ocp, fnuz = e4m3(torch.float8_e4m3fn), e4m3(torch.float8_e4m3fnuz)
    assert (ocp[0x7E], ocp[0x38], ocp[0x01], ocp[0xFE]) == (448.0, 1.0, 2.0**-9, -448.0)
    assert (fnuz[0x7F], fnuz[0x40], fnuz[0x01], fnuz[0xFF]) == (240.0, 1.0, 2.0**-10, -240.0)
    assert math.copysign(1, ocp[0x80]) == -1
    assert math.isnan(fnuz[0x80])


@every_fp8
@pytest.mark.parametrize("exponent", [-126, -30, 0, 1, 119])
def test_every_fp8_code_returns_exactly_at_any_scale(quantize, fp8, exponent, device):
    """119 is the largest that float32 holds times 448."""
    table = e4m3(fp8)
    finite = [code for code, value in enumerate(table) if not math.isnan(value)]
    x = beside_the_end([table[code] for code in finite], fp8, 2.0**exponent).to(device)
    values, scale, read = quantize(x, fp8)
    assert values.dtype == fp8
    assert values.shape == x.shape
    if scale.dtype == torch.uint8:
        assert scale.eq(exponent + 127).all()
    else:
        assert scale.eq(2.0**exponent).all()
    assert not_the_end(values.view(torch.uint8), len(finite)).tolist() == finite
    assert same_bits(read, x)


@every_fp8
@pytest.mark.parametrize("sign", [1, -1])
def test_fp8_rounds_to_nearest_and_a_tie_goes_to_the_even_code(quantize, fp8, sign, device):
    steps = [value for value in e4m3(fp8)[:128] if not math.isnan(value)]
    middles = [(below + above) / 2 for below, above in itertools.pairwise(steps)]
    for beside, nearest in (
        (-math.inf, lambda place: place),
        (0, lambda place: place + place % 2),
        (math.inf, lambda place: place + 1),
    ):
        at = torch.tensor(middles)
        at = torch.nextafter(at, torch.full_like(at, beside)) if beside else at
        x = beside_the_end((sign * at).tolist(), fp8).to(device)
        _, _, read = quantize(x, fp8)
        expected = [sign * steps[nearest(place)] for place in range(len(middles))]
        assert not_the_end(read, len(middles)).tolist() == expected


@every_fp8
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 3, 33), (1, 128), (130, 257)], ids=str)
def test_fp8_is_off_by_half_a_step_at_most(quantize, fp8, shape, generator, device):
    x = wide(generator, *shape).to(device)
    values, scale, read = quantize(x, fp8)
    assert values.shape == read.shape == x.shape
    assert read.dtype == torch.float32
    assert_within_half_a_step(read, x, of_element(scale, x), fp8)


@fp8_scaled
def test_quantizing_fp8_again_changes_no_code(quantize, fp8, generator, device):
    """The scale moves by 2^-23 of itself at most: a product and a quotient round by 2^-24.

    Codes lie 2^-4 apart, so that does not move one past a middle.
    """
    x = wide(generator, 130, 257).to(device)
    values, scale, read = quantize(x, fp8)
    again, again_scale, _ = quantize(read, fp8)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    assert ((again_scale.double() / scale.double() - 1).abs() <= 2**-23).all()


@pytest.mark.parametrize("k", [1, 32, 101])
def test_quantizing_mx_again_changes_no_bit(k, generator, device):
    x = wide(generator, 64, k).to(device)
    values, scale = quantize_mxfp8(x)
    again, again_scale = quantize_mxfp8(dequantize_mxfp8(values, scale))
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(again_scale, scale)
    packed, scale = quantize_mxfp4(x)
    again, again_scale = quantize_mxfp4(dequantize_mxfp4(packed, scale, k))
    assert torch.equal(again, packed)
    assert torch.equal(again_scale, scale)


@every_fp8
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (2, 0, 40), (0, 0)], ids=str)
def test_fp8_of_no_element_is_empty(quantize, fp8, shape, device):
    values, scale, read = quantize(torch.zeros(shape, device=device), fp8)
    assert values.shape == read.shape == shape
    assert values.dtype == fp8
    if quantize is quantize_tensor:
        assert scale.shape == (1,)
    else:
        assert scale.numel() == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 40)], ids=str)
def test_mxfp4_of_no_element_is_empty(shape, device):
    packed, scale = quantize_mxfp4(torch.zeros(shape, device=device))
    assert packed.numel() == scale.numel() == 0
    assert dequantize_mxfp4(packed, scale, shape[-1]).shape == shape


@every_fp8
def test_fp8_takes_any_strides_and_float_type(quantize, fp8, generator, device):
    x = wide(generator, 40, 33).bfloat16().to(device)
    _, _, read = quantize(x.mT, fp8)
    _, _, expected = quantize(x.mT.contiguous().float(), fp8)
    assert same_bits(read, expected)


@fp8_scaled
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fp8_is_nan_only_where_no_number_was(quantize, fp8, bad, generator, device):
    """A number in place of an Inf would hide it; a scale from it would take the rest along."""
    x = torch.randn(140, 150, generator=generator).to(device)
    where = torch.rand(x.shape, generator=generator).to(device) < 0.02
    # A block where nothing is a number.
    where[:128, 128:] = True
    values, scale, read = quantize(x.masked_fill(where, bad), fp8)
    clean, clean_scale, _ = quantize(x.masked_fill(where, 0.0), fp8)
    assert torch.equal(scale, clean_scale)
    assert torch.equal(values.float().isnan(), where)
    assert torch.equal(read.isnan(), where)
    assert torch.equal(values.float()[~where], clean.float()[~where])


@FP8
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_fp8_spans_its_whole_range_at_any_magnitude(fp8, magnitude, generator):
    x = torch.randn(8, 33, generator=generator) * magnitude
    values, scale = quantize_fp8(x, fp8)
    assert scale.dtype == torch.float32
    assert scale.shape == (1,)
    assert values.float().abs().max() == torch.finfo(fp8).max
    assert_within_half_a_step(dequantize_fp8(values, scale), x, scale, fp8)


@fp8_scaled
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45])
def test_fp8_of_nearly_nothing_is_finite(quantize, fp8, value, device):
    values, scale, read = quantize(torch.full((130, 129), value, device=device), fp8)
    assert not values.float().isnan().any()
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert read.abs().max() <= 2e-45


@fp8_scaled
def test_the_largest_float_is_the_largest_fp8_and_returns(quantize, fp8, device):
    """2^24 - 1 is a multiple of 7 and of 15: over 448 or 240 it leaves nothing to round."""
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, 0.0]], device=device)
    values, _, read = quantize(x, fp8)
    end = torch.finfo(fp8).max
    assert values.float().tolist() == [[end, -end, 0.0]]
    assert torch.equal(read, x)


@FP8
@pytest.mark.parametrize("rows", [1, 3, 128])
@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (129, 257), (256, 130), (2, 7, 129)], ids=str)
def test_each_block_is_scaled_as_if_alone(fp8, rows, shape, generator, device):
    x = wide(generator, *shape).to(device)
    values, scale = quantize_fp8_blocks(x, fp8, rows)
    *before, n, k = shape
    blocks = (-(-n // rows), -(-k // 128))
    assert scale.shape == (*before, *blocks)
    assert scale.dtype == torch.float32
    assert scale.is_contiguous()
    read = dequantize_fp8_blocks(values, scale, rows)
    for row, column in itertools.product(*map(range, blocks)):
        block = (slice(row * rows, (row + 1) * rows), slice(column * 128, (column + 1) * 128))
        for batch in itertools.product(*map(range, before)):
            alone, alone_scale = quantize_fp8(x[(*batch, *block)], fp8)
            assert scale[(*batch, row, column)] == alone_scale
            got = values[(*batch, *block)]
            assert torch.equal(got.float(), alone.float())
            assert same_bits(read[(*batch, *block)], dequantize_fp8(alone, alone_scale))


def test_a_block_of_zeros_leaves_its_neighbours_unchanged(generator, device):
    x = torch.randn(256, 256, generator=generator).to(device)
    expected, expected_scale = quantize_fp8_blocks(x, torch.float8_e4m3fn, 128)
    x[128:, :128] = 0.0
    values, scale = quantize_fp8_blocks(x, torch.float8_e4m3fn, 128)
    assert 0 < scale[1, 0] < math.inf
    assert values[128:, :128].float().eq(0).all()
    for row, column in ((0, 0), (0, 1), (1, 1)):
        block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
        assert scale[row, column] == expected_scale[row, column]
        assert torch.equal(values[block].float(), expected[block].float())


def slow_mxfp8(group):
    """Quantize one group element by element in float64, where every step is exact.

    Returns the scale's exponent and the elements' values.
    """
    largest = max(map(abs, group))
    # frexp gives mantissas in [0.5, 1).
    exponent = max(math.frexp(largest)[1] - 1 - 8, -127) if largest else -127
    elements = []
    for value in group:
        scaled = math.ldexp(abs(value), -exponent)
        # 4 bits of significand; below 2^-6 the step stays that of 2^-6.
        step = math.ldexp(1.0, max(math.frexp(scaled)[1] - 1, -6) - 3)
        # Python's round takes ties to even.
        elements.append(math.copysign(min(round(scaled / step) * step, 448.0), value))
    return exponent, elements


@pytest.mark.parametrize("magnitude", [2.0**-145, 2.0**-130, 2.0**-118, 1.0, 2.0**20, 2.0**124])
@pytest.mark.parametrize("spread", [1, 2**16], ids=["alike", "spread"])
def test_mxfp8_agrees_with_one_element_at_a_time(magnitude, spread, generator, device):
    """The two least magnitudes are subnormal; the largest values lie near float32's end."""
    x = torch.randn(6, 32, generator=generator).clamp(-8, 8) * magnitude
    x = x / spread ** torch.rand(6, 32, generator=generator)
    values, scale = quantize_mxfp8(x.to(device))
    read = dequantize_mxfp8(values, scale)
    for row in range(len(x)):
        exponent, elements = slow_mxfp8(x[row].tolist())
        assert scale[row].item() == exponent + 127
        assert same_bits(values[row].float().cpu(), torch.tensor(elements))
        expected = [math.ldexp(element, exponent) for element in elements]
        assert same_bits(read[row].cpu(), torch.tensor(expected))


@pytest.mark.parametrize("value", [448.1, 464.0, 465.0, 480.0, 511.9])
def test_mxfp8_saturates_between_448_and_512(value, device):
    values, scale = quantize_mxfp8(group_of(value, -value).to(device))
    assert scale.tolist() == [127]
    assert values[:2].float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize(
    ("largest", "scale"), [(256.0, 127), (511.9, 127), (512.0, 128), (255.9, 126), (1.0, 119)]
)
def test_the_mxfp8_scale_puts_the_largest_between_256_and_512(largest, scale):
    """Section 6.3: the largest power of two not above it, over e4m3's, which is 256."""
    assert quantize_mxfp8(group_of(-largest))[1].tolist() == [scale]


def test_mxfp8_reads_every_scale_as_a_power_of_two(device):
    """What float32 cannot hold, 448 times the three largest scales and more, is Inf."""
    x = group_of(1.0, -448.0, 2.0**-9).to(torch.float8_e4m3fn).expand(256, 32).to(device)
    scale = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    read = dequantize_mxfp8(x, scale)
    for exponent in range(-127, 128):
        one, end, least = read[exponent + 127, :3].tolist()
        assert one == 2.0**exponent
        assert end == (-math.inf if exponent > 119 else -448.0 * 2.0**exponent)
        assert least == 2.0 ** (exponent - 9)
    assert read[255].isnan().all()


def test_mxfp8_at_the_ends_of_float32(device):
    largest = torch.finfo(torch.float32).max
    # 2^-9 is e4m3's least, 2^-127 e8m0's: half of their product is a tie and goes to zero.
    least = 2.0**-136
    x = torch.stack(
        [
            group_of(largest, -largest, 2.0**127, 2.0**-149),
            group_of(448.0 * 2.0**-127, -least, least / 2, 1.5 * least, 2.0**-149),
            group_of(least, -2.0 * least),
            group_of(2.0**-149, -(2.0**-149)),
            torch.zeros(32),
        ]
    )
    values, scale = quantize_mxfp8(x.to(device))
    assert scale.flatten().tolist() == [246, 0, 0, 0, 0]
    end = 448.0 * 2.0**119
    expected = torch.stack(
        [
            group_of(end, -end, 2.0**127, 0.0),
            group_of(448.0 * 2.0**-127, -least, 0.0, 2.0 * least, 0.0),
            x[2],
            group_of(0.0, -0.0),
            x[4],
        ]
    )
    assert same_bits(dequantize_mxfp8(values, scale).cpu(), expected)


@pytest.mark.parametrize("k", [1, 31, 33, 101])
def test_zeros_fill_the_last_group_of_mxfp8(k, generator, device):
    x = wide(generator, 3, k).to(device)
    values, scale = quantize_mxfp8(x)
    assert scale.shape == (3, -(-k // 32))
    whole, whole_scale = quantize_mxfp8(torch.nn.functional.pad(x, (0, -k % 32)))
    assert torch.equal(scale, whole_scale)
    assert torch.equal(values.float(), whole[:, :k].float())


def quantize_mxfp4_and_read(x):
    packed, scale = quantize_mxfp4(x)
    return scale, dequantize_mxfp4(packed, scale, x.shape[-1])


def quantize_mxfp8_and_read(x):
    values, scale = quantize_mxfp8(x)
    # Also for whoever reads the elements alone.
    assert torch.equal(values.float().isnan().any(-1), scale.eq(255).any(-1))
    return scale, dequantize_mxfp8(values, scale)


@pytest.mark.parametrize("quantize", [quantize_mxfp4_and_read, quantize_mxfp8_and_read])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 31, 40, 69])
def test_what_is_no_number_makes_its_mx_group_nan(quantize, bad, place, generator, device):
    """The last group is cut after 6 elements."""
    x = torch.randn(3, 70, generator=generator).to(device)
    clean_scale, clean = quantize(x)
    x[1, place] = bad
    scale, read = quantize(x)
    hit = torch.zeros(3, 3, dtype=torch.bool, device=device)
    hit[1, place // 32] = True
    assert torch.equal(scale, clean_scale.masked_fill(hit, 255))
    hit = hit.repeat_interleave(32, dim=1)[:, :70]
    assert torch.equal(read.isnan(), hit)
    assert torch.equal(read[~hit], clean[~hit])


def test_a_group_whose_scale_is_nan_is_nan():
    packed, scale = quantize_mxfp4(torch.ones(2, 64))
    scale[1, 0] = 255
    read = dequantize_mxfp4(packed, scale, 64)
    assert read[1, :32].isnan().all()
    assert read[1, 32:].eq(1).all()
    assert read[0].eq(1).all()


@pytest.mark.parametrize("n", [1, 16, 32, 33, 100])
@pytest.mark.parametrize("groups", [1, 4, 8, 9, 23])
def test_a_shuffled_scale_lies_where_the_formula_says(n, groups, generator, device):
    # No scale is 0, which is what fills the rest.
    scale = torch.randint(1, 256, (2, n, groups), dtype=torch.uint8, generator=generator)
    expected = torch.zeros(2, -(-n // 32), -(-groups // 8) * 256, dtype=torch.uint8)
    for row, g in itertools.product(range(n), range(groups)):
        offset = (g // 8) * 256
        offset += (((g % 4) * 16 + row % 16) * 2 + (g // 4) % 2) * 2 + (row // 16) % 2
        expected[:, row // 32, offset] = scale[:, row, g]
    shuffled = shuffle_scales_cdna4(scale.to(device))
    assert torch.equal(shuffled.cpu(), expected)
    assert shuffled.is_contiguous()
    # Filling is not read back.
    shuffled[shuffled == 0] = 255
    back = unshuffle_scales_cdna4(shuffled, n, groups)
    assert torch.equal(back.cpu(), scale)
    assert back.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 8), (32, 0), (0, 32, 8), (3, 0, 5)], ids=str)
def test_no_scale_shuffles_to_nothing(shape, device):
    scale = torch.zeros(shape, dtype=torch.uint8, device=device)
    shuffled = shuffle_scales_cdna4(scale)
    assert shuffled.numel() == 0
    assert unshuffle_scales_cdna4(shuffled, *shape[-2:]).shape == shape


def floats(*shape):
    return torch.zeros(shape)


def byte(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def fp8(*shape):
    return torch.zeros(shape).to(torch.float8_e4m3fn)


E4M3 = torch.float8_e4m3fn
FLOATS = "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64"
EITHER = "torch.float8_e4m3fn or torch.float8_e4m3fnuz"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_fp8(byte(4), E4M3), f"x is torch.uint8; expected {FLOATS}"),
        (
            lambda: quantize_fp8(floats(4), torch.float8_e5m2),
            f"to is torch.float8_e5m2; expected {EITHER}",
        ),
        (
            lambda: dequantize_fp8(floats(4), floats(1)),
            f"x is torch.float32; expected {EITHER}",
        ),
        (
            lambda: dequantize_fp8(fp8(4), floats(4)),
            "scale has shape [4]; expected [1]",
        ),
        (
            lambda: dequantize_fp8(fp8(4), floats(1).double()),
            "scale is torch.float64; expected torch.float32",
        ),
        (
            lambda: quantize_fp8_blocks(floats(4), E4M3, 1),
            "x has shape [4]; expected [..., any, any]",
        ),
        (
            lambda: quantize_fp8_blocks(floats(4, 4), torch.int8, 1),
            f"to is torch.int8; expected {EITHER}",
        ),
        (
            lambda: quantize_fp8_blocks(floats(4, 4), E4M3, 0),
            "rows is 0; a block has 1 or more",
        ),
        (
            lambda: dequantize_fp8_blocks(fp8(4), floats(1, 1), 1),
            "x has shape [4]; expected [..., any, any]",
        ),
        (
            lambda: dequantize_fp8_blocks(fp8(2, 4, 129), floats(2, 4, 1), 1),
            "scale has shape [2, 4, 1]; expected [2, 4, 2]",
        ),
        (
            lambda: dequantize_fp8_blocks(fp8(4, 4), floats(4, 1), -1),
            "rows is -1; a block has 1 or more",
        ),
        (lambda: quantize_mxfp4(fp8(32)), f"x is {E4M3}; expected {FLOATS}"),
        (lambda: quantize_mxfp4(floats()), "x has shape []; expected [..., any]"),
        (
            lambda: dequantize_mxfp4(byte(2, 16), byte(2, 1), 33),
            "packed has shape [2, 16]; expected [2, 17]",
        ),
        (
            lambda: dequantize_mxfp4(byte(2, 16), byte(1, 1), 32),
            "scale has shape [1, 1]; expected [2, 1]",
        ),
        (
            lambda: dequantize_mxfp4(byte(16).int(), byte(1), 32),
            "packed is torch.int32; expected torch.uint8",
        ),
        (lambda: quantize_mxfp8(byte(32)), f"x is torch.uint8; expected {FLOATS}"),
        (lambda: quantize_mxfp8(floats()), "x has shape []; expected [..., any]"),
        (
            lambda: dequantize_mxfp8(floats(32).to(torch.float8_e4m3fnuz), byte(1)),
            "x is torch.float8_e4m3fnuz; expected torch.float8_e4m3fn",
        ),
        (
            lambda: dequantize_mxfp8(fp8(3, 33), byte(3, 1)),
            "scale has shape [3, 1]; expected [3, 2]",
        ),
        (
            lambda: dequantize_mxfp8(fp8(32), floats(1)),
            "scale is torch.float32; expected torch.uint8",
        ),
        (
            lambda: shuffle_scales_cdna4(byte(8)),
            "scale has shape [8]; expected [..., any, any]",
        ),
        (
            lambda: shuffle_scales_cdna4(floats(8, 8)),
            "scale is torch.float32; expected torch.uint8",
        ),
        (
            lambda: unshuffle_scales_cdna4(byte(5, 1, 256), 33, 8),
            "shuffled has shape [5, 1, 256]; expected [5, 2, 256]",
        ),
        (
            lambda: unshuffle_scales_cdna4(byte(256), 32, 8),
            "shuffled has shape [256]; expected [1, 256]",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_fits(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
