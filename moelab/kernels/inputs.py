"""Random operands of a grouped GEMM, and what it should make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..specs import Problem, Tile
from . import hopper_weights, load
from .epilogue import SwiGLU
from .formats import (
    FP8_BLOCK,
    quantize_fp8,
    quantize_fp8_blocks,
    quantize_mxfp4,
    quantize_mxfp8,
    shuffle_scales_cdna4,
)
from .router import route
from .routing import Routing

if TYPE_CHECKING:
    from torch import Generator, Tensor, dtype


@dataclass(frozen=True)
class Inputs:
    """A grouped GEMM's tensors, and what launcher and reference are both asked for.

    Args:
        k: length of the reduction; x holds two elements a byte in mxfp4.
        own: what launcher and reference of this kernel alone take by name.
        fast_accum: the launcher, where it can be told, leaves sums to the matrix units.
        drawn_for: kernel and problem, its m left out, that `of_problem` drew it for.
    """

    kernel: str
    x: Tensor
    w: Tensor
    x_scale: Tensor
    w_scale: Tensor
    routing: Routing
    k: int
    bias: Tensor | None
    gather: bool
    weighted: bool
    scatter: bool
    swiglu: SwiGLU | None
    own: dict[str, Any] = field(default_factory=dict)
    fast_accum: bool = False
    drawn_for: tuple[str, Problem] | None = None

    @property
    def n_out(self) -> int:
        """Columns of y."""
        return self.w.shape[1] // (2 if self.swiglu else 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The operands, in the launcher's order."""
        return self.x, self.w, self.x_scale, self.w_scale

    @property
    def layer(self) -> dict[str, Any]:
        """What launcher and reference take of `grouped_gemm.Layer`."""
        return {
            "bias": self.bias,
            "gather": self.gather,
            "weighted": self.weighted,
            "scatter": self.scatter,
            "swiglu": self.swiglu,
        }

    def run(self, tile: Tile, **options: Any) -> Any:
        """Call the launcher as its users do; ``block_m`` is the routing's."""
        launcher = getattr(load(self.kernel), self.kernel)
        if self.fast_accum:
            options["fast_accum"] = True
        return launcher(*self.tensors, self.routing, tile, **self.layer, **self.own, **options)

    def expected(self) -> Tensor:
        """Ask the kernel's reference for one expert at a time: float64 weights are large.

        Returns:
            ``[rows, n_out]`` float64, not quantized.
        """
        import torch

        reference = load(self.kernel).reference
        ends = self.routing.expert_end.tolist()
        parts = [self.x.new_zeros((0, self.n_out), dtype=torch.float64)]
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start == end:
                continue
            rows = slice(start, end)
            x, x_scale = self.x, self.x_scale
            if not self.gather:
                x = x[rows]
                x_scale = x_scale[rows] if x_scale.dim() == 2 else x_scale
            one = replace(
                self.routing,
                gather_index=self.routing.gather_index[rows],
                expert_end=self.routing.expert_end.new_tensor([end - start]),
                weight=self.routing.weight[rows],
            )
            bias = None if self.bias is None else self.bias[expert, None]
            only = slice(expert, expert + 1)
            layer = self.layer | {"bias": bias, "scatter": False}
            parts.append(
                reference(x, self.w[only], x_scale, self.w_scale[only], one, **layer, **self.own)
            )
        y = torch.cat(parts)
        if self.scatter:
            y = torch.empty_like(y).index_copy_(0, self.routing.scatter_index.long(), y)
        return y


def draw(
    kernel: str,
    generator: Generator,
    expert: Tensor,
    weight: Tensor,
    block_m: int,
    *,
    experts: int,
    n: int,
    k: int,
    gather: bool = True,
    bias: bool = False,
    weighted: bool = False,
    scatter: bool = False,
    swiglu: SwiGLU | None = None,
    fp8: dtype,
    x_format: str | None = None,
    scale_layout: str | None = None,
    like: Inputs | None = None,
) -> Inputs:
    """Draw a problem's tensors; sums of products have a deviation of 3, so that limits bite.

    Args:
        expert, weight: ``[m, top_k]``, as `workloads.draw` gives them.
        fp8: the type of fp8 operands.
        like: of the same kernel and shape but for m: its weights and bias are taken.
    """
    import torch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    m, top_k = expert.shape
    quantize_x, quantize_w = quantizers(kernel, x_format, fp8)
    x, x_scale = quantize_x(normal(m if gather else m * top_k, k))
    routing = route(expert, weight, experts, block_m)
    if like is not None:
        return replace(like, x=x, x_scale=x_scale, routing=routing)
    # One expert at a time: the float32 weights of a whole layer take gigabytes.
    w, w_scale = zip(
        *(quantize_w(normal(n, k) * (3 / k**0.5)) for _ in range(experts)), strict=True
    )
    w_scales = torch.cat(w_scale) if w_scale[0].dim() == 1 else torch.stack(w_scale)
    own: dict[str, Any] = {"k": k} if kernel == "moe_gemm_a4w4" else {}
    if scale_layout:
        own["scale_layout"] = scale_layout
    # Not every build stacks fp8.
    ws = torch.stack([each.view(torch.uint8) for each in w]).view(w[0].dtype)
    if scale_layout == "cdna4":
        w_scales = shuffle_scales_cdna4(w_scales)
    if scale_layout == "hopper":
        ws, w_scales = hopper_weights.pack(ws, w_scales, k)
    return Inputs(
        kernel=kernel,
        x=x,
        w=ws,
        x_scale=x_scale,
        w_scale=w_scales,
        routing=routing,
        k=k,
        bias=normal(experts, n) if bias else None,
        gather=gather,
        weighted=weighted,
        scatter=scatter,
        swiglu=swiglu,
        own=own,
    )


def of_problem(
    kernel: str,
    problem: Problem,
    generator: Generator,
    expert: Tensor,
    weight: Tensor,
    block_m: int,
    fp8: dtype,
    like: Inputs | None = None,
) -> Inputs:
    """Draw the tensors of a model's layer; see `draw`.

    Args:
        like: earlier inputs, whose weights are taken if they are of the same shape.
    """
    shape = (kernel, replace(problem, m=0))
    drawn = draw(
        kernel,
        generator,
        expert,
        weight,
        block_m,
        experts=problem.experts,
        n=problem.n,
        k=problem.k,
        gather=problem.gather,
        bias=problem.bias,
        weighted=problem.weighted,
        scatter=problem.scatter,
        swiglu=SwiGLU() if problem.swiglu else None,
        fp8=fp8,
        x_format=problem.x_format,
        scale_layout=None if problem.scale_layout == "rows" else problem.scale_layout,
        like=like if like is not None and like.drawn_for == shape else None,
    )
    return replace(drawn, fast_accum=problem.fast_accum, drawn_for=shape)


def quantizers(
    kernel: str, x_format: str | None, fp8: dtype
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Give what makes a kernel's x ``[rows, k]`` and one expert's w ``[n, k]``."""
    import torch

    return {
        "moe_gemm_a8w8": (lambda x: quantize_fp8(x, fp8), lambda w: quantize_fp8(w, fp8)),
        "moe_gemm_a8w8_blockscale": (
            lambda x: quantize_fp8_blocks(x, fp8, rows=1),
            lambda w: quantize_fp8_blocks(w, fp8, rows=FP8_BLOCK),
        ),
        "moe_gemm_a8w4": (
            quantize_mxfp8
            if x_format == "mxfp8"
            else lambda x: quantize_fp8(x, torch.float8_e4m3fn),
            quantize_mxfp4,
        ),
        "moe_gemm_a4w4": (quantize_mxfp4, quantize_mxfp4),
    }[kernel]
