"""Every buffer of the LDS, as the compiler's own allocation tells it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from ..specs import Buffer, LdsMap
from .binding import Launch, triton_version
from .pipeline import LAST_ALLOCATION, Allocation, allocated

# The pass that allocates LDS. AMD's is the same; on NVIDIA tensor memory comes later.
_LDS_ALLOCATION = {
    "hip": LAST_ALLOCATION["hip"],
    "cuda": ("nvidia", "ttgpuir", "add_allocate_shared_memory_nv"),
}


class MapError(Exception):
    """What the compiler printed of its buffers and what it did contradict each other."""


# The debug type of Triton's allocation pass, and a name that no pass has.
_ALLOCATION_DEBUG, _NO_DEBUG = "allocation-shared-memory", "none"


def buffers(launch: Launch) -> tuple[Allocation, LdsMap]:
    """Tell the exact LDS of a launch, and every buffer that it is made of.

    The allocation pass tells where and how long each buffer lies as LLVM debug output.
    It is run a second time, alone, to be heard: what `lds` gives never depends on it.

    Returns:
        the allocation, and its map or why there is none.
    Raises:
        CompileError: the compiler rejects the kernel.
        MapError: what was printed disagrees with the module.
    """
    with _noted(*_LDS_ALLOCATION[launch.target.backend]) as scheduled:
        allocation, module = allocated(launch)
    if module is None or not scheduled:
        why = f"how Triton {triton_version()} allocates for {launch.target.name} is not checked"
        return allocation, LdsMap(missing=why)
    offsets = _allocated_offsets(module)
    schedule, arguments = scheduled[-1]
    printed = _allocate_aloud(module, schedule, arguments)
    if "Allocated: " not in printed:
        why = f"this build of Triton {triton_version()} prints no debug output"
        return allocation, LdsMap(missing=why)
    if (total := module.get_int_attr("ttg.shared")) != allocation.lds_bytes:
        raise MapError(f"{total:,} bytes when allocated again, {allocation.lds_bytes:,} before")
    if (again := _allocated_offsets(module)) != offsets:
        raise MapError(f"offsets {again} when allocated again, {offsets} before")
    return allocation, _read_map(module, printed, offsets)


@contextlib.contextmanager
def _noted(module: str, dialect: str, name: str) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Note each scheduling of a pass: the function, and its arguments after the manager."""
    from triton._C import libtriton

    holder = getattr(getattr(libtriton, module).passes, dialect)
    schedule = getattr(holder, name)
    noted: list[tuple[Any, tuple[Any, ...]]] = []

    def schedule_and_note(passes: Any, *arguments: Any) -> None:
        noted.append((schedule, arguments))
        schedule(passes, *arguments)

    setattr(holder, name, schedule_and_note)
    try:
        yield noted
    finally:
        setattr(holder, name, schedule)


def _allocate_aloud(module: Any, schedule: Any, arguments: tuple[Any, ...]) -> str:
    """Allocate a module's LDS once more; return what the pass printed."""
    from triton._C.libtriton import ir

    variable = "TRITON_LLVM_DEBUG_ONLY"
    before = os.environ.get(variable)

    def run(debug: str, schedule: Any, arguments: tuple[Any, ...]) -> None:
        os.environ[variable] = debug
        passes = ir.pass_manager(module.context)
        schedule(passes, *arguments)
        passes.run(module, "buffers")

    with tempfile.TemporaryFile("w+", errors="replace") as file, _stderr_to(file.fileno()):
        try:
            run(_ALLOCATION_DEBUG, schedule, arguments)
        finally:
            # LLVM keeps the last choice until a run makes another: one without passes.
            run(before or _NO_DEBUG, lambda passes: None, ())
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    """Send stderr to a file, with what compiled code prints there."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


_ATTRIBUTES = re.compile(r"allocation\.offset = (\d+) : i32(?:, allocation\.size = (\d+) : i32)?")


def _allocated_offsets(module: Any) -> list[tuple[int, int | None]]:
    """Read the kernel's offsets, and sizes where they are kept, in the order of its text."""
    # Functions of their own (`noinline`) have memory that their calls stand for.
    kernel = re.split(r"^  (?=tt\.func )", module.str_nodebug(), flags=re.MULTILINE)
    text = next(part for part in kernel if part.startswith("tt.func public"))
    return [
        (int(offset), int(size) if size else None) for offset, size in _ATTRIBUTES.findall(text)
    ]


def _read_map(module: Any, printed: str, offsets: list[tuple[int, int | None]]) -> LdsMap:
    """Match what the allocation pass printed of the kernel with the kernel's operations."""
    # Functions come before who calls them; each ends with its total.
    *_, kernel, _ = re.split(r"^Allocated: .*$", printed, flags=re.MULTILINE)
    owners = dict(re.findall(r"^-- buffer (\d+); value: (?:%[^=]* = )?\"?([\w.]+)", kernel, re.M))
    # Printed whenever buffers were moved; the last is where they stayed.
    ranges = re.findall(
        r"^-- (\d+) (\d+) (\d+) interval (\d+) (\d+)$", kernel.split("Dump bufferRange")[-1], re.M
    )
    # Buffers are numbered in the order of the text.
    rows = sorted(tuple(map(int, row)) for row in ranges)
    if len(rows) != len(offsets):
        raise MapError(f"{len(rows)} buffers were printed, {len(offsets)} are in the module")
    operations = _operations(module)
    found = []
    for (number, size, offset, first, last), attributes in zip(rows, offsets, strict=True):
        # Memory of the function itself: the last operation in program order, alive throughout.
        of_function = last > len(operations)
        position = len(operations) - 1 if of_function else first
        operation = operations[position]
        if attributes not in ((offset, size), (offset, None)):
            raise MapError(f"buffer {number}: {size} bytes at {offset}, in the module {attributes}")
        owner = "tt.func" if of_function else owners.get(str(number))
        if operation.get_name() != owner:
            raise MapError(f"buffer {number} of {owner}: {operation.get_name()} is at {position}")
        buffer = _buffer(operation, offset, size, first, min(last, len(operations)))
        if buffer.padding_bytes < 0:
            raise MapError(f"{buffer.name}: {size} bytes for {buffer.copies} x {buffer.shape}")
        found.append(buffer)
    found.sort(key=lambda buffer: (buffer.first, buffer.offset))
    return LdsMap(tuple(found), len(operations))


def _operations(module: Any) -> list[Any]:
    """List the kernel's operations in program order, as the allocation pass counts them."""
    functions: list[list[Any]] = [[]]
    names: list[str] = []

    def visit(operation: Any) -> None:
        functions[-1].append(operation)
        if operation.get_name() == "tt.func":
            names.append(operation.get_str_attr("sym_name"))
            functions.append([])

    module.walk(visit)
    return functions[names.index(module.get_entry_func_name())]


# MLIR's names of types that Triton's frontend calls otherwise.
_DTYPES = {
    "f8E4M3FN": "fp8e4nv",
    "f8E4M3FNUZ": "fp8e4b8",
    "f8E5M2": "fp8e5",
    "f8E5M2FNUZ": "fp8e5b16",
    "f16": "fp16",
    "f32": "fp32",
    "f64": "fp64",
}


def _buffer(operation: Any, offset: int, size: int, first: int, last: int) -> Buffer:
    kind = operation.get_name().rpartition(".")[2]
    line, dtype, rank = "", "", 0
    shape: tuple[int, ...] = ()
    if operation.get_num_results():
        result = operation.get_result(0)
        line = _source(result)[1]
        shape, dtype, rank = _type(str(result.get_type()))
    copies, padding = 1, 0
    if kind == "local_alloc":
        padding = size - math.prod(shape) * _bits(dtype) // 8
        # What is filled where it is made is one tile, whatever its rank.
        if not operation.get_num_operands() and len(shape) > rank:
            copies, shape = shape[0], shape[1:]
    dtype = _DTYPES.get(dtype, dtype)
    name = _name(operation, kind, line, shape, dtype)
    return Buffer(name, kind, line, shape, dtype, copies, padding, offset, size, first, last)


def _name(operation: Any, kind: str, line: str, shape: tuple[int, ...], dtype: str) -> str:
    """Name a buffer as the source does."""
    if kind == "func":
        return "states of warp groups"
    if kind == "call":
        # Triton mangles: module.function__types.
        callee = operation.get_flat_symbol_ref_attr("callee")
        function = re.search(r"\.(\w+?)__", callee)
        return f"call of {function[1] if function else callee}"
    if kind == "warp_specialize":
        return "captures of warp_specialize"
    # What is put there is known by its own name, not by that of what it becomes.
    values = [operation.get_operand(i) for i in range(min(operation.get_num_operands(), 1))]
    values += [operation.get_result(i) for i in range(min(operation.get_num_results(), 1))]
    variable = next((name for value in values if (name := _source(value)[0])), "")
    if kind == "local_alloc":
        if dtype == "i64" and math.prod(shape) == 1:
            kind = "mbarrier"
        elif variable:
            return variable
        else:
            kind = "buffer"
    return f"{kind} of {variable}" if variable else f"{kind} at {line}" if line else kind


def _source(value: Any) -> tuple[str, str]:
    """Read the variable, and the line, that a value comes from; either may be empty."""
    location = str(value.get_loc())
    # Names enclose places; of nested calls the innermost comes first.
    variable = re.search(r'"([^"]+)"\(', location)
    place = re.search(r'"(?:[^"]*/)?([^"/]+)":(\d+):\d+', location)
    return variable[1] if variable else "", f"{place[1]}:{place[2]}" if place else ""


def _type(written: str) -> tuple[tuple[int, ...], str, int]:
    """Read a type's shape and element type, and the rank that its layout has."""
    match = re.match(r"(?:!ttg\.memdesc|tensor)<((?:\d+x)*)(!?[\w.]+)(.*)", written)
    if not match:
        return (), written, 0
    shape = tuple(int(size) for size in match[1].split("x")[:-1])
    layout = match[3]
    if rank := re.search(r"\brank = (\d+)", layout):
        return shape, match[2], int(rank[1])
    # A layout lists its dimensions, or what each bit of an offset adds to each of them.
    listed = re.search(r"\border\s*=\s*\[([^\]]*)\]|\boffset\s*=\s*\[\[([^\]]*)\]", layout)
    # NVIDIA's matrix layouts say only if they are of another rank than 2.
    return shape, match[2], (listed[1] or listed[2]).count(",") + 1 if listed else 2


def _bits(dtype: str) -> int:
    """Count the bits of one element; of pointers, 64."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 64
