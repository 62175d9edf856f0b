"""A whole MoE layer, from the router's logits to one row per token, in every format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_gemm import PLAIN, SMALL, assert_close, every_kernel, make

from moelab.kernels.inputs import quantizers
from moelab.kernels.router import reduce_top_k, route_logits, top_k
from moelab.specs import Tile

# Tokens, experts, hidden and intermediate size.
TOKENS, EXPERTS, HIDDEN, WIDTH = 11, 5, 72, 40


def layers(kernel, generator, logits, k, tile, **formats):
    """Draw both layers' tensors; the second's x is what the first will leave."""
    expert, _ = top_k(logits, k)
    shape = {"experts": logits.shape[1]}
    first = make(
        kernel, generator, expert, tile, n=2 * WIDTH, k=HIDDEN, swiglu=PLAIN, **shape, **formats
    )
    second = make(
        kernel,
        generator,
        expert,
        tile,
        n=HIDDEN,
        k=WIDTH,
        gather=False,
        weighted=True,
        scatter=True,
        bias=True,
        **shape,
        **formats,
    )
    routing = route_logits(logits, k, tile.block_m)
    return replace(first, routing=routing), replace(second, routing=routing)


def of_tokens(case, logits, k, x):
    """Compute layer 2 and the sum token by token, in float64; x ``[rows, k]`` float64."""
    weight, expert = logits.double().topk(k)
    weight = weight.softmax(1)
    row_of = {slot: row for row, slot in enumerate(case.routing.scatter_index.tolist())}
    _, w = case.values
    y = torch.zeros(len(logits), w.shape[1], dtype=torch.float64, device=x.device)
    for token in range(len(logits)):
        for slot in range(k):
            e = int(expert[token, slot])
            product = w[e] @ x[row_of[token * k + slot]] + case.bias[e].double()
            y[token] += weight[token, slot] * product
    return y


@every_kernel
@pytest.mark.parametrize("k", [1, 4])
def test_layers_chain_through_quantized_activations(kernel, k, device_generator):
    logits = torch.randn(
        TOKENS, EXPERTS, generator=device_generator, device=device_generator.device
    )
    first, second = layers(kernel, device_generator, logits, k, SMALL)
    hidden = first.launch(SMALL)
    first.check(hidden)
    quantize_x, _ = quantizers(kernel, None, torch.float8_e4m3fn)
    x, x_scale = quantize_x(hidden)
    second = replace(second, x=x, x_scale=x_scale)
    y = second.launch(SMALL)
    second.check(y)
    out = reduce_top_k(y, k)
    assert_close(out, of_tokens(second, logits, k, second.values[0]), WIDTH * k)


@pytest.mark.parametrize(
    ("kernel", "y_format", "x_format"),
    [("moe_gemm_a8w4", "mxfp8", "mxfp8"), ("moe_gemm_a8w8", "fp8", None)],
)
def test_what_layer_1_quantizes_is_what_layer_2_reads(kernel, y_format, x_format, device_generator):
    """No format is spelt differently on either side."""
    tile = Tile(16, 64, 64)
    logits = torch.randn(
        TOKENS, EXPERTS, generator=device_generator, device=device_generator.device
    )
    formats = {"x_format": x_format} if x_format else {}
    first, second = layers(kernel, device_generator, logits, 2, tile, **formats)
    of_y = {}
    if y_format == "fp8":
        of_y["y_scale"] = (first.expected().abs().amax() / 448).float().reshape(1)
    hidden = first.launch(tile, y_format=y_format, num_warps=4, **of_y)
    first.check(hidden, **of_y)
    x, x_scale = hidden if isinstance(hidden, tuple) else (hidden, of_y["y_scale"])
    second = replace(second, x=x, x_scale=x_scale)
    y = second.launch(tile, num_warps=4)
    second.check(y)
    assert_close(reduce_top_k(y, 2), of_tokens(second, logits, 2, second.values[0]), WIDTH * 2)
