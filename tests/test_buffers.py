"""Every byte of the LDS has an owner, with the name that the kernel's source gives it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl
from test_compiler import MODELS

from moelab import compiler, kernels, lds_map, plan, problems, targets
from moelab.compiler import maps, pipeline
from moelab.specs import Configuration, Source, TensorSpec, Tile

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# What each loop loads into LDS on gfx950, by its name in the source.
LOADED = {
    "moe_gemm_a8w8": {"x", "w"},
    "moe_gemm_a8w8_blockscale": {"x", "w"},
    "moe_gemm_a8w4": {"x", "w", "w_scale"},
    "moe_gemm_a4w4": {"x", "w", "x_scale", "w_scale"},
    "ff_a16w16_fused": {"x", "w_up", "w_down"},
    "fused_gemm_afp4wfp4_a16w16": {"x", "w", "x_scale", "w_scale"},
}
# Before 3.8 these products of scaled operands are not lowered for gfx942.
UNSCALED = {"moe_gemm_a4w4", "moe_gemm_a8w4", "fused_gemm_afp4wfp4_a16w16"}


def launch(kernel="moe_gemm_a8w4", target="gfx950", stages=2, async_copy=True, m=8704):
    """A kernel at the tile that its published rules choose."""
    model = MODELS[kernel]
    if kernel in problems.DENSE:
        problem = problems.shared_expert(kernel, model, 1, m)
    else:
        problem = problems.problem(model, 1, 1, m)
    tile, num_warps = problems.ruled_tile(kernel, problem)
    switch = async_copy if targets.get(target).async_copy_switch else None
    return compiler.specialize(
        Configuration(kernel, problem, tile, num_warps, stages, switch, target)
    )


def assert_explained(of):
    """The map is the launch's, and accounts for its LDS."""
    allocation, found = compiler.buffers(of)
    assert found.missing is None
    assert allocation == compiler.lds(of)
    regions = lds_map.explained(found.buffers, allocation.lds_bytes)
    assert sum(region.size_bytes for region in regions) == allocation.lds_bytes
    for buffer in found.buffers:
        assert 0 <= buffer.first < buffer.last <= found.positions
        assert buffer.name
    return found.buffers


@pytest.mark.parametrize("async_copy", [True, False])
@pytest.mark.parametrize("kernel", MODELS)
def test_buffers_are_those_of_the_source_in_as_many_copies_as_the_pipeline_has(kernel, async_copy):
    for stages in (2, 3):
        tiles = [
            buffer
            for buffer in assert_explained(launch(kernel, stages=stages, async_copy=async_copy))
            if buffer.name in LOADED[kernel]
        ]
        assert {tile.name for tile in tiles} == LOADED[kernel]
        assert {tile.copies for tile in tiles} == {stages if async_copy else stages - 1}
        for tile in tiles:
            elements = tile.size_bytes - tile.padding_bytes
            assert elements % tile.copies == 0
            # Padding keeps rows off the same banks: a small share.
            assert 0 <= tile.padding_bytes <= tile.size_bytes / 8


@pytest.mark.parametrize(
    ("kernel", "target", "stages"),
    [
        *((kernel, "gfx942", 2) for kernel in MODELS),
        *((kernel, "sm_90", 2) for kernel in MODELS),
        ("moe_gemm_a8w8", "sm_90", 4),
        ("moe_gemm_a8w4", "gfx950", 1),
        ("ff_a16w16_fused", "sm_100", 2),
    ],
)
def test_buffers_explain_the_lds_on_other_targets(kernel, target, stages):
    if target == "gfx942" and kernel in UNSCALED and VERSION < (3, 8):
        pytest.skip(f"Triton {triton.__version__} rejects {kernel} for {target}")
    buffers = assert_explained(launch(kernel, target, stages))
    assert {"x"} <= {buffer.name for buffer in buffers} or stages == 1


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
@pytest.mark.parametrize("tile", ["16x64x128", "128x128x128+tails1"])
def test_buffers_of_a_gluon_kernel_are_the_copies_that_it_makes(kernel, tile):
    problem = problems.problem(MODELS[kernel], 1, 1, 512)
    of = Configuration(
        kernel, replace(problem, scale_layout="hopper"), Tile.parse(tile), 4, 5, None, "sm_90"
    )
    copied = [buffer for buffer in assert_explained(compiler.specialize(of)) if buffer.copies > 1]
    assert {buffer.name for buffer in copied} == {"x", "w", "w_scale"}
    assert {buffer.copies for buffer in copied} == {5}


@pytest.mark.slow
def test_buffers_explain_every_configuration_that_is_served():
    every = plan.grid(
        kernels="all",
        targets="gfx950,gfx942,sm_90",
        models="all",
        layers="all",
        tp="all",
        m="all",
        async_copy="both",
    )
    launches = {}
    for configuration in every:
        of = compiler.specialize(configuration)
        launches.setdefault(of.key, (configuration, of))
    explained = 0
    for configuration, of in launches.values():
        if (configuration.target, VERSION < (3, 8)) == ("gfx942", True):
            continue
        assert_explained(of)
        explained += 1
    assert explained > 500


def test_a_buffer_says_where_in_the_source_it_is_and_what_a_copy_holds():
    buffers = {buffer.name: buffer for buffer in compiler.buffers(launch())[1].buffers}
    w, x = buffers["w"], buffers["x"]
    assert (w.operation, w.shape, w.dtype) == ("local_alloc", (128, 512), "i8")
    assert (x.operation, x.shape, x.dtype) == ("local_alloc", (128, 256), "fp8e4nv")
    name, _, line = x.line.partition(":")
    source = Path(kernels.__file__).parent / name
    assert source.read_text().splitlines()[int(line) - 1].strip().startswith("x = tl.load(")


@triton.jit(noinline=True)
def largest(x_ptr, row, N: tl.constexpr):
    return tl.max(tl.load(x_ptr + row * N + tl.arange(0, N)), axis=0)


@triton.jit
def calling(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0), largest(x_ptr, tl.program_id(0), N))


@pytest.mark.parametrize(("target", "switch"), [("gfx950", True), ("sm_90", None)])
def test_memory_of_a_function_that_is_not_inlined_is_that_of_its_call(target, switch):
    x, y = TensorSpec((64, 1024), "fp32"), TensorSpec((64,), "fp32")
    source = Source(calling, {"x_ptr": x, "y_ptr": y, "N": 1024}, {})
    options = {"num_warps": 4, "num_stages": 1}
    buffers = assert_explained(
        compiler.specialize_source(source, options, targets.get(target), switch)
    )
    assert [(buffer.name, buffer.operation) for buffer in buffers] == [("call of largest", "call")]


@triton.jit
def specialized(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BM, BK])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BN, BK])
    c_desc = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BM, BN])
    row = tl.program_id(0) * BM
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True):
        a = a_desc.load([row, k])
        b = b_desc.load([0, k])
        acc = tl.dot(a, b.T, acc)
    c_desc.store([row, 0], acc.to(tl.bfloat16))


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_warp_groups_have_their_barriers_and_captures_named(target):
    bf16 = TensorSpec((1024, 1024), "bf16")
    args = {"a_ptr": bf16, "b_ptr": bf16, "c_ptr": bf16, "M": 1024, "N": 1024, "K": 1024}
    source = Source(specialized, args | {"BM": 128, "BN": 128, "BK": 64}, {})
    options = {"num_warps": 4, "num_stages": 3}
    of = compiler.specialize_source(source, options, targets.get(target), None)
    names = [buffer.name for buffer in assert_explained(of)]
    assert "states of warp groups" in names
    assert "captures of warp_specialize" in names
    assert "tensormap_create of a_desc" in names
    assert any(name.startswith("mbarrier") for name in names)


def test_a_kernel_without_lds_has_an_empty_map():
    @triton.jit
    def copying(x_ptr, y_ptr, N: tl.constexpr):
        tl.store(y_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))

    x = TensorSpec((256,), "fp32")
    source = Source(copying, {"x_ptr": x, "y_ptr": x, "N": 256}, {})
    options = {"num_warps": 4, "num_stages": 1}
    of = compiler.specialize_source(source, options, targets.get("gfx950"), True)
    assert assert_explained(of) == ()


def test_a_build_that_prints_nothing_gives_the_lds_and_says_why_there_is_no_map(monkeypatch):
    of = launch()
    monkeypatch.setattr(maps, "_ALLOCATION_DEBUG", "no-such-pass")
    allocation, found = compiler.buffers(of)
    assert allocation == compiler.lds(of)
    assert found.buffers == ()
    assert "prints no debug output" in found.missing


def test_a_triton_that_was_not_checked_gives_the_lds_and_says_why_there_is_no_map(monkeypatch):
    of = launch(m=64)
    quick = compiler.lds(of)
    monkeypatch.setattr(pipeline, "CHECKED_LOWERINGS", {})
    allocation, found = compiler.buffers(of)
    assert (allocation.method, allocation.lds_bytes) == ("full", quick.lds_bytes)
    assert "not checked" in found.missing


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("-- 0 67552 135136", "-- 0 67552 135008", "buffer 0: 67552 bytes at 135008"),
        ("interval 123", "interval 122", "buffer 0 of ttg.local_alloc"),
        ("-- 4 32768 0 interval 256 257\n", "", "4 buffers were printed, 5 are in the module"),
        ("-- 0 67552", "-- 0 6755", "bytes"),
    ],
)
@pytest.mark.skipif(VERSION < (3, 9), reason="the figures are those of Triton 3.9")
def test_what_was_printed_is_held_against_the_module(monkeypatch, before, after, words):
    allocate_aloud = maps._allocate_aloud

    def altered(*arguments):
        printed = allocate_aloud(*arguments)
        assert before in printed
        return printed.replace(before, after)

    monkeypatch.setattr(maps, "_allocate_aloud", altered)
    with pytest.raises(compiler.MapError, match=words):
        compiler.buffers(launch())


@pytest.mark.parametrize("set_by_the_user", [None, "", "no-such-pass"])
def test_nothing_is_printed_by_it_or_by_what_is_compiled_afterwards(
    monkeypatch, capfd, set_by_the_user
):
    monkeypatch.delenv("TRITON_LLVM_DEBUG_ONLY", raising=False)
    if set_by_the_user is not None:
        monkeypatch.setenv("TRITON_LLVM_DEBUG_ONLY", set_by_the_user)
    compiler.buffers(launch())
    compiler.lds(launch(stages=3))
    assert capfd.readouterr() == ("", "")
    assert os.environ.get("TRITON_LLVM_DEBUG_ONLY") == set_by_the_user


def test_async_copy_is_told_by_the_sentence_of_the_launch_that_no_longer_fits():
    of = launch()
    limit = of.target.lds_limit
    allocation, found = compiler.buffers(of)
    _, off = compiler.buffers(launch(async_copy=False))
    said = lds_map.sentence(found.buffers, allocation.lds_bytes, limit, 2, off.buffers)
    assert allocation.lds_bytes > limit
    assert said.startswith(f"w takes {max(b.size_bytes for b in found.buffers):,} of ")
    assert "2 stages of" in said
    assert "async copy added one of them" in said
    assert f"{allocation.lds_bytes - limit:,} more than the limit" in said
