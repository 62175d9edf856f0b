"""What a captured process writes down: a line for every launch, a file for every kernel.

Each line is one write in append mode to a file of the process's own, so that whatever ends
the process leaves all that was said before.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from ..specs import CapturedLaunch

_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})

# Packages that stand between a line and what it asked for.
_BETWEEN = ("torch", "triton", "numpy", "typing_extensions", "_pytest", "pluggy")


class NotCaptured(Exception):
    """The process asked for something that only a GPU could have told."""


class _Recorder:
    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.cwd = os.getcwd()
        self.process, self.file = 0, -1

    def write(self, line: bytes) -> None:
        if self.process != os.getpid():
            # The first line, or the first one after a fork. Other threads may come by: the
            # process is noted when there is a file to write to.
            path = self.folder / f"{os.getpid()}.events"
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self.process = os.getpid()
        os.write(self.file, line)


_recorder: _Recorder


def start(folder: str) -> None:
    """Write to a folder from now on, also of what ends the process."""
    global _recorder
    _recorder = _Recorder(folder)
    shown = sys.excepthook

    def note_and_show(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        ended(error)
        shown(kind, error, trace)

    sys.excepthook = note_and_show
    shown_of_thread = threading.excepthook

    def note_and_show_of_thread(died: Any) -> None:
        if died.exc_value is not None and died.exc_type is not SystemExit:
            ended(died.exc_value)
        shown_of_thread(died)

    threading.excepthook = note_and_show_of_thread


def event(kind: str, where: str | None = None, **said: Any) -> None:
    """Write one line: what happened, at which line of whose code, in which test."""
    line = {"event": kind, "from": where or here(), "test": _test(), **said}
    _recorder.write((json.dumps(line) + "\n").encode())


def keep(launch: dict[str, Any]) -> str:
    """Write down what a worker needs to compile a launch, once; returns its key."""
    text = json.dumps(launch, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = _recorder.folder / f"{key}.launch"
    if not path.exists():
        # Whole or not at all: several processes and threads may come upon the same launch.
        part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        part.write_text(text)
        part.rename(path)
    return key


def kept(key: str) -> Path:
    """Name the file of a launch."""
    return _recorder.folder / f"{key}.launch"


def question(kept: Mapping[str, Any], async_copy: str) -> CapturedLaunch:
    """Ask about a launch that was kept.

    Args:
        async_copy: ``on`` or ``off`` overrules what the process had; ``default`` doesn't.
    """
    decided = kept["async_copy"]
    if decided is not None and async_copy != "default":
        decided = async_copy == "on"
    return CapturedLaunch(
        ir=kept["ir"],
        stage=kept["stage"],
        options=json.dumps(kept["options"]),
        environment=json.dumps(kept["environment"]),
        num_warps=kept["num_warps"],
        num_stages=kept["num_stages"],
        async_copy=decided,
        target=kept["target"],
    )


def refuse(reason: str) -> NoReturn:
    """Say what can't be told without a GPU, and stop whoever asked.

    Raises:
        NotCaptured: always.
    """
    event("not_captured", reason=reason)
    raise NotCaptured(f"{reason}: only a GPU could tell")


def passed_over(reason: str) -> None:
    """Say what was not done, where going on is better than stopping."""
    event("not_captured", reason=reason)


def ended(error: BaseException) -> None:
    """Write down the error that ended a test or the whole process."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NotCaptured):
        cause = cause.__cause__ or cause.__context__
    frames = [frame for frame, _ in traceback.walk_tb((cause or error).__traceback__)]
    event(
        "ended",
        _outside(frames[::-1]) or "?",
        reason=" ".join(f"{type(error).__name__}: {error}".split())[:400],
        captured=cause is None,
    )


def here() -> str:
    """Name the innermost line that is neither PyTorch's, Triton's, pytest's nor ours."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return _outside(frames) or "?"


def _outside(frames: list[FrameType]) -> str | None:
    """Name the first frame, innermost first, of code that somebody wants to hear about."""
    here = os.path.dirname(__file__)
    inside = (here + os.sep, os.path.join(os.path.dirname(here), "compiler", ""))
    for frame in frames:
        path = frame.f_code.co_filename
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        # The standard library lies in front of what is installed.
        standard = path.startswith(_STANDARD) and not path.startswith(_INSTALLED)
        if package in _BETWEEN or path.startswith(("<", *inside)) or standard:
            continue
        return f"{_short(path)}:{frame.f_lineno}"
    return None


def _short(path: str) -> str:
    """Shorten a path by the folder it was run in, or by the one it was imported from."""
    for folder in (_recorder.cwd, *sorted(filter(None, sys.path), key=len, reverse=True)):
        if path.startswith(folder.rstrip(os.sep) + os.sep):
            return os.path.relpath(path, folder)
    return path


def _test() -> str | None:
    """Name the running test, which pytest keeps in the environment: ``ID (call)``."""
    test = os.environ.get("PYTEST_CURRENT_TEST")
    return test.rpartition(" (")[0] if test else None
