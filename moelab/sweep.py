"""Questions become rows: compiled on all cores, journalled as they come.

Launches that compile to the same code are compiled once, and each question gets its
row. A second run compiles only what no row of the store answers yet; what crashed,
timed out or ran out of memory is asked again. Each compile has a time and a memory limit in
a process of its own, which ends with this one: a kernel that kills its compiler costs a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import cluster, compiler, disk, interrupts, isolation, records, targets, toolchain
from .answers import LEAST_MEMORY, TIMEOUT_S, compile_all, cores
from .launches import LaunchError
from .specs import Configuration, KernelLaunch, Question

if TYPE_CHECKING:
    import pandas as pd

# That a process of another Triton has to end its workers and remove its folders.
_CLEARED_UP_S = 1.5

Q = TypeVar("Q", bound=Configuration | KernelLaunch)


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
    dask: str | None = None,
) -> pd.DataFrame:
    """Answer every question from the store or the compiler.

    Args:
        store: folder of journals; made if missing.
        full: compile to machine code too, for registers, spills and occupancy.
        maps: tell what takes the LDS, too, which takes a tenth more time; ``full`` does.
        jobs: processes of this machine; None takes every core.
        progress: show on stderr how many questions are left.
        timeout_s: after this a compile is ended and its row says so.
        memory: bytes that a compile may take; None is half of the machine's.
        triton: which one answers, as `toolchain.find` names it; None is this process's.
        dask: the cluster that compiles, as `cluster.connected` takes it; None is this machine.
    Returns:
        one row per question, in their order: `records.COLUMNS`.
    Raises:
        ValueError: fewer than one job, too little memory, jobs or another Triton beside a
            cluster, or a launch that does not describe its kernel.
        OSError: the store can't be written to; `disk.DiskFullError` where it is full.
        ToolchainError: no such Triton, or it does not start.
        ClusterError: the cluster can't answer; `cluster.ClusterLostError` where it is lost
            meanwhile. The rows that were finished are in the store.
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
        "dask": dask,
    }
    store = Path(store)
    chosen = toolchain.find(triton)
    if dask is not None:
        _check_cluster(dask, jobs, chosen)
    if chosen.is_here:
        return records.of_values(_answered(questions, store, **options))
    return records.of_values(_answered_by(chosen, questions, store, options))


def _check_cluster(dask: str, jobs: int | None, chosen: toolchain.Toolchain) -> None:
    """Refuse what a cluster has no use for."""
    cluster.check(dask)
    if jobs is not None and dask != "local":
        raise ValueError(
            f"jobs = {jobs} beside the cluster {dask}: leave it out; a cluster does as much at "
            "once as its workers have threads, `dask worker --nthreads`"
        )
    if not chosen.is_here:
        raise ValueError(
            f"triton = {chosen.name} beside the cluster {dask}: workers answer with the Triton "
            "that they were started with; start them, and this, in an environment that has "
            f"{chosen.name}"
        )


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
) -> list[list[Any]]:
    """Let a process of another Triton answer, which writes to the same store."""
    request = pickle.dumps((questions, store.absolute(), options))
    with chosen.environment() as environment:
        with interrupts.kept_from_children():
            process = subprocess.Popen(
                [chosen.python, "-c", f"from moelab import sweep; sweep.serve({os.getpid()})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        try:
            out, _ = process.communicate(request)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; what {chosen.name} finished is in {store}, and the same command "
                "asks only for the rest"
            ) from None
        finally:
            _end(process)
    lines = out.splitlines()
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


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that clears up when it is asked to, if it is not at its end."""
    process.terminate()
    try:
        process.wait(_CLEARED_UP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# What `_answered` raises of a question, the narrowest first.
_RAISED = {
    "LaunchError": LaunchError,
    "ValueError": ValueError,
    "DiskFullError": disk.DiskFullError,
    "OSError": OSError,
}


def serve(parent: int) -> None:
    """Answer a request of `_answered_by`: pickled on stdin, rows as JSON on stdout.

    Args:
        parent: who asks; SIGTERM is how it says that an answer is wanted no more.
    """
    isolation.die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever else prints must not be taken for the reply.
    reply_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    questions, store, options = pickle.load(sys.stdin.buffer)
    try:
        with interrupts.terminable():
            reply: dict[str, Any] = {"rows": list(_answered(questions, store, **options))}
    except tuple(_RAISED.values()) as error:
        kind = next(name for name, kind in _RAISED.items() if isinstance(error, kind))
        reply = {"error": str(error), "kind": kind}
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
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
    dask: str | None,
) -> Iterator[tuple[Any, ...]]:
    """Answer with this process's Triton, or with that of a cluster's workers.

    Returns:
        each question's row, as its values in the order of `records.COLUMNS`: of a million
        questions a dict for each would take gigabytes.
    """
    keys: dict[tuple[Any, ...], str] = {}
    asked = [records.key(asked_row(settled(question), mode, keys)) for question in questions]
    known, stored = _known(asked, store, mode)
    missing: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(asked):
        if known[key] is None:
            missing[key[_COMPILE_KEY]].append(index)
    if missing:
        to_compile = {
            key: settled(questions[indices[0]])
            for key, indices in missing.items()
            if key not in stored
        }
        jobs = jobs or cores()
        if dask is None:
            compiled = compile_all(to_compile, mode, jobs, timeout_s, memory=memory)
        else:
            compiled = cluster.compile_all(to_compile, mode, dask, jobs, timeout_s, memory)
        answers = itertools.chain(
            _in_parts({key: stored[key] for key in missing if key in stored}),
            ({key: records.key(found[key], records.ANSWER) for key in found} for found in compiled),
        )
        left = sum(map(len, missing.values()))
        try:
            with (
                contextlib.closing(compiled),
                records.Journal(store) as journal,
                disk.room_at(store),
                progress_bar(len(asked), left, progress) as bar,
            ):
                # What came together is written together: each `append` waits for the disk.
                for found in answers:
                    new = {asked[i]: answer for key, answer in found.items() for i in missing[key]}
                    journal.append(*(records.row(key + answer) for key, answer in new.items()))
                    known |= new
                    done = sum(len(missing[key]) for key in found)
                    left -= done
                    bar.update(done)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; {len(asked) - left} of {len(asked)} rows are in {store}, and the "
                f"same command asks only for the other {left}"
            ) from None
        except cluster.ClusterError as error:
            raise type(error)(
                f"{error}\n{len(asked) - left} of {len(asked)} rows are in {store}; with a "
                f"cluster that works the same command asks only for the other {left}"
            ) from None
    return (key + known[key] for key in asked)


def _in_parts(answers: dict[str, Any], size: int = 100) -> Iterator[dict[str, Any]]:
    """Give some answers at a time: each may have hundreds of rows."""
    left = iter(answers.items())
    while part := dict(itertools.islice(left, size)):
        yield part


_COMPILE_KEY = records.KEY.index("compile_key")


def _known(
    asked: Sequence[tuple[Any, ...]], store: Path, mode: str
) -> tuple[dict[tuple[Any, ...], Any], dict[Any, tuple[Any, ...]]]:
    """Look up what is asked in the store.

    Returns:
        answers by key, None where there is none; and by compile key, for another question's
        row may answer what compiles to the same code.
    """
    known = dict.fromkeys(asked)
    stored: dict[Any, tuple[Any, ...]] = {}
    compile_keys = {key[_COMPILE_KEY] for key in known}
    # Most answers are like others: each is kept once.
    once: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for row in records.journalled(store, aside=True):
        compile_key = row.get("compile_key")
        if compile_key not in compile_keys or row.get("mode") != mode:
            continue
        if row["status"] in records.UNANSWERED:
            continue
        answer = records.key(row, records.ANSWER)
        answer = stored[compile_key] = once.setdefault(answer, answer)
        key = records.key(row)
        if key in known:
            known[key] = answer
    return known, stored


def compiled(
    rows: Mapping[Configuration, Mapping[str, Any]],
    store: Path | str,
    cache: Path,
    jobs: int | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Tell the LDS of every question, and compile to the end what fits.

    Args:
        rows: started by `asked_row`.
        cache: folder of a Triton cache, in which the code is left.
    Returns:
        a row's second half by compile key.
    """
    # What can't fit is not compiled to the end either.
    told = run(list(rows), store, jobs=jobs, progress=progress).to_dict("records")
    answers = {row["compile_key"]: answer_of(row) for row in told}
    fitting = {
        row["compile_key"]: of
        for of, row in rows.items()
        if answers[row["compile_key"]]["status"] == "ok"
    }
    with progress_bar(len(fitting), len(fitting), progress) as bar:
        for found in compile_all(fitting, "full", jobs or cores(), TIMEOUT_S, cache):
            for key, answer in found.items():
                # A compiler that dies later leaves what was told of the LDS.
                answers[key] |= answer
            bar.update(len(found))
    return answers


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


def asked_row(
    question: Question, mode: str, keys: dict[tuple[Any, ...], str] | None = None
) -> dict[str, Any]:
    """Start a question's row: everything that is asked.

    Args:
        keys: of many questions, what `compiler.compile_key` keeps from one to the next.
    """
    return question.asked() | {
        "triton": compiler.triton_version(),
        "mode": mode,
        "compile_key": _compile_key(question, {} if keys is None else keys),
    }


def _compile_key(question: Question, keys: dict[tuple[Any, ...], str]) -> str:
    """Give what launches share that compile to the same code; what is refused has its own."""
    try:
        return compiler.compile_key(question, keys)
    except compiler.CompileError:
        return hashlib.sha256(repr(question).encode()).hexdigest()[:16]


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """Take a row's second half: what was answered."""
    return {name: value for name, value in row.items() if name not in records.KEY}
