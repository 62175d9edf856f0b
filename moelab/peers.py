"""Other people's grouped GEMMs, given the same numbers as ours.

A peer computes what `Inputs.expected` says from the same quantized x and w. What it wants laid
out otherwise is laid out beforehand where serving would do so once (weights and their scales,
routing). What serving does for every batch, and our kernels do as they load and store (to
gather rows, to pad each expert's, to scatter them back), is timed both ways: the product alone,
and all that it takes to give y from x. `Launch.includes` says which.

Peers know no SwiGLU, bias or routing weights of ours: both sides are given `plain` problems.
Sums are kept alike too: left to the tensor cores where `Inputs.fast_accum` says so, else in
fp32. What sums more precisely than asked counts, where it is the quicker.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import __version__, compiler, records, timing
from .parameters import ParameterError
from .specs import Configuration, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels.inputs import Inputs

ALL = "all"

# As they were compared: https://pypi.org has both.
_TRITON_KERNELS, _DEEP_GEMM = "tokenspeed-triton-kernels", "tokenspeed-deepgemm"

# What DeepGEMM's contiguous layout takes: no tile of it spans two experts.
_DEEP_GEMM_ROWS = 128


@dataclass(frozen=True)
class Launch:
    """One way to ask a peer for y.

    Args:
        includes: what is timed besides the product, of ``gather``, ``padding`` and
            ``scatter``, comma-separated; ``""`` is the product alone.
        run: launches it and returns what it gives.
        y: takes that into the order of `Inputs.expected`, rows of padding left out; not timed.
    """

    includes: str
    run: Callable[[], Tensor]
    y: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Somebody's grouped GEMM.

    Args:
        name: what users type.
        kernels: ours that it is compared with.
        note: what is called, and where it computes otherwise.
        needs: why it can't run here, in words that say what to install; None where it can.
        prepare: lays inputs out and gives the launches.
        package: that it comes in, as pip calls it; None of PyTorch, which every row names.
        only_fast: it is worth asking only where sums may be left to the tensor cores;
            elsewhere another peer is the same.
    """

    name: str
    kernels: tuple[str, ...]
    note: str
    needs: Callable[[], str | None]
    prepare: Callable[[Inputs], list[Launch]]
    package: str | None = None
    only_fast: bool = False

    def missing(self) -> str | None:
        """Say what keeps it from running here; None if nothing does."""
        return self.needs()

    def is_for(self, kernel: str, problem: Problem) -> bool:
        """Tell whether it is compared with a kernel of ours on a problem."""
        return kernel in self.kernels and (problem.fast_accum or not self.only_fast)

    def launches(self, drawn: Inputs) -> list[Launch]:
        """Lay inputs out for it.

        Args:
            drawn: of a `plain` problem.
        Raises:
            ValueError: SwiGLU, bias or routing weights are asked for.
        """
        if drawn.swiglu or drawn.bias is not None or drawn.weighted:
            raise ValueError(
                f"{self.name} knows no SwiGLU, bias or routing weights; give it a plain problem"
            )
        return self.prepare(drawn)


def plain(problem: Problem) -> Problem:
    """Leave out what peers don't compute: SwiGLU, bias and routing weights.

    Layer 1 stays a gather and a product ``[rows, n]`` in the experts' order; layer 2 a product
    of rows in the experts' order, scattered back to their tokens.
    """
    return replace(problem, swiglu=False, bias=False, weighted=False)


@dataclass(frozen=True)
class Asked:
    """One launch of a peer, as a row names it.

    Args:
        kernel: of ours that it is compared with.
        peer: by name.
        includes: as in `Launch`; None where it came to no launch.
    """

    kernel: str
    problem: Problem
    target: str
    peer: str
    includes: str | None = None

    def row(self) -> dict[str, Any]:
        """Start its row: a peer has no tile, warps, stages or LDS."""
        own = {name: value for name, value in vars(self).items() if name != "problem"}
        return (
            own
            | vars(self.problem)
            | {
                "triton": compiler.triton_version(),
                "status": "ok",
                "moelab": __version__,
                "schema": records.SCHEMA_VERSION,
            }
        )

    def made_by(self) -> dict[str, str]:
        """Name its package and version; nothing of PyTorch, which every row names."""
        package = PEERS[self.peer].package
        try:
            return {package: importlib.metadata.version(package)} if package else {}
        except importlib.metadata.PackageNotFoundError:
            return {}


def named(text: str) -> tuple[str, ...]:
    """Read names with commas between; ``all`` is everyone, nothing is no one."""
    return tuple(PEERS) if text == ALL else tuple(n for n in map(str.strip, text.split(",")) if n)


def check(names: Collection[str], asked: Iterable[Configuration]) -> None:
    """Refuse what can't be compared, before anything is compiled.

    Raises:
        ParameterError: no such peer, one that is compared with no kernel that is asked, or a
            problem that is not `plain`.
    """
    if not names:
        return
    kernels, problems = set(), set()
    for of in asked:
        kernels.add(of.kernel)
        problems.add(of.problem)
    for name in names:
        if name not in PEERS:
            raise ParameterError(f"no peer {name!r}; there are {', '.join(PEERS)}, or {ALL}")
    if not any(kernels & {*PEERS[name].kernels} for name in names):
        known = "; ".join(f"{name}: {', '.join(PEERS[name].kernels)}" for name in names)
        raise ParameterError(f"asked are {', '.join(sorted(kernels))}; peers have others: {known}")
    if any(problem != plain(problem) for problem in problems):
        raise ParameterError("peers know no SwiGLU, bias or routing weights; give plain problems")


def ready(
    names: Iterable[str],
    of: Configuration,
    drawn: Inputs,
    against: Callable[[Tensor], dict[str, Any]],
    tell: Callable[[Asked], None] = lambda of: None,
) -> tuple[dict[Asked, timing.Launch], dict[Asked, dict[str, Any]]]:
    """Lay a problem out for each peer, and launch once what it gives.

    What a peer lays out lives as long as its launches.

    Args:
        of: any configuration of ours, for its kernel, problem and target.
        against: tells an output's error, with status and reason if it is too large.
        tell: called with each peer before it lays out or launches.
    Returns:
        launches that gave the reference's result, and what each row gains; a peer that can't
        run here, or fails, is a row that says why.
    Raises:
        ContextLost: nothing can be launched any more.
    """
    launches: dict[Asked, timing.Launch] = {}
    found: dict[Asked, dict[str, Any]] = {}
    for peer in (PEERS[name] for name in names):
        if not peer.is_for(of.kernel, of.problem):
            continue
        asked = Asked(of.kernel, of.problem, of.target, peer.name)
        if lacks := peer.missing():
            found[asked] = {"status": "unavailable", "reason": lacks}
            continue
        tell(asked)
        try:
            offered = peer.launches(drawn)
        except Exception as error:
            found[asked] = timing.failure(error, asked)
            continue
        for launch in offered:
            included = replace(asked, includes=launch.includes)
            try:
                found[included] = against(launch.y(launch.run()))
            except Exception as error:
                found[included] = timing.failure(error, included)
            if "status" not in found[included]:
                launches[included] = launch.run
    return launches, found


@dataclass(frozen=True)
class Rows:
    """Where rows lie for a peer: in the experts' order, each expert's padded.

    Args:
        source: ``[padded rows]`` int64, the row of x of each; row 0 where it is padding.
        expert: ``[padded rows]`` int32; -1 where it is padding.
        place: ``[rows]`` int64, where each row of y lies among them, in the order of
            `Inputs.expected`.
    """

    source: Tensor
    expert: Tensor
    place: Tensor

    @classmethod
    def of(cls, drawn: Inputs, multiple: int = 1) -> Rows:
        """Pad each expert's rows to a multiple of ``multiple``."""
        import torch

        routing = drawn.routing
        count = routing.histogram.long()
        padded = (count + multiple - 1) // multiple * multiple
        shift = (padded.cumsum(0) - padded) - (count.cumsum(0) - count)
        order = torch.arange(int(count.sum()), device=count.device)
        owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        place = order + shift[owner]
        total = int(padded.sum())
        expert = place.new_full((total,), -1, dtype=torch.int32)
        expert[place] = owner.int()
        source = place.new_zeros(total)
        source[place] = routing.gather_index.long() if drawn.gather else order
        if drawn.scatter:
            place = torch.empty_like(place).index_copy_(0, routing.scatter_index.long(), place)
        return cls(source, expert, place)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of a matrix of any type: not every build indexes fp8."""
    import torch

    return x.view(torch.uint8).index_select(0, rows).view(x.dtype)


def unfused(
    drawn: Inputs,
    x: Sequence[Tensor],
    product: Callable[..., Tensor],
    rows: Rows,
    ready: Callable[..., tuple[Tensor, ...]] = lambda *x: x,
) -> list[Launch]:
    """Launch a product of rows in the experts' order alone, and with what it takes around it.

    Args:
        x: tensors whose rows are x's: values, and scales if each row has its own.
        product: takes them with their rows laid out and gives y's rows so.
        ready: does beforehand what the product would do to them first.
    """
    padding = len(rows.source) > len(rows.place)
    laid_out = tuple(take(each, rows.source) for each in x)
    at_hand = ready(*laid_out)
    launches = [Launch("", lambda: product(*at_hand), lambda y: y.index_select(0, rows.place))]
    around = {"gather": drawn.gather, "padding": padding, "scatter": drawn.scatter}
    if not any(around.values()):
        return launches

    def whole() -> Tensor:
        before = laid_out
        if drawn.gather or padding:
            before = tuple(take(each, rows.source) for each in x)
        y = product(*before)
        return y.index_select(0, rows.place) if drawn.scatter else y

    included = ", ".join(name for name, is_so in around.items() if is_so)
    in_order = (lambda y: y) if drawn.scatter else launches[0].y
    return [*launches, Launch(included, whole, in_order)]


# PyTorch.


def _torch_needs(name: str) -> str | None:
    import torch

    if not hasattr(torch, name):
        return f"torch.{name} is not in PyTorch {torch.__version__}: install a later one"
    return None


def _torch_fp8(drawn: Inputs, fast: bool | None = None) -> list[Launch]:
    """Launch `torch._scaled_grouped_mm`; ``fast`` is None where it is as asked."""
    import torch

    rows = Rows.of(drawn)
    x_scale = drawn.x_scale.expand(len(rows.source)).contiguous()
    w_scale = drawn.w_scale[:, None].expand(drawn.w.shape[:2]).contiguous()
    w, ends = drawn.w.mT, drawn.routing.expert_end
    fast = drawn.fast_accum if fast is None else fast

    def product(x: Tensor) -> Tensor:
        return torch._scaled_grouped_mm(
            *(x, w, x_scale, w_scale),
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    return unfused(drawn, (drawn.x,), product, rows)


def _torch_bf16(drawn: Inputs) -> list[Launch]:
    import torch

    from .kernels import formats

    x = _x_in_bf16(drawn)
    if drawn.x_scale.dtype == torch.float32 and drawn.x_scale.dim() == 1:
        x = (x.float() * drawn.x_scale).bfloat16()
    ws, w_scales = _w_in_rows(drawn)
    w = torch.empty(*ws.shape[:2], drawn.k, dtype=torch.bfloat16, device=ws.device)
    # One expert at a time: fp32 takes twice as much again.
    for expert, (values, scale) in enumerate(zip(ws, w_scales, strict=True)):
        if values.dtype == torch.uint8:
            w[expert] = formats.dequantize_mxfp4(values, scale, drawn.k)
        else:
            w[expert] = formats.dequantize_fp8_blocks(values, scale, formats.FP8_BLOCK)
    w, ends = w.mT, drawn.routing.expert_end
    return unfused(drawn, (x,), lambda x: torch._grouped_mm(x, w, offs=ends), Rows.of(drawn))


def _w_in_rows(drawn: Inputs) -> tuple[Tensor, Tensor]:
    """Give w and its scales as they were before they were laid out for a kernel of ours."""
    from .kernels import operands

    layout = drawn.own.get("scale_layout", "rows")
    # Of the formats, mxfp4 alone has scales of its elements' type.
    if drawn.w.dtype == drawn.w_scale.dtype:
        return operands.in_rows(drawn.w, drawn.w_scale, drawn.k, layout)
    return drawn.w, drawn.w_scale


def _x_in_bf16(drawn: Inputs) -> Tensor:
    """Widen x with the scales of groups, exactly; one scale for all of it is left out."""
    import torch

    from .kernels import formats

    if drawn.x.dtype == torch.uint8:
        return formats.dequantize_mxfp4(drawn.x, drawn.x_scale, drawn.k).bfloat16()
    if drawn.x_scale.dtype == torch.uint8:
        return formats.dequantize_mxfp8(drawn.x, drawn.x_scale).bfloat16()
    if drawn.x_scale.dim() == 2:
        return formats.dequantize_fp8_blocks(drawn.x, drawn.x_scale, rows=1).bfloat16()
    return drawn.x.bfloat16()


# triton_kernels.


def _triton_kernels_needs() -> str | None:
    return _package_needs("triton_kernels", _TRITON_KERNELS, "1.0.0.post20260510")


def _package_needs(module: str, package: str, version: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"no module {module}: pip install --no-deps {package}=={version}"
    return None


@functools.cache
def _triton_kernels() -> Any:
    """Import it; Triton 3.6 lacks three names that it asks for."""
    import triton
    from triton.language import target_info
    from triton.runtime.jit import JITFunction

    def is_hip_gfx1250() -> bool:
        return False

    if not hasattr(target_info, "is_hip_gfx1250"):
        target_info.is_hip_gfx1250 = triton.constexpr_function(is_hip_gfx1250)
    # Of tracebacks alone.
    for name in ("def_file_line_number", "def_file_col_number"):
        if not hasattr(JITFunction, name):
            setattr(JITFunction, name, 1)
    import triton_kernels.matmul
    import triton_kernels.tensor

    return triton_kernels


def _fused(drawn: Inputs, x: Tensor, w: Any, precision: Any) -> list[Launch]:
    """Launch `triton_kernels.matmul`, which gathers and scatters if it is told to."""
    library = _triton_kernels()
    routing = drawn.routing
    rows = Rows.of(drawn)
    ragged = library.tensor.make_ragged_tensor_metadata(routing.histogram, len(rows.source))
    multiply = functools.partial(
        library.matmul.matmul, b=w, bias=None, a_ragged_metadata=ragged, precision_config=precision
    )
    laid_out = take(x, rows.source)
    launches = [
        Launch("", functools.partial(multiply, laid_out), lambda y: y.index_select(0, rows.place))
    ]
    fused = {}
    if drawn.gather:
        fused["gather_indx"] = routing.gather_index
    if drawn.scatter:
        fused["scatter_indx"] = routing.scatter_index
    if fused:
        included = ", ".join(name.removesuffix("_indx") for name in fused)
        run = functools.partial(multiply, x if drawn.gather else laid_out, **fused)
        launches.append(Launch(included, run, lambda y: y))
    return launches


def _triton_kernels_fp8(drawn: Inputs) -> list[Launch]:
    import torch

    library = _triton_kernels().matmul
    context = library.FlexCtx(
        lhs_data=library.InFlexData(dtype=drawn.x.dtype, scale=drawn.x_scale),
        rhs_data=library.InFlexData(dtype=drawn.w.dtype, scale=drawn.w_scale),
    )
    # Its own precise sums: every 128 products go to fp32.
    own = {} if drawn.fast_accum else {"max_num_imprecise_acc": 128}
    precision = library.PrecisionConfig(flex_ctx=context, out_dtype=torch.bfloat16, **own)
    return _fused(drawn, drawn.x, drawn.w.mT, precision)


def _triton_kernels_mxfp4(drawn: Inputs) -> list[Launch]:
    import torch

    library = _triton_kernels()
    from triton_kernels.tensor_details import layout

    tensor = library.tensor
    values, scales = _w_in_rows(drawn)
    w = tensor.convert_layout(
        tensor.wrap_torch_tensor(values.mT, dtype=tensor.FP4),
        layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2),
    )
    w_scale = tensor.convert_layout(
        tensor.wrap_torch_tensor(scales.mT),
        layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2),
    )
    one = drawn.x_scale if drawn.x_scale.dtype == torch.float32 else None
    precision = library.matmul.PrecisionConfig(
        flex_ctx=library.matmul.FlexCtx(lhs_data=library.matmul.InFlexData(scale=one)),
        b_mx_scale=w_scale,
        b_microblock_size=32,
        out_dtype=torch.bfloat16,
    )
    return _fused(drawn, _x_in_bf16(drawn), w, precision)


# DeepGEMM.


def _deep_gemm_needs() -> str | None:
    if lacks := _package_needs("deep_gemm", _DEEP_GEMM, "2.5.0.post20260604"):
        return lacks
    if not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        return "DeepGEMM compiles with nvcc: put it on the PATH, or set CUDA_HOME"
    return None


def _deep_gemm(drawn: Inputs) -> list[Launch]:
    import deep_gemm
    import torch

    rows = Rows.of(drawn, _DEEP_GEMM_ROWS)

    def product(x: Tensor, x_scale: Tensor) -> Tensor:
        y = torch.empty(len(x), drawn.n_out, dtype=torch.bfloat16, device=x.device)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (x, x_scale), (drawn.w, drawn.w_scale), y, rows.expert
        )
        return y

    def ready(x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
        return x, deep_gemm.get_mn_major_tma_aligned_tensor(x_scale)

    return unfused(drawn, (drawn.x, drawn.x_scale), product, rows, ready)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "torch",
            ("moe_gemm_a8w8",),
            "torch._scaled_grouped_mm, use_fast_accum as asked",
            functools.partial(_torch_needs, "_scaled_grouped_mm"),
            _torch_fp8,
        ),
        Peer(
            "torch_precise",
            ("moe_gemm_a8w8",),
            "torch._scaled_grouped_mm without use_fast_accum, where it may be the quicker",
            functools.partial(_torch_needs, "_scaled_grouped_mm"),
            functools.partial(_torch_fp8, fast=False),
            only_fast=True,
        ),
        Peer(
            "triton_kernels",
            ("moe_gemm_a8w8",),
            "triton_kernels.matmul",
            _triton_kernels_needs,
            _triton_kernels_fp8,
            _TRITON_KERNELS,
        ),
        Peer(
            "deep_gemm",
            ("moe_gemm_a8w8_blockscale",),
            "deep_gemm.m_grouped_fp8_gemm_nt_contiguous, each expert's rows padded to 128",
            _deep_gemm_needs,
            _deep_gemm,
            _DEEP_GEMM,
        ),
        Peer(
            "triton_kernels_bf16",
            ("moe_gemm_a8w4", "moe_gemm_a4w4"),
            "triton_kernels.matmul, x in bf16",
            _triton_kernels_needs,
            _triton_kernels_mxfp4,
            _TRITON_KERNELS,
        ),
        Peer(
            "torch_bf16",
            ("moe_gemm_a8w8_blockscale", "moe_gemm_a8w4", "moe_gemm_a4w4"),
            "torch._grouped_mm, x and w in bf16",
            functools.partial(_torch_needs, "_grouped_mm"),
            _torch_bf16,
        ),
    )
}


def described() -> str:
    """List every peer in Markdown: what is called, and beside which of ours."""
    return "\n".join(
        f"- `{peer.name}`, beside {', '.join(peer.kernels)}: {peer.note}" for peer in PEERS.values()
    )
