"""Where kernels run, and random numbers that a failure can be repeated with."""

from __future__ import annotations

import zlib

import pytest
import torch
import triton


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
