"""What is proposed can win, what is measured longest is the best, and no result is lost."""

import math
import random
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest

from moelab import bench, launcher, plan, problems, sweep, targets, tune, tuned
from moelab.parameters import ParameterError
from moelab.specs import Configuration, Tile
from moelab.tune import Rung

SM_90 = targets.get("sm_90")
QWEN = "Qwen3-235B-A22B"


def tiles(m, kernel="moe_gemm_a8w8", model=QWEN):
    of = problems.problem(model, 1, 1, m)
    return [(one.tile, one.num_warps) for one in tune.space(kernel, of, SM_90)]


# The cells.


def test_by_default_the_cells_are_those_of_the_stage_sweep():
    cells = tune.cells(target="sm_90")
    assert len(cells) == len(set(cells)) == 5 * 2 * 2 * 4
    served = Counter((kernel, of.model) for kernel, of in cells)
    assert served == {
        ("moe_gemm_a8w8", QWEN): 16,
        ("moe_gemm_a8w8", "Llama4 Maverick"): 16,
        ("moe_gemm_a8w4", "GPT-OSS 120B"): 16,
        ("moe_gemm_a4w4", "DeepSeek-R1"): 16,
        ("moe_gemm_a8w8_blockscale", "DeepSeek-R1"): 16,
    }


def test_cells_that_share_their_weights_follow_one_another():
    weights = [(kernel, replace(of, m=0)) for kernel, of in tune.cells(target="sm_90")]
    starts = [one for one, before in zip(weights, [None, *weights], strict=False) if one != before]
    assert len(starts) == len(set(weights))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kernels": "moe_gemm_a8w88"}, "did you mean 'moe_gemm_a8w8'"),
        ({"kernels": "ff_a16w16_fused"}, "kernels: no 'ff_a16w16_fused'"),
        ({"models": "Qwen"}, "models: no 'Qwen'"),
        ({"models": QWEN, "kernels": "moe_gemm_a4w4"}, "served with none of moe_gemm_a4w4"),
        ({"m": "0"}, "m: 0 is not 1 or more"),
    ],
)
def test_wrong_cells_are_told_the_right_ones(changed, words):
    with pytest.raises(ParameterError, match=words):
        tune.cells(target="sm_90", **changed)


# The space.


@pytest.mark.parametrize(
    ("m", "sizes"), [(8, {16, 32}), (512, {32, 64}), (1024, {64, 128}), (15872, {64, 128, 256})]
)
def test_block_m_follows_the_mean_rows_of_an_expert(m, sizes):
    assert {tile.block_m for tile, _ in tiles(m)} == sizes


@pytest.mark.parametrize("kernel", plan.MOE_GEMMS)
def test_every_proposal_is_one_that_the_kernel_takes_and_warps_can_hold(kernel):
    model = next(name for name, of in problems.MODELS.items() if kernel in of.kernels)
    for m in problems.TOKENS:
        of = problems.problem(model, 1, 1, m)
        published = problems.ruled_tile(kernel, of)
        proposed = tune.space(kernel, of, SM_90)
        assert published in [(one.tile, one.num_warps) for one in proposed]
        assert published[0].block_m == problems.routed_block_m(of)
        for one in proposed:
            sweep.compiler.specialize(sweep.settled(one))
            # Of a specialized tile two groups of warps multiply.
            warps = one.num_warps * (2 if one.tile.specialized else 1)
            sums = one.tile.block_m * one.tile.block_n / warps / 32
            assert 8 <= sums <= 128 or (one.tile, one.num_warps) == published


@pytest.mark.parametrize("kernel", plan.MOE_GEMMS)
def test_a_specialized_tile_is_proposed_where_there_is_one_alone(kernel):
    of = problems.problem(QWEN, 1, 1, 2560)
    proposed = {
        target
        for target in ("sm_90", "sm_100", "gfx950")
        for one in tune.space(kernel, of, targets.get(target))
        if one.tile.specialized
    }
    assert proposed == ({"sm_90"} if "a8w8" in kernel else set())


def test_one_kernel_and_model_have_hundreds_of_configurations():
    asked = {
        (replace(of, num_stages=stages), of.problem)
        for kernel, problem in tune.cells(target="sm_90", models=QWEN)
        for of in tune.space(kernel, problem, SM_90)
        for stages in range(1, of.num_stages + 1)
    }
    assert len(asked) > 200


# Pruned, by answers that are made up.


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Answer with LDS and spills by rule, and keep what was asked."""
    asked = []

    def answer(questions, store, *, full=False, **_):
        asked.extend((of, full) for of in questions)
        rows = []
        for of in questions:
            fits = of.tile.block_n * of.num_stages <= 512
            spills = 40 if of.num_warps == 4 and of.tile.block_n > 64 else 0
            rows.append({"status": "ok" if fits else "out_of_lds", "spilled_registers": spills})
        return pd.DataFrame(rows)

    monkeypatch.setattr(sweep, "run", answer)
    return asked


def proposed(*tilings, m=(512,), stages=4):
    return [
        Configuration(
            "moe_gemm_a8w8",
            problems.problem(QWEN, 1, 1, tokens),
            tile,
            warps,
            stages,
            None,
            "sm_90",
        )
        for tokens in m
        for tile, warps in tilings
    ]


def left(configurations, tmp_path):
    found = tune.pruned(configurations, tmp_path, progress=False)
    return sorted((of.tile.block_n, of.num_warps, of.num_stages) for of in found)


def test_of_a_tile_the_deepest_pipeline_that_fits_is_left(compiler, tmp_path):
    tilings = [(Tile(32, 64, 128), 8), (Tile(32, 256, 128), 4)]
    assert left(proposed(tilings[0]), tmp_path) == [(64, 8, 4)]
    # Nothing of its block_m spills less.
    assert left(proposed(tilings[1]), tmp_path) == [(256, 4, 2)]
    assert left(proposed((Tile(32, 512, 128), 8)), tmp_path) == [(512, 8, 1)]
    assert left(proposed((Tile(32, 1024, 128), 8)), tmp_path) == []


def test_what_spills_where_another_does_not_is_left_out(compiler, tmp_path):
    tilings = [(Tile(32, 128, 128), 4), (Tile(32, 128, 128), 8)]
    assert left(proposed(*tilings), tmp_path) == [(128, 8, 4)]


def test_but_not_where_the_other_has_another_block_m(compiler, tmp_path):
    tilings = [(Tile(32, 128, 128), 4), (Tile(64, 128, 128), 8)]
    assert [warps for _, warps, _ in left(proposed(*tilings), tmp_path)] == [4, 8]


def test_of_the_published_tile_all_that_fits_stays(compiler, tmp_path):
    tile, warps = problems.ruled_tile("moe_gemm_a8w8", problems.problem(QWEN, 1, 1, 512))
    assert (tile.block_n, warps) == (256, 8)
    asked = proposed((tile, warps), (Tile(32, 64, 128), 8))
    assert left(asked, tmp_path) == [(64, 8, 4), (256, 8, 1), (256, 8, 2)]


def test_token_counts_are_asked_once_and_left_for_each(compiler, tmp_path):
    found = tune.pruned(proposed((Tile(32, 64, 128), 8), m=(512, 600, 700)), tmp_path)
    assert Counter(of.problem.m for of in found) == {512: 1, 600: 1, 700: 1}
    assert {of.problem.m for of, _ in compiler} == {700}


def test_a_run_measures_what_the_compiler_left_weights_by_weights(compiler, tmp_path, monkeypatch):
    asked = []

    def measure(configurations, store, *, workload, seed, rounds, repetitions, **_):
        assert (store, workload, seed) == (tmp_path, "zipf", 7)
        asked.append(list(configurations))
        return Gpu(noise=0).measure(configurations, rounds=rounds, repetitions=repetitions)

    monkeypatch.setattr(bench, "gpu", lambda: launcher.Gpu("a GPU", SM_90))
    monkeypatch.setattr(bench, "measure", measure)
    cells = tune.cells(target="sm_90", models=QWEN)
    rows = tune.run(cells, tmp_path, progress=False, workload="zipf", seed=7)
    assert len(rows) == sum(map(len, asked))
    for part in asked:
        measured = list(dict.fromkeys((of.kernel, of.problem) for of in part))
        assert measured == [cell for cell in cells if cell in measured]
        layers = {of.problem.layer for of in part}
        assert len(layers) == 1 and len(measured) == len(cells) / 2
    # All that was proposed and refused or spilled was never measured.
    assert all(of.tile.block_n * of.num_stages <= 512 for of in asked[0])


def test_a_kernel_of_which_nothing_compiles_is_told(monkeypatch, tmp_path):
    def refuse(questions, store, **_):
        return pd.DataFrame(
            [{"status": "compile_error", "spilled_registers": pd.NA}] * len(questions)
        )

    monkeypatch.setattr(bench, "gpu", lambda: launcher.Gpu("a GPU", SM_90))
    monkeypatch.setattr(sweep, "run", refuse)
    cells = tune.cells(target="sm_90", kernels="moe_gemm_a4w4", fast_accum=True)
    with pytest.raises(ValueError, match="no tile of moe_gemm_a4w4 compiles and fits sm_90"):
        tune.run(cells, tmp_path)


# Halved, by times that are made up.


class Gpu:
    """Times as a noisy GPU gives them, and what was asked of it."""

    def __init__(self, noise=0.01, seed=0):
        self.random, self.noise, self.asked = random.Random(seed), noise, []

    @staticmethod
    def truth(of):
        """Give each configuration a time of its own, from 100 us."""
        tile = of.tile
        us = 100 + abs(math.log2(tile.block_n / 128)) * 12 + abs(math.log2(tile.block_k / 128)) * 8
        us += abs(of.num_stages - 3) * 5 + (of.num_warps == 8) * 3 + (tile.block_m == 64) * 4
        ways = {"tma": 6, "persistent": -2, "tails": -3}
        return us - sum(gain * getattr(tile, way, 0) for way, gain in ways.items())

    def measure(self, configurations, *, rounds, repetitions):
        self.asked.append((list(configurations), rounds * repetitions))
        rows = []
        for of in configurations:
            samples = [
                [self.truth(of) * self.random.lognormvariate(0, self.noise)] * repetitions
                for _ in range(rounds)
            ]
            medians = sorted(of_round[0] for of_round in samples)
            rows.append(of.asked() | {"time_us": medians[len(medians) // 2]})
        return pd.DataFrame(rows)


def spread(m=(512,), layers=(1, 2)):
    """Many configurations of each problem, two block_m among them."""
    return [
        Configuration(
            "moe_gemm_a8w8",
            problems.problem(QWEN, layer, 1, tokens),
            Tile(block_m, n, k),
            warps,
            stages,
            None,
            "sm_90",
        )
        for layer in layers
        for tokens in m
        for block_m in (32, 64)
        for n in (64, 128, 256)
        for k in (64, 128, 256)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_the_best_is_found_among_noisy_times(seed):
    """What is found is at most the noise of many samples slower than the best there is."""
    gpu = Gpu(seed=seed)
    rows = tune.halving(spread(layers=(1,)), gpu.measure)
    last = gpu.asked[-1][0]
    best = rows.tail(len(last)).nsmallest(1, "time_us").iloc[0]
    (found,) = [
        of
        for of in last
        if of.num_stages == best["num_stages"]
        and of.num_warps == best["num_warps"]
        and all(best[name] == value for name, value in vars(of.tile).items())
    ]
    possible = min(map(gpu.truth, [*spread(layers=(1,)), *last]))
    assert gpu.truth(found) <= possible * 1.02


def test_few_are_measured_long_and_their_variants_with_them():
    gpu = Gpu(noise=0)
    asked = spread(layers=(1,))
    tune.halving(asked, gpu.measure, (Rung(2, 2, keep=2), Rung(6, 5)))
    (all_of_them, few), (finalists, many) = gpu.asked
    assert (all_of_them, few, many) == (asked, 4, 30)
    best = min(asked, key=gpu.truth)
    assert set(tune.variants(best)) <= set(finalists)
    assert len(set(finalists)) == len(finalists) < len(asked) / 2
    assert {of.tile.block_m for of in finalists} == {32, 64}


def test_the_published_tile_is_measured_to_the_end():
    gpu = Gpu(noise=0)
    tile, warps = problems.ruled_tile("moe_gemm_a8w8", problems.problem(QWEN, 1, 1, 512))
    published = [replace(of, tile=tile, num_warps=warps) for of in spread(layers=(1,))[:3]]
    tune.halving([*spread(layers=(1,)), *published], gpu.measure)
    finalists = [of for of in gpu.asked[-1][0] if (of.tile, of.num_warps) == (tile, warps)]
    assert [of.num_stages for of in finalists] == [3], "its best stage count alone"


def test_every_row_of_every_rung_is_given_back_and_layers_are_measured_apart():
    gpu = Gpu()
    asked = spread(m=(512, 600))
    rows = tune.halving(asked, gpu.measure)
    assert len(rows) == sum(len(configurations) for configurations, _ in gpu.asked)
    layers = [{of.problem.layer for of in configurations} for configurations, _ in gpu.asked]
    assert layers == [{1}, {2}, {1}, {2}]
    last = {(of.problem.layer, of.problem.m) for of in [*gpu.asked[-1][0], *gpu.asked[-2][0]]}
    assert last == {(1, 512), (1, 600), (2, 512), (2, 600)}


def test_what_was_not_timed_does_not_go_on():
    gpu = Gpu()

    def failing(configurations, **how):
        rows = gpu.measure(configurations, **how)
        rows.loc[rows["block_n"] == 128, "time_us"] = pd.NA
        return rows

    tune.halving(spread(layers=(1,)), failing)
    assert 128 not in {of.tile.block_n for of in gpu.asked[-1][0]}


@pytest.mark.parametrize(("block_m", "tails"), [(16, 0), (32, 1), (64, 2), (256, 2)])
def test_a_variants_last_tiles_have_16_rows_or_more(block_m, tails):
    (of,) = proposed((Tile(block_m, 64, 128), 8))
    assert {one.tile.tails for one in tune.variants(of)} == {0, tails}


def test_variants_keep_the_blocks_and_are_no_repetition():
    (of,) = proposed((Tile(32, 64, 128), 8), stages=1)
    found = list(tune.variants(of))
    assert len(set(found)) == len(found) and of not in found
    assert [one.num_stages for one in found if one.tile == of.tile] == [2, 3]
    assert all((one.tile.block_m, one.tile.block_n) == (32, 64) for one in found)


# On a GPU.


@pytest.mark.gpu
def test_a_problem_is_tuned_and_its_launch_finds_the_winner(tmp_path, monkeypatch):
    here = bench.gpu().target.name
    cells = tune.cells(target=here, models=QWEN, layers=1, tp=4, m=512)
    rows = tune.run(cells, tmp_path / "rows", progress=False)
    path = tmp_path / f"tuned_{here}.json"
    tuned.save(tuned.winners(rows), here, path)
    monkeypatch.setenv("MOELAB_TUNED", str(tmp_path))
    tuned.forget()
    ((kernel, of),) = cells
    found = tuned.best(kernel, of, here)
    assert found is not None
    assert found.time_us == pytest.approx(rows["time_us"].min(), rel=0.05)
    from moelab.kernels import source_hash

    assert tuned.stale(tuned.read(path), {kernel: source_hash(kernel)}) == {}
    (gain,) = tuned.gains(rows)["gain"]
    assert gain >= 1
    tuned.forget()
