"""Questions are answered by the real compiler, each in a process that it may kill.

A kernel that crashes its compiler, hangs it or takes all memory has that for an answer.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import queue
import re
import signal
import sys
import tempfile
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from pebble import ProcessExpired

from . import __version__, compiler, disk, isolation, lds_map, records, scratch, targets
from .specs import CapturedLaunch, LdsMap, Question

# Of a healthy compile; the longest seen took 40 s, num_stages=64 more than 90 s.
TIMEOUT_S = 120

# What a worker takes before it compiles: 235 MB with a CPU build of PyTorch.
LEAST_MEMORY = 512 << 20

# How LLVM, the C++ library and ptxas end where memory does.
_NO_MEMORY = re.compile(
    r"^(LLVM ERROR: out of memory|.*std::bad_alloc|ptxas\S* fatal *: Memory allocation failure)",
    re.MULTILINE,
)

# More than a compile writes: its cache, what it hands to ptxas or the linker, and their code.
_ROOM = 8 << 20

# A failing ptxas prints thousands of lines.
REASON_CHARACTERS = 800


def answer(
    question: Question | CapturedLaunch, mode: str, cache: Path | None = None
) -> dict[str, Any]:
    """Ask the compiler, in this process; returns a row's second half.

    Args:
        mode: one of `records.MODES`.
    Raises:
        compiler.CompileError: it rejects the kernel.
    """
    target = targets.get(question.target)
    launch = compiler.specialize(question)
    found: dict[str, Any] = {}
    if mode != "lds":
        allocation, lds_map_ = _mapped(launch)
        found["buffers"] = lds_map.to_json(lds_map_)
    if mode == "full":
        allocation, resources = compiler.full(launch, cache)
        found |= asdict(resources)
        occupancy = targets.occupancy(
            target, allocation.lds_bytes, resources.registers, question.num_warps
        )
        found |= {
            "workgroups_per_cu": occupancy.workgroups_per_cu,
            "warps_per_simd": occupancy.warps_per_simd,
            "occupancy_limit": occupancy.limit,
        }
    elif mode == "lds":
        allocation = compiler.lds(launch)
    found |= asdict(allocation)
    status, reason = "ok", None
    if allocation.lds_bytes > target.lds_limit:
        status = "out_of_lds"
        reason = f"needs {allocation.lds_bytes:,} of {target.lds_limit:,} bytes"
    elif allocation.tmem_columns > compiler.TMEM_COLUMNS:
        status = "out_of_tmem"
        reason = f"needs {allocation.tmem_columns} of {compiler.TMEM_COLUMNS} columns"
    return stamped(status, reason, target) | found


def _mapped(launch: compiler.Launch) -> tuple[compiler.Allocation, LdsMap]:
    """Ask for the map; a fault in reading it must not cost the bytes."""
    try:
        return compiler.buffers(launch)
    except compiler.MapError as error:
        return compiler.lds(launch), LdsMap(missing=f"a fault of moelab's: {error}")


def stamped(status: str, reason: str | None, target: targets.Target) -> dict[str, Any]:
    return {
        "status": status,
        "reason": reason,
        "lds_limit": target.lds_limit,
        "moelab": __version__,
        "schema": records.SCHEMA_VERSION,
    }


class Compilers(Protocol):
    """What answers questions, many at a time: of the compiler, or any others."""

    @property
    def ahead(self) -> int:
        """How many to ask before the first is answered, so that nobody waits for a question."""
        ...

    def ask(self, question: Any) -> Future[Any]: ...

    def answer(self, done: Future[Any], question: Any) -> Any: ...


def spread(
    questions: Mapping[str, Any], compilers: Compilers
) -> Generator[dict[str, Any], None, None]:
    """Yield answers by key as they come, what is finished together; ask only so many ahead."""
    left = iter(questions.items())
    asked: dict[Future[Any], tuple[str, Any]] = {}
    finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    while True:
        for key, question in itertools.islice(left, max(compilers.ahead - len(asked), 0)):
            future = compilers.ask(question)
            asked[future] = key, question
            future.add_done_callback(finished.put)
        if not asked:
            return
        found = {}
        try:
            for _ in range(max(finished.qsize(), 1)):
                done = finished.get()
                key, question = asked.pop(done)
                found[key] = compilers.answer(done, question)
        finally:
            # What was answered comes before the error of one that can't be.
            if found:
                yield found


def compile_all(
    questions: Mapping[str, Question | CapturedLaunch],
    mode: str,
    jobs: int,
    timeout_s: float,
    cache: Path | None = None,
    memory: int | None = None,
) -> Generator[dict[str, dict[str, Any]], None, None]:
    """Yield answers by key as they come; a failure is an answer too.

    Args:
        mode: one of `records.MODES`.
        cache: a Triton cache to leave the code of a full compile in.
        memory: bytes that a compile may take; None is half of this machine's.
    Raises:
        OSError: the disk is full, or no worker can start; no row is guilty of that.
    """
    if not questions:
        return
    number = min(jobs, len(questions))
    with contextlib.closing(
        LocalCompilers(number, mode, timeout_s, memory or half_of_memory(), cache)
    ) as compilers:
        yield from spread(questions, compilers)


class LocalCompilers:
    """Worker processes of this machine.

    Args:
        number: of processes.
        mode: one of `records.MODES`.
        timeout_s: of one question.
        memory: bytes that a compile may take.
        cache: a Triton cache to leave the code of a full compile in.
    """

    def __init__(
        self, number: int, mode: str, timeout_s: float, memory: int, cache: Path | None = None
    ):
        self._number = number
        self._mode, self._timeout_s, self._memory, self._cache = mode, timeout_s, memory, cache
        self._logs: dict[Future[Any], Path] = {}
        self._names = itertools.count()
        self._open = contextlib.ExitStack()
        self._folder = self._open.enter_context(scratch.folder())
        self._workers = self._open.enter_context(
            contextlib.closing(isolation.Workers(number, memory))
        )

    @property
    def ahead(self) -> int:
        return 2 * self._number

    @property
    def idle(self) -> bool:
        """Nothing is asked that was not fetched."""
        return not self._logs

    def ask(self, question: Question | CapturedLaunch) -> Future[Any]:
        log = self._folder / str(next(self._names))
        future = self._workers.submit(
            self._timeout_s, _compile_one, question, self._mode, log, self._cache
        )
        self._logs[future] = log
        return future

    def answer(self, done: Future[Any], question: Question | CapturedLaunch) -> dict[str, Any]:
        """Turn a worker's result, its failure or its death into an answer.

        Raises:
            OSError: the disk is full, or no worker can start.
        """
        log = self._logs.pop(done)
        try:
            return _outcome(done, question, log, self._timeout_s, self._memory)
        finally:
            log.unlink(missing_ok=True)

    def close(self) -> None:
        self._open.close()


def _outcome(
    done: Future[Any],
    question: Question | CapturedLaunch,
    log: Path,
    timeout_s: float,
    memory: int,
) -> dict[str, Any]:
    target = targets.get(question.target)
    try:
        return done.result()
    except compiler.CompileError as error:
        _require_room(log.parent)
        status, words = "compile_error", words_of(str(error), log)
        no_memory = bool(_NO_MEMORY.search(str(error)))
    except ProcessExpired as died:
        if died.exitcode == -signal.SIGALRM:
            return stamped("timeout", f"not finished after {timeout_s:g} s", target)
        how = isolation.how_it_ended(died.exitcode)
        words = words_of(f"the compiler's process died: {how}", log, died=True)
        _require_room(log.parent)
        status, no_memory = "crashed", bool(_NO_MEMORY.search(_printed(log)))
    except BrokenProcessPool as error:
        raise OSError(
            "a compiler's process ended before it took a configuration, and no row is guilty of "
            "that: look what kills processes here; what was finished is kept"
        ) from error
    except Exception as error:
        _require_room(log.parent, error)
        # Neither the kernel's fault nor worth the sweep: the row says what it was.
        status, words = "crashed", words_of(f"{type(error).__name__}: {error}", log)
        # Of Python, or of a `fork` for ptxas.
        no_memory = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
    if no_memory:
        status, words = "out_of_host_memory", f"needs more than {memory:,} bytes: {words}"
    return stamped(status, words, target)


def _require_room(folder: Path, failed: Exception | None = None) -> None:
    """Blame nobody who failed where the disk is full.

    What writes there fails as it likes: the linker by SIGBUS, cuobjdump by an exit code.

    Args:
        folder: where compilers write.
        failed: what one of them raised.
    Raises:
        OSError: there is no room for what a compile writes.
    """
    try:
        if isinstance(failed, OSError) and disk.is_full(failed):
            raise failed
        disk.require_room(folder, _ROOM)
    except OSError as error:
        if disk.is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent)) from None


def _printed(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def words_of(message: str, log: Path, died: bool = False) -> str:
    """Join what was raised with what the compiler printed as errors."""
    printed = _printed(log).splitlines()
    errors = [line.strip() for line in printed if "error" in line.lower()]
    if died and not errors:
        errors = printed[-5:]
    # The frontend quotes the whole kernel before it comes to the point, ptxas all of its input.
    lines = [line for line in message.splitlines() if line.strip(" ^")]
    point = lines
    if len(lines) > 4:
        wrong = [line for line in lines[1:-2] if re.search(r"\berror\b", line)]
        point = [lines[0], "...", *wrong[:2], *lines[-2:]]
    text = "\n".join([*point, *dict.fromkeys(errors[:3])])
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."


def _compile_one(
    question: Question | CapturedLaunch, mode: str, log: Path, cache: Path | None = None
) -> dict[str, Any]:
    """Answer in a worker, whose stdout and stderr are the compiler's diary."""
    # What a worker leaves that is killed goes with the log's folder.
    tempfile.tempdir = os.environ["TMPDIR"] = str(log.parent)
    with log.open("w") as diary:
        # Where ptxas fails, Triton prints all of its input to stdout.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(diary.fileno(), stream.fileno())
        return answer(question, mode, cache)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def half_of_memory() -> int:
    """Give half of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
