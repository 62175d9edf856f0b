"""What the compiler is asked without a GPU is what the GPU loads, or refuses to load."""

from __future__ import annotations

import pytest
import torch
from grouped_gemm import PLAIN, every_kernel, make, spread

from moelab import compiler
from moelab.kernels import load
from moelab.kernels.formats import quantize_mxfp4
from moelab.problems import feed_forward, fused_gemm
from moelab.specs import Configuration, Problem, Tile
from moelab.targets import TARGETS

SHAPE = {"experts": 4, "n": 512, "k": 1056}


class Spy:
    """Launch a kernel and keep what was loaded."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.loaded = None

    def __getitem__(self, grid):
        def launch(**arguments):
            self.loaded = self.kernel[grid](**arguments)

        return launch


def installed_target():
    if torch.version.hip:
        name = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if name not in TARGETS:
        pytest.skip(f"{name} is no target of moelab")
    return TARGETS[name]


@pytest.mark.gpu
@every_kernel
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("tile", "num_warps"),
    [(Tile(16, 128, 128), 4), (Tile(64, 128, 128), 4), (Tile(128, 256, 128), 8)],
    ids=str,
)
def test_the_gpu_loads_the_lds_that_was_told(
    kernel, tile, num_warps, num_stages, layer, device_generator, monkeypatch
):
    target = installed_target()
    first = layer == 1
    problem = Problem(
        model="test",
        layer=layer,
        tp=1,
        m=64,
        top_k=2,
        **SHAPE,
        gather=first,
        swiglu=first,
        weighted=not first,
        scatter=not first,
    )
    switch = compiler.default_async_copy(target)
    configuration = Configuration(kernel, problem, tile, num_warps, num_stages, switch, target.name)
    told = compiler.lds(compiler.specialize(configuration))

    case = make(
        kernel,
        device_generator,
        spread(device_generator, m=problem.m, experts=problem.experts, top_k=problem.top_k),
        tile,
        **SHAPE,
        gather=problem.gather,
        weighted=problem.weighted,
        scatter=problem.scatter,
        swiglu=PLAIN if problem.swiglu else None,
        bias=problem.bias,
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "num_xcds": target.xcds}
    loads_or_refuses(kernel, told, target, monkeypatch, lambda: case.run(tile, **options))


def loads_or_refuses(kernel, told, target, monkeypatch, launch):
    """Assert that a launch loads what was told where that fits, and else is refused with it."""
    from triton.runtime.errors import OutOfResources

    module = load(kernel)
    spy = Spy(getattr(module, f"_{kernel}_kernel"))
    monkeypatch.setattr(module, f"_{kernel}_kernel", spy)
    if told.lds_bytes <= target.lds_limit:
        launch()
        assert spy.loaded.metadata.shared == told.lds_bytes
    else:
        with pytest.raises(OutOfResources, match=f"Required: {told.lds_bytes}"):
            launch()


DENSE = {
    "ff_a16w16_fused": feed_forward("test", m=64, n=512, k=1056, gated=True),
    "fused_gemm_afp4wfp4_a16w16": fused_gemm("test", 64, 512, 256, 1056, bias=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DENSE)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("tile", ["16x128x64", "64x64x256", "128x256x64"])
def test_the_gpu_loads_what_was_told_of_a_dense_kernel(
    kernel, tile, num_stages, device_generator, monkeypatch
):
    target, tile, of = installed_target(), Tile.parse(tile), DENSE[kernel]
    switch = compiler.default_async_copy(target)
    configuration = Configuration(kernel, of, tile, 8, num_stages, switch, target.name)
    told = compiler.lds(compiler.specialize(configuration))

    def normal(*shape):
        return torch.randn(shape, generator=device_generator, device=device_generator.device)

    x, options = normal(of.m, of.k), {"num_warps": 8, "num_stages": num_stages}
    if kernel == "ff_a16w16_fused":
        tensors = x, normal(of.n, of.k), normal(of.k, of.n_out)
        tensors = [tensor.bfloat16() for tensor in tensors]
    else:
        options["num_xcds"] = target.xcds
        (x_fp4, x_scale), (w_fp4, w_scale) = map(quantize_mxfp4, (x, normal(of.n, of.k)))
        w_bf16 = normal(of.n_bf16, of.k).bfloat16()
        tensors = x_fp4, w_fp4, x_scale, w_scale, x.bfloat16(), w_bf16
    run = getattr(load(kernel), kernel)
    loads_or_refuses(kernel, told, target, monkeypatch, lambda: run(*tensors, tile, **options))
