"""Where kernels run, and random numbers that a failure can be repeated with."""

from __future__ import annotations

import zlib
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}


def convert(data, source, to, _rounding_mode):
    """Convert between floating-point types as PyTorch does, which rounds as hardware does."""
    bits = {1: np.int8, 2: np.int16, 4: np.int32}
    values = torch.from_numpy(np.ascontiguousarray(data).view(bits[TYPES[source].itemsize]))
    converted = values.view(TYPES[source]).to(TYPES[to])
    return converted.view(getattr(torch, f"int{8 * TYPES[to].itemsize}")).numpy()


def widened_dot(self, a, b, *rest):
    """Multiply bf16 as fp32, whose products of two bf16 are exact."""
    if a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
        a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
    return create_dot(self, a, b, *rest)


create_dot = interpreter.InterpreterBuilder.create_dot


@pytest.fixture(autouse=True, scope="session")
def the_interpreter_computes_as_hardware_does():
    """Mend the interpreter's narrow types (Triton 3.6.0 to 3.9.0).

    It cuts off bf16's low bits, reads fp8's NaN as 480, leaves the exponent as it was where
    rounding fp8 carries (1.998 becomes 1), and tl.dot takes the bits of bf16 for integers.
    """
    with (
        mock.patch.object(interpreter, "_convert_float", convert),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", widened_dot),
    ):
        yield


@pytest.fixture
def device():
    """Launch kernels here: the CPU under Triton's interpreter, else the GPU."""
    if triton.knobs.runtime.interpret:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("no GPU to launch kernels on; set TRITON_INTERPRET=1 to interpret them")


@pytest.fixture
def generator(request):
    """Random numbers on the CPU, fresh for every test; pytest shows the seed on failure."""
    seed = zlib.crc32(request.node.nodeid.encode())
    print(f"seed {seed}, from {request.node.nodeid}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def device_generator(generator, device):
    """The same where kernels run, so that a large tensor is drawn there."""
    return torch.Generator(device).manual_seed(generator.initial_seed())
