"""What the fused mxfp4 and bf16 GEMMs promise, against their float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch
from grouped_gemm import DTYPES, PoisonedEmpty, Recorder, fenced

from moelab.kernels import fused_gemm_afp4wfp4_a16w16 as fused
from moelab.kernels.formats import dequantize_mxfp4, mx_groups, mx_pairs, quantize_mxfp4
from moelab.specs import Cost, Problem, Tile
from moelab.targets import TARGETS, get

# Rows of x enough for 8 warps: where NVIDIA's lowering widens mxfp4 in registers, each thread
# needs 4 bytes (triton 3.9, Fp4ToFpOpToLLVMBase.cpp), as it does for an odd k.
SMALL = Tile(32, 16, 64)
# A tile that GPUs are run with, and one of narrow rows, whose weights pass by the cache.
LARGE, NARROW = Tile(128, 64, 128), Tile(16, 64, 256)

every_split = pytest.mark.parametrize("split_k", [1, 2, 3, 7])
every_tile = pytest.mark.parametrize(
    "tile",
    [SMALL, *(pytest.param(tile, marks=pytest.mark.gpu) for tile in (LARGE, NARROW))],
    ids=str,
)
every_dtype = pytest.mark.parametrize("y_format", DTYPES)


@dataclass(frozen=True)
class Case:
    """Both products' tensors, by the names that launcher and reference give them."""

    x_fp4: torch.Tensor
    w_fp4: torch.Tensor
    x_fp4_scale: torch.Tensor
    w_fp4_scale: torch.Tensor
    x_bf16: torch.Tensor
    w_bf16: torch.Tensor
    bias_fp4: torch.Tensor | None = None
    bias_bf16: torch.Tensor | None = None

    @property
    def tensors(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def launch(self, tile: Tile, *, y_format="fp32", **launch):
        """Run the kernel between fences and into poisoned memory: both products."""
        return self.launch_and_keep(tile, y_format=y_format, **launch)[:2]

    def launch_and_keep(self, tile: Tile, **launch) -> list[torch.Tensor]:
        """Give all that was allocated: both products, then their partials if there are any."""
        tensors = {
            name: None if tensor is None else fenced(tensor)
            for name, tensor in self.tensors.items()
        }
        with mock.patch.object(torch, "empty", PoisonedEmpty()) as poisoned:
            y = fused.fused_gemm_afp4wfp4_a16w16(**tensors, tile=tile, **launch)
        poisoned.check()
        assert [each.data_ptr() for each in y] == [
            tensor.data_ptr() for tensor in poisoned.tensors[:2]
        ]
        return poisoned.tensors

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        return fused.reference(**self.tensors)


def whole(generator, m: int, n: int, n_bf16: int, k: int, bias: bool = True) -> Case:
    """Draw a problem whose sums any order of additions gets exactly.

    Of mxfp4 every code is drawn, with scales of 1/2 to 2: products are multiples of 1/16 and
    at most 144, so that 7,168 of them add up to less than 2^24 sixteenths. Of bf16, whole
    numbers up to 8. Biases are quarters.
    """
    device = generator.device

    def draw(low, high, *shape, dtype):
        drawn = torch.randint(low, high + 1, shape, generator=generator, device=device)
        return drawn.to(dtype)

    return Case(
        x_fp4=draw(0, 255, m, mx_pairs(k), dtype=torch.uint8),
        w_fp4=draw(0, 255, n, mx_pairs(k), dtype=torch.uint8),
        x_fp4_scale=draw(126, 128, m, mx_groups(k), dtype=torch.uint8),
        w_fp4_scale=draw(126, 128, n, mx_groups(k), dtype=torch.uint8),
        x_bf16=draw(-8, 8, m, k, dtype=torch.bfloat16),
        w_bf16=draw(-8, 8, n_bf16, k, dtype=torch.bfloat16),
        bias_fp4=draw(-99, 99, n, dtype=torch.float32) / 4 if bias else None,
        bias_bf16=draw(-99, 99, n_bf16, dtype=torch.float32) / 4 if bias else None,
    )


def normal(generator, m: int, n: int, n_bf16: int, k: int) -> Case:
    """Draw a problem as a model has it: normal x, w and biases."""

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    x_fp4, x_fp4_scale = quantize_mxfp4(draw(m, k))
    w_fp4, w_fp4_scale = quantize_mxfp4(draw(n, k))
    x_bf16, w_bf16 = draw(m, k).bfloat16(), draw(n_bf16, k).bfloat16()
    return Case(x_fp4, w_fp4, x_fp4_scale, w_fp4_scale, x_bf16, w_bf16, draw(n), draw(n_bf16))


def assert_exact(y, expected) -> None:
    """Assert that both products are the reference's, rounded once to their own type."""
    for name, got, of in zip(("y_fp4", "y_bf16"), y, expected, strict=True):
        # float32 holds each of these sums.
        of = of.float().to(got.dtype)
        assert_within(name, got, of, torch.zeros_like(of))


def assert_close(y, case: Case, tile: Tile) -> None:
    """Assert every element within what adding in float32 can lose.

    Products are exact in float32: of bf16, 8 + 8 bits of significand; of e2m1, 2 + 2 bits and
    powers of two. Each addition loses at most 2^-23 of its result (2^-24 to nearest; tensor
    cores cut the rest off), and no partial sum exceeds sum|x w| + |b|. In whatever order and
    by however many programs, k products, split_k partials and a bias take no more than
    k + split_k + 1 additions. Storing as bf16 rounds to nearest: 2^-8.

    Normal x and w have a sum|x w| of 2 / pi k, where sum(x w) deviates by sqrt(k): at k = 7168
    that allows 4.6 % of the deviation, which a lost group of 32 exceeds.
    """
    magnitudes = Case(**{name: _magnitude(name, each) for name, each in case.tensors.items()})
    k = case.x_bf16.shape[1]
    additions = k + tile.split_k + 1
    products = zip(("y_fp4", "y_bf16"), y, case.expected(), magnitudes.expected(), strict=True)
    for name, got, expected, magnitude in products:
        allowed = additions * 2**-23 * magnitude
        if got.dtype == torch.bfloat16:
            allowed += 2**-8 * (expected.abs() + allowed)
        assert_within(name, got, expected, allowed)


def _magnitude(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.uint8:
        return tensor.abs()
    # The sign bits of both e2m1 of a byte; scales have none.
    return tensor if name.endswith("scale") else tensor & 0x77


def assert_within(name: str, y, expected, allowed) -> None:
    assert y.shape == expected.shape, f"{name} {tuple(y.shape)} is not {tuple(expected.shape)}"
    error = (y.double() - expected.double()).abs()
    beyond = (~(error <= allowed)).nonzero()
    if len(beyond):
        at = tuple(beyond[0].tolist())
        raise AssertionError(
            f"{len(beyond)} of {y.numel()} elements of {name} {list(y.shape)} are off, the first "
            f"at {list(at)}: got {float(y[at])!r}, expected {float(expected[at])!r}, off by "
            f"{float(error[at]):.3g} where {float(allowed[at]):.3g} is allowed"
        )


# (m, n, n_bf16, k) by tile.
SHAPES = {
    "one of each": lambda t: (1, 1, 1, 1),
    "m 3, n 2, n_bf16 4, k 5": lambda t: (3, 2, 4, 5),
    "one row": lambda t: (1, t.block_n, t.block_n, t.block_k),
    "m past a block": lambda t: (t.block_m + 1, t.block_n, 3, t.block_k),
    "m past a group of blocks": lambda t: (4 * t.block_m + 1, 3, 1, 5),
    "n past two blocks": lambda t: (3, 2 * t.block_n + 3, 1, t.block_k),
    "n_bf16 past two blocks": lambda t: (3, 1, 2 * t.block_n + 3, t.block_k),
    "k a group past two steps": lambda t: (3, 5, 4, 2 * t.block_k + 32),
    "k a part group past two steps": lambda t: (3, 5, 4, 2 * t.block_k + 6),
    "k odd, past two steps": lambda t: (3, 5, 4, 2 * t.block_k + 7),
    "whole blocks": lambda t: (t.block_m, t.block_n, t.block_n, 7 * t.block_k),
    "a part block each": lambda t: (t.block_m + 3, t.block_n + 5, t.block_n + 7, t.block_k - 9),
}


@every_tile
@every_split
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_shape_is_exact_in_whole_numbers(tile, split_k, shape, device_generator):
    case = whole(device_generator, *shape(tile))
    assert_exact(case.launch(replace(tile, split_k=split_k)), case.expected())


@every_tile
@pytest.mark.parametrize("split_k", [1, 2])
@every_dtype
@pytest.mark.parametrize("biased", ["both", "fp4", "bf16", "neither"])
def test_each_bias_is_added_once_to_its_own_product(
    tile, split_k, y_format, biased, device_generator
):
    case = whole(device_generator, 3, 5, 4, 2 * tile.block_k)
    without = {"both": (), "fp4": ("bf16",), "bf16": ("fp4",), "neither": ("fp4", "bf16")}
    case = replace(case, **{f"bias_{product}": None for product in without[biased]})
    y = case.launch(replace(tile, split_k=split_k), y_format=y_format)
    assert [each.dtype for each in y] == [DTYPES[y_format]] * 2
    assert_exact(y, case.expected())


@every_tile
@pytest.mark.parametrize("split_k", [1, 3])
@every_dtype
def test_random_products_match_the_reference(tile, split_k, y_format, device_generator):
    tile = replace(tile, split_k=split_k)
    case = normal(device_generator, tile.block_m + 1, tile.block_n + 1, 7, 3 * tile.block_k + 5)
    assert_close(case.launch(tile, y_format=y_format), case, tile)


def test_y_is_bf16_unless_asked(device_generator):
    case = whole(device_generator, 3, 5, 4, 32)
    y = fused.fused_gemm_afp4wfp4_a16w16(**case.tensors, tile=SMALL)
    assert [each.dtype for each in y] == [torch.bfloat16] * 2
    assert_exact(y, case.expected())


@every_tile
@every_dtype
def test_partials_are_summed_first_to_last_and_rounded_once(tile, y_format, device_generator):
    case = normal(device_generator, 5, 7, 6, 3 * tile.block_k)
    *y, fp4, bf16 = case.launch_and_keep(replace(tile, split_k=3), y_format=y_format)
    for got, part, bias in zip(y, (fp4, bf16), (case.bias_fp4, case.bias_bf16), strict=True):
        assert part.dtype == torch.float32
        in_order = ((part[0] + part[1]) + part[2]) + bias
        assert torch.equal(got, in_order.to(DTYPES[y_format]))


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(
    ("m", "tile"), [(64, "64x32x512/7"), (8192, "128x64x256"), (8192, "64x64x128/3")]
)
def test_products_of_full_size(m, tile, num_stages, device_generator):
    tile, shape = Tile.parse(tile), (m, 512, 256, 7168)
    exact = whole(device_generator, *shape)
    assert_exact(exact.launch(tile, num_stages=num_stages), exact.expected())
    case = normal(device_generator, *shape)
    y = case.launch(tile, num_stages=num_stages, y_format="bf16")
    assert_close(y, case, tile)
    again = case.launch(tile, num_stages=num_stages, y_format="bf16")
    assert all(map(torch.equal, y, again)), "two launches differ"


@every_tile
@pytest.mark.parametrize("split_k", [1, 3])
def test_dies_change_no_bit(tile, split_k, device_generator):
    """5 x 3 blocks of 1 and 3 splits: not a multiple of 8 programs."""
    tile = replace(tile, split_k=split_k)
    case = normal(device_generator, 4 * tile.block_m + 1, tile.block_n + 1, 3, tile.block_k)
    y, renumbered = case.launch(tile), case.launch(tile, num_xcds=8)
    assert all(map(torch.equal, y, renumbered))


@every_tile
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("sizes", [(0, 5, 4, 40), (3, 0, 4, 40), (3, 5, 0, 40), (3, 5, 4, 0)])
def test_nothing_of_one_size_leaves_the_rest(tile, split_k, sizes, device_generator):
    """No row, no column of either product, or nothing to add but the bias."""
    case = whole(device_generator, *sizes)
    assert_exact(case.launch(replace(tile, split_k=split_k)), case.expected())


@every_tile
@pytest.mark.parametrize("k", [1, 31, 33, 95])
@pytest.mark.parametrize("split_k", [1, 2])
def test_what_fills_the_last_byte_is_never_used(tile, k, split_k, device_generator):
    """k is odd: the high half of each row's last byte stands for no element."""
    case = whole(device_generator, 5, 7, 4, k)
    half = {"x_fp4": case.x_fp4.clone(), "w_fp4": case.w_fp4.clone()}
    for filled in half.values():
        filled[:, -1] = (filled[:, -1] & 0xF) | 0xF0
    y = replace(case, **half).launch(replace(tile, split_k=split_k))
    assert_exact(y, case.expected())


@every_tile
@pytest.mark.parametrize("of", ["x", "w"])
def test_every_code_and_scale_comes_through_an_identity_exactly(tile, of, device_generator):
    """The other operand is the identity times 2.

    Scales stay 2^100 from either end of bf16, into which chips without mxfp4 widen both.
    """
    k, rows, generator = 96, 40, device_generator
    eye, eye_scale = quantize_mxfp4(2 * torch.eye(k, device=generator.device))
    case = whole(generator, *((rows, k) if of == "x" else (k, rows)), 1, k, bias=False)
    codes = case.x_fp4 if of == "x" else case.w_fp4
    assert len(torch.cat((codes % 16, codes // 16)).unique()) == 16, "not every code is drawn"
    scale = torch.randint(
        27, 228, (rows, mx_groups(k)), generator=generator, device=generator.device
    ).to(torch.uint8)
    expected = 2 * dequantize_mxfp4(codes, scale, k)
    if of == "x":
        case = replace(case, x_fp4_scale=scale, w_fp4=eye, w_fp4_scale=eye_scale)
    else:
        case = replace(case, w_fp4_scale=scale, x_fp4=eye, x_fp4_scale=eye_scale)
        expected = expected.T
    assert torch.equal(case.launch(tile)[0], expected)


@every_tile
@pytest.mark.parametrize("split_k", [1, 2])
def test_offsets_of_64_bits_change_nothing(tile, split_k, device_generator, monkeypatch):
    monkeypatch.setattr(fused, "WIDE_ELEMENTS", 1)
    case = whole(
        device_generator, tile.block_m + 1, tile.block_n + 1, tile.block_n + 1, tile.block_k + 7
    )
    assert_exact(case.launch(replace(tile, split_k=split_k)), case.expected())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((2**17 + 3, 5, 4, 2**14), "64x64x128"),
        ((3, 2**17 + 1, 2**16 + 1, 2**15), "64x64x128"),
        ((2**15 + 3, 2**15, 2**15, 64), "128x128x32/2"),
    ],
    ids=["x", "w", "partials"],
)
def test_tensors_of_more_than_32_bits_of_elements(sizes, tile, device_generator):
    m, n, n_bf16, k = sizes
    case = whole(device_generator, m, n, n_bf16, k)
    y = fused.fused_gemm_afp4wfp4_a16w16(**case.tensors, tile=Tile.parse(tile), y_format="fp32")
    # Random x and w stay far from the worst case that `whole` names.
    for rows in (slice(0, 3), slice(m - 3, m)):
        for columns in (slice(0, 3), slice(-3, None)):
            of_x = {name: getattr(case, name)[rows] for name in ("x_fp4", "x_fp4_scale", "x_bf16")}
            of_w = {
                name: getattr(case, name)[columns]
                for name in ("w_fp4", "w_fp4_scale", "w_bf16", "bias_fp4", "bias_bf16")
            }
            assert_exact([each[rows, columns] for each in y], Case(**of_x, **of_w).expected())


def test_reference_element_by_element(generator):
    """k = 33 has a second group, of one element, in half a byte."""
    case = normal(generator, 2, 3, 4, k := 33)
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def value(packed, scale, row, c):
        byte = int(packed[row, c // 2])
        code = byte >> 4 if c % 2 else byte & 0xF
        sign = -1 if code & 8 else 1
        return sign * magnitudes[code & 7] * 2.0 ** (int(scale[row, c // 32]) - 127)

    def fp4(i, j):
        products = (
            value(case.x_fp4, case.x_fp4_scale, i, c) * value(case.w_fp4, case.w_fp4_scale, j, c)
            for c in range(k)
        )
        return sum(products) + float(case.bias_fp4[j])

    def bf16(i, j):
        products = (float(case.x_bf16[i, c]) * float(case.w_bf16[j, c]) for c in range(k))
        return sum(products) + float(case.bias_bf16[j])

    for of, element, columns in zip(case.expected(), (fp4, bf16), (3, 4), strict=True):
        by_hand = [[element(i, j) for j in range(columns)] for i in range(2)]
        torch.testing.assert_close(of, torch.tensor(by_hand, dtype=torch.float64))
    without = replace(case, bias_fp4=None, bias_bf16=None).expected()
    torch.testing.assert_close(without[0] + case.bias_fp4, case.expected()[0])
    torch.testing.assert_close(without[1] + case.bias_bf16, case.expected()[1])


def problem(m: int, n: int, n_bf16: int, k: int, **other) -> Problem:
    return Problem("test", 1, 1, m, 1, 1, n, k, False, False, False, n_bf16=n_bf16, **other)


def test_cost_counts_both_products_and_each_tensor_once():
    """k = 33 takes 17 bytes and 2 scales of mxfp4, and 66 bytes of bf16."""
    assert fused.cost(problem(3, 5, 4, 33)) == Cost(
        flops=2 * 3 * 5 * 33 + 2 * 3 * 4 * 33,
        bytes=(3 + 5) * (17 + 2) + (3 + 4) * 66 + 2 * 3 * (5 + 4),
    )


@pytest.fixture
def recorder(monkeypatch):
    """Launch neither kernel; keep what the first was launched with."""
    recorder = Recorder()
    monkeypatch.setattr(fused, "_fused_gemm_afp4wfp4_a16w16_kernel", recorder)
    monkeypatch.setattr(fused, "_sum_splits_kernel", Recorder())
    return recorder


@every_split
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("y_format", ["bf16", "fp32"])
@pytest.mark.parametrize("sizes", [(48, 48, 32, 64), (9, 40, 5, 96), (3, 17, 20, 45)], ids=str)
def test_the_compiler_is_told_of_the_launch_that_is_made(
    split_k, target, bias, y_format, sizes, generator, recorder
):
    target, tile = get(target), replace(SMALL, split_k=split_k)
    of = problem(*sizes, bias=bias, y_format=y_format)
    described = fused.source(of, tile, target).args
    fused.fused_gemm_afp4wfp4_a16w16(
        **whole(generator, *sizes, bias=bias).tensors,
        tile=tile,
        num_warps=4,
        num_stages=3,
        num_xcds=target.xcds,
        y_format=y_format,
    )
    launched = recorder.told()
    assert launched.pop("num_warps") == 4
    assert launched.pop("num_stages") == 3
    assert {name: launched[name] for name in described} == described
    m, n, n_bf16, _ = sizes
    assert recorder.grid == (-(-m // 32) * (-(-n // 16) + -(-n_bf16 // 16)) * split_k,)


def test_only_tensors_beyond_32_bit_offsets_are_indexed_with_64():
    def is_wide(m, n, n_bf16, k, split_k=1):
        of, tile = problem(m, n, n_bf16, k), replace(SMALL, split_k=split_k)
        return fused.source(of, tile, get("gfx950")).args["WIDE"]

    assert not is_wide(2**16 - 1, 64, 64, 2**15)
    assert not is_wide(64, 64, 2**16 - 1, 2**15)
    assert is_wide(2**16, 64, 64, 2**15), "x_bf16"
    assert is_wide(64, 64, 2**16, 2**15), "w_bf16"
    assert not is_wide(64, 2**16, 64, 2**15), "w_fp4 has half as many bytes"
    assert is_wide(64, 2**17, 64, 2**15), "w_fp4"
    assert not is_wide(2**15, 2**14, 64, 64, split_k=3)
    assert is_wide(2**15, 2**14, 64, 64, split_k=4), "partials"


@pytest.mark.parametrize("target", ["gfx950", "sm_100"])
def test_amd_options_go_to_amd_alone(target):
    options = fused.source(problem(3, 5, 4, 64), SMALL, get(target)).options
    assert options == (fused.AMD_OPTIONS if TARGETS[target].backend == "hip" else {})


@pytest.mark.parametrize(
    ("tile", "shown"),
    [
        (Tile(48, 64, 128), ("48x64x128", "block_m = 48", "power of two")),
        (Tile(16, 0, 128), ("16x0x128", "block_n = 0", "power of two")),
        (Tile(16, 64, 96), ("16x64x96", "block_k = 96", "power of two")),
        (Tile(16, 64, 16), ("16x64x16", "block_k = 16", "32 or more")),
        (Tile(16, 64, 128, 0), ("16x64x128", "split_k = 0", "1 or more")),
    ],
    ids=str,
)
def test_a_tile_that_does_not_fit_is_refused_by_source_and_launcher(
    tile, shown, generator, recorder
):
    case = whole(generator, 3, 5, 4, 64)
    with pytest.raises(ValueError) as described:
        fused.source(problem(3, 5, 4, 64), tile, get("gfx950"))
    with pytest.raises(ValueError) as launched:
        fused.fused_gemm_afp4wfp4_a16w16(**case.tensors, tile=tile)
    assert str(described.value) == str(launched.value)
    for words in shown:
        assert words in str(launched.value)
    assert recorder.arguments is None


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("y_format", "fp8", "one of bf16, fp32"), ("scale_layout", "cdna4", "rows")],
)
def test_a_format_that_the_kernel_does_not_take_is_refused(name, value, wanted):
    of = problem(3, 5, 4, 64, **{name: value})
    with pytest.raises(ValueError, match=rf"{name} is '{value}'; expected {wanted}"):
        fused.source(of, SMALL, get("gfx950"))


def strided(tensor):
    """The same values and shape, transposed in memory."""
    return tensor.T.contiguous().T


# What is changed, and what the message must say: the argument, what it is, what it should be.
WRONG = {
    "dimensions of x_bf16": (
        lambda a: {"x_bf16": a["x_bf16"][0]},
        ("x_bf16 has shape [64]", "expected [any, any]"),
    ),
    "type of x_bf16": (
        lambda a: {"x_bf16": a["x_bf16"].half()},
        ("x_bf16 is torch.float16", "expected torch.bfloat16"),
    ),
    "layout of x_bf16": (
        lambda a: {"x_bf16": strided(a["x_bf16"])},
        ("x_bf16 has strides (1, 3)", "contiguous"),
    ),
    "device of x_bf16": (
        lambda a: {"x_bf16": a["x_bf16"].to("meta")},
        ("x_bf16 is on meta", "expected cpu"),
    ),
    "rows of x_fp4": (
        lambda a: {"x_fp4": a["x_fp4"][:2]},
        ("x_fp4 has shape [2, 32]", "expected [3, 32]"),
    ),
    "bytes of x_fp4": (
        lambda a: {"x_fp4": a["x_fp4"][:, :31].contiguous()},
        ("x_fp4 has shape [3, 31]", "expected [3, 32]"),
    ),
    "type of x_fp4": (
        lambda a: {"x_fp4": a["x_fp4"].view(torch.int8)},
        ("x_fp4 is torch.int8", "expected torch.uint8"),
    ),
    "layout of x_fp4": (
        lambda a: {"x_fp4": strided(a["x_fp4"])},
        ("x_fp4 has strides (1, 3)", "contiguous"),
    ),
    "bytes of w_fp4": (
        lambda a: {"w_fp4": torch.zeros(5, 64, dtype=torch.uint8)},
        ("w_fp4 has shape [5, 64]", "expected [any, 32]"),
    ),
    "type of w_fp4": (
        lambda a: {"w_fp4": a["w_fp4"].float()},
        ("w_fp4 is torch.float32", "expected torch.uint8"),
    ),
    "layout of w_fp4": (
        lambda a: {"w_fp4": strided(a["w_fp4"])},
        ("w_fp4 has strides (1, 5)", "contiguous"),
    ),
    "device of w_fp4": (
        lambda a: {"w_fp4": a["w_fp4"].to("meta")},
        ("is on cpu", "expected meta"),
    ),
    "groups of x_fp4_scale": (
        lambda a: {"x_fp4_scale": a["x_fp4_scale"][:, :1].contiguous()},
        ("x_fp4_scale has shape [3, 1]", "expected [3, 2]"),
    ),
    "type of x_fp4_scale": (
        lambda a: {"x_fp4_scale": a["x_fp4_scale"].float()},
        ("x_fp4_scale is torch.float32", "expected torch.uint8"),
    ),
    "rows of w_fp4_scale": (
        lambda a: {"w_fp4_scale": a["w_fp4_scale"][:4]},
        ("w_fp4_scale has shape [4, 2]", "expected [5, 2]"),
    ),
    "device of w_fp4_scale": (
        lambda a: {"w_fp4_scale": a["w_fp4_scale"].to("meta")},
        ("w_fp4_scale is on meta", "expected cpu"),
    ),
    "k of w_bf16": (
        lambda a: {"w_bf16": a["w_bf16"][:, :63].contiguous()},
        ("w_bf16 has shape [4, 63]", "expected [any, 64]"),
    ),
    "type of w_bf16": (
        lambda a: {"w_bf16": a["w_bf16"].float()},
        ("w_bf16 is torch.float32", "expected torch.bfloat16"),
    ),
    "layout of w_bf16": (
        lambda a: {"w_bf16": strided(a["w_bf16"])},
        ("w_bf16 has strides (1, 4)", "contiguous"),
    ),
    "columns of bias_fp4": (
        lambda a: {"bias_fp4": a["bias_fp4"][:4]},
        ("bias_fp4 has shape [4]", "expected [5]"),
    ),
    "type of bias_fp4": (
        lambda a: {"bias_fp4": a["bias_fp4"].bfloat16()},
        ("bias_fp4 is torch.bfloat16", "expected torch.float32"),
    ),
    "columns of bias_bf16": (
        lambda a: {"bias_bf16": a["bias_fp4"]},
        ("bias_bf16 has shape [5]", "expected [4]"),
    ),
    "device of bias_bf16": (
        lambda a: {"bias_bf16": a["bias_bf16"].to("meta")},
        ("bias_bf16 is on meta", "expected cpu"),
    ),
    "type of y": (
        lambda a: {"y_format": "fp8"},
        ("y_format is 'fp8'", "bf16, fp32"),
    ),
}


@pytest.mark.parametrize(("change", "shown"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_shown_before_any_launch(change, shown, generator, recorder):
    right = whole(generator, 3, 5, 4, 64).tensors
    with pytest.raises(ValueError) as error:
        fused.fused_gemm_afp4wfp4_a16w16(**right | change(right), tile=SMALL)
    for words in shown:
        assert words in str(error.value)
    assert recorder.arguments is None
    fused.fused_gemm_afp4wfp4_a16w16(**right, tile=SMALL)
    assert recorder.arguments is not None
