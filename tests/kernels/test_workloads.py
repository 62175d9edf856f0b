"""Drawn and recorded routing: laws hold, seeds repeat, recordings say what is wrong with them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from moelab import workloads
from moelab.workloads import WORKLOADS, draw, recorded, save, skew

every_workload = pytest.mark.parametrize("name", WORKLOADS)
# (tokens, experts, experts per token)
every_size = pytest.mark.parametrize(
    ("m", "experts", "top_k"), [(0, 4, 2), (1, 1, 1), (50, 3, 3), (33, 128, 8), (40, 384, 1)]
)


def allowed(p: float, draws: int) -> float:
    """Bound how far a frequency strays from its probability.

    Bernstein's inequality: it strays further than sqrt(2 p (1 - p) L / draws) + 2 L / (3 draws)
    with probability 2 exp(-L) at most; with L = 18 that is 3e-8.
    """
    return 6 * math.sqrt(p * (1 - p) / draws) + 12 / draws


@every_workload
@every_size
def test_a_token_visits_different_experts_that_exist(name, m, experts, top_k, generator):
    expert, _ = draw(name, m, experts, top_k, generator)
    assert (expert.shape, expert.dtype) == ((m, top_k), torch.int64)
    assert all(len(set(token)) == top_k for token in expert.tolist())
    assert ((expert >= 0) & (expert < experts)).all()


@every_workload
@every_size
def test_weights_are_a_softmax(name, m, experts, top_k, generator):
    """Rounding of up to 8 terms leaves a sum of 1 within 8 2^-23."""
    _, weight = draw(name, m, experts, top_k, generator)
    assert (weight.shape, weight.dtype) == ((m, top_k), torch.float32)
    assert (weight > 0).all()
    assert ((weight.double().sum(dim=1) - 1).abs() <= 8 * 2**-23).all()


@every_workload
def test_a_seed_repeats_its_workload_and_another_gives_another(name):
    def drawn(seed):
        return draw(name, 64, 16, 4, torch.Generator().manual_seed(seed))

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


@every_workload
def test_workloads_lie_where_their_generator_does(name, device, device_generator):
    for tensor in draw(name, 8, 4, 2, device_generator):
        assert tensor.device.type == device


@every_size
def test_balanced_counts_differ_by_one_at_most(m, experts, top_k, generator):
    expert, _ = draw("balanced", m, experts, top_k, generator)
    histogram = torch.bincount(expert.flatten(), minlength=experts)
    assert histogram.max() - histogram.min() <= 1


def test_uniform_draws_every_set_alike(generator):
    m = 20000
    expert, _ = draw("uniform", m, 5, 2, generator)
    sets = [tuple(token) for token in expert.sort(dim=1).values.tolist()]
    for pair in itertools.combinations(range(5), 2):
        assert abs(sets.count(pair) / m - 1 / 10) <= allowed(1 / 10, m), pair


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 2.0])
def test_zipf_draws_by_the_law_and_then_from_the_rest(s, generator, monkeypatch):
    """Slot 0 is rank i with p_i = i^-s / sum of all, slot 1 then j with p_j / (1 - p_i)."""
    m, experts = 50000, 5
    order = torch.tensor([3, 0, 4, 1, 2])
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    expert, _ = draw("zipf", m, experts, 2, generator, s=s)
    rank = order[expert]
    law = [(1 + i) ** -s for i in range(experts)]
    p = [popularity / sum(law) for popularity in law]
    counts = torch.bincount(rank[:, 0] * experts + rank[:, 1], minlength=experts**2)
    counts = counts.view(experts, experts)
    for i, j in itertools.permutations(range(experts), 2):
        expected = p[i] * p[j] / (1 - p[i])
        assert abs(float(counts[i, j]) / m - expected) <= allowed(expected, m), (i, j)
    for i in range(experts):
        assert abs(float(counts[i].sum()) / m - p[i]) <= allowed(p[i], m), i


def test_zipf_has_an_exponent_of_1_unless_told():
    drawn = [
        draw("zipf", 50, 16, 2, torch.Generator().manual_seed(3), **given)[0]
        for given in ({}, {"s": 1.0}, {"s": 1.5})
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_zipfs_favourite_is_any_expert():
    """Each of 4 experts is missed by 60 seeds with probability (3/4)^60 = 3e-8."""
    favourites = {
        int(
            draw("zipf", 50, 4, 1, torch.Generator().manual_seed(seed), s=8.0)[0]
            .flatten()
            .mode()
            .values
        )
        for seed in range(60)
    }
    assert favourites == {0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [1, 3])
def test_one_expert_is_visited_by_every_token_and_the_rest_alike(top_k, generator):
    m, experts = 20000, 6
    expert, _ = draw("one_expert", m, experts, top_k, generator)
    assert len(expert[:, 0].unique()) == 1
    histogram = torch.bincount(expert.flatten(), minlength=experts).tolist()
    assert histogram.pop(int(expert[0, 0])) == m
    p = (top_k - 1) / (experts - 1)
    for count in histogram:
        assert abs(count / m - p) <= allowed(p, m)


def test_skew_orders_workloads(generator):
    skews = {name: skew(draw(name, 512, 64, 4, generator)[0], 64) for name in WORKLOADS}
    assert skews["balanced"] == 1
    assert 1 < skews["uniform"] < skews["zipf"] < skews["one_expert"] == 64 / 4


def test_skew_of_nothing_is_no_number():
    assert math.isnan(skew(torch.zeros((0, 4), dtype=torch.int64), 8))


def test_skew_shows_experts_out_of_range():
    with pytest.raises(ValueError, match="span 0 to 8; with experts=8 they must be 0 to 7"):
        skew(torch.tensor([[0, 8]]), experts=8)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"name": "pareto"}, "no workload 'pareto'; there are uniform, balanced, zipf, one_expert"),
        ({"m": -1}, "m is -1; expected 0 tokens or more"),
        ({"top_k": 0}, "top_k is 0; with experts=4 expected 1 to 4"),
        ({"top_k": 5}, "top_k is 5; with experts=4 expected 1 to 4"),
        ({"experts": 0}, "experts is 0; expected 1 or more"),
        ({"name": "zipf", "s": -1.0}, "s is -1.0; expected an exponent of 0 or more"),
        ({"name": "zipf", "s": math.inf}, "s is inf; expected"),
        ({"name": "zipf", "s": math.nan}, "s is nan; expected"),
    ],
)
def test_what_cannot_be_drawn_is_shown(given, shown, generator):
    arguments = {"name": "uniform", "m": 3, "experts": 4, "top_k": 2} | given
    with pytest.raises(ValueError, match=shown):
        draw(**arguments, generator=generator)


def test_only_zipf_has_an_exponent(generator):
    with pytest.raises(TypeError, match=r"uniform.*'s'"):
        draw("uniform", 3, 4, 2, generator, s=1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_recording_reads_as_it_was_saved(dtype, tmp_path, generator):
    expert, weight = draw("zipf", 21, 16, 4, generator)
    save(tmp_path / "run.npz", expert.to(dtype), weight)
    got_expert, got_weight = recorded(tmp_path / "run.npz", top_k=4)
    assert torch.equal(got_expert, expert)
    assert torch.equal(got_weight, weight)


def test_bfloat16_weights_are_saved_exactly(tmp_path, generator):
    expert, weight = draw("zipf", 21, 16, 4, generator)
    save(tmp_path / "run.npz", expert, weight.bfloat16())
    assert torch.equal(recorded(tmp_path / "run.npz")[1], weight.bfloat16().float())


@pytest.mark.parametrize("m", [0, 5, 21])
def test_the_first_tokens_of_a_recording_are_taken(m, tmp_path, generator):
    expert, weight = draw("zipf", 21, 16, 4, generator)
    save(tmp_path / "run.npz", expert, weight)
    got_expert, got_weight = recorded(tmp_path / "run.npz", m=m)
    assert torch.equal(got_expert, expert[:m])
    assert torch.equal(got_weight, weight[:m])


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_experts_recorded_alone_count_alike(suffix, tmp_path, generator):
    expert, _ = draw("zipf", 21, 16, 4, generator)
    path = tmp_path / f"run{suffix}"
    if suffix == ".npz":
        save(path, expert)
    else:
        np.save(path, expert.numpy())
    got_expert, got_weight = recorded(path)
    assert torch.equal(got_expert, expert)
    assert torch.equal(got_weight, torch.full((21, 4), 0.25))


def test_a_recording_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recording .*run\.npz; expected a \.npz with"):
        recorded(tmp_path / "run.npz")


EXPERT = np.array([[0, 1], [2, 0], [1, 2]])


@pytest.mark.parametrize(
    ("arrays", "shown"),
    [
        ({"experts": EXPERT, "w": EXPERT}, "it holds experts, w; expected a .npz with an array"),
        ({}, "it holds nothing"),
        ({"expert": EXPERT[0]}, r"expert has shape \(2,\); expected \[tokens, top_k\]"),
        ({"expert": EXPERT[:, :0]}, r"expert has shape \(3, 0\); expected \[tokens, top_k\]"),
        ({"expert": EXPERT * 1.0}, "expert is float64; expected an integer type"),
        ({"expert": EXPERT > 0}, "expert is bool; expected an integer type"),
        ({"expert": EXPERT - 1}, "expert is -1 at token 0, slot 0; expected 0 or more"),
        ({"expert": EXPERT % 2}, "token 1 visits expert 0 twice; expected different ones"),
        ({"expert": EXPERT, "weight": EXPERT}, "weight is int64; expected a float type"),
        (
            {"expert": EXPERT, "weight": np.ones(3)},
            r"weight has shape \(3,\); expected \(3, 2\), as expert",
        ),
        ({"expert": EXPERT.astype(object)}, "Object arrays cannot be loaded"),
    ],
)
def test_what_is_wrong_with_a_recording_is_shown(arrays, shown, tmp_path):
    np.savez(tmp_path / "run.npz", **arrays)
    with pytest.raises(ValueError, match=rf"run\.npz: .*{shown}"):
        recorded(tmp_path / "run.npz")


@pytest.mark.parametrize("content", [b"", b"expert,weight\n1,2\n", b"PK\x03\x04 cut off"])
def test_another_kind_of_file_is_shown(content, tmp_path):
    (tmp_path / "run.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.npz: .*expected a \.npz with"):
        recorded(tmp_path / "run.npz")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"m": 4}, "m is 4; expected 0 to 3, the tokens recorded"),
        ({"m": -1}, "m is -1; expected 0 to 3"),
        ({"top_k": 4}, "2 experts per token; expected top_k=4"),
    ],
)
def test_a_recording_that_does_not_suit_is_shown(given, shown, tmp_path):
    np.save(tmp_path / "run.npy", EXPERT)
    with pytest.raises(ValueError, match=rf"run\.npy: {shown}"):
        recorded(tmp_path / "run.npy", **given)


def test_what_could_not_be_read_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="token 0 visits expert 1 twice"):
        save(tmp_path / "run.npz", torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match=r"run.txt'; expected one that ends in \.npz"):
        save(tmp_path / "run.txt", torch.tensor([[1, 2]]))
    assert not list(tmp_path.iterdir())


def test_the_table_names_each_workload_as_its_function_is():
    assert all(getattr(workloads, name) is law for name, law in WORKLOADS.items())
