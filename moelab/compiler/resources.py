"""What finished machine code takes, read from the code itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..specs import Target


@dataclass(frozen=True)
class Resources:
    """What the finished machine code takes. Per thread unless named otherwise.

    Args:
        registers: vector registers; VGPRs and AGPRs together on CDNA.
        scalar_registers: SGPRs of a wave; None on NVIDIA.
        spilled_registers: vector registers kept in memory; on NVIDIA the stack frame
            in words, as Triton itself counts.
        scratch_bytes: private memory, spills and stack.
        code_bytes: machine code of the kernel.
    """

    registers: int
    scalar_registers: int | None
    spilled_registers: int
    scratch_bytes: int
    code_bytes: int


def read(compiled: Any, target: Target) -> Resources:
    """Read what a compiled kernel takes.

    Args:
        compiled: what ``triton.compile`` returned.
    """
    return _amd_resources(compiled) if target.backend == "hip" else _nvidia_resources(compiled)


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        """Read the code object's metadata (LLVM AMDGPUUsage, code object v5)."""
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return Resources(
        registers=metadata("vgpr_count"),
        scalar_registers=metadata("sgpr_count"),
        spilled_registers=metadata("vgpr_spill_count"),
        scratch_bytes=metadata("private_segment_fixed_size"),
        code_bytes=_code_bytes(compiled.asm["hsaco"]),
    )


def _nvidia_resources(compiled: Any) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    function = usage[usage.index(compiled.metadata.name) :]
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", function)}
    scratch = counts["STACK"] + counts["LOCAL"]
    return Resources(
        registers=counts["REG"],
        scalar_registers=None,
        spilled_registers=scratch // 4,
        scratch_bytes=scratch,
        code_bytes=_code_bytes(compiled.asm["cubin"]),
    )


def _code_bytes(binary: bytes) -> int:
    """Add up the executable sections of an ELF file."""
    from elftools.elf.constants import SH_FLAGS
    from elftools.elf.elffile import ELFFile

    sections = ELFFile(BytesIO(binary)).iter_sections()
    return sum(s["sh_size"] for s in sections if s["sh_flags"] & SH_FLAGS.SHF_EXECINSTR)
