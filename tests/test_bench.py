"""What is timed is what fits, loads what was told and is right; the rest says why not."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moelab import advice, bench, compiler, measurements, plan, records, targets, timing
from moelab.bench import MeasureError, Roofs
from moelab.peers import Asked, plain
from moelab.timing import ContextLost


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


def test_the_tolerance_grows_with_k_only_where_sums_are_left_to_the_tensor_cores():
    problem = grid(targets="sm_90", tp=1)[0].problem
    left = SimpleNamespace(k=problem.k, fast_accum=True)
    short = SimpleNamespace(k=128, fast_accum=True)
    assert bench.tolerance(problem) == bench.tolerance(short) == 2**-8 + 2e-3
    assert bench.tolerance(left) == 2**-8 + 5120 / 32 * 2**-14


def both_layers(**changed):
    return grid(**{"targets": "sm_90", "layers": "all"} | changed)


def said_of(unit):
    return [(of.problem.tp, of.problem.m, of.problem.layer) for of in unit]


def test_the_layers_of_a_model_are_a_unit_and_weights_last_over_token_counts():
    asked = both_layers(tp="1,8", m="512,1536", tiles="16x64x128", stages=1)
    assert [said_of(unit) for unit in bench._units(asked)] == [
        [(tp, m, 1), (tp, m, 2)] for tp in (1, 8) for m in (512, 1536)
    ]


def test_one_layer_alone_is_a_unit_of_its_own():
    first = both_layers(layers=1, tiles="16x64x128", stages="1,2")
    other = [replace(of, problem=replace(of.problem, x_format="fp8", layer=2)) for of in first]
    assert [said_of(unit) for unit in bench._units([*first, *other])] == [
        [(8, 512, 1)] * 2,
        [(8, 512, 2)] * 2,
    ]


def test_a_launch_is_paired_with_the_fastest_of_the_other_layer_and_as_many_stages():
    asked = both_layers(stages="1,2")
    # Layer 1 was timed with one stage alone; of two tiles the first is the fastest.
    times = {
        of: float(of.tile.block_m) for of in asked if (of.problem.layer, of.num_stages) != (1, 2)
    }
    pairs = bench._pairs(times)
    assert set(pairs) == {of for of in times if of.num_stages == 1}
    for of, both in pairs.items():
        assert [each.problem.layer for each in both] == [1, 2]
        (other,) = {*both} - {of}
        assert (other.tile.block_m, other.num_stages) == (16, 1)


class Machine:
    """A GPU with room for so many layers at once, where every launch takes 100 us."""

    def __init__(self, room=2, **fails):
        self.room, self.fails = room, fails
        self.reused = []

    def checked(self, of_problem, rows, before, how):
        import torch

        layer = of_problem[0].problem.layer
        self.reused.append(before and before.layer)
        self.held += 1
        if self.held > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        drawn = SimpleNamespace(
            layer=layer,
            drawn_for=(of_problem[0].kernel, replace(of_problem[0].problem, m=0)),
        )
        asked = [
            *of_problem,
            *(
                Asked(o.kernel, o.problem, o.target, name, "")
                for o in of_problem[:1]
                for name in how.peers
            ),
        ]
        return drawn, {of: lambda: None for of in asked}, {of: {} for of in asked}

    def timed(self, fitting, *rest):
        self.held = 0
        return self._timed(fitting, *rest)

    def in_turns(self, launches, rounds, repetitions, order):
        for of in launches:
            if of in self.fails.get("lost", ()):
                reason = "RuntimeError: CUDA error"
                raise ContextLost(of, {"status": "launch_error", "reason": reason})
        return {of: {"time_us": 180.0 if isinstance(of, tuple) else 100.0} for of in launches}


@pytest.fixture
def machine(monkeypatch):
    """Let `bench.measure` run where only the launches are not real."""

    def install(**given):
        machine = Machine(**given)
        machine._timed = bench._timed
        answer = {"status": "ok", "lds_bytes": 1024, "lds_limit": 4096, "moelab": "0", "schema": 5}
        monkeypatch.setattr(bench, "gpu", lambda: bench.Gpu("a GPU", targets.get("sm_90")))
        monkeypatch.setattr(
            bench,
            "_compiled",
            lambda rows, *_: {row["compile_key"]: dict(answer) for row in rows.values()},
        )
        roofs = Roofs({"fp8": 1000.0, "bf16": 500.0}, tbps=3.0)
        monkeypatch.setattr(bench, "measured_roofs", lambda rounds: roofs)
        monkeypatch.setattr(bench, "_checked", machine.checked)
        monkeypatch.setattr(bench, "_timed", machine.timed)
        monkeypatch.setattr(timing, "in_turns", machine.in_turns)
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
        return machine

    return install


def test_both_layers_are_timed_apart_and_together(machine, tmp_path):
    machine()
    rows = bench.measure(both_layers(), tmp_path, progress=False)
    assert set(rows["time_us"]) == {100}
    assert set(rows["both_layers_us"]) == {180}
    # Every pair has the same time, the sum of FLOPs is one.
    assert measurements.both_layers_tflops(rows).nunique() == 1
    assert set(json.loads(rows["made_by"].iloc[0])) == {
        *("driver", "torch", "triton", "date", "kernel")
    }


def test_one_layer_alone_has_no_time_of_both(machine, tmp_path):
    machine()
    rows = bench.measure(both_layers(layers=2), tmp_path, progress=False)
    assert set(rows["time_us"]) == {100}
    assert rows["both_layers_us"].isna().all()


def test_weights_are_drawn_once_for_all_token_counts_of_a_shape(machine, tmp_path):
    gpu = machine()
    bench.measure(both_layers(tp="4,8", m="512,1536"), tmp_path, progress=False)
    assert gpu.reused == [None, None, 1, 2] * 2


def test_layers_too_large_together_are_timed_apart_without_the_figure_of_both(machine, tmp_path):
    gpu = machine(room=1)
    rows = bench.measure(both_layers(m="512,1536"), tmp_path, progress=False)
    assert set(rows["status"]) == {"ok"}
    assert set(rows["time_us"]) == {100}
    assert rows["both_layers_us"].isna().all()
    # Both at once, then each alone; nothing is kept that would take the next one's room.
    assert gpu.reused == [None] * 8


def test_a_problem_larger_than_the_memory_is_rows_that_say_so(machine, tmp_path):
    machine(room=0)
    rows = bench.measure(both_layers(), tmp_path, progress=False)
    assert set(rows["status"]) == {"out_of_memory"}
    assert set(rows["reason"]) == {"OutOfMemoryError: CUDA out of memory"}
    assert rows["time_us"].isna().all()
    assert len(records.read(tmp_path)) == len(rows)
    assert f"told to fit and left out {len(rows)}" in measurements.tally(rows)


def test_a_lost_context_ends_the_run_and_keeps_what_was_finished(machine, tmp_path):
    asked = both_layers(m="512,1536")
    culprit = next(of for of in asked if of.problem.m == 1536)
    machine(lost=[culprit])
    with pytest.raises(MeasureError, match=f"CUDA error.*are in {tmp_path}.*without it"):
        bench.measure(asked, tmp_path, progress=False)
    kept = records.read(tmp_path)
    assert list(kept["status"].value_counts().items()) == [("ok", 8), ("launch_error", 1)]
    (lost,) = kept[kept["status"] == "launch_error"].to_dict("records")
    assert (lost["m"], lost["num_stages"]) == (1536, culprit.num_stages)
    assert set(kept.loc[kept["status"] == "ok", "m"]) == {512}


def plain_problems(**changed):
    return [replace(of, problem=plain(of.problem)) for of in both_layers(**changed)]


def test_peers_are_rows_after_ours_timed_with_each_problem_by_itself(machine, tmp_path):
    gpu = machine(room=1)
    asked = plain_problems(m="512,1536", layers="1,2")
    rows = bench.measure(asked, tmp_path, progress=False, peers=("torch", "triton_kernels"))
    assert len(rows) == len(asked) + 2 * 4
    assert rows["peer"].isna().tolist() == [True] * len(asked) + [False] * 8
    peers = rows[len(asked) :]
    assert set(peers["time_us"]) == {100}
    assert (
        peers[["gpu", "workload", "run", "made_by", "tflops", "roof_tflops"]].notna().all(axis=None)
    )
    cells = list(peers[["m", "layer", "peer"]].itertuples(index=False, name=None))
    assert set(cells) == {
        (m, layer, name)
        for m in (512, 1536)
        for layer in (1, 2)
        for name in ("torch", "triton_kernels")
    }
    # As many FLOPs as ours, in the same time.
    assert rows.groupby(["m", "layer"])["tflops"].nunique().eq(1).all()
    assert "kernel" in json.loads(rows["made_by"].iloc[0])
    assert "kernel" not in json.loads(peers["made_by"].iloc[0])
    # No layer was held beside another, and no time is of both.
    assert rows["both_layers_us"].isna().all()
    assert len(gpu.reused) == 4
    kept = records.read(tmp_path)
    assert sorted(kept["peer"].dropna()) == ["torch"] * 4 + ["triton_kernels"] * 4


def test_a_peer_that_loses_the_context_is_a_kept_row(machine, tmp_path):
    asked = plain_problems(layers=1)
    machine(lost=[Asked(asked[0].kernel, asked[0].problem, "sm_90", "torch", "")])
    with pytest.raises(MeasureError, match="CUDA error"):
        bench.measure(asked, tmp_path, progress=False, peers=("torch",))
    (lost,) = records.read(tmp_path).to_dict("records")
    assert (lost["peer"], lost["status"], lost["m"]) == ("torch", "launch_error", 512)


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
    assert fits["largest_error"].le(bench.tolerance(asked[0].problem)).all()
    for row in fits.itertuples():
        samples = json.loads(row.samples_us)
        assert [len(of_round) for of_round in samples] == [3] * 4
        assert row.time_low_us <= row.time_us <= row.time_high_us * 1.05
        assert 0 < row.tflops < row.roof_tflops * 1.05
    assert set(fits["mode"]) == {"measured"}
    assert fits["registers"].gt(0).all()
    assert fits["throttled"].notna().all() or not importlib.util.find_spec("pynvml")
    assert all(json.loads(made_by)["driver"] for made_by in fits["made_by"])
    assert fits["run"].nunique() == 1 and fits["gpu"].nunique() == 1


@pytest.mark.gpu
def test_what_cannot_fit_is_a_row_that_was_not_launched(measured):
    _, rows, _ = measured
    (row,) = rows[rows["status"] != "ok"].to_dict("records")
    assert row["status"] == "out_of_lds"
    assert row["lds_bytes"] > targets.get(here()).lds_limit
    assert all(records.frame([row])[["time_us", "loaded_lds_bytes", "samples_us"]].isna().iloc[0])


@pytest.mark.gpu
def test_both_layers_together_take_no_less_than_either_and_not_much_more_than_both(measured):
    _, rows, _ = measured
    fits = rows[rows["status"] == "ok"]
    apart = fits.groupby(["num_stages", "layer"])["time_us"].min().groupby("num_stages").sum()
    for row in fits.itertuples():
        least = apart[row.num_stages]
        # Of two tiles, only the fastest of the other layer is beside this one.
        assert row.time_us < row.both_layers_us
        assert 0.9 * least < row.both_layers_us < 1.1 * (row.time_us + least)
    assert measurements.both_layers_tflops(fits).gt(0).all()


@pytest.mark.gpu
def test_measured_rows_are_kept_and_order_advice(measured):
    _, rows, store = measured
    kept = records.read(store)
    kept = kept[kept["mode"] == "measured"]
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
def test_x_has_nothing_of_the_weights_that_an_earlier_number_of_tokens_left(tmp_path):
    asked = grid(
        targets=here(),
        models="Qwen3-235B-A22B",
        m="512,2560",
        tiles="64x64x128",
        stages=1,
        fast_accum=True,
    )
    rows = bench.measure(asked, tmp_path, rounds=2, repetitions=1, progress=False)
    # Where rows of x were rows of w, the tensor cores' sums of squares were off by 0.06.
    assert rows["largest_error"].lt(0.01).all()
    assert set(rows["status"]) == {"ok"}


@pytest.mark.gpu
def test_other_lds_than_was_told_is_a_row_that_says_both(tmp_path, monkeypatch):

    compiled = bench.compile_all

    def off_by_one(*args, **limits):
        for key, answer in compiled(*args, **limits):
            yield key, answer | {"lds_bytes": answer["lds_bytes"] + 1}

    monkeypatch.setattr(bench, "compile_all", off_by_one)
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


@pytest.mark.gpu
def test_a_problem_that_the_memory_does_not_hold_costs_only_its_own_rows(tmp_path):
    import torch

    small = grid(targets=here(), tiles="16x64x128", stages=1)
    large = grid(targets=here(), tiles="16x64x128", stages=1, layers="all", tp=1)
    # The layers' weights are 10.7 and 5.4 GB, twice as much while they are drawn.
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 16e9 / total))
    try:
        rows = bench.measure([*large, *small], tmp_path, rounds=2, repetitions=2, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert list(rows["status"]) == ["out_of_memory", "ok", "ok"]
    assert "out of memory" in rows["reason"].iloc[0]
    assert rows["both_layers_us"].isna().all()


@pytest.mark.gpu
def test_a_launch_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    from moelab.kernels.inputs import Inputs

    run = Inputs.run

    def fail(self, tile, **options):
        if options["num_stages"] == 2:
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return run(self, tile, **options)

    monkeypatch.setattr(Inputs, "run", fail)
    rows = bench.measure(grid(targets=here()), tmp_path, rounds=2, repetitions=2, progress=False)
    assert set(rows.loc[rows["num_stages"] == 1, "status"]) == {"ok"}
    failed = rows[rows["num_stages"] == 2]
    assert set(failed["status"]) == {"launch_error"}
    assert set(failed["reason"]) == {"RuntimeError: Triton Error [CUDA]: invalid argument"}


LOST = """
import sys
import torch
from moelab import bench, plan
from moelab.kernels.inputs import Inputs
run = Inputs.run
def fail(self, tile, **options):
    if options["num_stages"] == 2:
        torch.zeros(9, device="cuda")[torch.full((9,), 9, device="cuda")]
    return run(self, tile, **options)
Inputs.run = fail
asked = plan.grid(
    kernels="moe_gemm_a8w8", models="Llama4 Maverick", tp=8, m="512,1536", warps=4,
    targets=bench.gpu().target.name, tiles="16x64x128", stages="1",
)
last = plan.grid(
    kernels="moe_gemm_a8w8", models="Llama4 Maverick", tp=8, m=2560, warps=4,
    targets=bench.gpu().target.name, tiles="16x64x128", stages="2",
)
try:
    bench.measure([*asked, *last], sys.argv[1], rounds=2, repetitions=2, progress=False)
except bench.MeasureError as error:
    print(error)
"""


@pytest.mark.gpu
def test_a_lost_context_keeps_the_rows_before_it(tmp_path):
    process = subprocess.run([sys.executable, "-c", LOST, tmp_path], capture_output=True, text=True)
    assert "takes no launch of this process any more" in process.stdout, process.stderr[-2000:]
    kept = records.read(tmp_path)
    assert list(kept[kept["mode"] == "measured"]["status"]) == ["ok", "ok", "launch_error"]
