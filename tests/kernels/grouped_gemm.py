"""What the tests of every grouped GEMM share: inputs, a launch that hides nothing, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch

from moelab.kernels import KERNELS, inputs
from moelab.kernels.epilogue import SwiGLU
from moelab.kernels.formats import (
    FP8_BLOCK,
    MX_GROUP,
    dequantize_mxfp4,
    dequantize_mxfp8,
)
from moelab.kernels.inputs import Inputs
from moelab.kernels.routing import Routing
from moelab.specs import TensorSpec, Tile

PLAIN = SwiGLU()
# openai/gpt-oss, gpt_oss/torch/model.py.
GPT_OSS = SwiGLU(alpha=1.702, limit=7.0, shift=1.0)

# The interpreter takes some 20 ms per program; the large tile is one that GPUs are run with.
SMALL, LARGE = Tile(16, 32, 64), Tile(128, 128, 128)
WARPS = {SMALL: 4, LARGE: 8}

GROUPED = tuple(kernel for kernel in KERNELS if kernel.startswith("moe_gemm"))
every_kernel = pytest.mark.parametrize("kernel", GROUPED)
every_tile = pytest.mark.parametrize(
    "tile", [SMALL, pytest.param(LARGE, marks=pytest.mark.gpu)], ids=str
)

# Triton's names of types.
SPECS = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.uint8: "u8",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Bytes before and after each tensor.
FENCE = 4096


def poison(dtype: torch.dtype) -> int:
    """Give the byte that fills a tensor with NaN: of fp32, bf16, fp8 or e8m0; -1 of int32."""
    return 0x80 if dtype == torch.float8_e4m3fnuz else 0xFF


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """Copy between two fences of NaN, which turn a read past an end into a NaN in y.

    e2m1 has no NaN; its scales have.
    """
    size = tensor.numel() * tensor.element_size()
    buffer = torch.full(
        (size + 2 * FENCE,), poison(tensor.dtype), dtype=torch.uint8, device=tensor.device
    )
    copy = buffer[FENCE : FENCE + size].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


class PoisonedEmpty:
    """Stand in for torch.empty: memory full of NaN, between fences that must stay so."""

    def __init__(self):
        self.buffers = []

    def __call__(self, shape, *, dtype, device):
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((size + 2 * FENCE,), poison(dtype), dtype=torch.uint8, device=device)
        tensor = buffer[FENCE : FENCE + size].view(dtype).view(shape)
        self.buffers.append((buffer, tensor))
        return tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for _, tensor in self.buffers]

    def check(self) -> None:
        """Assert that every tensor was written whole, and nothing around it."""
        for tensor in self.tensors:
            scales = tensor.dtype == torch.uint8
            missing = (tensor == 0xFF if scales else tensor.float().isnan()).nonzero()
            assert not len(missing), (
                f"{len(missing)} of {tensor.numel()} elements of {list(tensor.shape)} are NaN or "
                f"were never written, the first at {missing[0].tolist()}"
            )
        self.check_fences()

    def check_fences(self) -> None:
        for buffer, tensor in self.buffers:
            outside = torch.cat((buffer[:FENCE], buffer[buffer.numel() - FENCE :]))
            clean = (outside == poison(tensor.dtype)).all()
            assert clean, f"memory around {list(tensor.shape)} was written"


class Recorder:
    """Stand in for a kernel: keep what it was launched with."""

    def __init__(self):
        self.grid = self.arguments = None

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *_, **arguments):
        self.arguments = arguments

    def told(self) -> dict:
        """Give the arguments as the compiler is told them: tensors without their memory."""
        return {
            name: TensorSpec(tuple(value.shape), SPECS[value.dtype])
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.arguments.items()
        }


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


class Case(Inputs):
    """A grouped GEMM's tensors, launched so that nothing is hidden."""

    @property
    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What x and w stand for, in float64."""
        return self._read(self.x, self.x_scale, 1), self._read(self.w, self.w_scale, FP8_BLOCK)

    def _read(self, tensor: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
        if tensor.dtype == torch.uint8:
            return dequantize_mxfp4(tensor, scale, self.k).double()
        if scale.dtype == torch.uint8:
            return dequantize_mxfp8(tensor, scale).double()
        values, scale = tensor.double(), scale.double()
        if scale.dim() == 1:
            return values * (scale if values.dim() == 2 else scale[:, None, None])
        row = torch.arange(values.shape[-2], device=values.device) // rows
        block = torch.arange(values.shape[-1], device=values.device) // FP8_BLOCK
        return values * scale[..., row, :][..., block]

    def launch(self, tile: Tile, *, y_format="fp32", **options):
        """Run the kernel between fences and into poisoned memory."""
        inside = {
            each.name: fenced(value) if isinstance(value, torch.Tensor) else value
            for each in fields(self.routing)
            for value in [getattr(self.routing, each.name)]
        }
        x, w, x_scale, w_scale = map(fenced, self.tensors)
        guarded = replace(
            self,
            x=x,
            w=w,
            x_scale=x_scale,
            w_scale=w_scale,
            routing=Routing(**inside),
            bias=None if self.bias is None else fenced(self.bias),
        )
        options = {"num_warps": WARPS.get(tile, 8), "y_format": y_format} | options
        with mock.patch.object(torch, "empty", PoisonedEmpty()) as poisoned:
            y = guarded.run(tile, **options)
        poisoned.check()
        outputs = y if isinstance(y, tuple) else (y,)
        assert all(map(torch.Tensor.is_set_to, outputs, poisoned.tensors)), "y lies elsewhere"
        return y

    def check(self, y, **how) -> None:
        """Assert that y is what the reference expects; see `assert_close`."""
        assert_close(y, self.expected(), self.k, **how)


def make(
    kernel: str, generator: torch.Generator, expert: torch.Tensor, tile: Tile, **shape
) -> Case:
    """Draw a problem's tensors; see `moelab.kernels.inputs.draw`.

    Args:
        expert: ``[m, top_k]``, from `spread` or `counted`.
    """
    weight = torch.rand(expert.shape, generator=generator, device=generator.device)
    shape = {"fp8": torch.float8_e4m3fn} | shape
    return Case(**vars(inputs.draw(kernel, generator, expert, weight, tile.block_m, **shape)))


def tolerance(k: int, device: torch.device, fast_accum: bool = False) -> float:
    """Bound the relative error that accumulating k products in another order can leave.

    Products of fp8 and fp4 are exact in float32 (4 + 4 bits of significand), so only the
    sum rounds. With u = 2^-24, a float32 sum of k terms is off by at most k u sum|x w|
    (Higham, Accuracy and Stability of Numerical Algorithms, 4.2), and Cauchy-Schwarz
    bounds the ratio of sum|x w| to the deviation of sum(x w) by sqrt(k): k^1.5 u. Scales,
    bias and activation add a few u, and where SwiGLU is steep it stretches the error about
    twofold; 4 covers both. That is 5e-4 at k = 160, and a lost product of 160 leaves 8e-2
    in its element.

    At the k of models that bound is loose, so a GPU is held to 2e-3. Hopper's tensor cores
    add fp8 products, 32 at a time, with about 14 bits of significand (DeepSeek-V3 report,
    arXiv:2412.19437, section 3.3.2) and cut the rest off. Summed in fp32 after every 128,
    each part is off by at most 4 x 2^-14 of itself, 2.4e-4, and so is their sum where parts
    don't cancel; SwiGLU doubles that and the largest element, which errors are measured
    against, leaves room. With ``fast_accum`` all k / 32 sums are cut: k / 32 x 2^-14.
    """
    if device.type == "cuda":
        return max(2e-3, k / 32 * 2**-14) if fast_accum else 2e-3
    return 4 * k**1.5 * 2**-24


# Bits of significand, half the smallest subnormal, the largest value.
STORED = {
    torch.float32: (24, 0.0, float("inf")),
    torch.bfloat16: (8, 0.0, float("inf")),
    torch.float8_e4m3fn: (4, 2**-10, 448.0),
    torch.float8_e4m3fnuz: (4, 2**-11, 240.0),
}


def assert_close(
    y: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    expected: torch.Tensor,
    k: int,
    *,
    y_scale: torch.Tensor | None = None,
    fast_accum: bool = False,
) -> None:
    """Assert every element within its format's rounding plus accumulation error.

    Rounding to nearest with p bits of significand leaves 2^-p of an element, or half the
    smallest subnormal. fp8 saturates: what is expected is the largest value there. mxfp8's
    scale puts a group's largest element between 2^8 and 2^9 and the largest e4m3 is 448,
    so that elements above it lose up to an eighth. Accumulation may move the largest
    element across a power of two, and so the scale by a factor of 2.

    Accumulation error is measured against the largest element, for an element near zero
    is a difference of large ones; in float32 it is bounded as a whole too.
    """
    y, scales = y if isinstance(y, tuple) else (y, None)
    assert y.shape == expected.shape, f"{tuple(y.shape)} is not {tuple(expected.shape)}"
    if not y.numel():
        return
    bits, subnormal, largest = STORED[y.dtype]
    relative = torch.full_like(expected, 2.0**-bits)
    noise = tolerance(k, y.device, fast_accum) * expected.abs().max()
    absolute = noise
    values = y.double()
    if y_scale is not None:
        values = values * y_scale.double()
        expected = expected.clamp(-largest * y_scale.double(), largest * y_scale.double())
        absolute = noise + subnormal * y_scale.double()
    if scales is not None:
        values = dequantize_mxfp8(y, scales).double()
        groups = torch.nn.functional.pad(
            expected.abs(), (0, -expected.shape[1] % MX_GROUP)
        ).unflatten(1, (-1, MX_GROUP))
        amax = groups.amax(2).repeat_interleave(MX_GROUP, 1)[:, : expected.shape[1]]
        # The power of two that is above the group's largest element, or would be.
        above = 2.0 ** (torch.floor(torch.log2((amax - noise).clamp(min=1e-30))) + 1)
        relative = torch.where(expected.abs() + noise > 0.875 * above, 2.0**-3, relative)
        absolute = noise + subnormal * 2.0 * amax / 2**8
    error = (values - expected).abs()
    allowed = relative * expected.abs() + absolute
    row, column = divmod(int((error / allowed).nan_to_num(nan=torch.inf).argmax()), y.shape[1])
    worst = (
        f"worst at row {row}, column {column} of {list(y.shape)}: got "
        f"{float(values[row, column])!r}, expected {float(expected[row, column])!r}, off by "
        f"{float(error[row, column]):.3g} where {float(allowed[row, column]):.3g} is allowed"
    )
    beyond = int((~(error <= allowed)).sum())
    assert not beyond, f"{beyond} of {y.numel()} elements are off; {worst}"
    if y.dtype == torch.float32:
        bound = tolerance(k, y.device, fast_accum)
        total = float(error.norm() / expected.norm())
        assert total <= bound, f"relative Frobenius error {total:.3g} exceeds {bound:.3g}; {worst}"
