"""What a sweep survives, fault by fault: no row lost, none done twice, nobody else blamed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import ChainMap
from pathlib import Path

import faults
import pytest
from faults import ABORT, EXIT, HANG, HANGING_HELPER, HOG, SEGFAULT, STUMBLE, Sweep
from pandas.testing import assert_frame_equal
from test_records import ROW

from moelab import compiler, disk, plan, records, regress, sweep
from moelab.answers import answer, compile_all

MOELAB = [sys.executable, "-c", "from moelab.cli import app; app()"]
SWEEP = [*MOELAB, "sweep"]

short_and_long = pytest.mark.parametrize(
    "times", [8, pytest.param(100, marks=pytest.mark.slow)], ids="{} times".format
)


def kept(store):
    """The stage counts that a store's lines have, sorted: a row done twice is there twice."""
    return sorted(line.row["num_stages"] for line in records.lines(store) if line.row)


def statuses(store):
    return records.read(store).set_index("num_stages")["status"].to_dict()


# Compilers that die, hang and take memory.


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """48 compiles that are well, and one of each fault, anywhere among them."""
    store = tmp_path_factory.mktemp("faults") / "rows"
    bad = [ABORT, SEGFAULT, EXIT, HANG, HANGING_HELPER, HOG, STUMBLE]
    stages = [*range(1, 49), *bad]
    random.Random(7).shuffle(stages)
    ended = Sweep(store, stages, jobs=2, timeout_s=2, memory=1 << 30).end()
    return store, ended


def test_48_of_48_good_results_are_kept_and_nobody_else_is_blamed(survived):
    store, (code, err, told) = survived
    assert code == 0, err
    assert len(told) == 55
    good = {stages: status for stages, status in statuses(store).items() if stages > 0}
    assert good == dict.fromkeys(range(1, 49), "ok")


def test_each_culprit_is_named_with_what_it_did(survived):
    store, _ = survived
    rows = records.read(store)
    bad = rows[rows["num_stages"] < 0].set_index("num_stages")
    assert dict(zip(bad.index, zip(bad["status"], bad["reason"], strict=True), strict=True)) == {
        ABORT: ("crashed", "the compiler's process died: SIGABRT\nLLVM ERROR: cannot select"),
        SEGFAULT: ("crashed", "the compiler's process died: SIGSEGV"),
        EXIT: ("crashed", "the compiler's process died: exit code 7"),
        STUMBLE: ("crashed", "RuntimeError: a fault of moelab's"),
        HANG: ("timeout", "not finished after 2 s"),
        HANGING_HELPER: ("timeout", "not finished after 2 s"),
        HOG: ("out_of_host_memory", "needs more than 1,073,741,824 bytes: MemoryError: "),
    }


def test_nothing_outlives_a_sweep_not_even_what_a_hanging_compiler_started(survived):
    store, _ = survived
    assert faults.outlived(store) == {}


def test_what_says_nothing_of_a_configuration_is_asked_again(survived, tmp_path):
    store = shutil.copytree(survived[0], tmp_path / "rows")
    stages = [1, ABORT, HOG, HANG]
    _, _, told = Sweep(store, stages, timeout_s=1, memory=1 << 30).end()
    assert sorted(told) == sorted([ABORT, HOG, HANG])


def test_who_dies_right_after_taking_a_task_is_blamed_though_the_pool_hears_of_it_late(tmp_path):
    bad = [ABORT, SEGFAULT, EXIT]
    code, err, told = Sweep(tmp_path, [1, *bad, 2], jobs=2, busy_s=0.3).end()
    assert code == 0, err
    assert sorted(told) == [*bad, 1, 2]
    assert statuses(tmp_path) == {1: "ok", 2: "ok"} | dict.fromkeys(bad, "crashed")


def test_a_hang_ends_within_its_timeout_and_two_seconds(tmp_path):
    process = Sweep(tmp_path, [1, HANG], timeout_s=1)
    process.wait_for_a_row()
    began = time.monotonic()
    process.end()
    assert 0.9 < time.monotonic() - began < 3
    assert statuses(tmp_path) == {1: "ok", HANG: "timeout"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lds", "full"])
def test_a_compile_that_hangs_in_llvm_ends_within_its_timeout_and_two_seconds(mode):
    """64 stages of this tile take more than 90 s."""
    hang = real("256x256x128", warps=8, m=8704, stages=64)[0]
    questions = {"hang": hang, "well": real(stages=1)[0]}
    began = time.monotonic()
    answers = dict(ChainMap(*compile_all(questions, mode, 2, timeout_s=6)))
    assert time.monotonic() - began < 8
    assert {key: answer["status"] for key, answer in answers.items()} == {
        "hang": "timeout",
        "well": "ok",
    }


@pytest.mark.parametrize("memory", [0, 1, sweep.LEAST_MEMORY - 1])
def test_memory_in_which_no_compiler_starts_is_refused(tmp_path, memory):
    with pytest.raises(ValueError, match=rf"memory = {memory:,} bytes; a compiler needs 536,870"):
        sweep.run([], tmp_path, memory=memory)


REAL = {"kernels": "moe_gemm_a8w8", "async_copy": "on"}


def real(tile="16x64x64", target="gfx950", **given):
    return plan.grid(**{**REAL, "tiles": tile, "targets": target, "warps": 4, "m": 512} | given)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_a_compile_that_needs_too_much_is_told_from_one_that_is_rejected(target):
    """LLVM aborts where memory ends; ptxas, a process of its own, says so and fails."""
    hog = real("512x512x64", target, warps=8, m=8704, stages=2)[0]
    questions = {"hog": hog} | {str(of.num_stages): of for of in real(stages="1,2")}
    memory = (300 if target == "sm_90" else 270) << 20
    answers = dict(ChainMap(*compile_all(questions, "full", 2, 120, memory=memory)))
    found = {key: answer["status"] for key, answer in answers.items()}
    assert found == dict.fromkeys(questions, "ok") | {"hog": "out_of_host_memory"}
    assert answers["hog"]["reason"].startswith(f"needs more than {memory:,} bytes: ")


MATMUL = """
import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a += offs_m[:, None] * k + offs_k[None, :]
    b += offs_k[:, None] * n + offs_n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, k, BK):
        acc += tl.dot(tl.load(a), tl.load(b))
        a += BK
        b += BK * n
    tl.store(c + offs_m[:, None] * n + offs_n[None, :], acc)


if __name__ == "__main__":
    import torch

    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    matmul[(1,)](x, x, torch.empty(256, 256, device="cuda"), 256, 256, 64, 64, 64, num_stages=3)
"""

MATMUL_LAUNCH = {
    "args": dict.fromkeys("ab", "*bf16:16")
    | {"c": "*fp32:16", "n": "i32:16", "k": "i32:16", "BM": 64, "BN": 64, "BK": 64},
    "options": {"num_stages": 3},
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A folder with somebody's kernel and how it is launched."""
    place = tmp_path_factory.mktemp("kernel")
    (place / "matmul.py").write_text(MATMUL)
    (place / "launch.json").write_text(json.dumps(MATMUL_LAUNCH))
    return place


# A driver that is killed.


def killed(store, stages, draw):
    """Kill a sweep at a random moment, of four times once from its start, else from its first
    row on; give what it had acknowledged.
    """
    process = Sweep(store, stages, jobs=2, sleep_s=0.002)
    if draw.random() < 0.75:
        process.wait_for_a_row()
    time.sleep(draw.uniform(0, 0.5))
    process.process.kill()
    return process.end()[2]


@short_and_long
def test_a_kill_loses_no_acknowledged_row_doubles_none_and_leaves_no_orphan(tmp_path, times):
    draw = random.Random(times)
    told, finished, survivors = 0, 0, {}
    store, acknowledged = tmp_path / "0", set()
    for kill in range(times):
        stages = range(1, 400)
        new = killed(store, stages, draw)
        survivors |= faults.outlived(store)
        assert acknowledged.isdisjoint(new)
        acknowledged |= set(new)
        told += len(new)
        with warnings.catch_warnings():
            # Of the line that was being written.
            warnings.simplefilter("ignore")
            assert acknowledged <= set(kept(store))
            assert len(kept(store)) == len(set(kept(store)))
        if len(acknowledged) == len(stages):
            finished += 1
            store, acknowledged = tmp_path / str(kill + 1), set()
    code, err, _ = Sweep(store, stages).end()
    assert code == 0, err
    assert kept(store) == list(stages)
    assert survivors == {}
    # The kills did fall into the work.
    assert told > times / 2


def test_what_a_killed_sweep_left_in_the_temporary_folder_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = tmp_path / "rows"
    runs = Sweep(store, [1, HANG]), Sweep(tmp_path / "others", [1, HANG])
    for run in runs:
        run.wait_for_a_row()
    of_both = set(tmp_path.glob("moelab-*"))
    runs[0].process.kill()
    runs[0].end()
    assert set(tmp_path.glob("moelab-*")) == of_both and len(of_both) == 2
    assert Sweep(store, [2]).end()[0] == 0
    left = set(tmp_path.glob("moelab-*"))
    assert len(left) == 1 and left < of_both
    # Its own is in use.
    assert runs[1].process.poll() is None
    runs[1].process.send_signal(signal.SIGTERM)
    runs[1].end()
    assert not set(tmp_path.glob("moelab-*"))


@pytest.mark.slow
def test_a_killed_sweep_of_the_real_compiler_goes_on_where_it_was(tmp_path):
    given = ["--kernel", "moe_gemm_a8w8", "--target", "gfx950", "--tile", "16x64x64,32x64x64"]
    given += ["--warps", "4", "--stages", "1,2,3,4", "--m", "512", "--async-copy", "both"]
    command = [*SWEEP, *given, "--json"]
    whole = subprocess.run([*command, "--store", tmp_path / "whole"], capture_output=True)
    assert whole.returncode == 0, whole.stderr
    store = tmp_path / "killed"
    for rows in (1, 6, 11):
        process = subprocess.Popen(
            [*command, "--store", store],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {faults.MARK: str(store)},
        )
        while process.poll() is None and len(list(records.lines(store))) < rows:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert faults.outlived(store) == {}
    resumed = subprocess.run([*command, "--store", store], capture_output=True)
    assert resumed.stdout == whole.stdout
    assert len(list(records.lines(store))) == 16


HANGING = """
import os, subprocess, sys, torch
os.write(2, b"started\\n")
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [3])
def test_a_killed_capture_leaves_nothing_of_the_command_behind_it(tmp_path, times):
    (tmp_path / "hanging.py").write_text(HANGING)
    command = f"{sys.executable} hanging.py & {sys.executable} hanging.py; true"
    for _ in range(times):
        process = subprocess.Popen(
            [*MOELAB, "capture", "--target", "gfx950", "--", "sh", "-c", command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {faults.MARK: str(tmp_path)},
            cwd=tmp_path,
        )
        assert process.stderr.readline().startswith(b"moelab runs ")
        for _ in range(2):
            assert process.stderr.readline() == b"started\n"
        process.kill()
        process.communicate(timeout=10)
        assert faults.outlived(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("times", [10])
def test_a_killed_sweep_of_another_triton_leaves_no_orphan(tmp_path, times):
    """From before it has read what is asked until it compiles."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    given = ["--kernel", "all", "--target", "gfx950", "--stages", "1,2,3,4", "--jobs", "2"]
    for run in range(times):
        process = subprocess.Popen(
            [*SWEEP, *given, "--triton", python, "--store", tmp_path / str(run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {faults.MARK: str(tmp_path)},
        )
        while len(faults.alive(tmp_path)) < 2:
            time.sleep(0.002)
        time.sleep(0.7 * run)
        process.kill()
        process.wait()
        assert faults.outlived(tmp_path) == {}


# Two at once.


def test_two_sweeps_into_one_store_lose_nothing_while_it_is_read_and_exported(tmp_path):
    both = [Sweep(tmp_path, of, jobs=2, sleep_s=0.002) for of in (range(1, 100), range(50, 150))]
    for of in both:
        of.wait_for_a_row()
    # A row that is just being written is another's to finish: it is no damage to warn of.
    seen = 0
    while any(of.process.poll() is None for of in both):
        rows = records.read(records.export(records.read(tmp_path), tmp_path / "rows.parquet"))
        assert seen <= len(rows) and (rows["lds_bytes"] == rows["num_stages"]).all()
        assert len(regress.compare(rows, rows).cells) == len(rows)
        seen = len(rows)
        time.sleep(0.1)
    assert seen > 1
    told = [of.end() for of in both]
    assert [code for code, _, _ in told] == [0, 0]
    assert sorted(told[0][2] + told[1][2]) == kept(tmp_path)
    assert statuses(tmp_path) == dict.fromkeys(range(1, 150), "ok")
    assert Sweep(tmp_path, range(1, 150)).end()[2] == []


# Disks.


@pytest.fixture
def mounted(tmp_path):
    """Mount a tmpfs of a megabyte; `mounted` is called to change how it is mounted."""

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", tmp_path], capture_output=True
        )

    if shutil.which("mount") is None or mount("size=1m").returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield lambda *options: mount("remount", *options)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_has_its_own_exit_code_and_loses_nothing(tmp_path, mounted):
    store, stages = tmp_path / "rows", range(1, 2000)
    code, err, told = Sweep(store, stages).end()
    assert code == 4
    assert err.startswith(f"Error: {store}/rows-")
    assert "No space left on device" in err and "make room and run the same again" in err
    assert 100 < len(told) == len(kept(store)) < len(stages)
    # It says so again, and still loses nothing.
    assert Sweep(store, stages).end()[0] == 4
    mounted("size=16m")
    code, err, more = Sweep(store, stages).end()
    assert code == 0, err
    assert kept(store) == list(stages)
    assert set(told).isdisjoint(more)


NOTEBOOK = {
    "cells": [
        {
            "cell_type": "code",
            "id": "a",
            "metadata": {"tags": ["parameters"]},
            "source": "n: int = 1  # to print",
            "outputs": [],
            "execution_count": None,
        },
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {},
            "source": "print('n' * 100 * n)",
            "outputs": [],
            "execution_count": None,
        },
    ],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}

WRITING = ("sweep --export", "capture --export", "export", "report")
WRITING += ("compare --markdown", "compare --html")


def writing(command, place, beside):
    """Spell a command of `WRITING` that writes to a place."""
    rows = f"--rows {beside}/rows"
    grid = (
        "--kernel moe_gemm_a8w8 --model Qwen3-235B-A22B --target gfx950 --tile 16x64x64 --warps 4 "
        f"--m 512 --layer all --stages 1,2 --async-copy on --jobs 1 --store {beside}/rows"
    )
    both = f"{beside}/rows {beside}/rows"
    return {
        "sweep --export": f"sweep {grid} --export {place}/rows.parquet",
        "capture --export": f"capture --target gfx950 --export {place}/launches.parquet -- "
        f"{sys.executable} {beside}/matmul.py",
        "export": f"export --format vllm --target gfx950 {rows} --out {place} --force",
        "report": f"report {beside}/report.ipynb --out {place}",
        "compare --markdown": f"compare {both} --markdown {place}/summary.md",
        "compare --html": f"compare {both} --html {place}/report.html",
    }[command].split()


def run_writing(command, place, beside):
    ended = subprocess.run([*MOELAB, *writing(command, place, beside)], capture_output=True)
    return ended.returncode, ended.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_ends_whatever_writes_with_4_and_leaves_its_files_whole(
    command, kernel, tmp_path, mounted
):
    (kernel / "report.ipynb").write_text(json.dumps(NOTEBOOK))
    mounted("size=64m")
    if not (kernel / "rows").exists():
        assert run_writing("sweep --export", tmp_path, kernel)[0] == 0
        (tmp_path / "rows.parquet").unlink()
    code, err = run_writing(command, tmp_path, kernel)
    assert code == 0, err
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files
    with open(tmp_path / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))
    code, err = run_writing(command, tmp_path, kernel)
    assert (code, "Traceback" in err) == (4, False), err
    assert "No space left on device" in err
    assert {path.name for path in tmp_path.iterdir()} == {*files, "filler"}
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "filler").unlink()
    assert run_writing(command, tmp_path, kernel)[0] == 0


def test_a_full_disk_below_stdout_is_told_too():
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*MOELAB, "targets"], stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (4, b"Error: [Errno 28] No space left on device\n")


def test_a_limit_of_file_sizes_ends_a_sweep_as_a_full_disk_does(tmp_path):
    for _ in range(20):
        code, err, told = Sweep(tmp_path, range(1, 100), file_bytes=70_000).end()
        if code == 0:
            break
        assert (code, len(told) > 0) == (4, True), err
    assert kept(tmp_path) == list(range(1, 100))


def test_a_full_temporary_folder_is_no_configurations_fault(tmp_path, mounted, monkeypatch):
    with open(tmp_path / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))
    # Enough that Python takes the folder for usable.
    os.truncate(tmp_path / "filler", os.stat(tmp_path / "filler").st_size - 8192)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError) as error:
        list(compile_all({"a": real(stages=2)[0]}, "full", 1, 60))
    assert disk.is_full(error.value)


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_compiled(tmp_path, mounted):
    assert Sweep(tmp_path, [1, 2]).end()[0] == 0
    mounted("ro")
    code, err, _ = Sweep(tmp_path, [1, 2, HANG]).end()
    assert (code, err) == (
        1,
        f"Error: {tmp_path}: rows can't be written there; choose another store\n",
    )
    # What is known is still told.
    assert Sweep(tmp_path, [1, 2]).end()[0] == 0


def test_folders_have_any_name(tmp_path):
    store = tmp_path / "with space" / "Ümläute ß 日本" / "quo'te\"s" / "$(x);`y`" / "*?[a]\n" / "-x"
    code, err, told = Sweep(store, [1, 2, 3]).end()
    assert (code, err, sorted(told)) == (0, "", [1, 2, 3])
    path = records.export(records.read(store), store / "Ü '*.parquet")
    assert set(records.read(path)["num_stages"]) == {1, 2, 3}
    assert Sweep(store, [1, 2, 3, 4]).end()[2] == [4]


# Damage.


def rows_of(found):
    return json.dumps(found, sort_keys=True)


@pytest.fixture
def journal(tmp_path):
    """A journal of two rows; its bytes."""
    with records.Journal(tmp_path) as writer:
        writer.append(ROW, ROW | {"m": 1536})
    return writer.path, writer.path.read_bytes()


def read_damaged(path, content):
    """Read a journal with this content: its rows, and what was said of the others."""
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = list(records.journalled(path.parent))
    return [rows_of(row) for row in rows], [str(of.message) for of in said]


def test_a_tail_torn_at_any_byte_costs_its_row_alone_and_is_named(journal):
    path, whole = journal
    rows, _ = read_damaged(path, whole)
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        found, said = read_damaged(path, whole[:cut])
        # All but the end of the line is the whole row.
        complete = sum(end - 1 <= cut for end in ends)
        assert found == rows[:complete]
        torn = cut not in (0, *ends, *(end - 1 for end in ends))
        assert len(said) == torn
        assert all(words.startswith(f"{path}:{complete + 1} is not a row") for words in said)


def test_of_300_flipped_bits_in_a_journal_none_changes_a_row_silently(journal):
    path, whole = journal
    rows, _ = read_damaged(path, whole)
    for bit in random.Random(1).sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        found, said = read_damaged(path, bytes(damaged))
        assert set(found) <= set(rows)
        assert said or found == rows
        assert all(str(path) in words for words in said)


@pytest.fixture
def export(tmp_path):
    rows = [ROW | {"m": m, "time_us": m / 7, "async_copy": m % 3 == 0 or None} for m in range(50)]
    path = records.export(records.frame(rows), tmp_path / "rows.parquet")
    return path, path.read_bytes(), records.read(path)


def reads_equal(path, content, rows):
    """Read an export with this content: what it says of the damage, or the same rows."""
    path.write_bytes(content)
    try:
        found = records.read(path)
    except ValueError as error:
        assert str(path) in str(error)
        return False
    assert_frame_equal(found, rows)
    return True


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_torn_at_any_byte_is_refused(export, step):
    path, whole, rows = export
    assert not any(reads_equal(path, whole[:cut], rows) for cut in range(0, len(whole), step))


def test_of_300_flipped_bits_in_an_export_none_changes_a_row_silently(export):
    path, whole, rows = export
    unnoticed = 0
    for bit in random.Random(2).sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        unnoticed += reads_equal(path, bytes(damaged), rows)
    # Those in the name of the checksum itself, if any.
    assert unnoticed <= 1


# The compiler's cache.


@pytest.fixture(scope="module")
def users_cache(kernel, tmp_path_factory):
    """What Triton left in a user's cache of two kernels, and the true LDS of moelab's."""
    folder = tmp_path_factory.mktemp("cache")
    question = real(stages=2)[0]
    for other in plan.launches(
        f"{kernel}/matmul.py:matmul", kernel / "launch.json", targets="gfx950,sm_90"
    ):
        compiler.full(compiler.specialize(other), folder)
    with compiler.settings(compiler.specialize(question), folder):
        true = compiler.full(compiler.specialize(question), folder)[0].lds_bytes
        assert believed(question) == true > 1
    return folder, question, true


def believed(question):
    """What Triton says of a kernel by itself, out of the cache that it is set to."""
    import triton

    launch = compiler.specialize(question)
    compiled = triton.compile(
        launch.ast, target=compiler.gpu_target(launch.target), options=dict(launch.options)
    )
    return compiled.metadata.shared


def tamper(cache):
    for path in cache.rglob("*.json"):
        metadata = json.loads(path.read_text())
        if "shared" in metadata:
            path.write_text(json.dumps(metadata | {"shared": 1}))


def truncate(cache):
    for path in cache.rglob("*.*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: 10 if path.suffix == ".json" else 0])


def override(question):
    """Put something else where Triton looks for a stage that its user has edited."""
    from triton.runtime.cache import get_override_manager

    launch = compiler.specialize(question)
    folder = Path(get_override_manager(launch.ast.hash()).cache_dir)
    folder.mkdir(parents=True)
    (folder / f"{launch.ast.name}.ttgir").write_text("not a module")


DAMAGE = {"tampered": tamper, "truncated": truncate}

# Settings under which Triton by itself fails, and what it says.
MISLED = {
    "read-only": ({}, OSError),
    "full": ({}, OSError),
    "fetched": ({"TRITON_CACHE_MANAGER": "no_such_module:Manager"}, ImportError),
    "remote": (
        {
            "TRITON_CACHE_MANAGER": "triton.runtime.cache:RemoteCacheManager",
            "TRITON_REMOTE_CACHE_BACKEND": "no_such_module:Backend",
        },
        ImportError,
    ),
    "overridden": ({"TRITON_KERNEL_OVERRIDE": "1"}, RuntimeError),
    "dumped": ({"TRITON_KERNEL_DUMP": "1", "TRITON_DUMP_DIR": "/proc/nowhere"}, OSError),
    "home": ({"HOME": "/proc/nowhere", "TRITON_HOME": "/proc/nowhere"}, OSError),
    "binaries": ({"TRITON_STORE_BINARY_ONLY": "1"}, None),
}


@pytest.fixture(params=[*DAMAGE, *MISLED])
def bad_cache(request, users_cache, tmp_path, monkeypatch):
    """Set this process, and what it starts, to a cache that lies, or takes nothing."""
    folder, question, true = users_cache
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    if request.param in DAMAGE:
        shutil.copytree(folder, cache)
        # It names its files by their absolute paths.
        for index in cache.rglob("__grp__*.json"):
            index.write_text(index.read_text().replace(str(folder), str(cache)))
        DAMAGE[request.param](cache)
        if request.param == "tampered":
            with compiler.settings(compiler.specialize(question), cache):
                assert believed(question) == 1
        return question, true
    variables, error = MISLED[request.param]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if request.param in ("read-only", "full"):
        mounted = request.getfixturevalue("mounted")
        cache.mkdir()
        mounted("ro" if request.param == "read-only" else "size=4k")
    elif request.param == "overridden":
        monkeypatch.setenv("TRITON_OVERRIDE_DIR", str(cache))
        override(question)
    elif request.param == "home":
        monkeypatch.delenv("TRITON_CACHE_DIR")
    if error is not None:
        with pytest.raises(error):
            believed(question)
    return question, true


def test_no_cache_of_the_users_changes_a_byte(bad_cache):
    question, true = bad_cache
    assert answer(question, "full")["lds_bytes"] == true
    assert answer(question, "map")["lds_bytes"] == true


# Runs commands one after the other, each with a file for its stdout.
COMMANDS = """
import json, os, sys
from moelab.cli import app
for name, command in json.loads(sys.argv[1]).items():
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 1)
    try:
        app(command)
    except SystemExit as ended:
        os.write(1, f"exit code {ended.code}".encode())
"""

WAYS = ("sweep", "sweep --map", "sweep --full", "lds", "lds --full", "capture", "advise")


@pytest.fixture(scope="module")
def told(kernel):
    """What each way in tells unharmed."""
    return all_told(kernel, kernel)


def all_told(kernel, folder):
    """Ask for the bytes by every way in, into stores and files in a folder."""
    asked = {
        "sweep": "--kernel moe_gemm_a8w8 --target gfx950 --tile 16x64x64 --warps 4 --m 512 "
        "--stages 2 --async-copy on",
        "lds": f"{kernel}/matmul.py:matmul {kernel}/launch.json --target gfx950,sm_90",
        "capture": f"--target gfx950 -- {sys.executable} {kernel}/matmul.py",
    }
    asked["advise"] = f"{asked['sweep']} --all --top 1 --keep block_m,block_n,num_warps"
    commands = {}
    for way in WAYS:
        name, *switch = way.split()
        given = [name, *switch, "--jobs", "1", "--json"]
        if name != "capture":
            given += ["--store", str(folder / f"rows of {way}")]
        commands[str(folder / way)] = given + asked[name].split()
    subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(commands)], check=True)
    return {way: (folder / way).read_text() for way in WAYS}


@pytest.mark.slow
def test_no_cache_of_the_users_changes_what_any_way_in_tells(
    told, bad_cache, kernel, tmp_path_factory
):
    for way, text in told.items():
        assert re.search(r'"lds_bytes":[1-9]', text) and text.endswith("exit code 0"), (way, text)
    assert all_told(kernel, tmp_path_factory.mktemp("ways")) == told


# Ctrl-C and clocks.


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_within_two_seconds_and_say_how_to_go_on(
    tmp_path, monkeypatch, sent, code
):
    store, temporary = tmp_path / "rows", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = Sweep(store, [*range(1, 100), HANG, HANG - 100], jobs=2, sleep_s=0.02)
    process.wait_for_a_row()
    began = time.monotonic()
    process.process.send_signal(sent)
    ended, err, told = process.end()
    assert time.monotonic() - began < 2
    assert ended == code
    said = re.fullmatch(
        rf"\ninterrupted; (\d+) of 101 rows are in {store}, and the same command asks only for "
        r"the other (\d+)\n",
        err,
    )
    assert said, err
    done, left = map(int, said.groups())
    # It may come when a row is on the disk and not yet counted.
    assert len(kept(store)) - done in (0, 1) and done + left == 101
    assert set(told) <= set(kept(store))
    assert faults.outlived(store) == {}
    assert list(temporary.iterdir()) == []
    Sweep(store, range(1, 100)).end()
    assert kept(store) == list(range(1, 100))


@pytest.mark.parametrize(
    "times", [2, pytest.param(100, marks=pytest.mark.slow)], ids="{} times".format
)
def test_ctrl_c_in_a_terminal_is_quiet_though_it_meets_workers_that_are_just_starting(
    tmp_path, times
):
    draw = random.Random(times)
    for interrupt in range(times):
        stages = range(faults.EXITS, faults.EXITS + 400)
        process = Sweep(tmp_path / str(interrupt), stages, jobs=2, own_group=True)
        process.wait_for_a_row()
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(process.process.pid, signal.SIGINT)
        code, err, _ = process.end()
        assert (code, err.strip().count("\n")) == (130, 0), err


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0, 1, 3, 6])
def test_ctrl_c_in_a_terminal_ends_the_real_compiler_within_two_seconds(tmp_path, after_s):
    given = ["--kernel", "all", "--target", "gfx950,sm_90", "--stages", "1,2,3,4", "--full"]
    process = subprocess.Popen(
        [*SWEEP, *given, "--store", tmp_path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {faults.MARK: str(tmp_path)},
        start_new_session=True,
    )
    # Of the bar, which comes before the first compile.
    process.stderr.read(1)
    time.sleep(after_s)
    began = time.monotonic()
    # As a terminal does: to the driver, its workers and their ptxas.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert time.monotonic() - began < 2
    assert process.returncode == 130
    assert b"the same command asks only for the other" in err
    assert faults.outlived(tmp_path) == {}
    assert set(records.read(tmp_path)["status"]) <= {"ok", "out_of_lds"}


def test_a_clock_that_is_set_changes_no_verdict_and_no_timeout(tmp_path):
    stages = [HANG, 1, 2, 3, 4]
    stores = {tmp_path / str(clock_s): clock_s for clock_s in (3600, -3600)}
    moved = [
        Sweep(store, stages, jobs=2, sleep_s=0.3, timeout_s=1.5, clock_s=clock_s)
        for store, clock_s in stores.items()
    ]
    for of in moved:
        of.wait_for_a_row()
    began = time.monotonic()
    assert [of.end()[0] for of in moved] == [0, 0]
    assert time.monotonic() - began < 3.5
    for store in stores:
        assert statuses(store) == dict.fromkeys(range(1, 5), "ok") | {HANG: "timeout"}
    # With the clock as it was, what is known is known, and what was not is asked again.
    again = [Sweep(store, stages, timeout_s=0.5) for store in stores]
    assert [of.end()[2] for of in again] == [[HANG], [HANG]]
