"""The probe tells what the full compile tells, and describes what a launch would pass."""

import dataclasses
import itertools

import pytest
import torch
import triton
from triton import knobs
from triton.runtime.driver import driver

from moelab import compiler, kernels, problems, targets
from moelab.kernels import launch as launch_module
from moelab.kernels.routing import Routing
from moelab.specs import Configuration, TensorSpec, Tile

SMALL = Tile(16, 64, 64)
TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "u8": torch.uint8,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "fp32": torch.float32,
}


def configuration(kernel="moe_gemm_a8w8", target="gfx950", stages=2, **changes):
    model = {"moe_gemm_a8w8": "Qwen3-235B-A22B", "moe_gemm_a8w4": "GPT-OSS 120B"}[kernel]
    made = Configuration(
        kernel=kernel,
        problem=problems.problem(model, layer=1, tp=1, m=8704),
        tile=SMALL,
        num_warps=4,
        num_stages=stages,
        async_copy=compiler.default_async_copy(targets.get(target)),
        target=target,
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("target", ["gfx942", "gfx950", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_lds_is_what_the_full_compile_reports(kernel, target, stages):
    launch = compiler.specialize(configuration(kernel, target, stages))
    with compiler.settings(launch):
        compiled = triton.compile(
            launch.ast, target=compiler.gpu_target(launch.target), options=dict(launch.options)
        )
    told = compiler.lds(launch)
    assert told.method == "allocation"
    assert told.lds_bytes == compiled.metadata.shared
    assert told.tmem_columns == (getattr(compiled.metadata, "tmem_size", 0) or 0)


def test_ttir_that_was_read_back_gives_the_same_lds(monkeypatch):
    launches = [
        compiler.specialize(configuration("moe_gemm_a8w4", stages=stages, async_copy=switch))
        for stages, switch in itertools.product((1, 2, 3), (False, True))
    ]
    assert len({launch.ttir_key for launch in launches}) == 1
    monkeypatch.setattr(compiler, "_TTIR", {})
    read_back = [compiler.lds(launch) for launch in launches]
    fresh = []
    for launch in launches:
        compiler._TTIR.clear()
        fresh.append(compiler.lds(launch))
    assert read_back == fresh
    assert len({told.lds_bytes for told in fresh}) > 1


def test_the_ttir_cache_stays_small(monkeypatch):
    monkeypatch.setattr(compiler, "_TTIR", {})
    monkeypatch.setattr(compiler, "_TTIR_KEPT", 2)
    for block_n in (16, 32, 64):
        compiler.lds(compiler.specialize(configuration(tile=Tile(16, block_n, 64))))
    assert len(compiler._TTIR) == 2


def test_an_unknown_lowering_is_compiled_in_full_and_says_so(monkeypatch):
    launch = compiler.specialize(configuration())
    quick = compiler.lds(launch)
    monkeypatch.setattr(compiler, "CHECKED_LOWERINGS", {})
    slow = compiler.lds(launch)
    assert (quick.method, slow.method) == ("allocation", "full")
    assert quick.lds_bytes == slow.lds_bytes


def test_a_pipeline_that_never_allocates_is_compiled_in_full(monkeypatch):
    launch = compiler.specialize(configuration())
    quick = compiler.lds(launch)
    backend = type(launch.backend)
    add_stages = backend.add_stages

    def without_allocation(self, stages, options, language):
        add_stages(self, stages, options, language)
        lower = stages["llir"]
        # Of two pipelines, the first is the probe's, which gets no pass to leave after.
        stages["llir"] = lower if seen else lambda module, metadata: module
        seen.append(self)

    seen = []
    monkeypatch.setattr(backend, "add_stages", without_allocation)
    slow = compiler.lds(launch)
    assert (slow.method, slow.lds_bytes) == ("full", quick.lds_bytes)


class _StandInDriver:
    """Answers what `JITFunction.run` asks before it compiles."""

    def __init__(self, target):
        self._target = compiler.gpu_target(target)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        # Kernels remember a binder per device, and so the first target's.
        return self._target.arch

    def get_current_stream(self, device):
        return 0


class _CapturedError(Exception):
    def __init__(self, source, options):
        self.source = source
        self.options = options


@pytest.fixture
def capture(monkeypatch):
    """Run a launcher on tensors without memory up to its compile; return what it passes."""

    def refuse(source, target=None, options=None, **_):
        raise _CapturedError(source, options)

    def run(target, launcher, *args, **kwargs):
        monkeypatch.setattr("triton.compiler.compile", refuse)
        monkeypatch.setattr(torch.version, "hip", "7" if target.backend == "hip" else None)
        monkeypatch.setattr(driver, "_active", _StandInDriver(target))
        with pytest.raises(_CapturedError) as captured:
            launcher(*args, **kwargs)
        return captured.value

    return run


def meta(spec):
    return torch.empty(spec.shape, dtype=TYPES[spec.dtype], device="meta")


@pytest.mark.parametrize(
    ("model", "kernel", "layer", "tp"),
    [
        ("Qwen3-235B-A22B", "moe_gemm_a8w8", 1, 1),
        ("Qwen3-235B-A22B", "moe_gemm_a8w8", 2, 8),
        # Weights beyond 2 GiB: no pointer range, so no buffer loads on AMD.
        ("Llama4 Maverick", "moe_gemm_a8w8", 1, 1),
        ("GPT-OSS 120B", "moe_gemm_a8w4", 1, 1),
        ("GPT-OSS 120B", "moe_gemm_a8w4", 2, 8),
    ],
)
@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_the_compiler_is_told_what_a_launch_passes(capture, target, model, kernel, layer, tp):
    target = targets.get(target)
    problem = problems.problem(model, layer, tp, m=512)
    tile = Tile(64, 128, 128)
    asked = compiler.specialize(Configuration(kernel, problem, tile, 8, 3, None, target.name))

    module = kernels.load(kernel)
    args = module.source(problem, tile, target).args
    specs = {name: meta(value) for name, value in args.items() if isinstance(value, TensorSpec)}
    routing = Routing(
        row_index=torch.empty(problem.rows, dtype=torch.int32, device="meta"),
        expert_end=specs["expert_end_ptr"],
        weight=torch.empty(problem.rows, device="meta"),
        tile_count=specs["tile_count_ptr"],
        tile_expert=specs["tile_expert_ptr"],
        tile_row=specs["tile_row_ptr"],
        top_k=problem.top_k,
        block_m=tile.block_m,
    )
    launched = capture(
        target,
        getattr(module, kernel),
        *(specs[name] for name in ("x_ptr", "w_ptr", "x_scale_ptr", "w_scale_ptr")),
        routing,
        tile,
        bias=specs["bias_ptr"],
        gather=problem.gather,
        weighted=problem.weighted,
        swiglu=launch_module.SwiGLU() if problem.swiglu else None,
        num_warps=8,
        num_stages=3,
        num_xcds=target.xcds,
    )
    assert launched.source.signature == asked.ast.signature
    assert launched.source.constants == asked.ast.constants
    assert launched.source.attrs == asked.ast.attrs
    assert launched.options == asked.options


def test_async_copy_is_on_by_default_where_triton_says():
    """triton-lang/triton#9087: gfx950 and gfx1250, in releases from 3.8."""
    since = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    defaults = {name: compiler.default_async_copy(of) for name, of in targets.TARGETS.items()}
    assert defaults["gfx950"] is since
    assert defaults["gfx1250"] is since
    assert defaults["gfx942"] is False
    assert defaults["gfx1100"] is None
    assert defaults["sm_90"] is None


def test_settings_are_put_back():
    before = (knobs.amd.use_async_copy, knobs.cache.dir)
    with compiler.settings(compiler.specialize(configuration(async_copy=False))):
        assert knobs.amd.use_async_copy is False
        assert knobs.cache.dir != before[1]
    assert (knobs.amd.use_async_copy, knobs.cache.dir) == before


def test_the_users_cache_is_neither_read_nor_written(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = compiler.specialize(configuration())
    compiler.lds(launch)
    compiler.full(launch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", [compiler.lds, compiler.full])
def test_a_type_that_the_target_lacks_is_the_compilers_own_error(ask):
    with pytest.raises(compiler.CompileError, match="fp8e4nv not supported in this architecture"):
        ask(compiler.specialize(configuration(target="sm_80")))


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_full_reads_the_resources_of_the_machine_code(target):
    allocation, resources = compiler.full(compiler.specialize(configuration(target=target)))
    assert allocation.method == "full"
    assert 16 <= resources.registers <= targets.get(target).registers_per_thread
    assert resources.spilled_registers == resources.scratch_bytes == 0
    assert resources.code_bytes > 1000
    assert (resources.scalar_registers is None) == (target == "sm_90")


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_full_sees_spills(target):
    """One warp can't hold a 128 x 256 fp32 accumulator in its registers."""
    crowded = configuration(target=target, tile=Tile(128, 256, 64), num_warps=1, stages=1)
    _, resources = compiler.full(compiler.specialize(crowded))
    assert resources.spilled_registers > 0
    assert resources.scratch_bytes > 0


def test_launches_of_different_code_have_different_keys():
    base = configuration()
    others = [
        base,
        dataclasses.replace(base, num_stages=3),
        dataclasses.replace(base, num_warps=8),
        dataclasses.replace(base, async_copy=not base.async_copy),
        dataclasses.replace(base, target="gfx942"),
        dataclasses.replace(base, tile=Tile(16, 64, 128)),
        dataclasses.replace(base, problem=problems.problem("Qwen3-235B-A22B", 2, 1, 8704)),
    ]
    assert len({compiler.specialize(of).key for of in others}) == len(others)
    more_tokens = problems.problem("Qwen3-235B-A22B", 1, 1, 9728)
    same = dataclasses.replace(base, problem=more_tokens)
    assert compiler.specialize(same).key == compiler.specialize(base).key


def test_a_switch_in_the_environment_is_part_of_the_key(monkeypatch):
    before = compiler.specialize(configuration()).key
    monkeypatch.setenv("TRITON_HIP_USE_BLOCK_PINGPONG", "0")
    assert compiler.specialize(configuration()).key != before
