"""From router logits to rows sorted by expert, and back to one row for each token.

    expert[t], logit[t] = the k largest of logits[t]       weight[t] = softmax(logit[t])
    row(t, slot) = first row of the expert + its rows in earlier blocks + rank in the block
    out[t] = sum over slots of y[t * top_k + slot]

On the CPU this is plain PyTorch, which says what correct means. On a GPU it is a counting
sort in a few small launches. Blocks of tokens choose their experts and count each one's
rows; a running sum over blocks follows; then every block knows where its rows go, and
ranks them by a running sum over a one-hot matrix. The host waits for nothing, and nothing
is atomic: the same logits give the same bits. Every integer equals the CPU's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from ..problems import max_tiles
from .launch import WIDE_ELEMENTS, expect, one_of
from .routing import Routing

if TYPE_CHECKING:
    from torch import Tensor

SCORES = ("softmax", "sigmoid")

# Blocks that tokens are cut into at most: one program sums them up in one step.
_MAX_BLOCKS = 512
# Columns of counts that such a program takes: 32 bytes, what a GPU fetches at once.
_SCAN_EXPERTS = 8
# Elements of the [tokens, experts] or [rows, experts] matrix that a program holds at once.
# With 128 experts and four warps Triton 3.9.0 gives a thread 96 and 95 registers on sm_90,
# 61 and 92 on gfx950, and spills none.
_SELECT_ELEMENTS, _SORT_ELEMENTS = 2048, 8192
# Columns of y that one program sums: 8 bf16 of each thread, or 16 bytes.
_REDUCE_COLUMNS = 1024


@triton.jit
def _flip(bits):
    """Turn the bits of fp32 into integers of the same order, and back again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _rank(x):
    """Order fp32 as integers: NaN above all, both zeros alike, -2^31 below all."""
    rank = _flip(x.to(tl.int32, bitcast=True))
    # -0.0 comes out as -1.
    return tl.where(x != x, 0x7FFFFFFF, tl.where(rank == -1, 0, rank))


@triton.jit
def _select_kernel(
    expert_ptr,  # [tokens, K] int32
    weight_ptr,  # [tokens, K] fp32
    count_ptr,  # [blocks, experts] int32, rows that each expert gets from a block
    logits_ptr,  # [tokens, experts] fp32, bf16 or fp16
    tokens,
    experts,
    block_tokens,  # a multiple of TOKENS
    SIGMOID: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two, as are experts
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Choose each token's experts, one after the other, and weigh them."""
    LOWEST: tl.constexpr = -0x80000000
    block = tl.program_id(0)
    offs_e = tl.arange(0, EXPERTS)[None, :]
    offs_k = tl.arange(0, SLOTS)[None, :]
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, block_tokens, TOKENS):
        token = (block * block_tokens + start + tl.arange(0, TOKENS))[:, None]
        exists = token < tokens
        # Logits of many tokens can exceed 2^31 elements.
        token = token.to(tl.int64)
        x = tl.load(
            logits_ptr + token * experts + offs_e, mask=exists & (offs_e < experts), other=0.0
        )
        rank = tl.where(offs_e < experts, _rank(x.to(tl.float32)), LOWEST)
        expert = tl.zeros((TOKENS, SLOTS), dtype=tl.int32)
        best = tl.zeros((TOKENS, SLOTS), dtype=tl.int32)
        for slot in range(K):
            largest = tl.max(rank, axis=1)[:, None]
            # Of equal logits the first.
            chosen = tl.min(tl.where(rank == largest, offs_e, EXPERTS), axis=1)[:, None]
            expert = tl.where(offs_k == slot, chosen, expert)
            best = tl.where(offs_k == slot, largest, best)
            taken = offs_e == chosen
            rank = tl.where(taken, LOWEST, rank)
            count += tl.sum((taken & exists).to(tl.int32), axis=0)
        logit = tl.where(offs_k < K, _flip(best).to(tl.float32, bitcast=True), float("-inf"))
        if SIGMOID:
            weight = tl.sigmoid(logit)
        else:
            weight = tl.exp(logit - tl.max(logit, axis=1)[:, None])
            weight /= tl.sum(weight, axis=1)[:, None]
        rows = token * K + offs_k
        mask = exists & (offs_k < K)
        tl.store(expert_ptr + rows, expert, mask=mask)
        tl.store(weight_ptr + rows, weight, mask=mask)
    offs_e = tl.arange(0, EXPERTS)
    tl.store(count_ptr + block * experts + offs_e, count, mask=offs_e < experts)


@triton.jit
def _one_hot(expert_ptr, row, end, EXPERTS: tl.constexpr):
    """Mark each row's expert: ``[ROWS, EXPERTS]``; rows from ``end`` on have none."""
    expert = tl.load(expert_ptr + row, mask=row < end, other=-1)
    return (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _count_kernel(
    count_ptr,  # [blocks, experts] int32, rows that each expert gets from a block
    expert_ptr,  # [rows] int32
    rows,
    experts,
    block_rows,  # a multiple of ROWS
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Count what `_select_kernel` counts, where the experts are given."""
    block = tl.program_id(0)
    offs_e = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, block_rows, ROWS):
        row = block * block_rows + start + tl.arange(0, ROWS)
        count += tl.sum(_one_hot(expert_ptr, row, rows, EXPERTS), axis=0)
    tl.store(count_ptr + block * experts + offs_e, count, mask=offs_e < experts)


@triton.jit
def _scan_kernel(
    count_ptr,  # [blocks, experts] int32; each becomes the sum of those of earlier blocks
    histogram_ptr,  # [experts] int32
    blocks,
    experts,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a few experts' rows over the blocks."""
    block = tl.arange(0, BLOCKS)[:, None]
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pointers = count_ptr + block * experts + expert[None, :]
    mask = (block < blocks) & (expert < experts)[None, :]
    count = tl.load(pointers, mask=mask, other=0)
    tl.store(pointers, tl.cumsum(count, axis=0) - count, mask=mask)
    tl.store(histogram_ptr + expert, tl.sum(count, axis=0), mask=expert < experts)


@triton.jit
def _sort_kernel(
    gather_ptr,  # [rows] int32
    scatter_ptr,  # [rows] int32
    sorted_weight_ptr,  # [rows] fp32
    expert_end_ptr,  # [experts] int32
    tile_count_ptr,  # [1] int32
    tile_expert_ptr,  # [max_tiles] int32
    tile_row_ptr,  # [max_tiles] int32
    expert_ptr,  # [rows] int32
    weight_ptr,  # [rows] fp32
    earlier_ptr,  # [blocks, experts] int32, each expert's rows in earlier blocks
    histogram_ptr,  # [experts] int32
    rows,
    experts,
    top_k,
    block_m,
    block_rows,
    tile_programs,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Lay tiles over the sorted rows (the first programs) and sort them (one per block)."""
    pid = tl.program_id(0)
    offs_e = tl.arange(0, EXPERTS)
    histogram = tl.load(histogram_ptr + offs_e, mask=offs_e < experts, other=0)
    end = tl.cumsum(histogram, axis=0)
    first = end - histogram
    if pid < tile_programs:
        tiles = tl.cdiv(histogram, block_m)
        tile_end = tl.cumsum(tiles, axis=0)
        tile_count = tl.sum(tiles, axis=0)
        if pid == 0:
            tl.store(expert_end_ptr + offs_e, end, mask=offs_e < experts)
            tl.store(tile_count_ptr, tile_count)
        tile = pid * ROWS + tl.arange(0, ROWS)
        # A tile belongs to the first expert whose tiles reach beyond it.
        owner = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        skipped = first - (tile_end - tiles) * block_m
        mine = offs_e[None, :] == owner[:, None]
        row = tile * block_m + tl.sum(tl.where(mine, skipped[None, :], 0), axis=1)
        tl.store(tile_expert_ptr + tile, owner, mask=tile < tile_count)
        tl.store(tile_row_ptr + tile, row, mask=tile < tile_count)
    else:
        block = pid - tile_programs
        # The row that each expert's next one in this block goes to.
        free = first + tl.load(
            earlier_ptr + block * experts + offs_e, mask=offs_e < experts, other=0
        )
        first_row = block * block_rows
        stop = tl.minimum(first_row + block_rows, rows)
        for start in range(0, block_rows, ROWS):
            row = first_row + start + tl.arange(0, ROWS)
            one_hot = _one_hot(expert_ptr, row, stop, EXPERTS)
            to = free[None, :] + tl.cumsum(one_hot, axis=0) - 1
            position = tl.sum(one_hot * to, axis=1)
            mask = row < stop
            weight = tl.load(weight_ptr + row, mask=mask)
            tl.store(gather_ptr + position, row // top_k, mask=mask)
            tl.store(scatter_ptr + position, row, mask=mask)
            tl.store(sorted_weight_ptr + position, weight, mask=mask)
            free += tl.sum(one_hot, axis=0)


@triton.jit
def _reduce_kernel(
    out_ptr,  # [tokens, n], type of y
    y_ptr,  # [tokens * TOP_K, n] bf16 or fp32
    n,
    TOP_K: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum some columns of one token's rows."""
    programs_n = tl.cdiv(n, COLUMNS)
    pid = tl.program_id(0)
    token = pid // programs_n
    offs_n = pid % programs_n * COLUMNS + tl.arange(0, COLUMNS)
    if WIDE:
        token = token.to(tl.int64)
    mask = offs_n < n
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.load(y_ptr + (token * TOP_K + slot) * n + offs_n, mask=mask, other=0.0)
    tl.store(out_ptr + token * n + offs_n, total.to(out_ptr.dtype.element_ty), mask=mask)


def top_k(logits: Tensor, k: int, score: str = "softmax") -> tuple[Tensor, Tensor]:
    """Choose each token's k experts of largest logit, and weigh them.

    ``softmax`` runs over the chosen k (GPT-OSS). It is the same as a softmax over all
    experts whose chosen values are divided by their sum (Qwen3): that of all cancels.
    ``sigmoid`` takes each chosen logit alone (Llama 4).

    Equal logits go to the lower expert. NaN counts as the largest, so that a router which
    diverged shows: under softmax all weights of its token are NaN. -inf is the least
    number. It is chosen where nothing else is left, with weight 0; a token whose
    logits are all -inf has a softmax of NaN.

    Args:
        logits: ``[tokens, experts]`` fp32, bf16 or fp16.
        k: experts per token.
        score: ``softmax`` or ``sigmoid``.
    Returns:
        experts ``[tokens, k]`` int32, the largest logit's first, no two alike, and their
        weights ``[tokens, k]`` fp32.
    Raises:
        ValueError: wrong shape, type, k or score.
    """
    _check_logits(logits, k, score)
    if not _has_kernels(logits):
        return top_k_reference(logits, k, score)
    return _select(logits, k, score)[:2]


def route(expert: Tensor, weight: Tensor, experts: int, block_m: int) -> Routing:
    """Sort token slots by expert and lay tiles over them.

    Checking the range of ``expert`` waits for the device; `route_logits` need not.

    Args:
        expert: ``[tokens, top_k]`` integer, the experts that each token visits.
        weight: ``[tokens, top_k]``, how much each counts.
        experts: how many there are.
        block_m: rows per tile.
    Raises:
        ValueError: shapes or devices disagree, or an expert is out of range.
    """
    import torch

    if expert.shape != weight.shape or expert.dim() != 2:
        raise ValueError(
            f"expert {tuple(expert.shape)} and weight {tuple(weight.shape)} must both be "
            "[tokens, top_k]"
        )
    if expert.dtype == torch.bool or expert.is_floating_point() or expert.is_complex():
        raise ValueError(f"expert is {expert.dtype}; expected an integer type")
    if expert.device != weight.device:
        raise ValueError(f"weight is on {weight.device}; expert is on {expert.device}")
    _check_at_least_1(top_k=expert.shape[1], experts=experts, block_m=block_m)
    if expert.numel():
        lowest, highest = torch.stack(expert.aminmax()).tolist()
        if not 0 <= lowest <= highest < experts:
            raise ValueError(
                f"expert indices span {lowest} to {highest}; "
                f"with experts={experts} they must be 0 to {experts - 1}"
            )
    if not _has_kernels(expert):
        return route_reference(expert, weight, experts, block_m)
    expert, weight = expert.int().contiguous(), weight.float().contiguous()
    size = _chunk(_SORT_ELEMENTS, experts)
    blocks, block_rows = _cut(expert.numel(), size["ROWS"])
    count = torch.empty((blocks, experts), dtype=torch.int32, device=expert.device)
    if blocks:
        _count_kernel[(blocks,)](count, expert, expert.numel(), experts, block_rows, **size)
    return _sort(expert, weight, count, block_rows, block_m)


def route_logits(logits: Tensor, k: int, block_m: int, score: str = "softmax") -> Routing:
    """Choose experts as `top_k` does and sort their rows as `route` does.

    Never waits for the device.

    Args:
        logits: ``[tokens, experts]`` fp32, bf16 or fp16.
        k: experts per token.
        block_m: rows per tile.
        score: ``softmax`` or ``sigmoid``.
    Raises:
        ValueError: wrong shape, type, k, block_m or score.
    """
    _check_logits(logits, k, score)
    _check_at_least_1(block_m=block_m)
    if not _has_kernels(logits):
        expert, weight = top_k_reference(logits, k, score)
        return route_reference(expert, weight, logits.shape[1], block_m)
    expert, weight, count, block_tokens = _select(logits, k, score)
    return _sort(expert, weight, count, block_tokens * k, block_m)


def reduce_top_k(y: Tensor, top_k: int) -> Tensor:
    """Sum the rows of each token, in fp32: what is left to do after layer 2.

    Args:
        y: ``[tokens * top_k, n]`` bf16 or fp32, row ``token * top_k + slot``, already
            weighted.
        top_k: experts per token.
    Returns:
        ``[tokens, n]``, type of ``y``.
    Raises:
        ValueError: wrong type, or rows that are not whole tokens.
    """
    import torch

    if y.dtype.itemsize == 1:
        raise ValueError(
            f"y is {y.dtype}, whose scale is not known here; expected torch.bfloat16 or "
            "torch.float32: leave layer 2 unquantized"
        )
    expect("y", y, (None, None), (torch.bfloat16, torch.float32), of=y)
    _check_at_least_1(top_k=top_k)
    rows, n = y.shape
    if rows % top_k:
        raise ValueError(f"y has {rows} rows; with top_k={top_k} expected a multiple of {top_k}")
    if not _has_kernels(y):
        return reduce_top_k_reference(y, top_k)
    out = torch.empty((rows // top_k, n), dtype=y.dtype, device=y.device)
    if out.numel():
        grid = (out.shape[0] * triton.cdiv(n, _REDUCE_COLUMNS),)
        wide = y.numel() >= WIDE_ELEMENTS
        _reduce_kernel[grid](out, y, n, TOP_K=top_k, WIDE=wide, COLUMNS=_REDUCE_COLUMNS)
    return out


def top_k_reference(logits: Tensor, k: int, score: str = "softmax") -> tuple[Tensor, Tensor]:
    """Say what correct means for `top_k`, in plain PyTorch."""
    # torch.topk leaves the order of equal logits open.
    logit, expert = logits.float().sort(dim=1, descending=True, stable=True)
    logit = logit[:, :k]
    weight = logit.sigmoid() if score == "sigmoid" else logit.softmax(dim=1)
    return expert[:, :k].int(), weight


def route_reference(expert: Tensor, weight: Tensor, experts: int, block_m: int) -> Routing:
    """Say what correct means for `route`, in plain PyTorch."""
    import torch

    flat = expert.flatten()
    scatter_index = torch.argsort(flat, stable=True)
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
        gather_index=(scatter_index // expert.shape[1]).int(),
        scatter_index=scatter_index.int(),
        histogram=histogram.int(),
        expert_end=end.int(),
        weight=weight.flatten()[scatter_index].float(),
        tile_count=tiles.sum().int().reshape(1),
        tile_expert=tile_expert,
        tile_row=tile_row,
        top_k=expert.shape[1],
        block_m=block_m,
    )


def reduce_top_k_reference(y: Tensor, top_k: int) -> Tensor:
    """Say what correct means for `reduce_top_k`, in plain PyTorch."""
    tokens = len(y) // top_k
    return y.unflatten(0, (tokens, top_k)).float().sum(dim=1).to(y.dtype)


def _has_kernels(tensor: Tensor) -> bool:
    """Tell where the kernels run: on a GPU, AMD's included."""
    return tensor.is_cuda


def _select(logits: Tensor, k: int, score: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Launch `top_k`: experts, weights, each block's counts, tokens of a block."""
    import torch

    tokens, experts = logits.shape
    size = _chunk(_SELECT_ELEMENTS, experts)
    blocks, block_tokens = _cut(tokens, size["ROWS"])
    device = logits.device
    expert = torch.empty((tokens, k), dtype=torch.int32, device=device)
    weight = torch.empty((tokens, k), dtype=torch.float32, device=device)
    count = torch.empty((blocks, experts), dtype=torch.int32, device=device)
    if blocks:
        _select_kernel[(blocks,)](
            expert,
            weight,
            count,
            logits,
            tokens,
            experts,
            block_tokens,
            SIGMOID=score == "sigmoid",
            K=k,
            SLOTS=triton.next_power_of_2(k),
            TOKENS=size["ROWS"],
            EXPERTS=size["EXPERTS"],
        )
    return expert, weight, count, block_tokens


def _sort(expert: Tensor, weight: Tensor, count: Tensor, block_rows: int, block_m: int) -> Routing:
    """Launch what follows the counts.

    Args:
        expert: ``[tokens, top_k]`` int32, every one in range.
        weight: ``[tokens, top_k]`` fp32.
        count: ``[blocks, experts]`` int32, rows of each block by expert; overwritten.
    """
    import torch

    def empty(size: int, dtype: Any = torch.int32) -> Tensor:
        return torch.empty((size,), dtype=dtype, device=expert.device)

    rows = expert.numel()
    blocks, experts = count.shape
    tiles = max_tiles(rows, experts, block_m)
    routing = Routing(
        gather_index=empty(rows),
        scatter_index=empty(rows),
        histogram=empty(experts),
        expert_end=empty(experts),
        weight=empty(rows, torch.float32),
        tile_count=empty(1),
        tile_expert=empty(tiles),
        tile_row=empty(tiles),
        top_k=expert.shape[1],
        block_m=block_m,
    )
    _scan_kernel[(triton.cdiv(experts, _SCAN_EXPERTS),)](
        count, routing.histogram, blocks, experts, BLOCKS=_MAX_BLOCKS, COLUMNS=_SCAN_EXPERTS
    )
    size = _chunk(_SORT_ELEMENTS, experts)
    # The first program also writes what is there without a single row.
    tile_programs = max(1, triton.cdiv(tiles, size["ROWS"]))
    _sort_kernel[(tile_programs + blocks,)](
        routing.gather_index,
        routing.scatter_index,
        routing.weight,
        routing.expert_end,
        routing.tile_count,
        routing.tile_expert,
        routing.tile_row,
        expert,
        weight,
        count,
        routing.histogram,
        rows,
        experts,
        routing.top_k,
        block_m,
        block_rows,
        tile_programs,
        **size,
    )
    return routing


def _chunk(elements: int, experts: int) -> dict[str, int]:
    """Size the ``[ROWS, EXPERTS]`` matrix of one step, powers of two."""
    padded = triton.next_power_of_2(experts)
    return {"ROWS": max(1, elements // padded), "EXPERTS": padded}


def _cut(items: int, step: int) -> tuple[int, int]:
    """Cut into at most `_MAX_BLOCKS` blocks of whole steps: how many, and items of each."""
    steps = max(1, triton.cdiv(items, step * _MAX_BLOCKS))
    return triton.cdiv(items, step * steps), step * steps


def _check_logits(logits: Tensor, k: int, score: str) -> None:
    import torch

    floats = (torch.float32, torch.bfloat16, torch.float16)
    expect("logits", logits, (None, None), floats, of=logits)
    experts = logits.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}; with logits of {experts} experts expected 1 to {experts}")
    one_of("score", score, SCORES)


def _check_at_least_1(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
