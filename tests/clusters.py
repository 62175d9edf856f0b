"""A dask cluster of processes of this machine, which nobody else reaches; its tasks pretend.

Workers import `faults` and answer as it does, without Triton, so that a cluster is there within
two seconds. Each has a nanny, as `dask worker` gives it, which starts a dead one anew.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import faults

LOOPBACK = ("--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0")


class Cluster:
    """A scheduler and workers.

    Args:
        folder: an empty one, of logs, and of a file for each task that was run.
        workers: how many to start with.
        options: of all of dask's commands, beyond loopback.
        environment: of all processes, beyond this one's.
    """

    def __init__(self, folder, workers=1, *, options=(), **environment):
        self.folder, self._options, self._started = folder, options, []
        (folder / "runs").mkdir()
        self.environment = os.environ | {
            faults.MARK: str(folder),
            faults.RUNS: str(folder / "runs"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
            # Dead workers are replaced at once.
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
            **environment,
        }
        self._file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", self._file)
        for _ in range(workers):
            self.start_worker()

    def start_worker(self, *options, preload="import faults; faults.pretend()", **environment):
        """Start one: options and environment are its own; ``preload`` is Python."""
        script = self.folder / f"preload_{len(self._started)}.py"
        script.write_text(preload)
        return self._start(
            *("worker", "--nthreads", "1", "--scheduler-file", self._file),
            *("--local-directory", self.folder, "--preload", script, *options),
            **environment,
        )

    def _start(self, *command, **environment):
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *map(str, command), *LOOPBACK, *self._options],
                env=self.environment | environment,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self._started.append(process)
        return process

    @property
    def address(self):
        while not self._file.exists():
            time.sleep(0.02)
        return json.loads(self._file.read_text())["address"]

    def wait_for_workers(self, count):
        """Wait until so many have joined."""
        import distributed

        with distributed.Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=10)

    def runs(self):
        """Of each task that was begun, in order: its stage count and its worker's process id."""
        begun = [path.name.split(":") for path in (self.folder / "runs").iterdir()]
        return [(int(of), int(by)) for of, by, at in sorted(begun, key=lambda parts: int(parts[2]))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def listening(processes):
    """Give the addresses, as /proc/net has them, that processes listen at."""
    inodes = set()
    for process in processes:
        for handle in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(handle).partition("socket:[")[2].rstrip("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                # 0A: it listens.
                if fields[3] == "0A" and fields[9] in inodes:
                    found.add(fields[1].partition(":")[0])
    return found
