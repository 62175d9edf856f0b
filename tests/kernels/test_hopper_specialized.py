"""Hopper's specialized kernel: what it gives, what it loads, what it refuses.

Triton's interpreter runs no Gluon, so the kernel is launched on a GPU alone.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

import pytest
import test_moe_gemm
import torch
from allpairspy import AllPairs
from grouped_gemm import GPT_OSS, PLAIN, Recorder, counted, make, spread
from test_loaded_lds import Spy

from moelab import compiler
from moelab.kernels import hopper_specialized, load
from moelab.problems import LAYERS, problem
from moelab.specs import Configuration, Problem, Tile
from moelab.targets import get

MODELS = {"moe_gemm_a8w8": "Qwen3-235B-A22B", "moe_gemm_a8w8_blockscale": "DeepSeek-R1"}
TILE = Tile.parse("128x256x128+specialized")
# Experts with no row, one, either half of a tile, just more, whole tiles, and what is left.
COUNTS = (0, 1, 16, 17, 0, 64, 100, 128, 129, 300)

every_kernel = pytest.mark.parametrize("kernel", MODELS)


@pytest.fixture
def hopper(device):
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("hopper")(test))


def drawn(kernel, generator, expert, **shape):
    return make(kernel, generator, expert, TILE, **shape)


def launched(case, tile=TILE, **options):
    return case.launch(tile, **{"num_warps": 4} | options)


@on_hopper
@every_kernel
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "scattered"])
@pytest.mark.parametrize("k", [128, 256, 1152])
@pytest.mark.parametrize("n", [256, 72, 328, 2048])
def test_any_number_of_rows_matches_the_reference(kernel, gather, n, k, device_generator):
    case = drawn(
        kernel,
        device_generator,
        counted(device_generator, COUNTS),
        experts=len(COUNTS),
        n=n,
        k=k,
        gather=gather,
        scatter=not gather,
        weighted=not gather,
        bias=gather,
        swiglu=PLAIN if gather else None,
    )
    case.check(launched(case))


OPTIONS = test_moe_gemm.OPTIONS | {
    "y_format": ["fp32", "bf16"],
    "num_stages": [4, 3, 2, 1],
    "group_m": [4, 1, 8],
}


def pairs():
    for kernel in MODELS:
        for values in AllPairs(list(OPTIONS.values())):
            row = dict(zip(OPTIONS, values, strict=True))
            yield pytest.param(kernel, row, id=f"{kernel} {' '.join(map(str, values))}")


@on_hopper
@pytest.mark.parametrize(("kernel", "row"), list(pairs()))
def test_options_work_together_in_pairs(kernel, row, device_generator, monkeypatch):
    row = dict(row)
    options = {name: row.pop(name) for name in ("y_format", "num_xcds", "num_stages")}
    if row.pop("wide"):
        monkeypatch.setattr("moelab.kernels.grouped_gemm.WIDE_ELEMENTS", 1)
    tile = replace(TILE, group_m=row.pop("group_m"))
    expert = spread(device_generator, m=400, experts=3, top_k=2)
    case = drawn(kernel, device_generator, expert, experts=3, n=264, k=640, **row)
    case.check(launched(case, tile, **options))


@on_hopper
@every_kernel
def test_empty_expert_leaves_its_neighbours_unchanged(kernel, device_generator):
    expert = counted(device_generator, (3, 0, 4))
    case = drawn(kernel, device_generator, expert, experts=3, n=328, k=256, bias=True)
    for tensor in (case.w, case.w_scale, case.bias):
        tensor[1:2].view(torch.uint8).fill_(0xFF)
    case.check(launched(case))


@on_hopper
@every_kernel
@pytest.mark.parametrize("gather", [True, False])
def test_no_tokens_give_an_empty_result(kernel, gather, device_generator):
    expert = spread(device_generator, m=0, experts=4, top_k=2)
    case = drawn(kernel, device_generator, expert, experts=4, n=40, k=128, gather=gather)
    assert launched(case).shape == (0, 40)


@on_hopper
@every_kernel
@pytest.mark.parametrize("swiglu", [None, PLAIN, GPT_OSS], ids=["linear", "plain", "GPT-OSS"])
def test_a_nan_is_never_stored_as_a_number(kernel, swiglu, device_generator):
    expert = spread(device_generator, m=5, experts=2, top_k=1)
    case = drawn(kernel, device_generator, expert, experts=2, n=64, k=128, swiglu=swiglu)
    bias = torch.zeros(2, 64, device=expert.device)
    bias[1, :2] = float("nan")
    y = replace(case, bias=bias).run(TILE, num_warps=4)
    of_second = torch.arange(5, device=expert.device) >= case.routing.expert_end[0]
    assert y[of_second, 0].isnan().all()
    assert not y[~of_second].isnan().any()


@on_hopper
@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_at_full_size(kernel, layer, device_generator):
    """Many tiles for each program: stages and turns go on from tile to tile."""
    full = problem(MODELS[kernel], layer, tp=4, m=2048)
    case = drawn(
        kernel,
        device_generator,
        spread(device_generator, full.m, full.experts, full.top_k),
        experts=full.experts,
        n=full.n,
        k=full.k,
        gather=full.gather,
        weighted=full.weighted,
        scatter=full.scatter,
        bias=full.bias,
        swiglu=PLAIN if full.swiglu else None,
    )
    y = launched(case)
    case.check(y)
    assert torch.equal(launched(case), y)


@on_hopper
@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
def test_the_gpu_loads_the_lds_that_was_told(
    kernel, layer, num_stages, device_generator, monkeypatch
):
    from triton.runtime.errors import OutOfResources

    of = replace(problem(MODELS[kernel], layer, tp=1, m=64), experts=8, n=512, k=512)
    told = compiler.lds(
        compiler.specialize(Configuration(kernel, of, TILE, 4, num_stages, None, "sm_90"))
    )
    spy = Spy(hopper_specialized._hopper_specialized_kernel)
    monkeypatch.setattr(hopper_specialized, "_hopper_specialized_kernel", spy)
    case = drawn(
        kernel,
        device_generator,
        spread(device_generator, of.m, of.experts, of.top_k),
        experts=of.experts,
        n=of.n,
        k=of.k,
        gather=of.gather,
        weighted=of.weighted,
        scatter=of.scatter,
        bias=of.bias,
        swiglu=PLAIN if of.swiglu else None,
    )
    if num_stages < 5:
        case.run(TILE, num_warps=4, num_stages=num_stages)
        assert spy.loaded.metadata.shared == told.lds_bytes
    else:
        with pytest.raises(OutOfResources, match=f"Required: {told.lds_bytes}"):
            case.run(TILE, num_warps=4, num_stages=num_stages)


@pytest.fixture
def recorder(monkeypatch):
    """Launch nothing, on any device; keep what would have been launched."""
    recorder = Recorder()
    monkeypatch.setattr(hopper_specialized, "_hopper_specialized_kernel", recorder)
    monkeypatch.setattr(hopper_specialized, "target_name", lambda device: "sm_90")
    return recorder


def comparable(arguments):
    """Take descriptors apart: each is equal to itself alone."""
    parts = attrgetter("base.shape", "shape", "strides", "block_shape", "layout", "padding")
    return {
        name: parts(value) if hasattr(value, "block_shape") else value
        for name, value in arguments.items()
    }


@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("y_format", ["bf16", "fp32"])
def test_the_compiler_is_told_of_the_launch_that_is_made(
    kernel, layer, y_format, generator, recorder
):
    first, tile = layer == 1, replace(TILE, group_m=2)
    of = Problem("test", layer, 1, 9, 4, 2, 48, 256, first, first, not first, True, not first)
    told = load(kernel).source(replace(of, y_format=y_format), tile, get("sm_90")).args
    case = drawn(
        kernel,
        generator,
        spread(generator, of.m, of.experts, of.top_k),
        experts=of.experts,
        n=of.n,
        k=of.k,
        gather=of.gather,
        bias=of.bias,
        weighted=of.weighted,
        scatter=of.scatter,
        swiglu=PLAIN if of.swiglu else None,
    )
    case.run(tile, num_stages=3, y_format=y_format)
    launched = recorder.told()
    assert (launched["num_warps"], launched["num_stages"], launched["NUM_STAGES"]) == (4, 3, 3)
    assert comparable({name: launched[name] for name in told}) == comparable(told)


@every_kernel
@pytest.mark.parametrize(
    ("tile", "k", "words"),
    [
        ("64x256x128+specialized", 256, "block_m = 64; expected 128"),
        ("128x128x128+specialized", 256, "block_n = 128; expected 256"),
        ("128x256x64+specialized", 256, "block_k = 64; expected 128"),
        ("128x256x128+specialized", 200, "expected none: k is 200, no multiple of 128"),
        (
            "128x256x128+tma+specialized",
            256,
            "tma = True; expected none: a specialized tile has ways of its own",
        ),
        ("128x256x128+tails1+specialized", 256, "tails = 1; expected none"),
        (
            "128x256x128+persistent+specialized",
            256,
            "persistent = True; expected none: a specialized",
        ),
    ],
)
def test_a_tile_that_cannot_be_computed_is_refused_by_name(
    kernel, tile, k, words, generator, recorder
):
    tile = Tile.parse(tile)
    of = Problem("test", 1, 1, 3, 2, 1, 64, k, True, False, False)
    with pytest.raises(ValueError, match=words):
        load(kernel).source(of, tile, get("sm_90"))
    case = drawn(kernel, generator, counted(generator, (1, 2)), experts=2, n=64, k=k)
    with pytest.raises(ValueError, match=words):
        case.run(tile)
    assert recorder.arguments is None


@every_kernel
@pytest.mark.parametrize("y_format", ["fp8", "mxfp8"])
def test_a_quantized_y_is_refused_by_name(kernel, y_format, generator, recorder):
    words = f"y_format of a specialized tile is '{y_format}'; expected one of bf16, fp32"
    of = Problem("test", 1, 1, 3, 2, 1, 64, 128, True, False, False, y_format=y_format)
    with pytest.raises(ValueError, match=words):
        load(kernel).source(of, TILE, get("sm_90"))
    case = drawn(kernel, generator, counted(generator, (1, 2)), experts=2, n=64, k=128)
    with pytest.raises(ValueError, match=words):
        case.run(TILE, y_format=y_format)


def test_fast_sums_are_refused_by_name(generator, recorder):
    words = "fast_accum is True; expected False where the tile is specialized"
    of = Problem("test", 1, 1, 3, 2, 1, 64, 128, True, False, False, fast_accum=True)
    with pytest.raises(ValueError, match=words):
        load("moe_gemm_a8w8").source(of, TILE, get("sm_90"))
    case = drawn("moe_gemm_a8w8", generator, counted(generator, (1, 2)), experts=2, n=64, k=128)
    with pytest.raises(ValueError, match=words):
        case.run(TILE, fast_accum=True)


@every_kernel
def test_other_warps_and_other_fp8_are_refused_by_name(kernel, generator, recorder):
    case = drawn(kernel, generator, counted(generator, (1, 2)), experts=2, n=64, k=128)
    with pytest.raises(ValueError, match="num_warps is 8; expected 4"):
        case.run(TILE, num_warps=8)
    fnuz = {name: getattr(case, name).view(torch.float8_e4m3fnuz) for name in ("x", "w")}
    with pytest.raises(ValueError, match=r"e4m3fnuz; expected torch\.float8_e4m3fn"):
        replace(case, **fnuz).run(TILE)
    assert recorder.arguments is None


@every_kernel
def test_stages_left_out_are_four_and_none_at_all_is_refused(kernel, generator, recorder):
    case = drawn(kernel, generator, counted(generator, (1, 2)), experts=2, n=64, k=128)
    with pytest.raises(ValueError, match="num_stages is 0; expected 1 or more"):
        case.run(TILE, num_stages=0)
    assert recorder.arguments is None
    for given in ({}, {"num_stages": None}):
        case.run(TILE, **given)
        assert recorder.arguments["num_stages"] == recorder.arguments["NUM_STAGES"] == 4


@every_kernel
@pytest.mark.parametrize("target", ["gfx950", "sm_89", "sm_100"])
def test_other_targets_are_refused_by_name(kernel, target):
    of = Problem("test", 1, 1, 3, 2, 1, 64, 128, True, False, False)
    with pytest.raises(ValueError, match=f"it is for sm_90 alone, not {target}"):
        load(kernel).source(of, TILE, get(target))


@every_kernel
def test_a_cpu_is_refused_by_name(kernel, generator):
    case = drawn(kernel, generator, counted(generator, (1, 2)), experts=2, n=64, k=128)
    with pytest.raises(ValueError, match="it is for sm_90 alone, not a CPU"):
        case.run(TILE)


@pytest.mark.parametrize("kernel", ["moe_gemm_a4w4", "moe_gemm_a8w4"])
def test_a_kernel_without_the_way_says_so(kernel):
    of = problem("GPT-OSS 120B", layer=1, tp=1, m=512)
    with pytest.raises(ValueError, match="has specialized = True; expected none: this kernel"):
        load(kernel).source(of, TILE, get("sm_90"))
