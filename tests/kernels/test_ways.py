"""How programs go about their tiles changes what a launch takes, never what it gives."""

from dataclasses import replace

import pytest
import torch
from grouped_gemm import PLAIN, counted, make

from moelab import problems, targets
from moelab.kernels import grouped_gemm, load
from moelab.specs import Problem, Tile

# Experts with no row, one, a tail's, just more, whole tiles, and what is left of one.
COUNTS = (0, 1, 16, 17, 0, 64, 100, 32, 33)
SMALL, LARGE = "64x32x64", "128x128x128"
BOTH = ("moe_gemm_a8w8", "moe_gemm_a8w8_blockscale")

every_kernel = pytest.mark.parametrize("kernel", BOTH)
every_tile = pytest.mark.parametrize("blocks", [SMALL, pytest.param(LARGE, marks=pytest.mark.gpu)])
every_way = pytest.mark.parametrize(
    "way",
    [
        *("+tma", "+tails1", "+tails2", "+persistent", "+group1", "+group8"),
        *("+tma+tails2", "+tma+persistent", "+group8+tma+persistent"),
    ],
)


@every_kernel
@every_tile
@every_way
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "scattered"])
def test_every_way_gives_the_same(kernel, blocks, way, gather, device_generator):
    tile = Tile.parse(blocks + way)
    case = make(
        kernel,
        device_generator,
        counted(device_generator, COUNTS),
        tile,
        experts=len(COUNTS),
        n=200,
        k=208,
        gather=gather,
        scatter=not gather,
        weighted=not gather,
        bias=gather,
        swiglu=PLAIN if gather else None,
        fp8=torch.float8_e4m3fn,
    )
    case.check(case.launch(tile))


@every_kernel
def test_without_a_row_nothing_is_computed(kernel, device_generator):
    tile = Tile.parse(SMALL + "+tma+persistent")
    expert = torch.empty((0, 1), dtype=torch.int64, device=device_generator.device)
    case = make(
        kernel, device_generator, expert, tile, experts=2, n=32, k=64, fp8=torch.float8_e4m3fn
    )
    assert case.launch(tile).shape == (0, 32)


@every_kernel
@pytest.mark.parametrize("way", ["+persistent", "+tma+persistent", "+group3+persistent"])
@pytest.mark.parametrize("units", [2, 9, 1000])
def test_any_number_of_programs_takes_every_tile(kernel, way, units, device_generator, monkeypatch):
    """There are 28 tiles: fewer than 1000 programs, and no whole number for each of 9."""
    monkeypatch.setattr(grouped_gemm, "compute_units", lambda device: units)
    tile = Tile.parse(SMALL + way)
    case = make(
        kernel,
        device_generator,
        counted(device_generator, (0, 1, 64, 65, 0, 130)),
        tile,
        experts=6,
        n=100,
        k=64,
        fp8=torch.float8_e4m3fn,
    )
    assert int(case.routing.tile_count) * 4 == 28
    case.check(case.launch(tile))


@every_kernel
@pytest.mark.parametrize(
    ("tile", "k", "named"),
    [
        ("64x64x64+tma", 200, "rows of 16 bytes, and k is 200"),
        ("64x512x64+tma", 256, "block_n = 512; expected 256 or less, for TMA"),
        ("32x64x64+tails2", 256, "tails = 2; expected fewer"),
        ("256x64x64+tails3", 256, "tails = 3; expected 0, 1 or 2"),
        ("64x64x64+tails1+persistent", 256, "expected 0: a persistent program has none"),
    ],
)
def test_a_way_that_does_not_go_is_refused_by_name(kernel, tile, k, named, device_generator):
    tile = Tile.parse(tile)
    expert = counted(device_generator, (3, 2))
    case = make(
        kernel, device_generator, expert, tile, experts=2, n=64, k=k, fp8=torch.float8_e4m3fn
    )
    with pytest.raises(ValueError, match=named):
        case.launch(tile)


@every_kernel
@pytest.mark.parametrize(
    ("way", "k", "named"),
    [
        ({"tails": -1}, 64, "tails = -1; expected 0, 1 or 2"),
        ({"tma": True}, 0, "rows of 16 bytes, and k is 0"),
    ],
)
def test_a_way_of_less_than_nothing_is_refused_by_name(kernel, way, k, named):
    of = Problem("test", 1, 1, 64, 2, 1, 64, k, True, False, False)
    with pytest.raises(ValueError, match=named):
        load(kernel).source(of, Tile(64, 64, 64, **way), targets.get("sm_90"))


def unaligned(tensor):
    """The same values, one byte past an aligned address."""
    memory = torch.empty(tensor.numel() + 16, dtype=torch.uint8, device=tensor.device)
    return memory[1 : 1 + tensor.numel()].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@every_kernel
@pytest.mark.parametrize("name", ["x", "w"])
def test_what_tma_cannot_address_is_refused_by_name(kernel, name, device_generator):
    expert = counted(device_generator, (3, 2))
    case = make(
        kernel, device_generator, expert, Tile(16, 32, 64), experts=2, n=64, k=64, gather=False
    )
    moved = replace(case, **{name: unaligned(getattr(case, name))})
    moved.check(moved.run(Tile(16, 32, 64), y_format="fp32"))
    with pytest.raises(ValueError, match=f"{name} starts 1 bytes past a multiple of 16"):
        moved.run(Tile(16, 32, 64, tma=True))


@every_kernel
def test_more_rows_than_tma_counts_are_refused_by_name(kernel):
    """A row is counted in 31 bits: of all experts together, w may have more."""
    of = Problem("test", 1, 1, 64, 2**15, 1, 2**16, 16, True, False, False)
    source, target = load(kernel).source, targets.get("sm_90")
    with pytest.raises(ValueError, match=r"w has 2147483648 rows; expected 2\^31 - 32 at most"):
        source(of, Tile(64, 32, 32, tma=True), target)
    source(of, Tile(64, 32, 32), target)
    source(replace(of, n=2**16 - 1), Tile(64, 32, 32, tma=True), target)


@every_kernel
def test_the_compiler_is_asked_for_tma_where_it_is(kernel):
    (model,) = {"moe_gemm_a8w8": ["Qwen3-235B-A22B"]}.get(kernel, ["DeepSeek-R1"])
    problem = problems.problem(model, layer=1, tp=1, m=512)
    tile = Tile.parse("64x128x128+tma")
    for target in ("sm_90", "sm_100"):
        load(kernel).source(problem, tile, targets.get(target))
    for target in ("gfx950", "sm_89"):
        with pytest.raises(ValueError, match="Hopper or later"):
            load(kernel).source(problem, tile, targets.get(target))


@pytest.mark.parametrize("kernel", ["moe_gemm_a4w4", "moe_gemm_a8w4"])
def test_a_kernel_without_the_way_says_so(kernel):
    problem = problems.problem("GPT-OSS 120B", layer=1, tp=1, m=512)
    with pytest.raises(ValueError, match="has tma = True; expected none: this kernel"):
        load(kernel).source(problem, Tile.parse("64x128x128+tma"), targets.get("sm_90"))
