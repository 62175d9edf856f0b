"""Rows sorted by expert, tiles over them, and the programs' walk."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from grouped_gemm import counted, spread

from moelab.kernels.launch import GROUP_M
from moelab.kernels.routing import expert_tile, route
from moelab.problems import max_tiles

# Tokens of each expert, in tiles of 16 rows.
DISTRIBUTIONS = {
    "some empty": (5, 0, 17, 0),
    "one token each": (1, 1, 1, 1),
    "all on the first": (33, 0, 0, 0),
    "all on the last": (0, 0, 0, 33),
    "only full tiles": (16, 32, 0, 16),
    "one row past a tile": (17, 33, 1, 0),
    "one token": (0, 1, 0, 0),
    "no token": (0, 0, 0, 0),
    "one expert": (40,),
}
every_distribution = pytest.mark.parametrize("counts", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


def routed(generator, counts, block_m=16):
    expert = counted(generator, counts)
    weight = torch.rand(expert.shape, generator=generator)
    return expert, weight, route(expert, weight, len(counts), block_m)


@every_distribution
def test_row_index_is_a_permutation_sorted_by_expert(counts, generator):
    expert, _, routing = routed(generator, counts)
    assert routing.row_index.sort().values.tolist() == list(range(sum(counts)))
    owner = expert.flatten()[routing.row_index.long()].tolist()
    assert owner == sorted(owner)
    # Within an expert tokens keep their order, so that x is read forwards.
    keys = list(zip(owner, routing.row_index.tolist(), strict=True))
    assert keys == sorted(keys)


@every_distribution
def test_expert_end_is_the_running_count(counts, generator):
    _, _, routing = routed(generator, counts)
    assert routing.expert_end.tolist() == list(itertools.accumulate(counts))


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_a_row_keeps_its_token_slot_and_weight(top_k, generator):
    expert = spread(generator, m=13, experts=8, top_k=top_k)
    weight = torch.rand(expert.shape, generator=generator)
    routing = route(expert, weight, experts=8, block_m=16)
    assert routing.top_k == top_k
    ends = routing.expert_end.tolist()
    for row, index in enumerate(routing.row_index.tolist()):
        token, slot = divmod(index, top_k)
        e = int(expert[token, slot])
        assert ([0, *ends][e]) <= row < ends[e]
        assert routing.weight[row] == weight[token, slot]


@every_distribution
@pytest.mark.parametrize("block_m", [16, 32])
def test_tiles_cover_every_row_once_and_never_two_experts(counts, block_m, generator):
    _, _, routing = routed(generator, counts, block_m)
    ends = routing.expert_end.tolist()
    count = int(routing.tile_count)
    covered = []
    for e, row in zip(
        routing.tile_expert[:count].tolist(), routing.tile_row[:count].tolist(), strict=True
    ):
        rows = range(row, min(row + block_m, ends[e]))
        assert [0, *ends][e] <= row < ends[e], f"tile at row {row} is outside expert {e}"
        covered += rows
    assert covered == list(range(sum(counts)))


@every_distribution
def test_kernels_get_the_types_they_read(counts, generator):
    _, _, routing = routed(generator, counts)
    for name in ("row_index", "expert_end", "tile_count", "tile_expert", "tile_row"):
        assert getattr(routing, name).dtype == torch.int32, name
    assert routing.weight.dtype == torch.float32
    assert routing.tile_count.shape == (1,)
    assert routing.tile_expert.shape == routing.tile_row.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_any_integer_type_of_experts_routes_alike(dtype, generator):
    expert = spread(generator, m=9, experts=5, top_k=2)
    weight = torch.rand(expert.shape, generator=generator)
    expected = route(expert, weight, 5, 16)
    got = route(expert.to(dtype), weight, 5, 16)
    for name in ("row_index", "expert_end", "tile_expert", "tile_row", "weight"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


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


@pytest.mark.parametrize("counts", [(1, 1, 1, 34), (1, 1, 0, 0), (17, 1, 1, 17)])
def test_the_worst_routing_fills_every_tile(counts, generator):
    _, _, routing = routed(generator, counts)
    assert int(routing.tile_count) == routing.tile_expert.numel()


@pytest.mark.parametrize(
    ("expert", "weight", "shown"),
    [
        ((3, 2), (3, 1), ("expert (3, 2)", "weight (3, 1)", "[tokens, top_k]")),
        ((6,), (6,), ("expert (6,)", "weight (6,)", "[tokens, top_k]")),
        ((2, 3, 1), (2, 3, 1), ("expert (2, 3, 1)", "[tokens, top_k]")),
    ],
)
def test_shapes_that_disagree_are_shown(expert, weight, shown):
    with pytest.raises(ValueError) as error:
        route(torch.zeros(expert, dtype=torch.int64), torch.zeros(weight), 4, 16)
    for words in shown:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("experts_given", "shown"),
    [([[0, 4]], "0 to 4"), ([[-1, 3]], "-1 to 3"), ([[9], [2]], "2 to 9")],
)
def test_experts_out_of_range_are_shown(experts_given, shown):
    expert = torch.tensor(experts_given)
    with pytest.raises(ValueError) as error:
        route(expert, torch.ones(expert.shape), experts=4, block_m=16)
    for words in (shown, "experts=4", "0 to 3"):
        assert words in str(error.value)


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
    _walk[(programs,)](visits, count, expert, 100 * expert, 32 * columns - 5, 32, GROUP_M, num_xcds)
    return [tuple(visit) if exists else None for exists, *visit in visits.tolist()]


# 1 and 3 are fewer than 8 XCDs and less than a group; 5 and 9 leave a group of one.
every_grid = pytest.mark.parametrize(
    ("tiles", "columns"), [(1, 1), (3, 1), (1, 3), (5, 3), (8, 2), (9, 1), (7, 2)]
)


@every_grid
def test_a_group_of_rows_is_visited_for_every_column_before_the_next(tiles, columns, device):
    expected = [
        (tile, 100 * tile, column)
        for group in range(0, tiles, GROUP_M)
        for column in range(columns)
        for tile in range(group, min(group + GROUP_M, tiles))
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
