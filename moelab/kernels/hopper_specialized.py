"""Grouped GEMM over experts, fp8 x fp8, on Hopper, by warps that load and warps that multiply.

What `moe_gemm_a8w8` and `moe_gemm_a8w8_blockscale` launch where their tile is ``specialized``.

A precise sum adds each step's product to fp32 registers, and the tensor cores idle while the
same warps wait, scale and add. Here:

- A producer's warpgroup loads each step into one of ``NUM_STAGES`` stages, x and w by TMA, or x
  row by row where it is gathered, and x's block scales beside it. It runs ahead, into the next
  tile too: programs are persistent, and tiles are stored while the next one's steps come in.
- Two consumers' warpgroups multiply 64 rows each, 128 columns at a time: the sum of all 256
  and one product fit their registers, which the producer gives up. One of them adds while
  the other multiplies; with block scales, of which there is more to add, they take turns.

Stages pass from hand to hand by barriers in shared memory: ``full`` says that a stage has
come, ``empty`` that both consumers are done with it. Who waits for a barrier's phase p passes
once p is over; before the first phase, phase 1 is.

Written in Gluon, for Triton's own specialization of warps takes neither a gathered x nor scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..specs import UNQUANTIZED, Problem, Source, Target, TensorSpec, Tile
from . import grouped_gemm
from .epilogue import activate
from .grouped_gemm import Options
from .launch import TileRule, expect, one_of, target_name
from .routing import Routing, bounded_rows, near_programs

if TYPE_CHECKING:
    from torch import Tensor

# Their names until Triton 3.8 and 3.9.
_copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

_WAYS = ("specialized",)
_NUM_WARPS, _DEFAULT_STAGES = 4, 4


@gluon.constexpr_function
def _fp8_in_shared():
    return gl.NVMMASharedLayout(128, 8, 2)


@gluon.constexpr_function
def _y_layout(COLUMNS, VECTOR):
    """Of a block of y: a thread holds 16 bytes side by side.

    Rows stay in the warps, and four lanes, that wgmma leaves them in, so that to rearrange
    takes little of the shared memory, which the stages fill.
    """
    bits = [1 << bit for bit in range((COLUMNS - 1).bit_length())]
    along = [[0, b] for b in bits if b < VECTOR or b >= 4 * VECTOR]
    return gl.DistributedLinearLayout(
        [*along, [8, 0]],
        [[0, VECTOR], [0, 2 * VECTOR], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, COLUMNS],
    )


@gluon.jit
def _tile_at(
    pid,
    tiles,
    n,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_XCDS: gl.constexpr,
):
    """Find a tile as `routing.grouped_block` does: (expert, first row, end, pid_n).

    A group's rows start elsewhere in each column. Else a program, whose stride is often a
    multiple of GROUP_M, would meet the same row of every group: the last and emptiest, say.
    """
    tile_count_ptr, tile_expert_ptr, tile_row_ptr, expert_end_ptr = tiles
    tile_count = gl.load(tile_count_ptr)
    num_pid_n = gl.cdiv(n, BLOCK_N)
    pid = near_programs(pid, tile_count * num_pid_n, NUM_XCDS)
    group = pid // (GROUP_M * num_pid_n)
    in_group = pid % (GROUP_M * num_pid_n)
    group_m = gl.minimum(tile_count - group * GROUP_M, GROUP_M)
    pid_n = in_group // group_m
    pid_m = group * GROUP_M + (in_group + pid_n + group) % group_m
    expert = gl.load(tile_expert_ptr + pid_m)
    return expert, gl.load(tile_row_ptr + pid_m), gl.load(expert_end_ptr + expert), pid_n


@gluon.jit
def _next_stage(stage, phase, NUM_STAGES: gl.constexpr):
    stage += 1
    if stage == NUM_STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _tell(step, full, NUM_STAGES: gl.constexpr):
    """Say that a step's rows have come, if it was one."""
    mbarrier.arrive(full.index((step + NUM_STAGES) % NUM_STAGES), count=1, pred=step >= 0)


@gluon.jit
def _produce(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    gather_ptr,
    tiles,
    buffers,
    full,
    empty,
    n,
    k,
    BLOCKSCALE: gl.constexpr,
    WIDE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_XCDS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Load every step of every tile of this program."""
    GATHER: gl.constexpr = gather_ptr is not None
    BY_ROWS: gl.constexpr = GATHER or BLOCKSCALE
    # Copies of rows that are under way while the next ones are asked for.
    AHEAD: gl.constexpr = min(2, NUM_STAGES - 1)
    BYTES: gl.constexpr = BLOCK_N * 128 + (0 if GATHER else 128 * 128)
    X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x, w, x_scale = buffers
    stage = 0
    phase = 1
    step = 0
    programs = gl.load(tiles[0]) * gl.cdiv(n, BLOCK_N)
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        expert, row, end, pid_n = _tile_at(pid, tiles, n, BLOCK_N, GROUP_M, NUM_XCDS)
        w_row = expert * n + pid_n * BLOCK_N
        if GATHER:
            rows = row + gl.arange(0, 128, gl.SliceLayout(1, X))
            _, _, x_rows, _ = bounded_rows(rows, end, gather_ptr, None, WIDE)
            x_offs = (x_rows * k)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, X))[None, :]
        if BLOCKSCALE:
            rows = row + gl.arange(0, 128, SCALES)
            _, _, x_rows, _ = bounded_rows(rows, end, gather_ptr, None, WIDE)
            scale_ptrs = x_scale_ptr + x_rows * (k // 128)
        for start_k in range(0, k, 128):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            _tma_load(w_ptr, [w_row, start_k], bar, w.index(stage))
            if BLOCKSCALE:
                _copy_async(x_scale.index(stage), scale_ptrs + start_k // 128)
            if GATHER:
                _copy_async(x.index(stage), x_ptr + (x_offs + start_k))
            else:
                _tma_load(x_ptr, [row, start_k], bar, x.index(stage))
            if BY_ROWS:
                async_copy.commit_group()
                async_copy.wait_group(AHEAD)
                # wgmma reads past what orders other reads and writes.
                fence_async_shared()
                _tell(step - AHEAD, full, NUM_STAGES)
            step += 1
            stage, phase = _next_stage(stage, phase, NUM_STAGES)
    if BY_ROWS:
        async_copy.wait_group(0)
        fence_async_shared()
        for left in gl.static_range(AHEAD):
            _tell(step - AHEAD + left, full, NUM_STAGES)


@gluon.jit
def _product(x, w, turn, PHASE: gl.constexpr, TURNS: gl.constexpr, PART: gl.constexpr):
    """Multiply 64 rows by 128 columns, when it is this consumer's turn."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    none = gl.zeros([64, 128], gl.float32, ACC)
    if TURNS:
        mbarrier.wait(turn.index(PART), PHASE)
    product = warpgroup_mma(x, w.permute((1, 0)), none, use_acc=False, is_async=True)
    if TURNS:
        # Under way: the other's is queued behind it.
        mbarrier.arrive(turn.index(1 - PART), count=1)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _sums(
    buffers,
    w_scale_ptrs,
    full,
    empty,
    turn,
    stage,
    phase,
    steps,
    BLOCKSCALE: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PART: gl.constexpr,
):
    """Sum 64 rows by 256 columns over all steps, as two blocks of 128 columns."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    x, w, x_scale = buffers
    left = gl.zeros([64, 128], gl.float32, ACC)
    right = gl.zeros([64, 128], gl.float32, ACC)
    if BLOCKSCALE:
        left_scale = gl.load(w_scale_ptrs[0])
        right_scale = gl.load(w_scale_ptrs[1])
    for step in range(0, steps):
        mbarrier.wait(full.index(stage), phase)
        x_part = x.index(stage).slice(PART * 64, 64)
        w_left = w.index(stage).slice(0, 128)
        w_right = w.index(stage).slice(128, 128)
        if BLOCKSCALE:
            of_rows = x_scale.index(stage).slice(PART * 64, 64).load(gl.SliceLayout(1, ACC))
            of_left = of_rows * left_scale
            of_right = of_rows * right_scale
            following = gl.minimum(step + 1, steps - 1)
            left_scale = gl.load(w_scale_ptrs[0] + following)
            right_scale = gl.load(w_scale_ptrs[1] + following)
        # Two products a step: turns of each have a parity of their own, the first consumer's
        # first one comes before any.
        product = _product(x_part, w_left, turn, 1 - PART, BLOCKSCALE, PART)
        if BLOCKSCALE:
            left += product * of_left[:, None]
        else:
            left += product
        product = _product(x_part, w_right, turn, PART, BLOCKSCALE, PART)
        mbarrier.arrive(empty.index(stage), count=1)
        if BLOCKSCALE:
            right += product * of_right[:, None]
        else:
            right += product
        stage, phase = _next_stage(stage, phase, NUM_STAGES)
    return left, right, stage, phase


@gluon.jit
def _finish(
    acc,  # [64, 128] fp32
    y_ptr,
    bias_ptr,
    weight_ptr,
    scatter_ptr,
    expert,
    first,  # row
    end,
    column,
    n,
    alpha,
    limit,
    shift,
    SWIGLU: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Add the bias, activate, weight by routing and store, as `epilogue.finish` does."""
    ACC: gl.constexpr = acc.type.layout
    if bias_ptr is not None:
        columns = column + gl.arange(0, 128, gl.SliceLayout(0, ACC))
        bias = gl.load(bias_ptr + expert * n + columns, mask=columns < n, other=0.0)
        acc += bias[None, :]
    n_out = n
    if SWIGLU:
        gate, up = gl.split(gl.reshape(acc, [64, 64, 2]))
        acc = activate(gate, up, alpha, limit, shift)
        column //= 2
        n_out //= 2
    OUT: gl.constexpr = acc.type.layout
    if weight_ptr is not None:
        rows = gl.minimum(first + gl.arange(0, 64, gl.SliceLayout(1, OUT)), end - 1)
        acc *= gl.load(weight_ptr + rows)[:, None]
    out = acc.to(y_ptr.dtype.element_ty)
    COLUMNS: gl.constexpr = out.shape[1]
    Y: gl.constexpr = _y_layout(COLUMNS, 128 // out.dtype.primitive_bitwidth)
    out = gl.convert_layout(out, Y)
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, Y))
    _, row_mask, _, y_rows = bounded_rows(rows, end, None, scatter_ptr, WIDE)
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, Y))
    ptrs = y_ptr + ((y_rows * n_out)[:, None] + columns[None, :])
    gl.store(ptrs, out, mask=row_mask[:, None] & (columns < n_out)[None, :])


@gluon.jit
def _consume(
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    weight_ptr,
    scatter_ptr,
    tiles,
    buffers,
    full,
    empty,
    turn,
    n,
    k,
    alpha,
    limit,
    shift,
    BLOCKSCALE: gl.constexpr,
    SWIGLU: gl.constexpr,
    WIDE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_XCDS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PART: gl.constexpr,  # 0 or 1: which 64 rows
):
    """Multiply, finish and store half of every tile of this program."""
    steps = k // 128
    stage = 0
    phase = 0
    programs = gl.load(tiles[0]) * gl.cdiv(n, BLOCK_N)
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        expert, row, end, pid_n = _tile_at(pid, tiles, n, BLOCK_N, GROUP_M, NUM_XCDS)
        w_scale_ptrs = (w_scale_ptr, w_scale_ptr)
        if BLOCKSCALE:
            blocks = gl.cdiv(n, 128)
            # Where n ends in the left half, nothing of the right one is stored.
            second = gl.minimum(pid_n * 2 + 1, blocks - 1)
            w_scale_ptrs = (
                w_scale_ptr + (expert * blocks + pid_n * 2) * steps,
                w_scale_ptr + (expert * blocks + second) * steps,
            )
        left, right, stage, phase = _sums(
            buffers,
            w_scale_ptrs,
            full,
            empty,
            turn,
            stage,
            phase,
            steps,
            BLOCKSCALE,
            NUM_STAGES,
            PART,
        )
        if not BLOCKSCALE:
            scale = gl.load(x_scale_ptr) * gl.load(w_scale_ptr + expert)
            left *= scale
            right *= scale
        for half in gl.static_range(2):
            _finish(
                left if half == 0 else right,
                y_ptr,
                bias_ptr,
                weight_ptr,
                scatter_ptr,
                expert,
                row + PART * 64,
                end,
                pid_n * BLOCK_N + half * 128,
                n,
                alpha,
                limit,
                shift,
                SWIGLU,
                WIDE,
            )


@gluon.jit
def _hopper_specialized_kernel(
    y_ptr,  # [rows, n_out] bf16 or fp32
    y_scale_ptr,  # None
    x_ptr,  # [tokens, k] fp8 if gathered, else a descriptor of [rows, k]
    w_ptr,  # a descriptor of [experts * n, k] fp8
    x_scale_ptr,  # [1] fp32, or [rows of x, k / 128]
    w_scale_ptr,  # [experts] fp32, or [experts, ceil(n / 128), k / 128]
    bias_ptr,  # [experts, n] fp32 or None
    weight_ptr,  # [rows] fp32 routing weights or None
    gather_ptr,  # [rows] int32 token of each row, or None: x is in expert order
    scatter_ptr,  # [rows] int32 row of y of each row, or None: y is in expert order
    expert_end_ptr,  # [experts] int32
    tile_count_ptr,  # [1] int32
    tile_expert_ptr,  # [max_tiles] int32
    tile_row_ptr,  # [max_tiles] int32
    n,
    k,  # a multiple of 128
    alpha,
    limit,
    shift,
    BLOCKSCALE: gl.constexpr,
    SWIGLU: gl.constexpr,
    EVEN_K: gl.constexpr,
    WIDE: gl.constexpr,
    W_CACHE: gl.constexpr,
    BLOCK_M: gl.constexpr,  # 128
    BLOCK_N: gl.constexpr,  # 256
    BLOCK_K: gl.constexpr,  # 128
    GROUP_M: gl.constexpr,
    NUM_XCDS: gl.constexpr,
    W_TMA: gl.constexpr,
    X_TMA: gl.constexpr,
    TAILS: gl.constexpr,
    PERSISTENT: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    gl.static_assert(gl.num_warps() == 4, "num_warps: specialized takes 4, those of each part")
    FP8: gl.constexpr = _fp8_in_shared()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    BY_ROWS: gl.constexpr = BLOCKSCALE or not X_TMA
    x = gl.allocate_shared_memory(gl.float8e4nv, [NUM_STAGES, BLOCK_M, BLOCK_K], FP8)
    w = gl.allocate_shared_memory(gl.float8e4nv, [NUM_STAGES, BLOCK_N, BLOCK_K], FP8)
    x_scale = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_M], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for stage in gl.static_range(NUM_STAGES):
        # TMA's bytes and, apart, the rows that the producer's threads copy.
        mbarrier.init(full.index(stage), count=2 if BY_ROWS else 1)
        mbarrier.init(empty.index(stage), count=2)
    for part in gl.static_range(2):
        mbarrier.init(turn.index(part), count=1)
    fence_async_shared()
    tiles = (tile_count_ptr, tile_expert_ptr, tile_row_ptr, expert_end_ptr)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    y_ptr,
                    x_scale_ptr,
                    w_scale_ptr,
                    bias_ptr,
                    weight_ptr,
                    scatter_ptr,
                    tiles,
                    (x, w, x_scale),
                    full,
                    empty,
                    turn,
                    n,
                    k,
                    alpha,
                    limit,
                    shift,
                    BLOCKSCALE,
                    SWIGLU,
                    WIDE,
                    BLOCK_N,
                    GROUP_M,
                    NUM_XCDS,
                    NUM_STAGES,
                    0,
                ),
            ),
            (
                _consume,
                (
                    y_ptr,
                    x_scale_ptr,
                    w_scale_ptr,
                    bias_ptr,
                    weight_ptr,
                    scatter_ptr,
                    tiles,
                    (x, w, x_scale),
                    full,
                    empty,
                    turn,
                    n,
                    k,
                    alpha,
                    limit,
                    shift,
                    BLOCKSCALE,
                    SWIGLU,
                    WIDE,
                    BLOCK_N,
                    GROUP_M,
                    NUM_XCDS,
                    NUM_STAGES,
                    1,
                ),
            ),
            (
                _produce,
                (
                    x_ptr,
                    w_ptr,
                    x_scale_ptr,
                    gather_ptr,
                    tiles,
                    (x, w, x_scale),
                    full,
                    empty,
                    n,
                    k,
                    BLOCKSCALE,
                    WIDE,
                    BLOCK_N,
                    GROUP_M,
                    NUM_XCDS,
                    NUM_STAGES,
                ),
            ),
        ],
        [4, 4 if BY_ROWS else 1],
        # Registers of a thread: 65,536 of an SM hold 128 x (224 + 224 + 56).
        [224, 56],
    )


def _rules(tile: Tile, k: int, where: str) -> list[TileRule]:
    """Say what tiles it takes on a target, by name; see `launch.check_tile`."""
    return [
        ("specialized", where == "sm_90", f"none: it is for sm_90 alone, not {where}"),
        ("block_m", tile.block_m == 128, "128: two warpgroups multiply 64 rows each"),
        ("block_n", tile.block_n == 256, "256, the columns that a warpgroup's registers hold"),
        ("block_k", tile.block_k == 128, "128: a step's rows are 128 bytes of shared memory"),
        ("specialized", k % 128 == 0 < k, f"none: k is {k}, no multiple of 128"),
    ]


def _check(fast_accum: bool, y_format: str) -> None:
    """Refuse what other ways take, by one check for compiler and launch.

    Raises:
        ValueError: sums are left to the tensor cores, or y is quantized.
    """
    if fast_accum:
        raise ValueError(
            "fast_accum is True; expected False where the tile is specialized, which adds every "
            "128 products in fp32"
        )
    one_of("y_format of a specialized tile", y_format, UNQUANTIZED)


def source(
    problem: Problem,
    tile: Tile,
    target: Target,
    x_scale: TensorSpec,
    w_scale: TensorSpec,
    *,
    blockscale: bool,
) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    Args:
        x_scale, w_scale: as the launcher takes them.
        blockscale: they are those of blocks of 128.
    Raises:
        ValueError: the kernel can't take the tile, a format or the target.
    """
    _check(problem.fast_accum, problem.y_format)
    return grouped_gemm.describe(
        _hopper_specialized_kernel,
        problem,
        tile,
        target,
        x=TensorSpec((problem.x_rows, problem.k), target.fp8),
        w=TensorSpec((problem.experts, problem.n, problem.k), target.fp8),
        own={"x_scale_ptr": x_scale, "w_scale_ptr": w_scale, "BLOCKSCALE": blockscale},
        rules=_rules(tile, problem.k, target.name),
        ways=_WAYS,
    )


def launch(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile,
    *,
    blockscale: bool,
    fast_accum: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Multiply each expert's rows by its weight; see `moe_gemm_a8w8` and its blockscale.

    Args:
        x, w, x_scale, w_scale: checked already, but for rows of x.
        blockscale: scales are those of blocks of 128.
    Raises:
        ValueError: arguments disagree, or the device is no Hopper.
    """
    import torch

    _check(fast_accum, options.get("y_format", "bf16"))
    expect("w", w, (None, None, None), (torch.float8_e4m3fn,), of=w)
    num_warps = options.setdefault("num_warps", _NUM_WARPS)
    if num_warps != _NUM_WARPS:
        raise ValueError(
            f"num_warps is {num_warps}; expected {_NUM_WARPS} where the tile is specialized: "
            "those of each of its parts"
        )
    if options.get("num_stages") is None:
        options["num_stages"] = _DEFAULT_STAGES
    own = {
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        "BLOCKSCALE": blockscale,
        "NUM_STAGES": options["num_stages"],
    }
    return grouped_gemm.launch(
        _hopper_specialized_kernel,
        x,
        w,
        own,
        routing,
        tile,
        k=x.shape[1],
        # Gluon is not interpreted.
        rules=_rules(tile, x.shape[1], target_name(w.device) or "a CPU"),
        ways=_WAYS,
        **options,
    )
