"""What a launch refuses, and that the compiler is told of the launch that is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_gemm import GPT_OSS, GROUPED, PLAIN, SMALL, Recorder, every_kernel, make, spread

from moelab.kernels import KERNELS, load
from moelab.kernels.formats import shuffle_scales_cdna4
from moelab.problems import Problem
from moelab.specs import Y_FORMATS, Tile
from moelab.targets import get


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
    return {"tile": SMALL, "num_warps": 4, **tensors, **case.layer, **case.own}


def strided(tensor):
    """The same values and shape, transposed in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def other(tensor):
    """Give the same shape in a type that no kernel takes there."""
    return torch.zeros(tensor.shape, dtype=torch.float64)


# What is changed, and what the message must say: the argument, what it is, what it should be.
WRONG = {
    "rows of gathered x": (
        lambda a: {
            "x": torch.cat([a["x"].view(torch.uint8)] * 2).view(a["x"].dtype),
            **({"x_scale": torch.cat([a["x_scale"]] * 2)} if a["x_scale"].dim() > 1 else {}),
        },
        ("x has shape [6, ", "expected [3, "),
    ),
    "rows of sorted x": (
        lambda a: {"gather": False},
        ("x has shape [3, ", "expected [6, "),
    ),
    "dimensions of x": (
        lambda a: {"x": a["x"][0]},
        ("x has shape [", "expected [any, "),
    ),
    "type of x": (
        lambda a: {"x": other(a["x"])},
        ("x is torch.float64", "expected torch."),
    ),
    "other kind of e4m3": (
        lambda a: {"x": torch.zeros(a["x"].shape).to(torch.float8_e4m3fnuz)},
        ("x is torch.float8_e4m3fnuz", "expected torch."),
    ),
    "layout of x": (
        lambda a: {"x": strided(a["x"])},
        ("x has strides (1, 3)", "contiguous"),
    ),
    "format of y": (
        lambda a: {"y_format": "fp16"},
        ("y_format is 'fp16'", "bf16, fp32, fp8, mxfp8"),
    ),
    "no static scale of an fp8 y": (
        lambda a: {"y_format": "fp8"},
        ("y_format is 'fp8' and y_scale missing", "static scale [1]"),
    ),
    "a static scale of a bf16 y": (
        lambda a: {"y_scale": torch.ones(1)},
        ("y_format is 'bf16' and y_scale given", "the other formats none"),
    ),
    "shape of y_scale": (
        lambda a: {"y_format": "fp8", "y_scale": torch.ones(3)},
        ("y_scale has shape [3]", "expected [1]"),
    ),
    "type of the gather index": (
        lambda a: {"routing": replace(a["routing"], gather_index=a["routing"].gather_index.long())},
        ("routing.gather_index is torch.int64", "torch.int32"),
    ),
    "size of the scatter index": (
        lambda a: {
            "routing": replace(a["routing"], scatter_index=a["routing"].scatter_index[:4]),
        },
        ("routing.scatter_index has shape [4]", "expected [6]"),
    ),
    "type of the routing weight": (
        lambda a: {"routing": replace(a["routing"], weight=a["routing"].weight.half())},
        ("routing.weight is torch.float16", "torch.float32"),
    ),
    "type of the tiles' experts": (
        lambda a: {"routing": replace(a["routing"], tile_expert=a["routing"].tile_expert.long())},
        ("routing.tile_expert is torch.int64", "torch.int32"),
    ),
    "slots of the routing": (
        lambda a: {"routing": replace(a["routing"], top_k=4)},
        ("routing.top_k is 4", "6 rows"),
    ),
    "something else than a routing": (
        lambda a: {"routing": None},
        ("routing is a NoneType", "expected a Routing"),
    ),
    "something else than an activation": (
        lambda a: {"swiglu": True},
        ("swiglu is True", "expected a SwiGLU"),
    ),
    "something else than a tile": (
        lambda a: {"tile": "16x32x64"},
        ("tile is '16x32x64'", "expected a Tile"),
    ),
    "something else than a tensor": (
        lambda a: {"x_scale": 1.0},
        ("x_scale is a float", "expected a torch.Tensor"),
    ),
    "warps": (
        lambda a: {"num_warps": 3},
        ("num_warps is 3", "1, 2, 4, 8, 16, 32"),
    ),
    "stages": (
        lambda a: {"num_stages": 0},
        ("num_stages is 0", "1 or more"),
    ),
    "device of x": (
        lambda a: {"x": a["x"].to("meta")},
        ("x is on meta", "expected cpu, where the weight is"),
    ),
    "dimensions of w": (
        lambda a: {"w": a["w"][0]},
        ("w has shape [40, ", "expected [any, any, "),
    ),
    "type of w": (
        lambda a: {"w": other(a["w"])},
        ("w is torch.float64", "expected torch."),
    ),
    "layout of w": (
        lambda a: {"w": strided(a["w"])},
        ("w has strides", "contiguous"),
    ),
    "device of w": (
        lambda a: {"w": a["w"].to("meta")},
        ("is on cpu", "expected meta, where the weight is"),
    ),
    "shape of x_scale": (
        lambda a: {"x_scale": torch.ones(5, dtype=a["x_scale"].dtype)},
        ("x_scale has shape [5]", "expected ["),
    ),
    "type of x_scale": (
        lambda a: {"x_scale": other(a["x_scale"])},
        ("x_scale is torch.float64", "expected torch."),
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
        ("bias is on meta", "expected cpu, where the weight is"),
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
    "blocks of the tile": (
        lambda a: {"tile": Tile(16, 48, 64)},
        ("tile 16x48x64 has block_n = 48", "a power of two"),
    ),
    "step of the tile": (
        lambda a: {"tile": Tile(16, 32, 16)},
        ("tile 16x32x16 has block_k = 16", "32 or more"),
    ),
    "a shared reduction": (
        lambda a: {"tile": Tile(16, 32, 64, split_k=2)},
        ("tile 16x32x64/2 has split_k = 2", "expected 1"),
    ),
    "half a group of mxfp8": (
        lambda a: {"y_format": "mxfp8"},
        ("tile 16x32x64 has block_n = 32", "64 or more"),
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
    with pytest.raises(ValueError, match=r"w has n = 41; .* n even"):
        getattr(load(kernel), kernel)(**wrong)
    assert recorder.arguments is None
    getattr(load(kernel), kernel)(**wrong | {"swiglu": None})
    assert recorder.arguments is not None


@pytest.mark.parametrize(
    ("kernel", "shown"),
    [
        ("moe_gemm_a8w8", ("x has shape [3, 97]", "expected [any, 64]")),
        ("moe_gemm_a8w8_blockscale", ("x has shape [3, 97]", "expected [any, 64]")),
        # k is x's: half a byte of w may stand for nothing.
        ("moe_gemm_a8w4", ("w has shape [4, 40, 32]", "expected [any, any, 49]")),
        ("moe_gemm_a4w4", ("k is 64; x has 97 bytes a row", "194 elements")),
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
    y = case.run(SMALL)
    assert y.shape == (0, 40)
    assert recorder.grid is None


def told_and_launched(kernel, target, of, recorder, generator, **options):
    """Give what the compiler is told of a problem, and what its launch passes."""
    fp8 = torch.float8_e4m3fnuz if target.fp8 == "fp8e4b8" else torch.float8_e4m3fn
    tile = Tile(16, 64, 64) if of.scale_layout == "rows" else Tile(16, 64, 256)
    case = make(
        kernel,
        generator,
        spread(generator, of.m, of.experts, of.top_k),
        tile,
        experts=of.experts,
        n=of.n,
        k=of.k,
        gather=of.gather,
        bias=of.bias,
        weighted=of.weighted,
        scatter=of.scatter,
        swiglu=PLAIN if of.swiglu else None,
        # dot_scaled takes the OCP kind alone.
        fp8=torch.float8_e4m3fn if kernel == "moe_gemm_a8w4" else fp8,
        x_format=of.x_format,
        scale_layout=of.scale_layout if of.scale_layout == "cdna4" else None,
    )
    module = load(kernel)
    # Looked up before the launch, which the recorder then takes.
    described = module.source(of, tile, target).args
    of_y = {"y_scale": torch.ones(1)} if of.y_format == "fp8" else {}
    launch = {"num_warps": 4, "num_stages": 3, "num_xcds": target.xcds}
    case.run(tile, y_format=of.y_format, **launch, **of_y)
    launched = recorder.told()
    assert launched.pop("num_warps") == 4
    assert launched.pop("num_stages") == 3
    return described, {name: launched[name] for name in described}


@every_kernel
@pytest.mark.parametrize("target", ["gfx942", "gfx950", "sm_90"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("k", [64, 96, 45])
def test_the_compiler_is_told_of_the_launch_that_is_made(
    kernel, target, bias, layer, k, generator, recorder
):
    first = layer == 1
    of = Problem("test", layer, 1, 9, 4, 2, 40, k, first, first, not first, bias, not first)
    told, launched = told_and_launched(kernel, get(target), of, recorder, generator)
    assert launched == told


FORMATS = {
    **{f"y in {y}": (kernel, {"y_format": y}) for kernel in GROUPED for y in Y_FORMATS},
    "x in mxfp8": ("moe_gemm_a8w4", {"x_format": "mxfp8"}),
    "a8w4, scales for cdna4": ("moe_gemm_a8w4", {"scale_layout": "cdna4"}),
    "a4w4, scales for cdna4": ("moe_gemm_a4w4", {"scale_layout": "cdna4"}),
}


@pytest.mark.parametrize(("kernel", "formats"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_the_compiler_is_told_of_the_formats_that_are_launched(
    kernel, formats, target, generator, recorder
):
    of = replace(Problem("test", 1, 1, 9, 4, 2, 40, 90, True, True, False), **formats)
    told, launched = told_and_launched(kernel, get(target), of, recorder, generator)
    assert launched == told


@every_kernel
@pytest.mark.parametrize("wide", ["x", "w", "y"])
def test_offsets_are_64_bit_where_a_tensor_has_2_31_elements(kernel, wide):
    """At one element less they are 32-bit: AMD's buffer loads take no others."""
    of = Problem("test", 1, 1, 2**10, 4, 1, 64, 2**10, True, False, False)
    of = {"x": replace(of, m=2**21), "w": replace(of, n=2**21), "y": replace(of, n=2**21)}[wide]
    if wide == "y":
        of = replace(of, k=32)
    if kernel == "moe_gemm_a4w4" and wide == "x":
        of = replace(of, m=2**22)
    if kernel in ("moe_gemm_a8w4", "moe_gemm_a4w4") and wide == "w":
        of = replace(of, n=2**22, m=1)
    source = load(kernel).source
    assert source(of, SMALL, get("gfx950")).args["WIDE"]
    grown = "m" if wide == "x" else "n"
    less = replace(of, **{grown: getattr(of, grown) - 1})
    assert not source(less, SMALL, get("gfx950")).args["WIDE"]


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
    case.run(SMALL)
    assert recorder.grid == (4 * 2,)


def test_an_unknown_kernel_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'moe_gemm'.*moe_gemm_a8w8, moe_gemm_a8w8_blockscale"):
        load("moe_gemm")


REFUSED = {
    "a step across two scales": (
        "moe_gemm_a8w8_blockscale",
        {"tile": Tile(16, 64, 256)},
        ("tile 16x64x256 has block_k = 256", "128 or less"),
    ),
    "cdna4 scales of fewer than 32 columns": (
        "moe_gemm_a4w4",
        {"tile": Tile(16, 16, 256), "scale_layout": "cdna4"},
        ("tile 16x16x256 has block_n = 16", "32 or more"),
    ),
    "cdna4 scales of half a block of k": (
        "moe_gemm_a8w4",
        {"tile": Tile(16, 32, 128), "scale_layout": "cdna4"},
        ("tile 16x32x128 has block_k = 128", "256 or more"),
    ),
    "a layout that nobody knows": (
        "moe_gemm_a8w4",
        {"tile": Tile(16, 32, 256), "scale_layout": "cdna3"},
        ("scale_layout is 'cdna3'", "rows, cdna4"),
    ),
}


@pytest.mark.parametrize(("kernel", "given", "shown"), REFUSED.values(), ids=REFUSED)
def test_what_one_kernel_alone_refuses_is_shown(kernel, given, shown, generator, recorder):
    given = dict(given)
    problem = Problem("test", 1, 1, 3, 4, 2, 40, 256, True, True, False)
    told = replace(problem, scale_layout=given.get("scale_layout", "rows"))
    with pytest.raises(ValueError) as described:
        load(kernel).source(told, given["tile"], get("gfx950"))
    case = arguments(kernel, generator, k=256)
    if given.get("scale_layout") == "cdna4":
        case["w_scale"] = shuffle_scales_cdna4(case["w_scale"])
    with pytest.raises(ValueError) as launched:
        getattr(load(kernel), kernel)(**case | given)
    for words in shown:
        assert words in str(described.value)
        assert words in str(launched.value)
    assert recorder.arguments is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_format_that_a_kernel_does_not_take_is_shown(kernel):
    problem = Problem("test", 1, 1, 3, 1, 1, 64, 256, False, False, False, n_bf16=32)
    wrong = {"x_format": "mxfp4", "y_format": "fp16", "scale_layout": "cdna3"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is '{value}'; expected "):
            load(kernel).source(replace(problem, **{name: value}), SMALL, get("gfx950"))
