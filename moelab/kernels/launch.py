"""What every grouped GEMM's launch has in common: arguments, checks, the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import triton

from ..specs import Problem, Source, Target, TensorSpec, Tile
from . import routing as routing_
from .epilogue import SwiGLU
from .routing import Routing

if TYPE_CHECKING:
    from torch import Tensor

# ROCm/aiter launches its MoE GEMMs with these; they change the layout of operands in LDS.
AMD_OPTIONS = {"waves_per_eu": 0, "matrix_instr_nonkdim": 16, "kpack": 1}

# Row tiles that are visited for every column before the next ones.
GROUP_M = 4

# Weights that at most this many rows use are read once: they pass by the nearest cache.
STREAMED_BLOCK_M = 32


def _arguments(
    y: Any,
    x: Any,
    w: Any,
    own: Mapping[str, Any],
    routing: Routing,
    tile: Tile,
    n: int,
    k: int,
    bias: Any,
    gather: bool,
    weighted: bool,
    swiglu: SwiGLU | None,
    num_xcds: int,
) -> dict[str, Any]:
    """Bind the kernel's parameters: a launch with tensors, the compiler with shapes."""
    activation = swiglu or SwiGLU()
    return {
        "y_ptr": y,
        "x_ptr": x,
        "w_ptr": w,
        **own,
        "bias_ptr": bias,
        "weight_ptr": routing.weight if weighted else None,
        "row_index_ptr": routing.row_index if gather else None,
        "expert_end_ptr": routing.expert_end,
        "tile_count_ptr": routing.tile_count,
        "tile_expert_ptr": routing.tile_expert,
        "tile_row_ptr": routing.tile_row,
        "n": n,
        "k": k,
        "alpha": activation.alpha,
        "limit": activation.limit,
        "shift": activation.shift,
        "top_k": routing.top_k,
        "SWIGLU": swiglu is not None,
        "EVEN_K": k % tile.block_k == 0,
        "W_CACHE": ".cg" if tile.block_m <= STREAMED_BLOCK_M else "",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "NUM_XCDS": num_xcds,
    }


def describe(
    kernel: Any,
    problem: Problem,
    tile: Tile,
    target: Target,
    x_dtype: str,
    w: TensorSpec,
    own: Mapping[str, Any],
) -> Source:
    """Describe a launch of ``kernel`` to the compiler; needs no GPU.

    Args:
        own: the arguments that only this kernel has, by name.
    """
    x_rows = problem.m if problem.gather else problem.rows
    args = _arguments(
        y=TensorSpec((problem.rows, problem.n_out), "bf16"),
        x=TensorSpec((x_rows, problem.k), x_dtype),
        w=w,
        own=own,
        routing=routing_.describe(problem, tile),
        tile=tile,
        n=problem.n,
        k=problem.k,
        bias=TensorSpec((problem.experts, problem.n), "fp32") if problem.bias else None,
        gather=problem.gather,
        weighted=problem.weighted,
        swiglu=SwiGLU() if problem.swiglu else None,
        num_xcds=target.xcds,
    )
    return Source(kernel, args, AMD_OPTIONS if target.backend == "hip" else {})


def launch(
    kernel: Any,
    x: Tensor,
    x_dtypes: Sequence[Any],
    w: Tensor,
    own: Mapping[str, Any],
    routing: Routing,
    tile: Tile,
    *,
    k: int,
    bias: Tensor | None,
    gather: bool,
    weighted: bool,
    swiglu: SwiGLU | None,
    num_warps: int,
    num_stages: int,
    num_xcds: int,
    out_dtype: Any,
) -> Tensor:
    """Check what all grouped GEMMs check, allocate y and launch.

    Args:
        own: the arguments that only this kernel has, by name; already checked.
    Returns:
        ``[rows, n]`` of ``out_dtype`` (None: bf16) in expert order; ``n // 2`` columns
        with ``swiglu``.
    Raises:
        ValueError: an argument disagrees with ``w``; the message shows both.
    """
    import torch

    experts, n, _ = w.shape
    rows = routing.row_index.numel()
    expect("x", x, (rows // routing.top_k if gather else rows, k), x_dtypes, of=w)
    if bias is not None:
        expect("bias", bias, (experts, n), (torch.float32,), of=w)
    tiles = routing.tile_expert.numel()
    sizes = {"row_index": rows, "expert_end": experts, "tile_count": 1, "tile_row": tiles}
    for name, size in sizes.items():
        expect(f"routing.{name}", getattr(routing, name), (size,), (torch.int32,), of=w)
    if routing.block_m != tile.block_m:
        raise ValueError(
            f"tile {tile} has block_m = {tile.block_m}, but the routing was laid out for "
            f"block_m = {routing.block_m}; pass both the same"
        )
    if max(x.numel(), n * k) >= 2**31:
        raise ValueError(
            f"x has {x.numel():,} elements and w {n * k:,} per expert; offsets within either are "
            f"32-bit, so both must stay below {2**31:,}: split the batch or the weight"
        )
    if swiglu is not None and n % 2:
        raise ValueError(f"w has n = {n}; SwiGLU pairs columns and needs n even")
    if out_dtype not in (None, torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}; expected torch.bfloat16 or torch.float32")
    n_out = n // 2 if swiglu else n
    y = torch.empty((rows, n_out), dtype=out_dtype or torch.bfloat16, device=w.device)
    if rows:
        grid = (tiles * triton.cdiv(n, tile.block_n),)
        args = _arguments(
            y, x, w, own, routing, tile, n, k, bias, gather, weighted, swiglu, num_xcds
        )
        options = AMD_OPTIONS if torch.version.hip else {}
        kernel[grid](**args, **options, num_warps=num_warps, num_stages=num_stages)
    return y


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
        raise ValueError(f"{name} is on {tensor.device}; w is on {of.device}")
