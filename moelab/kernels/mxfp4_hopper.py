"""Grouped GEMM over experts, fp8 or mxfp4 x mxfp4, on Hopper: y[r] = act(x[token(r)] w^T + b).

The kernel of `moe_gemm_a8w4` and `moe_gemm_a4w4` where ``scale_layout`` is ``hopper``. Hopper
multiplies no mxfp4, and widening it for `tl.dot_scaled` costs more than the product. Here:

- wgmma takes its first operand from registers, so w is that one: acc^T = w x^T.
- `hopper_weights` has turned scales into differences of exponents beforehand, with a table row
  of 8 fp8 magnitudes for each. A thread owns groups of 32 along K: it loads 16 bytes of codes
  and one table row for each group, permutes bytes, and has 32 fp8 without arithmetic.
- K is summed in whatever order that leaves, so x is put into the same order by a small kernel
  before; it also pads K to whole steps, which spares the main loop its masks, and widens mxfp4
  to fp8 with an fp32 scale per row.
- The next step's w is widened while the tensor cores multiply this one's.

Written in Gluon: Triton's own pipeliner hands wgmma no such registers. It makes its own
``NUM_STAGES`` copies, which the compiler is told as ``num_stages``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..specs import Problem, Source, Target, TensorSpec, Tile
from . import grouped_gemm, hopper_weights
from .epilogue import activate, mxfp8, saturate
from .grouped_gemm import Options
from .launch import TileRule, check_tile, target_name
from .routing import Routing, bounded_rows, every_tile

if TYPE_CHECKING:
    from torch import Tensor

# Its name until Triton 3.8.
_copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_DEFAULT_STAGES = 4
_WAYS = ("tails",)


@gluon.constexpr_function
def _powers(below):
    return [1 << bit for bit in range((below - 1).bit_length())]


@gluon.constexpr_function
def _words_layout(BLOCK_N, WARPS):
    """Of w's ``[BLOCK_N, 16]`` words: a thread has 4 side by side, in rows g and g + 8."""
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], *([16 * WARPS * b, 0] for b in _powers(BLOCK_N // (16 * WARPS)))],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16 * b, 0] for b in _powers(WARPS)],
        [],
        [BLOCK_N, 16],
    )


@gluon.constexpr_function
def _bytes_layout(BLOCK_N, WARPS):
    """Of ``[BLOCK_N, 32, 4]`` fp8, 4 in a word, as wgmma wants its first operand."""
    more = [[16 * WARPS * b, 0, 0] for b in _powers(BLOCK_N // (16 * WARPS))]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 4, 0], [0, 8, 0], [0, 16, 0], [8, 0, 0], *more],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16 * b, 0, 0] for b in _powers(WARPS)],
        [],
        [BLOCK_N, 32, 4],
    )


@gluon.constexpr_function
def _scales_layout(BLOCK_N, WARPS):
    """Of ``[BLOCK_N // 16, 64]`` bytes of scales: a thread has those of its words."""
    more = [[WARPS * b, 0] for b in _powers(BLOCK_N // (16 * WARPS))]
    return gl.DistributedLinearLayout(
        [[0, 1], *more],
        [[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]],
        [[b, 0] for b in _powers(WARPS)],
        [],
        [BLOCK_N // 16, 64],
    )


@gluon.constexpr_function
def _rows_layout(columns, WARPS, vector):
    """Of a block in memory: threads along columns first, ``vector`` elements each."""
    vector = min(vector, columns)
    across = min(columns // vector, 32)
    return gl.BlockedLayout([1, vector], [32 // across, across], [WARPS, 1], [1, 0])


# Two bytes of codes choose 4 of 8 magnitudes, twice; signs are or-ed in (`hopper_weights`).
_LOOK_UP = gl.constexpr("""{
.reg .b32 m;
and.b32 m, $2, 0x77777777;
prmt.b32 $0, $3, $4, m;
shr.u32 m, m, 16;
prmt.b32 $1, $3, $4, m;
lop3.b32 $0, $0, $2, 0x80808080, 0xf8;
shl.b32 m, $2, 4;
lop3.b32 $1, $1, m, 0x80808080, 0xf8;
}""")


@gluon.jit
def _widened(w, w_scale, table_ptr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr):
    """Read a step of w from shared memory as ``[BLOCK_N, 32]`` words of 4 fp8."""
    below = w_scale.load(_scales_layout(BLOCK_N, WARPS))
    below = gl.permute(gl.reshape(below, [BLOCK_N // 16, 8, 4, 2]), [0, 3, 1, 2])
    magnitudes = gl.load(table_ptr + gl.reshape(below, [BLOCK_N, 4]).to(gl.int32))
    words = w.load(_words_layout(BLOCK_N, WARPS))
    # Row, word of the group, group.
    words = gl.permute(gl.reshape(words, [BLOCK_N, 4, 4]), [0, 2, 1])
    L: gl.constexpr = words.type.layout
    low = gl.reshape((magnitudes & 0xFFFFFFFF).to(gl.int32), [BLOCK_N, 1, 4])
    high = gl.reshape((magnitudes >> 32).to(gl.int32), [BLOCK_N, 1, 4])
    low = gl.convert_layout(low.broadcast_to([BLOCK_N, 4, 4]), L, assert_trivial=True)
    high = gl.convert_layout(high.broadcast_to([BLOCK_N, 4, 4]), L, assert_trivial=True)
    first, second = gl.inline_asm_elementwise(
        _LOOK_UP,
        "=&r,=&r,r,r,r",
        [words, low, high],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    fp8 = gl.permute(gl.join(first, second), [0, 1, 3, 2])
    return gl.reshape(fp8, [BLOCK_N, 32])


@gluon.jit
def _settled(words):
    """Keep what was computed before from moving past here.

    ptxas serializes wgmma (its warning C7513) where registers of an operand are written
    between its start and its wait.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _as_operand(words, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr):
    """Take words for the 4 fp8 that each of them is: ``[BLOCK_N, 128]``."""
    words = gl.reshape(words, [BLOCK_N, 32, 1]).broadcast_to([BLOCK_N, 32, 4])
    words = gl.convert_layout(words, _bytes_layout(BLOCK_N, WARPS), assert_trivial=True)
    fp8 = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [words], dtype=gl.float8e4nv, is_pure=True, pack=4
    )
    return gl.convert_layout(gl.reshape(fp8, [BLOCK_N, 128]), LAYOUT, assert_trivial=True)


@gluon.jit
def _copy_step(
    step,
    steps,
    x_ptrs,
    w_ptrs,
    w_scale_ptrs,
    x,
    w,
    w_scale,
    NUM_STAGES: gl.constexpr,
):
    """Start to copy a step, if there is one, into the stage that it takes turns in."""
    stage = step % NUM_STAGES
    if step < steps:
        _copy_async(x.index(stage), x_ptrs + step * 128)
        _copy_async(w.index(stage), w_ptrs + step * 256, cache_modifier=".cg")
        _copy_async(w_scale.index(stage), w_scale_ptrs + step * 64)
    async_copy.commit_group()


@gluon.jit
def _tile(
    expert,
    row,
    pid_n,
    BLOCK_M: gl.constexpr,
    y_ptr,
    y_scale_ptr,
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    table_ptr,
    bias_ptr,
    weight_ptr,
    gather_ptr,
    scatter_ptr,
    expert_end_ptr,
    n,
    k,
    alpha,
    limit,
    shift,
    ROW_SCALES: gl.constexpr,
    FAST_ACCUM: gl.constexpr,
    SWIGLU: gl.constexpr,
    WIDE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Compute one tile of one expert; the rest are the kernel's arguments."""
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    X: gl.constexpr = _rows_layout(128, WARPS, 16)
    W: gl.constexpr = _rows_layout(16, WARPS, 4)
    W_SCALE: gl.constexpr = _rows_layout(64, WARPS, 4)
    steps = k // 128
    end = gl.load(expert_end_ptr + expert)
    # Weights of all experts together can exceed 2^31 elements where one expert's do not.
    expert = expert.to(gl.int64)

    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))
    _, _, x_rows, _ = bounded_rows(rows, end, gather_ptr, None, WIDE)
    x_ptrs = x_ptr + ((x_rows * k)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, X))[None, :])
    # Blocks of 16 rows; those past the last read an earlier one, so that no load needs a mask.
    blocks = n // 16
    first_block = pid_n * (BLOCK_N // 16)
    w_ptr += expert * blocks * steps * 256
    w_scale_ptr += expert * blocks * (steps + 1) * 64
    w_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, W))
    w_offs = (first_block + w_rows // 16) % blocks * (steps * 256) + w_rows % 16 * 16
    w_ptrs = w_ptr + (w_offs[:, None] + gl.arange(0, 16, gl.SliceLayout(0, W))[None, :])
    s_rows = gl.arange(0, BLOCK_N // 16, gl.SliceLayout(1, W_SCALE))
    s_offs = (first_block + s_rows) % blocks * ((steps + 1) * 64)
    s_columns = gl.arange(0, 64, gl.SliceLayout(0, W_SCALE))
    w_scale_ptrs = w_scale_ptr + (s_offs[:, None] + s_columns[None, :])

    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    x = gl.allocate_shared_memory(gl.float8e4nv, [NUM_STAGES, BLOCK_M, 128], X_SHARED)
    w = gl.allocate_shared_memory(gl.int32, [NUM_STAGES, BLOCK_N, 16], PLAIN)
    w_scale = gl.allocate_shared_memory(gl.uint8, [NUM_STAGES, BLOCK_N // 16, 64], PLAIN)

    for step in gl.static_range(NUM_STAGES - 1):
        _copy_step(step, steps, x_ptrs, w_ptrs, w_scale_ptrs, x, w, w_scale, NUM_STAGES)
    async_copy.wait_group(NUM_STAGES - 2)
    fence_async_shared()
    words = _widened(w.index(0), w_scale.index(0), table_ptr, BLOCK_N, WARPS)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    for step in range(0, steps):
        operand = _as_operand(words, OPERAND, BLOCK_N, WARPS)
        x_step = x.index(step % NUM_STAGES).permute((1, 0))
        if FAST_ACCUM:
            part = warpgroup_mma(operand, x_step, acc, is_async=True)
        else:
            none = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
            part = warpgroup_mma(operand, x_step, none, use_acc=False, is_async=True)
        async_copy.wait_group(NUM_STAGES - 3)
        fence_async_shared()
        following = (step + 1) % NUM_STAGES
        words = _widened(w.index(following), w_scale.index(following), table_ptr, BLOCK_N, WARPS)
        ahead = step + NUM_STAGES - 1
        _copy_step(ahead, steps, x_ptrs, w_ptrs, w_scale_ptrs, x, w, w_scale, NUM_STAGES)
        if FAST_ACCUM:
            acc = warpgroup_mma_wait(0, [part])
        else:
            acc += warpgroup_mma_wait(0, [part])
        words = _settled(words)
    async_copy.wait_group(0)

    # Row r of a block of 16 is column r % 8 * 2 + r // 8.
    acc_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
    acc_blocks = (first_block + acc_rows // 16) % blocks
    base_ptr = (w_scale_ptr + steps * 64).to(gl.pointer_type(gl.float32), bitcast=True)
    acc *= gl.load(base_ptr + acc_blocks * ((steps + 1) * 16) + acc_rows % 16)[:, None]
    if ROW_SCALES:
        rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC))
        _, _, x_rows, _ = bounded_rows(rows, end, gather_ptr, None, WIDE)
        acc *= gl.load(x_scale_ptr + x_rows)[None, :]
    else:
        acc *= gl.load(x_scale_ptr)
    if bias_ptr is not None:
        acc_columns = acc_blocks * 16 + acc_rows % 8 * 2 + acc_rows // 8 % 2
        acc += gl.load(bias_ptr + expert * n + acc_columns)[:, None]
    acc = gl.reshape(acc, [BLOCK_N // 16, 2, 8, BLOCK_M])
    acc = gl.permute(acc, [3, 0, 2, 1])
    COLUMNS: gl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    if SWIGLU:
        gate, up = gl.split(acc)
        acc = activate(gate, up, alpha, limit, shift)
    _store(
        gl.reshape(acc, [BLOCK_M, COLUMNS]),
        y_ptr,
        y_scale_ptr,
        weight_ptr,
        scatter_ptr,
        row,
        end,
        pid_n,
        n // 2 if SWIGLU else n,
        WIDE,
    )


@gluon.jit
def _store(
    out,  # [BLOCK_M, COLUMNS] fp32
    y_ptr,
    y_scale_ptr,
    weight_ptr,
    scatter_ptr,
    row,
    end,
    pid_n,
    n_out,
    WIDE: gl.constexpr,
):
    """Weight by routing, quantize and store, as `epilogue.finish` does after activating."""
    BLOCK_M: gl.constexpr = out.shape[0]
    COLUMNS: gl.constexpr = out.shape[1]
    OUT: gl.constexpr = out.type.layout
    if weight_ptr is not None:
        rows = gl.minimum(row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT)), end - 1)
        out *= gl.load(weight_ptr + rows)[:, None]
    if y_scale_ptr is not None:
        if y_scale_ptr.dtype.element_ty == gl.uint8:
            # Columns past n repeat others: they must not set the last group's scale.
            columns = pid_n * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, OUT))
            out = gl.where((columns < n_out)[None, :], out, 0.0)
            out, scale = mxfp8(out)
            groups = gl.cdiv(n_out, 32)
            _store_rows(scale, y_scale_ptr, scatter_ptr, row, end, pid_n, groups, WIDE)
        else:
            out /= gl.load(y_scale_ptr)
        out = saturate(out, y_ptr.dtype.element_ty)
    _store_rows(out.to(y_ptr.dtype.element_ty), y_ptr, scatter_ptr, row, end, pid_n, n_out, WIDE)


@gluon.jit
def _store_rows(out, y_ptr, scatter_ptr, row, end, pid_n, n_out, WIDE: gl.constexpr):
    """Store a block of y, or of its scales, by vectors along rows."""
    BLOCK_M: gl.constexpr = out.shape[0]
    COLUMNS: gl.constexpr = out.shape[1]
    Y: gl.constexpr = _rows_layout(COLUMNS, gl.num_warps(), 128 // out.dtype.primitive_bitwidth)
    out = gl.convert_layout(out, Y)
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, Y))
    _, row_mask, _, y_rows = bounded_rows(rows, end, None, scatter_ptr, WIDE)
    columns = pid_n * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, Y))
    ptrs = y_ptr + ((y_rows * n_out)[:, None] + columns[None, :])
    gl.store(ptrs, out, mask=row_mask[:, None] & (columns < n_out)[None, :])


@gluon.jit
def _mxfp4_hopper_kernel(
    y_ptr,  # [rows, n_out] bf16, fp32 or fp8
    y_scale_ptr,  # [1] fp32, [rows, ceil(n_out / 32)] uint8 or None
    x_ptr,  # [tokens, k] fp8 if gathered, else [rows, k], in the order of `in_steps`
    w_ptr,  # [experts, n / 16, k / 128, 16, 16] int32, see hopper_weights
    x_scale_ptr,  # [1] fp32, or [rows of x] fp32
    w_scale_ptr,  # [experts, n / 16, k / 128 + 1, 64] uint8, see hopper_weights
    table_ptr,  # [256] int64, hopper_weights.magnitudes
    bias_ptr,  # [experts, n] fp32 or None
    weight_ptr,  # [rows] fp32 routing weights or None
    gather_ptr,  # [rows] int32 token of each row, or None: x is in expert order
    scatter_ptr,  # [rows] int32 row of y of each row, or None: y is in expert order
    expert_end_ptr,  # [experts] int32
    tile_count_ptr,  # [1] int32
    tile_expert_ptr,  # [max_tiles] int32
    tile_row_ptr,  # [max_tiles] int32
    n,  # a multiple of 16
    k,  # padded, a multiple of 128
    alpha,
    limit,
    shift,
    ROW_SCALES: gl.constexpr,  # x has one a row
    FAST_ACCUM: gl.constexpr,
    SWIGLU: gl.constexpr,
    EVEN_K: gl.constexpr,
    WIDE: gl.constexpr,
    W_CACHE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_XCDS: gl.constexpr,
    W_TMA: gl.constexpr,
    X_TMA: gl.constexpr,
    TAILS: gl.constexpr,
    PERSISTENT: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    gl.static_assert(NUM_STAGES >= 3, "num_stages: hopper weights take 3 or more")
    gl.static_assert(gl.num_warps() % 4 == 0, "num_warps: wgmma takes 4 or a multiple")
    gl.static_assert(
        gl.num_warps() * 16 <= BLOCK_N, "num_warps: each multiplies 16 columns of block_n or more"
    )
    every_tile(
        _tile,
        (
            y_ptr,
            y_scale_ptr,
            x_ptr,
            w_ptr,
            x_scale_ptr,
            w_scale_ptr,
            table_ptr,
            bias_ptr,
            weight_ptr,
            gather_ptr,
            scatter_ptr,
            expert_end_ptr,
            n,
            k,
            alpha,
            limit,
            shift,
            ROW_SCALES,
            FAST_ACCUM,
            SWIGLU,
            WIDE,
            BLOCK_N,
            NUM_STAGES,
        ),
        tile_count_ptr,
        tile_expert_ptr,
        tile_row_ptr,
        expert_end_ptr,
        n,
        BLOCK_M,
        BLOCK_N,
        GROUP_M,
        NUM_XCDS,
        TAILS,
        PERSISTENT,
    )


@triton.jit
def _in_steps(x, ROWS: tl.constexpr):
    """Order 128 elements along K as wgmma meets those of w: word by word over 4 groups."""
    return tl.reshape(tl.permute(tl.reshape(x, (ROWS, 4, 8, 4)), (0, 2, 1, 3)), (ROWS, 128))


@triton.jit
def _order_fp8_kernel(
    x_ptr,  # [rows, k] fp8, as uint8
    y_ptr,  # [rows, padded] fp8, as uint8
    rows,
    k,
    padded,
    ROWS: tl.constexpr,
):
    """Put x into the order of `_in_steps`, and zeros after k."""
    # Rows past the last write it once more, so that no store needs a mask.
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None]
    column = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * k + column, mask=column < k, other=0)
    tl.store(y_ptr + row * padded + column, _in_steps(x, ROWS))


@triton.jit
def _mxfp4_step(x_ptr, x_scale_ptr, row, start, pairs, groups):
    """Load 128 elements of each row: two in a byte, and 4 scales."""
    offs_pair = start // 2 + tl.arange(0, 64)[None, :]
    offs_group = start // 32 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + row * pairs + offs_pair, mask=offs_pair < pairs, other=0)
    in_groups = offs_group < groups
    scale = tl.load(x_scale_ptr + row * groups + offs_group, mask=in_groups, other=0)
    return x, scale.to(tl.int32)


@triton.jit
def _widen_mxfp4_kernel(
    x_ptr,  # [rows, pairs] uint8
    x_scale_ptr,  # [rows, groups] uint8, e8m0
    y_ptr,  # [rows, padded] fp8
    y_scale_ptr,  # [rows] fp32
    rows,
    pairs,
    groups,
    padded,
    ROWS: tl.constexpr,
):
    """Refer a row's scales to its largest element, as `hopper_weights` does, in fp8."""
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None]
    base = tl.full((ROWS,), -9, tl.int32)
    for start in range(0, padded, 128):
        x, scale = _mxfp4_step(x_ptr, x_scale_ptr, row, start, pairs, groups)
        largest = tl.reshape(tl.maximum(x & 7, (x >> 4) & 7), (ROWS, 4, 16)).to(tl.int32)
        largest = tl.max(largest, axis=2)
        wanted = tl.where(largest == 0, -9, scale - 9 + largest // 2)
        base = tl.maximum(base, tl.max(tl.where(scale == 255, 255, wanted), axis=1))
    for start in range(0, padded, 128):
        x, scale = _mxfp4_step(x_ptr, x_scale_ptr, row, start, pairs, groups)
        x = tl.reshape(tl.join(x & 15, x >> 4), (ROWS, 4, 32)).to(tl.int32)
        # e2m1: 0 and 0.5, then bits of exponent and significand as fp32 has them.
        code = x & 7
        normal = ((code // 2 + 126) << 23 | (code % 2) << 22).to(tl.float32, bitcast=True)
        value = tl.where(code < 2, code.to(tl.float32) * 0.5, normal)
        value = tl.where(x > 7, -value, value)
        power = tl.maximum(scale - base[:, None] + 127, 1)
        value *= (power << 23).to(tl.float32, bitcast=True)[:, :, None]
        value = tl.reshape(value, (ROWS, 128)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * padded + start + tl.arange(0, 128)[None, :], _in_steps(value, ROWS))
    # 2^(base - 127), a subnormal up to 0; 255 is NaN.
    bits = tl.where(base > 0, base << 23, 1 << (22 + tl.minimum(base, 0)))
    y_scale = tl.where(base == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    tl.store(y_scale_ptr + row, y_scale[:, None])


def ready_x(x: Tensor, x_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Put x into the kernel's order, as fp8.

    Args:
        x: ``[rows, k]`` fp8, or ``[rows, ceil(k / 2)]`` uint8, whose last half byte is 0 if k
            is odd.
        x_scale: ``[1]`` fp32, or ``[rows, ceil(k / 32)]`` uint8.
    Returns:
        ``[rows, steps * 128]`` fp8, and its fp32 scales: ``[1]``, of mxfp4 ``[rows]``.
    """
    import torch

    rows, padded = x.shape[0], _padded(k)
    ready = x.new_empty((rows, padded), dtype=torch.float8_e4m3fn)
    mxfp4 = x.dtype == torch.uint8
    scale = x_scale.new_empty((rows,), dtype=torch.float32) if mxfp4 else x_scale
    if not rows:
        return ready, scale
    with torch.cuda.device_of(x):
        if mxfp4:
            grid = (triton.cdiv(rows, 4),)
            sizes = (rows, x.shape[1], x_scale.shape[1], padded)
            _widen_mxfp4_kernel[grid](x, x_scale, ready, scale, *sizes, ROWS=4, num_warps=1)
        else:
            grid = (triton.cdiv(rows, 16), padded // hopper_weights.STEP)
            bits = x.view(torch.uint8), ready.view(torch.uint8)
            _order_fp8_kernel[grid](*bits, rows, k, padded, ROWS=16, num_warps=1)
    return ready, scale


def _padded(k: int) -> int:
    return hopper_weights.steps(k) * hopper_weights.STEP


def _rules(tile: Tile) -> list[TileRule]:
    return [
        ("block_m", 16 <= tile.block_m <= 256, "16 to 256: wgmma's columns are rows of y here"),
        ("block_n", tile.block_n >= 64, "64 or more: wgmma takes 16 for each of 4 warps"),
        ("block_k", tile.block_k == hopper_weights.STEP, "128: hopper weights lie by such steps"),
    ]


def _check_schedule(tile: Tile, num_warps: int, num_stages: int) -> None:
    """Check what the kernel asserts when it is compiled."""
    if num_warps % 4 or num_warps * 16 > tile.block_n:
        raise ValueError(
            f"num_warps is {num_warps}; expected 4, or a multiple of it up to block_n / 16 = "
            f"{tile.block_n // 16}, for hopper weights"
        )
    if num_stages < 3:
        raise ValueError(
            f"num_stages is {num_stages}; expected 3 or more for hopper weights: one step is "
            "multiplied, the next widened, and a third under way"
        )


def check_x(mx: bool) -> None:
    """Refuse an mxfp8 x, by one check for compiler and launch.

    Raises:
        ValueError: x has scales along K.
    """
    if mx:
        raise ValueError(
            "x_format is 'mxfp8'; expected fp8 with one scale for hopper weights, which leave "
            "sums along K to the tensor cores"
        )


def check_w(w: Tensor, w_scale: Tensor, k: int) -> None:
    """Check packed weights against each other, k and where they lie.

    Raises:
        ValueError: they disagree, or the device is no Hopper.
    """
    # Gluon is not interpreted.
    interpreted = triton.knobs.runtime.interpret
    where = "the interpreter" if interpreted else target_name(w.device) or "a CPU"
    if where != "sm_90":
        raise ValueError(_of_hopper_alone(where))
    hopper_weights.check(w, w_scale, k)


def _of_hopper_alone(where: str) -> str:
    return f"scale_layout is 'hopper', which is for sm_90 alone; expected rows for {where}"


def source(problem: Problem, tile: Tile, target: Target, *, row_scales: bool) -> Source:
    """Describe the kernel to the compiler; needs no GPU.

    Args:
        row_scales: x is mxfp4, and has become fp8 with a scale per row.
    Raises:
        ValueError: the kernel can't take the tile, a format or the target.
    """
    if (target.backend, target.arch) != ("cuda", 90):
        raise ValueError(_of_hopper_alone(target.name))
    check_x(problem.x_format == "mxfp8")
    hopper_weights.check_rows(problem.n)
    experts, n, padded = problem.experts, problem.n, _padded(problem.k)
    w_shape = hopper_weights.w_shape(experts, n, padded)
    return grouped_gemm.describe(
        _mxfp4_hopper_kernel,
        replace(problem, k=padded),
        tile,
        target,
        x=TensorSpec((problem.x_rows, padded), "fp8e4nv"),
        w=TensorSpec((*w_shape[:2], w_shape[2] // 4), "i32"),
        own={
            "x_scale_ptr": TensorSpec((problem.x_rows if row_scales else 1,), "fp32"),
            "w_scale_ptr": TensorSpec(hopper_weights.w_scale_shape(experts, n, padded), "u8"),
            "table_ptr": TensorSpec((256,), "i64"),
            "ROW_SCALES": row_scales,
            "FAST_ACCUM": problem.fast_accum,
        },
        rules=_rules(tile),
        x_formats=(None, "fp8"),
        scale_layouts=("hopper",),
        ways=_WAYS,
        fast_accum=True,
    )


def launch(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    routing: Routing,
    tile: Tile,
    *,
    k: int,
    fast_accum: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Multiply each expert's rows by its weight; see `moe_gemm_a8w4` and `moe_gemm_a4w4`.

    Args:
        x, x_scale: checked already, but for rows.
        w, w_scale: as `hopper_weights.pack` gives them; checked already, by `check_w`.
    Raises:
        ValueError: arguments disagree.
    """
    import torch

    check_tile(tile, _rules(tile), _WAYS)
    num_warps = options.setdefault("num_warps", 8)
    if options.get("num_stages") is None:
        options["num_stages"] = _DEFAULT_STAGES
    _check_schedule(tile, num_warps, options["num_stages"])
    row_scales = x.dtype == torch.uint8
    x, x_scale = ready_x(x, x_scale, k)
    own = {
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        "table_ptr": hopper_weights.magnitudes(w.device),
        "ROW_SCALES": row_scales,
        "FAST_ACCUM": fast_accum,
        "NUM_STAGES": options["num_stages"],
    }
    return grouped_gemm.launch(
        _mxfp4_hopper_kernel,
        x,
        w.view(torch.int32),
        own,
        routing,
        tile,
        k=_padded(k),
        rules=_rules(tile),
        ways=_WAYS,
        **options,
    )
