"""The compiler's view of a routing, a tile's rows, and the programs' walk over tiles."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from moelab.kernels.router import route
from moelab.kernels.routing import describe, expert_tile, tile_rows
from moelab.problems import max_tiles
from moelab.specs import Problem, TensorSpec, Tile
from moelab.workloads import draw

TYPES = {"i32": torch.int32, "fp32": torch.float32}


@pytest.mark.parametrize("m", [0, 3, 100])
def test_the_compiler_is_told_the_shapes_that_a_launch_gets(m, generator):
    problem = Problem("test", 1, 1, m, 12, 4, 64, 64, gather=True, swiglu=True, weighted=False)
    told = describe(problem, Tile(16, 32, 64))
    given = route(*draw("uniform", m, 12, 4, generator), experts=12, block_m=16)
    assert told.block_m == given.block_m
    assert told.top_k == given.top_k
    for name, spec in vars(told).items():
        if isinstance(spec, TensorSpec):
            tensor = getattr(given, name)
            assert (spec.shape, TYPES[spec.dtype]) == (tuple(tensor.shape), tensor.dtype), name


def test_max_tiles_is_the_worst_of_all_distributions():
    """Every way to deal few rows to few experts, counted one by one."""
    for experts, rows, block_m in itertools.product((1, 2, 3, 4), range(10), (1, 2, 4)):
        worst = max(
            sum(-(-count // block_m) for count in counts)
            for counts in itertools.product(range(rows + 1), repeat=experts)
            if sum(counts) == rows
        )
        got = max_tiles(rows, experts, block_m)
        assert got == worst, f"{rows} rows, {experts} experts, block_m {block_m}"


@triton.jit
def _rows(
    found_ptr,  # [4, BLOCK_M] int64: rows, whether they exist, rows of x and of y
    row,
    expert,
    expert_end_ptr,
    gather_ptr,
    scatter_ptr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows, row_mask, x_rows, y_rows = tile_rows(
        row, expert, expert_end_ptr, gather_ptr, scatter_ptr, BLOCK_M, WIDE
    )
    if WIDE:
        tl.static_assert(x_rows.dtype == tl.int64)
        tl.static_assert(y_rows.dtype == tl.int64)
    pointers = found_ptr + tl.arange(0, BLOCK_M)
    tl.store(pointers, rows.to(tl.int64))
    tl.store(pointers + BLOCK_M, row_mask.to(tl.int64))
    tl.store(pointers + 2 * BLOCK_M, x_rows.to(tl.int64))
    tl.store(pointers + 3 * BLOCK_M, y_rows.to(tl.int64))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_a_tile_finds_its_rows_and_repeats_the_last(gather, scatter, wide, device, generator):
    """Expert 1 has rows 5 to 16; its second tile of 8 starts at 13 and has 4."""
    expert_end = torch.tensor([5, 17, 40], dtype=torch.int32, device=device)
    gather_index, scatter_index = (
        torch.randperm(40, generator=generator).int().to(device) for _ in range(2)
    )
    found = torch.full((4, 8), -1, device=device)
    _rows[(1,)](
        found,
        13,
        1,
        expert_end,
        gather_index if gather else None,
        scatter_index if scatter else None,
        BLOCK_M=8,
        WIDE=wide,
    )
    rows, row_mask, x_rows, y_rows = found.tolist()
    expected = [13, 14, 15, 16, 16, 16, 16, 16]
    assert rows == expected
    assert row_mask == [1, 1, 1, 1, 0, 0, 0, 0]
    assert x_rows == (gather_index[expected].tolist() if gather else expected)
    assert y_rows == (scatter_index[expected].tolist() if scatter else expected)


@triton.jit
def _walk(
    visits_ptr,  # [programs, 4] int32: exists, expert, row, pid_n
    tile_count_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    n,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    exists, expert, row, pid_n = expert_tile(
        tile_count_ptr, tile_expert_ptr, tile_row_ptr, n, BLOCK_N, GROUP_M, NUM_XCDS
    )
    visit_ptr = visits_ptr + 4 * tl.program_id(0)
    tl.store(visit_ptr, exists.to(tl.int32))
    tl.store(visit_ptr + 1, expert)
    tl.store(visit_ptr + 2, row)
    tl.store(visit_ptr + 3, pid_n)


def walk(device, tiles, columns, num_xcds, spare=0):
    """List each program's (expert, row, pid_n), None where it has no tile; n is ragged."""
    programs = (tiles + spare) * columns
    visits = torch.full((programs, 4), -1, dtype=torch.int32, device=device)
    expert = torch.arange(tiles + spare, dtype=torch.int32, device=device)
    count = torch.tensor([tiles], dtype=torch.int32, device=device)
    _walk[(programs,)](
        visits, count, expert, 100 * expert, 32 * columns - 5, 32, Tile.group_m, num_xcds
    )
    return [tuple(visit) if exists else None for exists, *visit in visits.tolist()]


# 1 and 3 are fewer than 8 XCDs and less than a group; 5 and 9 leave a group of one.
every_grid = pytest.mark.parametrize(
    ("tiles", "columns"), [(1, 1), (3, 1), (1, 3), (5, 3), (8, 2), (9, 1), (7, 2)]
)


@every_grid
def test_a_group_of_rows_is_visited_for_every_column_before_the_next(tiles, columns, device):
    expected = [
        (tile, 100 * tile, column)
        for group in range(0, tiles, Tile.group_m)
        for column in range(columns)
        for tile in range(group, min(group + Tile.group_m, tiles))
    ]
    assert walk(device, tiles, columns, num_xcds=1) == expected


@every_grid
def test_each_xcd_takes_neighbours_and_none_twice(tiles, columns, device):
    order = walk(device, tiles, columns, num_xcds=1)
    visits = walk(device, tiles, columns, num_xcds=8)
    assert sorted(visits) == sorted(order)
    for xcd in range(8):
        places = [order.index(visit) for visit in visits[xcd::8]]
        assert places == list(range(places[0], places[0] + len(places))) if places else True


@pytest.mark.parametrize("num_xcds", [1, 8])
def test_programs_past_the_last_tile_do_nothing(num_xcds, device):
    visits = walk(device, tiles=5, columns=2, num_xcds=num_xcds, spare=4)
    assert len(set(visits[:10])) == 10
    assert None not in visits[:10]
    assert visits[10:] == [None] * 8
