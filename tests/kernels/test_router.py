"""Top-k, sorted rows and their reduction: plain PyTorch is right, the kernels agree with it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import fields
from unittest import mock

import pytest
import torch
from grouped_gemm import PoisonedEmpty, counted, fenced

from moelab.kernels import router
from moelab.kernels.router import reduce_top_k, route, route_logits, top_k
from moelab.kernels.routing import Routing
from moelab.workloads import WORKLOADS, draw

# NaN and infinities are meant; the interpreter's numpy warns of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

NAN, INF = float("nan"), float("inf")

# Tokens of each expert, in tiles of 16 rows.
DISTRIBUTIONS = {
    "some empty": (5, 0, 17, 0),
    "one token each": (1, 1, 1, 1),
    "all on the first": (33, 0, 0, 0),
    "all on the last": (0, 0, 0, 33),
    "only full tiles": (16, 32, 0, 16),
    "one row past a tile": (17, 33, 1, 0),
    "one token": (0, 1, 0, 0),
    "no token": (0, 0, 0, 0),
    "one expert": (40,),
    "experts no power of two": (0, 3, 20),
}
every_distribution = pytest.mark.parametrize("counts", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)

# (tokens, experts, top_k). A step of the kernels takes 256 tokens of 8 experts, 16 of 128
# and 4 of 384 to choose, and 1024, 64 and 16 rows to sort.
SHAPES = [
    (0, 8, 4),
    (1, 1, 1),
    (1, 3, 1),
    (1, 8, 8),
    (3, 384, 8),
    (4, 384, 4),
    (5, 384, 8),
    (15, 128, 4),
    (16, 128, 4),
    (17, 128, 4),
    (37, 128, 8),
    (255, 8, 4),
    (256, 8, 4),
    (257, 8, 5),
    (1025, 3, 1),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))


@contextlib.contextmanager
def kernels():
    """Launch kernels wherever tensors are, into poisoned memory between fences."""
    with (
        mock.patch.object(router, "_has_kernels", return_value=True),
        mock.patch.object(torch, "empty", PoisonedEmpty()) as poisoned,
    ):
        yield
    poisoned.check_fences()


@contextlib.contextmanager
def plain():
    with mock.patch.object(router, "_has_kernels", return_value=False):
        yield


@pytest.fixture(params=[plain, kernels], ids=["plain", "kernels"])
def path(request):
    return request.param


@pytest.fixture
def place(path, request):
    """Plain PyTorch answers on the CPU, kernels where they run."""
    return "cpu" if path is plain else request.getfixturevalue("device")


# With u = 2^-24: a logit less the largest is d <= 0, rounded; exp(d) is off by 3 |d| u (d,
# log2(e) and their product each round) + 4 u (ex2.approx: 2 ulp, PTX ISA), the quotient by
# 4 u (2 ulp) and the sum of k by k u. A weight is exp(d) over a sum of 1 or more, and
# |d| exp(d) <= 1 / e: (3 / e) (k + 1) u + (12 + k) u in all, 30 u for k = 8. A sigmoid has
# one exponential and no sum: less.
WEIGHT_TOLERANCE = 32 * 2**-24


def assert_same(got: Routing, expected: Routing, weight_tolerance: float = 0.0) -> None:
    """Assert every integer equal where it means anything, and weights within the tolerance."""
    for field in fields(Routing):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if not isinstance(b, torch.Tensor):
            assert a == b, field.name
            continue
        a = a.cpu()
        assert (a.shape, a.dtype) == (b.shape, b.dtype), field.name
        if field.name in ("tile_expert", "tile_row"):
            count = int(expected.tile_count)
            a, b = a[:count], b[:count]
        torch.testing.assert_close(
            a, b, rtol=0, atol=weight_tolerance, equal_nan=True, msg=lambda m, f=field: f.name + m
        )


def logits_of(generator, tokens, experts):
    """Draw logits of which many are equal: multiples of 1/8, which bf16 holds too."""
    logits = torch.randn(tokens, experts, generator=generator) * 8
    return logits.round() / 8


def check_sorted(expert, weight, experts, block_m, device) -> None:
    """Sort on ``device`` by kernels and compare with plain PyTorch on the CPU."""
    expected = router.route_reference(expert, weight, experts, block_m)
    with kernels():
        got = route(fenced(expert.to(device)), fenced(weight.to(device)), experts, block_m)
    assert_same(got, expected)


def check_routed(logits, k, block_m, device) -> None:
    """Route logits on ``device`` by kernels and compare with plain PyTorch on the CPU."""
    expert, weight = router.top_k_reference(logits, k)
    expected = router.route_reference(expert, weight, logits.shape[1], block_m)
    with kernels():
        got = route_logits(fenced(logits.to(device)), k, block_m)
    assert_same(got, expected, 2 * WEIGHT_TOLERANCE)
    check_sorted(expert, weight, logits.shape[1], block_m, device)


@every_shape
@pytest.mark.parametrize("score", router.SCORES)
def test_the_kernels_choose_as_plain_pytorch_does(shape, score, device, generator):
    tokens, experts, k = shape
    logits = logits_of(generator, tokens, experts)
    with kernels():
        expert, weight = top_k(fenced(logits.to(device)), k, score)
    expected, expected_weight = router.top_k_reference(logits, k, score)
    assert (expert.dtype, weight.dtype) == (torch.int32, torch.float32)
    assert torch.equal(expert.cpu(), expected)
    torch.testing.assert_close(weight.cpu(), expected_weight, rtol=0, atol=2 * WEIGHT_TOLERANCE)


@every_shape
def test_the_kernels_route_as_plain_pytorch_does(shape, device, generator):
    tokens, experts, k = shape
    check_routed(logits_of(generator, tokens, experts), k, 16, device)


@pytest.mark.parametrize("tokens", [65, 128, 129])
def test_few_blocks_take_several_steps_each(tokens, device, generator, monkeypatch):
    """Of 128 experts one step chooses for 16 tokens, another sorts 64 rows."""
    monkeypatch.setattr(router, "_MAX_BLOCKS", 2)
    check_routed(logits_of(generator, tokens, 128), 8, 32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [3, 128, 384])
@pytest.mark.parametrize("tokens", [512, 15872, 100003])
def test_the_kernels_route_many_tokens_as_plain_pytorch_does(tokens, experts, device, generator):
    check_routed(logits_of(generator, tokens, experts), min(experts, 8), 64, device)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("block_m", [1, 16, 128])
def test_the_kernels_sort_every_workload_as_plain_pytorch_does(name, block_m, device, generator):
    check_sorted(*draw(name, 70, 40, 4, generator), 40, block_m, device)


@every_distribution
def test_the_kernels_sort_every_distribution_as_plain_pytorch_does(counts, device, generator):
    expert = counted(generator, counts)
    weight = torch.rand(expert.shape, generator=generator)
    check_sorted(expert, weight, len(counts), 16, device)


@pytest.mark.gpu
def test_routing_logits_never_waits_for_the_device(generator):
    logits = logits_of(generator, 512, 128).cuda()
    # Compiled first: what is waited for then is the compiler.
    route_logits(logits, 8, block_m=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        route_logits(logits, 8, block_m=64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_any_type_choose_alike(path, dtype, place, generator):
    logits = logits_of(generator, 20, 8)
    expected, _ = router.top_k_reference(logits, 4)
    with path():
        expert, weight = top_k(logits.to(dtype).to(place), 4)
    assert torch.equal(expert.cpu(), expected)
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, -3.5, INF, -INF, NAN])
def test_equal_logits_go_to_the_lower_expert(path, value, place):
    with path():
        expert, _ = top_k(torch.full((5, 6), value, device=place), 4)
    assert expert.tolist() == [[0, 1, 2, 3]] * 5


def test_zeros_are_equal_and_tiny_numbers_are_not(path, place):
    """1e-45 rounds to the least fp32 there is."""
    logits = torch.tensor([[-0.0, 0.0, -1e-45, 1e-45, 0.0, -0.0]], device=place)
    with path():
        expert, _ = top_k(logits, 6)
    assert expert.tolist() == [[3, 0, 1, 4, 5, 2]]


def test_the_largest_logit_comes_first(path, place):
    logits = torch.tensor([[-5.0, 3.0, -INF, 1e30, -1e30, INF]], device=place)
    with path():
        expert, _ = top_k(logits, 6)
    assert expert.tolist() == [[5, 3, 1, 0, 4, 2]]


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_counts_as_the_largest_and_shows_in_its_tokens_weights_alone(path, sign, place):
    nan = torch.tensor(NAN).copysign(torch.tensor(float(sign)))
    logits = torch.tensor([[1.0, 2.0, INF, 0.0], [1.0, 2.0, 4.0, 0.0]], device=place)
    logits[0, 3] = nan
    with path():
        expert, weight = top_k(logits, 2)
        _, sigmoid = top_k(logits, 2, score="sigmoid")
    assert expert.tolist() == [[3, 2], [2, 1]]
    assert weight.isnan().tolist() == [[True, True], [False, False]]
    assert sigmoid.isnan().tolist() == [[True, False], [False, False]]


def test_infinitely_small_logits_are_chosen_last_and_weigh_nothing(path, place):
    logits = torch.tensor([[-INF, 2.0, -INF, -INF], [-INF] * 4], device=place)
    with path():
        expert, weight = top_k(logits, 3)
        _, sigmoid = top_k(logits, 3, score="sigmoid")
    assert expert.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert weight[0].tolist() == [1, 0, 0]
    assert weight[1].isnan().all()
    assert sigmoid[1].tolist() == [0, 0, 0]


def test_no_expert_is_chosen_twice_whatever_the_logits(path, place, generator):
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0])
    pick = torch.randint(len(special), (200, 5), generator=generator)
    with path():
        expert, _ = top_k(special[pick].to(place), 5)
        routing = route_logits(special[pick].to(place), 5, block_m=16)
    assert (expert.sort(dim=1).values.cpu() == torch.arange(5)).all()
    assert routing.histogram.tolist() == [200] * 5


def test_softmax_over_the_chosen_is_softmax_over_all_renormalised(path, place, generator):
    logits = torch.randn(50, 16, generator=generator).to(place)
    everything = logits.double().softmax(dim=1)
    with path():
        expert, weight = top_k(logits, 8)
    chosen = everything.gather(1, expert.long())
    expected = chosen / chosen.sum(dim=1, keepdim=True)
    assert (weight.double() - expected).abs().max() <= WEIGHT_TOLERANCE


def test_a_sigmoid_weight_is_that_of_its_own_logit(path, place, generator):
    logits = torch.randn(50, 16, generator=generator).to(place)
    with path():
        expert, weight = top_k(logits, 8, score="sigmoid")
    expected = logits.double().sigmoid().gather(1, expert.long())
    assert (weight.double() - expected).abs().max() <= WEIGHT_TOLERANCE


def routed(generator, counts, block_m=16):
    expert = counted(generator, counts)
    weight = torch.rand(expert.shape, generator=generator)
    return expert, weight, route(expert, weight, len(counts), block_m)


@every_distribution
def test_rows_are_a_permutation_sorted_by_expert(counts, generator):
    expert, _, routing = routed(generator, counts)
    assert routing.scatter_index.sort().values.tolist() == list(range(sum(counts)))
    owner = expert.flatten()[routing.scatter_index.long()].tolist()
    assert owner == sorted(owner)
    # Within an expert tokens keep their order, so that x is read forwards.
    keys = list(zip(owner, routing.scatter_index.tolist(), strict=True))
    assert keys == sorted(keys)


@every_distribution
def test_expert_end_is_the_running_count(counts, generator):
    _, _, routing = routed(generator, counts)
    assert routing.histogram.tolist() == list(counts)
    assert routing.expert_end.tolist() == list(itertools.accumulate(counts))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_row_keeps_its_token_slot_and_weight(slots, generator):
    expert, weight = draw("uniform", 13, 8, slots, generator)
    routing = route(expert, weight, experts=8, block_m=16)
    assert routing.top_k == slots
    ends = routing.expert_end.tolist()
    indices = zip(routing.gather_index.tolist(), routing.scatter_index.tolist(), strict=True)
    for row, (token, index) in enumerate(indices):
        assert divmod(index, slots)[0] == token
        slot = index % slots
        e = int(expert[token, slot])
        assert ([0, *ends][e]) <= row < ends[e]
        assert routing.weight[row] == weight[token, slot]


@every_distribution
@pytest.mark.parametrize("block_m", [16, 32])
def test_tiles_cover_every_row_once_and_never_two_experts(counts, block_m, generator):
    _, _, routing = routed(generator, counts, block_m)
    ends = routing.expert_end.tolist()
    count = int(routing.tile_count)
    covered = []
    for e, row in zip(
        routing.tile_expert[:count].tolist(), routing.tile_row[:count].tolist(), strict=True
    ):
        rows = range(row, min(row + block_m, ends[e]))
        assert [0, *ends][e] <= row < ends[e], f"tile at row {row} is outside expert {e}"
        covered += rows
    assert covered == list(range(sum(counts)))


@pytest.mark.parametrize("counts", [(1, 1, 1, 34), (1, 1, 0, 0), (17, 1, 1, 17)])
def test_the_worst_routing_fills_every_tile(counts, generator):
    _, _, routing = routed(generator, counts)
    assert int(routing.tile_count) == routing.tile_expert.numel()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_any_integer_type_of_experts_routes_alike(path, dtype, place, generator):
    expert, weight = draw("uniform", 9, 5, 2, generator)
    expected = router.route_reference(expert, weight, 5, 16)
    with path():
        assert_same(route(expert.to(place, dtype), weight.to(place), 5, 16), expected)


def test_transposed_experts_route_as_their_copies_do(path, place, generator):
    expert, weight = draw("uniform", 9, 5, 2, generator)
    expected = router.route_reference(expert, weight, 5, 16)
    with path():
        got = route(expert.to(place).T.contiguous().T, weight.to(place).T.contiguous().T, 5, 16)
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("expert", "weight", "shown"),
    [
        ((3, 2), (3, 1), ("expert (3, 2)", "weight (3, 1)", "[tokens, top_k]")),
        ((6,), (6,), ("expert (6,)", "weight (6,)", "[tokens, top_k]")),
        ((2, 3, 1), (2, 3, 1), ("expert (2, 3, 1)", "[tokens, top_k]")),
        ((2, 0), (2, 0), ("top_k is 0", "1 or more")),
    ],
)
def test_shapes_that_disagree_are_shown(expert, weight, shown):
    with pytest.raises(ValueError) as error:
        route(torch.zeros(expert, dtype=torch.int64), torch.zeros(weight), 4, 16)
    for words in shown:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("experts_given", "shown"),
    [([[0, 4]], "0 to 4"), ([[-1, 3]], "-1 to 3"), ([[9], [2]], "2 to 9")],
)
def test_experts_out_of_range_are_shown(experts_given, shown):
    expert = torch.tensor(experts_given)
    with pytest.raises(ValueError) as error:
        route(expert, torch.ones(expert.shape), experts=4, block_m=16)
    for words in (shown, "experts=4", "0 to 3"):
        assert words in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_experts_that_are_no_integers_are_shown(dtype):
    with pytest.raises(ValueError, match=f"expert is {dtype}; expected an integer type"):
        route(torch.zeros((2, 1), dtype=dtype), torch.ones(2, 1), experts=4, block_m=16)


def test_tensors_on_two_devices_are_shown():
    expert = torch.zeros((2, 1), dtype=torch.int64)
    with pytest.raises(ValueError, match="weight is on meta; expert is on cpu"):
        route(expert, torch.ones((2, 1), device="meta"), experts=4, block_m=16)


@pytest.mark.parametrize(
    ("logits", "options", "shown"),
    [
        (torch.zeros(4), {}, r"logits has shape \[4\]; expected \[any, any\]"),
        (torch.zeros(2, 4).double(), {}, "logits is torch.float64; expected torch.float32 or"),
        (torch.zeros(4, 2).T, {}, "logits has strides .* contiguous"),
        (torch.zeros(2, 4), {"k": 0}, "k is 0; with logits of 4 experts expected 1 to 4"),
        (torch.zeros(2, 4), {"k": 5}, "k is 5; with logits of 4 experts expected 1 to 4"),
        (torch.zeros(2, 4), {"score": "tanh"}, "score is 'tanh'; expected one of softmax, sigmoid"),
    ],
)
def test_logits_that_cannot_be_chosen_from_are_shown(logits, options, shown):
    options = {"k": 2} | options
    with pytest.raises(ValueError, match=shown):
        top_k(logits, **options)
    with pytest.raises(ValueError, match=shown):
        route_logits(logits, block_m=16, **options)


def test_tiles_without_rows_are_shown():
    with pytest.raises(ValueError, match="block_m is 0; expected 1 or more"):
        route_logits(torch.zeros(2, 4), 2, block_m=0)
    with pytest.raises(ValueError, match="block_m is -16; expected 1 or more"):
        route(torch.zeros((2, 1), dtype=torch.int64), torch.ones(2, 1), experts=4, block_m=-16)


def assert_reduced(got: torch.Tensor, y: torch.Tensor, slots: int) -> None:
    """Assert sums within rounding.

    An fp32 sum of k terms is off by at most k 2^-24 of the sum of their magnitudes
    (Higham, Accuracy and Stability of Numerical Algorithms, 4.2); storing it as bf16, of 8
    bits of significand, by 2^-8 of itself.
    """
    terms = y.double().unflatten(0, (len(y) // slots, slots))
    expected = terms.sum(dim=1)
    assert (got.shape, got.dtype) == (expected.shape, y.dtype)
    allowed = slots * 2**-24 * terms.abs().sum(dim=1)
    if y.dtype == torch.bfloat16:
        allowed += 2**-8 * (expected.abs() + allowed)
    beyond = ~((got.double() - expected).abs() <= allowed)
    assert not beyond.any(), f"first wrong element: {beyond.nonzero()[0].tolist()}"


every_sum = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_sum
@pytest.mark.parametrize("slots", [1, 4, 8])
@pytest.mark.parametrize(
    ("tokens", "n"), [(3, 1), (2, 1023), (3, 1024), (2, 1025), (5, 77), (0, 8), (3, 0)]
)
def test_each_tokens_rows_are_summed(path, dtype, slots, tokens, n, place, generator):
    y = torch.randn(tokens * slots, n, generator=generator).to(place, dtype)
    with path():
        got = reduce_top_k(fenced(y), slots)
    assert_reduced(got, y, slots)


@every_sum
def test_long_tensors_take_wide_offsets(dtype, device, generator, monkeypatch):
    y = torch.randn(12, 1100, generator=generator).to(device, dtype)
    monkeypatch.setattr(router, "WIDE_ELEMENTS", y.numel())
    with kernels():
        assert_reduced(reduce_top_k(y, 4), y, 4)


@pytest.mark.gpu
def test_rows_past_2_to_the_31_elements_are_summed(device_generator):
    slots, n = 8, 4096
    y = torch.zeros((2**31 // n + slots, n), dtype=torch.bfloat16, device="cuda")
    y[-slots:] = torch.randn(slots, n, generator=device_generator, device="cuda")
    got = reduce_top_k(y, slots)
    assert not got[:-1].any()
    assert_reduced(got[-1:], y[-slots:], slots)


@pytest.mark.parametrize(
    ("y", "slots", "shown"),
    [
        (torch.zeros(6), 2, r"y has shape \[6\]; expected \[any, any\]"),
        (torch.zeros(7, 4), 2, "y has 7 rows; with top_k=2 expected a multiple of 2"),
        (torch.zeros(6, 4), 0, "top_k is 0; expected 1 or more"),
        (torch.zeros(6, 4).half(), 2, "y is torch.float16; expected torch.bfloat16 or"),
        (torch.zeros(4, 6).T, 2, "y has strides .* contiguous"),
        (torch.zeros(6, 4).to(torch.float8_e4m3fn), 2, "y is torch.float8_e4m3fn, whose scale"),
    ],
)
def test_rows_that_cannot_be_summed_are_shown(y, slots, shown):
    with pytest.raises(ValueError, match=shown):
        reduce_top_k(y, slots)
