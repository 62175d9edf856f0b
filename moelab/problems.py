"""The models, tile rules and stage rules under investigation, as data.

Shapes and rules were read from ROCm/aiter at 2f7b13fc55 (2026-04-10): its model
benchmark, ``bench_moe_gemm_*`` and ``moe_op_gemm_*``; the two fixes are
ROCm/aiter#2723 and #3372. The two kernels that are no MoE GEMM take the tiles of its
``gfx950-FF-A16W16-fused.json`` (4f402b56b5) and of its ``gfx950-FUSED-GEMM-AFP4WFP4-A16W16``
for N4=512, N16=256, K=7168 (5d3e057f2a), the latter with block_n of 32 or more, as it is
launched; their fixes are #2940 and #2784. First matching row wins in every table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from .specs import Problem, Tile


@dataclass(frozen=True)
class Model:
    """A mixture-of-experts layer pair before tensor parallelism.

    Args:
        dim1: hidden size: K of layer 1 and N of layer 2.
        dim2: N of layer 1, gate and up together; layer 2 reduces over half of it.
        kernels: what its experts are served with, the published table's choice first,
            then what computes its shared expert.
    """

    name: str
    experts: int
    top_k: int
    dim1: int
    dim2: int
    kernels: tuple[str, ...]


MODELS = {
    model.name: model
    for model in (
        Model(
            "DeepSeek-R1",
            256,
            8,
            7168,
            4096,
            ("moe_gemm_a4w4", "moe_gemm_a8w8_blockscale", "fused_gemm_afp4wfp4_a16w16"),
        ),
        Model("GPT-OSS 120B", 128, 4, 2880, 5760, ("moe_gemm_a8w4",)),
        Model("Llama4 Maverick", 128, 1, 5120, 16384, ("moe_gemm_a8w8", "ff_a16w16_fused")),
        Model("Qwen3-235B-A22B", 128, 8, 4096, 3072, ("moe_gemm_a8w8",)),
        Model(
            "Kimi-K2 Thinking",
            384,
            8,
            7168,
            4096,
            ("moe_gemm_a8w4", "moe_gemm_a4w4", "moe_gemm_a8w8_blockscale"),
        ),
    )
}

TENSOR_PARALLEL = (1, 2, 4, 8)
TOKENS = tuple(range(512, 15873, 1024))
LAYERS = (1, 2)


def problem(model: str, layer: int, tp: int, m: int) -> Problem:
    """Shape one layer of a model's experts, sharded.

    >>> problem("GPT-OSS 120B", layer=2, tp=4, m=512).k
    720
    """
    of = MODELS[model]
    dim2 = max(of.dim2 // tp, 1)
    first = layer == 1
    return Problem(
        model=model,
        layer=layer,
        tp=tp,
        m=m,
        experts=of.experts,
        top_k=of.top_k,
        n=dim2 if first else of.dim1,
        k=of.dim1 if first else dim2 // 2,
        gather=first,
        swiglu=first,
        weighted=not first,
        scatter=not first,
    )


# The kernels that are no MoE GEMM.
DENSE = ("ff_a16w16_fused", "fused_gemm_afp4wfp4_a16w16")


def shared_expert(kernel: str, model: str, tp: int, m: int) -> Problem:
    """Shape what a `DENSE` kernel computes of a model's shared expert, sharded.

    The shared experts of DeepSeek-R1 and Llama4 Maverick are as wide as one of their
    experts (config.json of deepseek-ai/DeepSeek-R1 and meta-llama/Llama-4-Maverick-17B-128E).

    >>> shared_expert("fused_gemm_afp4wfp4_a16w16", "DeepSeek-R1", tp=8, m=64).n
    512
    """
    of = MODELS[model]
    dim2 = max(of.dim2 // tp, 1)
    if kernel == "ff_a16w16_fused":
        return feed_forward(model, m, dim2, of.dim1, gated=True, tp=tp)
    return fused_gemm(model, m, dim2, of.experts, of.dim1, bias=False, tp=tp)


def feed_forward(model: str, m: int, n: int, k: int, gated: bool, tp: int = 1) -> Problem:
    """Shape `ff_a16w16_fused`: n columns of the up-projection, k of input and output."""
    return Problem(
        model=model,
        layer=1,
        tp=tp,
        m=m,
        experts=1,
        top_k=1,
        n=n,
        k=k,
        gather=False,
        swiglu=gated,
        weighted=False,
        bias=False,
    )


def fused_gemm(model: str, m: int, n: int, n_bf16: int, k: int, bias: bool, tp: int = 1) -> Problem:
    """Shape `fused_gemm_afp4wfp4_a16w16`: n columns in FP4 and n_bf16 in bf16."""
    return Problem(
        model=model,
        layer=1,
        tp=tp,
        m=m,
        experts=1,
        top_k=1,
        n=n,
        k=k,
        gather=False,
        swiglu=False,
        weighted=False,
        bias=bias,
        n_bf16=n_bf16,
    )


@dataclass(frozen=True)
class TileRule:
    """Where ``block_m <= max_block_m`` and ``n <= max_n``: this tile and its warps.

    Args:
        halve_below_programs: block_n is halved, while it is 64 or more, until the
            grid has this many programs; 0 never halves.
    """

    kernel: str
    max_block_m: int
    max_n: float
    block_n: int
    block_k: int
    num_warps: int
    halve_below_programs: int = 0


ANY = float("inf")
# fmt: off
TILE_RULES = (
    #         kernel                      block_m <=  n <=  block_n block_k warps
    TileRule("moe_gemm_a4w4",             16,         ANY,  128, 256, 4, halve_below_programs=256),
    TileRule("moe_gemm_a4w4",             128,        ANY,  512, 256, 8),
    TileRule("moe_gemm_a8w4",             16,         ANY,  128, 256, 4, halve_below_programs=256),
    TileRule("moe_gemm_a8w4",             32,         1024, 128, 256, 4),
    TileRule("moe_gemm_a8w4",             32,         4096, 256, 256, 8),
    TileRule("moe_gemm_a8w4",             128,        ANY,  512, 256, 8),
    TileRule("moe_gemm_a8w8",             16,         ANY,  64,  256, 4, halve_below_programs=256),
    TileRule("moe_gemm_a8w8",             128,        ANY,  256, 256, 8),
    TileRule("moe_gemm_a8w8_blockscale",  16,         ANY,  256, 128, 4, halve_below_programs=256),
    TileRule("moe_gemm_a8w8_blockscale",  128,        ANY,  256, 128, 8),
)


@dataclass(frozen=True)
class DenseTileRule:
    """Where ``m <= max_m``: this tile and its warps."""

    kernel: str
    max_m: float
    tile: Tile
    num_warps: int


DENSE_TILE_RULES = (
    #             kernel                        m <=  tile                      warps
    DenseTileRule("ff_a16w16_fused",            4,    Tile(4, 256, 256),        8),
    DenseTileRule("ff_a16w16_fused",            8,    Tile(8, 256, 256),        8),
    DenseTileRule("ff_a16w16_fused",            ANY,  Tile(64, 256, 256),       8),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", 8,    Tile(8, 32, 256, 14),     2),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", 16,   Tile(8, 32, 512, 8),      2),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", 32,   Tile(32, 32, 512, 7),     8),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", 64,   Tile(64, 32, 512, 7),     8),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", 128,  Tile(16, 32, 256, 4),     2),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", 256,  Tile(16, 64, 256, 4),     4),
    DenseTileRule("fused_gemm_afp4wfp4_a16w16", ANY,  Tile(128, 64, 256),       8),
)


@dataclass(frozen=True)
class StageRule:
    """Under ``policy``, where everything else matches: this many stages.

    Args:
        kernel, target: the only ones that the rule speaks of; None is every one.
    """

    policy: str
    kernel: str | None
    target: str | None
    max_block_m: int
    max_block_n: float
    num_stages: int


BEFORE, FIRST_FIX, LATER_FIX = "before #2723", "after #2723", "after #3372"
POLICIES = (BEFORE, FIRST_FIX, LATER_FIX)
FUSED_GEMM = "fused_gemm_afp4wfp4_a16w16"
STAGE_RULES = (
    #          policy     kernel                      target    block_m <= block_n <= stages
    StageRule(BEFORE,    "ff_a16w16_fused",          None,     8,   ANY, 2),
    StageRule(BEFORE,    "ff_a16w16_fused",          None,     64,  ANY, 1),
    StageRule(BEFORE,    None,                       None,     128, ANY, 2),
    StageRule(FIRST_FIX, "ff_a16w16_fused",          None,     8,   ANY, 2),
    StageRule(FIRST_FIX, "ff_a16w16_fused",          None,     64,  ANY, 1),
    StageRule(FIRST_FIX, FUSED_GEMM,                 None,     128, ANY, 2),
    StageRule(FIRST_FIX, "moe_gemm_a8w8_blockscale", None,     128, ANY, 2),
    StageRule(FIRST_FIX, None,                       "gfx950", 128, ANY, 1),
    StageRule(FIRST_FIX, None,                       None,     128, ANY, 2),
    # #2940 and #2784, which came before #3372.
    StageRule(LATER_FIX, "ff_a16w16_fused",          None,     4,   ANY, 1),
    StageRule(LATER_FIX, "ff_a16w16_fused",          None,     8,   ANY, 2),
    StageRule(LATER_FIX, "ff_a16w16_fused",          None,     64,  ANY, 1),
    StageRule(LATER_FIX, FUSED_GEMM,                 None,     32,  ANY, 2),
    StageRule(LATER_FIX, FUSED_GEMM,                 None,     128, ANY, 1),
    StageRule(LATER_FIX, "moe_gemm_a8w8_blockscale", None,     128, ANY, 2),
    StageRule(LATER_FIX, None,                       "gfx950", 16,  ANY, 2),
    StageRule(LATER_FIX, None,                       "gfx942", 16,  ANY, 2),
    StageRule(LATER_FIX, "moe_gemm_a4w4",            "gfx950", 32,  ANY, 2),
    StageRule(LATER_FIX, "moe_gemm_a8w4",            "gfx950", 32,  256, 2),
    StageRule(LATER_FIX, "moe_gemm_a8w4",            "gfx942", 32,  128, 2),
    StageRule(LATER_FIX, None,                       "gfx950", 128, ANY, 1),
    StageRule(LATER_FIX, None,                       "gfx942", 128, ANY, 1),
)
# fmt: on


def routed_block_m(problem: Problem) -> int:
    """Rows per tile: the mean rows per expert, rounded up to 2^n from 16 to 128.

    >>> routed_block_m(problem("GPT-OSS 120B", layer=1, tp=1, m=1536))
    64
    """
    mean = max(1, problem.rows // problem.experts)
    return max(16, min(1 << (mean - 1).bit_length(), 128))


def ruled_tile(kernel: str, problem: Problem, block_m: int | None = None) -> tuple[Tile, int]:
    """Find the tile and the number of warps that the published rules choose.

    Args:
        block_m: of a MoE GEMM's routing; None is the one that the rules choose.
    Raises:
        ValueError: no rule speaks of the kernel, or of such a block_m.
    """
    for dense in DENSE_TILE_RULES:
        if kernel == dense.kernel and problem.m <= dense.max_m:
            return dense.tile, dense.num_warps
    block_m = routed_block_m(problem) if block_m is None else block_m
    for rule in TILE_RULES:
        if kernel == rule.kernel and block_m <= rule.max_block_m and problem.n <= rule.max_n:
            tile = Tile(block_m, rule.block_n, rule.block_k)
            while tile.block_n >= 64 and programs(problem, tile) < rule.halve_below_programs:
                tile = replace(tile, block_n=tile.block_n // 2)
            return tile, rule.num_warps
    most = max((rule.max_block_m for rule in TILE_RULES if rule.kernel == kernel), default=0)
    if most:
        raise ValueError(
            f"no tile rule for {kernel} with block_m {block_m}; they end at {most}: route with "
            f"{most} or less, or give a tile"
        )
    known = sorted({rule.kernel for rule in (*TILE_RULES, *DENSE_TILE_RULES)})
    raise ValueError(
        f"no tile rule for kernel {kernel!r}; there are rules for {', '.join(known)}; "
        "give a tile and the number of warps instead"
    )


def max_tiles(rows: int, experts: int, block_m: int) -> int:
    """Row tiles that any distribution of ``rows`` over ``experts`` can need.

    The worst case gives one row to every expert but one.

    >>> max_tiles(rows=2048, experts=128, block_m=16)
    248
    """
    if rows <= experts:
        return rows
    return -(-(rows - experts + 1) // block_m) + experts - 1


def programs(problem: Problem, tile: Tile) -> int:
    """Programs in the grid, which is sized for the worst routing."""
    return max_tiles(problem.rows, problem.experts, tile.block_m) * -(-problem.n // tile.block_n)


def ruled_stages(policy: str, kernel: str, target: str, tile: Tile) -> int:
    """Find the stage count that a policy gives.

    Raises:
        ValueError: the policy says nothing of the target.

    >>> ruled_stages("after #3372", "moe_gemm_a8w4", "gfx950", Tile(32, 512, 256))
    1
    """
    for rule in STAGE_RULES:
        if (
            policy == rule.policy
            and rule.kernel in (None, kernel)
            and rule.target in (None, target)
            and tile.block_m <= rule.max_block_m
            and tile.block_n <= rule.max_block_n
        ):
            return rule.num_stages
    spoken_of = sorted({rule.target for rule in STAGE_RULES if rule.target})
    raise ValueError(
        f"policy {policy!r} has no stage count for {kernel} with tile {tile} on {target}; "
        f"its rules speak of {', '.join(spoken_of)}"
    )


def _moe_launches(
    test: str, shapes: tuple[tuple[int, int, int, int, int], ...], scale_layout: str = "rows"
) -> tuple[Problem, ...]:
    """List a MoE test's launches: (m, n, k, experts, top_k), with and without each option."""
    return tuple(
        Problem(
            model=test,
            layer=1 if gather else 2,
            tp=1,
            m=m,
            experts=experts,
            top_k=top_k,
            n=n,
            k=k,
            gather=gather,
            swiglu=swiglu,
            weighted=weighted,
            scale_layout=scale_layout,
        )
        for m, n, k, experts, top_k in shapes
        for gather, weighted, swiglu in itertools.product((False, True), repeat=3)
    )


@dataclass(frozen=True)
class AiterTest:
    """A test file that ROCm/aiter#2723 names, and the launches it makes.

    Args:
        fixed_by: the pull request after which it passed.
        problems: of its launches; MoE GEMMs run with and without gather, routing weights
            and SwiGLU. Shapes from ROCm/aiter at 1791f87 (a4w4: of those whose tile and
            layout are alike, one or two), 08940c7 (a8w4, static fp8 scales), c87dcc8 (a8w8,
            likewise), 17770a2 (blockscale, both operands scaled by blocks; chosen like
            a4w4's), 05d7fd7 (ff; it skips products above 5000^3) and 2038b2d (fused; weights
            not pre-shuffled, of the one N and K that its tiles are for).
    """

    name: str
    kernel: str
    fixed_by: str
    problems: tuple[Problem, ...]


# Stage policy and async copy, in the order in which they happened.
AITER_SCENARIOS = ((BEFORE, False), (BEFORE, True), (FIRST_FIX, True), (LATER_FIX, True))

AITER_TESTS = (
    AiterTest(
        "test_moe_gemm_a4w4",
        "moe_gemm_a4w4",
        "#2723",
        (
            *_moe_launches(
                "test_moe_gemm_a4w4",
                (
                    (16, 4096, 7168, 256, 8),
                    (1024, 7168, 2048, 256, 8),
                    (8192, 7168, 2048, 256, 8),
                    (32, 6144, 3072, 128, 4),
                ),
                scale_layout="cdna4",
            ),
            *_moe_launches(
                "test_moe_gemm_a4w4",
                (
                    (300, 400, 800, 8, 4),
                    (4096, 3072, 3072, 128, 4),
                ),
            ),
        ),
    ),
    AiterTest(
        "test_moe_gemm_a8w4",
        "moe_gemm_a8w4",
        "#2723",
        _moe_launches(
            "test_moe_gemm_a8w4",
            (
                (32, 6144, 3072, 128, 4),
                (8192, 3072, 3072, 128, 4),
                (4, 1024, 3072, 128, 4),
                (1024, 3072, 512, 128, 4),
                (4096, 3072, 3072, 128, 4),
                (16, 512, 512, 32, 2),
                (300, 400, 800, 8, 4),
            ),
        ),
    ),
    AiterTest(
        "test_moe_gemm_a8w8",
        "moe_gemm_a8w8",
        "#2723",
        _moe_launches("test_moe_gemm_a8w8", ((4096, 7168, 4096, 256, 8), (300, 400, 400, 8, 2))),
    ),
    AiterTest(
        "test_moe_gemm_a8w8_blockscale",
        "moe_gemm_a8w8_blockscale",
        "not by #2723",
        _moe_launches(
            "test_moe_gemm_a8w8_blockscale",
            (
                (16, 4096, 7168, 256, 8),
                (1024, 4096, 7168, 256, 8),
                (8192, 7168, 2048, 256, 8),
                (4, 300, 300, 8, 4),
            ),
        ),
    ),
    AiterTest(
        "test_ff_a16w16_fused",
        "ff_a16w16_fused",
        "#2940",
        tuple(
            # The intermediate size is that of the gate, and of up beside it.
            feed_forward("test_ff_a16w16_fused", m, (2 if gated else 1) * width, hidden, gated)
            for m, hidden, width in (
                (1, 1, 1),
                (3, 5, 2),
                *((1024 * v, 1024 * v, 1024 * v) for v in (1, 2, 4)),
                *((m, 256, 7168) for m in (32, 64, 128, 256)),
                *((m, 5120, 2880) for m in (32, 64, 128, 256)),
                *((m, 2880, 4096) for m in (32, 64, 128, 256)),
                *((m, 128, 2880) for m in (32, 64, 128, 256)),
            )
            for gated in (False, True)
        ),
    ),
    AiterTest(
        "test_fused_gemm_afp4wfp4_a16w16",
        "fused_gemm_afp4wfp4_a16w16",
        "#2784",
        tuple(
            fused_gemm("test_fused_gemm_afp4wfp4_a16w16", m, 512, 256, 7168, bias=True)
            for m in (1, 8, 32, 64, 128, 8192)
        ),
    ),
)
