"""A peer is given what ours are given, held against the same reference, and costs no one else."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moelab import bench, launcher, peers, plan, records, workloads
from moelab.kernels import inputs
from moelab.peers import Asked, Launch, Peer
from moelab.specs import Problem


def problem(layer=1, **changed):
    """One that peers compute, with experts of no whole number of rows."""
    shape = {"m": 24, "experts": 4, "top_k": 2, "n": 128, "k": 128} | changed
    gather = {"gather": layer == 1, "scatter": layer == 2}
    of = Problem("small", layer, 1, **shape, **gather, swiglu=False, weighted=False)
    return peers.plain(of)


def draw(kernel, of, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    expert, weight = workloads.draw("uniform", of.m, of.experts, of.top_k, generator)
    return inputs.of_problem(kernel, of, generator, expert, weight, 16, torch.float8_e4m3fn)


def configuration(of, kernel="moe_gemm_a8w8"):
    (asked,) = plan.grid(kernels=kernel, targets="sm_90", tiles="16x64x128", warps=4, stages=1)
    return replace(asked, problem=of)


# How rows are laid out.


def product_of(drawn, rows):
    """Multiply each row by its own expert's weight, as a peer would; padding gives NaN."""
    w = drawn.w.double() * drawn.w_scale.double()[:, None, None]
    owner = rows.expert.long()

    def product(x):
        assert len(x) == len(owner)
        y = torch.einsum("rk,rnk->rn", x.double() * drawn.x_scale.double(), w[owner.clamp(min=0)])
        return y.masked_fill((owner < 0)[:, None], float("nan"))

    return product


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("multiple", [1, 16])
def test_both_ways_to_time_a_product_give_the_reference_in_its_order(layer, multiple):
    drawn = draw("moe_gemm_a8w8", problem(layer))
    rows = peers.Rows.of(drawn, multiple)
    alone, whole = peers.unfused(drawn, (drawn.x,), product_of(drawn, rows), rows)
    for launch in (alone, whole):
        torch.testing.assert_close(launch.y(launch.run()), drawn.expected())
    named = [["gather"], ["scatter"]][layer - 1] + (["padding"] if multiple > 1 else [])
    assert alone.includes == ""
    assert sorted(whole.includes.split(", ")) == sorted(named)


def test_padding_belongs_to_no_expert_and_fills_each_experts_rows_to_a_multiple():
    drawn = draw("moe_gemm_a8w8", problem())
    rows = peers.Rows.of(drawn, 16)
    counts = drawn.routing.histogram.tolist()
    assert any(count % 16 for count in counts)
    assert len(rows.expert) == sum(-(-count // 16) * 16 for count in counts)
    for expert, count in enumerate(counts):
        (found,) = (rows.expert == expert).nonzero(as_tuple=True)
        assert len(found) == count
        assert found[0] % 16 == 0 and found[-1] - found[0] == count - 1
    assert (rows.expert == -1).sum() == len(rows.expert) - sum(counts)


@pytest.mark.parametrize("layout", ["rows", "cdna4", "hopper"])
def test_mxfp4_weights_reach_a_peer_as_they_were_before_ours_were_laid_out(layout):
    of = problem(k=256)
    plainly = draw("moe_gemm_a4w4", of)
    ours = draw("moe_gemm_a4w4", replace(of, scale_layout=layout))
    for given, wanted in zip(peers._w_in_rows(ours), (plainly.w, plainly.w_scale), strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("kernel", peers.PEERS["torch_bf16"].kernels)
def test_torch_bf16_is_given_the_values_that_w_and_x_stand_for(kernel, monkeypatch):
    drawn = draw(kernel, problem())

    def grouped_mm(x, w, offs):
        starts = [0, *offs.tolist()[:-1]]
        parts = [
            x[start:end].double() @ w[expert].double()
            for expert, (start, end) in enumerate(zip(starts, offs.tolist(), strict=True))
        ]
        return torch.cat(parts)

    monkeypatch.setattr(torch, "_grouped_mm", grouped_mm)
    for launch in peers.PEERS["torch_bf16"].launches(drawn):
        y, expected = launch.y(launch.run()), drawn.expected()
        # Values with their scales are rounded to bf16.
        assert (y - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_torch_is_told_how_to_keep_sums_and_torch_precise_is_not(monkeypatch):
    told = []

    def scaled_grouped_mm(x, w, *_, use_fast_accum, **__):
        told.append(use_fast_accum)
        return x.new_zeros(len(x), w.shape[2], dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    for fast in (True, False):
        drawn = draw("moe_gemm_a8w8", problem(fast_accum=fast))
        for name in ("torch", "torch_precise"):
            peers.PEERS[name].launches(drawn)[0].run()
    assert told == [True, False, False, False]
    asked = peers.PEERS["torch_precise"]
    assert asked.is_for("moe_gemm_a8w8", problem(fast_accum=True))
    assert not asked.is_for("moe_gemm_a8w8", problem())


# What is refused, and what is missing.


def test_an_unknown_peer_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no peer 'cutlass'; there are torch, .*, or all"):
        peers.check(["torch", "cutlass"], [configuration(problem())])


def test_peers_of_other_kernels_are_refused():
    with pytest.raises(ValueError, match=r"asked are moe_gemm_a8w8; .*deep_gemm: .*blockscale"):
        peers.check(["deep_gemm"], [configuration(problem())])


@pytest.mark.parametrize("more", [{"swiglu": True}, {"weighted": True}, {"bias": True}])
def test_what_peers_do_not_compute_is_refused(more, tmp_path):
    of = replace(problem(), **more)
    with pytest.raises(ValueError, match="no SwiGLU, bias or routing weights"):
        bench.measure([configuration(of)], tmp_path, peers=["torch"])
    assert peers.plain(of) == problem()
    drawn = SimpleNamespace(swiglu=of.swiglu, bias=of.bias or None, weighted=of.weighted)
    with pytest.raises(ValueError, match="give it a plain problem"):
        peers.PEERS["torch"].launches(drawn)


def test_names_are_read_from_text():
    assert peers.named("") == ()
    assert peers.named("all") == tuple(peers.PEERS)
    assert peers.named("torch, deep_gemm") == ("torch", "deep_gemm")


@pytest.mark.parametrize("name", peers.PEERS)
def test_what_is_missing_is_told_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    for attribute in ("_scaled_grouped_mm", "_grouped_mm"):
        monkeypatch.delattr(torch, attribute, raising=False)
    assert "install" in peers.PEERS[name].missing()


def test_deep_gemm_says_that_it_compiles(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert "nvcc" in peers.PEERS["deep_gemm"].missing()
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    assert peers.PEERS["deep_gemm"].missing() is None


# Rows.


def raises(*_):
    raise RuntimeError("no kernel for this shape")


def fake(name, prepare, needs=lambda: None, **own):
    return Peer(name, ("moe_gemm_a8w8",), "", needs, prepare, **own)


def gives(y):
    return lambda drawn: [
        Launch("", lambda: y(drawn), lambda y: y),
        Launch("gather", lambda: y(drawn), lambda y: y),
    ]


FAKES = (
    fake("broken", raises),
    fake("refuses", gives(raises)),
    fake("wrong", gives(lambda drawn: drawn.expected() + 1)),
    fake("missing", gives(None), lambda: "no module peer: pip install peer"),
    fake("right", gives(lambda drawn: drawn.expected())),
    fake("other sums", gives(raises), only_fast=True),
)


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {peer.name: peer for peer in FAKES})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return tuple(peers.PEERS)


def test_a_peer_that_fails_is_a_row_and_costs_no_other(fakes):
    drawn = draw("moe_gemm_a8w8", problem())
    against = functools.partial(launcher._against, expected=drawn.expected(), problem=problem())
    launches, found = peers.ready(fakes, configuration(problem()), drawn, against)
    assert [(of.peer, of.includes) for of in launches] == [("right", ""), ("right", "gather")]
    said = {(of.peer, of.includes): (r.get("status"), r.get("reason")) for of, r in found.items()}
    failed = ("launch_error", "RuntimeError: no kernel for this shape")
    assert said.pop(("broken", None)) == failed
    assert said.pop(("refuses", "")) == said.pop(("refuses", "gather")) == failed
    assert said.pop(("missing", None)) == ("unavailable", "no module peer: pip install peer")
    for includes in ("", "gather"):
        status, reason = said.pop(("wrong", includes))
        assert status == "wrong_result" and reason.startswith("off by ")
        assert said.pop(("right", includes)) == (None, None)
    assert said == {}


def test_a_peers_row_names_problem_and_peer_and_has_no_tile():
    of = Asked("moe_gemm_a8w8", problem(2), "sm_90", "triton_kernels", "scatter")
    row = of.row()
    assert set(row) <= set(records.COLUMNS)
    (told,) = records.frame([row]).to_dict("records")
    assert (told["peer"], told["includes"], told["kernel"]) == (
        *("triton_kernels", "scatter", "moe_gemm_a8w8"),
    )
    assert {name: told[name] for name in vars(of.problem) if name != "x_format"} == {
        name: value for name, value in vars(of.problem).items() if name != "x_format"
    }
    no_tile = ["block_m", "block_n", "block_k", "num_warps", "num_stages", "lds_bytes", "tma"]
    assert records.frame([row])[no_tile].isna().all(axis=None)


# On a GPU.

SHAPE = {"m": 96, "experts": 8, "n": 512, "k": 768}


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("name", "kernel", "fast_accum"),
    [
        (peer.name, kernel, fast_accum)
        for peer in peers.PEERS.values()
        for kernel in peer.kernels
        for fast_accum in ((True, False) if kernel == "moe_gemm_a8w8" else (False,))
        if fast_accum or not peer.only_fast
    ],
)
def test_every_peer_that_is_here_gives_the_reference(name, kernel, fast_accum, layer):
    peer = peers.PEERS[name]
    if lacks := peer.missing():
        pytest.skip(lacks)
    of = problem(layer, fast_accum=fast_accum, **SHAPE)
    drawn = draw(kernel, of, "cuda")
    launches = peer.launches(drawn)
    assert [bool(launch.includes) for launch in launches] == [False, True]
    for launch in launches:
        found = launcher._against(launch.y(launch.run()), drawn.expected(), of)
        assert "status" not in found, (launch.includes, found)


@pytest.mark.gpu
def test_peers_take_turns_with_ours(tmp_path):
    asked = plan.grid(
        kernels="moe_gemm_a8w8",
        targets=bench.gpu().target.name,
        tiles="64x64x128",
        warps=4,
        stages=2,
    )
    small = [replace(of, problem=problem(**SHAPE)) for of in asked]
    options = {"rounds": 2, "repetitions": 2, "progress": False}
    rows = bench.measure(small, tmp_path, peers=peers.named("all"), **options)
    ours, of_peers = rows[rows["peer"].isna()], rows[rows["peer"].notna()]
    assert list(ours["status"]) == ["ok"]
    assert rows["run"].nunique() == 1
    (of,) = small
    expected = {peer.name for peer in peers.PEERS.values() if peer.is_for(of.kernel, of.problem)}
    assert set(of_peers["peer"]) == expected
    timed = of_peers[of_peers["status"] == "ok"]
    assert "torch" in set(timed["peer"])
    for name in ("time_us", "samples_us", "tflops", "roof_tflops", "largest_error"):
        assert timed[name].notna().all()
    assert set(of_peers["status"]) <= {"ok", "unavailable"}
    kept = records.read(tmp_path)
    assert len(kept[kept["mode"] == "measured"]) == len(rows)


def test_every_peer_is_described_with_what_is_called_beside_which_of_ours():
    told = peers.described().splitlines()
    assert len(told) == len(peers.PEERS)
    for line, peer in zip(told, peers.PEERS.values(), strict=True):
        assert f"`{peer.name}`" in line and peer.note in line
        assert all(kernel in line for kernel in peer.kernels)
