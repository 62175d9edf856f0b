"""The probe tells what the full compile tells, and describes what a launch would pass."""

import dataclasses
import itertools
import json
import os
import re

import pytest
import torch
import triton
from triton import knobs
from triton.runtime.driver import driver

from moelab import compiler, kernels, plan, problems, sweep, targets
from moelab.compiler import binding, pipeline
from moelab.kernels import mxfp4_hopper, routing
from moelab.kernels.epilogue import SwiGLU
from moelab.specs import CapturedLaunch, Configuration, TensorSpec, Tile

SMALL = Tile(16, 64, 64)
TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "u8": torch.uint8,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i64": torch.int64,
    "fp32": torch.float32,
}
MODELS = {
    "moe_gemm_a8w8": "Qwen3-235B-A22B",
    "moe_gemm_a8w8_blockscale": "DeepSeek-R1",
    "moe_gemm_a8w4": "GPT-OSS 120B",
    "moe_gemm_a4w4": "DeepSeek-R1",
    "ff_a16w16_fused": "Llama4 Maverick",
    "fused_gemm_afp4wfp4_a16w16": "DeepSeek-R1",
}


def asked(kernel, model=None, layer=1, tp=1, m=8704, **formats):
    """A problem of a model that the kernel serves; a shared expert's has no second layer."""
    model = model or MODELS[kernel]
    if kernel in problems.DENSE:
        problem = problems.shared_expert(kernel, model, tp, m)
    else:
        problem = problems.problem(model, layer, tp, m)
    return dataclasses.replace(problem, **formats)


def configuration(kernel="moe_gemm_a8w8", target="gfx950", stages=2, **changes):
    made = Configuration(
        kernel=kernel,
        problem=asked(kernel),
        tile=SMALL,
        num_warps=4,
        num_stages=stages,
        async_copy=compiler.default_async_copy(targets.get(target)),
        target=target,
    )
    return dataclasses.replace(made, **changes)


def assert_told_what_is_reported(launch):
    """Hold the probe's answer against that of Triton's own compile."""
    with compiler.settings(launch):
        compiled = triton.compile(
            launch.ast, target=compiler.gpu_target(launch.target), options=dict(launch.options)
        )
    told = compiler.lds(launch)
    assert told.method == "allocation"
    assert told.lds_bytes == compiled.metadata.shared
    assert told.tmem_columns == (getattr(compiled.metadata, "tmem_size", 0) or 0)


VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

# In every Triton from 3.6 to 3.9: Ampere's e4m3 is another one.
REJECTED = {
    (kernel, target): "type fp8e4nv not supported in this architecture"
    for kernel in ("moe_gemm_a8w8", "moe_gemm_a8w8_blockscale", "moe_gemm_a8w4")
    for target in ("sm_80", "sm_86")
}
if VERSION < (3, 8):
    # Scaled products are not lowered for matrix units without scales; of a8w4, whose x has
    # none, those with fewer than 128 elements a step.
    REJECTED |= {
        (kernel, target): "PassManager::run failed|failed to translate module to LLVM IR"
        for kernel in ("moe_gemm_a8w4", "moe_gemm_a4w4", "fused_gemm_afp4wfp4_a16w16")
        for target in ("gfx90a", "gfx942")
    }

# By ptxas and by the linker, of which LDS alone says nothing.
REJECTED_LAST = {}
if VERSION < (3, 7):
    REJECTED_LAST = {
        ("moe_gemm_a8w4", "sm_89"): "Internal Triton PTX codegen error",
        **{
            (kernel, "gfx1250"): "LLD failed to link"
            for kernel in ("moe_gemm_a8w8", "moe_gemm_a8w4", "moe_gemm_a4w4")
        },
    }


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("target", ["gfx942", "gfx950", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_lds_is_what_the_full_compile_reports(kernel, target, stages):
    if (kernel, target) in REJECTED:
        pytest.skip(f"Triton {triton.__version__} rejects {kernel} for {target}")
    assert_told_what_is_reported(compiler.specialize(configuration(kernel, target, stages)))


# What a kernel may be asked for besides: other formats, no gate, a shared reduction.
VARIANTS = [
    ("moe_gemm_a8w8", {"y_format": "fp8"}, "16x64x256"),
    ("moe_gemm_a8w8", {"y_format": "mxfp8"}, "16x64x256"),
    ("moe_gemm_a8w8_blockscale", {"y_format": "mxfp8"}, "16x64x128"),
    ("moe_gemm_a8w4", {"x_format": "mxfp8"}, "16x64x256"),
    ("moe_gemm_a8w4", {"scale_layout": "cdna4"}, "16x64x256"),
    ("moe_gemm_a4w4", {"scale_layout": "cdna4"}, "16x64x256"),
    ("ff_a16w16_fused", {"swiglu": False}, "16x64x256"),
    ("fused_gemm_afp4wfp4_a16w16", {"y_format": "fp32"}, "16x64x256"),
    ("fused_gemm_afp4wfp4_a16w16", {"bias": True}, "16x64x256/4"),
]


@pytest.mark.parametrize(("kernel", "variant", "tile"), VARIANTS)
def test_lds_of_variants_is_what_the_full_compile_reports(kernel, variant, tile):
    assert_told_what_is_reported(
        compiler.specialize(
            configuration(kernel, problem=asked(kernel, **variant), tile=Tile.parse(tile))
        )
    )


@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_every_kernel_has_its_lds_on_every_target_whose_types_allow_it(kernel, target):
    launch = compiler.specialize(configuration(kernel, target))
    if words := REJECTED.get((kernel, target)):
        with pytest.raises(compiler.CompileError, match=words):
            compiler.lds(launch)
    else:
        assert 0 < compiler.lds(launch).lds_bytes <= targets.get(target).lds_limit


@pytest.mark.slow
def test_every_kernel_compiles_to_the_end_on_every_target_but_for_these(tmp_path):
    every = itertools.product(kernels.KERNELS, targets.TARGETS)
    # In workers: Triton 3.6 aborts when it links again after an error.
    rows = sweep.run(
        [configuration(kernel, target) for kernel, target in every],
        tmp_path,
        full=True,
        progress=False,
    )
    failed = rows[rows["status"] != "ok"]
    assert set(failed["status"]) == {"compile_error"}
    reasons = {(row.kernel, row.target): row.reason for row in failed.itertuples()}
    expected = REJECTED | REJECTED_LAST
    assert set(reasons) == set(expected)
    for which, words in expected.items():
        assert re.search(words, reasons[which]), which


@pytest.mark.parametrize(
    ("kernel", "formats", "tile", "words"),
    [
        ("moe_gemm_a8w8_blockscale", {}, "16x64x256", "block_k = 256; expected 128 or less"),
        ("moe_gemm_a8w8", {}, "16x64x64/2", "tile 16x64x64/2 has split_k = 2; expected 1"),
        ("moe_gemm_a8w8", {"y_format": "mxfp8"}, "16x32x64", "block_n = 32; expected 64 or more"),
        (
            "moe_gemm_a8w4",
            {"scale_layout": "cdna4"},
            "16x64x128",
            "block_k = 128; expected 256 or more",
        ),
        ("ff_a16w16_fused", {}, "16x64x64/2", "split_k = 2; expected 1"),
        ("fused_gemm_afp4wfp4_a16w16", {}, "16x64x16", "block_k = 16; expected 32 or more"),
        ("moe_gemm_a8w8", {"x_format": "mxfp8"}, "16x64x64", "x_format is 'mxfp8'"),
        ("moe_gemm_a4w4", {"x_format": "mxfp8"}, "16x64x64", "x_format is 'mxfp8'"),
        (
            *("moe_gemm_a8w8", {"scale_layout": "cdna4"}, "16x64x256"),
            "scale_layout is 'cdna4'; expected rows",
        ),
        *(
            (
                kernel,
                {"y_format": "fp8"},
                "16x64x64",
                "y_format is 'fp8'; expected one of bf16, fp32",
            )
            for kernel in problems.DENSE
        ),
    ],
)
def test_a_tile_or_format_that_a_kernel_refuses_is_a_compile_error_in_its_words(
    kernel, formats, tile, words
):
    refused = configuration(kernel, problem=asked(kernel, **formats), tile=Tile.parse(tile))
    with pytest.raises(compiler.CompileError, match=f"{kernel}: .*{words}"):
        compiler.specialize(refused)


def on_hopper(kernel, tile="64x128x128", warps=4, stages=4, **formats):
    """A kernel's Gluon path."""
    return configuration(
        kernel,
        "sm_90",
        stages,
        num_warps=warps,
        tile=Tile.parse(tile),
        problem=asked(kernel, scale_layout="hopper", **formats),
    )


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
@pytest.mark.parametrize(
    ("tile", "warps"),
    [
        ("16x64x128", 4),
        ("128x128x128", 8),
        # Three kernels in one, 3 s each.
        pytest.param("128x128x128+tails2", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stages", [3, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "formats", [{}, {"layer": 2}, {"y_format": "mxfp8"}, {"fast_accum": True}], ids=str
)
def test_lds_of_a_gluon_kernel_is_that_of_its_own_copies(kernel, tile, warps, stages, formats):
    of = on_hopper(kernel, tile, warps, stages, **formats)
    launch = compiler.specialize(of)
    assert_told_what_is_reported(launch)
    # A step of x, of w and of its scales; what y passes through comes after them.
    step = of.tile.block_m * 128 + of.tile.block_n * (64 + 4)
    assert compiler.lds(launch).lds_bytes == stages * step


def test_a_gluon_kernel_is_another_for_each_stage_count():
    launches = [compiler.specialize(on_hopper("moe_gemm_a8w4", stages=n)) for n in (3, 4)]
    assert len({launch.key for launch in launches}) == len({of.ttir_key for of in launches}) == 2


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"stages": 2}, "num_stages: hopper weights take 3 or more"),
        ({"warps": 2}, "num_warps: wgmma takes 4 or a multiple"),
        ({"warps": 16}, "num_warps: each multiplies 16 columns"),
    ],
)
def test_a_schedule_that_a_gluon_kernel_refuses_is_a_compile_error_in_its_words(
    kernel, schedule, words
):
    with pytest.raises(compiler.CompileError, match=words):
        compiler.lds(compiler.specialize(on_hopper(kernel, **schedule)))


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_compiler_is_told_what_a_gluon_launch_passes(capture, kernel, layer, monkeypatch):
    of = on_hopper(kernel, layer=layer, m=512)
    target = targets.get("sm_90")
    told = compiler.specialize(of)
    given = kernels.load(kernel).source(of.problem, of.tile, target).args
    # What launchers are given is x before it is made ready.
    ready = meta(given["x_ptr"]), meta(given["x_scale_ptr"])
    monkeypatch.setattr(mxfp4_hopper, "ready_x", lambda *_: ready)
    monkeypatch.setattr(mxfp4_hopper, "target_name", lambda device: "sm_90")
    before = kernels.load(kernel).source(
        dataclasses.replace(of.problem, scale_layout="rows"), SMALL, target
    )
    x, x_scale = (meta(before.args[name]) for name in ("x_ptr", "x_scale_ptr"))
    positional, options = launcher_arguments(kernel, of.problem, of.tile, target)
    _, w, _, w_scale, *rest = positional
    w = w.view(torch.uint8)
    launcher = getattr(kernels.load(kernel), kernel)
    schedule = {"num_warps": 4, "num_stages": 4}
    launched = capture(target, launcher, x, w, x_scale, w_scale, *rest, **options, **schedule)
    assert launched.source.signature == told.ast.signature
    assert launched.source.constants == told.ast.constants
    assert launched.source.attrs == told.ast.attrs
    assert launched.options == told.options


def specialized(kernel, stages=4, warps=4, **formats):
    return configuration(
        kernel,
        "sm_90",
        stages,
        num_warps=warps,
        tile=Tile.parse("128x256x128+specialized"),
        problem=asked(kernel, **formats),
    )


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w8", "moe_gemm_a8w8_blockscale"])
@pytest.mark.parametrize(("layer", "y_format"), [(1, "bf16"), (2, "fp32")])
def test_a_stage_of_a_specialized_kernel_is_a_step_and_four_fit(kernel, layer, y_format):
    launches = [
        compiler.specialize(specialized(kernel, stages, layer=layer, y_format=y_format))
        for stages in (3, 4, 5)
    ]
    assert_told_what_is_reported(launches[1])
    three, four, five = (compiler.lds(launch).lds_bytes for launch in launches)
    step = 128 * 128 + 256 * 128
    # Barriers, scales of x and what aligns them come on top.
    assert step <= four - three <= step + 1024
    assert four <= targets.get("sm_90").lds_limit < five


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w8", "moe_gemm_a8w8_blockscale"])
def test_a_specialized_kernel_is_asked_for_four_warps(kernel):
    with pytest.raises(compiler.CompileError, match="num_warps: specialized takes 4"):
        compiler.lds(compiler.specialize(specialized(kernel, warps=8)))


def test_a_key_that_is_told_sooner_is_the_same_key():
    known = {}
    told = [
        (compiler.specialize(of).key, compiler.compile_key(of, known))
        for kernel, other in (("moe_gemm_a8w8", "+tma"), ("moe_gemm_a8w4", "+group8"))
        for of in plan.grid(
            kernels=kernel,
            targets="gfx950,sm_90",
            models="all",
            layers="all",
            m="1,512,1536",
            tiles=f"64x128x128,64x128x128{other}",
            warps=4,
            stages="1,3",
            async_copy="both",
        )
        if of.target == "sm_90" or not of.tile.tma
    ]
    assert all(key == sooner for key, sooner in told)
    # Many models and numbers of tokens are the same to the compiler.
    assert len(known) == len({key for key, _ in told}) < len(told) / 2


def test_ttir_that_was_read_back_gives_the_same_lds(monkeypatch):
    launches = [
        compiler.specialize(configuration("moe_gemm_a8w4", stages=stages, async_copy=switch))
        for stages, switch in itertools.product((1, 2, 3), (False, True))
    ]
    assert len({launch.ttir_key for launch in launches}) == 1
    monkeypatch.setattr(pipeline, "_TTIR", {})
    read_back = [compiler.lds(launch) for launch in launches]
    fresh = []
    for launch in launches:
        pipeline._TTIR.clear()
        fresh.append(compiler.lds(launch))
    assert read_back == fresh
    assert len({told.lds_bytes for told in fresh}) > 1


def test_the_ttir_cache_stays_small(monkeypatch):
    monkeypatch.setattr(pipeline, "_TTIR", {})
    monkeypatch.setattr(pipeline, "_TTIR_KEPT", 2)
    for block_n in (16, 32, 64):
        compiler.lds(compiler.specialize(configuration(tile=Tile(16, block_n, 64))))
    assert len(pipeline._TTIR) == 2


def test_an_unknown_lowering_is_compiled_in_full_and_says_so(monkeypatch):
    launch = compiler.specialize(configuration())
    quick = compiler.lds(launch)
    monkeypatch.setattr(pipeline, "CHECKED_LOWERINGS", {})
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


def launcher_arguments(kernel, problem, tile, target):
    """What a caller passes, as tensors without memory: positions and names."""
    args = kernels.load(kernel).source(problem, tile, target).args
    given = {
        name.removesuffix("_ptr"): meta(value)
        for name, value in args.items()
        if isinstance(value, TensorSpec)
    }
    options = {"y_format": problem.y_format}
    if kernel == "ff_a16w16_fused":
        operands = (given[name] for name in ("x", "w_up", "w_down"))
        return (*operands, tile), options | {"gated": problem.swiglu}
    options["num_xcds"] = target.xcds
    if kernel == "fused_gemm_afp4wfp4_a16w16":
        names = ("x_fp4", "w_fp4", "x_fp4_scale", "w_fp4_scale", "x_bf16", "w_bf16")
        if problem.bias:
            # Where programs share a reduction, the sum adds it and not this kernel.
            options["bias_fp4"] = meta(TensorSpec((problem.n,), "fp32"))
            options["bias_bf16"] = meta(TensorSpec((problem.n_bf16,), "fp32"))
        return (*(given[name] for name in names), tile), options
    described = vars(routing.describe(problem, tile))
    route = routing.Routing(
        **{
            name: meta(value) if isinstance(value, TensorSpec) else value
            for name, value in described.items()
        }
    )
    options |= {
        "bias": given["bias"],
        "gather": problem.gather,
        "weighted": problem.weighted,
        "scatter": problem.scatter,
        "swiglu": SwiGLU() if problem.swiglu else None,
    }
    if problem.y_format == "fp8":
        options["y_scale"] = given["y_scale"]
    if problem.scale_layout != "rows":
        options["scale_layout"] = problem.scale_layout
    operands = (given[name] for name in ("x", "w", "x_scale", "w_scale"))
    return (*operands, route, tile), options


@pytest.mark.parametrize(
    ("kernel", "problem", "tile"),
    [
        *(
            (kernel, {"layer": layer, "tp": tp}, "64x128x128")
            for kernel in kernels.KERNELS
            for layer, tp in ((1, 1), (2, 8))
        ),
        # Weights beyond 2 GiB: no pointer range, so no buffer loads on AMD.
        ("moe_gemm_a8w8", {"model": "Llama4 Maverick"}, "64x128x128"),
        *VARIANTS,
    ],
)
@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_the_compiler_is_told_what_a_launch_passes(capture, target, kernel, problem, tile):
    target, tile = targets.get(target), Tile.parse(tile)
    problem = asked(kernel, m=512, **problem)
    told = compiler.specialize(Configuration(kernel, problem, tile, 8, 3, None, target.name))
    positional, named = launcher_arguments(kernel, problem, tile, target)
    launcher = getattr(kernels.load(kernel), kernel)
    launched = capture(target, launcher, *positional, **named, num_warps=8, num_stages=3)
    assert launched.source.signature == told.ast.signature
    assert launched.source.constants == told.ast.constants
    assert launched.source.attrs == told.ast.attrs
    assert launched.options == told.options


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


@pytest.mark.parametrize(
    ("target", "tile"), [("gfx950", Tile(128, 256, 32)), ("sm_90", Tile(64, 128, 64))]
)
def test_full_sees_spills(target, tile):
    """One warp can't hold so large an fp32 accumulator in its registers."""
    crowded = configuration(target=target, tile=tile, num_warps=1, stages=1)
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
        dataclasses.replace(base, problem=asked(base.kernel, layer=2)),
        dataclasses.replace(base, problem=asked(base.kernel, y_format="fp32")),
    ]
    assert len({compiler.specialize(of).key for of in others}) == len(others)
    same = dataclasses.replace(base, problem=asked(base.kernel, m=9728))
    assert compiler.specialize(same).key == compiler.specialize(base).key


def test_a_switch_in_the_environment_is_part_of_the_key(monkeypatch):
    before = compiler.specialize(configuration()).key
    monkeypatch.setenv("TRITON_HIP_USE_BLOCK_PINGPONG", "0")
    assert compiler.specialize(configuration()).key != before


# Launches whose frontend ran in another process.


def as_captured(launch, **changed):
    """Describe a launch by its text, as a captured process writes it down."""
    made = compiler.frontend(launch)
    known = {
        "ir": made.text,
        "stage": made.stage,
        "options": json.dumps(launch.options, default=str),
        "environment": "{}",
        "num_warps": launch.options["num_warps"],
        "num_stages": launch.options["num_stages"],
        "async_copy": launch.async_copy,
        "target": launch.target.name,
    }
    return compiler.specialize(CapturedLaunch(**known | changed))


@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_a_captured_launch_takes_what_the_launch_itself_takes(target):
    switch = compiler.default_async_copy(targets.get(target))
    problem = asked("moe_gemm_a8w8")
    launch = compiler.specialize(
        Configuration("moe_gemm_a8w8", problem, Tile(64, 64, 128), 4, 3, switch, target)
    )
    captured = as_captured(launch)
    told = compiler.lds(launch)
    assert compiler.lds(captured) == told
    assert compiler.full(captured)[0].lds_bytes == told.lds_bytes > 0


def test_the_environment_of_a_captured_launch_holds_while_it_compiles(monkeypatch):
    monkeypatch.setenv("MOELAB_SET", "outside")
    monkeypatch.delenv("MOELAB_UNSET", raising=False)
    problem = asked("moe_gemm_a8w8")
    launch = compiler.specialize(
        Configuration("moe_gemm_a8w8", problem, SMALL, 4, 1, False, "gfx950")
    )
    variables = {"MOELAB_SET": "inside", "MOELAB_UNSET": "inside"}
    with compiler.settings(as_captured(launch, environment=json.dumps(variables))):
        assert {name: os.environ[name] for name in variables} == variables
    assert os.environ["MOELAB_SET"] == "outside"
    assert "MOELAB_UNSET" not in os.environ


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_a_variable_that_names_another_chip_changes_no_byte(target, monkeypatch):
    (question,) = plan.grid(
        kernels="moe_gemm_a8w8", targets=target, tiles="128x128x128", warps=4, m=512, stages=2
    )
    binding._default_options.cache_clear()
    true = compiler.buffers(compiler.specialize(question))[0].lds_bytes
    # Asked by itself, Triton compiles for this one: 65,536 bytes in the place of 67,520.
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "gfx942")
    launch = compiler.specialize(question)
    assert launch.options["arch"] == {"gfx950": "gfx950", "sm_90": "sm90"}[target]
    assert compiler.lds(launch).lds_bytes == true
    assert compiler.full(launch)[0].lds_bytes == true
    binding._default_options.cache_clear()
    assert compiler.default_options(targets.get(target))["arch"] == launch.options["arch"]


def test_machine_code_that_a_user_put_in_its_place_changes_no_register(monkeypatch):
    (question,) = plan.grid(
        kernels="moe_gemm_a8w8", targets="gfx950", tiles=SMALL, warps=4, m=512, stages=1
    )
    true = compiler.full(compiler.specialize(question))
    for name in ("TRITON_SWAP_MIR", "TRITON_DUMP_MIR"):
        monkeypatch.setenv(name, "/proc/nowhere")
    assert compiler.full(compiler.specialize(question)) == true
