"""Which rows belong to which expert, and which tile each program computes.

Rows are sorted by expert. A tile never spans two experts, so an expert with r rows
has ceil(r / block_m) tiles, the last of them partly empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from ..problems import max_tiles
from ..specs import Problem, TensorSpec, Tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def expert_tile(
    tile_count_ptr,  # [1] tiles of all experts
    tile_expert_ptr,  # [max_tiles] expert of each tile
    tile_row_ptr,  # [max_tiles] first row of each tile
    n,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """Walk from the program id to its tile: (is there one, expert, first row, pid_n).

    Programs that run together share x rows and weight columns: GROUP_M tiles of rows
    are visited for every column before the next group. On chips with several dies
    (XCDs) consecutive programs land on different dies; they are renumbered so that
    neighbours share a die's L2.
    """
    pid = tl.program_id(0)
    tile_count = tl.load(tile_count_ptr)
    num_pid_n = tl.cdiv(n, BLOCK_N)
    programs = tile_count * num_pid_n
    exists = pid < programs
    if NUM_XCDS > 1:
        per_xcd = programs // NUM_XCDS
        extra = programs % NUM_XCDS
        xcd = pid % NUM_XCDS
        pid = xcd * per_xcd + tl.minimum(xcd, extra) + pid // NUM_XCDS
    group = pid // (GROUP_M * num_pid_n)
    first_m = group * GROUP_M
    group_m = tl.maximum(tl.minimum(tile_count - first_m, GROUP_M), 1)
    in_group = pid % (GROUP_M * num_pid_n)
    pid_m = first_m + in_group % group_m
    pid_n = in_group // group_m
    expert = tl.load(tile_expert_ptr + pid_m, mask=exists, other=0)
    row = tl.load(tile_row_ptr + pid_m, mask=exists, other=0)
    return exists, expert, row, pid_n


@triton.jit
def tile_rows(
    row,
    expert,
    expert_end_ptr,  # [experts] one past each expert's last row
    row_index_ptr,  # [rows] token * top_k + slot, or None: x is in expert order
    top_k,
    BLOCK_M: tl.constexpr,
):
    """Find the tile's rows of y, which of them exist, and the rows of x they read.

    Rows past the expert's end read its last one, so that no load needs a mask.
    """
    end = tl.load(expert_end_ptr + expert)
    rows = row + tl.arange(0, BLOCK_M)
    x_rows = tl.minimum(rows, end - 1)
    if row_index_ptr is not None:
        x_rows = tl.load(row_index_ptr + x_rows) // top_k
    return rows, rows < end, x_rows


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, and the tiles that cover them.

    Fields are tensors, or `TensorSpec`s where only the compiler asks.

    Args:
        row_index: ``[rows]`` int32, ``token * top_k + slot`` of each sorted row.
        expert_end: ``[experts]`` int32, one past the last row of each expert.
        weight: ``[rows]`` fp32, routing weight of each sorted row.
        tile_count: ``[1]`` int32.
        tile_expert, tile_row: ``[max_tiles]`` int32; only the first ``tile_count``
            entries mean anything.
        top_k: experts per token.
        block_m: rows per tile.
    """

    row_index: Any
    expert_end: Any
    weight: Any
    tile_count: Any
    tile_expert: Any
    tile_row: Any
    top_k: int
    block_m: int


def describe(problem: Problem, tile: Tile) -> Routing:
    """Give the shapes of a problem's routing, for the compiler."""
    tiles = max_tiles(problem.rows, problem.experts, tile.block_m)
    return Routing(
        row_index=TensorSpec((problem.rows,), "i32"),
        expert_end=TensorSpec((problem.experts,), "i32"),
        weight=TensorSpec((problem.rows,), "fp32"),
        tile_count=TensorSpec((1,), "i32"),
        tile_expert=TensorSpec((tiles,), "i32"),
        tile_row=TensorSpec((tiles,), "i32"),
        top_k=problem.top_k,
        block_m=tile.block_m,
    )


def route(expert: Tensor, weight: Tensor, experts: int, block_m: int) -> Routing:
    """Sort token slots by expert and lay tiles over them.

    Args:
        expert: ``[tokens, top_k]`` integer, the experts that each token visits.
        weight: ``[tokens, top_k]``, how much each counts.
        experts: how many there are.
        block_m: rows per tile.
    Raises:
        ValueError: shapes disagree, or an expert is out of range.
    """
    import torch

    if expert.shape != weight.shape or expert.dim() != 2:
        raise ValueError(
            f"expert {tuple(expert.shape)} and weight {tuple(weight.shape)} must both be "
            "[tokens, top_k]"
        )
    flat = expert.flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < experts:
        raise ValueError(
            f"expert indices span {int(flat.min())} to {int(flat.max())}; "
            f"with experts={experts} they must be 0 to {experts - 1}"
        )
    row_index = torch.argsort(flat, stable=True)
    histogram = torch.bincount(flat, minlength=experts)
    end = histogram.cumsum(0)
    tiles = (histogram + block_m - 1) // block_m
    capacity = max_tiles(flat.numel(), experts, block_m)
    tile_expert = torch.zeros(capacity, dtype=torch.int32, device=flat.device)
    tile_row = torch.zeros_like(tile_expert)
    owner = torch.repeat_interleave(torch.arange(experts, device=flat.device), tiles)
    first_tile = tiles.cumsum(0) - tiles
    within = torch.arange(owner.numel(), device=flat.device) - first_tile[owner]
    tile_expert[: owner.numel()] = owner.int()
    tile_row[: owner.numel()] = ((end - histogram)[owner] + within * block_m).int()
    return Routing(
        row_index=row_index.int(),
        expert_end=end.int(),
        weight=weight.flatten()[row_index].float(),
        tile_count=tiles.sum().int().reshape(1),
        tile_expert=tile_expert,
        tile_row=tile_row,
        top_k=expert.shape[1],
        block_m=block_m,
    )


def per_expert(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    gather: bool,
    finish: Callable[[Tensor, int, slice], Tensor],
) -> Tensor:
    """Multiply each expert's rows by its weight, one plain product per expert.

    Args:
        x: ``[tokens, k]`` if ``gather``, else ``[rows, k]`` in expert order.
        w: ``[experts, n, k]``.
        finish: what happens to (accumulator, expert, its rows) afterwards.
    Returns:
        ``[rows, n_out]`` in expert order, dtype of ``x``.
    """
    import torch

    if gather:
        x = x[routing.row_index.long() // routing.top_k]
    ends = routing.expert_end.tolist()
    parts = []
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        rows = slice(start, end)
        parts.append(finish(x[rows] @ w[expert].T, expert, rows))
    return torch.cat(parts)
