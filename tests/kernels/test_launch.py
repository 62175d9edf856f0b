"""What a launch refuses, and that the compiler is told of the launch that is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_gemm import GPT_OSS, PLAIN, SMALL, every_kernel, make, spread

from moelab.kernels import load
from moelab.problems import Problem
from moelab.specs import TensorSpec, Tile
from moelab.targets import get


class Recorder:
    """Stand in for a kernel: keep what it was launched with."""

    def __init__(self):
        self.grid = self.arguments = None

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, **arguments):
        self.arguments = arguments


@pytest.fixture
def recorder(kernel, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(load(kernel), f"_{kernel}_kernel", recorder)
    return recorder


def arguments(kernel, generator, **options):
    """Everything that a launcher takes, by name, and fitting: 3 tokens, n 40, k 64."""
    expert = spread(generator, m=3, experts=4, top_k=2)
    options = {"n": 40, "k": 64, "bias": True, "swiglu": PLAIN} | options
    case = make(kernel, generator, expert, SMALL, experts=4, **options)
    tensors = {name: getattr(case, name) for name in ("x", "w", "x_scale", "w_scale", "routing")}
    return {"tile": SMALL, "num_warps": 4, **tensors, **case.options}


def strided(tensor):
    """The same values and shape, transposed in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


X = "float8_e4m3fn"
# What is changed, and what the message must say: the argument, what it is, what it should be.
WRONG = {
    "rows of gathered x": (
        lambda a: {"x": torch.zeros(6, 64).to(a["x"].dtype)},
        ("x has shape [6, 64]", "expected [3, 64]"),
    ),
    "rows of sorted x": (
        lambda a: {"gather": False},
        ("x has shape [3, 64]", "expected [6, 64]"),
    ),
    "dimensions of x": (
        lambda a: {"x": a["x"][0]},
        ("x has shape [64]", "expected [3, 64]"),
    ),
    "type of x": (
        lambda a: {"x": a["x"].bfloat16()},
        ("x is torch.bfloat16", f"expected torch.{X}"),
    ),
    "other kind of e4m3": (
        lambda a: {"x": a["x"].float().to(torch.float8_e4m3fnuz)},
        ("x is torch.float8_e4m3fnuz", f"expected torch.{X}"),
    ),
    "layout of x": (
        lambda a: {"x": strided(a["x"])},
        ("x has strides (1, 3)", "contiguous"),
    ),
    "type of y": (
        lambda a: {"out_dtype": torch.float16},
        ("out_dtype is torch.float16", "torch.bfloat16 or torch.float32"),
    ),
    "type of the row index": (
        lambda a: {"routing": replace(a["routing"], row_index=a["routing"].row_index.long())},
        ("routing.row_index is torch.int64", "torch.int32"),
    ),
    "device of x": (
        lambda a: {"x": a["x"].to("meta")},
        ("x is on meta", "w is on cpu"),
    ),
    "dimensions of w": (
        lambda a: {"w": a["w"][0]},
        ("w has shape [40, ", "expected [any, any, "),
    ),
    "type of w": (
        lambda a: {"w": a["w"].float()},
        ("w is torch.float32", "expected torch."),
    ),
    "layout of w": (
        lambda a: {"w": strided(a["w"])},
        ("w has strides", "contiguous"),
    ),
    "device of w": (
        lambda a: {"w": a["w"].to("meta")},
        ("is on cpu", "w is on meta"),
    ),
    "shape of x_scale": (
        lambda a: {"x_scale": torch.ones(3)},
        ("x_scale has shape [3]", "expected [1]"),
    ),
    "type of x_scale": (
        lambda a: {"x_scale": torch.ones(1, dtype=torch.float64)},
        ("x_scale is torch.float64", "expected torch.float32"),
    ),
    "shape of w_scale": (
        lambda a: {"w_scale": a["w_scale"][:3]},
        ("w_scale has shape [3", "expected [4"),
    ),
    "type of w_scale": (
        lambda a: {"w_scale": a["w_scale"].double()},
        ("w_scale is torch.float64", "expected torch."),
    ),
    "shape of bias": (
        lambda a: {"bias": a["bias"][:, :20].contiguous()},
        ("bias has shape [4, 20]", "expected [4, 40]"),
    ),
    "type of bias": (
        lambda a: {"bias": a["bias"].bfloat16()},
        ("bias is torch.bfloat16", "expected torch.float32"),
    ),
    "layout of bias": (
        lambda a: {"bias": strided(a["bias"])},
        ("bias has strides (1, 4)", "contiguous"),
    ),
    "device of bias": (
        lambda a: {"bias": a["bias"].to("meta")},
        ("bias is on meta", "w is on cpu"),
    ),
    "experts of the routing": (
        lambda a: {"routing": replace(a["routing"], expert_end=torch.zeros(5, dtype=torch.int32))},
        ("routing.expert_end has shape [5]", "expected [4]"),
    ),
    "type of the routing": (
        lambda a: {
            "routing": replace(a["routing"], expert_end=a["routing"].expert_end.long()),
        },
        ("routing.expert_end is torch.int64", "expected torch.int32"),
    ),
    "block_m of the tile": (
        lambda a: {"tile": Tile(32, 32, 64)},
        ("32x32x64", "block_m = 32", "block_m = 16"),
    ),
}


@every_kernel
@pytest.mark.parametrize(("change", "shown"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_shown_before_any_launch(kernel, change, shown, generator, recorder):
    right = arguments(kernel, generator)
    with pytest.raises(ValueError) as error:
        getattr(load(kernel), kernel)(**right | change(right))
    for words in shown:
        assert words in str(error.value)
    assert recorder.arguments is None


@every_kernel
def test_swiglu_of_an_odd_n_is_refused(kernel, generator, recorder):
    wrong = arguments(kernel, generator, n=41)
    with pytest.raises(ValueError, match=r"n = 41; SwiGLU .* n even"):
        getattr(load(kernel), kernel)(**wrong)
    assert recorder.arguments is None
    getattr(load(kernel), kernel)(**wrong | {"swiglu": None})
    assert recorder.arguments is not None


@pytest.mark.parametrize(
    ("kernel", "shown"),
    [
        ("moe_gemm_a8w8", ("x has shape [3, 97]", "expected [3, 64]")),
        # k is x's: half a byte of w may stand for nothing.
        ("moe_gemm_a8w4", ("w has shape [4, 40, 32]", "expected [any, any, 49]")),
    ],
)
def test_x_and_w_of_different_k_are_shown(kernel, shown, generator, recorder):
    right = arguments(kernel, generator)
    with pytest.raises(ValueError) as error:
        getattr(load(kernel), kernel)(**right | {"x": torch.zeros(3, 97).to(right["x"].dtype)})
    for words in shown:
        assert words in str(error.value)
    assert recorder.arguments is None


@every_kernel
def test_no_rows_launch_nothing(kernel, generator, recorder):
    expert = spread(generator, m=0, experts=4, top_k=2)
    case = make(kernel, generator, expert, SMALL, experts=4, n=40, k=64)
    y = getattr(load(kernel), kernel)(
        case.x, case.w, case.x_scale, case.w_scale, case.routing, SMALL
    )
    assert y.shape == (0, 40)
    assert recorder.grid is None


DTYPES = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.uint8: "u8",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.float32: "fp32",
}


@every_kernel
@pytest.mark.parametrize("target", ["gfx942", "gfx950", "sm_90"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("k", [64, 96, 45])
def test_the_compiler_is_told_of_the_launch_that_is_made(
    kernel, target, bias, layer, k, generator, recorder
):
    target = get(target)
    first = layer == 1
    expert = spread(generator, m=9, experts=4, top_k=2)
    fp8 = torch.float8_e4m3fnuz if target.fp8 == "fp8e4b8" else torch.float8_e4m3fn
    case = make(
        kernel,
        generator,
        expert,
        SMALL,
        experts=4,
        n=40,
        k=k,
        gather=first,
        bias=bias,
        weighted=not first,
        swiglu=PLAIN if first else None,
        # dot_scaled takes the OCP kind alone.
        fp8=torch.float8_e4m3fn if kernel == "moe_gemm_a8w4" else fp8,
    )
    of = Problem("test", layer, 1, 9, 4, 2, 40, k, first, first, weighted=not first, bias=bias)
    module = load(kernel)
    # Looked up before the launch, which the recorder then takes.
    described = module.source(of, SMALL, target).args
    case.run(SMALL, num_warps=4, num_stages=3, num_xcds=target.xcds)
    launched = {
        name: TensorSpec(tuple(value.shape), DTYPES[value.dtype])
        if isinstance(value, torch.Tensor)
        else value
        for name, value in recorder.arguments.items()
    }
    assert launched.pop("num_warps") == 4
    assert launched.pop("num_stages") == 3
    assert {name: launched[name] for name in described} == described


@every_kernel
def test_the_activation_reaches_the_kernel(kernel, generator, recorder):
    getattr(load(kernel), kernel)(**arguments(kernel, generator, swiglu=GPT_OSS))
    assert recorder.arguments["SWIGLU"] is True
    got = [recorder.arguments[name] for name in ("alpha", "limit", "shift")]
    assert got == [1.702, 7.0, 1.0]


@every_kernel
def test_the_grid_has_room_for_the_worst_routing(kernel, generator, recorder):
    """9 tokens to 2 of 4 experts: 4 tiles of 16 rows at most; n = 40 has 2 blocks."""
    expert = spread(generator, m=9, experts=4, top_k=2)
    case = make(kernel, generator, expert, SMALL, experts=4, n=40, k=64)
    getattr(load(kernel), kernel)(case.x, case.w, case.x_scale, case.w_scale, case.routing, SMALL)
    assert recorder.grid == (4 * 2,)


def test_an_unknown_kernel_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'moe_gemm'.*moe_gemm_a8w8, moe_gemm_a8w4"):
        load("moe_gemm")


@every_kernel
def test_offsets_beyond_32_bits_are_refused(kernel, generator):
    """No such tensor is made: meta tensors have a size and no memory."""
    given = arguments(kernel, generator, swiglu=None, bias=False)
    k, experts, rows = 2**16, 4, 2**16
    sizes = {
        "x": (rows, k),
        "w": (experts, 40, k if given["w"].dtype != torch.uint8 else k // 2),
    }
    if given["w"].dtype == torch.uint8:
        sizes["w_scale"] = (experts, 40, k // 32)
    for name, size in sizes.items():
        given[name] = torch.empty(size, dtype=given[name].dtype, device="meta")
    meta = {
        field: torch.empty(size, dtype=torch.int32, device="meta")
        for field, size in (
            ("row_index", rows),
            ("expert_end", experts),
            ("tile_count", 1),
            ("tile_expert", 5),
            ("tile_row", 5),
        )
    }
    given["routing"] = replace(given["routing"], top_k=1, **meta)
    for name in ("x_scale", "w_scale"):
        given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=r"x has 4,294,967,296 elements .* 2,147,483,648"):
        getattr(load(kernel), kernel)(**given)
