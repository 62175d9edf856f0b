"""What the tests of every grouped GEMM share: inputs, a launch that hides nothing, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch

from moelab.kernels import KERNELS, load
from moelab.kernels.epilogue import SwiGLU
from moelab.kernels.formats import dequantize_mxfp4, quantize_fp8, quantize_mxfp4
from moelab.kernels.routing import Routing, route
from moelab.specs import Tile

PLAIN = SwiGLU()
# openai/gpt-oss, gpt_oss/torch/model.py.
GPT_OSS = SwiGLU(alpha=1.702, limit=7.0, shift=1.0)

# The interpreter takes some 20 ms per program; the large tile is one that GPUs are run with.
SMALL, LARGE = Tile(16, 32, 64), Tile(128, 128, 128)
WARPS_AND_STAGES = {
    ("moe_gemm_a8w8", SMALL): (4, 2),
    ("moe_gemm_a8w4", SMALL): (4, 2),
    ("moe_gemm_a8w8", LARGE): (8, 3),
    ("moe_gemm_a8w4", LARGE): (8, 2),
}

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_tile = pytest.mark.parametrize(
    "tile", [SMALL, pytest.param(LARGE, marks=pytest.mark.gpu)], ids=str
)

# Bytes before and after each tensor; all ones is NaN in fp32, bf16, OCP fp8 and e8m0, and -1.
FENCE = 4096


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """Copy between two fences of NaN, which turn a read past an end into a NaN in y.

    The interpreter takes fp8's NaN for 480: there a read past x or w shows only where the
    other operand is not masked to 0. e2m1 has no NaN.
    """
    nan = 0x80 if tensor.dtype == torch.float8_e4m3fnuz else 0xFF
    size = tensor.numel() * tensor.element_size()
    buffer = torch.full((size + 2 * FENCE,), nan, dtype=torch.uint8, device=tensor.device)
    copy = buffer[FENCE : FENCE + size].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


class PoisonedEmpty:
    """Stand in for torch.empty: memory full of NaN, between fences that must stay so."""

    def __init__(self):
        self.buffers = []

    def __call__(self, shape, *, dtype, device):
        size = torch.Size(shape).numel()
        fence = FENCE // dtype.itemsize
        buffer = torch.full((size + 2 * fence,), float("nan"), dtype=dtype, device=device)
        self.buffers.append((buffer, fence, size))
        return buffer[fence : fence + size].view(shape)

    def check(self, y: torch.Tensor) -> None:
        """Assert that y lies in the one buffer, was written whole, and nothing else was."""
        assert len(self.buffers) == 1, f"torch.empty was called {len(self.buffers)} times, not once"
        buffer, fence, size = self.buffers[0]
        assert y.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        missing = y.isnan().nonzero()
        assert not len(missing), (
            f"{len(missing)} of {y.numel()} elements of y {tuple(y.shape)} are NaN or were "
            f"never written, the first at {missing[0].tolist()}"
        )
        outside = torch.cat((buffer[:fence], buffer[fence + size :]))
        assert outside.isnan().all(), "memory before or after y was written"


def spread(generator: torch.Generator, m: int, experts: int, top_k: int) -> torch.Tensor:
    """Send each token to ``top_k`` different experts at random: ``[m, top_k]``."""
    scores = torch.rand(m, experts, generator=generator, device=generator.device)
    return scores.argsort(dim=1)[:, :top_k].contiguous()


def counted(generator: torch.Generator, counts: Sequence[int]) -> torch.Tensor:
    """Send ``counts[e]`` tokens, in random order, to expert e: ``[m, 1]``."""
    device = generator.device
    owner = torch.arange(len(counts), device=device)
    owner = owner.repeat_interleave(torch.tensor(counts, device=device))
    order = torch.rand(owner.numel(), generator=generator, device=device).argsort()
    return owner[order][:, None]


@dataclass(frozen=True)
class Case:
    """A grouped GEMM's tensors, and what launch and reference are both asked for."""

    kernel: str
    x: torch.Tensor
    w: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    routing: Routing
    bias: torch.Tensor | None
    gather: bool
    weighted: bool
    swiglu: SwiGLU | None

    @property
    def k(self) -> int:
        return self.x.shape[1]

    @property
    def n_out(self) -> int:
        return self.w.shape[1] // (2 if self.swiglu else 1)

    @property
    def w_values(self) -> torch.Tensor:
        """What w stands for, in float64."""
        if self.kernel == "moe_gemm_a8w4":
            return dequantize_mxfp4(self.w, self.w_scale, self.k).double()
        return self.w.double() * self.w_scale.double()[:, None, None]

    @property
    def options(self) -> dict:
        return {
            "bias": self.bias,
            "gather": self.gather,
            "weighted": self.weighted,
            "swiglu": self.swiglu,
        }

    def run(self, tile: Tile, **launch) -> torch.Tensor:
        """Call the launcher as its users do."""
        tensors = (self.x, self.w, self.x_scale, self.w_scale)
        launcher = getattr(load(self.kernel), self.kernel)
        return launcher(*tensors, self.routing, tile, **self.options, **launch)

    def launch(self, tile: Tile, *, out_dtype=torch.float32, **launch) -> torch.Tensor:
        """Run the kernel between fences and into poisoned memory."""
        warps, stages = WARPS_AND_STAGES[self.kernel, tile]
        tensors = [fenced(tensor) for tensor in (self.x, self.w, self.x_scale, self.w_scale)]
        inside = {
            field.name: fenced(value) if isinstance(value, torch.Tensor) else value
            for field in fields(self.routing)
            for value in [getattr(self.routing, field.name)]
        }
        options = self.options
        if self.bias is not None:
            options["bias"] = fenced(self.bias)
        launch = {"num_warps": warps, "num_stages": stages, "out_dtype": out_dtype} | launch
        run = getattr(load(self.kernel), self.kernel)
        with mock.patch.object(torch, "empty", PoisonedEmpty()) as poisoned:
            y = run(*tensors, Routing(**inside), tile, **options, **launch)
        poisoned.check(y)
        return y

    def expected(self) -> torch.Tensor:
        """Ask the kernel's reference for one expert at a time: float64 weights are large."""
        reference = load(self.kernel).reference
        ends = self.routing.expert_end.tolist()
        parts = [self.x.new_zeros((0, self.n_out), dtype=torch.float64)]
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start == end:
                continue
            one = replace(
                self.routing,
                row_index=self.routing.row_index[start:end],
                expert_end=self.routing.expert_end.new_tensor([end - start]),
                weight=self.routing.weight[start:end],
            )
            part = reference(
                self.x if self.gather else self.x[start:end],
                self.w[expert : expert + 1],
                self.x_scale,
                self.w_scale[expert : expert + 1],
                one,
                **self.options | {"bias": None if self.bias is None else self.bias[expert, None]},
            )
            parts.append(part)
        return torch.cat(parts)

    def check(self, y: torch.Tensor) -> None:
        assert_close(y, self.expected(), self.k, self.routing.expert_end)


def make(
    kernel: str,
    generator: torch.Generator,
    expert: torch.Tensor,
    tile: Tile,
    *,
    experts: int,
    n: int,
    k: int,
    gather: bool = True,
    bias: bool = False,
    weighted: bool = False,
    swiglu: SwiGLU | None = None,
    fp8: torch.dtype = torch.float8_e4m3fn,
) -> Case:
    """Draw a problem's tensors; the accumulator's deviation is 3, so that a limit of 7 bites.

    Args:
        expert: ``[m, top_k]``, from `spread` or `counted`.
    """

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    m, top_k = expert.shape
    weight = torch.rand(m, top_k, generator=generator, device=generator.device)
    x, x_scale = quantize_fp8(normal(m if gather else m * top_k, k), fp8)
    four_bits = kernel == "moe_gemm_a8w4"
    # One expert at a time: the float32 weights of a whole layer take gigabytes.
    w, w_scale = zip(
        *(
            quantize_mxfp4(values) if four_bits else quantize_fp8(values, fp8)
            for values in (normal(n, k) * (3 / k**0.5) for _ in range(experts))
        ),
        strict=True,
    )
    return Case(
        kernel=kernel,
        x=x,
        # Not every build stacks fp8.
        w=torch.stack([each.view(torch.uint8) for each in w]).view(w[0].dtype),
        x_scale=x_scale,
        w_scale=torch.stack(w_scale) if four_bits else torch.cat(w_scale),
        routing=route(expert, weight, experts, tile.block_m),
        bias=normal(experts, n) if bias else None,
        gather=gather,
        weighted=weighted,
        swiglu=swiglu,
    )


def tolerance(k: int, device: torch.device) -> float:
    """Bound the relative error that accumulating k products in another order can leave.

    Products of fp8 by fp8 or fp4 are exact in float32 (4 + 4 bits of significand), so
    only the sum rounds. With u = 2^-24, a float32 sum of k terms is off by at most
    k u sum|x w| (Higham, Accuracy and Stability of Numerical Algorithms, 4.2), and
    Cauchy-Schwarz bounds the ratio of sum|x w| to the deviation of sum(x w) by sqrt(k):
    k^1.5 u. Scales, bias and activation add a few u, and where SwiGLU is steep it
    stretches the error about twofold; 4 covers both. That is 5e-4 at k = 160, and a
    lost product of 160 leaves 8e-2 in its element.

    Hopper's tensor cores add fp8 products, 32 at a time, with about 14 bits of significand
    (DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2) and cut the rest off: k / 32
    sums of 2^-14 each. 4.5e-3 was seen on an H200 at k = 4096, where that bounds 7.8e-3.
    """
    if device.type == "cuda":
        return max(2e-3, k / 32 * 2**-14)
    return 4 * k**1.5 * 2**-24


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Bound the relative error of storing one float32 as ``dtype``.

    bf16 has 8 bits of significand: 2^-8 to nearest. The interpreter cuts the low bits
    off instead, which leaves up to 2^-7 (0.0076 was seen).
    """
    if dtype == torch.float32:
        return 0.0
    assert dtype == torch.bfloat16
    return 2**-8 if device.type == "cuda" else 2**-7


def assert_close(
    y: torch.Tensor, expected: torch.Tensor, k: int, expert_end: torch.Tensor | None = None
) -> None:
    """Assert every element within storage rounding plus accumulation error.

    Accumulation error is measured against the largest element, for an element near zero
    is a difference of large ones; in float32 it is bounded as a whole too.
    """
    assert y.shape == expected.shape, f"{tuple(y.shape)} is not {tuple(expected.shape)}"
    if not y.numel():
        return
    accumulation, stored = tolerance(k, y.device), rounding(y.dtype, y.device)
    error = (y.double() - expected).abs()
    allowed = stored * expected.abs() + accumulation * expected.abs().max()
    row, column = divmod(int((error / allowed).nan_to_num(nan=torch.inf).argmax()), y.shape[1])
    of = "" if expert_end is None else f" (expert {int((expert_end <= row).sum())})"
    worst = (
        f"worst at row {row}{of}, column {column} of {list(y.shape)}: got "
        f"{float(y[row, column])!r}, expected {float(expected[row, column])!r}, off by "
        f"{float(error[row, column]):.3g} where {float(allowed[row, column]):.3g} is allowed"
    )
    beyond = int((~(error <= allowed)).sum())
    assert not beyond, f"{beyond} of {y.numel()} elements are off; {worst}"
    if y.dtype == torch.float32:
        relative = float(error.norm() / expected.norm())
        assert relative <= accumulation, (
            f"relative Frobenius error {relative:.3g} exceeds {accumulation:.3g}; {worst}"
        )
