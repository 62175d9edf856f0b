"""A process that compiles and launches when it is told, with a Triton and kernels of its own.

What a launch may do to its process it does to a worker's: crash it, hang it, or leave it a GPU
that takes no launch any more. Nor do two Tritons, or two sources of a kernel, share a process.
A request is a line of JSON on the worker's stdin. On stdout follow lines that say what the worker
is about to do, and its reply. No worker is asked before the others have answered, so only one
uses the GPU at a time. What a worker prints goes to stderr.

A worker of another source imports this moelab but for `moelab.kernels`, which are the other
checkout's: what times and checks is the same on both sides.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compiler, isolation, launcher, scratch, sensors, sweep, timing, toolchain
from . import peers as others
from .specs import Configuration, Problem, Tile
from .timing import ContextLost, LaunchFailed, MeasureError

if TYPE_CHECKING:
    from .kernels.inputs import Inputs

# What a worker runs; the folder of its Triton cache follows.
_CODE = "import sys; from moelab import workers; workers.serve(sys.argv[1])"

# Of one step on the GPU. Drawing the largest layer here and its reference take seconds.
TIMEOUT_S = 180

# How soon it is seen that nobody waits for a worker.
_ABANDONED_S = 0.5

# Of a worker whose GPU takes no launch any more: another process may do better.
CONTEXT_LOST = os.EX_TEMPFAIL


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
        abandoned: asked now and then whether nobody waits for its answers any more.

    It starts meanwhile; whether it did tells the first answer.
    """

    def __init__(self, build: Build, cache: Path, abandoned: Callable[[], bool] = lambda: False):
        self._abandoned = abandoned
        self._open = contextlib.ExitStack()
        try:
            chosen = toolchain.find(build.triton)
            environment = dict(self._open.enter_context(chosen.environment()))
            if build.source is not None:
                mixed = self._open.enter_context(scratch.folder())
                _mix(mixed / "moelab", build.source / "moelab" / "kernels")
                environment["PYTHONPATH"] = os.pathsep.join([str(mixed), environment["PYTHONPATH"]])
            # The folder that the command runs in must not come before that path.
            environment["PYTHONSAFEPATH"] = "1"
            self._process = subprocess.Popen(
                [chosen.python, "-c", _CODE, str(cache)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._open.callback(self._end)
            # What it said that was not listened to yet.
            self._heard = b""
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
            suspects: keys of the launches that it is about, blamed if it dies before it says
                which one it is at.
            timeout_s: of each step that it tells; None waits for ever.
        Raises:
            LaunchFailed: a launch failed, and the worker goes on.
            WorkerLost: it died, did not answer in time, or lost the GPU.
            MeasureError: it can't do that; the message has its words.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do} | rest).encode() + b"\n")
            self._process.stdin.flush()
        reply: dict[str, Any] = {"at": suspects}
        while "at" in reply:
            suspects = reply["at"]
            reply = self._said(suspects, timeout_s)
        if "failed" in reply:
            raise LaunchFailed(reply["failed"])
        if "lost" in reply:
            raise WorkerLost(reply["keys"] or suspects, reply["lost"])
        if "error" in reply:
            raise MeasureError(reply["error"])
        return reply["done"]

    def _said(self, suspects: Sequence[str], timeout_s: float | None) -> dict[str, Any]:
        """Wait for the next line of the worker."""
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            if not self._spoke(timeout_s):
                self._process.kill()
                assert timeout_s is not None
                reason = f"no answer after {timeout_s:g} s; its process was ended"
                raise WorkerLost(suspects, {"status": "launch_error", "reason": reason})
            if not (more := os.read(self._process.stdout.fileno(), 1 << 16)):
                how = isolation.how_it_ended(self._process.wait())
                reason = f"its process died: {how}; stderr has its words"
                raise WorkerLost(suspects, {"status": "launch_error", "reason": reason})
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def _spoke(self, timeout_s: float | None) -> bool:
        """Wait until the worker says something; tells whether it did in time."""
        assert self._process.stdout is not None
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not select.select([self._process.stdout], [], [], _ABANDONED_S)[0]:
            if self._abandoned():
                self._process.kill()
                raise MeasureError("nobody waits for it any more")
            if time.monotonic() > end:
                return False
        return True

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
    """What a worker does when it is asked; each method's name is that of its request.

    Args:
        cache: folder of the Triton cache.
        at: called with the keys of the launches that come next.
    """

    def __init__(self, cache: Path, at: Callable[[list[str]], None]):
        self._cache = cache
        self._at = at
        # By layer; what may follow has the same weights.
        self._drawn: dict[int, Inputs] = {}
        self._turns: timing.Turns[str] = timing.Turns({})
        # Of the launches that were prepared, to name one by what it launches.
        self._asked: dict[str, Configuration] = {}

    def hello(self) -> None:
        """Say that imports went well, which take seconds."""
        import torch  # noqa: F401

    def gpu(self) -> dict[str, str]:
        """Name the device, and what the compiler is asked for it."""
        here = launcher.gpu()
        return {"name": here.name, "target": here.target.name}

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
        here = launcher.gpu()
        launcher.check(questions, here)
        said = {"mode": "measured", "gpu": here.name}
        rows = {of: sweep.asked_row(of, "measured") | said for of in dict.fromkeys(questions)}
        answers = sweep.compiled(rows, store, self._cache, jobs, True)
        return [rows[of] | answers[rows[of]["compile_key"]] for of in questions]

    def roofs(self, rounds: int) -> dict[str, Any]:
        """Measure what the device does at most."""
        return asdict(launcher.measured_roofs(rounds))

    def measure(
        self,
        launches: Sequence[Any],
        like: Mapping[str, Any],
        peers: Sequence[str],
        workload: str,
        seed: int,
        rounds: int,
        repetitions: int,
    ) -> dict[str, Any]:
        """Launch, check and time configurations of one problem or of both layers.

        Args:
            launches: key, configuration and the LDS that was told.
            like: a configuration of the problem, which is not launched.
            peers: names of those that take turns with ours.
        Returns:
            by key, what the row of each gains; and whole rows of peers.
        """
        told = self._asks(launches)
        fitting = [*told] or [sweep.settled(_read(like))]
        # What has another shape must not take memory from what comes.
        self._keep(fitting)
        how = launcher.How(
            workload,
            seed,
            rounds,
            repetitions,
            tuple(peers),
            lambda launches: self._at([key for of in launches for key in self.keys_of(of)]),
        )
        self._drawn, found = launcher.measured(fitting, told, self._drawn, how)
        return {
            "ours": {key: found[of] for key, of in self._asked.items() if of in found},
            "peers": [
                of.row() | gained for of, gained in found.items() if isinstance(of, others.Asked)
            ],
        }

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
        told = self._asks(launches)
        first = next(iter(told))
        layer = first.problem.layer
        self._keep([first])
        torch.cuda.empty_cache()
        how = launcher.How(
            workload,
            seed,
            tell=lambda launches: self._at([key for of in launches for key in self.keys_of(of)]),
        )
        try:
            self._drawn[layer], ready, found = launcher.checked(
                [*told], told, self._drawn.get(layer), how
            )
        except torch.OutOfMemoryError as error:
            self._drawn.clear()
            return dict.fromkeys(self._asked, timing.failure(error, first))
        finally:
            # The other worker takes its memory from the same device.
            torch.cuda.empty_cache()
        self._turns = timing.Turns(
            {key: ready[of] for key, of in self._asked.items() if of in ready}
        )
        return {
            key: found[of] | {"made_by": launcher.made_by(of)} for key, of in self._asked.items()
        }

    def _asks(self, launches: Sequence[Any]) -> dict[Configuration, int]:
        """Read what is to be launched, with its LDS."""
        self._asked = {key: sweep.settled(_read(of)) for key, of, _ in launches}
        return {self._asked[key]: lds for key, _, lds in launches}

    def _keep(self, fitting: Sequence[Configuration]) -> None:
        """Forget the inputs of other shapes than these."""
        shapes = {(of.kernel, replace(of.problem, m=0)) for of in fitting}
        self._drawn = {
            layer: drawn for layer, drawn in self._drawn.items() if drawn.drawn_for in shapes
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
        """Find the keys of what was launched: a key, a configuration, two of them, or a peer."""
        if isinstance(launch, others.Asked):
            return [peer_key(launch.peer)]
        launched = launch if isinstance(launch, tuple) else (launch,)
        return [key for key, of in self._asked.items() if key in launched or of in launched]


def peer_key(name: str) -> str:
    """Give the key of a peer's launches."""
    return f"peer {name}"


_REQUESTS = (
    *("hello", "gpu", "fits", "compiled", "roofs", "measure"),
    *("prepare", "start", "settle", "sample"),
)


def serve(cache: str) -> None:
    """Answer the requests of a `Worker` until it closes the pipe.

    Args:
        cache: folder of the Triton cache, which this process fills and launches from.
    """
    # Interrupts are the parent's; with it this process ends.
    isolation.attach(os.getppid())
    with _pipes() as (requests, replies), compiler.cache_at(Path(cache)):

        def say(line: Mapping[str, Any]) -> None:
            replies.write(json.dumps(line) + "\n")
            replies.flush()

        served = _Served(Path(cache), lambda keys: say({"at": keys}))
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
            except MeasureError as error:
                reply = {"error": str(error)}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            say(reply)
            if lost:
                sys.exit(CONTEXT_LOST)


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
