"""A process that compiles and launches when it is told, with a Triton and kernels of its own.

Two Tritons, or two sources of a kernel, don't share a process. Each gets a worker, and one
parent tells them whose turn it is: a request is a line of JSON on the worker's stdin, its
reply a line on stdout, and no worker is asked before the other has answered. So only one of
them uses the GPU at a time. What a worker prints goes to stderr.

A worker of another source imports this moelab but for `moelab.kernels`, which are the other
checkout's: what times and checks is the same on both sides.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import bench, compiler, isolation, sensors, sweep, timing, toolchain
from .specs import Configuration, Problem, Tile
from .timing import ContextLost, LaunchFailed, MeasureError

# What a worker runs; the folder of its Triton cache follows.
_CODE = "import sys; from moelab import workers; workers.serve(sys.argv[1])"

# Of a request to the GPU. Drawing the largest layer here and its reference take seconds.
TIMEOUT_S = 180


class WorkerLost(MeasureError):
    """A worker can't be asked any more; another one in its place can.

    Args:
        keys: of the launches that did it, or are suspected.
        row: what their rows say.
    """

    def __init__(self, keys: Sequence[str], row: dict[str, Any]):
        super().__init__(row["reason"])
        self.keys, self.row = list(keys), row


@dataclass(frozen=True)
class Build:
    """What a worker launches with.

    Args:
        triton: as `toolchain.find` names it; None is this process's.
        source: a checkout of moelab whose kernels are launched; None is this one.
    """

    triton: str | None = None
    source: Path | None = None

    def settled(self) -> Build:
        """Spell the same build in one way only.

        Raises:
            ToolchainError: there is no such Triton.
            ValueError: the source has no kernels; the message says where they were looked for.
        """
        triton = None if toolchain.find(self.triton).is_here else self.triton
        source = self.source and self.source.expanduser().resolve()
        if source is not None and not (source / "moelab" / "kernels" / "__init__.py").is_file():
            raise ValueError(
                f"source={self.source}: there is no moelab/kernels in it; give the folder of a "
                "checkout, such as one of `git worktree add ../before HEAD~1`"
            )
        here = Path(__file__).parents[1].resolve()
        return Build(triton, None if source == here else source)


class Worker:
    """The parent's end of a worker.

    Args:
        build: a settled one.
        cache: folder of its Triton cache, which a worker in its place goes on with.

    It starts meanwhile; whether it did tells the first answer.
    """

    def __init__(self, build: Build, cache: Path):
        self._open = contextlib.ExitStack()
        try:
            chosen = toolchain.find(build.triton)
            environment = dict(self._open.enter_context(chosen.environment()))
            if build.source is not None:
                mixed = self._open.enter_context(tempfile.TemporaryDirectory(prefix="moelab-"))
                _mix(Path(mixed) / "moelab", build.source / "moelab" / "kernels")
                environment["PYTHONPATH"] = os.pathsep.join([mixed, environment["PYTHONPATH"]])
            # The folder that the command runs in must not come before that path.
            environment["PYTHONSAFEPATH"] = "1"
            self._process = subprocess.Popen(
                [chosen.python, "-c", _CODE, str(cache)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._open.callback(self._end)
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        do: str,
        *,
        suspects: Sequence[str] = (),
        timeout_s: float | None = TIMEOUT_S,
        **rest: Any,
    ) -> Any:
        """Let the worker do something, and wait.

        Args:
            do: the name of a `_Served` method, which ``rest`` is given to.
            suspects: keys of the launches that it is about, blamed if it dies without a word.
        Raises:
            LaunchFailed: a launch failed, and the worker goes on.
            WorkerLost: it died, did not answer in time, or lost the GPU.
            MeasureError: it can't do that; the message has its words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do} | rest).encode() + b"\n")
            self._process.stdin.flush()
            if timeout_s is None or select.select([self._process.stdout], [], [], timeout_s)[0]:
                line = self._process.stdout.readline()
            elif self._process.poll() is None:
                self._process.kill()
                reason = f"no answer after {timeout_s:g} s; its process was ended"
                raise WorkerLost(suspects, {"status": "launch_error", "reason": reason})
        if not line:
            how = isolation.how_it_ended(self._process.wait())
            reason = f"its process died: {how}; stderr has its words"
            raise WorkerLost(suspects, {"status": "launch_error", "reason": reason})
        reply = json.loads(line)
        if "failed" in reply:
            raise LaunchFailed(reply["failed"])
        if "lost" in reply:
            raise WorkerLost(reply["keys"] or suspects, reply["lost"])
        if "error" in reply:
            raise MeasureError(reply["error"])
        return reply["done"]

    def close(self) -> None:
        """End the worker, whatever it does."""
        self._open.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe and pipe.close()


def _mix(package: Path, kernels: Path) -> None:
    """Make a package of this moelab with other kernels, of links."""
    package.mkdir()
    for path in Path(__file__).parent.iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(kernels)


class Turns:
    """`timing.Turns` of launches that lie in workers.

    Args:
        worker_of: finds a launch's worker by its key.
    """

    def __init__(self, worker_of: Callable[[str], Worker]):
        self._worker_of = worker_of

    def start(self, of: str) -> None:
        self._worker_of(of).ask("start", suspects=[of], key=of)

    def settle(self, of: str, alike: int, most: int) -> None:
        self._worker_of(of).ask("settle", suspects=[of], key=of, alike=alike, most=most)

    def sample(self, of: str, repetitions: int) -> tuple[list[float], sensors.Reading]:
        taken, reading = self._worker_of(of).ask(
            "sample", suspects=[of], key=of, repetitions=repetitions
        )
        held = reading.pop("throttled")
        return taken, sensors.Reading(
            **reading, throttled=None if held is None else frozenset(held)
        )


def written(of: Configuration) -> dict[str, Any]:
    """Write a configuration as JSON has it."""
    return asdict(of)


def _read(text: Mapping[str, Any]) -> Configuration:
    return Configuration(
        **{**text, "problem": Problem(**text["problem"]), "tile": Tile(**text["tile"])}
    )


# The worker's end.


class _Served:
    """What a worker does when it is asked; each method's name is that of its request."""

    def __init__(self, cache: Path):
        self._cache = cache
        self._drawn: Any = None
        self._turns: timing.Turns[str] = timing.Turns({})
        # Of the launches that were prepared, to name one by what it launches.
        self._asked: dict[str, Configuration] = {}

    def hello(self) -> None:
        """Say that imports went well."""

    def fits(
        self, configurations: Sequence[Mapping[str, Any]], store: str, jobs: int | None
    ) -> list[bool]:
        """Ask the compiler which configurations fit."""
        rows = sweep.run([*map(_read, configurations)], store, jobs=jobs)
        return [status == "ok" for status in rows["status"]]

    def compiled(
        self, configurations: Sequence[Mapping[str, Any]], store: str, jobs: int | None
    ) -> list[dict[str, Any]]:
        """Tell the LDS of every configuration, compile what fits, and start its row."""
        questions = [sweep.settled(_read(each)) for each in configurations]
        here = bench.gpu()
        bench._check(questions, here)
        said = {"mode": "measured", "gpu": here.name}
        rows = {of: sweep.asked_row(of, "measured") | said for of in dict.fromkeys(questions)}
        answers = bench._compiled(rows, store, self._cache, jobs, True)
        return [rows[of] | answers[rows[of]["compile_key"]] for of in questions]

    def prepare(
        self, launches: Sequence[Any], workload: str, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Draw a problem's inputs, launch each configuration once and hold it to the reference.

        Args:
            launches: key, configuration and the LDS that was told, of one problem.
        Returns:
            what the row of each gains; with a status if it is not to be timed.
        """
        import torch

        self._turns = timing.Turns({})
        self._asked = {key: sweep.settled(_read(of)) for key, of, _ in launches}
        told = {self._asked[key]: {"lds_bytes": lds} for key, _, lds in launches}
        first = next(iter(told))
        shape = (first.kernel, replace(first.problem, m=0))
        if self._drawn is not None and self._drawn.drawn_for != shape:
            # What has another shape must not take memory from what comes.
            self._drawn = None
        torch.cuda.empty_cache()
        how = bench._How(workload, seed, 2, 1, ())
        try:
            self._drawn, ready, found = bench._checked([*told], told, self._drawn, how)
        except torch.OutOfMemoryError as error:
            self._drawn = None
            return dict.fromkeys(self._asked, timing.failure(error, first))
        finally:
            # The other worker takes its memory from the same device.
            torch.cuda.empty_cache()
        self._turns = timing.Turns(
            {key: ready[of] for key, of in self._asked.items() if of in ready}
        )
        return {
            key: found[of] | {"made_by": bench._made_by() | bench._made_by_whom(of)}
            for key, of in self._asked.items()
        }

    def start(self, key: str) -> None:
        self._turns.start(key)

    def settle(self, key: str, alike: int, most: int) -> None:
        self._turns.settle(key, alike, most)

    def sample(self, key: str, repetitions: int) -> tuple[list[float], dict[str, Any]]:
        taken, reading = self._turns.sample(key, repetitions)
        held = reading.throttled
        return taken, asdict(reading) | {"throttled": None if held is None else sorted(held)}

    def keys_of(self, launch: Any) -> list[str]:
        """Find the keys of what was launched, which is a key or a configuration."""
        return [key for key, of in self._asked.items() if launch in (key, of)]


_REQUESTS = ("hello", "fits", "compiled", "prepare", "start", "settle", "sample")


def serve(cache: str) -> None:
    """Answer the requests of a `Worker` until it closes the pipe.

    Args:
        cache: folder of the Triton cache, which this process fills and launches from.
    """
    # Interrupts are the parent's; with it this process ends.
    isolation.attach(os.getppid())
    with _pipes() as (requests, replies), compiler.cache_at(Path(cache)):
        served = _Served(Path(cache))
        for line in requests:
            request = json.loads(line)
            do = request.pop("do")
            assert do in _REQUESTS, do
            lost = False
            try:
                reply = {"done": getattr(served, do)(**request)}
            except LaunchFailed as error:
                reply = {"failed": error.row}
            except ContextLost as error:
                lost = True
                reply = {"lost": error.row, "keys": served.keys_of(error.of)}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
            if lost:
                return


@contextlib.contextmanager
def _pipes() -> Iterator[tuple[Any, Any]]:
    """Keep stdin and stdout for requests and replies; nothing else reads or prints there."""
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    with os.fdopen(requests, "rb") as reading, os.fdopen(replies, "w") as writing:
        yield reading, writing
