"""Somebody's own script or tests, told without a GPU: which of its launches fit the LDS.

The command runs unchanged on tensors without values and a driver that launches nothing
(`stand_in`). Each launch it makes is written down with the line and the test it came from;
the kernels are then compiled here, in workers, each distinct one once.

What only a GPU can tell stays untold and is listed: a script that reads a value back stops
there, as `not_captured` says, and what it launched before is kept. Comparisons of results
are passed over. Kernels that ``torch.compile`` would generate are not made: it is off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compiler, records, scratch, stand_in, sweep, targets
from .answers import TIMEOUT_S, compile_all, cores, words_of
from .stand_in import recorder

if TYPE_CHECKING:
    import pandas as pd

# Every column, in order, with its pandas type.
COLUMNS = {
    "kernel": "string",  # module:name
    "launched_from": "string",  # file:line, of the launch or of what stopped
    "launches": "Int64",  # how often; 0 where an autotuner only tried it, or a warmup
    "tests": "object",  # ids of the pytest tests that came by
    "configs": "Int64",  # among how many an autotuner chooses; 1 where there is none
    "target": "string",
    "triton": "string",
    "num_warps": "Int64",
    "num_stages": "Int64",
    "async_copy": "boolean",  # missing where the target has no such switch
    "status": "string",  # one of STATUSES
    "reason": "string",
    "lds_bytes": "Int64",
    "lds_limit": "Int64",  # bytes
    "tmem_columns": "Int64",
    "method": "string",
}

# Of a launch, what `records` says; of the rest:
STATUSES = {
    **records.STATUSES,
    "not_captured": "only a GPU could tell what was asked here; `launches` counts how often",
    "stopped": "a test, or the command itself, ended because of that",
    "failed": "a test, or the command itself, ended in an error of its own",
}

# Of a reason's first line, in a table.
_REASON_CHARACTERS = 90

_LAUNCHED = tuple(records.STATUSES)


class CaptureError(Exception):
    """The command can't be captured; the message says why and what to change."""


@dataclass(frozen=True)
class Capture:
    """What a command did, and what the compiler says of it.

    Args:
        rows: dictionaries with the names of `COLUMNS`: the launches, then what was not told.
        exit_code: the command's own; negative where a signal ended it.
        run_s, compile_s: time that the command took, and the compiler after it.
    """

    rows: list[dict[str, Any]]
    exit_code: int
    run_s: float
    compile_s: float

    @property
    def launched(self) -> list[dict[str, Any]]:
        """Rows of launches, those that were only tried among them."""
        return [row for row in self.rows if row["status"] in _LAUNCHED]

    @property
    def unfit(self) -> list[dict[str, Any]]:
        """Rows of launches that a GPU would refuse.

        A configuration that an autotuner can pass over is none of them.
        """
        return [row for row in self.launched if row["status"] != "ok" and row["launches"]]


def run(
    command: Sequence[str],
    target: str,
    *,
    async_copy: str = "default",
    jobs: int | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: bool = True,
) -> Capture:
    """Run a command without a GPU and tell the LDS of every launch.

    What the command prints goes to stderr. ``python`` and ``pytest`` are those beside this
    interpreter, so that both sides have one Triton.

    Args:
        command: a program and its arguments; any that runs Python.
        target: as in `moelab targets`.
        async_copy: ``on``, ``off``, or ``default``: as the command's Triton has it.
        jobs: processes that compile; None takes every core.
        timeout_s: after this a compile is ended and its row says so.
        progress: show on stderr how many kernels are left.
    Raises:
        ValueError: no such target, or an async copy that it can't have.
        CaptureError: the command can't be started, or has another Triton.
    """
    found = targets.get(target)
    if async_copy not in ("on", "off", "default"):
        raise ValueError(f"async copy {async_copy!r}: expected on, off or default")
    if async_copy == "on" and not found.async_copy_switch:
        raise ValueError(f"async copy on: {target} has no such switch; leave it at default")
    with scratch.folder() as folder:
        began = time.monotonic()
        with _guarded(folder):
            exit_code = _run(command, target, folder)
        ran = time.monotonic()
        events = list(_events(folder))
        files = sorted(folder.glob("*.launch"))
        kept = {file.stem: json.loads(file.read_text()) for file in files}
    answers = _answers(kept, async_copy, jobs, timeout_s, progress)
    rows = [*_launches(events, kept, answers), *_untold(events, target)]
    return Capture(rows, exit_code, ran - began, time.monotonic() - ran)


# Ends every process that has a folder in its environment, unless it is told that all is well.
_GUARD = """
import glob, os, signal, sys, time
left = not sys.stdin.read()
while left:
    left = False
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as environment:
                if os.fsencode(sys.argv[1]) in environment.read():
                    os.kill(int(path.split("/")[2]), signal.SIGKILL)
                    left = True
        except OSError:
            pass
    time.sleep(0.01)
"""


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Let nothing of a command outlive this process where that is killed.

    A command starts what it likes, `make` or a shell in between. All of that has the folder in
    its environment, and a process of our own hears by the end of a pipe that this one ended.
    """
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as guard:
        try:
            yield
        finally:
            guard.communicate(b"all is well")


_BOOTSTRAP = """
import importlib, sys
sys.path.remove({folder!r})
sys.path.append({package!r})
from moelab import stand_in
sys.path.remove({package!r})
stand_in.install()
# The one that this hides.
hiding = sys.modules.pop("sitecustomize")
try:
    importlib.import_module("sitecustomize")
except ImportError:
    sys.modules["sitecustomize"] = hiding
"""


def _run(command: Sequence[str], target: str, folder: Path) -> int:
    """Run the command with the stand-in in every Python that it starts."""
    package = Path(__file__).parents[1]
    bootstrap = folder / "start"
    bootstrap.mkdir()
    (bootstrap / "sitecustomize.py").write_text(
        _BOOTSTRAP.format(folder=str(bootstrap), package=str(package))
    )
    environment = {
        **os.environ,
        stand_in.VARIABLE: json.dumps({"folder": str(folder), "target": target}),
        "PYTHONPATH": _joined(str(bootstrap), os.environ.get("PYTHONPATH")),
        "PATH": _joined(str(Path(sys.executable).parent), os.environ.get("PATH")),
        "PYTEST_PLUGINS": ",".join(
            filter(None, ("moelab.stand_in.pytest_plugin", os.environ.get("PYTEST_PLUGINS")))
        ),
        # Eager: what Inductor would generate is not asked about.
        "TORCHDYNAMO_DISABLE": "1",
    }
    # Triton's interpreter launches nothing, the target is the one that is asked about, and the
    # test is that of whoever asks.
    for name in ("TRITON_INTERPRET", "TRITON_OVERRIDE_ARCH", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    try:
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno())
    except OSError as error:
        raise CaptureError(f"{command[0]}: {error.strerror}; give a program after --") from None
    # Who ends this ends the command, and what it did until then is told.
    listens = threading.current_thread() is threading.main_thread()
    if listens:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The command hears this without being told.
                continue
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)


def _joined(first: str, rest: str | None) -> str:
    return os.pathsep.join(filter(None, (first, rest)))


def _events(folder: Path) -> Iterator[dict[str, Any]]:
    """Read what all processes wrote; whatever killed one may have torn its last line."""
    for path in sorted(folder.glob("*.events")):
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _answers(
    kept: Mapping[str, Mapping[str, Any]],
    async_copy: str,
    jobs: int | None,
    timeout_s: float,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Answer every kept launch: equal ones once, what the frontend refused with its words."""
    answers: dict[str, dict[str, Any]] = {}
    questions: dict[str, Any] = {}
    asked: dict[str, list[str]] = defaultdict(list)
    installed = compiler.triton_version()
    for key, launch in kept.items():
        if launch["triton"] != installed:
            raise CaptureError(
                f"the command has Triton {launch['triton']}, moelab {installed}: install moelab "
                "where the command's Python is"
            )
        if "error" in launch:
            answers[key] = {
                "status": "compile_error",
                "reason": words_of(launch["error"], Path(os.devnull)),
                "lds_limit": targets.get(launch["target"]).lds_limit,
            }
            continue
        question = recorder.question(launch, async_copy)
        same = hashlib.sha256(repr(question).encode()).hexdigest()[:16]
        questions[same] = question
        asked[same].append(key)
    with sweep.progress_bar(len(questions), len(questions), progress) as bar:
        for found in compile_all(questions, "lds", jobs or cores(), timeout_s):
            for same, answer in found.items():
                for key in asked[same]:
                    answers[key] = answer | {"async_copy": questions[same].async_copy}
            bar.update(len(found))
    return answers


def _launches(
    events: Iterable[Mapping[str, Any]],
    kept: Mapping[str, dict[str, Any]],
    answers: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Make a row of every kernel that was launched, or tried, from a line.

    Of an autotuner's configurations the first that fits is the one launched.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event["event"] != "launch":
            continue
        keys = [key for key in event["keys"] if key in answers]
        fits = [key for key in keys if answers[key]["status"] == "ok"]
        for key in keys:
            row = rows.setdefault(
                (key, event["from"]),
                _row(
                    kept[key] | answers[key] | {"launched_from": event["from"]}, configs=len(keys)
                ),
            )
            if event["test"] and event["test"] not in row["tests"]:
                row["tests"].append(event["test"])
            if key == (fits or keys)[0]:
                row["launches"] += event["times"]
    return list(rows.values())


def _untold(events: Iterable[Mapping[str, Any]], target: str) -> list[dict[str, Any]]:
    """Make a row of every line that asked for what only a GPU could tell, and of every end."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for event in events:
        if event["event"] == "launch":
            continue
        status = event["event"]
        if status == "ended":
            status = "failed" if event["captured"] else "stopped"
        row = rows.setdefault(
            (status, event["from"], event["reason"]),
            _row(
                {
                    "status": status,
                    "reason": event["reason"],
                    "launched_from": event["from"],
                    "target": target,
                }
            ),
        )
        row["launches"] += 1
        if event["test"] and event["test"] not in row["tests"]:
            row["tests"].append(event["test"])
    return sorted(rows.values(), key=lambda row: list(STATUSES).index(row["status"]))


def _row(known: Mapping[str, Any], configs: int | None = None) -> dict[str, Any]:
    row = {name: known.get(name) for name in COLUMNS}
    return row | {"launches": 0, "tests": [], "configs": configs}


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Make rows a frame with every column of `COLUMNS`, in order and typed."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(COLUMNS)).astype(COLUMNS)


def table(rows: pd.DataFrame) -> str:
    """Show launches as lines that can be read, and below them what was not told.

    What does not fit comes first, then what takes most; kernels go by their own names. What
    an autotuner only tried, and fits, is left to the rows.
    """
    rows = rows[(rows["launches"] > 0) | (rows["status"] != "ok")]
    rows = rows.assign(
        kernel=rows["kernel"].str.split(":").str[-1], fits=rows["status"] == "ok"
    ).sort_values(["fits", "lds_bytes"], ascending=[True, False], kind="stable")
    launched = rows["status"].isin(_LAUNCHED)
    reasons = rows["reason"].str.split("\n").str[0].str.slice(0, _REASON_CHARACTERS)
    counts = rows.assign(tests=rows["tests"].map(len), reason=reasons)
    parts = []
    for part, columns in (
        (
            counts[launched],
            "kernel launched_from launches tests configs num_warps num_stages async_copy "
            "lds_bytes lds_limit status",
        ),
        (counts[~launched], "status launched_from launches tests reason"),
    ):
        if len(part):
            shown = part[columns.split()].rename(columns={"launched_from": "from"})
            if not shown["tests"].any():
                shown = shown.drop(columns="tests")
            # pandas prints <NA> of nullable types whatever `na_rep` says.
            shown = shown.astype(object).where(shown.notna(), "-")
            parts.append(shown.to_string(index=False))
    return "\n\n".join(parts)


def summary(captured: Capture) -> str:
    """Say in a few lines what was launched, what does not fit, and what was not told."""
    launched, unfit = captured.launched, captured.unfit
    lines = [
        f"{sum(row['launches'] for row in launched)} launches of "
        f"{len({row['kernel'] for row in launched})} kernels, {len(launched)} distinct; "
        f"the command took {captured.run_s:.1f} s and ended with {captured.exit_code}, "
        f"the compiler {captured.compile_s:.1f} s."
    ]
    refused: dict[str, int] = defaultdict(int)
    for row in unfit:
        refused[f"{row['launched_from']} ({row['status']})"] += row["launches"]
    tried = sum(row["status"] != "ok" for row in launched) - len(unfit)
    lines.append(
        "Launches that do not fit: "
        + (", ".join(f"{count} at {line}" for line, count in refused.items()) or "none")
        + (f"; {tried} configurations that were only tried." if tried else ".")
    )
    for status, what in (
        ("not_captured", "Not told without a GPU"),
        ("stopped", "Tests or scripts that stopped there"),
        ("failed", "Tests or scripts that failed on their own"),
    ):
        if count := sum(row["launches"] for row in captured.rows if row["status"] == status):
            lines.append(f"{what}: {count}.")
    return "\n".join(lines)
