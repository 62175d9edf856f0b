"""Hopper's own mxfp4 kernel: what every MoE GEMM promises, and how it reads x and w.

Triton's interpreter runs no Gluon, so the kernel is launched on a GPU alone; what makes x
ready, and what is refused, is tested anywhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_moe_gemm
import torch
import triton
from allpairspy import AllPairs
from grouped_gemm import (
    GPT_OSS,
    PLAIN,
    Case,
    Recorder,
    assert_close,
    counted,
    make,
    spread,
)
from test_loaded_lds import Spy

from moelab import compiler
from moelab.kernels import hopper_weights, load, mxfp4_hopper
from moelab.kernels.formats import dequantize_mxfp4, dequantize_mxfp8, quantize_mxfp8
from moelab.kernels.router import route
from moelab.problems import LAYERS, problem
from moelab.specs import Configuration, Problem, Tile
from moelab.targets import get

KERNELS = ("moe_gemm_a8w4", "moe_gemm_a4w4")
TILES = {"16x64x128": 4, "128x128x128": 8, "256x128x128+tails2": 8}
# Warps that a tile is launched with.
WARPS = {Tile.parse(tile): num_warps for tile, num_warps in TILES.items()}

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_tile = pytest.mark.parametrize("tile", WARPS, ids=str)


@pytest.fixture
def hopper(device):
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("hopper")(test))


def drawn(kernel, generator, expert, tile, **shape) -> Case:
    return make(kernel, generator, expert, tile, scale_layout="hopper", **shape)


def launched(case, tile, **options):
    return case.launch(tile, **{"num_warps": WARPS.get(tile, 4)} | options)


@on_hopper
@every_kernel
@every_tile
@pytest.mark.parametrize(
    "counts", test_moe_gemm.DISTRIBUTIONS.values(), ids=test_moe_gemm.DISTRIBUTIONS
)
def test_any_distribution_of_tokens_matches_the_reference(kernel, tile, counts, device_generator):
    expert = counted(device_generator, counts(tile.block_m))
    case = drawn(kernel, device_generator, expert, tile, experts=3, n=tile.block_n, k=128)
    case.check(launched(case, tile))


# (m, n, k) by tile, where one of them does not fill its last block.
SHAPES = {
    "one token": lambda t: (1, t.block_n, 128),
    "odd m": lambda t: (t.block_m - 3, t.block_n, 256),
    "n below one block": lambda t: (4, t.block_n - 48, 128),
    "n past a block": lambda t: (4, t.block_n + 16, 128),
    "k of one": lambda t: (4, t.block_n, 1),
    "k below one block": lambda t: (4, t.block_n, 64),
    "odd k": lambda t: (4, t.block_n, 161),
    "k within a group": lambda t: (4, t.block_n, 360),
    "m, n and k": lambda t: (t.block_m + 5, t.block_n + 32, 720),
}


@on_hopper
@every_kernel
@every_tile
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_partly_filled_block_changes_nothing(kernel, tile, shape, device_generator):
    m, n, k = shape(tile)
    expert = spread(device_generator, m, experts=2, top_k=1)
    case = drawn(kernel, device_generator, expert, tile, experts=2, n=n, k=k, bias=True)
    case.check(launched(case, tile))


@on_hopper
@every_kernel
@every_tile
def test_empty_expert_leaves_its_neighbours_unchanged(kernel, tile, device_generator):
    expert = counted(device_generator, (3, 0, 4))
    case = drawn(kernel, device_generator, expert, tile, experts=3, n=128, k=160, bias=True)
    for tensor in (case.w, case.w_scale, case.bias):
        tensor[1:2].view(torch.uint8).fill_(0xFF)
    y = launched(case, tile)
    assert y.isfinite().all()
    case.check(y)


@on_hopper
@every_kernel
@pytest.mark.parametrize("swiglu", [None, PLAIN], ids=["linear", "swiglu"])
def test_no_tokens_give_an_empty_result(kernel, swiglu, device_generator):
    tile = Tile(16, 64, 128)
    expert = spread(device_generator, m=0, experts=4, top_k=2)
    case = drawn(kernel, device_generator, expert, tile, experts=4, n=64, k=96, swiglu=swiglu)
    assert launched(case, tile).shape == (0, 32 if swiglu else 64)


OPTIONS = test_moe_gemm.OPTIONS | {
    "num_stages": [4, 3, 6],
    "fast_accum": [False, True],
    "tails": [0, 1, 2],
    "group_m": [4, 1, 8],
}


def pairs():
    for kernel in KERNELS:
        for values in AllPairs(list(OPTIONS.values())):
            row = dict(zip(OPTIONS, values, strict=True))
            yield pytest.param(kernel, row, id=f"{kernel} {' '.join(map(str, values))}")


@on_hopper
@pytest.mark.parametrize(("kernel", "row"), list(pairs()))
@pytest.mark.parametrize(("tile", "num_warps"), [("64x64x128", 4), ("128x128x128", 8)])
def test_options_work_together_in_pairs(
    kernel, row, tile, num_warps, device_generator, monkeypatch
):
    row = dict(row)
    ways = {name: row.pop(name) for name in ("tails", "group_m")}
    tile = replace(Tile.parse(tile), **ways)
    names = ("y_format", "num_xcds", "num_stages", "fast_accum")
    options = {name: row.pop(name) for name in names}
    if row.pop("wide"):
        monkeypatch.setattr("moelab.kernels.grouped_gemm.WIDE_ELEMENTS", 1)
    # One expert with whole tiles, one with a tail and one with a row.
    expert = counted(device_generator, (2 * tile.block_m, 17, 1))
    n = tile.block_n + 32
    case = drawn(kernel, device_generator, expert, tile, experts=3, n=n, k=416, **row)
    of_y = {}
    if options["y_format"] == "fp8":
        # An eighth of the range is cut off.
        of_y["y_scale"] = (case.expected().abs().amax() / 512).float().reshape(1)
    y = case.launch(tile, num_warps=num_warps, **options, **of_y)
    case.check(y, fast_accum=options["fast_accum"], **of_y)


@on_hopper
@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tile", ["32x128x128", "128x128x128+tails2"])
@pytest.mark.parametrize("fast_accum", [False, True], ids=["to fp32", "fast"])
def test_layer_at_full_size(kernel, layer, tile, fast_accum, device_generator):
    """k = 2880 and, in layer 2, 720: neither steps of 128 nor groups of 32 divide them."""
    full, tile = problem("GPT-OSS 120B", layer, tp=4, m=512), Tile.parse(tile)
    case = drawn(
        kernel,
        device_generator,
        spread(device_generator, full.m, full.experts, full.top_k),
        tile,
        experts=full.experts,
        n=full.n,
        k=full.k,
        gather=full.gather,
        weighted=full.weighted,
        scatter=full.scatter,
        bias=full.bias,
        swiglu=GPT_OSS if full.swiglu else None,
    )
    case.check(launched(case, tile, fast_accum=fast_accum), fast_accum=fast_accum)


@on_hopper
@every_kernel
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("num_stages", [3, 4, 6])
@pytest.mark.parametrize("fast_accum", [False, True], ids=["to fp32", "fast"])
def test_warps_and_stages_leave_the_result(
    kernel, num_warps, num_stages, fast_accum, device_generator
):
    tile = Tile(64, 256, 128)
    expert = spread(device_generator, m=200, experts=4, top_k=2)
    case = drawn(
        kernel, device_generator, expert, tile, experts=4, n=272, k=672, swiglu=GPT_OSS, bias=True
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "fast_accum": fast_accum}
    case.check(case.launch(tile, **options), fast_accum=fast_accum)


@on_hopper
@every_kernel
@pytest.mark.parametrize("num_xcds", [1, 8])
def test_tiles_past_the_count_are_never_used(kernel, num_xcds, device_generator):
    tile = Tile(16, 64, 128)
    expert = counted(device_generator, (7, 0, 0, 5))
    case = drawn(kernel, device_generator, expert, tile, experts=4, n=112, k=96)
    count = int(case.routing.tile_count)
    assert case.routing.tile_expert.numel() > count, "the routing has no entry to spoil"
    for tensor in (case.routing.tile_expert, case.routing.tile_row):
        tensor[count:] = 2**30
    case.check(launched(case, tile, num_xcds=num_xcds))


@on_hopper
@every_kernel
@pytest.mark.parametrize("swiglu", [None, PLAIN, GPT_OSS], ids=["linear", "plain", "GPT-OSS"])
@pytest.mark.parametrize("y_format", test_moe_gemm.Y_FORMATS)
def test_a_nan_is_never_stored_as_a_number(kernel, swiglu, y_format, device_generator):
    tile = Tile(16, 64, 128)
    expert = spread(device_generator, m=5, experts=2, top_k=1)
    case = drawn(kernel, device_generator, expert, tile, experts=2, n=64, k=64, swiglu=swiglu)
    bias = torch.zeros(2, 64, device=expert.device)
    bias[1, :2] = float("nan")
    of_y = {"y_scale": torch.ones(1, device=expert.device)} if y_format == "fp8" else {}
    y = replace(case, bias=bias).run(tile, num_warps=4, y_format=y_format, **of_y)
    if y_format == "mxfp8":
        y = dequantize_mxfp8(*y)
    of_second = torch.arange(5, device=expert.device) >= case.routing.expert_end[0]
    assert y.float()[of_second, 0].isnan().all()
    assert not y.float()[~of_second].isnan().any()


def of_the_identity(generator, tile, n, k, scales) -> tuple[Case, torch.Tensor]:
    """Set x to the identity times 2: y is w transposed, times 2; also gives that."""
    device = generator.device
    expert = torch.zeros(k, 1, dtype=torch.int64, device=device)
    case = drawn("moe_gemm_a8w4", generator, expert, tile, experts=1, n=n, k=k)
    w = torch.randint(0, 256, (1, n, k // 2), generator=generator, device=device)
    w_scale = torch.randint(*scales, (1, n, -(-k // 32)), generator=generator, device=device)
    # Each row about another power of two.
    w_scale += torch.randint(0, 220, (1, n, 1), generator=generator, device=device)
    w, w_scale = w.to(torch.uint8), w_scale.to(torch.uint8)
    assert len(torch.cat((w % 16, w // 16)).unique()) == 16, "not every code is in w"
    packed, packed_scale = hopper_weights.pack(w, w_scale, k)
    x = torch.eye(k, device=device).to(case.x.dtype)
    x_scale = torch.full((1,), 2.0, device=device)
    case = replace(case, x=x, x_scale=x_scale, w=packed, w_scale=packed_scale)
    return case, 2.0 * dequantize_mxfp4(w, w_scale, k)[0].T


@on_hopper
@every_tile
@pytest.mark.parametrize("fast_accum", [False, True], ids=["to fp32", "fast"])
def test_every_code_and_scale_comes_through_an_identity_exactly(tile, fast_accum, device_generator):
    case, expected = of_the_identity(device_generator, tile, n=208, k=360, scales=(0, 15))
    assert torch.equal(launched(case, tile, fast_accum=fast_accum), expected)


@on_hopper
def test_scales_far_apart_are_within_2_18th_of_their_rows_largest_element(device_generator):
    tile = Tile(128, 128, 128)
    case, expected = of_the_identity(device_generator, tile, n=208, k=360, scales=(0, 33))
    error = (launched(case, tile).double() - expected.double()).abs()
    assert (error <= 2**-18 * expected.double().abs().amax(0)).all()


@on_hopper
@every_kernel
def test_a_nan_scale_makes_its_own_column_nan(kernel, device_generator):
    tile = Tile(16, 64, 128)
    expert = counted(device_generator, (3, 4))
    case = drawn(kernel, device_generator, expert, tile, experts=2, n=64, k=160)
    w, w_scale = hopper_weights.unpack(case.w, case.w_scale, 160)
    w_scale[1, 7, 3] = 255
    w, w_scale = hopper_weights.pack(w, w_scale, 160)
    y = replace(case, w=w, w_scale=w_scale).run(tile, num_warps=4)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[3:, 7] = True
    assert torch.equal(y.isnan(), expected)


@on_hopper
@every_kernel
def test_a_tensor_may_exceed_2_31_elements(kernel, device_generator):
    """x has more than 2^31 elements; rows near the end are right."""
    m, n, k, tile = 2**19 + 5, 64, 8192, Tile(128, 64, 128)
    case = test_moe_gemm.large_case(kernel, device_generator, m, n, k)
    w, w_scale = hopper_weights.pack(case.w, case.w_scale, k)
    case = replace(case, w=w, w_scale=w_scale, own=case.own | {"scale_layout": "hopper"})
    if kernel == "moe_gemm_a4w4":
        case = replace(case, own=case.own | {"k": k})
    y = case.run(tile, num_warps=4)
    first = m - 40
    rows = torch.zeros(40, 1, dtype=torch.int32, device=y.device)
    last = replace(
        case,
        x=case.x[first:],
        x_scale=case.x_scale[first:] if case.x_scale.dim() > 1 else case.x_scale,
        routing=route(rows, rows.float(), 1, tile.block_m),
    )
    assert_close(y[first:], last.expected(), k)


@on_hopper
@every_kernel
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("num_stages", [3, 4, 6])
@pytest.mark.parametrize(
    ("tile", "num_warps"),
    [("16x128x128", 4), ("64x128x128+tails2", 4), ("128x256x128", 8), ("256x256x128", 8)],
)
def test_the_gpu_loads_the_lds_that_was_told(
    kernel, tile, num_warps, num_stages, layer, device_generator, monkeypatch
):
    from triton.runtime.errors import OutOfResources

    first, tile = layer == 1, Tile.parse(tile)
    of = Problem("test", layer, 1, 64, 4, 2, 512, 1056, first, first, not first, True, not first)
    of = replace(of, scale_layout="hopper")
    asked = Configuration(kernel, of, tile, num_warps, num_stages, None, "sm_90")
    told = compiler.lds(compiler.specialize(asked)).lds_bytes
    case = drawn(
        kernel,
        device_generator,
        spread(device_generator, of.m, of.experts, of.top_k),
        tile,
        experts=of.experts,
        n=of.n,
        k=of.k,
        gather=of.gather,
        weighted=of.weighted,
        scatter=of.scatter,
        swiglu=PLAIN if of.swiglu else None,
        bias=True,
    )
    spy = Spy(mxfp4_hopper._mxfp4_hopper_kernel)
    monkeypatch.setattr(mxfp4_hopper, "_mxfp4_hopper_kernel", spy)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if told <= get("sm_90").lds_limit:
        case.run(tile, **options)
        assert spy.loaded.metadata.shared == told
    else:
        with pytest.raises(OutOfResources, match=f"Required: {told}"):
            case.run(tile, **options)


def in_plain_order(ready):
    """Undo the order of steps: word by word over 4 groups of 32."""
    by_step = ready.unflatten(1, (-1, 8, 4, 4))
    return by_step.transpose(2, 3).reshape(ready.shape)


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("k", [1, 33, 128, 360])
def test_fp8_x_is_put_into_order_and_filled_with_zeros(rows, k, device_generator):
    device = device_generator.device
    x = torch.randint(0, 256, (rows, k), generator=device_generator, device=device)
    x = x.to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.ones(1, device=device)
    ready, same = mxfp4_hopper.ready_x(x, scale, k)
    assert same is scale
    plain = in_plain_order(ready.view(torch.uint8))
    assert torch.equal(plain[:, :k], x.view(torch.uint8))
    assert not plain[:, k:].any()


@pytest.mark.parametrize(
    ("scales", "bound"), [((90, 105), 0.0), ((0, 15), 0.0), ((239, 253), 0.0), ((0, 253), 2**-18)]
)
@pytest.mark.parametrize("k", [34, 128, 360])
def test_mxfp4_x_becomes_fp8_with_a_scale_per_row(k, scales, bound, device_generator):
    device, rows = device_generator.device, 37
    x = torch.randint(0, 256, (rows, k // 2), generator=device_generator, device=device)
    scale = torch.randint(*scales, (rows, -(-k // 32)), generator=device_generator, device=device)
    x, scale = x.to(torch.uint8), scale.to(torch.uint8)
    x[3] = 0
    ready, of_row = mxfp4_hopper.ready_x(x, scale, k)
    values = in_plain_order(ready).double() * of_row.double()[:, None]
    expected = dequantize_mxfp4(x, scale, k).double()
    error = (values[:, :k] - expected).abs()
    assert (error <= bound * expected.abs().amax(1, keepdim=True)).all()
    assert not values[:, k:].any()


def test_a_nan_scale_of_x_makes_its_own_row_nan(device_generator):
    device = device_generator.device
    x = torch.zeros(5, 80, dtype=torch.uint8, device=device)
    scale = torch.full((5, 5), 120, dtype=torch.uint8, device=device)
    scale[2, 4] = 255
    _, of_row = mxfp4_hopper.ready_x(x, scale, 160)
    assert of_row.isnan().tolist() == [False, False, True, False, False]


@pytest.fixture
def recorder(monkeypatch):
    """Launch nothing, on any device; keep what would have been launched."""
    recorder = Recorder()
    monkeypatch.setattr(mxfp4_hopper, "_mxfp4_hopper_kernel", recorder)
    monkeypatch.setattr(mxfp4_hopper, "target_name", lambda device: "sm_90")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(mxfp4_hopper, "ready_x", made_ready)
    return recorder


def made_ready(x, x_scale, k):
    ready = torch.zeros(x.shape[0], hopper_weights.steps(k) * 128).to(torch.float8_e4m3fn)
    return ready, x_scale if x_scale.dim() == 1 else torch.zeros(x.shape[0])


@every_kernel
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("k", [128, 96, 45])
@pytest.mark.parametrize("y_format", test_moe_gemm.Y_FORMATS)
@pytest.mark.parametrize("fast_accum", [False, True])
def test_the_compiler_is_told_of_the_launch_that_is_made(
    kernel, layer, k, y_format, fast_accum, generator, recorder
):
    first, tile = layer == 1, Tile.parse("32x64x128+group2+tails1")
    of = Problem("test", layer, 1, 9, 4, 2, 48, k, first, first, not first, True, not first)
    of = replace(of, scale_layout="hopper", y_format=y_format, fast_accum=fast_accum)
    told = load(kernel).source(of, tile, get("sm_90")).args
    case = drawn(
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
    )
    of_y = {"y_scale": torch.ones(1)} if y_format == "fp8" else {}
    options = {"num_warps": 4, "num_stages": 5, "y_format": y_format} | of_y
    case.run(tile, fast_accum=fast_accum, **options)
    launched = recorder.told()
    assert (launched["num_warps"], launched["num_stages"], launched["NUM_STAGES"]) == (4, 5, 5)
    assert {name: launched[name] for name in told} == told


@every_kernel
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tile": Tile(16, 64, 256)}, "block_k = 256; expected 128"),
        ({"tile": Tile(16, 32, 128)}, "block_n = 32; expected 64 or more"),
        ({"tile": Tile(512, 64, 128)}, "block_m = 512; expected 16 to 256"),
        ({"tile": Tile(64, 64, 128, tma=True)}, "tma = True; expected none"),
        ({"tile": Tile(64, 64, 128, persistent=True)}, "persistent = True; expected none"),
    ],
)
def test_a_tile_that_cannot_be_computed_is_refused_by_name(
    kernel, given, words, generator, recorder
):
    tile = given["tile"]
    of = Problem("test", 1, 1, 3, 2, 1, 64, 160, True, False, False, scale_layout="hopper")
    with pytest.raises(ValueError, match=words):
        load(kernel).source(of, tile, get("sm_90"))
    case = drawn(kernel, generator, counted(generator, (1, 2)), tile, experts=2, n=64, k=160)
    with pytest.raises(ValueError, match=words):
        case.run(tile, num_warps=4 if tile.block_n >= 64 else 2, num_stages=4)


@every_kernel
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_warps": 2}, "num_warps is 2; expected 4, or a multiple"),
        ({"num_warps": 8}, "num_warps is 8; .* up to block_n / 16 = 4"),
        ({"num_warps": 4, "num_stages": 2}, "num_stages is 2; expected 3 or more"),
    ],
)
def test_a_schedule_that_cannot_be_computed_is_refused_by_name(
    kernel, options, words, generator, recorder
):
    tile = Tile(16, 64, 128)
    case = drawn(kernel, generator, counted(generator, (1, 2)), tile, experts=2, n=64, k=160)
    with pytest.raises(ValueError, match=words):
        case.run(tile, **options)
    assert recorder.arguments is None


@every_kernel
@pytest.mark.parametrize("given", [{}, {"num_stages": None}])
def test_stages_left_out_are_four(kernel, given, generator, recorder):
    tile = Tile(16, 64, 128)
    case = drawn(kernel, generator, counted(generator, (1, 2)), tile, experts=2, n=64, k=160)
    case.run(tile, num_warps=4, **given)
    assert recorder.arguments["num_stages"] == recorder.arguments["NUM_STAGES"] == 4


@every_kernel
@pytest.mark.parametrize("target", ["gfx950", "sm_89", "sm_100"])
def test_other_targets_are_refused_by_name(kernel, target):
    of = Problem("test", 1, 1, 3, 2, 1, 64, 160, True, False, False, scale_layout="hopper")
    with pytest.raises(ValueError, match=f"'hopper', .* sm_90 alone; expected rows for {target}"):
        load(kernel).source(of, Tile(16, 64, 128), get(target))


@every_kernel
def test_columns_that_are_no_whole_blocks_are_refused_by_name(kernel):
    of = Problem("test", 1, 1, 3, 2, 1, 40, 160, True, False, False, scale_layout="hopper")
    with pytest.raises(ValueError, match=r"n = 40.*pad n to 48"):
        load(kernel).source(of, Tile(16, 64, 128), get("sm_90"))


def test_mxfp8_x_is_refused_by_name(generator, recorder):
    tile = Tile(16, 64, 128)
    of = Problem("test", 1, 1, 3, 2, 1, 64, 160, True, False, False, scale_layout="hopper")
    with pytest.raises(ValueError, match="x_format is 'mxfp8'; expected fp8 with one scale"):
        load("moe_gemm_a8w4").source(replace(of, x_format="mxfp8"), tile, get("sm_90"))
    expert = counted(generator, (1, 2))
    case = drawn("moe_gemm_a8w4", generator, expert, tile, experts=2, n=64, k=160)
    x, x_scale = quantize_mxfp8(torch.randn(3, 160, generator=generator))
    with pytest.raises(ValueError, match="x_format is 'mxfp8'; expected fp8 with one scale"):
        replace(case, x=x, x_scale=x_scale).run(tile, num_warps=4)


@every_kernel
def test_fast_sums_are_refused_where_there_is_no_choice(kernel, generator):
    tile = Tile(16, 32, 64)
    case = make(kernel, generator, counted(generator, (1, 2)), tile, experts=2, n=32, k=64)
    with pytest.raises(ValueError, match="fast_accum is True; expected False"):
        case.run(tile, fast_accum=True)


@every_kernel
@pytest.mark.parametrize(("interpret", "where"), [(True, "the interpreter"), (False, "a CPU")])
def test_what_runs_no_gluon_is_refused_by_name(kernel, interpret, where, generator, monkeypatch):
    tile = Tile(16, 64, 128)
    case = drawn(kernel, generator, counted(generator, (1, 2)), tile, experts=2, n=64, k=160)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    with pytest.raises(ValueError, match=f"expected rows for {where}"):
        case.run(tile, num_warps=4)


@every_kernel
def test_the_reference_reads_packed_weights(kernel, generator):
    tile = Tile(16, 64, 128)
    expert = counted(generator, (3, 2))
    case = drawn(kernel, generator, expert, tile, experts=2, n=64, k=160, swiglu=PLAIN)
    w, w_scale = hopper_weights.unpack(case.w, case.w_scale, 160)
    own = case.own | {"scale_layout": "rows"}
    plain = replace(case, w=w, w_scale=w_scale, own=own)
    assert torch.equal(case.expected(), plain.expected())
