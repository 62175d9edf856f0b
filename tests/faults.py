"""A sweep in a process of its own, whose compiler does what the stage count says.

A process starts in a third of a second, as neither Triton nor PyTorch is imported. Each row
is told on stdout once the journal has acknowledged it.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from pebble.pool.process import NoMessage, WorkerManager

from moelab import answers, plan, records, sweep, targets

# Stage counts of what goes wrong; any other is answered with as many bytes of LDS.
KILLER, ABORT, SEGFAULT, EXIT, HANG, HANGING_HELPER, HOG, STUMBLE = range(-8, 0)

# From here on each ends its worker, so that another one is always just starting.
EXITS = 10_000

# In the environment of a sweep's process, of its workers and of theirs.
MARK = "MOELAB_TESTS_SWEEP"

# In the environment of those whose runs are counted: a folder, with a file for each.
RUNS = "MOELAB_TESTS_RUNS"


def answer(question, mode, log, cache=None):
    """Stand in for the compile in a worker."""
    wrong = question.num_stages
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if folder := os.environ.get(RUNS):
        Path(folder, f"{wrong}:{os.getppid()}:{time.monotonic_ns()}").touch()
    if wrong == KILLER:
        os.kill(os.getppid(), signal.SIGKILL)
    if wrong == ABORT:
        log.write_text("LLVM ERROR: cannot select\n")
        os.abort()
    if wrong == SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    if wrong == EXIT or wrong >= EXITS:
        os._exit(7)
    if wrong == HANG:
        time.sleep(600)
    if wrong == HANGING_HELPER:
        subprocess.run(["sleep", "600"])
    if wrong == HOG:
        # At once: a loaded machine gives it page by page, which takes seconds.
        bytearray(1 << 30)
    if wrong == STUMBLE:
        raise RuntimeError("a fault of moelab's")
    time.sleep(float(os.environ.get("MOELAB_TESTS_SLEEP", "0")))
    return answers.stamped("ok", None, targets.get(question.target)) | {"lds_bytes": wrong}


def asked_row(question, mode, keys=None):
    """Ask without Triton, whose import takes seconds."""
    return question.asked() | {
        "triton": "3.9.0",
        "mode": mode,
        "compile_key": str(question.num_stages),
    }


def pretend():
    """Let this process's sweeps answer as `answer` does."""
    sweep.settled = lambda question: question
    sweep.asked_row = asked_row
    answers._compile_one = answer


def questions(stages):
    (one,) = plan.grid(
        kernels="moe_gemm_a8w8",
        targets="gfx950",
        tiles="16x64x64",
        warps=4,
        m=512,
        stages=1,
        async_copy="on",
    )
    return [replace(one, num_stages=of) for of in stages]


class Told(records.Journal):
    """A journal that says what it has acknowledged."""

    def append(self, *rows):
        super().append(*rows)
        for row in rows:
            os.write(1, f"{row['num_stages']}\n".encode())


class Sweep:
    """A sweep in another process.

    Args:
        options: of `sweep.run`, and of `main`; ``own_group`` to be interrupted as by a terminal.
    """

    def __init__(self, store, stages, **options):
        self.store = store
        environment = os.environ | {
            MARK: str(store),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        }
        if "sleep_s" in options:
            environment["MOELAB_TESTS_SLEEP"] = str(options.pop("sleep_s"))
        own_group = options.pop("own_group", False)
        request = json.dumps([str(store), list(stages), {"jobs": 1} | options])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import faults; faults.main()", request],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=own_group,
        )
        self._told = b""

    def wait_for_a_row(self):
        self._told += os.read(self.process.stdout.fileno(), 65536)

    def end(self):
        """Wait for it: its exit code, stderr, and the stage counts that were acknowledged."""
        out, err = self.process.communicate(timeout=60)
        told = [int(line) for line in (self._told + out).split(b"\n")[:-1]]
        return self.process.returncode, err.decode(), told


def main():
    """Run what a `Sweep` asks for, with the exit codes of the command line.

    It may be given ``file_bytes``, that a file may have at most, ``clock_s``, by which the
    wall clock is moved half a second after the start, and ``busy_s``, after which the pool
    hears what its workers say, as on a machine that is busy.
    """
    from moelab import cli

    store, stages, options = json.loads(sys.argv[1])
    pretend()
    records.Journal = Told
    most = options.pop("file_bytes", resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    moved, clock, start = options.pop("clock_s", 0), time.time, time.monotonic()
    time.time = lambda: clock() + moved * (time.monotonic() > start + 0.5)
    time.time_ns = lambda: int(time.time() * 1e9)

    receive, busy_s = WorkerManager.receive, options.pop("busy_s", 0)

    def late(self, timeout):
        message = receive(self, timeout)
        time.sleep(busy_s * (not isinstance(message, NoMessage)))
        return message

    WorkerManager.receive = late

    @cli.app.command()
    def fault():
        with cli._wrong_use():
            sweep.run(questions(stages), store, progress=False, **options)

    cli.app(["fault"])


def alive(store):
    """Give the processes of a sweep that are left, and what they run."""
    mark = f"{MARK}={store}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().split("\0")[:3]
    return found


def outlived(store, within_s=2):
    """Give what is still left after a moment: a killed process takes one to end."""
    end = time.monotonic() + within_s
    while (left := alive(store)) and time.monotonic() < end:
        time.sleep(0.02)
    return left
