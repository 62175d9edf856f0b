"""What all launches have in common: options, the program order, checks of arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..specs import Problem, TensorSpec, Tile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# ROCm/aiter launches its MoE GEMMs with these; they change the layout of operands in LDS.
AMD_OPTIONS = {"waves_per_eu": 0, "matrix_instr_nonkdim": 16, "kpack": 1}

# Weights that at most this many rows use are read once: they pass by the nearest cache.
STREAMED_BLOCK_M = 32

# Compute capability of Hopper, the first with a tensor memory accelerator.
TMA_SINCE = (9, 0)

# Offsets into tensors of fewer elements are 32-bit.
WIDE_ELEMENTS = 2**31


def expect(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[Any], of: Tensor
) -> None:
    """Check one tensor argument before anything is launched.

    Args:
        shape: wanted sizes; None takes any.
        dtypes: wanted types, any one of them.
        of: the tensor whose device it must share.
    Raises:
        ValueError: it differs; the message names the argument, what it is and what it
            should be.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{wanted}]")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}; expected {names}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; expected it contiguous: call .contiguous()"
        )
    if tensor.device != of.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {of.device}, where the weight is")


# What a kernel wants of a tile: which part of it, whether it is met, and in words.
TileRule = tuple[str, bool, str]


def expect_tile(tile: Tile) -> None:
    """Check that a tile is one, before any part of it is asked for.

    Raises:
        ValueError: it is something else, such as its text.
    """
    if not isinstance(tile, Tile):
        raise ValueError(f"tile is {tile!r}; expected a Tile, for example Tile(128, 128, 128)")


def check_tile(tile: Tile, rules: Iterable[TileRule], ways: Collection[str] = ()) -> None:
    """Check that a kernel can take a tile: blocks are powers of two, and its own rules.

    Args:
        ways: those of ``tma``, ``tails``, ``persistent`` and ``specialized`` that the kernel has.
    Raises:
        ValueError: it can't; the message shows the tile, what it has and what would fit.
    """
    powers = [
        (name, isinstance(block, int) and block > 0 and block & (block - 1) == 0, "a power of two")
        for name in ("block_m", "block_n", "block_k")
        for block in [getattr(tile, name)]
    ]
    instead = "a specialized tile has ways of its own"
    lacks = instead if tile.specialized and "specialized" in ways else "this kernel does without"
    lacking = [
        (name, name in ways or not getattr(tile, name), f"none: {lacks}")
        for name in ("tma", "tails", "persistent", "specialized")
    ]
    for name, met, wanted in (*powers, *lacking, *rules):
        if not met:
            raise ValueError(f"tile {tile} has {name} = {getattr(tile, name)}; expected {wanted}")


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Tell whether a device has a tensor memory accelerator; the interpreter does as if."""
    import torch

    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= TMA_SINCE


@functools.cache
def target_name(device: torch.device) -> str | None:
    """Name the target that a device is, known to moelab or not; None where it is no GPU."""
    import torch

    if device.type != "cuda":
        return None
    chip = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(chip.gcnArchName).partition(":")[0]
    return f"sm_{chip.major}{chip.minor}"


@functools.cache
def compute_units(device: torch.device) -> int:
    """Count a device's compute units (SMs); the interpreter has one."""
    import torch

    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def described(
    name: str, of: Tensor | TensorSpec, block: tuple[int, int], gluon: bool = False
) -> Any:
    """Describe a tensor's rows to the tensor memory accelerator, of whatever shape they are in.

    Args:
        name: of the argument, for who gave it.
        of: ``[..., k]``, contiguous; k elements take whole 16 bytes.
        block: rows and columns that one load takes.
        gluon: for a Gluon kernel, which is told how fp8 lies in shared memory, 128 bytes a row.
    Raises:
        ValueError: it lies where TMA can't read it, or has more rows than TMA counts.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor

    k = of.shape[-1]
    rows = math.prod(of.shape[:-1])
    # A block that starts at the last row ends beyond it, in the same 32 bits.
    if rows > 2**31 - block[0]:
        raise ValueError(
            f"{name} has {rows} rows; expected 2^31 - {block[0]} at most for TMA: give a tile "
            "without it"
        )
    if past := of.data_ptr() % 16:
        raise ValueError(
            f"{name} starts {past} bytes past a multiple of 16; expected it at one for TMA: call "
            ".clone(), or give a tile without it"
        )
    said = {"base": of, "shape": [rows, k], "strides": [k, 1], "block_shape": list(block)}
    kind: Any = TensorDescriptor
    if gluon:
        kind = GluonDescriptor
        said["layout"] = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    if not isinstance(of, TensorSpec):
        return kind(**said)
    # What makes one asks its tensor for more than Triton's binder does.
    descriptor = object.__new__(kind)
    vars(descriptor).update(said, padding="zero")
    return descriptor


def check_even(name: str, n: int, pairs: bool) -> None:
    """Check that columns which an activation pairs can be paired.

    Raises:
        ValueError: n is odd.
    """
    if pairs and n % 2:
        raise ValueError(f"{name} has n = {n}; its columns are pairs of gate and up: n even")


def check_schedule(num_warps: int, num_stages: int, num_xcds: int = 1) -> None:
    """Check what a launch is given besides its tile.

    Raises:
        ValueError: one is wrong; the message shows it and what would do.
    """
    warps = (1, 2, 4, 8, 16, 32)
    for name, value, met, wanted in (
        ("num_warps", num_warps, num_warps in warps, "one of " + ", ".join(map(str, warps))),
        ("num_stages", num_stages, num_stages >= 1, "1 or more"),
        ("num_xcds", num_xcds, num_xcds >= 1, "1 or more"),
    ):
        if not met:
            raise ValueError(f"{name} is {value!r}; expected {wanted}")


def check_formats(
    problem: Problem,
    x_formats: Sequence[str | None] = (None,),
    y_formats: Sequence[str] = ("bf16",),
    scale_layouts: Sequence[str] = ("rows",),
    fast_accum: bool = False,
) -> None:
    """Check that a kernel takes the formats that a problem has.

    Args:
        fast_accum: whether the kernel can be told how to sum.
    Raises:
        ValueError: it doesn't; the message shows those it takes.
    """
    if not fast_accum:
        check_sums(problem.fast_accum)
    for name, taken in (
        ("x_format", x_formats),
        ("y_format", y_formats),
        ("scale_layout", scale_layouts),
    ):
        one_of(name, getattr(problem, name), taken)


def check_sums(fast_accum: bool) -> None:
    """Check a kernel that can't be told how to sum.

    Raises:
        ValueError: it was told.
    """
    if fast_accum:
        raise ValueError("fast_accum is True; expected False: this kernel sums in one way")


def one_of(name: str, value: str | None, taken: Sequence[str | None]) -> None:
    """Check an argument that names one of a few.

    Raises:
        ValueError: it is none of them; the message shows both.
    """
    if value not in taken:
        wanted = "one of " + ", ".join(map(str, taken)) if len(taken) > 1 else taken[0]
        raise ValueError(f"{name} is {value!r}; expected {wanted or 'none: there is one'}")
