"""Questions become rows: compiled on all cores, journalled as they come.

Launches that compile to the same code are compiled once, and each question gets its
row. A second run compiles only what no row of the store answers yet; what crashed,
timed out or ran out of memory is asked again. Each compile has a time and a memory limit in
a process of its own, which ends with this one: a kernel that kills its compiler costs a row.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import __version__, compiler, lds_map, records, targets, toolchain
from .launches import LaunchError
from .specs import CapturedLaunch, Configuration, KernelLaunch, LdsMap, Question

if TYPE_CHECKING:
    import pandas as pd

Q = TypeVar("Q", bound=Configuration | KernelLaunch)

# Of a healthy compile; the longest seen took 40 s, num_stages=64 more than 90 s.
TIMEOUT_S = 120

# What a worker takes before it compiles: 235 MB with a CPU build of PyTorch.
LEAST_MEMORY = 512 << 20

# How LLVM, the C++ library and ptxas end where memory does.
_NO_MEMORY = re.compile(
    r"^(LLVM ERROR: out of memory|.*std::bad_alloc|ptxas\S* fatal *: Memory allocation failure)",
    re.MULTILINE,
)

# A failing ptxas prints thousands of lines.
_REASON_CHARACTERS = 800


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a sweep; the message says what is kept and how to go on."""


def run(
    questions: Sequence[Question],
    store: Path | str,
    *,
    full: bool = False,
    maps: bool = False,
    jobs: int | None = None,
    progress: bool = True,
    timeout_s: float = TIMEOUT_S,
    memory: int | None = None,
    triton: str | None = None,
) -> pd.DataFrame:
    """Answer every question from the store or the compiler.

    Args:
        store: folder of journals; made if missing.
        full: compile to machine code too, for registers, spills and occupancy.
        maps: tell what takes the LDS, too, which takes a tenth more time; ``full`` does.
        jobs: processes; None takes every core.
        progress: show on stderr how many questions are left.
        timeout_s: after this a compile is ended and its row says so.
        memory: bytes that a compile may take; None is half of this machine's.
        triton: which one answers, as `toolchain.find` names it; None is this process's.
    Returns:
        one row per question, in their order: `records.COLUMNS`.
    Raises:
        ValueError: fewer than one job, too little memory, or a launch that does not describe
            its kernel.
        OSError: the store can't be written to; `records.DiskFullError` where it is full.
        ToolchainError: no such Triton, or it does not start.
        Interrupted: Ctrl-C; the rows that were finished are in the store.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs = {jobs}; give 1 or more, or leave it out for every core")
    if memory is not None and memory < LEAST_MEMORY:
        raise ValueError(
            f"memory = {memory:,} bytes; a compiler needs {LEAST_MEMORY:,} to start: give more"
        )
    options: dict[str, Any] = {
        "mode": "full" if full else "map" if maps else "lds",
        "jobs": jobs,
        "progress": progress,
        "timeout_s": timeout_s,
        "memory": memory,
    }
    store = Path(store)
    chosen = toolchain.find(triton)
    if chosen.is_here:
        return records.frame(_answered(questions, store, **options))
    return records.frame(_answered_by(chosen, questions, store, options))


def each(
    questions: Sequence[Question], store: Path | str, tritons: Sequence[str | None], **options: Any
) -> pd.DataFrame:
    """Ask several Tritons one after the other; see `run`.

    Args:
        tritons: as `toolchain.find` names them; none is this process's.
    Returns:
        the rows of each, in order.
    Raises:
        ToolchainError: one is not there; then nothing is asked.
    """
    import pandas as pd

    for name in tritons:
        toolchain.find(name)
    chosen = tritons or [None]
    return pd.concat(
        [run(questions, store, triton=name, **options) for name in chosen], ignore_index=True
    )


def _answered_by(
    chosen: toolchain.Toolchain,
    questions: Sequence[Question],
    store: Path,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Let a process of another Triton answer, which writes to the same store."""
    request = pickle.dumps((questions, store.absolute(), options))
    with chosen.environment() as environment:
        try:
            process = subprocess.run(
                [chosen.python, "-c", "from moelab import sweep; sweep.serve()"],
                input=request,
                stdout=subprocess.PIPE,
                env=environment,
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; what {chosen.name} finished is in {store}, and the same command "
                "asks only for the rest"
            ) from None
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        # Says why, if it is that the Python or its Triton does not start.
        chosen.versions()
        raise toolchain.ToolchainError(
            f"{chosen.name} ended with exit code {process.returncode}; "
            "the rows that it finished are in the store"
        )
    reply = json.loads(lines[-1])
    if "error" in reply:
        raise _RAISED[reply["kind"]](reply["error"])
    return reply["rows"]


# What `_answered` raises of a question, the narrowest first.
_RAISED = {
    "LaunchError": LaunchError,
    "ValueError": ValueError,
    "DiskFullError": records.DiskFullError,
    "OSError": OSError,
}


def serve() -> None:
    """Answer a request of `_answered_by`: pickled on stdin, rows as JSON on stdout."""
    _die_with(os.getppid())
    # Whatever else prints must not be taken for the reply.
    reply_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    questions, store, options = pickle.load(sys.stdin.buffer)
    try:
        reply: dict[str, Any] = {"rows": _answered(questions, store, **options)}
    except tuple(_RAISED.values()) as error:
        kind = next(name for name, kind in _RAISED.items() if isinstance(error, kind))
        reply = {"error": str(error), "kind": kind}
    except KeyboardInterrupt:
        # Whoever asked was interrupted too, and says so.
        sys.exit(128 + signal.SIGINT)
    with os.fdopen(reply_to, "w") as out:
        out.write(json.dumps(reply) + "\n")


def _answered(
    questions: Sequence[Question],
    store: Path,
    mode: str,
    jobs: int | None,
    progress: bool,
    timeout_s: float,
    memory: int | None,
) -> list[dict[str, Any]]:
    """Answer with this process's Triton."""
    questions = [settled(question) for question in questions]
    known = {
        records.key(row): row
        for row in records.journalled(store, aside=True)
        if row["status"] not in records.UNANSWERED
    }
    asked = [asked_row(question, mode) for question in questions]
    missing: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(asked):
        if records.key(row) not in known:
            missing[row["compile_key"]].append(index)
    if missing:
        # Another question's row may answer what compiles to the same code.
        stored = {
            row.get("compile_key"): answer_of(row)
            for row in known.values()
            if row.get("mode") == mode
        }
        to_compile = {
            key: questions[indices[0]] for key, indices in missing.items() if key not in stored
        }
        compiled = compile_all(to_compile, mode, jobs or cores(), timeout_s, memory=memory)
        # What is known at once is written at once: each `append` waits for the disk.
        at_once = {key: stored[key] for key in missing if key in stored}
        answers = itertools.chain([at_once], ({key: answer} for key, answer in compiled))
        left = sum(map(len, missing.values()))
        try:
            with (
                contextlib.closing(compiled),
                records.Journal(store) as journal,
                records.room_at(store),
                progress_bar(len(asked), left, progress) as bar,
            ):
                for found in answers:
                    rows = [asked[i] | found[key] for key in found for i in missing[key]]
                    journal.append(*rows)
                    known |= {records.key(row): row for row in rows}
                    left -= len(rows)
                    bar.update(len(rows))
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; {len(asked) - left} of {len(asked)} rows are in {store}, and the "
                f"same command asks only for the other {left}"
            ) from None
    return [known[records.key(row)] for row in asked]


@contextlib.contextmanager
def progress_bar(total: int, left: int, progress: bool, what: str = "compile") -> Iterator[Any]:
    """Show what is left, on stderr; of a notebook's runner where it says which."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        stream = sys.stderr
        with contextlib.suppress(KeyError, OSError):
            stream = stack.enter_context(open(os.environ["MOELAB_PROGRESS"], "w"))
        yield stack.enter_context(
            tqdm(
                total=total,
                initial=total - left,
                desc=what,
                unit="config",
                leave=False,
                disable=not (progress and left),
                file=stream,
            )
        )


def settled(question: Q) -> Q:
    """Say on or off where the question leaves async copy to the Triton that compiles."""
    if question.async_copy != "default":
        return question
    decided = compiler.default_async_copy(targets.get(question.target))
    return replace(question, async_copy=decided)


def asked_row(question: Question, mode: str) -> dict[str, Any]:
    """Start a question's row: everything that is asked."""
    return question.asked() | {
        "triton": compiler.triton_version(),
        "mode": mode,
        "compile_key": _compile_key(question),
    }


def _compile_key(question: Question) -> str:
    """Give what launches share that compile to the same code; what is refused has its own."""
    try:
        return compiler.specialize(question).key
    except compiler.CompileError:
        return hashlib.sha256(repr(question).encode()).hexdigest()[:16]


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """Take a row's second half: what was answered."""
    return {name: value for name, value in row.items() if name not in records.KEY}


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
    return _stamped(status, reason, target) | found


def _mapped(launch: compiler.Launch) -> tuple[compiler.Allocation, LdsMap]:
    """Ask for the map; a fault in reading it must not cost the bytes."""
    try:
        return compiler.buffers(launch)
    except compiler.MapError as error:
        return compiler.lds(launch), LdsMap(missing=f"a fault of moelab's: {error}")


def _stamped(status: str, reason: str | None, target: targets.Target) -> dict[str, Any]:
    return {
        "status": status,
        "reason": reason,
        "lds_limit": target.lds_limit,
        "moelab": __version__,
        "schema": records.SCHEMA_VERSION,
    }


def compile_all(
    questions: Mapping[str, Question | CapturedLaunch],
    mode: str,
    jobs: int,
    timeout_s: float,
    cache: Path | None = None,
    memory: int | None = None,
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Yield each key's answer as it comes; a failure is an answer too.

    Args:
        mode: one of `records.MODES`.
        cache: a Triton cache to leave the code of a full compile in.
        memory: bytes that a compile may take; None is half of this machine's.
    """
    from pebble import ProcessPool

    if not questions:
        return
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with tempfile.TemporaryDirectory(prefix="moelab-") as logs, _script_left_out():
        pool = ProcessPool(
            max_workers=min(jobs, len(questions)),
            initializer=_start_worker,
            initargs=[os.getpid(), memory],
            # Triton and LLVM threads do not survive a fork.
            context=multiprocessing.get_context("spawn"),
        )
        try:
            keys: dict[Future[Any], str] = {}
            for key, question in questions.items():
                log = Path(logs) / key
                future = pool.schedule(
                    _within, args=[timeout_s, _compile_one, question, mode, log, cache]
                )
                keys[future] = key
            for done in as_completed(keys):
                key = keys[done]
                log = Path(logs) / key
                yield key, _outcome(done, questions[key], log, timeout_s, memory)
            pool.close()
        finally:
            # Whatever ended the loop: no worker compiles on for nobody.
            pool.stop()
            pool.join()


@contextlib.contextmanager
def _script_left_out() -> Iterator[None]:
    """Keep workers from importing the script that sweeps, of which they need nothing.

    One without an ``if __name__ == "__main__"`` would sweep again in each of them.
    """
    script = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {
        name: script[name] for name in ("__file__", "__spec__") if name in script
    }
    script.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        script.update(kept)


def _outcome(
    future: Future[Any],
    question: Question | CapturedLaunch,
    log: Path,
    timeout_s: float,
    memory: int,
) -> dict[str, Any]:
    """Turn a worker's result, its failure or its death into an answer.

    Raises:
        OSError: the disk is full, of which no row is guilty.
    """
    from pebble import ProcessExpired

    target = targets.get(question.target)
    try:
        return future.result()
    except compiler.CompileError as error:
        status, words = "compile_error", words_of(str(error), log)
        no_memory = bool(_NO_MEMORY.search(str(error)))
    except ProcessExpired as died:
        if died.exitcode == -signal.SIGALRM:
            return _stamped("timeout", f"not finished after {timeout_s:g} s", target)
        how = f"exit code {died.exitcode}"
        if died.exitcode is not None and died.exitcode < 0:
            how = signal.Signals(-died.exitcode).name
        words = words_of(f"the compiler's process died: {how}", log, died=True)
        printed = _printed(log)
        if (no_room := os.strerror(errno.ENOSPC)) in printed:
            raise OSError(errno.ENOSPC, no_room, tempfile.gettempdir()) from None
        status, no_memory = "crashed", bool(_NO_MEMORY.search(printed))
    except Exception as error:
        if isinstance(error, OSError) and records.is_full(error):
            raise
        # Neither the kernel's fault nor worth the sweep: the row says what it was.
        status, words = "crashed", words_of(f"{type(error).__name__}: {error}", log)
        # Of Python, or of a `fork` for ptxas.
        no_memory = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
    if no_memory:
        status, words = "out_of_host_memory", f"needs more than {memory:,} bytes: {words}"
    return _stamped(status, words, target)


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
    return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 3] + "..."


def _start_worker(parent: int, memory: int | None = None) -> None:
    """Leave interrupts to the parent, die with it, and take no more memory than is given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool's handler waits until LLVM returns to Python, and the pool three seconds for it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    subprocess.Popen = _Attached  # type: ignore[misc]
    if memory is not None:
        # What a process may write to: RLIMIT_AS counts libraries and reserved addresses, too.
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _Attached(subprocess.Popen[Any]):
    """A worker's ptxas or linker: hanging, it must not outlive the worker that waits for it."""

    def __init__(self, *args: Any, **options: Any):
        worker = os.getpid()
        # LLVM catches interrupts, which would undo that its children ignore them.
        options["preexec_fn"] = lambda: _start_worker(worker)
        super().__init__(*args, **options)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _within(timeout_s: float, compile_one: Callable[..., Any], *arguments: Any) -> Any:
    """Let the kernel end a worker that takes too long, whatever it is in.

    The pool's own timeout reads the wall clock: set forward by an hour, it would end every
    compile; set back, none.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return compile_one(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _compile_one(
    question: Question | CapturedLaunch, mode: str, log: Path, cache: Path | None = None
) -> dict[str, Any]:
    """Answer in a worker, whose stdout and stderr are the compiler's diary."""
    with log.open("w") as diary:
        # Where ptxas fails, Triton prints all of its input to stdout.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(diary.fileno(), stream.fileno())
        return answer(question, mode, cache)


def cores() -> int:
    return len(os.sched_getaffinity(0))
