"""What the fused feed-forward layer promises, against its float64 reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from grouped_gemm import DTYPES, FENCE, Recorder, fenced
from triton.runtime.interpreter import InterpreterBuilder

from moelab.kernels import ff_a16w16_fused as ff
from moelab.specs import Cost, Problem, Tile
from moelab.targets import get

SMALL, FLAT = Tile(16, 32, 32), Tile(4, 64, 16)

every_gate = pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
every_activation = pytest.mark.parametrize("activation", ff.ACTIVATIONS)
every_tile = pytest.mark.parametrize(
    "tile",
    [
        SMALL,
        FLAT,
        pytest.param(Tile(64, 128, 64), marks=pytest.mark.gpu),
        pytest.param(Tile(8, 128, 128), marks=pytest.mark.gpu),
    ],
    ids=str,
)


class FencedZeros:
    """Stand in for torch.zeros: one tensor, between fences of ones that must stay so."""

    def __call__(self, shape, *, dtype, device):
        size = torch.Size(shape).numel()
        self.buffer = torch.ones(size + 2 * FENCE, dtype=dtype, device=device)
        return self.buffer[FENCE : FENCE + size].view(shape).zero_()

    def check(self) -> None:
        """Assert that nothing was added before or after the tensor."""
        outside = torch.cat((self.buffer[:FENCE], self.buffer[-FENCE:]))
        assert (outside == 1).all(), "memory before or after y was written"


@dataclass(frozen=True)
class Case:
    """A layer's tensors, and what launch and reference are both asked for."""

    x: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor
    gated: bool
    activation: str | None

    @property
    def options(self) -> dict:
        return {"gated": self.gated, "activation": self.activation}

    def launch(self, tile: Tile, *, y_format="fp32", **launch) -> torch.Tensor:
        """Run the kernel between fences."""
        tensors = [fenced(tensor) for tensor in (self.x, self.w_up, self.w_down)]
        with mock.patch.object(torch, "zeros", FencedZeros()) as zeros:
            y = ff.ff_a16w16_fused(*tensors, tile, **self.options, y_format=y_format, **launch)
        zeros.check()
        assert y.dtype == DTYPES[y_format]
        return y

    def expected(self) -> torch.Tensor:
        return ff.reference(self.x, self.w_up, self.w_down, **self.options)


def normal(generator, m: int, n_h: int, k: int, gated: bool, activation: str | None) -> Case:
    """Draw a layer; elements of the up-projection and of w_down have deviation 1."""

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    n = 2 * n_h if gated else n_h
    x, w_up, w_down = draw(m, k), draw(n, k) / math.sqrt(k), draw(k, n_h)
    return Case(x.bfloat16(), w_up.bfloat16(), w_down.bfloat16(), gated, activation)


def whole(generator, m: int, n_h: int, k: int, gated: bool) -> Case:
    """Draw a layer of small whole numbers, so that any order of additions is exact.

    Elements are -1, 0 or 1. Only some 9 of each row of w_up are kept: the up-projection's
    deviation is 2, so that h, at most a product of two, has no more than bf16's 8 bits.
    """

    def draw(*shape):
        drawn = torch.randint(-1, 2, shape, generator=generator, device=generator.device)
        return drawn.bfloat16()

    n = 2 * n_h if gated else n_h
    x, w_up, w_down = draw(m, k), draw(n, k), draw(k, n_h)
    kept = torch.rand(w_up.shape, generator=generator, device=generator.device) < 9 / k
    return Case(x, w_up * kept, w_down, gated, "relu")


def assert_exact(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert_within(y, expected, torch.zeros_like(expected))


def assert_close(y: torch.Tensor, case: Case) -> None:
    """Assert every element within what float32 sums and h's rounding can leave.

    What is drawn has random signs, so with LAMBDA = 7 no sum of such terms t, nor any of
    its partial sums, exceeds 7 sqrt(sum t^2), but for one in 2 e^24 (Hoeffding; Levy).

    - Products of bf16 are exact in float32. An addition loses at most 2^-23 of the partial
      sum (2^-24 to nearest; tensor cores cut the rest off), so k of them, atomics
      included, in whatever order, lose at most k 2^-23 7 sqrt(sum t^2).
    - That moves h by the activation's slope, at most 1.13 (gelu's), times as much; what the
      activation itself rounds is below 2^-18 of h. Once rounded, h may then differ from the
      reference's by one step of bf16 more, 2^-7 of h.
    - w_down's signs know nothing of these differences: y gets 7 sqrt(sum (off_h w_down)^2),
      and its own additions' loss on top. Storing y as bf16 rounds to nearest, 2^-8.

    y's deviation is sqrt(sum (h w_down)^2): the steps of h allow 5.5 % of it.
    """
    LAMBDA, SLOPE = 7, 1.13

    def deviation(a, b):
        return (a.square() @ b.square().T).sqrt()

    def lost(a, b):
        return LAMBDA * a.shape[1] * 2**-23 * deviation(a, b)

    x, w_up, w_down = (tensor.double() for tensor in (case.x, case.w_up, case.w_down))
    acc, off = x @ w_up.T, lost(x, w_up)
    # No activation exceeds its argument.
    off_h = SLOPE * off
    if case.gated:
        gate, up = acc[:, 0::2].abs(), acc[:, 1::2].abs()
        off_h = off_h[:, 0::2] * (up + off[:, 1::2]) + gate * off[:, 1::2]
    identity = torch.eye(w_down.shape[1], dtype=torch.float64, device=x.device)
    h = ff.reference(x, w_up, identity, **case.options)
    off_h += (2**-7 + 2**-18) * h.abs()
    expected = case.expected()
    allowed = LAMBDA * deviation(off_h, w_down) + lost(h, w_down)
    if y.dtype == torch.bfloat16:
        allowed += 2**-8 * (expected.abs() + allowed)
    assert_within(y, expected, allowed)


def assert_within(y: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor) -> None:
    assert y.shape == expected.shape
    error = (y.double() - expected).abs()
    beyond = (~(error <= allowed)).nonzero()
    if len(beyond):
        at = tuple(beyond[0].tolist())
        raise AssertionError(
            f"{len(beyond)} of {y.numel()} elements of y {list(y.shape)} are off, the first at "
            f"{list(at)}: got {float(y[at])!r}, expected {float(expected[at])!r}, off by "
            f"{float(error[at]):.3g} where {float(allowed[at]):.3g} is allowed"
        )


# (m, n_h, k) by tile and its columns of h.
SHAPES = {
    "one of each": lambda t, h: (1, 1, 1),
    "m 3, n_h 2, k 5": lambda t, h: (3, 2, 5),
    "one token": lambda t, h: (1, h, t.block_k),
    "m below a block": lambda t, h: (t.block_m - 1, h, t.block_k),
    "m past two blocks": lambda t, h: (2 * t.block_m + 1, h, t.block_k),
    "n below a block": lambda t, h: (3, h - 3, t.block_k),
    "n past two blocks": lambda t, h: (3, 2 * h + 3, t.block_k),
    "k below a block": lambda t, h: (3, h, t.block_k - 5),
    "k past two blocks": lambda t, h: (3, h, 2 * t.block_k + 3),
    "no part block": lambda t, h: (2 * t.block_m, 3 * h, 2 * t.block_k),
    "a part block each": lambda t, h: (t.block_m + 1, 2 * h + 1, t.block_k + 1),
}


@every_tile
@every_gate
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer_of_any_shape_is_exact_in_whole_numbers(tile, gated, shape, device_generator):
    m, n_h, k = shape(tile, tile.block_n // 2 if gated else tile.block_n)
    case = whole(device_generator, m, n_h, k, gated)
    assert_exact(case.launch(tile), case.expected())


@every_tile
@every_gate
@every_activation
@pytest.mark.parametrize("y_format", DTYPES)
def test_a_random_layer_matches_the_reference(tile, gated, activation, y_format, device_generator):
    case = normal(device_generator, 5, tile.block_n + 3, tile.block_k + 7, gated, activation)
    assert_close(case.launch(tile, y_format=y_format), case)


FORMULAS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
    None: lambda z: z,
}


@every_gate
@every_activation
def test_the_activation_is_that_of_its_formula(gated, activation, device):
    """One column through weights of 1, so that y is h; with a gate, twice: up is 2."""
    z = torch.linspace(-12, 12, 95, device=device)[:, None].bfloat16()
    w_up = torch.tensor([[1.0], [2.0]] if gated else [[1.0]], device=device).bfloat16()
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    expected = FORMULAS[activation](z.double())
    if gated:
        expected = expected * 2 * z.double()
    # h is rounded to bf16. In float64, gelu's 1 + tanh rounds to 0 below some -8.
    allowed = (2**-8 + 2**-14) * expected.abs() + 1e-13
    y = Case(z, w_up, one, gated, activation).launch(Tile(64, 32, 16))
    assert_within(y, expected, allowed)


@pytest.mark.gpu
@every_gate
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("tile", [Tile(64, 128, 64), Tile(4, 128, 128)], ids=str)
def test_a_layer_of_full_size(tile, num_stages, gated, device_generator):
    shape = (64, 2048, 5120)
    exact = whole(device_generator, *shape, gated)
    assert_exact(exact.launch(tile, num_stages=num_stages), exact.expected())
    case = normal(device_generator, *shape, gated, "silu")
    assert_close(case.launch(tile, num_stages=num_stages, y_format="bf16"), case)


@every_tile
@every_gate
def test_offsets_of_64_bits_change_nothing(tile, gated, device_generator, monkeypatch):
    monkeypatch.setattr(ff, "WIDE_ELEMENTS", 1)
    case = whole(device_generator, tile.block_m + 1, tile.block_n + 1, tile.block_k + 1, gated)
    assert_exact(case.launch(tile), case.expected())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n_h", "k"),
    [(2**19 + 3, 32, 2**12), (3, 2**16 + 1, 2**15)],
    ids=["x and y", "w_up and w_down"],
)
def test_tensors_of_more_than_32_bits_of_elements(m, n_h, k, device_generator):
    def draw(*shape):
        drawn = torch.randint(
            -1, 2, shape, dtype=torch.int8, generator=device_generator, device="cuda"
        )
        return drawn.bfloat16()

    case = Case(draw(m, k), draw(n_h, k), draw(k, n_h), gated=False, activation="relu")
    y = ff.ff_a16w16_fused(
        case.x, case.w_up, case.w_down, Tile(64, 64, 64), **case.options, y_format="fp32"
    )
    for part in (slice(0, 3), slice(m - 3, m)):
        assert_exact(y[part], replace(case, x=case.x[part]).expected())


@pytest.fixture
def addresses(device, monkeypatch):
    """Collect the addresses that the interpreter reads."""
    if device != "cpu":
        pytest.skip("the interpreter alone tells what it reads")
    addresses = []
    load = InterpreterBuilder.create_masked_load

    def recorded(self, ptrs, mask, *rest):
        addresses.append(torch.from_numpy(ptrs.data[mask.data].astype("int64")))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded)
    return addresses


@every_gate
@pytest.mark.parametrize("past", list(itertools.product([0, 1], repeat=3)), ids=str)
def test_each_element_is_read_and_none_beside_them(gated, past, addresses, generator):
    """The reads that pad a block are dropped again, so that y would not show them."""
    blocks = (SMALL.block_m, SMALL.block_n // 2 if gated else SMALL.block_n, SMALL.block_k)
    sizes = (block + more for block, more in zip(blocks, past, strict=True))
    case = whole(generator, *sizes, gated)
    y = ff.ff_a16w16_fused(case.x, case.w_up, case.w_down, SMALL, gated=gated)
    read = set(torch.cat(addresses).tolist())
    assert y.shape == case.x.shape
    assert read == {
        address
        for tensor in (case.x, case.w_up, case.w_down)
        for address in range(tensor.data_ptr(), tensor.data_ptr() + 2 * tensor.numel(), 2)
    }


@every_gate
def test_a_nan_stays_in_its_token_and_in_its_column(gated, device_generator):
    case = whole(device_generator, 5, 37, 40, gated)
    expected = case.expected()
    case.x[1], expected[1] = math.nan, math.nan
    case.w_down[3], expected[:, 3] = math.nan, math.nan
    y = case.launch(SMALL)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_exact(y.nan_to_num(), expected.nan_to_num())


def test_columns_past_the_last_make_no_nan_of_an_infinity(device):
    x, w_up, w_down = (
        torch.ones(shape, dtype=torch.bfloat16, device=device)
        for shape in ((1, 1), (SMALL.block_n - 1, 1), (1, SMALL.block_n - 1))
    )
    w_up[0] = math.inf
    y = Case(x, w_up, w_down, gated=False, activation=None).launch(SMALL)
    assert y.tolist() == [[math.inf]]


@every_gate
def test_reference_element_by_element(gated, generator):
    case = normal(generator, 2, 3, 4, gated, "silu")
    x, w_up, w_down = (tensor.tolist() for tensor in (case.x, case.w_up, case.w_down))

    def up_projection(i, row):
        return sum(x[i][c] * w_up[row][c] for c in range(4))

    def hidden(i, j):
        gate = up_projection(i, 2 * j if gated else j)
        h = gate / (1 + math.exp(-gate)) * (up_projection(i, 2 * j + 1) if gated else 1)
        return float(torch.tensor(h).bfloat16())

    by_hand = [
        [sum(hidden(i, j) * w_down[c][j] for j in range(3)) for c in range(4)] for i in range(2)
    ]
    torch.testing.assert_close(case.expected(), torch.tensor(by_hand, dtype=torch.float64))


def problem(m: int, n: int, k: int, gated: bool) -> Problem:
    return Problem("test", 1, 1, m, 1, 1, n, k, False, gated, weighted=False, bias=False)


def test_cost_counts_both_products_and_each_tensor_once():
    assert ff.cost(problem(3, 4, 5, gated=True)) == Cost(
        flops=2 * 3 * 4 * 5 + 2 * 3 * 2 * 5, bytes=2 * (3 * 5 + 4 * 5 + 5 * 2 + 3 * 5)
    )
    assert ff.cost(problem(3, 4, 5, gated=False)) == Cost(
        flops=2 * 3 * 4 * 5 + 2 * 3 * 4 * 5, bytes=2 * (3 * 5 + 4 * 5 + 5 * 4 + 3 * 5)
    )


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(ff, "_ff_a16w16_fused_kernel", recorder)
    return recorder


@every_gate
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 4, 5), (9, 64, 64), (9, 40, 64), (9, 64, 40)])
@pytest.mark.parametrize("tile", [SMALL, Tile(64, 64, 16)], ids=str)
def test_the_compiler_is_told_of_the_launch_that_is_made(
    gated, target, m, n, k, tile, generator, recorder
):
    described = ff.source(problem(m, n, k, gated), tile, get(target)).args
    case = whole(generator, m, n // 2 if gated else n, k, gated)
    ff.ff_a16w16_fused(case.x, case.w_up, case.w_down, tile, gated=gated, num_warps=4, num_stages=3)
    launched = recorder.told()
    assert launched.pop("num_warps") == 4
    assert launched.pop("num_stages") == 3
    assert {name: launched[name] for name in described} == described
    assert recorder.grid == (-(-m // tile.block_m) * -(-n // tile.block_n),)


@every_gate
@pytest.mark.parametrize("empty", ["m", "n", "k"])
def test_nothing_to_add_gives_zeros_without_a_launch(empty, gated, recorder):
    m, n_h, k = (size * (name != empty) for name, size in {"m": 3, "n": 20, "k": 40}.items())
    shapes = (m, k), (2 * n_h if gated else n_h, k), (k, n_h)
    y = ff.ff_a16w16_fused(*(torch.ones(s).bfloat16() for s in shapes), SMALL, gated=gated)
    assert torch.equal(y, torch.zeros(m, k).bfloat16())
    assert recorder.arguments is None


@pytest.mark.parametrize("size", ["m", "n"])
def test_only_tensors_beyond_32_bit_offsets_are_indexed_with_64(size):
    sizes = {"m": 64, "n": 64, "k": 2**15} | {size: 2**16 - 32}
    assert not ff.source(problem(**sizes, gated=True), SMALL, get("gfx950")).args["WIDE"]
    sizes[size] = 2**16
    assert ff.source(problem(**sizes, gated=True), SMALL, get("gfx950")).args["WIDE"]


def strided(tensor):
    """The same values and shape, transposed in memory."""
    return tensor.T.contiguous().T


# What is changed, and what the message must say: the argument, what it is, what it should be.
WRONG = {
    "columns of x": (
        lambda a: {"x": a["x"][:, :39].contiguous()},
        ("x has shape [3, 39]", "expected [any, 40]"),
    ),
    "dimensions of x": (
        lambda a: {"x": a["x"][0]},
        ("x has shape [40]", "expected [any, 40]"),
    ),
    "type of x": (
        lambda a: {"x": a["x"].half()},
        ("x is torch.float16", "expected torch.bfloat16"),
    ),
    "layout of x": (
        lambda a: {"x": strided(a["x"])},
        ("x has strides (1, 3)", "contiguous"),
    ),
    "device of x": (
        lambda a: {"x": a["x"].to("meta")},
        ("x is on meta", "expected cpu"),
    ),
    "dimensions of w_up": (
        lambda a: {"w_up": a["w_up"][0]},
        ("w_up has shape [40]", "expected [any, any]"),
    ),
    "odd rows of w_up": (
        lambda a: {"w_up": a["w_up"][:23]},
        ("w_up has n = 23", "n even"),
    ),
    "type of w_up": (
        lambda a: {"w_up": a["w_up"].float()},
        ("w_up is torch.float32", "expected torch.bfloat16"),
    ),
    "layout of w_up": (
        lambda a: {"w_up": strided(a["w_up"])},
        ("w_up has strides (1, 24)", "contiguous"),
    ),
    "rows of w_down": (
        lambda a: {"w_down": a["w_down"][:39]},
        ("w_down has shape [39, 12]", "expected [40, 12]"),
    ),
    "columns of w_down without a gate": (
        lambda a: {"gated": False},
        ("w_down has shape [40, 12]", "expected [40, 24]"),
    ),
    "type of w_down": (
        lambda a: {"w_down": a["w_down"].float()},
        ("w_down is torch.float32", "expected torch.bfloat16"),
    ),
    "layout of w_down": (
        lambda a: {"w_down": strided(a["w_down"])},
        ("w_down has strides (1, 40)", "contiguous"),
    ),
    "device of w_down": (
        lambda a: {"w_down": a["w_down"].to("meta")},
        ("w_down is on meta", "expected cpu"),
    ),
    "activation": (
        lambda a: {"activation": "tanh"},
        ("activation is 'tanh'", "silu, gelu, relu, None"),
    ),
    "type of y": (
        lambda a: {"y_format": "fp8"},
        ("y_format is 'fp8'", "bf16, fp32"),
    ),
}


@pytest.mark.parametrize(("change", "shown"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_shown_before_any_launch(change, shown, generator, recorder):
    case = whole(generator, 3, 12, 40, gated=True)
    right = {"x": case.x, "w_up": case.w_up, "w_down": case.w_down, "tile": SMALL}
    with pytest.raises(ValueError) as error:
        ff.ff_a16w16_fused(**right | change(right))
    for words in shown:
        assert words in str(error.value)
    assert recorder.arguments is None


REFUSED = {
    "tile 48x32x32 has block_m = 48; expected a power of two": (Tile(48, 32, 32), True),
    "tile 16x33x32 has block_n = 33; expected a power of two": (Tile(16, 33, 32), True),
    "tile 16x32x0 has block_k = 0; expected a power of two": (Tile(16, 32, 0), True),
    "tile 16x32x32/2 has split_k = 2; expected 1": (Tile(16, 32, 32, 2), True),
    "tile 16x16x32 has block_n = 16; expected 32 or more with a gate": (Tile(16, 16, 32), True),
    "tile 16x8x32 has block_n = 8; expected 16 or more": (Tile(16, 8, 32), False),
    "tile 16x32x8 has block_k = 8; expected 16 or more": (Tile(16, 32, 8), False),
}


@pytest.mark.parametrize(("shown", "refused"), REFUSED.items())
def test_a_tile_that_the_kernel_cannot_take_is_refused(shown, refused, generator, recorder):
    tile, gated = refused
    case = whole(generator, 3, 12, 40, gated)
    with pytest.raises(ValueError) as error:
        ff.ff_a16w16_fused(case.x, case.w_up, case.w_down, tile, gated=gated)
    assert shown in str(error.value)
    assert recorder.arguments is None
    with pytest.raises(ValueError) as error:
        ff.source(problem(3, 24, 40, gated), tile, get("gfx950"))
    assert shown in str(error.value)
