"""Folders for what only this process needs, which go with it however it ends.

A folder is locked by whoever made it, and the system gives up the lock of a process that ends,
killed or not. A folder of that kind that nobody holds any more is deleted by the next process
that makes one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "moelab-"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make a folder in the temporary folder, and delete it and what is in it at the end.

    Raises:
        OSError: it can't be made.
    """
    _delete_left(tempfile.gettempdir())
    made, lock = _locked()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _locked() -> tuple[Path, int]:
    """Make a folder and lock it, unless somebody takes it for left before it is locked."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            lock = os.open(made / _lock_name(), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        # Where locks are not known, nobody can take it for left either.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return made, lock
        os.close(lock)


@functools.cache
def _delete_left(place: str) -> None:
    """Delete the folders that ended processes left, once in a process.

    Only one's own folders, and never by a link. What another machine made in a shared folder is
    left alone, for its locks may not be seen here, and so is a folder without a lock: somebody is
    just making it, or it is another's.
    """
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if not entry.name.startswith(_PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    _delete_if_left(Path(entry.path))


def _delete_if_left(made: Path) -> None:
    """Delete a folder, or raise OSError where its owner lives or its lock is not ours to see."""
    lock = os.open(made / _lock_name(), os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(made, ignore_errors=True)
    finally:
        os.close(lock)


@functools.cache
def _lock_name() -> str:
    """Name the lock after this start of this machine, containers of it among them."""
    with contextlib.suppress(OSError):
        return f".lock-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return f".lock-{os.uname().nodename}"
