"""A sweep's rows against the compiler's own answers, and what becomes of its failures."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelab import __version__, answers, compiler, isolation, plan, records, sweep, targets
from moelab.compiler import binding

TILE = {"kernels": "moe_gemm_a8w8", "tiles": "16x64x64", "warps": 4}


def grid(**changed):
    return plan.grid(**{"targets": "gfx950", "m": 512, "async_copy": "on"} | TILE | changed)


def where(rows, **values):
    """The only row with these values."""
    for name, value in values.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture
def no_workers(monkeypatch):
    """Fail the test if anything is compiled."""
    import pebble

    def refuse(*_, **__):
        pytest.fail("a worker was started, though every row was known")

    monkeypatch.setattr(pebble, "ProcessPool", refuse)


@pytest.fixture
def asked(monkeypatch):
    """Answer without compiling; collect what would have been compiled."""
    seen = []

    def pretend(configurations, full, jobs, timeout_s, memory):
        for key, configuration in configurations.items():
            seen.append(configuration)
            target = targets.get(configuration.target)
            yield {key: answers.stamped("ok", None, target) | {"lds_bytes": len(seen)}}

    monkeypatch.setattr(sweep, "compile_all", pretend)
    return seen


# What the compiler says.

A8W8 = {"kernels": "moe_gemm_a8w8", "tiles": "128x256x256", "warps": 8, "m": 8704}
A8W4 = {"kernels": "moe_gemm_a8w4", "tiles": "128x512x256", "warps": 8, "m": 8704}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One sweep with rows of every common status, and its store."""
    store = tmp_path_factory.mktemp("store")
    configurations = [
        *grid(async_copy="both"),
        # Compiles to the same code as 512 tokens.
        *grid(m=1536, async_copy="both"),
        *grid(targets="sm_90", stages=2),
        *grid(targets="sm_80", stages=1),
        *grid(**A8W8, async_copy="both"),
        *grid(**A8W4, async_copy="both"),
    ]
    rows = sweep.run(configurations, store, jobs=1, progress=False)
    return configurations, rows, store


def test_each_configuration_has_its_row_in_the_order_asked(swept):
    configurations, rows, _ = swept
    assert [
        (row.kernel, row.target, row.m, row.block_n, row.num_warps, row.num_stages)
        for row in rows.itertuples()
    ] == [
        (c.kernel, c.target, c.problem.m, c.tile.block_n, c.num_warps, c.num_stages)
        for c in configurations
    ]
    switches = [None if c.async_copy is None else bool(c.async_copy) for c in configurations]
    assert rows["async_copy"].astype(object).where(rows["async_copy"].notna(), None).tolist() == (
        switches
    )


def test_rows_equal_asking_the_compiler_directly(swept):
    configurations, rows, _ = swept
    for configuration, row in zip(configurations, rows.itertuples(), strict=True):
        if row.status == "compile_error":
            continue
        allocation = compiler.lds(compiler.specialize(configuration))
        found = (row.lds_bytes, row.tmem_columns, row.method)
        assert found == (allocation.lds_bytes, allocation.tmem_columns, allocation.method)
        assert row.compile_key == compiler.specialize(configuration).key


def test_rows_say_what_made_them(swept):
    _, rows, _ = swept
    assert set(rows["triton"]) == {compiler.triton_version()}
    assert set(rows["moelab"]) == {__version__}
    assert set(rows["mode"]) == {"lds"}
    assert set(rows["schema"]) == {records.SCHEMA_VERSION}
    assert [targets.get(row.target).lds_limit for row in rows.itertuples()] == list(
        rows["lds_limit"]
    )


def test_a_kernel_that_cannot_compile_is_a_row_with_the_compilers_words(swept):
    _, rows, _ = swept
    row = where(rows, target="sm_80")
    assert row["status"] == "compile_error"
    assert "type fp8e4nv not supported in this architecture" in row["reason"]
    assert row[["lds_bytes", "tmem_columns", "method"]].isna().all()
    others = rows[rows["target"] != "sm_80"]
    assert set(others["status"]) <= {"ok", "out_of_lds"}
    assert others["lds_bytes"].gt(0).all()


def test_what_a_kernel_refuses_is_a_row_with_its_words_beside_those_that_compile(tmp_path):
    block_scale = {"kernels": "moe_gemm_a8w8_blockscale", "stages": 1}
    configurations = [
        *grid(**block_scale | {"tiles": "16x64x64,16x64x256,16x128x256"}),
        *grid(x_format="mxfp8", stages=1),
    ]
    rows = sweep.run(configurations, tmp_path, jobs=1, progress=False)
    assert list(rows["status"]) == ["ok", *["compile_error"] * 3]
    assert rows["lds_bytes"].iloc[0] > 0
    assert rows["lds_bytes"].iloc[1:].isna().all()
    words = [
        "moe_gemm_a8w8_blockscale: tile 16x64x256 has block_k = 256; expected 128 or less",
        "moe_gemm_a8w8_blockscale: tile 16x128x256 has block_k = 256; expected 128 or less",
        "moe_gemm_a8w8: x_format is 'mxfp8'; expected none",
    ]
    for reason, expected in zip(rows["reason"].iloc[1:], words, strict=True):
        assert reason.startswith(expected)


def test_what_was_refused_is_not_asked_again(tmp_path, no_workers):
    (refused,) = grid(x_format="mxfp8", stages=1)
    row = sweep.asked_row(refused, "lds") | answers.stamped(
        "compile_error", "no", targets.get("gfx950")
    )
    with records.Journal(tmp_path) as journal:
        journal.append(row)
    assert list(sweep.run([refused], tmp_path, progress=False)["reason"]) == ["no"]


def test_what_exceeds_the_lds_says_both_figures(swept):
    _, rows, _ = swept
    exceeding = rows[rows["lds_bytes"] > rows["lds_limit"]]
    assert len(exceeding)
    assert set(exceeding["status"]) == {"out_of_lds"}
    for row in exceeding.itertuples():
        assert row.reason == f"needs {row.lds_bytes:,} of {row.lds_limit:,} bytes"
    fitting = rows[rows["lds_bytes"] <= rows["lds_limit"]]
    assert set(fitting["status"]) == {"ok"}
    assert fitting["reason"].isna().all()


def test_launches_of_the_same_code_are_compiled_once_and_each_has_its_row(swept):
    _, rows, _ = swept
    few, more = (rows[(rows["m"] == m) & (rows["block_m"] == 16)] for m in (512, 1536))
    more = more[more["target"] == "gfx950"]
    few = few[few["target"] == "gfx950"]
    assert len(few) == len(more) == 4
    assert list(few["compile_key"]) == list(more["compile_key"])
    assert list(few["lds_bytes"]) == list(more["lds_bytes"])
    assert few["compile_key"].is_unique


@pytest.mark.parametrize(
    ("kernel", "block_n", "off", "on"),
    [("moe_gemm_a8w4", 512, 102_400, 210_880), ("moe_gemm_a8w8", 256, 98_304, 202_688)],
)
def test_async_copy_takes_two_stages_over_the_lds_of_gfx950(swept, kernel, block_n, off, on):
    if not compiler.triton_version().startswith(("3.8.", "3.9.")):
        pytest.skip(f"figures of Triton 3.8 and 3.9, not {compiler.triton_version()}")
    _, rows, _ = swept
    rows = rows[(rows["kernel"] == kernel) & (rows["block_m"] == 128)]
    two_off = where(rows, num_stages=2, async_copy=False)
    two_on = where(rows, num_stages=2, async_copy=True)
    assert (two_off["lds_bytes"], two_off["status"]) == (off, "ok")
    assert (two_on["lds_bytes"], two_on["status"]) == (on, "out_of_lds")
    assert two_on["lds_limit"] == 163_840
    assert set(rows.loc[rows["num_stages"] == 1, "status"]) == {"ok"}


def test_a_second_run_compiles_nothing_and_gives_an_equal_frame(swept, no_workers):
    configurations, rows, store = swept
    journals = sorted(store.iterdir())
    again = sweep.run(configurations, store, progress=False)
    assert again.equals(rows)
    assert sorted(store.iterdir()) == journals


def test_the_store_holds_what_was_returned(swept):
    _, rows, store = swept
    columns = list(records.KEY)
    stored = records.read(store).sort_values(columns, ignore_index=True)
    assert stored.equals(rows.sort_values(columns, ignore_index=True))


def test_what_compiles_to_known_code_is_answered_without_compiling(swept, no_workers, tmp_path):
    configurations, rows, store = swept
    new = grid(m=2560, stages=2)
    assert new[0] not in configurations
    found = sweep.run(new, store, progress=False)
    known = rows[(rows["m"] == 512) & (rows["num_stages"] == 2) & rows["async_copy"].eq(True)]
    assert found["compile_key"].tolist() == known["compile_key"].tolist()
    assert found["lds_bytes"].tolist() == known["lds_bytes"].tolist()
    assert found["m"].tolist() == [2560]


def test_a_full_sweep_tells_registers_code_and_occupancy(swept):
    configurations, rows, store = swept
    known = where(rows, m=512, num_stages=2, async_copy=True, target="gfx950")
    full = sweep.run(configurations[3:4], store, full=True, jobs=1, progress=False).iloc[0]
    assert (full["mode"], full["method"], full["status"]) == ("full", "full", "ok")
    assert full["lds_bytes"] == known["lds_bytes"]
    assert full["compile_key"] == known["compile_key"]
    assert 0 < full["registers"] <= targets.get("gfx950").registers_per_thread
    assert full["code_bytes"] > 0
    assert full["spilled_registers"] == full["scratch_bytes"] == 0
    occupancy = targets.occupancy(
        targets.get("gfx950"), full["lds_bytes"], full["registers"], num_warps=4
    )
    assert (full["workgroups_per_cu"], full["warps_per_simd"], full["occupancy_limit"]) == (
        occupancy.workgroups_per_cu,
        occupancy.warps_per_simd,
        occupancy.limit,
    )
    assert known[["registers", "code_bytes", "workgroups_per_cu", "occupancy_limit"]].isna().all()


# What is compiled, and what is not.


def test_a_script_without_a_main_guard_sweeps_once(tmp_path):
    """Python's spawned processes import the script that started them."""
    script = tmp_path / "sweeps.py"
    script.write_text(
        "from moelab import plan, sweep\n"
        "print('started')\n"
        "grid = plan.grid(kernels='moe_gemm_a8w8', targets='gfx950', tiles='16x64x64', warps=4)\n"
        f"rows = sweep.run(grid, {str(tmp_path / 'rows')!r}, progress=False)\n"
        "print(*rows['status'], __file__)\n"
    )
    process = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert process.stdout.splitlines() == ["started", f"ok ok {script}"], process.stderr


def test_no_configuration_is_an_empty_frame(tmp_path, no_workers):
    found = sweep.run([], tmp_path)
    assert len(found) == 0
    assert list(found) == list(records.COLUMNS)


def test_only_what_is_missing_is_compiled(tmp_path, asked):
    sweep.run(grid(stages="1,2"), tmp_path, progress=False)
    asked.clear()
    found = sweep.run(grid(stages="1,2,3"), tmp_path, progress=False)
    assert [c.num_stages for c in asked] == [3]
    assert list(found["num_stages"]) == [1, 2, 3]


def test_a_configuration_asked_twice_is_compiled_once_and_returned_twice(tmp_path, asked):
    found = sweep.run(grid(stages=2) * 2, tmp_path, progress=False)
    assert len(asked) == 1
    assert list(found["num_stages"]) == [2, 2]


def test_lds_alone_does_not_answer_a_full_sweep(tmp_path, asked):
    sweep.run(grid(stages=1), tmp_path, progress=False)
    sweep.run(grid(stages=1), tmp_path, full=True, progress=False)
    assert len(asked) == 2
    assert list(records.read(tmp_path)["mode"]) == ["lds", "full"]


def test_rows_of_another_triton_answer_nothing(tmp_path, asked, monkeypatch):
    sweep.run(grid(stages=1), tmp_path, progress=False)
    for module in (compiler, binding):
        monkeypatch.setattr(module, "triton_version", lambda: "3.99.0")
    found = sweep.run(grid(stages=1), tmp_path, progress=False)
    assert len(asked) == 2
    assert list(found["triton"]) == ["3.99.0"]
    assert len(records.read(tmp_path)) == 2


@pytest.mark.parametrize("status", ["crashed", "timeout"])
def test_a_failure_of_the_machine_answers_no_other_configuration(tmp_path, asked, status):
    (first,) = grid(stages=1)
    row = sweep.asked_row(first, "lds") | answers.stamped(status, "", targets.get("gfx950"))
    with records.Journal(tmp_path) as journal:
        journal.append(row)
    (same_code,) = grid(m=1536, stages=1)
    assert compiler.specialize(same_code).key == row["compile_key"]
    found = sweep.run([same_code], tmp_path, progress=False)
    assert asked == [same_code]
    assert list(found["status"]) == ["ok"]


def test_rows_that_were_compiled_survive_an_interrupt(tmp_path, monkeypatch):
    def interrupted(configurations, full, jobs, timeout_s, memory):
        yield {next(iter(configurations)): answers.stamped("ok", None, targets.get("gfx950"))}
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "compile_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(grid(stages="1,2,3"), tmp_path, progress=False)
    assert list(records.read(tmp_path)["num_stages"]) == [1]


@pytest.mark.parametrize("jobs", [0, -1])
def test_fewer_than_one_job_raises_before_anything_is_written(tmp_path, jobs):
    with pytest.raises(ValueError, match=rf"jobs = {jobs}; give 1 or more"):
        sweep.run(grid(), tmp_path / "store", jobs=jobs)
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_made_raises_before_anything_is_compiled(tmp_path, no_workers):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(OSError):
        sweep.run(grid(), tmp_path / "store")


# Progress.


def test_progress_goes_to_stderr_and_stdout_stays_clean(tmp_path, asked, capfd):
    sweep.run(grid(stages="1,2,3"), tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert "compile:" in err and "/3" in err


def test_progress_can_be_silenced_and_is_silent_when_nothing_is_left(tmp_path, asked, capfd):
    sweep.run(grid(), tmp_path, progress=False)
    sweep.run(grid(), tmp_path, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_where_a_notebooks_runner_says(tmp_path, asked, capfd, monkeypatch):
    (tmp_path / "progress").write_text("")
    monkeypatch.setenv("MOELAB_PROGRESS", str(tmp_path / "progress"))
    sweep.run(grid(), tmp_path / "store")
    assert capfd.readouterr() == ("", "")
    assert "compile:" in (tmp_path / "progress").read_text()


# Workers that fail. What runs in a worker is imported from this module by its name.


def misbehave(configuration, full, log, cache):
    """Stand in for the compile in a worker; the stage count says what goes wrong."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wrong = configuration.num_stages
    if wrong == 2:
        Path(log).write_text("compiling\nLLVM ERROR: cannot select\n")
        os.abort()
    if wrong == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if wrong == 4:
        os._exit(7)
    if wrong == 5:
        time.sleep(60)
    if wrong == 6:
        raise compiler.CompileError("PassManager::run failed")
    target = targets.get(configuration.target)
    return answers.stamped("ok", None, target) | {"lds_bytes": wrong}


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """One sweep whose workers die, hang and raise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_compile_one", misbehave)
        start = time.monotonic()
        rows = sweep.run(
            grid(stages="1,2,3,4,5,6,7,8"),
            tmp_path_factory.mktemp("store"),
            jobs=2,
            progress=False,
            timeout_s=3,
        )
        return rows.set_index("num_stages"), time.monotonic() - start


@pytest.mark.parametrize(
    ("stages", "how"),
    [(2, "SIGABRT\nLLVM ERROR: cannot select"), (3, "SIGKILL"), (4, "exit code 7")],
)
def test_a_worker_that_dies_is_a_row_that_names_how(survived, stages, how):
    rows, _ = survived
    assert rows.loc[stages, "status"] == "crashed"
    assert rows.loc[stages, "reason"] == f"the compiler's process died: {how}"
    assert rows.loc[stages, ["lds_bytes", "method"]].isna().all()


def test_a_worker_that_hangs_is_ended_and_says_after_how_long(survived):
    rows, took_s = survived
    assert rows.loc[5, "status"] == "timeout"
    assert rows.loc[5, "reason"] == "not finished after 3 s"
    assert took_s < 30


def test_what_a_worker_raises_arrives_in_its_words(survived):
    rows, _ = survived
    assert rows.loc[6, "status"] == "compile_error"
    assert rows.loc[6, "reason"] == "PassManager::run failed"


def test_the_others_survive_the_death_of_their_neighbours(survived):
    rows, _ = survived
    assert rows.loc[[1, 7, 8], "status"].tolist() == ["ok"] * 3
    assert rows.loc[[1, 7, 8], "lds_bytes"].tolist() == [1, 7, 8]
    assert set(rows["status"]) <= set(records.STATUSES)
    assert rows["lds_limit"].eq(163_840).all()


def test_a_long_reason_is_cut_to_its_point(tmp_path):
    log = tmp_path / "log"
    log.write_text("note\n" + "ptxas error: too many\n" * 5000)
    message = "at 1:0:\n" + "    quoted source\n" * 200 + "    ^\nValueError: the point"
    reason = answers.words_of(message, log)
    assert reason.splitlines() == [
        "at 1:0:",
        "...",
        "    quoted source",
        "ValueError: the point",
        "ptxas error: too many",
    ]
    log.write_text("error: " + "x" * 5000)
    assert len(answers.words_of("short", log)) == 800


def test_a_row_that_says_little_costs_no_other_its_answer(tmp_path, asked):
    (tmp_path / "rows-0.jsonl").write_text('{"schema": 5, "status": "ok"}\n')
    assert list(sweep.run(grid(stages=1), tmp_path, progress=False)["status"]) == ["ok"]


def no_start(parent, memory):
    os._exit(9)


def test_workers_that_end_before_they_take_a_task_end_the_sweep_and_blame_no_row(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(isolation, "attach", no_start)
    with pytest.raises(OSError, match="ended before it took a configuration"):
        sweep.run(grid(stages="1,2,3"), tmp_path, jobs=2, progress=False)
    assert records.read(tmp_path).empty
