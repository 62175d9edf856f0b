"""What each GPU has, as data: the compiler's targets, present or not.

`lds_limit` is what Triton's launcher compares a kernel with and names in its message
"out of resource: shared memory": ``hipDeviceProp_t.sharedMemPerBlock`` on AMD,
``CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`` on NVIDIA (triton 3.9.0,
compiler/compiler.py ``CompiledKernel._init_handles``, both backends' driver.c).

What a compute unit is, per vendor:

- CDNA and gfx1250: one CU; its workgroups share its LDS.
- RDNA (gfx11, gfx12): one workgroup processor (WGP), two CUs with 128 KiB of LDS
  between them, because Triton compiles in WGP mode unless told otherwise and HIP
  counts WGPs as multiprocessors. One workgroup still gets 64 KiB.
- NVIDIA: one SM. CUDA takes 1 KiB of its shared memory for every resident block, so
  n blocks fit where ``n * (shared + 1024) <= lds_per_cu``.

On AMD `max_workgroups_per_cu` counts barriers: a workgroup of a single wave needs
none, so only the waves limit it.

To add a target, copy the entry of its nearest relative and cite every figure.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from .specs import Target

_LLVM = "LLVM lib/Target/AMDGPU/Utils/AMDGPUBaseInfo.cpp"
_ROCM = "ROCm documentation, GPU hardware specifications (gpu-arch-specs)"
_CCCL = "NVIDIA CCCL libcudacxx/include/cuda/__device/arch_traits.h"
_OCCUPANCY = "CUDA toolkit cuda_occupancy.h"
_ASYNC_COPY = "triton 3.9.0: kernels compile to the end with use_async_copy; elsewhere they fail"
_TRITON_LDS = (
    "triton third_party/amd/lib TargetFeatures::getSharedMemorySize; LLVM AMDGPU.td "
    "FeatureAddressableLocalMemorySize"
)
_NO_FP8 = "no fp8 in the matrix units; fp8e4nv is the OCP type, "

_AMD = {
    "warp_size": "triton 3.9.0 backends/amd/compiler.py HIPOptions",
    "lds_limit": _TRITON_LDS,
    "lds_per_cu": f"{_LLVM} getLocalMemorySize; {_ROCM}, LDS",
    "registers_per_thread": f"{_LLVM} getAddressableNumVGPRs",
    "registers_per_simd": f"{_LLVM} getTotalNumVGPRs x warp size",
    "register_granularity": f"{_LLVM} getVGPRAllocGranule",
    "simds_per_cu": f"{_LLVM} getEUsPerCU",
    "max_warps_per_simd": f"{_LLVM} getMaxWavesPerEU",
    "max_workgroups_per_cu": f"{_LLVM} getMaxWorkGroupsPerCU",
}
_CDNA = _AMD | {
    "registers_per_thread": f"{_LLVM} getTotalNumVGPRs: 256 VGPRs and 256 AGPRs",
    "registers_per_simd": (
        f"{_LLVM} getTotalNumVGPRs, 512 x 64 lanes; {_ROCM}, VGPR file of 512 KiB per CU of 4 SIMDs"
    ),
    "compute_units": f"{_ROCM}, Compute Units",
}
_RDNA = _AMD | {
    "registers_per_simd": (
        f"{_LLVM} getTotalNumVGPRs, 1536 x 32 lanes; {_ROCM}, VGPR file of 768 KiB per "
        "WGP of 4 SIMDs"
    ),
    "simds_per_cu": f"{_LLVM} getEUsPerCU: 4 per WGP in WGP mode",
    "compute_units": f"{_ROCM}, Compute Units / 2, two CUs to a WGP",
}
_NVIDIA = {
    "warp_size": f"{_CCCL} warp_size",
    "lds_limit": f"{_CCCL} max_shared_memory_per_block_optin",
    "lds_per_cu": f"{_CCCL} max_shared_memory_per_multiprocessor",
    "registers_per_thread": f"{_CCCL} max_registers_per_thread",
    "registers_per_simd": f"{_CCCL} max_registers_per_multiprocessor / 4 sub-partitions",
    "register_granularity": (f"{_OCCUPANCY} cudaOccRegAllocationGranularity: 256 per warp of 32"),
    "simds_per_cu": f"{_OCCUPANCY} cudaOccSubPartitionsPerMultiprocessor",
    "max_warps_per_simd": f"{_CCCL} max_warps_per_multiprocessor / 4 sub-partitions",
    "max_workgroups_per_cu": (
        f"{_CCCL} max_blocks_per_multiprocessor; {_OCCUPANCY} cudaOccMaxBlocksPerMultiprocessor"
    ),
    "fp8": "triton 3.9.0 backends/nvidia/compiler.py parse_options, from sm_89",
}

_TABLE = (
    Target(
        name="gfx90a",
        chips=("MI210", "MI250", "MI250X"),
        backend="hip",
        arch="gfx90a",
        warp_size=64,
        lds_limit=65_536,
        lds_per_cu=65_536,
        registers_per_thread=512,
        registers_per_simd=32_768,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=8,
        max_workgroups_per_cu=16,
        compute_units=104,
        peak_tflops={"bf16": 181.0},
        bandwidth_tbps=1.6,
        fp8="fp8e4nv",
        sources=_CDNA
        | {
            "peak_tflops": (
                "AMD lab notes, AMD matrix cores: 1024 FLOP/clock/CU in bf16 x 104 CUs "
                "x 1.7 GHz (AnandTech, AMD Releases Instinct MI210)"
            ),
            "bandwidth_tbps": "AnandTech, AMD Releases Instinct MI210 Accelerator",
            "fp8": _NO_FP8 + "emulated (triton 3.9.0 backends/amd/compiler.py)",
        },
    ),
    Target(
        name="gfx942",
        chips=("MI300X", "MI325X", "MI300A"),
        backend="hip",
        arch="gfx942",
        warp_size=64,
        lds_limit=65_536,
        lds_per_cu=65_536,
        registers_per_thread=512,
        registers_per_simd=32_768,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=8,
        max_workgroups_per_cu=16,
        compute_units=304,
        peak_tflops={"bf16": 1307.4, "fp8": 2614.9},
        bandwidth_tbps=5.3,
        fp8="fp8e4b8",
        xcds=8,
        async_copy_switch=True,
        sources=_CDNA
        | {
            "async_copy_switch": _ASYNC_COPY,
            "xcds": f"{_ROCM}, XCDs; AMD CDNA white papers: eight accelerator dies",
            "peak_tflops": (
                "triton 3.9.0 profiler/specs.py: 4096 FLOP/clock/CU in fp8, half in bf16, "
                "x 304 CUs x 2.1 GHz (rocminfo of an MI300X)"
            ),
            "bandwidth_tbps": "triton 3.9.0 profiler/specs.py amd_bps_by_arch",
            "fp8": "triton 3.9.0 backends/amd/compiler.py HIPOptions: UZ kinds on CDNA3",
        },
    ),
    Target(
        name="gfx950",
        chips=("MI355X", "MI350X"),
        backend="hip",
        arch="gfx950",
        warp_size=64,
        lds_limit=163_840,
        lds_per_cu=163_840,
        registers_per_thread=512,
        registers_per_simd=32_768,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=8,
        max_workgroups_per_cu=16,
        compute_units=256,
        peak_tflops={"bf16": 2516.6, "fp8": 5033.2, "mxfp4": 10066.3},
        bandwidth_tbps=8.0,
        fp8="fp8e4nv",
        xcds=8,
        async_copy_switch=True,
        sources=_CDNA
        | {
            "async_copy_switch": _ASYNC_COPY,
            "xcds": f"{_ROCM}, XCDs; AMD CDNA white papers: eight accelerator dies",
            "peak_tflops": (
                "triton 3.9.0 profiler/specs.py: 8192 FLOP/clock/CU in fp8 x 256 CUs x "
                "2.4 GHz (svethardware.cz, MI355X); bf16 half and MXFP4 twice that (AMD, "
                "Matrix Core Programming on CDNA3 and CDNA4)"
            ),
            "bandwidth_tbps": "triton 3.9.0 profiler/specs.py amd_bps_by_arch",
            "fp8": "triton 3.9.0 backends/amd/compiler.py HIPOptions: OCP from CDNA4",
        },
    ),
    Target(
        name="gfx1250",
        # LLVM AMDGPUUsage, Processors, names no product yet.
        chips=(),
        backend="hip",
        arch="gfx1250",
        warp_size=32,
        lds_limit=327_680,
        lds_per_cu=327_680,
        registers_per_thread=1024,
        registers_per_simd=32_768,
        register_granularity=16,
        simds_per_cu=4,
        max_warps_per_simd=16,
        max_workgroups_per_cu=16,
        compute_units=None,
        peak_tflops={},
        bandwidth_tbps=None,
        fp8="fp8e4nv",
        async_copy_switch=True,
        sources=_AMD
        | {
            "async_copy_switch": _ASYNC_COPY,
            "lds_per_cu": f"{_LLVM} getLocalMemorySize",
            "registers_per_thread": "LLVM AMDGPU.td Feature1024AddressableVGPRs",
            "fp8": ("triton 3.9.0 backends/amd/compiler.py HIPOptions: OCP from CDNA4, RDNA4"),
        },
    ),
    Target(
        name="gfx1100",
        chips=("RX 7900 XTX", "RX 7900 XT", "PRO W7900"),
        backend="hip",
        arch="gfx1100",
        warp_size=32,
        lds_limit=65_536,
        lds_per_cu=131_072,
        registers_per_thread=256,
        registers_per_simd=49_152,
        register_granularity=24,
        simds_per_cu=4,
        max_warps_per_simd=16,
        max_workgroups_per_cu=32,
        compute_units=48,
        peak_tflops={"bf16": 122.9},
        bandwidth_tbps=0.96,
        fp8="fp8e4nv",
        sources=_RDNA
        | {
            "peak_tflops": (
                "GPUOpen, Using the Matrix Cores of AMD RDNA 4: 512 FLOP/clock/CU in bf16 "
                "x 96 CUs x 2.5 GHz boost (hmc-tech.com, RX 7900 XTX)"
            ),
            "bandwidth_tbps": "cputronic.com, RX 7900 XTX",
            "fp8": _NO_FP8 + "emulated (triton 3.9.0 backends/amd/compiler.py)",
        },
    ),
    Target(
        name="gfx1201",
        chips=("RX 9070 XT", "RX 9070", "AI PRO R9700"),
        backend="hip",
        arch="gfx1201",
        warp_size=32,
        lds_limit=65_536,
        lds_per_cu=131_072,
        registers_per_thread=256,
        registers_per_simd=49_152,
        register_granularity=24,
        simds_per_cu=4,
        max_warps_per_simd=16,
        max_workgroups_per_cu=32,
        compute_units=32,
        peak_tflops={"bf16": 194.6},
        bandwidth_tbps=0.64,
        fp8="fp8e4nv",
        sources=_RDNA
        | {
            "peak_tflops": (
                "GPUOpen, Using the Matrix Cores of AMD RDNA 4: 1024 FLOP/clock/CU in "
                "bf16 x 64 CUs x 2.97 GHz boost (hmc-tech.com, RX 9070 XT)"
            ),
            "bandwidth_tbps": "multiplayer.it, RX 9070 XT: 20 Gbps x 256 bit",
            "fp8": "triton 3.9.0 backends/amd/compiler.py HIPOptions: OCP from RDNA4",
        },
    ),
    Target(
        name="sm_80",
        chips=("A100 SXM 80GB", "A100 SXM 40GB"),
        backend="cuda",
        arch=80,
        warp_size=32,
        lds_limit=166_912,
        lds_per_cu=167_936,
        registers_per_thread=255,
        registers_per_simd=16_384,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=16,
        max_workgroups_per_cu=32,
        compute_units=108,
        peak_tflops={"bf16": 312.0},
        bandwidth_tbps=2.039,
        fp8="fp8e4nv",
        sources=_NVIDIA
        | {
            "compute_units": "stas00/ml-engineering compute/accelerator, A100-80GB",
            "peak_tflops": "triton 3.9.0 profiler/specs.py flops_by_device, 80",
            "bandwidth_tbps": "NVIDIA A100 data sheet, per glennklockwood.com, A100",
            "fp8": _NO_FP8 + "which Triton refuses below sm_89",
        },
    ),
    Target(
        name="sm_86",
        chips=("A10", "A40", "RTX 3090"),
        backend="cuda",
        arch=86,
        warp_size=32,
        lds_limit=101_376,
        lds_per_cu=102_400,
        registers_per_thread=255,
        registers_per_simd=16_384,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=12,
        max_workgroups_per_cu=16,
        compute_units=72,
        peak_tflops={"bf16": 125.0},
        bandwidth_tbps=0.6,
        fp8="fp8e4nv",
        sources=_NVIDIA
        | {
            "compute_units": "sysrqmts.com, NVIDIA A10 PCIe",
            "peak_tflops": (
                "NVIDIA GA102 white paper, table 6: 1024 FLOP/clock/SM in fp16 x 72 SMs x "
                "1.695 GHz boost (sysrqmts.com, NVIDIA A10 PCIe)"
            ),
            "bandwidth_tbps": "sysrqmts.com, NVIDIA A10 PCIe",
            "fp8": _NO_FP8 + "which Triton refuses below sm_89",
        },
    ),
    Target(
        name="sm_89",
        chips=("L40S", "L4", "RTX 4090"),
        backend="cuda",
        arch=89,
        warp_size=32,
        lds_limit=101_376,
        lds_per_cu=102_400,
        registers_per_thread=255,
        registers_per_simd=16_384,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=12,
        max_workgroups_per_cu=24,
        compute_units=142,
        peak_tflops={"bf16": 362.0, "fp8": 733.0},
        bandwidth_tbps=0.864,
        fp8="fp8e4nv",
        sources=_NVIDIA
        | {
            "compute_units": "568 tensor cores / 4, per the L40S table of mullet.se",
            "peak_tflops": "NVIDIA L40S data sheet, without sparsity, per mullet.se",
            "bandwidth_tbps": "NVIDIA L40S data sheet, per mullet.se",
        },
    ),
    Target(
        name="sm_90",
        chips=("H100 SXM", "H200 SXM"),
        backend="cuda",
        arch=90,
        warp_size=32,
        lds_limit=232_448,
        lds_per_cu=233_472,
        registers_per_thread=255,
        registers_per_simd=16_384,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=16,
        max_workgroups_per_cu=32,
        compute_units=132,
        peak_tflops={"bf16": 989.4, "fp8": 1978.9},
        bandwidth_tbps=3.35,
        fp8="fp8e4nv",
        sources=_NVIDIA
        | {
            "compute_units": "glennklockwood.com, H100 SXM5, after NVIDIA",
            "peak_tflops": "glennklockwood.com, H100 SXM5, after NVIDIA, not sparse",
            "bandwidth_tbps": "hpctech.co.jp, NVIDIA H100 SXM",
        },
    ),
    Target(
        # Tensor memory is a second budget, `tmem_size`: Triton allows 512 columns.
        name="sm_100",
        chips=("B200",),
        backend="cuda",
        arch=100,
        warp_size=32,
        lds_limit=232_448,
        lds_per_cu=233_472,
        registers_per_thread=255,
        registers_per_simd=16_384,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=16,
        max_workgroups_per_cu=32,
        compute_units=148,
        peak_tflops={"bf16": 2250.0, "fp8": 4500.0, "mxfp4": 9000.0},
        bandwidth_tbps=7.67,
        fp8="fp8e4nv",
        sources=_NVIDIA
        | {
            "lds_limit": (
                f"{_CCCL} max_shared_memory_per_block_optin; NVIDIA Blackwell Tuning "
                "Guide, Unified Shared Memory/L1/Texture Cache"
            ),
            "compute_units": "CUDA device query of a B200, quoted by pytorch/ao",
            "peak_tflops": "pytorch/ao torchao/testing/training/roofline_utils.py",
            "bandwidth_tbps": (
                "CUDA device query of a B200, quoted by pytorch/ao: 7680 bits at 3996 MHz, "
                "double data rate; NVIDIA rounds to 8"
            ),
        },
    ),
    Target(
        name="sm_120",
        chips=("RTX 5090", "RTX PRO 6000 Blackwell"),
        backend="cuda",
        arch=120,
        warp_size=32,
        lds_limit=101_376,
        lds_per_cu=102_400,
        registers_per_thread=255,
        registers_per_simd=16_384,
        register_granularity=8,
        simds_per_cu=4,
        max_warps_per_simd=12,
        max_workgroups_per_cu=24,
        compute_units=170,
        peak_tflops={},
        bandwidth_tbps=1.792,
        fp8="fp8e4nv",
        sources=_NVIDIA
        | {
            "compute_units": "Linux Format, May 2025, Nvidia GeForce RTX 5090",
            "bandwidth_tbps": "Linux Format, May 2025, Nvidia GeForce RTX 5090",
        },
    ),
)

TARGETS: dict[str, Target] = {target.name: target for target in _TABLE}


def get(name: str) -> Target:
    """Look up a target.

    Args:
        name: as the table spells it.
    Raises:
        ValueError: no such target; the message has the nearest name and every name.

    >>> get("gfx950").lds_limit
    163840
    """
    if name in TARGETS:
        return TARGETS[name]
    nearest = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"no target named {name!r}; the nearest is {nearest}. Targets: {', '.join(TARGETS)}"
    )


@dataclass(frozen=True)
class Occupancy:
    """How much of a kernel is resident at once, and what stops more.

    Args:
        limit: ``lds``, ``registers``, ``warps`` or ``workgroups``.
    """

    workgroups_per_cu: int
    warps_per_simd: float
    limit: str


def occupancy(target: Target, lds_bytes: int, registers: int, num_warps: int) -> Occupancy:
    """Bound the workgroups that one compute unit holds, by each of its resources.

    Args:
        lds_bytes: of one workgroup.
        registers: vector registers per thread.

    >>> occupancy(get("gfx950"), lds_bytes=65536, registers=128, num_warps=8)
    Occupancy(workgroups_per_cu=2, warps_per_simd=4.0, limit='lds')
    """
    reserved = 1024 if target.backend == "cuda" else 0
    granule = target.register_granularity
    per_warp = -(-max(registers, 1) // granule) * granule * target.warp_size
    limits = {
        "lds": target.lds_per_cu // max(lds_bytes + reserved, 1),
        "registers": target.registers_per_simd // per_warp * target.simds_per_cu // num_warps,
        "warps": target.max_warps_per_simd * target.simds_per_cu // num_warps,
    }
    # AMD's limit counts barriers, which a workgroup of one wave does without.
    if target.backend == "cuda" or num_warps > 1:
        limits["workgroups"] = target.max_workgroups_per_cu
    limit = min(limits, key=limits.__getitem__)
    workgroups = limits[limit]
    return Occupancy(workgroups, workgroups * num_warps / target.simds_per_cu, limit)
