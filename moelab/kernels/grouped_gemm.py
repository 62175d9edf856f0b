"""What all grouped GEMMs share: arguments, checks, the output, and what correct means."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import triton
from triton.runtime.errors import OutOfResources

from .. import tuned
from ..specs import Y_FORMATS, Cost, Problem, Source, Target, TensorSpec, Tile
from . import routing as routing_
from . import source_hash
from .epilogue import SwiGLU, finish_reference
from .formats import MX_GROUP, mx_groups
from .launch import (
    AMD_OPTIONS,
    STREAMED_BLOCK_M,
    TMA_SINCE,
    WIDE_ELEMENTS,
    TileRule,
    check_even,
    check_formats,
    check_schedule,
    check_tile,
    compute_units,
    described,
    expect,
    expect_tile,
    has_tma,
    one_of,
    target_name,
)
from .routing import Routing

if TYPE_CHECKING:
    from torch import Tensor


class Layer(TypedDict, total=False):
    """What a MoE layer asks of its GEMM; launchers and references take these by name.

    Args:
        bias: ``[experts, n]`` fp32, None adds nothing.
        gather: x is ``[tokens, k]`` and rows are gathered by token (the default);
            otherwise x is ``[rows, k]`` in expert order.
        weighted: multiply each row by its routing weight.
        scatter: rows of y lie at ``token * top_k + slot``; otherwise in expert order.
        swiglu: activation over interleaved pairs of columns; n must be even.
    """

    bias: Tensor | None
    gather: bool
    weighted: bool
    scatter: bool
    swiglu: SwiGLU | None


class Options(Layer, total=False):
    """What a launcher takes by name besides: the output's format and how to launch.

    Args:
        y_format: ``bf16`` (the default), ``fp32``, ``fp8`` or ``mxfp8``.
        y_scale: ``[1]`` fp32, the static scale of an ``fp8`` y: it stands for
            ``y * y_scale``, and saturates.
        num_warps, num_stages: as Triton has them; left out, 8 and 2 for a given tile (4 and 4
            for a specialized one, 8 and 4 for hopper weights), else what was tuned with the
            tile, or as many stages as fit.
        num_xcds: dies of the chip that share no L2 (8 on MI300X and MI355X).
    """

    y_format: str
    y_scale: Tensor | None
    num_warps: int
    num_stages: int | None
    num_xcds: int


# How a kernel that calls `routing.every_tile` can go about its tiles.
WAYS = ("tma", "tails", "persistent")


def _tile_rules(tile: Tile, swiglu: bool, y_format: str, k: int, has_tma: bool) -> list[TileRule]:
    """Say what every grouped GEMM wants of a tile; see `launch.check_tile`."""
    least_n = (2 if swiglu else 1) * (MX_GROUP if y_format == "mxfp8" else 1)
    of = " for whole groups of mxfp8" if y_format == "mxfp8" else ": SwiGLU pairs columns"
    return [
        ("split_k", tile.split_k == 1, "1: a MoE GEMM's reduction is not shared"),
        ("block_k", tile.block_k >= 32, "32 or more, what matrix units take at once"),
        ("block_n", tile.block_n >= least_n, f"{least_n} or more{of}"),
        ("group_m", tile.group_m >= 1, "1 or more"),
        ("tma", has_tma or not tile.tma, "none: it needs Hopper or later"),
        ("tma", k % 16 == 0 < k or not tile.tma, f"none: it needs rows of 16 bytes, and k is {k}"),
        ("block_n", tile.block_n <= 256 or not tile.tma, "256 or less, for TMA"),
        ("block_m", tile.block_m <= 256 or not tile.tma, "256 or less, for TMA"),
        ("tails", 0 <= tile.tails <= 2, "0, 1 or 2"),
        (
            "tails",
            tile.tails <= 0 or tile.block_m >> tile.tails >= 16,
            "fewer: a tail has 16 rows or more",
        ),
        ("tails", not (tile.tails and tile.persistent), "0: a persistent program has none"),
    ]


def _arguments(
    y: Any,
    y_scale: Any,
    x: Any,
    w: Any,
    own: Mapping[str, Any],
    routing: Routing,
    tile: Tile,
    *,
    n: int,
    k: int,
    bias: Any,
    gather: bool,
    weighted: bool,
    scatter: bool,
    swiglu: SwiGLU | None,
    num_xcds: int,
    ways: Collection[str],
) -> dict[str, Any]:
    """Bind the kernel's parameters: a launch with tensors, the compiler with shapes."""
    activation = swiglu or SwiGLU()
    largest = max(math.prod(x.shape), math.prod(y.shape), math.prod(w.shape[1:]))
    # A tail's block of x is smaller, and a descriptor has one.
    w_tma = tile.tma or tile.specialized
    x_tma = w_tma and not gather and not tile.tails
    x_block, w_block = (tile.block_m, tile.block_k), (tile.block_n, tile.block_k)
    own_ways = {
        "W_TMA": w_tma,
        "X_TMA": x_tma,
        "TAILS": tile.tails,
        "PERSISTENT": tile.persistent,
    }
    return {
        "y_ptr": y,
        "y_scale_ptr": y_scale,
        "x_ptr": described("x", x, x_block, tile.specialized) if x_tma else x,
        "w_ptr": described("w", w, w_block, tile.specialized) if w_tma else w,
        **own,
        "bias_ptr": bias,
        "weight_ptr": routing.weight if weighted else None,
        "gather_ptr": routing.gather_index if gather else None,
        "scatter_ptr": routing.scatter_index if scatter else None,
        "expert_end_ptr": routing.expert_end,
        "tile_count_ptr": routing.tile_count,
        "tile_expert_ptr": routing.tile_expert,
        "tile_row_ptr": routing.tile_row,
        "n": n,
        "k": k,
        "alpha": activation.alpha,
        "limit": activation.limit,
        "shift": activation.shift,
        "SWIGLU": swiglu is not None,
        "EVEN_K": k % tile.block_k == 0,
        "WIDE": largest >= WIDE_ELEMENTS,
        "W_CACHE": ".cg" if tile.block_m <= STREAMED_BLOCK_M else "",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "NUM_XCDS": num_xcds,
        **(own_ways if ways else {}),
    }


def describe(
    kernel: Any,
    problem: Problem,
    tile: Tile,
    target: Target,
    x: TensorSpec,
    w: TensorSpec,
    own: Mapping[str, Any],
    rules: Iterable[TileRule] = (),
    amd_options: Mapping[str, Any] = AMD_OPTIONS,
    x_formats: Sequence[str | None] = (None,),
    scale_layouts: Sequence[str] = ("rows",),
    ways: Collection[str] = (),
    fast_accum: bool = False,
) -> Source:
    """Describe a launch of ``kernel`` to the compiler; needs no GPU.

    Args:
        own: the arguments that only this kernel has, by name.
        rules: the kernel's own; see `launch.check_tile`.
        x_formats, scale_layouts, ways, fast_accum: what the kernel takes.
    Raises:
        ValueError: the kernel can't take the tile or a format, or the target has no TMA.
    """
    check_formats(problem, x_formats, Y_FORMATS, scale_layouts, fast_accum)
    check_even("w", problem.n, problem.swiglu)
    has_tma = target.backend == "cuda" and divmod(int(target.arch), 10) >= TMA_SINCE
    own_rules = _tile_rules(tile, problem.swiglu, problem.y_format, problem.k, has_tma)
    check_tile(tile, [*own_rules, *rules], ways)
    shape = (problem.rows, problem.n_out)
    fp8 = x.dtype if x.dtype.startswith("fp8") else "fp8e4nv"
    dtypes = {"bf16": "bf16", "fp32": "fp32", "fp8": fp8, "mxfp8": "fp8e4nv"}
    scales = {
        "fp8": TensorSpec((1,), "fp32"),
        "mxfp8": TensorSpec((problem.rows, mx_groups(problem.n_out)), "u8"),
    }
    args = _arguments(
        TensorSpec(shape, dtypes[problem.y_format]),
        scales.get(problem.y_format),
        x,
        w,
        own,
        routing_.describe(problem, tile),
        tile,
        n=problem.n,
        k=problem.k,
        bias=TensorSpec((problem.experts, problem.n), "fp32") if problem.bias else None,
        gather=problem.gather,
        weighted=problem.weighted,
        scatter=problem.scatter,
        swiglu=SwiGLU() if problem.swiglu else None,
        num_xcds=target.xcds,
        ways=ways,
    )
    return Source(kernel, args, dict(amd_options) if target.backend == "hip" else {})


def choose(
    kernel: str,
    tile: Tile | None,
    routing: Routing,
    options: Options,
    *,
    w: Tensor,
    k: int,
    x_format: str | None = None,
    scale_layout: str = "rows",
    fast_accum: bool = False,
) -> tuple[Tile, Options]:
    """Take the tile that is given, or else the one that was tuned for this launch.

    Args:
        kernel: by name.
        options: those given; warps and stages among them win over the tuned ones.
        w, k: checked already.
        x_format, scale_layout: as in `Problem`.
    Returns:
        the tile, and the options with its warps and stages; see `tuned.choose`.
    Raises:
        ValueError: what is given is no tile; or none is, and none was tuned for this shape
            with the routing's block_m, but with another: the message says which.
    """
    if tile is not None:
        expect_tile(tile)
        return tile, options
    _expect_routing(routing)
    experts, n = w.shape[:2]
    tokens = routing.gather_index.numel() // max(routing.top_k, 1)
    shape = tuned.Shape(
        kernel,
        experts,
        routing.top_k,
        n,
        k,
        options.get("gather", True),
        x_format,
        options.get("y_format", "bf16"),
        scale_layout,
        fast_accum,
    )
    target = target_name(w.device)
    choice = tuned.choose(shape, tokens, routing.block_m, target)
    if choice.source is not None:
        _warn_if_stale(kernel, choice.source, target)
    schedule = Options(num_warps=choice.num_warps, num_stages=choice.num_stages)
    return choice.tile, {**schedule, **options}


@functools.cache
def _warn_if_stale(kernel: str, measured: str, target: str) -> None:
    """Say once that a kernel changed since its configurations were measured."""
    if measured != (now := source_hash(kernel)):
        warnings.warn(
            f"{kernel} changed since it was tuned on {target} (source {measured}, now {now}): its "
            "configurations are used, and may no longer be the best; `moelab tune` measures anew",
            stacklevel=4,
        )


def _expect_routing(routing: Any) -> None:
    if not isinstance(routing, Routing):
        raise ValueError(f"routing is a {type(routing).__name__}; expected a Routing: see router")


def launch(
    kernel: Any,
    x: Tensor,
    w: Tensor,
    own: Mapping[str, Any],
    routing: Routing,
    tile: Tile,
    *,
    k: int,
    rules: Iterable[TileRule] = (),
    ways: Collection[str] = (),
    amd_options: Mapping[str, Any] = AMD_OPTIONS,
    bias: Tensor | None = None,
    gather: bool = True,
    weighted: bool = False,
    scatter: bool = False,
    swiglu: SwiGLU | None = None,
    y_format: str = "bf16",
    y_scale: Tensor | None = None,
    num_warps: int = 8,
    num_stages: int | None = 2,
    num_xcds: int = 1,
) -> Any:
    """Check what all grouped GEMMs check, allocate y and launch; see `Options`.

    Args:
        x, w: checked for type and columns already.
        own: the arguments that only this kernel has, by name; already checked.
        rules, ways: the kernel's own; see `launch.check_tile`.
        num_stages: None is as many as fit, `tuned.MOST_STAGES` at most; where the tile doesn't
            fit with one, of half its columns, or of half of those.
    Returns:
        ``[rows, n]`` of ``y_format``, ``n // 2`` columns with ``swiglu``; for ``mxfp8`` the
        elements and their e8m0 scales ``[rows, ceil(columns / 32)]``.
    Raises:
        ValueError: an argument disagrees with ``w``, or the kernel can't take the tile;
            the message shows both.
    """
    import torch

    experts, n = w.shape[:2]
    _expect_routing(routing)
    rows, tiles = routing.gather_index.numel(), routing.tile_expert.numel()
    indices = {
        "gather_index": rows,
        "scatter_index": rows,
        "expert_end": experts,
        "tile_count": 1,
        "tile_expert": tiles,
        "tile_row": tiles,
    }
    for name, size in indices.items():
        expect(f"routing.{name}", getattr(routing, name), (size,), (torch.int32,), of=w)
    expect("routing.weight", routing.weight, (rows,), (torch.float32,), of=w)
    if routing.top_k < 1 or rows % routing.top_k:
        raise ValueError(
            f"routing.top_k is {routing.top_k}; expected 1 or more, and {rows} rows to be whole "
            "tokens"
        )
    expect("x", x, (rows // routing.top_k if gather else rows, x.shape[1]), (x.dtype,), of=w)
    if bias is not None:
        expect("bias", bias, (experts, n), (torch.float32,), of=w)
    own_rules = _tile_rules(tile, swiglu is not None, y_format, k, has_tma(w.device))
    check_tile(tile, [*own_rules, *rules], ways)
    if routing.block_m != tile.block_m:
        raise ValueError(
            f"tile {tile} has block_m = {tile.block_m}, but the routing was laid out for "
            f"block_m = {routing.block_m}; pass both the same"
        )
    if not isinstance(swiglu, SwiGLU | None):
        raise ValueError(f"swiglu is {swiglu!r}; expected a SwiGLU, or None for none")
    check_even("w", n, swiglu is not None)
    check_schedule(num_warps, 1 if num_stages is None else num_stages, num_xcds)
    one_of("y_format", y_format, Y_FORMATS)
    if (y_format == "fp8") != (y_scale is not None):
        raise ValueError(
            f"y_format is {y_format!r} and y_scale "
            f"{'missing' if y_scale is None else 'given'}; an fp8 y takes a static scale [1] "
            "fp32, the other formats none"
        )
    if y_scale is not None:
        expect("y_scale", y_scale, (1,), (torch.float32,), of=w)
    n_out = n // 2 if swiglu else n
    dtypes = {
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp8": x.dtype if x.dtype == torch.float8_e4m3fnuz else torch.float8_e4m3fn,
        "mxfp8": torch.float8_e4m3fn,
    }
    y = torch.empty((rows, n_out), dtype=dtypes[y_format], device=w.device)
    if y_format == "mxfp8":
        y_scale = torch.empty((rows, mx_groups(n_out)), dtype=torch.uint8, device=w.device)
    if rows and n:
        options = amd_options if torch.version.hip else {}

        def prepared(tile: Tile) -> functools.partial[Any]:
            args = _arguments(
                y,
                y_scale,
                x,
                w,
                own,
                routing,
                tile,
                n=n,
                k=k,
                bias=bias,
                gather=gather,
                weighted=weighted,
                scatter=scatter,
                swiglu=swiglu,
                num_xcds=num_xcds,
                ways=ways,
            )
            programs = tiles * triton.cdiv(n, tile.block_n)
            stays = tile.persistent or tile.specialized
            grid = (min(programs, compute_units(w.device)) if stays else programs,)
            return functools.partial(kernel[grid], **args, **options, num_warps=num_warps)

        with torch.cuda.device_of(w):
            if num_stages is None:
                _launch_fitting(prepared, tile, (kernel, w.device))
            else:
                prepared(tile)(num_stages=num_stages)
    return (y, y_scale) if y_format == "mxfp8" else y


# Of launches that take what fits: how much Triton refuses.
_REFUSED: dict[tuple[Any, ...], int] = {}

# Columns below which no tile is halved: mxfp8 behind SwiGLU takes so many (`_tile_rules`).
_LEAST_BLOCK_N = 64


def _launch_fitting(
    prepared: Callable[[Tile], functools.partial[Any]], tile: Tile, where: tuple[Any, ...]
) -> None:
    """Launch with as many stages as fit; where not even one does, with half the columns.

    What fits is what Triton doesn't refuse at the first launch of a kind.

    Args:
        prepared: binds all but the stages.
        where: the kernel and its device.
    Raises:
        OutOfResources: nothing fits.
    """
    widest = prepared(tile)
    kind = (*where, *map(_kind, widest.keywords.values()))
    asked = list(itertools.product(_halved(tile), range(tuned.MOST_STAGES, 0, -1)))
    for number in range(_REFUSED.get(kind, 0), len(asked)):
        narrower, num_stages = asked[number]
        launched = widest if narrower is tile else prepared(narrower)
        try:
            launched(num_stages=num_stages)
        except OutOfResources:
            if number == len(asked) - 1:
                raise
        else:
            _REFUSED[kind] = number
            return


def _halved(tile: Tile) -> Iterator[Tile]:
    """Yield a tile, and its halves along n."""
    yield tile
    while tile.block_n > _LEAST_BLOCK_N:
        tile = replace(tile, block_n=tile.block_n // 2)
        yield tile


def _kind(argument: Any) -> Any:
    """Tell arguments apart as far as they may compile to other code; a descriptor by its tensor."""
    return getattr(getattr(argument, "base", argument), "dtype", argument)


def cost(problem: Problem, x_row_bytes: int, w_bytes: int) -> Cost:
    """Count useful FLOPs and the bytes that any implementation must move.

    Args:
        x_row_bytes, w_bytes: of a row of x and of one expert's w, scales included.
    """
    y_row_bytes = {
        "bf16": 2 * problem.n_out,
        "fp32": 4 * problem.n_out,
        "fp8": problem.n_out,
        "mxfp8": problem.n_out + mx_groups(problem.n_out),
    }[problem.y_format]
    return Cost(
        flops=2 * problem.rows * problem.n * problem.k,
        bytes=problem.x_rows * x_row_bytes
        + min(problem.experts, problem.rows) * w_bytes
        + problem.rows * y_row_bytes,
    )


def reference(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    *,
    bias: Tensor | None = None,
    gather: bool = True,
    weighted: bool = False,
    scatter: bool = False,
    swiglu: SwiGLU | None = None,
) -> Tensor:
    """Say what correct means: one matrix product per expert, in float64; see `Layer`.

    Args:
        x: ``[tokens, k]`` if ``gather``, else ``[rows, k]``, float64.
        w: ``[experts, n, k]`` float64.
    Returns:
        ``[rows, n_out]`` float64, not quantized.
    """
    import torch

    if gather:
        x = x[routing.gather_index.long()]
    ends = routing.expert_end.tolist()
    parts = []
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        parts.append(
            finish_reference(
                x[start:end] @ w[expert].T,
                bias[expert] if bias is not None else None,
                routing.weight[start:end] if weighted else None,
                swiglu,
            )
        )
    y = torch.cat(parts)
    if scatter:
        y = torch.empty_like(y).index_copy_(0, routing.scatter_index.long(), y)
    return y
