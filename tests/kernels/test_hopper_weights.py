"""Hopper's layout of mxfp4 weights: what is laid out is what was given, and can be had back."""

from __future__ import annotations

import pytest
import torch

from moelab.kernels import hopper_weights
from moelab.kernels.formats import dequantize_mxfp4

CPU = torch.device("cpu")


def drawn(generator, experts, n, k, scales):
    """Draw any codes, what fills the last byte included, and scales of a range."""
    codes = torch.randint(0, 256, (experts, n, -(-k // 2)), generator=generator)
    scale = torch.randint(*scales, (experts, n, -(-k // 32)), generator=generator)
    return codes.to(torch.uint8), scale.to(torch.uint8)


def emulated(w, w_scale, k):
    """Do with packed weights what the kernel's instructions do, in float64 ``[experts, n, k]``."""
    experts, n, _ = w.shape
    steps = hopper_weights.steps(k)
    # A thread's 16 bytes: expert, block, step, row of the block, group, word.
    words = w.view(torch.int32).long().view(experts, n // 16, steps, 16, 4, 4) & 0xFFFFFFFF
    below = w_scale[..., :-64].reshape(experts, n // 16, steps, 8, 4, 2)
    # Row r of a block is the thread's row of r % 8, its first or second.
    below = below.permute(0, 1, 2, 5, 3, 4).flatten(3, 4)
    table = hopper_weights.magnitudes(CPU).view(torch.uint8).view(256, 8).long()
    magnitudes = table[below.long()][..., None, :].expand(*words.shape, 8)
    bits = []
    for half in range(2):
        for byte in range(4):
            selector = words >> (16 * half + 4 * byte) & 7
            magnitude = magnitudes.gather(-1, selector[..., None])[..., 0]
            bits.append(magnitude | (words << 4 * half) >> (8 * byte) & 0x80)
    fp8 = torch.stack(bits, -1).to(torch.uint8).view(torch.float8_e4m3fn).double()
    base = w_scale[..., -64:].contiguous().view(torch.float32).double()
    value = fp8.flatten(4) * base[:, :, None, :, None]
    # Rows r and r + 8 of a block are columns side by side.
    value = value.unflatten(3, (2, 8)).permute(0, 1, 4, 3, 2, 5)
    return value.reshape(experts, n, -1)[..., :k]


@pytest.mark.parametrize("k", [1, 31, 33, 128, 360, 720, 2880])
@pytest.mark.parametrize("n", [16, 48])
def test_unpacking_gives_back_what_was_packed(n, k, generator):
    w, w_scale = drawn(generator, 2, n, k, (100, 140))
    # A group of zeros needs no scale, and an odd k leaves half a byte.
    w |= 0x01
    if k % 2:
        w[..., -1] &= 0xF
    packed = hopper_weights.pack(w, w_scale, k)
    assert packed[0].shape == hopper_weights.w_shape(2, n, k)
    assert packed[1].shape == hopper_weights.w_scale_shape(2, n, k)
    for back, given in zip(hopper_weights.unpack(*packed, k), (w, w_scale), strict=True):
        assert torch.equal(back, given)


@pytest.mark.parametrize("k", [96, 360, 720, 2880])
def test_the_instructions_read_what_was_packed_exactly(k, generator):
    """Of all codes, wherever scales lie, as long as those of a row span 2^14."""
    w, w_scale = drawn(generator, 2, 256, k, (0, 15))
    w_scale += torch.arange(239, dtype=torch.uint8).repeat(3)[:512].view(2, 256, 1)
    assert len(torch.cat((w & 15, w >> 4)).unique()) == 16
    expected = dequantize_mxfp4(w, w_scale, k).double()
    assert torch.equal(emulated(*hopper_weights.pack(w, w_scale, k), k), expected)


@pytest.mark.parametrize("k", [96, 720])
def test_every_scale_is_within_2_18th_of_its_rows_largest_element(k, generator):
    w, w_scale = drawn(generator, 4, 256, k, (0, 253))
    expected = dequantize_mxfp4(w, w_scale, k).double()
    error = (emulated(*hopper_weights.pack(w, w_scale, k), k) - expected).abs().amax(2)
    largest = expected.abs().amax(2)
    assert (error <= 2**-18 * largest).all()
    # Some are rounded, and so the bound is one.
    assert (error > 2**-20 * largest).any()


def test_the_scale_254_is_read_too(generator):
    """6 x 2^127 is more than fp32 holds, 1.5 x 2^127 is not."""
    w, w_scale = drawn(generator, 1, 16, 128, (240, 255))
    w &= 0x33
    w_scale[0, :, 0] = 254
    expected = dequantize_mxfp4(w, w_scale, 128).double()
    assert expected.isfinite().all()
    assert torch.equal(emulated(*hopper_weights.pack(w, w_scale, 128), 128), expected)


def test_a_nan_makes_its_own_row_nan(generator):
    w, w_scale = drawn(generator, 2, 32, 160, (110, 120))
    w_scale[1, 5, 2] = 255
    packed = hopper_weights.pack(w, w_scale, 160)
    of_row = torch.zeros(2, 32, dtype=torch.bool)
    of_row[1, 5] = True
    read = emulated(*packed, 160).isnan()
    assert torch.equal(read, of_row[..., None].expand_as(read))
    back = hopper_weights.unpack(*packed, 160)
    assert torch.equal(back[0], w)
    assert torch.equal(dequantize_mxfp4(*back, 160).isnan(), read)


def test_rows_of_zeros_are_zero(generator):
    w = torch.zeros(1, 16, 80, dtype=torch.uint8)
    w[0, 3] = 0x88
    _, w_scale = drawn(generator, 1, 16, 160, (0, 255))
    packed = hopper_weights.pack(w, w_scale, 160)
    assert not emulated(*packed, 160).any()
    back = hopper_weights.unpack(*packed, 160)
    assert torch.equal(back[0], w)
    assert not dequantize_mxfp4(*back, 160).any()


def test_what_fills_the_last_byte_is_never_read(generator):
    w, w_scale = drawn(generator, 1, 16, 33, (100, 120))
    # The largest code in the filler, the smallest elsewhere: it would set the row's base.
    w = w & 0x11
    filled = w.clone()
    filled[..., -1] |= 0x70
    w[..., -1] &= 0xF
    for one, other in zip(
        hopper_weights.pack(w, w_scale, 33), hopper_weights.pack(filled, w_scale, 33), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"w": torch.zeros(2, 40, 48)}, "w is torch.float32; expected torch.uint8"),
        ({"w": torch.zeros(2, 40, 48, dtype=torch.uint8)}, "n = 40.*by 16 rows: pad n to 48"),
        ({"w": torch.zeros(2, 48, 47, dtype=torch.uint8)}, r"w has shape \[2, 48, 47\]"),
        ({"k": 97}, r"expected \[any, any, 49\]"),
        ({"w_scale": torch.zeros(2, 40, 4, dtype=torch.uint8)}, r"w_scale has shape \[2, 40, 4\]"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(changed, words):
    given = {
        "w": torch.zeros(2, 40, 48, dtype=torch.uint8),
        "w_scale": torch.zeros(2, 40, 3, dtype=torch.uint8),
        "k": 96,
    }
    with pytest.raises(ValueError, match=words):
        hopper_weights.pack(**given | changed)


def test_weights_that_were_not_packed_are_refused(generator):
    w, w_scale = drawn(generator, 2, 32, 160, (100, 120))
    packed, packed_scale = hopper_weights.pack(w, w_scale, 160)
    with pytest.raises(ValueError, match=r"w has shape .* expected \[any, any, 128\]"):
        hopper_weights.check(w, packed_scale, 160)
    with pytest.raises(ValueError, match=r"w_scale has shape .* expected \[2, 2, 192\]"):
        hopper_weights.check(packed, w_scale, 160)
