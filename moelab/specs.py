"""What is compiled, measured and compared: frozen values, standard library only.

Every other module speaks in these: a kernel is named, a `Problem` says what it
computes, a `Tile` and launch options say how, a `Target` says where.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Target:
    """A GPU that the compiler can be asked about, present or not.

    Args:
        name: what users type: ``gfx950``, ``sm_90``.
        chips: products built on it.
        backend: Triton's backend, ``hip`` or ``cuda``.
        arch: Triton's architecture: ``gfx950`` or ``90``.
        warp_size: threads per warp (wave).
        lds_limit: bytes of LDS / shared memory that one workgroup may use.
        lds_per_cu: bytes shared by all workgroups of one compute unit / SM.
        registers_per_thread: most vector registers one thread may use.
        registers_per_simd: 32-bit vector registers of one SIMD (AMD) or SM
            sub-partition (NVIDIA), over all its lanes.
        register_granularity: allocation step of registers per thread.
        simds_per_cu: SIMDs (sub-partitions) per compute unit (SM).
        max_warps_per_simd: resident warps per SIMD.
        max_workgroups_per_cu: resident workgroups per compute unit / SM.
        compute_units: on the first of ``chips``; None where no source was found.
        peak_tflops: dense peak per type of the first of ``chips``, e.g.
            ``{"bf16": 2500.0, "fp8": 5000.0}``; empty where no source was found.
        bandwidth_tbps: peak memory bandwidth of the first of ``chips``; None
            where no source was found.
        fp8: Triton's name of the e4m3 type that the matrix units take.
        sources: where each figure comes from, ``{"lds_limit": "...", ...}``.
        xcds: dies that take workgroups in turn and share no L2.
        async_copy_switch: Triton can copy global memory to LDS past the registers or
            not, as it is told.
    """

    name: str
    chips: tuple[str, ...]
    backend: str
    arch: str | int
    warp_size: int
    lds_limit: int
    lds_per_cu: int
    registers_per_thread: int
    registers_per_simd: int
    register_granularity: int
    simds_per_cu: int
    max_warps_per_simd: int
    max_workgroups_per_cu: int
    compute_units: int | None
    peak_tflops: dict[str, float]
    bandwidth_tbps: float | None
    fp8: str
    sources: dict[str, str]
    xcds: int = 1
    async_copy_switch: bool = False


@dataclass(frozen=True)
class Tile:
    """The block of the output that one program computes, its step along K, and how it goes about.

    Args:
        split_k: programs that share a block's reduction, each with a part of K.
        group_m: row tiles that programs visit for every column before the next ones.
        tma: operands come through the tensor memory accelerator (Hopper and later), by
            descriptors: w, and x where its rows lie together and ``tails`` is 0.
        tails: how often the last tile of an expert may be halved: one of ``block_m`` is
            computed as one of ``block_m / 2^tails`` or more that still holds its rows.
        persistent: one program for each compute unit, which takes tile after tile and loads
            the next one's operands while it stores.
        specialized: of a persistent program's warps, some only load, by TMA where rows lie
            together, and the others only multiply (Hopper alone).

    >>> str(Tile.parse("64x32x512/7"))
    '64x32x512/7'
    >>> Tile.parse("128x256x128+tma+tails2").tails
    2
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    group_m: int = 4
    tma: bool = False
    tails: int = 0
    persistent: bool = False
    specialized: bool = False

    @classmethod
    def parse(cls, text: str) -> Tile:
        """Read ``MxNxK``, or ``MxNxK/S`` where S programs share the reduction.

        How to go about it follows, if it is not as usual: ``+group8``, ``+tma``, ``+tails2``,
        ``+persistent``, ``+specialized``.

        Raises:
            ValueError: not three powers of two, or no such way; the message shows the text.
        """
        blocks, *ways = text.strip().split("+")
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/([1-9]\d*))?", blocks)
        if not match:
            raise ValueError(
                f"tile {text!r}: expected BLOCK_MxBLOCK_NxBLOCK_K, for example 128x256x128, "
                "or 64x32x512/7 where 7 programs share each reduction"
            )
        block_m, block_n, block_k, split_k = (int(group or 1) for group in match.groups())
        wrong = [b for b in (block_m, block_n, block_k) if b < 1 or b & (b - 1)]
        if wrong:
            raise ValueError(
                f"tile {text!r}: {wrong[0]} is not a power of two, which Triton's blocks must be"
            )
        return cls(block_m, block_n, block_k, split_k, **_ways(text, ways))

    @property
    def ways(self) -> str:
        """How to go about it, where that is not as usual, as `parse` reads it."""
        return "".join(
            "+" + way
            for way, said in (
                (f"group{self.group_m}", self.group_m != 4),
                ("tma", self.tma),
                (f"tails{self.tails}", self.tails),
                ("persistent", self.persistent),
                ("specialized", self.specialized),
            )
            if said
        )

    def __str__(self) -> str:
        shared = f"/{self.split_k}" if self.split_k > 1 else ""
        return f"{self.block_m}x{self.block_n}x{self.block_k}{shared}{self.ways}"


def _ways(text: str, ways: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way in ways:
        if way in ("tma", "persistent", "specialized"):
            found[way] = True
        elif match := re.fullmatch(r"(group|tails)([1-9]\d*)", way):
            found["group_m" if match[1] == "group" else "tails"] = int(match[2])
        else:
            raise ValueError(
                f"tile {text!r}: {way!r} is none of group8, tma, tails2 (or other numbers), "
                "persistent and specialized"
            )
    return found


X_FORMATS = ("fp8", "mxfp8")
UNQUANTIZED = ("bf16", "fp32")
Y_FORMATS = (*UNQUANTIZED, "fp8", "mxfp8")
SCALE_LAYOUTS = ("rows", "cdna4", "hopper")


@dataclass(frozen=True)
class Problem:
    """What one launch computes: every expert's rows of x times that expert's weight.

    The two kernels that are no MoE GEMM have one expert, which every token visits once.

    Args:
        model: whose layer it is, or the name of the test that it comes from.
        layer: 1 gathers tokens and ends in SwiGLU; 2 weights rows and scatters them back
            to their tokens. A launch that is no MoE GEMM counts as 1.
        tp: tensor parallelism, already applied to ``n`` and ``k``.
        m: tokens before top-k.
        experts, top_k: how many there are, how many each token visits.
        n, k: columns of the weight and length of the reduction.
        gather: x is ``[m, k]`` and rows are gathered by token; otherwise x is
            ``[m * top_k, k]``, sorted by expert.
        swiglu: pairs of columns end as one: y has ``n // 2`` columns.
        weighted: rows of y are multiplied by their routing weight.
        bias: fp32 ``[experts, n]`` is added.
        scatter: rows of y go back to where their token and slot are.
        x_format: of x, one of `X_FORMATS` where the kernel takes several; None is its first.
        y_format: one of `Y_FORMATS`; ``fp8`` has a static scale.
        scale_layout: of w's mx scales, one of `SCALE_LAYOUTS`: ``rows``, ``cdna4`` as its
            matrix units read them, or ``hopper``, where w is laid out for its fp8 units too.
        n_bf16: columns of the bf16 weight beside the narrow one; 0 where there is none.
        fast_accum: whole sums are left to Hopper's fp8 tensor cores, with about 14 bits.
    """

    model: str
    layer: int
    tp: int
    m: int
    experts: int
    top_k: int
    n: int
    k: int
    gather: bool
    swiglu: bool
    weighted: bool
    bias: bool = True
    scatter: bool = False
    x_format: str | None = None
    y_format: str = "bf16"
    scale_layout: str = "rows"
    n_bf16: int = 0
    fast_accum: bool = False

    @property
    def rows(self) -> int:
        """Rows of all experts together."""
        return self.m * self.top_k

    @property
    def x_rows(self) -> int:
        """Rows of x: one for each token if they are gathered."""
        return self.m if self.gather else self.rows

    @property
    def n_out(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.swiglu else self.n


@dataclass(frozen=True)
class TensorSpec:
    """A contiguous tensor's shape and type, without its memory.

    Stands for a real tensor when Triton specializes a launch: it answers the
    same questions. ``data_ptr`` is 0 because allocators align to 16 bytes and more.

    >>> TensorSpec((4, 8), "bf16").ptr_range()
    64
    """

    shape: tuple[int, ...]
    dtype: str

    def data_ptr(self) -> int:
        """Address, of which only the alignment is asked."""
        return 0

    def ptr_range(self) -> int:
        """Bytes that the tensor spans; beyond 2 GiB the AMD backend drops buffer loads."""
        return math.prod(self.shape) * _BYTES[self.dtype]


# By Triton's names of the types.
_BYTES = {"fp8e4nv": 1, "fp8e4b8": 1, "u8": 1, "bf16": 2, "i32": 4, "fp32": 4, "i64": 8}


@dataclass(frozen=True)
class Source:
    """A kernel as one launch would call it, for the compiler alone.

    Args:
        fn: the ``triton.jit`` or ``gluon.jit`` function.
        args: every parameter by name: `TensorSpec`, number, string or None; but for
            ``NUM_STAGES``, of a Gluon kernel that makes its own copies: the launch's.
        options: launch options that belong to the kernel rather than to the sweep,
            e.g. ``{"matrix_instr_nonkdim": 16}``.
    """

    fn: Any
    args: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class CapturedLaunch:
    """A launch that somebody's program made, as Triton's frontend left it.

    Args:
        ir: the kernel as text.
        stage: which text: ``ttir``, or ``ttgir`` of a Gluon kernel.
        options: JSON: Triton's launch options, all of them.
        environment: JSON: the variables that the compiler read.
        async_copy: the AMD switch; None where the target has none.
    """

    ir: str
    stage: str
    options: str
    environment: str
    num_warps: int
    num_stages: int
    async_copy: bool | None
    target: str


@dataclass(frozen=True)
class Cost:
    """What a problem needs at least, whoever computes it.

    Args:
        flops: useful floating-point operations, padding not counted.
        bytes: compulsory traffic: each input read once, each output written once.
    """

    flops: int
    bytes: int


# The AMD switch: on, off, as the Triton that compiles has it; None where there is none.
AsyncCopy = bool | None | Literal["default"]


# What may be changed of a question without another kernel or problem; block_m is also the
# layout of the routing.
SETTINGS = ("num_stages", "block_k", "block_n", "block_m", "num_warps", "async_copy")


@dataclass(frozen=True)
class Configuration:
    """One question to the compiler."""

    kernel: str
    problem: Problem
    tile: Tile
    num_warps: int
    num_stages: int
    async_copy: AsyncCopy
    target: str

    def asked(self) -> dict[str, Any]:
        """Spell the question out, as rows do."""
        own = {name: value for name, value in vars(self).items() if name not in ("problem", "tile")}
        return own | vars(self.problem) | vars(self.tile)

    @property
    def settings(self) -> dict[str, Any]:
        """Give its `SETTINGS` by name."""
        asked = self.asked()
        return {name: asked[name] for name in SETTINGS}

    def with_settings(self, **settings: Any) -> Configuration:
        """Change some of its `SETTINGS`."""
        blocks = {name: settings.pop(name) for name in vars(self.tile) if name in settings}
        return replace(self, tile=replace(self.tile, **blocks), **settings)


@dataclass(frozen=True)
class KernelLaunch:
    """One question to the compiler about anybody's kernel.

    Args:
        kernel: ``FILE.py:KERNEL`` or ``package.module:KERNEL``.
        args: JSON: a type or a constant for every parameter, as `launches` describes.
        options: JSON: Triton's launch options, but for warps and stages.
    """

    kernel: str
    args: str
    options: str
    num_warps: int
    num_stages: int
    async_copy: AsyncCopy
    target: str

    def asked(self) -> dict[str, Any]:
        """Spell the question out, as rows do."""
        blocks = {name: value for name, (_, value) in self._blocks().items()}
        return blocks | ({"split_k": 1} if len(blocks) == 3 else {}) | vars(self)

    @property
    def settings(self) -> dict[str, Any]:
        """Give its `SETTINGS` by name, those that there are."""
        asked = self.asked()
        return {name: asked[name] for name in SETTINGS if name in asked}

    def with_settings(self, **settings: Any) -> KernelLaunch:
        """Change some of its `SETTINGS`."""
        args, blocks = json.loads(self.args), self._blocks()
        for name in blocks.keys() & settings.keys():
            args[blocks[name][0]] = settings.pop(name)
        return replace(self, args=compact(args), **settings)

    def _blocks(self) -> dict[str, tuple[str, int]]:
        """Find the constants that are called as blocks are: ``BLOCK_M``, ``BLOCK_SIZE_K``."""
        found = {}
        for name, value in json.loads(self.args).items():
            match = re.fullmatch(r"BLOCK_?(?:SIZE_?)?([MNK])", name, re.IGNORECASE)
            if match and type(value) is int:
                found[f"block_{match[1].lower()}"] = (name, value)
        return found


def compact(of: Mapping[str, Any]) -> str:
    """Write JSON in one way only, so that equal launches are equal text."""
    return json.dumps(of, sort_keys=True, separators=(",", ":"))


Question = Configuration | KernelLaunch


@dataclass(frozen=True)
class Buffer:
    """A stretch of LDS / shared memory that the compiler set aside, and for how long.

    Args:
        name: of the variable in the kernel's source, or what scratch is for.
        operation: what asked for it: ``local_alloc``, ``convert_layout``, ``reduce``, ...
        line: of the source, ``file.py:123``; empty where the compiler kept none.
        shape: elements of one copy. Of scratch, the tensor that the operation gives: it
            may pass through LDS in parts.
        dtype: of the elements, as Triton names it where it does; of whole numbers the
            compiler knows no sign: ``i8``.
        copies: of the tile, one for each step that is under way at once.
        padding_bytes: of all copies, beyond their elements; 0 for scratch.
        offset, size_bytes: where it lies.
        first, last: when it lives, in operations of the kernel in program order: from
            ``first`` until before ``last``.
    """

    name: str
    operation: str
    line: str
    shape: tuple[int, ...]
    dtype: str
    copies: int
    padding_bytes: int
    offset: int
    size_bytes: int
    first: int
    last: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.size_bytes


@dataclass(frozen=True)
class LdsMap:
    """Where a kernel's LDS / shared memory goes.

    Args:
        buffers: in program order.
        positions: operations of the kernel, the length of its program order.
        missing: why there is no map; None where there is.
    """

    buffers: tuple[Buffer, ...] = ()
    positions: int = 0
    missing: str | None = None
