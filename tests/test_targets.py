"""The table of targets against the compilers and headers that Triton ships."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.targets import TARGETS, get

NOT_FIGURES = {"name", "chips", "backend", "arch", "sources"}

every = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
AMD = {name: t for name, t in TARGETS.items() if t.backend == "hip"}
every_amd = pytest.mark.parametrize("target", AMD.values(), ids=AMD)
NVIDIA = {name: t for name, t in TARGETS.items() if t.backend == "cuda"}
every_nvidia = pytest.mark.parametrize("target", NVIDIA.values(), ids=NVIDIA)


def figures(target):
    """Every number of the target that somebody must have published."""
    return {
        field.name: getattr(target, field.name)
        for field in dataclasses.fields(target)
        if field.name not in NOT_FIGURES
    }


@every
def test_a_figure_has_a_source_and_a_missing_one_has_none(target):
    defaults = {field.name: field.default for field in dataclasses.fields(target)}
    filled = {
        key
        for key, value in figures(target).items()
        if value not in (None, {}) and value != defaults[key]
    }
    assert set(target.sources) == filled
    assert all(target.sources.values())


@every
def test_one_workgroup_gets_no_more_than_the_compute_unit_has(target):
    assert 0 < target.lds_limit <= target.lds_per_cu


@every
def test_a_thread_with_every_register_still_fits_its_simd(target):
    step = target.register_granularity
    registers = -(-target.registers_per_thread // step) * step
    assert registers * target.warp_size <= target.registers_per_simd


@every
def test_a_narrower_type_is_never_slower(target):
    peaks = [target.peak_tflops.get(key, 0) for key in ("bf16", "fp8", "mxfp4")]
    known = [peak for peak in peaks if peak]
    assert known == sorted(known)
    assert set(target.peak_tflops) <= {"bf16", "fp8", "mxfp4"}


def test_names_are_unique_and_agree_with_the_architecture():
    assert [t.name for t in TARGETS.values()] == list(TARGETS)
    for name, target in TARGETS.items():
        arch = target.arch if target.backend == "hip" else f"sm_{target.arch}"
        assert name == arch


@pytest.mark.parametrize(
    "wrong, near",
    [("gfx95", "gfx950"), ("sm90", "sm_90"), ("gfx942a", "gfx942"), ("", None)],
)
def test_a_wrong_name_is_answered_with_the_right_ones(wrong, near):
    with pytest.raises(ValueError) as error:
        get(wrong)
    message = str(error.value)
    assert repr(wrong) in message
    assert near is None or f"nearest is {near}." in message
    assert message.endswith(", ".join(TARGETS))


def test_every_name_is_found():
    assert [get(name).name for name in TARGETS] == list(TARGETS)


def test_the_table_needs_no_torch_and_no_triton():
    code = "import moelab.targets, sys; print({'torch', 'triton'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "set()"


# What Triton says without a GPU.


def options(target):
    """Triton's compile options for the target, all at their defaults."""
    compiler = pytest.importorskip("triton.backends.compiler")
    gpu = compiler.GPUTarget(target.backend, target.arch, target.warp_size)
    if target.backend == "hip":
        from triton.backends.amd.compiler import HIPBackend as Backend
    else:
        from triton.backends.nvidia.compiler import CUDABackend as Backend
    return Backend(gpu).parse_options({})


@every
def test_triton_agrees_on_the_warp_size(target):
    assert options(target).warp_size == target.warp_size


@every
def test_triton_takes_the_fp8_type_where_the_hardware_has_fp8(target):
    opts = options(target)
    taken = set(opts.supported_fp8_dtypes) - set(opts.deprecated_fp8_dot_operand_dtypes)
    if target.backend == "cuda" and target.arch < 89:
        assert target.fp8 not in taken
        assert "fp8" not in target.peak_tflops
    else:
        assert target.fp8 in taken


@pytest.mark.parametrize("name, clock_khz", [("gfx942", 2_100e3), ("gfx950", 2_400e3)])
def test_amd_peaks_agree_with_tritons_profiler(name, clock_khz):
    specs = pytest.importorskip("triton.profiler.specs")
    target = get(name)
    for key, bits in (("bf16", 16), ("fp8", 8), ("mxfp4", 4)):
        if key in target.peak_tflops:
            flops = specs.max_flops("HIP", name, bits, target.compute_units, clock_khz)
            assert target.peak_tflops[key] == pytest.approx(flops / 1e12, rel=1e-4)
    assert target.bandwidth_tbps == specs.max_bps("HIP", name, None, None) / 1e12


# AMD: what LLVM, as shipped with Triton, makes of a kernel that uses one resource.


def compile_amd(target, lds_bytes=16, vgprs=None, waves=8):
    """Assembly of a kernel with so much LDS, so many VGPRs, so many waves."""
    compiler = pytest.importorskip("triton.backends.amd.compiler")
    if not hasattr(compiler, "compile_amdgpu"):
        pytest.skip("this Triton compiles AMDGPU otherwise")
    triple = compiler.get_amd_codegen_target_triple(target.arch)
    threads = waves * target.warp_size
    clobber = f'call void asm sideeffect "", "~{{v{vgprs - 1}}}"()' if vgprs else ""
    source = f"""
        target triple = "{triple}"
        @lds = internal addrspace(3) global [{lds_bytes} x i8] undef, align 16
        define amdgpu_kernel void @kernel() #0 {{
          store volatile i32 1, ptr addrspace(3) @lds
          {clobber}
          ret void
        }}
        attributes #0 = {{ "target-cpu"="{target.arch}" "amdgpu-waves-per-eu"="1"
                           "amdgpu-flat-work-group-size"="{threads},{threads}" }}
    """
    return compiler.compile_amdgpu(
        source,
        triple,
        target.arch,
        "",
        flags=[],
        enable_fp_fusion=False,
        disable_optimization=False,
        canonicalize_gep=False,
        disabled_passes="",
        dump_ir=False,
        enable_timing=False,
    )


def occupancy(assembly):
    """Waves per SIMD that LLVM expects."""
    return int(re.search(r"; Occupancy: *(\d+)", assembly)[1])


@every_amd
def test_llvm_refuses_one_byte_more_than_the_lds_limit(target, capfd):
    compile_amd(target, lds_bytes=target.lds_limit)
    assert "exceeds limit" not in capfd.readouterr().err
    compile_amd(target, lds_bytes=target.lds_limit + 1)
    assert f"exceeds limit ({target.lds_limit})" in capfd.readouterr().err


@every_amd
def test_llvm_agrees_on_the_waves_that_registers_allow(target):
    step = target.register_granularity
    # Every granule is a multiple of 8: the count can only change just above one.
    for vgprs in sorted({*range(8, 257, 8), *range(1, 257, 8)}):
        registers = -(-vgprs // step) * step
        waves = target.registers_per_simd // (registers * target.warp_size)
        expected = min(waves, target.max_warps_per_simd)
        found = occupancy(compile_amd(target, vgprs=vgprs, waves=1))
        assert found == expected, f"{vgprs} VGPRs: LLVM {found}, table {expected}"


@every_amd
@pytest.mark.parametrize("lds_bytes", [16_384, 32_768, 65_536])
def test_llvm_agrees_on_the_waves_that_lds_allows(target, lds_bytes):
    workgroups = target.lds_per_cu // lds_bytes
    waves = workgroups * 8 // target.simds_per_cu
    found = occupancy(compile_amd(target, lds_bytes=lds_bytes, waves=8))
    assert found == min(waves, target.max_warps_per_simd)


@every_amd
def test_llvm_agrees_on_the_workgroups_that_barriers_allow(target):
    waves = target.max_workgroups_per_cu * 2 // target.simds_per_cu
    found = occupancy(compile_amd(target, waves=2))
    assert found == min(waves, target.max_warps_per_simd)


# NVIDIA: CUDA's own occupancy calculator, a header that Triton ships.


@every_nvidia
def test_cudas_occupancy_calculator_agrees(target, tmp_path):
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None or not (include / "cuda_occupancy.h").exists():
        pytest.skip("needs a C compiler and cuda_occupancy.h")
    major, minor = divmod(target.arch, 10)
    (tmp_path / "ask.c").write_text(f"""
        #include <stdio.h>
        #include <string.h>
        #include "cuda_occupancy.h"
        int main(void) {{
          cudaOccDeviceProp prop;
          memset(&prop, 0, sizeof prop);
          prop.computeMajor = {major};
          prop.computeMinor = {minor};
          size_t most = {target.lds_per_cu}, more = most + 1;
          int blocks, parts, granule;
          cudaOccMaxBlocksPerMultiprocessor(&blocks, &prop);
          cudaOccSubPartitionsPerMultiprocessor(&parts, &prop);
          cudaOccRegAllocationGranularity(&granule, &prop);
          int fits = cudaOccAlignUpShmemSizeVoltaPlus(&most, &prop);
          int exceeds = cudaOccAlignUpShmemSizeVoltaPlus(&more, &prop);
          printf("%d %d %d %zu %d %d", blocks, parts, granule, most, fits, !!exceeds);
          return 0;
        }}
    """)
    binary = tmp_path / "ask"
    subprocess.run([cc, f"-I{include}", tmp_path / "ask.c", "-o", binary], check=True)
    said = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    blocks, parts, granule, most, error, exceeds = map(int, said.split())
    assert blocks == target.max_workgroups_per_cu
    assert parts == target.simds_per_cu
    assert granule == target.register_granularity * target.warp_size
    assert (most, error, exceeds) == (target.lds_per_cu, 0, 1)


@every_nvidia
def test_cuda_reserves_one_kib_of_every_block(target):
    assert target.lds_per_cu - target.lds_limit == 1024
