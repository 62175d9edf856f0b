"""What is timed is what fits, loads what was told and is right; the rest says why not."""

import json

import pytest

from moelab import advice, bench, compiler, plan, records, targets
from moelab.bench import MeasureError, Roofs


def here():
    """The target of the GPU at hand."""
    return bench.gpu().target.name


def grid(**changed):
    small = {"kernels": "moe_gemm_a8w8", "models": "Llama4 Maverick", "tp": 8, "m": 512}
    tiling = {"tiles": "16x64x128,64x64x128", "warps": 4, "stages": "1,2"}
    return plan.grid(**small | tiling | changed)


# Without a GPU.


def test_without_a_gpu_measuring_says_so(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MeasureError, match="no GPU"):
        bench.measure(grid(targets="gfx950"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rounds": 1}, "rounds = 1, repetitions = 10; give 2 and 1 or more"),
        ({"repetitions": 0}, "repetitions = 0; give 2 and 1 or more"),
        ({"workload": "even"}, "no workload 'even'; there are uniform, balanced, zipf"),
    ],
)
def test_a_wrong_value_is_refused_before_a_gpu_is_looked_for(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        bench.measure(grid(targets="gfx950"), tmp_path, **changed)


def test_async_copy_is_measured_as_this_process_has_it_and_no_other():
    chip = bench.Gpu("MI355X", targets.get("gfx950"))
    (off, on) = grid(targets="gfx950", tiles="16x64x128", stages=1, async_copy="both")
    asked = on if compiler.default_async_copy(chip.target) else off
    bench._check([asked], chip)
    with pytest.raises(MeasureError, match="set TRITON_HIP_USE_ASYNC_COPY"):
        bench._check([on if asked is off else off], chip)


def test_a_round_is_one_sample_however_many_repetitions_it_has():
    few = bench.interval([[10.0], [11.0], [12.0]])
    many = bench.interval([[10.0] * 50, [11.0] * 50, [12.0] * 50])
    assert few == many
    assert few["time_us"] == pytest.approx(11)
    # Student's t with 2 degrees of freedom is 4.30, of logarithms' standard error 0.0526.
    assert few["time_low_us"] == pytest.approx(10.97 / 1.254, rel=2e-3)
    assert few["time_high_us"] == pytest.approx(10.97 * 1.254, rel=2e-3)


def test_one_slow_sample_moves_nothing():
    steady = [[10.0, 10.1, 10.2]] * 4
    hit = [[10.0, 10.1, 900.0], *steady[1:]]
    assert bench.interval(hit)["time_us"] == pytest.approx(10.1)


def test_the_roof_is_bandwidths_for_few_tokens_and_computes_for_many():
    roofs = Roofs({"fp8": 1000.0, "bf16": 500.0}, tbps=3.0)
    few, many = (
        bench._rates({"time_us": 100.0}, configuration, roofs)
        for m in (512, 15872)
        for configuration in grid(targets="sm_90", m=m, tp=1, stages=1)[:1]
    )
    assert few["roof_tflops"] < 1000
    assert many["roof_tflops"] > few["roof_tflops"]
    problem = grid(targets="sm_90", tp=1, stages=1)[0].problem
    assert few["tflops"] == pytest.approx(2 * problem.rows * problem.n * problem.k / 1e8)
    assert bench._rates({}, grid(targets="sm_90")[0], roofs) == {}


# On a GPU.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    store = tmp_path_factory.mktemp("measured")
    too_large = plan.grid(
        kernels="moe_gemm_a8w8",
        models="Llama4 Maverick",
        tp=8,
        m=512,
        targets=here(),
        tiles="128x256x256",
        warps=8,
        stages=8,
    )
    asked = [*grid(targets=here()), *grid(targets=here(), layers=2), *too_large]
    return asked, bench.measure(asked, store, rounds=4, repetitions=3, progress=False), store


@pytest.mark.gpu
def test_each_configuration_that_fits_has_samples_and_loaded_what_was_told(measured):
    asked, rows, _ = measured
    assert len(rows) == len(asked)
    fits = rows[rows["status"] == "ok"]
    assert len(fits) == len(rows) - 1
    assert list(fits["loaded_lds_bytes"]) == list(fits["lds_bytes"])
    assert fits["largest_error"].lt(bench.TOLERANCE).all()
    for row in fits.itertuples():
        samples = json.loads(row.samples_us)
        assert [len(of_round) for of_round in samples] == [3] * 4
        assert row.time_low_us <= row.time_us <= row.time_high_us * 1.05
        assert 0 < row.tflops < row.roof_tflops * 1.05
    assert set(fits["mode"]) == {"measured"}
    assert fits["registers"].gt(0).all()
    assert fits["run"].nunique() == 1 and fits["gpu"].nunique() == 1


@pytest.mark.gpu
def test_what_cannot_fit_is_a_row_that_was_not_launched(measured):
    _, rows, _ = measured
    (row,) = rows[rows["status"] != "ok"].to_dict("records")
    assert row["status"] == "out_of_lds"
    assert row["lds_bytes"] > targets.get(here()).lds_limit
    assert all(records.frame([row])[["time_us", "loaded_lds_bytes", "samples_us"]].isna().iloc[0])


@pytest.mark.gpu
def test_measured_rows_are_kept_and_order_advice(measured):
    _, rows, store = measured
    kept = records.read(store)
    assert len(kept) == len(rows)
    assert len(advice.check_measured(kept.dropna(subset=["time_us"]))) == len(rows) - 1


@pytest.mark.gpu
def test_a_wrong_result_is_a_row_that_was_not_timed(tmp_path, monkeypatch):
    from moelab.kernels.inputs import Inputs

    expected = Inputs.expected
    monkeypatch.setattr(Inputs, "expected", lambda self: expected(self) * 1.1)
    rows = bench.measure(
        grid(targets=here(), stages=1), tmp_path, rounds=2, repetitions=1, progress=False
    )
    assert set(rows["status"]) == {"wrong_result"}
    assert rows["largest_error"].gt(0.05).all()
    assert rows["time_us"].isna().all()


@pytest.mark.gpu
def test_other_lds_than_was_told_is_a_row_that_says_both(tmp_path, monkeypatch):
    from moelab import sweep

    compiled = sweep.compile_all

    def off_by_one(*args):
        for key, answer in compiled(*args):
            yield key, answer | {"lds_bytes": answer["lds_bytes"] + 1}

    monkeypatch.setattr(sweep, "compile_all", off_by_one)
    rows = bench.measure(
        grid(targets=here(), stages=1), tmp_path, rounds=2, repetitions=1, progress=False
    )
    assert set(rows["status"]) == {"lds_differs"}
    assert rows["time_us"].isna().all()


@pytest.mark.gpu
def test_what_is_not_for_this_gpu_is_refused(tmp_path):
    other = "gfx950" if here() != "gfx950" else "sm_90"
    with pytest.raises(MeasureError, match=f"not {other}"):
        bench.measure(grid(targets=other), tmp_path)
    dense = plan.grid(kernels="ff_a16w16_fused", targets=here(), stages=1)
    with pytest.raises(MeasureError, match="measured are MoE GEMMs"):
        bench.measure(dense, tmp_path)
