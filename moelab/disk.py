"""Files that are whole or not there, and disks that are full.

A new file takes an old one's place in one step, when the disk has it: a crash, a kill or a full
disk leaves the old one as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# No room on the disk, in the user's quota, or below the process's limit of a file's size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Tell a full disk from what else may fail."""
    return isinstance(error, DiskFullError) or error.errno in _FULL


class DiskFullError(OSError):
    """There is no room for a row or a file; what was acknowledged before is kept."""


@contextlib.contextmanager
def room_at(path: Path) -> Iterator[None]:
    """Say of a full disk what to do about it.

    Raises:
        DiskFullError: in the place of the system's own error.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error) or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            f"{error.filename or path}: {error.strerror or error}. The rows that were finished "
            "are kept; make room and run the same again: it goes on from there"
        ) from None


def replace(path: Path, content: bytes | str) -> None:
    """Write a file, whole or not at all, and wait until the disk has it.

    Args:
        path: in a folder that is there; an existing file is replaced, a device written to.
        content: text is written as UTF-8.
    Raises:
        DiskFullError: there is no room; what was there before stays.
        OSError: it can't be written; likewise.
    """
    written = content.encode() if isinstance(content, str) else content
    with room_at(path):
        if path.exists() and not path.is_file():
            path.write_bytes(written)
            return
        # What a link names is replaced, not the link.
        path = Path(os.path.realpath(path))
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                partial.chmod(path.stat().st_mode)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and what it lies in, where they are missing.

    Raises:
        DiskFullError: there is no room.
        OSError: it can't be made.
    """
    with room_at(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a new name in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_room(folder: Path, size: int) -> None:
    """Tell whether a file of so many bytes finds room.

    Raises:
        OSError: it does not; `is_full` says whether that is why.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
