"""What is timed is what fits, loads what was told and is right; the rest says why not."""

import contextlib
import errno
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import fake_gpu
import pandas as pd
import pytest
from clusters import Cluster
from pandas.testing import assert_frame_equal

from moelab import (
    advice,
    bench,
    cluster,
    compiler,
    disk,
    launcher,
    measurements,
    plan,
    records,
    sweep,
    targets,
    timing,
    workers,
)
from moelab.bench import MeasureError
from moelab.launcher import Roofs
from moelab.peers import Asked, plain
from moelab.timing import ContextLost

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs dask.distributed"
)


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
    chip = launcher.Gpu("MI355X", targets.get("gfx950"))
    (off, on) = grid(targets="gfx950", tiles="16x64x128", stages=1, async_copy="both")
    asked = on if compiler.default_async_copy(chip.target) else off
    launcher.check([asked], chip)
    with pytest.raises(MeasureError, match="set TRITON_HIP_USE_ASYNC_COPY"):
        launcher.check([on if asked is off else off], chip)


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
    assert launcher.tolerance(problem) == launcher.tolerance(short) == 2**-8 + 2e-3
    assert launcher.tolerance(left) == 2**-8 + 5120 / 32 * 2**-14


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
    pairs = launcher._pairs(times)
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

    def checked(self, of_problem, told, before, how):
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

    def in_turns(self, launches, rounds, repetitions, order, tell):
        for of in launches:
            if of in self.fails.get("lost", ()):
                reason = "RuntimeError: CUDA error"
                raise ContextLost(of, {"status": "launch_error", "reason": reason})
        return {of: {"time_us": 180.0 if isinstance(of, tuple) else 100.0} for of in launches}


class Here:
    """A worker that is this process."""

    def __init__(self, build, cache, abandoned):
        self._open = contextlib.ExitStack()
        self._open.enter_context(compiler.cache_at(cache))
        self._served = workers._Served(cache, lambda keys: None)

    def ask(self, do, suspects=(), timeout_s=None, **rest):
        try:
            done = getattr(self._served, do)(**json.loads(json.dumps(rest)))
        except ContextLost as lost:
            raise workers.WorkerLost(self._served.keys_of(lost.of), lost.row) from None
        return json.loads(json.dumps(done))

    def close(self):
        self._open.close()


@pytest.fixture
def here_alone(monkeypatch):
    """Launch in this process, where a test can change what is launched."""
    monkeypatch.setattr(bench, "Worker", Here)


@pytest.fixture
def machine(monkeypatch, here_alone):
    """Let `bench.measure` run where only the launches are not real."""

    def install(**given):
        machine = Machine(**given)
        machine._timed = launcher._timed
        answer = {"status": "ok", "lds_bytes": 1024, "lds_limit": 4096, "moelab": "0", "schema": 5}
        monkeypatch.setattr(launcher, "gpu", lambda: launcher.Gpu("a GPU", targets.get("sm_90")))
        monkeypatch.setattr(
            sweep,
            "compiled",
            lambda rows, *_: {row["compile_key"]: dict(answer) for row in rows.values()},
        )
        roofs = Roofs({"fp8": 1000.0, "bf16": 500.0}, tbps=3.0)
        monkeypatch.setattr(launcher, "measured_roofs", lambda rounds: roofs)
        monkeypatch.setattr(launcher, "checked", machine.checked)
        monkeypatch.setattr(launcher, "_timed", machine.timed)
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


def test_what_loses_the_gpu_is_tried_again_alone_and_its_neighbours_are_measured_anew(
    machine, tmp_path
):
    asked = both_layers(m="512,1536")
    culprit = next(of for of in asked if of.problem.m == 1536)
    machine(lost=[culprit])
    rows = bench.measure(asked, tmp_path, progress=False)
    (lost,) = rows[rows["status"] != "ok"].to_dict("records")
    assert (lost["m"], lost["num_stages"]) == (1536, culprit.num_stages)
    assert lost["status"] == "launch_error"
    assert lost["reason"] == (
        "RuntimeError: CUDA error; and so again, alone in a process of its own"
    )
    assert set(rows.loc[rows["status"] == "ok", "time_us"]) == {100}
    assert len(records.read(tmp_path)) == len(rows)


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


def test_a_peer_that_loses_the_gpu_is_a_row_and_ours_are_measured(machine, tmp_path):
    asked = plain_problems(layers=1)
    machine(lost=[Asked(asked[0].kernel, asked[0].problem, "sm_90", "torch", "")])
    rows = bench.measure(asked, tmp_path, progress=False, peers=("torch", "triton_kernels"))
    assert rows["peer"].tolist()[len(asked) :] == ["triton_kernels", "torch"]
    assert set(rows["status"][:-1]) == {"ok"}
    lost = rows.iloc[-1]
    assert (lost["status"], lost["m"]) == ("launch_error", 512)
    assert lost["reason"].endswith("alone in a process of its own")
    assert lost["run"] == rows["run"].iloc[0]


# What a launch does to the process that makes it.


@pytest.fixture
def device(gpu, monkeypatch):
    """A GPU that is pretended in workers, and nothing is compiled."""
    monkeypatch.setattr(sweep, "compiled", fake_gpu._compiled)
    return gpu


def measured_by_workers(tmp_path, **changed):
    asked = grid(targets="sm_90", tiles="16x64x128", stages="1,2,3", m="512,1536")
    how = {"rounds": 2, "repetitions": 3, "progress": False} | changed
    with contextlib.closing(bench.Device(timeout_s=3)) as device:
        return bench.measure(asked, tmp_path / "rows", device=device, **how)


CULPRIT = {"m": 512, "num_stages": 2}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("loses", "RuntimeError: illegal access"),
        pytest.param(
            "crashes", "its process died: SIGABRT; stderr has its words", marks=pytest.mark.slow
        ),
        pytest.param("hangs", "no answer after 3 s; its process was ended", marks=pytest.mark.slow),
    ],
)
def test_what_a_launch_does_to_its_process_costs_its_own_row(tmp_path, device, how, reason):
    device(**{how: CULPRIT})
    rows = measured_by_workers(tmp_path).set_index(["m", "num_stages"])
    lost = rows.loc[512, 2]
    assert lost["status"] == "launch_error"
    assert lost["reason"] == f"{reason}; and so again, alone in a process of its own"
    assert pd.isna(lost["time_us"])
    fine = rows.drop(index=(512, 2))
    assert set(fine["status"]) == {"ok"}
    assert fine["time_us"].notna().all()


def test_no_row_is_of_a_process_that_lost_its_gpu(tmp_path, device):
    # It is the last to be launched in its round.
    device(tires=CULPRIT)
    rows = measured_by_workers(tmp_path, rounds=7).set_index(["m", "num_stages"])
    assert set(rows["status"]) == {"ok"}
    samples = {key: json.loads(row["samples_us"]) for key, row in rows.iterrows()}
    lost, *others = list(dict.fromkeys(process for process, *_ in device.turns()))
    turns = [turn for turn in device.turns() if turn[0] != lost]
    assert len(turns) == sum(map(len, samples.values())) == 7 * 6
    assert {process for process, stages, m in turns if (m, stages) == (512, 2)} == {others[-1]}


def test_what_loses_the_gpu_only_beside_others_is_measured_alone_and_says_so(tmp_path, device):
    device(crowded=CULPRIT)
    rows = measured_by_workers(tmp_path).set_index(["m", "num_stages"])
    assert set(rows["status"]) == {"ok"}
    alone = [json.loads(row["made_by"]).get("alone_after") for _, row in rows.iterrows()]
    assert alone == [None, "RuntimeError: illegal access", None, None, None, None]
    process_of = {(m, stages): process for process, stages, m in device.turns()}
    assert process_of[512, 2] != process_of[512, 1] == process_of[512, 3]


def test_a_gpu_that_takes_no_launch_at_all_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_CODE", "raise SystemExit(7)")
    with pytest.raises(MeasureError, match=r"that launches did not start: its process died: .* 7"):
        measured_by_workers(tmp_path)


def test_a_worker_that_lost_its_gpu_ends_with_a_code_of_its_own(tmp_path, device):
    device(loses=CULPRIT)
    worker = workers.Worker(workers.Build(), tmp_path)
    (of,) = grid(targets="sm_90", tiles="16x64x128", stages=2)
    written = workers.written(of)
    how = {"workload": "uniform", "seed": 0, "rounds": 2, "repetitions": 1}
    with contextlib.closing(worker):
        with pytest.raises(workers.WorkerLost) as lost:
            worker.ask("measure", launches=[("a", written, 200)], like=written, peers=[], **how)
        assert lost.value.keys == ["a"]
        assert worker._process.wait(10) == workers.CONTEXT_LOST == 75


# A run that was interrupted.


def test_a_run_goes_on_with_the_problems_that_it_lacks(tmp_path, device, monkeypatch):
    append = records.Journal.append

    def interrupted(self, *rows):
        append(self, *rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.Journal, "append", interrupted)
        with pytest.raises(sweep.Interrupted, match=r"interrupted; the rows .* --resume") as ended:
            measured_by_workers(tmp_path)
    (run,) = re.findall("--resume ([0-9T]+-[0-9a-f]{6}) goes on", str(ended.value))
    kept = records.read(tmp_path / "rows")
    rows = measured_by_workers(tmp_path, resume=run)
    assert list(rows["run"].unique()) == [run]
    assert_frame_equal(rows[rows["m"] == 512], kept[kept["m"] == 512])
    assert rows["time_us"].notna().all()
    assert len(list(records.lines(tmp_path / "rows"))) == 6


def test_a_full_disk_says_how_the_run_goes_on(tmp_path, device, monkeypatch):
    def full(self, *rows):
        raise OSError(errno.ENOSPC, "No space left on device", "rows.jsonl")

    monkeypatch.setattr(records.Journal, "append", full)
    with pytest.raises(disk.DiskFullError, match=r"make room .* --resume [0-9T]+-[0-9a-f]{6}$"):
        measured_by_workers(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"resume": "x"}, "resume='x': .* has no row of it; it has rows of 2"),
        ({"seed": 1}, "that run's workload and seed are uniform, 0, not uniform, 1"),
    ],
)
def test_only_the_same_run_is_gone_on_with(tmp_path, device, given, words):
    run = measured_by_workers(tmp_path)["run"].iloc[0]
    with pytest.raises(ValueError, match=words):
        measured_by_workers(tmp_path, **{"resume": run} | given)


# Several GPUs.

GPU = ("--resources", "GPU=1")
PRETEND = "import fake_gpu; fake_gpu.install_in_workers()"


@contextlib.contextmanager
def gpus(tmp_path, *of):
    """A cluster with a worker for each GPU that is told; the environment of all is given, too."""
    (tmp_path / "cluster").mkdir()
    log = str(tmp_path / "turns")
    with Cluster(tmp_path / "cluster", 0) as cluster_:
        for how in of:
            told = json.dumps({"log": log} | how)
            cluster_.start_worker(*GPU, preload=PRETEND, FAKE_GPU=told)
        yield cluster_


def asked_of_cluster(tmp_path, address, **how):
    asked = grid(targets="sm_90", tiles="16x64x128", stages="1,2,3", m="512,1536,2560,3584")
    how = {"rounds": 2, "repetitions": 3, "progress": False} | how
    with bench.devices(address) as device:
        return bench.measure(asked, tmp_path / "rows", device=device, **how)


@needs_dask
def test_each_problem_is_measured_by_one_of_many_gpus(tmp_path):
    with gpus(tmp_path, {}, {}) as of:
        # It has none, and is not asked.
        of.start_worker()
        rows = asked_of_cluster(tmp_path, of.address)
    assert set(rows["status"]) == {"ok"}
    assert rows[["run", "gpu"]].drop_duplicates().shape == (1, 2)
    assert rows["time_us"].notna().all() and rows["roof_tflops"].notna().all()
    assert [*zip(rows["m"], rows["num_stages"], strict=True)] == [
        (m, stages) for m in (512, 1536, 2560, 3584) for stages in (1, 2, 3)
    ]
    kept = records.read(tmp_path / "rows").sort_values(["m", "num_stages"], ignore_index=True)
    assert_frame_equal(kept, rows)
    turns = [json.loads(line) for line in (tmp_path / "turns").read_text().splitlines()]
    process_of = {(process, m) for process, _, m in turns}
    assert len(process_of) == 4
    assert len({process for process, _ in process_of}) == 2


@needs_dask
@pytest.mark.slow
def test_a_launch_that_loses_a_gpu_of_a_cluster_costs_its_own_row(tmp_path):
    with gpus(tmp_path, {"crashes": CULPRIT}) as of:
        rows = asked_of_cluster(tmp_path, of.address).set_index(["m", "num_stages"])
    assert rows.loc[(512, 2), "reason"].startswith("its process died: SIGABRT; stderr has its")
    assert set(rows.drop(index=(512, 2))["status"]) == {"ok"}


@needs_dask
@pytest.mark.slow
def test_gpus_of_two_kinds_are_refused(tmp_path):
    with (
        gpus(tmp_path, {}, {"name": "another"}) as of,
        pytest.raises(MeasureError, match=r"not of one kind.*tcp://\S+: (a GPU|another); tcp://"),
    ):
        of.wait_for_workers(2)
        asked_of_cluster(tmp_path, of.address)


@needs_dask
@pytest.mark.slow
def test_a_run_goes_on_after_its_scheduler_was_lost(tmp_path):
    with gpus(tmp_path, {}) as of, pytest.MonkeyPatch.context() as patch:
        append = records.Journal.append
        patch.setattr(records.Journal, "append", lambda *rows: append(*rows) or of.scheduler.kill())
        with pytest.raises(cluster.ClusterLostError, match="--resume") as lost:
            asked_of_cluster(tmp_path, of.address)
    (run,) = re.findall(r"--resume (\S+) goes on", str(lost.value))
    kept = records.read(tmp_path / "rows")
    shutil.rmtree(tmp_path / "cluster")
    with gpus(tmp_path, {}) as of:
        rows = asked_of_cluster(tmp_path, of.address, resume=run)
    assert set(rows["status"]) == {"ok"} and 3 <= len(kept) < len(rows) == 12
    assert len(list(records.lines(tmp_path / "rows"))) == 12


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
    assert fits["largest_error"].le(launcher.tolerance(asked[0].problem)).all()
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
def test_a_wrong_result_is_a_row_that_was_not_timed(tmp_path, monkeypatch, here_alone):
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

    compiled = sweep.compile_all

    def off_by_one(*args, **limits):
        for found in compiled(*args, **limits):
            yield {
                key: answer | {"lds_bytes": answer["lds_bytes"] + 1}
                for key, answer in found.items()
            }

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


@pytest.mark.gpu
def test_a_problem_that_the_memory_does_not_hold_costs_only_its_own_rows(tmp_path, here_alone):
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
def test_a_launch_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, here_alone):
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


@pytest.mark.gpu
def test_an_illegal_access_costs_its_own_row_and_none_is_of_that_context(tmp_path, monkeypatch):
    """The launch with two stages reads past a tensor's end, in the worker's process."""
    code = """
import torch
from moelab.kernels.inputs import Inputs
run = Inputs.run
def fail(self, tile, **options):
    if options["num_stages"] == 2:
        torch.zeros(9, device="cuda")[torch.full((9,), 9, device="cuda")]
    return run(self, tile, **options)
Inputs.run = fail
"""
    monkeypatch.setattr(workers, "_CODE", code + workers._CODE)
    asked = grid(targets=here(), m="512,1536")
    rows = bench.measure(asked, tmp_path, rounds=2, repetitions=2, progress=False)
    assert len(rows) == 8
    lost = rows["num_stages"] == 2
    assert set(rows.loc[lost, "status"]) == {"launch_error"}
    assert rows.loc[lost, "reason"].str.contains("and so again, alone in a process").all()
    assert set(rows.loc[~lost, "status"]) == {"ok"}
    assert rows.loc[~lost, "time_us"].notna().all()
