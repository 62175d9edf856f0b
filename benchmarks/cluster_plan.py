"""Does a sweep bear a plan of a million configurations over a hundred workers?

Asked of the process that has the plan, in two ways, with nothing compiled:

alone    The process itself: a real plan, `sweep.run`, `answers.spread` and the journal on the
         disk of ``--folder``. What is asked is answered at once, in the same process, with two
         questions ahead for each of the workers: the rate is the most that the process can do.
         Half-way it is killed, and started again: the time to resume is from the start of the
         command, with the making of the plan, until the first new question is asked.
cluster  dask's scheduler, and as many of its workers as ``--workers``, in four processes on
         loopback, with `cluster.compile_all` as it is. A worker answers at once where it would
         give the question to a compiler's process. All share this machine's cores, so the rate
         is one of few cores; the CPU time of each part says what more of them would give.

Real in both are the compile keys, by which launches that compile to the same code are asked
once. A plan over models and numbers of tokens has few; ``--distinct`` gives each question a key
of its own, the most work that a plan of this size can be.

    python benchmarks/cluster_plan.py alone --distinct
    python benchmarks/cluster_plan.py cluster --distinct --rows 5000
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from moelab import answers, cluster, plan, sweep, targets

PROCESSES = 4
BLOCKS = (64, 128, 256)


def questions(count):
    """Plan so many configurations, evenly of 1.1 million."""
    whole = plan.grid(
        kernels="moe_gemm_a8w8,moe_gemm_a8w4",
        targets="gfx942,gfx950,sm_90,sm_100",
        models="all",
        layers="all",
        tp="all",
        m="all",
        tiles=[f"{m}x{n}x{k}" for m in (16, 32, 64, 128, 256) for n in BLOCKS for k in BLOCKS],
        warps="4,8",
        stages="1,2,3,4",
        async_copy="both",
    )
    if count > len(whole):
        raise SystemExit(f"--rows {count:,}: the plan has {len(whole):,}; give fewer")
    return whole[:: len(whole) // count][:count]


class AtOnce:
    """`answers.Compilers` that answer at once.

    Args:
        workers: there seem to be.
        most: questions that are answered; then ``end`` is called.
    """

    def __init__(self, workers, most=sys.maxsize, end=lambda: None):
        self.ahead, self._left, self._end = 2 * workers, most, end

    def ask(self, question):
        if not self._left:
            self._end()
        self._left -= 1
        done = Future()
        done.set_result(
            answers.stamped("ok", None, targets.get(question.target))
            | {"lds_bytes": 65536, "tmem_columns": 0, "method": "allocation"}
        )
        return done

    def answer(self, done, question):
        return done.result()


def distinct(compile_key):
    """Give a key of its own to what differs in the problem alone."""

    def key(question, keys):
        of = question.problem
        same = f"{compile_key(question, keys)} {of.model} {of.layer} {of.tp} {of.m}"
        return hashlib.sha256(same.encode()).hexdigest()[:16]

    return key


# What runs in a process of its own.


def drive(given):
    """Run a sweep; say when it asked first, and how far it came."""
    told = {"began": given.began}
    if given.distinct:
        sweep._compile_key = distinct(sweep._compile_key)

    def tell():
        status = Path("/proc/self/status").read_text()
        told["peak_bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        now = {"ended": time.time(), "cpu_s": time.process_time()}
        answered = {"answered": now["ended"], "cpu_answered_s": now["cpu_s"]}
        print(json.dumps(answered | told | now), flush=True)

    def end():
        tell()
        os.kill(os.getpid(), signal.SIGKILL)

    spread = answers.spread

    def noted(of, compilers):
        told.update(asked=time.time(), cpu_asked_s=time.process_time(), questions=len(of))
        yield from spread(of, compilers)
        told.update(answered=time.time(), cpu_answered_s=time.process_time())

    def at_once(of, *_, **__):
        most = len(of) // 2 if given.kill else sys.maxsize
        yield from answers.spread(of, AtOnce(given.workers, most, end))

    answers.spread, sweep.compile_all = noted, at_once
    of = questions(given.rows)
    told["planned"] = time.time()
    sweep.run(of, given.store, progress=False, dask=given.dask)
    tell()


def work(given):
    """Be some of dask's workers, who answer at once."""
    from distributed import Worker

    cluster._compilers = lambda threads, asked: AtOnce(threads)
    loopback = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}

    async def serve():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(given.workers):
                worker = Worker(given.dask, nthreads=1, local_directory=given.store, **loopback)
                await stack.enter_async_context(worker)
            await worker.finished()

    asyncio.run(serve())


# Who starts them.


def command(role, given, **changed):
    options = {"rows": given.rows, "workers": given.workers, "began": time.time()} | changed
    words = [sys.executable, __file__, role]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words + ["--distinct"] * given.distinct


def told_by(words):
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(said[-1])


def lines(store):
    return sum(path.read_bytes().count(b"\n") for path in store.glob("*.jsonl"))


def cpu_s(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def line(name, run, rows):
    """Tell a run; of times that others' work makes longer, the CPU's, too."""
    began, asked, answered = run["began"], run["asked"], run["answered"]
    cpu_s = run["cpu_answered_s"] - run["cpu_asked_s"]
    return (
        f"{name:<13} {run['questions']:>9,} questions left, the first after {asked - began:.1f} s "
        f"({run['cpu_asked_s']:.1f} s of CPU, the plan {run['planned'] - began:.1f} s); "
        f"{rows:,} rows at {rows / (answered - asked):,.0f}/s ({rows / cpu_s:,.0f}/s of CPU); "
        f"whole {run['ended'] - began:.1f} s ({run['cpu_s']:.1f} s of CPU), "
        f"peak {run['peak_bytes'] / 2**30:.2f} GiB"
    )


def alone(given, store):
    """Print what a sweep takes that is killed half-way, and resumed."""
    first = told_by([*command("drive", given, store=store), "--kill"])
    kept = lines(store)
    print(line("until killed", first, kept), flush=True)
    second = told_by(command("drive", given, store=store))
    print(line("resumed", second, lines(store) - kept))
    size = sum(path.stat().st_size for path in store.iterdir())
    print(f"{'store':<13} {lines(store):>9,} lines, {size / 2**20:,.0f} MiB")


def in_cluster(given, store):
    """Print what a sweep takes whose questions go through dask."""
    file = store / "scheduler.json"
    dask = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--no-dashboard"]
    dask += ["--dashboard-address", "127.0.0.1:0", "--port", "0", "--scheduler-file", str(file)]
    processes = []
    try:
        processes.append(subprocess.Popen(dask, stderr=subprocess.DEVNULL))
        while not file.exists():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        shared = {"dask": address, "store": store, "workers": given.workers // PROCESSES}
        processes += [
            subprocess.Popen(command("work", given, **shared), stderr=subprocess.DEVNULL)
            for _ in range(PROCESSES)
        ]
        wait_for(given.workers, address)
        before = [cpu_s(process) for process in processes]
        run = told_by(command("drive", given, store=store / "rows", dask=address))
        scheduler, *workers = [
            cpu_s(process) - so_far for process, so_far in zip(processes, before, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    rows = lines(store / "rows")
    print(line("through dask", run, rows))
    print(
        f"{'CPU time':<13} of a question, in ms: "
        f"driver {1000 * (run['cpu_answered_s'] - run['cpu_asked_s']) / run['questions']:.2f}, "
        f"scheduler {1000 * scheduler / run['questions']:.2f}, "
        f"all workers {1000 * sum(workers) / run['questions']:.2f}"
    )


def wait_for(workers, address):
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(workers, timeout=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", choices=("alone", "cluster", "drive", "work"))
    parser.add_argument("--folder", default=".", help="On the disk of the store.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--distinct", action="store_true", help="Each question has its own key.")
    for own in ("--store", "--dask"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way in ("drive", "work"):
        {"drive": drive, "work": work}[given.way](given)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as store:
        {"alone": alone, "cluster": in_cluster}[given.way](given, Path(store))


if __name__ == "__main__":
    main()
