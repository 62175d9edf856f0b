"""Two sides take turns in one run, and the run's verdict is that of its rows."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import suites

import moelab
from moelab import (
    ab,
    baselines,
    bench,
    plan,
    records,
    regress,
    sensors,
    timing,
    toolchain,
    workers,
)
from moelab.ab import Side
from moelab.parameters import ParameterError
from moelab.timing import MeasureError

HERE = Path(__file__).parent


def grid(**changed):
    small = {"kernels": "moe_gemm_a8w8", "models": "Llama4 Maverick", "tp": 8, "m": 512}
    tiling = {"tiles": "16x64x128", "warps": 4, "stages": 2, "targets": "sm_90"}
    return plan.grid(**small | tiling | changed)


@pytest.fixture
def two_rounds(monkeypatch):
    """As many as show that each has processes of its own: they decide nothing."""
    monkeypatch.setattr(ab.paired_rounds, "looks", lambda rounds: (2,))


def measured(tmp_path, base="same", candidate="same", asked=None, **how):
    how = {"repetitions": 3, "progress": False} | how
    return ab.measure(
        asked or grid(), Side.parse(base), Side.parse(candidate), tmp_path / "rows", **how
    )


# What a side is.


@pytest.mark.parametrize(
    "text",
    [
        "same",
        "stages=2",
        "stages=most",
        "stages=most4",
        "stages=1,warps=8,tile=128x256x128+tma",
        "group_m=8",
        "triton=3.7.1",
    ],
)
def test_a_side_is_written_as_it_is_read(text):
    assert Side.parse(str(Side.parse(text))) == Side.parse(text)
    assert set(str(Side.parse(text)).split(",")) == set(text.split(","))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages=0", "'0' is not 1 or more"),
        ("stages=mostly", "'ly' is not 1 or more"),
        ("stages", "'stages' is not NAME=VALUE"),
        ("warps=", "'warps' is not NAME=VALUE"),
        ("colour=blue", "no 'colour'; a side is `same`, or some of stages=2"),
        ("tile=100x64x64", "100 is not a power of two"),
        ("stages=most,stages=2", "names one thing twice"),
    ],
)
def test_what_a_side_is_not_is_answered_with_what_it_may_be(text, words):
    with pytest.raises(ParameterError, match=words):
        Side.parse(text)


def test_a_side_changes_what_it_names_and_nothing_else():
    (of,) = grid()
    changed = Side.parse("tile=64x64x128+tma,group_m=8,warps=8").changed(of)
    assert str(changed.tile) == "64x64x128+group8+tma"
    assert (changed.num_warps, changed.num_stages) == (8, 2)
    assert (changed.problem, changed.kernel, changed.target) == (of.problem, of.kernel, of.target)
    assert Side.parse("same").changed(of) == of


def test_a_source_without_kernels_and_an_unknown_triton_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no moelab/kernels in it; .*git worktree"):
        measured(tmp_path, candidate=f"source={tmp_path}")
    with pytest.raises(toolchain.ToolchainError, match=r"no Triton '0\.0\.1'"):
        measured(tmp_path, base="triton=0.0.1")


def test_where_a_source_lies_is_not_told(tmp_path):
    assert str(Side.parse(f"source={tmp_path}/before")) == "source=before"


# Turns, and the verdict.


def test_equal_sides_share_a_worker_and_come_out_clean(tmp_path, gpu):
    rows = measured(tmp_path, asked=grid(m="512,1536", stages="1,2"))
    assert list(rows["side"]) == ["base", "candidate"] * 4
    assert rows["run"].nunique() == 1
    assert len({process for process, *_ in gpu.turns()}) == 1
    compared = ab.judged(rows)
    assert (compared.verdict, len(compared.cells)) == ("passed", 4)
    assert set(compared.cells["rounds"]) == {6}
    assert compared.differs == {}


def test_apart_each_side_of_a_round_has_a_process_of_its_own(tmp_path, gpu, two_rounds):
    rows = measured(tmp_path, apart=True, asked=grid(m="512,1536"))
    # Rows of every round lie in the store, those of one round too.
    sides = [baselines.read(f"{tmp_path}/rows@side={side}") for side in ab.SIDES]
    assert regress.text(regress.compare(*sides)) == regress.text(ab.judged(rows))
    process_of = {(process, of.split()[0]) for process, of, _ in gpu.turns()}
    assert len({process for process, _ in process_of}) == len(process_of) == 2 * 2
    by_round = [{process for process, *_ in gpu.turns()[i : i + 4]} for i in (0, 4)]
    assert [len(of) for of in by_round] == [2] * 2


def test_a_round_is_one_turn_of_every_launch_of_a_problem_in_an_order_of_its_own(tmp_path, gpu):
    measured(tmp_path, asked=grid(m="512,1536", stages="1,2"))
    of_problem = [of for _, of, m in gpu.turns() if m == 512]
    rounds = [tuple(of_problem[i : i + 4]) for i in range(0, len(of_problem), 4)]
    assert all(sorted(of) == sorted(rounds[0]) for of in rounds)
    assert len(set(rounds)) > 1
    assert {of.split()[0] for of in rounds[0]} == {"base", "candidate"}


def test_a_slower_candidate_regressed_and_the_rows_say_so_too(tmp_path, gpu):
    gpu(slower=[[["num_stages", 1], 1.3]])
    rows = measured(tmp_path, "stages=most", "stages=1", asked=grid(m="512,1536"))
    compared = ab.judged(rows)
    assert (compared.verdict, compared.exit_code) == ("regressed", 1)
    assert set(compared.cells["speed"]) == {"regressed"}
    assert compared.cells["ratio"].astype(float).between(1.25, 1.35).all()
    assert compared.differs["num_stages"] == ("3", "1")
    assert compared.differs["made by: ab"] == ("stages=most", "stages=1")
    # The store, and an export, give the same verdict.
    export = records.export(rows, tmp_path / "rows.parquet")
    for source in (tmp_path / "rows", export):
        again = regress.compare(
            baselines.read(f"{source}@side=base"), baselines.read(f"{source}@side=candidate")
        )
        assert regress.text(again) == regress.text(compared)


def test_cells_take_turns_until_they_are_decided_or_the_rounds_are_over(tmp_path, gpu):
    gpu(noise=0.05)
    asked = grid(m="512,1536,2560,3584")
    lengths = {}
    for rounds in (24, 8):
        rows = measured(tmp_path, asked=asked, rounds=rounds)
        lengths[rounds] = {len(json.loads(text)) for text in rows["samples_us"]}
        both = rows.groupby("m")["samples_us"].agg(lambda of: {len(json.loads(s)) for s in of})
        assert both.map(len).eq(1).all()
    assert lengths[24] <= {6, 12, 24} and max(lengths[24]) > 6
    assert lengths[8] <= {6, 8}


def test_a_decided_cell_leaves_the_turns_of_its_problem_to_the_others(tmp_path, gpu):
    gpu(noisy={"num_warps": 8})
    rows = measured(tmp_path, asked=grid(warps="4,8"))
    rounds = [len(json.loads(text)) for text in rows["samples_us"]]
    assert dict(zip(rows["num_warps"], rounds, strict=True)) == {4: 6, 8: 24}
    assert len(gpu.turns()) == sum(rounds)


class Simulated:
    """Stands for the workers: every launch fits, and its rounds are drawn beforehand."""

    apart = False

    def __init__(self, differences):
        self.differences = differences
        self.taken = dict.fromkeys(range(len(differences)), 0)

    __enter__, __exit__ = lambda self: self, lambda *_: None

    def answers(self, do, of_side, **_):
        row = {"status": "ok", "lds_bytes": 1, "lds_limit": 2, "mode": "measured", "gpu": "a GPU"}
        row |= {"triton": "3.9.0", "moelab": "0", "schema": records.SCHEMA_VERSION}
        return {side: {of: of.asked() | row for of in asked} for side, asked in of_side.items()}

    def rounds_of(self, turns, launches, rounds, repetitions, order):
        found = {}
        for side, cell in map(ab._of_key, launches):
            before = self.taken[cell]
            longer = self.differences[cell, before : before + rounds] * (side == "candidate")
            # So long that the clock's ticks don't matter.
            samples = [[us] for us in 1e7 * np.exp(longer)]
            reading = sensors.Reading(None, None, None)
            found[ab._key(side, cell)] = timing.Taken(samples, [reading] * rounds)
            self.taken[cell] += rounds * (side == "candidate")
        return found


@pytest.mark.parametrize("noise", [suites.MODERATE, suites.NOISY], ids=["moderate", "noisy"])
def test_a_run_decides_what_the_simulated_procedure_decides_of_the_same_rounds(
    tmp_path, monkeypatch, noise
):
    asked = grid(m="all", layers="all", stages="1,2,3")
    slowdown = np.where(np.arange(len(asked)) % 4 == 0, 0.04, 0.0)
    differences = noise.differences(np.random.default_rng(0), slowdown)
    simulated = Simulated(differences)
    monkeypatch.setattr(ab, "_Team", lambda *_: simulated)
    monkeypatch.setattr(ab._Run, "_prepare", lambda *_: None)
    monkeypatch.setattr(timing, "rounds_of", simulated.rounds_of)
    rows = measured(tmp_path, asked=asked)
    expected = suites.judged(differences)
    assert len(set(expected["rounds"])) > 1 and len(set(expected["answer"])) > 1
    lengths = [len(json.loads(text)) for text in rows.loc[rows["side"] == "base", "samples_us"]]
    assert lengths == list(expected["rounds"])
    cells = ab.judged(rows).cells
    told = {(of.m, of.layer, of.num_stages): of.speed for of in cells.itertuples()}
    of_cells = [(of.problem.m, of.problem.layer, of.num_stages) for of in asked]
    assert [told[of] for of in of_cells] == list(expected["answer"])


def test_several_runs_in_a_store_are_kept_apart(tmp_path, gpu):
    measured(tmp_path, "stages=1", "stages=2")
    measured(tmp_path, "stages=1", "stages=most")
    sides = [baselines.read(f"{tmp_path}/rows@side={side}") for side in ab.SIDES]
    compared = regress.compare(*sides)
    assert len(compared.cells) == 2
    assert "run" in compared.matched_by
    assert compared.only_baseline.empty and compared.only_candidate.empty


def test_too_few_rounds_and_other_wrong_values_are_refused_before_a_worker_starts(tmp_path):
    for wrong, words in (
        ({"rounds": 5}, "rounds = 5: give 6 or more"),
        ({"repetitions": 0}, "repetitions = 0"),
        ({"workload": "even"}, "no workload 'even'"),
    ):
        with pytest.raises(ValueError, match=words):
            measured(tmp_path, **wrong)


def test_a_launch_in_two_cells_is_refused(tmp_path, gpu):
    with pytest.raises(ParameterError, match=r"'stages=1' makes several .* one, and --ab 'same'"):
        measured(tmp_path, "stages=1", "same", asked=grid(stages="1,2"))
    rows = measured(tmp_path, "stages=1", "stages=3", asked=grid(stages="1,2"))
    assert len(rows) == 2


# What does not fit, or fails.


def test_as_many_stages_as_fit_is_told_by_the_compiler_within_the_limit_of_the_policy(
    tmp_path, gpu
):
    gpu(limit=5)
    rows = measured(tmp_path, "stages=most4", "stages=most")
    assert list(rows["num_stages"]) == [4, 5]


def test_what_does_not_fit_is_part_of_the_verdict_and_its_partner_takes_no_turn(tmp_path, gpu):
    rows = measured(tmp_path, "stages=2", "stages=4", asked=grid(m="512,1536"))
    assert list(rows["status"]) == ["ok", "out_of_lds"] * 2
    assert rows["time_us"].isna().all()
    assert gpu.turns() == []
    compared = ab.judged(rows)
    assert (compared.verdict, set(compared.cells["fits"])) == ("regressed", {"regressed"})


def test_where_nothing_fits_most_is_one_stage_that_says_so(tmp_path, gpu):
    gpu(limit=0)
    rows = measured(tmp_path, "stages=most", "same")
    assert list(rows["num_stages"]) == [1, 2]
    assert set(rows["status"]) == {"out_of_lds"}


_DIED = "its process died: SIGABRT; stderr has its words"


@pytest.mark.parametrize(
    ("apart", "how", "status", "reason"),
    [
        (False, "wrong", "wrong_result", "off by 1"),
        (False, "fails", "launch_error", "invalid argument"),
        (False, "loses", "launch_error", "RuntimeError: illegal access"),
        (False, "crashes", "launch_error", _DIED),
        pytest.param(True, "crashes", "launch_error", _DIED, marks=pytest.mark.slow),
    ],
)
def test_a_launch_that_fails_is_a_row_and_the_others_go_on(
    tmp_path, gpu, how, status, reason, apart, two_rounds
):
    gpu(**{how: {"m": 1536, "block_m": 64, "num_stages": 2}})
    asked = grid(m="512,1536", tiles="16x64x128,64x64x128")
    rows = measured(tmp_path, "stages=1", "stages=2", asked=asked, apart=apart)
    culprit = (rows["m"] == 1536) & (rows["block_m"] == 64)
    (failed,) = rows[culprit & (rows["side"] == "candidate")].itertuples()
    assert (failed.status, failed.reason) == (status, reason)
    # Of the same problem, too.
    fine = rows[~culprit]
    assert set(fine["status"]) == {"ok"}
    assert fine["time_us"].notna().all()
    assert ab.judged(rows).verdict == "regressed"


def test_a_launch_that_fails_after_it_was_timed_has_no_times(tmp_path, gpu):
    gpu(noise=0.3, tires={"num_stages": 2})
    rows = measured(tmp_path, "stages=1", "stages=2")
    assert list(rows["status"]) == ["ok", "launch_error"]
    assert rows["reason"].iloc[1] == _DIED
    times = ["time_us", "time_low_us", "time_high_us", "samples_us", "tflops"]
    assert rows[times].isna().all(axis=1).tolist() == [False, True]
    assert ab.judged(rows).cells["speed"].isna().all()


def test_a_worker_that_does_not_answer_is_ended_and_its_launch_is_named(tmp_path, gpu, monkeypatch):
    ask = workers.Worker.ask

    def impatient(self, do, **rest):
        # Not where a worker has yet to import what it needs.
        return ask(self, do, **({"timeout_s": 3} if do == "settle" else {}), **rest)

    monkeypatch.setattr(workers.Worker, "ask", impatient)
    gpu(hangs={"m": 1536, "num_stages": 2})
    rows = measured(tmp_path, "stages=1", "stages=2", asked=grid(m="512,1536"))
    assert list(rows["status"]) == ["ok", "ok", "ok", "launch_error"]
    assert rows["reason"].iloc[-1] == "no answer after 3 s; its process was ended"


def test_a_worker_that_can_not_start_is_an_error(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(workers, "_CODE", "raise SystemExit(7)")
    with pytest.raises(MeasureError, match=r"of the base did not start: its process died: .* 7"):
        measured(tmp_path)


def test_what_a_worker_prints_is_not_taken_for_a_reply(tmp_path, gpu, monkeypatch):
    code = workers._CODE.replace("fake_gpu.install()", "fake_gpu.install(); fake_gpu.chatter()")
    monkeypatch.setattr(workers, "_CODE", code)
    assert set(measured(tmp_path)["status"]) == {"ok"}


WORKER_OF = """
import subprocess, sys
from moelab import workers
worker = workers.Worker(workers.Build().settled(), sys.argv[1])
print(worker._process.pid, flush=True)
sys.stdin.readline()
"""


def test_a_worker_dies_with_its_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", WORKER_OF, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = Path("/proc", parent.stdout.readline().strip())
    assert worker.exists()
    parent.kill()
    parent.communicate()
    for _ in range(100):
        # Whoever inherits it may leave it unburied.
        if not worker.exists() or "\nState:\tZ" in (worker / "status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{worker} lives on")


# Other builds.


def checkout(folder, text):
    """A checkout of this source with a line more in its kernels."""
    package = Path(moelab.__file__).parent
    shutil.copytree(
        package, folder / "moelab", ignore=shutil.ignore_patterns("__pycache__", "data")
    )
    with (folder / "moelab" / "kernels" / "__init__.py").open("a") as kernels:
        kernels.write(text)
    return folder


def test_another_source_is_launched_by_a_process_of_its_own(tmp_path, gpu, monkeypatch, two_rounds):
    started = []
    monkeypatch.setattr(
        ab, "Worker", lambda *given: started.append(given) or workers.Worker(*given)
    )
    source = checkout(tmp_path / "after", "\nPLANTED = 1.2\n")
    rows = measured(tmp_path, "same", f"source={source}")
    compared = ab.judged(rows)
    assert compared.cells["ratio"].iloc[0] == pytest.approx(1.2, rel=0.02)
    assert compared.differs["made by: ab"] == ("same", "source=after")
    assert str(tmp_path) not in "".join(rows["made_by"])
    assert len({process for process, *_ in gpu.turns()}) == 2 * 2
    # One to compile besides, and none when the rounds are over.
    assert len(started) == 2 * (2 + 1)


def test_this_source_named_is_this_source(tmp_path, gpu):
    measured(tmp_path, f"source={Path(moelab.__file__).parents[1]}", "same")
    assert len({process for process, *_ in gpu.turns()}) == 1


def test_another_triton_is_asked_by_a_process_of_its_own(
    tmp_path, gpu, pretend_triton, monkeypatch, two_rounds
):
    monkeypatch.setenv("MOELAB_TOOLCHAINS", str(tmp_path / "toolchains"))
    pretend_triton(toolchain.folder("99.1.0"), "99.1.0")
    rows = measured(tmp_path, "same", "triton=99.1.0")
    base, candidate = rows["triton"]
    assert candidate == "99.1.0" != base
    assert ab.judged(rows).differs["triton"][1] == "99.1.0"
    assert len({process for process, *_ in gpu.turns()}) == 2 * 2


# On a GPU.


def here():
    """The target of the GPU at hand."""
    return bench.gpu().target.name


# Bound by its products at this size.
LARGE = {"models": "Qwen3-235B-A22B", "tp": 1, "m": 8704, "tiles": "128x256x128", "warps": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_equal_code_on_the_gpu_comes_out_clean(tmp_path, apart):
    asked = grid(targets=here(), tiles="16x64x128,64x64x128", stages="1,2")
    rows = measured(tmp_path, asked=asked, apart=apart, repetitions=5)
    assert set(rows["status"]) == {"ok"}
    assert list(rows["loaded_lds_bytes"]) == list(rows["lds_bytes"])
    assert rows[["time_us", "tflops", "samples_us"]].notna().all(axis=None)
    compared = ab.judged(rows)
    print(regress.text(compared))
    assert len(compared.cells) == 4
    assert not set(compared.cells["speed"]) & {"regressed", "improved"}
    assert set(compared.cells["fits"]) == {"passed"}
    assert all(json.loads(made_by)["kernel"] for made_by in rows["made_by"])


@pytest.mark.gpu
def test_one_stage_is_found_slower_than_as_many_as_fit(tmp_path):
    asked = grid(targets=here(), fast_accum=True, **LARGE)
    rows = measured(tmp_path, "stages=most", "stages=1", asked=asked, repetitions=5)
    most, one = rows["num_stages"]
    assert most > one == 1
    compared = ab.judged(rows)
    print(regress.text(compared))
    assert (compared.verdict, compared.exit_code) == ("regressed", 1)


def twice(source):
    """Let a checkout's kernel take each product twice, and half of the sum."""
    path = source / "moelab" / "kernels" / "moe_gemm_a8w8.py"
    kernel = path.read_text()
    product = "        acc = tl.dot(x, w, acc, max_num_imprecise_acc=MAX_IMPRECISE)\n"
    scale = "    acc *= tl.load(x_scale_ptr)"
    assert (kernel.count(product), kernel.count(scale)) == (1, 1)
    kernel = kernel.replace(product, 2 * product).replace(scale, scale + " * 0.5")
    path.write_text(kernel)
    return source


@pytest.mark.gpu
def test_a_slower_source_is_found(tmp_path):
    source = twice(checkout(tmp_path / "after", ""))
    asked = grid(targets=here(), **LARGE)
    rows = measured(tmp_path, "same", f"source={source}", asked=asked, repetitions=5)
    assert set(rows["status"]) == {"ok"}
    hashes = {json.loads(made_by)["kernel"] for made_by in rows["made_by"]}
    assert len(hashes) == 2
    compared = ab.judged(rows)
    print(regress.text(compared))
    assert set(compared.cells["speed"]) == {"regressed"}


@pytest.mark.gpu
@pytest.mark.skipif(not toolchain.installed(), reason="needs another Triton: moelab toolchain")
def test_another_triton_takes_turns_with_this_one(tmp_path):
    other = toolchain.installed()[-1].name
    rows = measured(tmp_path, "same", f"triton={other}", asked=grid(targets=here()))
    assert list(rows["triton"])[1] == other
    assert rows["time_us"].notna().all()
