"""Many machines: the workers of a dask.distributed cluster answer as this machine's processes do.

Whoever asks stays in charge: it has the plan, asks a little ahead, and journals. A worker has
isolated processes of its own, one for each of its threads, which end with it. A worker that is
lost costs only what it was doing, which another one does then. All must have the moelab, the
Triton and the kernels of whoever asks, for a row does not say which machine answered it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import ipaddress
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from . import __version__, answers, records, scratch, targets, toolchain
from .specs import CapturedLaunch, KernelLaunch, Question

if TYPE_CHECKING:
    import distributed

# Of connecting to a scheduler that is there, which takes less than a second.
_CONNECT_S = 10

# Of a worker's task: how soon it sees that nobody waits for it any more.
_ABANDONED_S = 0.2

# A worker's results are fetched in some milliseconds, if somebody fetches them.
_FETCHED_S = 1.0

# How soon a worker that came or went is seen.
_LOOK_S = 1.0

# How the names of tasks begin.
_OURS = "moelab-"


class ClusterError(Exception):
    """There is no such cluster, or its workers can't answer; the message says what to change."""


class ClusterLostError(ClusterError):
    """The scheduler went away, and what was asked with it."""


def imported() -> Any:
    """Import dask.distributed, which is no dependency of whoever has one machine.

    Raises:
        ClusterError: it is not installed.
    """
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ClusterError(
            f"dask.distributed can't be imported here ({error}); "
            "install it: pip install 'moelab[dask]'"
        ) from None


def check(address: str) -> None:
    """Refuse what is no address, before anything is done.

    Raises:
        ValueError: the message shows what is one.
    """
    if address != "local" and not re.fullmatch(r"(tcp|tls)://\S+:\d+/?", address):
        raise ValueError(
            f"{address!r} is no scheduler's address: give tcp://HOST:PORT or tls://HOST:PORT as "
            "`dask scheduler` prints it, or local for one on this machine"
        )


@dataclass(frozen=True)
class LocalWorker:
    """A worker of ``local``: how many threads it has, what it announces, and its environment."""

    threads: int = 1
    resources: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def connected(
    address: str,
    *,
    files: Collection[str] = (),
    resources: Mapping[str, int] | None = None,
    local: Sequence[LocalWorker] = (LocalWorker(),),
) -> Iterator[distributed.Client]:
    """Connect to a cluster, and wait until a worker is there.

    Args:
        address: of a scheduler, or ``local``: one that is started, and ends, on this machine,
            where nobody else reaches it.
        files: what workers must have, too, as it is here; see `here`.
        resources: what tasks will take of a worker that announces it, such as ``{"GPU": 1}``.
        local: the workers of ``local``.
    Raises:
        ClusterError: dask.distributed is missing, no scheduler answers, or a worker has another
            moelab, Triton or file than this process; the message names it.
    """
    check(address)
    distributed_ = imported()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_its_logs())
        if address == "local":
            address = stack.enter_context(_local(local))
        elif address.startswith("tcp:") and not _is_loopback(address):
            say(
                f"Whoever reaches {address} can run code on every worker and here: keep it in a "
                "network that you trust, or use tls:// (docs/many_machines.md)"
            )
        elif address.startswith("tls:") and not _has_certificate(distributed_):
            raise ClusterError(
                f"{address} asks for a certificate, and this process has no certificate: set "
                "distributed.comm.tls in dask's configuration, as docs/many_machines.md shows"
            )
        try:
            client = distributed_.Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, distributed_.comm.CommClosedError) as error:
            raise ClusterError(
                f"no scheduler at {address} ({error}); start one with `dask scheduler`, and "
                "workers with `dask worker`: docs/many_machines.md"
            ) from None
        # Not for ever: a lost scheduler answers to nothing.
        stack.callback(client.close, timeout=1)
        _wait_for_workers(client, resources or {})
        differing = unfit(client, here(files))
        if differing:
            raise ClusterError(
                "nothing was asked, for not all workers have what this process has:\n"
                + "\n".join(differing.values())
            )
        yield client


def _has_certificate(distributed_: Any) -> bool:
    return distributed_.Security().get_connection_args("client")["ssl_context"] is not None


@contextlib.contextmanager
def _without_its_logs() -> Iterator[None]:
    """Keep dask's logs from stderr: what is lost, and what to do then, an error says in a line."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_loopback(address: str) -> bool:
    host = address.partition("://")[2].rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def say(text: str) -> None:
    """Tell the user on stderr, beside a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _wait_for_workers(client: distributed.Client, resources: Mapping[str, int]) -> None:
    """Wait as long as it takes: a batch system may give machines in an hour."""
    told = time.monotonic() + 2
    while not slots(client, resources):
        if time.monotonic() > told:
            told = float("inf")
            offers = "".join(f" with --resources {name}={of}" for name, of in resources.items())
            say(f"The scheduler has no worker{offers} yet; waiting for one (Ctrl-C ends this)")
        time.sleep(0.1)


def slots(client: distributed.Client, resources: Mapping[str, int]) -> dict[str, int]:
    """Count the tasks that each worker does at once, if each takes these resources.

    Returns:
        by address; a worker that does none is left out.
    """
    if not resources:
        return dict(client.nthreads())
    told = client.scheduler_info(n_workers=-1)["workers"]
    counts = {
        address: min(int(worker["resources"].get(name, 0) // of) for name, of in resources.items())
        for address, worker in told.items()
    }
    return {address: count for address, count in counts.items() if count}


# What a worker must have.


def here(files: Collection[str] = ()) -> dict[str, str]:
    """Tell what this process answers with, to compare with another's.

    Args:
        files: Python files by their paths, as questions name them.
    """
    return {"moelab": _moelab(), "Triton": toolchain.find().name} | {
        path: _hash([Path(path)]) if Path(path).is_file() else "missing" for path in sorted(files)
    }


@functools.cache
def _moelab() -> str:
    return f"{__version__}, sources {_hash(sorted(Path(__file__).parent.rglob('*.py')))}"


def _hash(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


_CURE = {
    "moelab": "install the same moelab there",
    "Triton": "install the same Triton there, or start this command with that one",
}


def _differences(there: Mapping[str, str], needed: Mapping[str, str]) -> list[str]:
    """Say what a worker has, what it needs, and what to change."""
    return [
        f"{name} is {there.get(name, 'missing')} there, {needed[name]} here: "
        + _CURE.get(name, "the file must be the same, at the same path")
        for name in needed
        if there.get(name) != needed[name]
    ]


def unfit(client: distributed.Client, needed: Mapping[str, str]) -> dict[str, str]:
    """Ask every worker what it has; by its address, what is wrong with it."""
    files = [name for name in needed if name not in _CURE]
    found = {}
    for address, there in client.run(here, files, on_error="return").items():
        if isinstance(there, ModuleNotFoundError):
            there = {}
        if isinstance(there, Exception):
            found[address] = f"{address}: {type(there).__name__}: {there}"
        elif differences := _differences(there, needed):
            found[address] = f"{address}: " + "; ".join(differences)
    return found


# The end of whoever asks.


class Job(Protocol):
    """What a cluster is asked to do many times; it travels to the workers.

    ``needed`` is what a worker must have, as `here` tells it; ``resources`` are what it announces,
    such as ``{"GPU": 1}``, and a task takes.
    """

    @property
    def needed(self) -> Mapping[str, str]: ...

    @property
    def resources(self) -> Mapping[str, int]: ...

    def do(self, question: Any, threads: int, abandoned: Callable[[], bool]) -> Any:
        """Answer, in a thread of a dask worker.

        Args:
            threads: of that worker.
            abandoned: tells whether nobody waits for it any more.
        Raises:
            OSError: this worker can't.
        """
        ...

    def check(self, question: Any, answer: Any) -> None:
        """Refuse what is no answer.

        Raises:
            ValueError: the message says why.
        """
        ...

    def crashed(self, question: Any, reason: str) -> Any:
        """Give the answer of what kills its workers."""
        ...


@dataclass
class _Asked:
    """A question that is under way.

    Args:
        future: the answer, of whoever asked.
        task: the cluster's end of it.
        among: the workers that it was given to; None where any may take it.
        alone: its worker died so often that it was asked again while nothing else is under way.
    """

    question: Any
    future: Future[Any]
    task: Any = None
    among: frozenset[str] | None = None
    alone: bool = False


class Tasks:
    """The workers of a cluster, which do a job: `answers.Compilers` of `answers.spread`.

    One thread talks to the scheduler, about as many questions at once as there are: a message
    takes a millisecond, whatever is in it.
    """

    def __init__(self, client: distributed.Client, job: Job):
        self._client, self._job = client, job
        self._names = (f"{_OURS}{client.id}-{number}" for number in itertools.count())
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open: set[Future[Any]] = set()
        self._waiting: list[_Asked] = []
        self._suspects: list[_Asked] = []
        self._asked: dict[str, _Asked] = {}
        self._unfit: dict[str, str] = {}
        self._error: ClusterError | None = None
        self._slots = slots(client, job.resources)
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="moelab-cluster", daemon=True)
        self._thread.start()

    @property
    def ahead(self) -> int:
        return 2 * max(sum(self._slots.values()), 1)

    def ask(self, question: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._events.put(_Asked(question, future))
        return future

    def answer(self, done: Future[Any], question: Any) -> Any:
        """Give what a worker answered.

        Raises:
            ClusterError: the scheduler is lost, or no worker is left that can answer.
        """
        return done.result()

    def close(self) -> None:
        """Ask no more. What is under way ends when the client is closed."""
        self._events.put(None)
        self._thread.join(timeout=1)

    # All below is the thread's.

    def _serve(self) -> None:
        while None not in (events := self._next_events()):
            new = [of for of in events if isinstance(of, _Asked)]
            self._open |= {of.future for of in new}
            self._waiting += new
            try:
                if self._error is None:
                    self._collect([of for of in events if isinstance(of, str)])
                    self._look()
                    self._submit()
            except ClusterError as error:
                self._error = error
            except Exception as error:
                self._error = _lost(error)
            if self._error is not None:
                for future in self._open:
                    future.set_exception(self._error)
                self._open.clear()

    def _next_events(self) -> list[Any]:
        """Wait for something to do: questions, names of tasks that are done, None at the end."""
        with contextlib.suppress(queue.Empty):
            first = self._events.get(timeout=_LOOK_S)
            return [first, *(self._events.get() for _ in range(self._events.qsize()))]
        return []

    def _done(self, asked: _Asked, answer: Any) -> None:
        self._open.remove(asked.future)
        asked.future.set_result(answer)

    def _submit(self) -> None:
        """Give questions to the cluster."""
        if any(of.alone for of in self._asked.values()):
            return
        new, self._waiting = self._waiting, []
        if not new and not self._asked and self._suspects:
            new = [self._suspects.pop()]
        if not new:
            return
        names = list(itertools.islice(self._names, len(new)))
        among = frozenset(self._slots) - self._unfit.keys() if self._unfit else None
        tasks = self._client.map(
            _done_there,
            # Bytes, in which dask looks for no futures.
            [pickle.dumps(of.question) for of in new],
            job=pickle.dumps(self._job),
            key=names,
            workers=among and sorted(among),
            resources=dict(self._job.resources),
        )
        for name, asked, task in zip(names, new, tasks, strict=True):
            asked.task, asked.among = task, among
            self._asked[name] = asked
            task.add_done_callback(lambda task: self._events.put(task.key))

    def _collect(self, names: Sequence[str]) -> None:
        """Fetch answers, and let go of each: what is held is done again when its worker is lost."""
        done = {name: self._asked.pop(name) for name in names if name in self._asked}
        if not done:
            return
        if any(of.task.status == "cancelled" for of in done.values()):
            # The client does that with all that it asked a scheduler that is gone.
            raise _lost("it does not answer any more")
        replies = self._client.gather({name: of.task for name, of in done.items()}, errors="skip")
        for name, asked in done.items():
            reply, task = replies[name], asked.task
            asked.task = None
            if reply is None:
                self._failed(asked, task.exception())
            elif "unfit" in reply:
                self._waiting.append(asked)
                self._leave_out(reply["worker"], reply["unfit"])
            else:
                self._checked(asked, reply)
            task.release()

    def _checked(self, asked: _Asked, reply: Mapping[str, Any]) -> None:
        """Take a reply for an answer, if it is one."""
        try:
            self._job.check(asked.question, reply["answer"])
        except ValueError as error:
            self._waiting.append(asked)
            self._leave_out(reply["worker"], f"{reply['worker']}: its answer is none: {error}")
        else:
            self._done(asked, reply["answer"])

    def _failed(self, asked: _Asked, error: Exception) -> None:
        """Decide what becomes of a question whose task failed: asked again, or a row."""
        if isinstance(error, imported().KilledWorker):
            if not asked.alone:
                # All that was on a worker is suspected when it dies.
                self._suspects.append(replace(asked, alone=True))
                return
            times = error.allowed_failures + 1
            reason = (
                f"{times} dask workers died while they had this, and {times} more when nothing "
                "else was asked; their logs say of what"
            )
        else:
            # Such as a worker that came without moelab, and can't say so itself.
            for worker, words in unfit(self._client, self._job.needed).items():
                if worker not in self._unfit:
                    self._waiting.append(asked)
                    self._leave_out(worker, words)
                    return
            reason = f"{type(error).__name__}: {error}"
        self._done(asked, self._job.crashed(asked.question, reason[: answers.REASON_CHARACTERS]))

    def _leave_out(self, worker: str, words: str) -> None:
        """Ask a worker no more."""
        if worker not in self._unfit:
            self._unfit[worker] = words
            say(f"{words}\nNothing more is asked of this worker")
        if self._slots and self._slots.keys() <= self._unfit.keys():
            raise ClusterError("no worker is left to ask:\n" + "\n".join(self._unfit.values()))

    def _look(self) -> None:
        """See whether the scheduler is there, and which workers there are now."""
        if self._client.status != "running":
            raise _lost("no connection")
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        before, self._slots = self._slots, slots(self._client, self._job.resources)
        if before and not self._slots:
            say("No worker is left; waiting for one (Ctrl-C ends this; what was finished is kept)")
        for name, asked in list(self._asked.items()):
            # Dask would wait for those that it was given to.
            if asked.among and asked.among.isdisjoint(self._slots):
                self._asked.pop(name).task.cancel()
                self._waiting.append(asked)


def _lost(why: object) -> ClusterLostError:
    return ClusterLostError(f"the scheduler is lost: {why}")


def compile_all(
    questions: Mapping[str, Question | CapturedLaunch],
    mode: str,
    address: str,
    jobs: int,
    timeout_s: float,
    memory: int | None = None,
) -> Generator[dict[str, dict[str, Any]], None, None]:
    """Yield answers by key as they come, as `answers.compile_all` does.

    Args:
        address: as `connected` takes it.
        jobs: threads of an ``address`` that is ``local``.
        memory: bytes that a compile may take; None is half of the machine that compiles.
    Raises:
        ClusterError: see `connected`; `ClusterLostError` where the scheduler is lost meanwhile.
    """
    if not questions:
        return
    kernels = {of.kernel for of in questions.values() if isinstance(of, KernelLaunch)}
    files = {name.partition(":")[0] for name in kernels}
    files = {name for name in files if name.endswith(".py")}
    with (
        connected(address, files=files, local=[LocalWorker(jobs)]) as client,
        contextlib.closing(Tasks(client, _Compile(mode, timeout_s, memory, here(files)))) as tasks,
    ):
        yield from answers.spread(questions, tasks)


@dataclass(frozen=True)
class _Compile:
    """The job of a sweep.

    Args:
        mode, timeout_s, memory: as `answers.LocalCompilers` takes them; no memory is half of the
            worker's machine's.
        needed: see `Job`.
    """

    mode: str
    timeout_s: float
    memory: int | None
    needed: Mapping[str, str]
    resources: Mapping[str, int] = field(default_factory=dict)

    def do(
        self, question: Question | CapturedLaunch, threads: int, abandoned: Callable[[], bool]
    ) -> dict[str, Any]:
        with _one_at_a_time:
            compilers = _compilers(threads, self)
            done = compilers.ask(question)
        while not wait([done], timeout=_ABANDONED_S).done:
            if abandoned():
                # This ends the process, too.
                done.cancel()
        return compilers.answer(done, question)

    def check(self, question: Question | CapturedLaunch, answer: Any) -> None:
        records.check_answer(answer)

    def crashed(self, question: Question | CapturedLaunch, reason: str) -> dict[str, Any]:
        return answers.stamped("crashed", reason, targets.get(question.target))


# A scheduler of our own.


@contextlib.contextmanager
def _local(workers: Sequence[LocalWorker]) -> Iterator[str]:
    """Start a scheduler and workers that no other machine reaches; yields the address."""
    # Without a dashboard both still listen for requests of their state, on every interface if
    # they are not told where.
    common = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    with scratch.folder() as folder, contextlib.ExitStack() as stack:
        file = folder / "scheduler.json"
        log = stack.enter_context((folder / "log").open("w+"))
        scheduler = _started(
            ["scheduler", *common, "--port", "0", "--scheduler-file", str(file)], log, stack
        )
        while not file.exists() and scheduler.poll() is None:
            time.sleep(0.05)
        if scheduler.poll() is not None:
            log.seek(0)
            raise ClusterError(f"dask's scheduler did not start:\n{log.read()[-800:]}")
        address = str(json.loads(file.read_text())["address"])
        for worker in workers:
            command = ["worker", *common, "--nthreads", str(worker.threads), "--no-nanny"]
            for name, of in worker.resources.items():
                command += ["--resources", f"{name}={of}"]
            command += ["--local-directory", str(folder), address]
            _started(command, log, stack, worker.environment)
        yield address


def _started(
    command: list[str],
    log: IO[str],
    stack: contextlib.ExitStack,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start one of dask's commands, which ends with this process, however that ends."""
    code = (
        "import os, sys; from moelab import isolation; isolation.die_with(int(sys.argv.pop(1)));"
        "from dask.__main__ import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(os.getpid()), *command],
        stdout=log,
        stderr=log,
        env=os.environ | dict(environment or {}),
        # A terminal's Ctrl-C is for whoever asked.
        start_new_session=True,
    )

    def end() -> None:
        process.terminate()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


# The worker's end.


def _done_there(question: bytes, job: bytes) -> dict[str, Any]:
    """Do a job in a thread of a dask worker; what is risky runs in another process."""
    worker = imported().get_worker()
    _let_fetch(worker)
    key = worker.get_current_task()
    asked: Job = pickle.loads(job)
    there = here([name for name in asked.needed if name not in _CURE])
    if differences := _differences(there, asked.needed):
        return {"worker": worker.address, "unfit": f"{worker.address}: " + "; ".join(differences)}

    def abandoned() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled"

    # Under a nanny this process is a daemon, which multiprocessing allows no others. Those that
    # are started here end with it by themselves.
    multiprocessing.current_process().daemon = False
    try:
        answer = asked.do(pickle.loads(question), worker.state.nthreads, abandoned)
    except OSError as error:
        return {"worker": worker.address, "unfit": f"{worker.address}: {error}"}
    return {"worker": worker.address, "answer": answer}


def _let_fetch(worker: Any) -> None:
    """Begin nothing while a result lies here: both would be lost with the worker."""
    end = time.monotonic() + _FETCHED_S
    while time.monotonic() < end:
        # It changes meanwhile.
        with contextlib.suppress(RuntimeError):
            if not any(str(key).startswith(_OURS) for key in worker.data):
                return
        time.sleep(0.001)


_one_at_a_time = threading.Lock()
_kept: dict[tuple[Any, ...], answers.LocalCompilers] = {}


def _compilers(threads: int, asked: _Compile) -> answers.LocalCompilers:
    """Give this dask worker's processes, which stay: one takes seconds to import Triton."""
    memory = asked.memory or answers.half_of_memory()
    same = threads, asked.mode, asked.timeout_s, memory
    if same not in _kept:
        for other in [other for other, of in _kept.items() if of.idle]:
            _kept.pop(other).close()
        _kept[same] = answers.LocalCompilers(*same)
    return _kept[same]
