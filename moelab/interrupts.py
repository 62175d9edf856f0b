"""SIGTERM, which batch systems send, ends a command as Ctrl-C does; and who hears neither."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Ended:
    """How a command was told to end.

    Args:
        by: the signal.
    """

    by: int = signal.SIGINT


@contextlib.contextmanager
def terminable() -> Iterator[Ended]:
    """Raise KeyboardInterrupt on SIGTERM, too, and tell afterwards which signal it was.

    Only a main thread hears signals: elsewhere nothing changes.
    """
    ended = Ended()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return

    def end(number: int, _frame: Any) -> None:
        # Sent again, it must not end the clearing up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ended.by = number
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Let the processes that this thread starts meanwhile hear no Ctrl-C, from their first moment.

    They inherit that it is blocked. Python would end with a traceback before it comes to
    ignoring it itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
