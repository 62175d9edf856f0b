"""Which rows belong to which expert, and which tile each program computes.

Rows are sorted by expert. A tile never spans two experts, so an expert with r rows
has ceil(r / block_m) tiles, the last of them partly empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..problems import max_tiles
from ..specs import Problem, TensorSpec, Tile


@triton.jit
def near_programs(pid, programs, NUM_XCDS: tl.constexpr):
    """Renumber programs, which dies (XCDs) take in turn, so that neighbours share an L2."""
    if NUM_XCDS > 1:
        per_xcd = programs // NUM_XCDS
        extra = programs % NUM_XCDS
        xcd = pid % NUM_XCDS
        pid = xcd * per_xcd + tl.minimum(xcd, extra) + pid // NUM_XCDS
    return pid


@triton.jit
def grouped_block(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Walk GROUP_M rows of blocks, column by column, before the next: (pid_m, pid_n).

    Programs that run together so share rows of x and columns of w.
    """
    first_m = pid // (GROUP_M * num_pid_n) * GROUP_M
    in_group = pid % (GROUP_M * num_pid_n)
    # Of a program past the last block nothing is used, but it must not divide by 0.
    group_m = tl.maximum(tl.minimum(num_pid_m - first_m, GROUP_M), 1)
    return first_m + in_group % group_m, in_group // group_m


@triton.jit
def every_tile(
    compute: tl.constexpr,  # jitted: (expert, first row, pid_n, BLOCK_M, *args)
    args,  # a tuple, without text
    tile_count_ptr,  # [1] tiles of all experts
    tile_expert_ptr,  # [max_tiles] expert of each tile
    tile_row_ptr,  # [max_tiles] first row of each tile
    expert_end_ptr,  # [experts] one past each expert's last row
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    TAILS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Compute this program's tile, or each of its tiles; see `Tile`."""
    tile_count = tl.load(tile_count_ptr)
    num_pid_n = tl.cdiv(n, BLOCK_N)
    programs = tile_count * num_pid_n
    if PERSISTENT:
        # Flattened, the next tile's first loads are under way while this one is stored.
        for pid in tl.range(tl.program_id(0), programs, tl.num_programs(0), flatten=True):
            near = near_programs(pid, programs, NUM_XCDS)
            pid_m, pid_n = grouped_block(near, tile_count, num_pid_n, GROUP_M)
            expert = tl.load(tile_expert_ptr + pid_m)
            row = tl.load(tile_row_ptr + pid_m)
            compute(expert, row, pid_n, BLOCK_M, *args)
    elif tl.program_id(0) < programs:
        near = near_programs(tl.program_id(0), programs, NUM_XCDS)
        pid_m, pid_n = grouped_block(near, tile_count, num_pid_n, GROUP_M)
        expert = tl.load(tile_expert_ptr + pid_m)
        row = tl.load(tile_row_ptr + pid_m)
        left = tl.load(expert_end_ptr + expert) - row
        if TAILS >= 2 and left <= BLOCK_M // 4:
            compute(expert, row, pid_n, BLOCK_M // 4, *args)
        elif TAILS >= 1 and left <= BLOCK_M // 2:
            compute(expert, row, pid_n, BLOCK_M // 2, *args)
        else:
            compute(expert, row, pid_n, BLOCK_M, *args)


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
    """Walk from the program id to its tile: (is there one, expert, first row, pid_n)."""
    pid = tl.program_id(0)
    tile_count = tl.load(tile_count_ptr)
    num_pid_n = tl.cdiv(n, BLOCK_N)
    programs = tile_count * num_pid_n
    exists = pid < programs
    pid = near_programs(pid, programs, NUM_XCDS)
    pid_m, pid_n = grouped_block(pid, tile_count, num_pid_n, GROUP_M)
    expert = tl.load(tile_expert_ptr + pid_m, mask=exists, other=0)
    row = tl.load(tile_row_ptr + pid_m, mask=exists, other=0)
    return exists, expert, row, pid_n


@triton.jit
def tile_rows(
    row,
    expert,
    expert_end_ptr,  # [experts] one past each expert's last row
    gather_ptr,  # [rows] token of each row, or None: x is in expert order
    scatter_ptr,  # [rows] row of y of each row, or None: y is in expert order
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Find the tile's rows, which of them exist, and their rows of x and of y.

    Rows past the expert's end read its last one, so that no load needs a mask.
    """
    end = tl.load(expert_end_ptr + expert)
    return bounded_rows(row + tl.arange(0, BLOCK_M), end, gather_ptr, scatter_ptr, WIDE)


@triton.jit
def bounded_rows(
    rows,  # [BLOCK_M]
    end,  # one past the expert's last
    gather_ptr,
    scatter_ptr,
    WIDE: tl.constexpr,
):
    """Do what `tile_rows` does to rows that are counted already, in whatever layout."""
    row_mask = rows < end
    rows = tl.minimum(rows, end - 1)
    x_rows = rows
    if gather_ptr is not None:
        x_rows = tl.load(gather_ptr + rows)
    y_rows = rows
    if scatter_ptr is not None:
        y_rows = tl.load(scatter_ptr + rows)
    if WIDE:
        x_rows = x_rows.to(tl.int64)
        y_rows = y_rows.to(tl.int64)
    return rows, row_mask, x_rows, y_rows


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, and the tiles that cover them.

    Fields are tensors, or `TensorSpec`s where only the compiler asks.

    Args:
        gather_index: ``[rows]`` int32, the token that each sorted row reads.
        scatter_index: ``[rows]`` int32, where each sorted row goes back to: its
            ``token * top_k + slot``.
        histogram: ``[experts]`` int32, rows of each expert.
        expert_end: ``[experts]`` int32, one past the last row of each expert.
        weight: ``[rows]`` fp32, routing weight of each sorted row.
        tile_count: ``[1]`` int32.
        tile_expert, tile_row: ``[max_tiles]`` int32; only the first ``tile_count``
            entries mean anything.
        top_k: experts per token.
        block_m: rows per tile.
    """

    gather_index: Any
    scatter_index: Any
    histogram: Any
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
        gather_index=TensorSpec((problem.rows,), "i32"),
        scatter_index=TensorSpec((problem.rows,), "i32"),
        histogram=TensorSpec((problem.experts,), "i32"),
        expert_end=TensorSpec((problem.experts,), "i32"),
        weight=TensorSpec((problem.rows,), "fp32"),
        tile_count=TensorSpec((1,), "i32"),
        tile_expert=TensorSpec((tiles,), "i32"),
        tile_row=TensorSpec((tiles,), "i32"),
        top_k=problem.top_k,
        block_m=tile.block_m,
    )
