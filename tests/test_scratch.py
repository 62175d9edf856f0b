"""Temporary folders: gone with their owner, and nobody else's is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import scratch


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A temporary folder that nothing was deleted from yet."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch._delete_left.cache_clear()
    return tmp_path


HOLD = """
import sys
from moelab import scratch
with scratch.folder() as folder:
    (folder / "of its own").write_text("")
    print(folder, flush=True)
    sys.stdin.read()
"""


def holder(place):
    """Start a process with a folder; the process, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | {"TMPDIR": str(place)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def left(place):
    """Leave a folder as a killed process does."""
    process, folder = holder(place)
    process.kill()
    process.communicate()
    assert (folder / "of its own").exists()
    return folder


def test_a_folder_is_gone_at_the_end_whatever_ends_it(place):
    with pytest.raises(KeyboardInterrupt), scratch.folder() as folder:
        (folder / "inner").mkdir()
        assert folder.parent == place
        raise KeyboardInterrupt
    assert list(place.iterdir()) == []


def test_what_killed_processes_left_is_deleted_and_what_is_in_use_is_not(place):
    killed, (process, held) = [left(place) for _ in range(3)], holder(place)
    with scratch.folder() as own:
        assert set(place.iterdir()) == {own, held}
        assert not any(folder.exists() for folder in killed)
    process.communicate("")
    assert list(place.iterdir()) == []


def test_another_users_folder_is_left_alone(place, monkeypatch):
    theirs = left(place)
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    with scratch.folder():
        assert (theirs / "of its own").exists()


def test_no_link_is_followed(place, tmp_path_factory):
    real = left(tmp_path_factory.mktemp("elsewhere"))
    (place / "moelab-link").symlink_to(real)
    with_linked_lock = place / "moelab-lock"
    with_linked_lock.mkdir()
    (with_linked_lock / scratch._lock_name()).symlink_to(real / scratch._lock_name())
    with scratch.folder():
        assert (real / "of its own").exists()
        assert with_linked_lock.exists()


def test_a_folder_without_a_lock_is_left_alone(place):
    users = place / "moelab-rows"
    users.mkdir()
    with scratch.folder():
        assert users.exists()


def test_a_folder_that_is_taken_for_left_before_it_is_locked_is_made_again(place, monkeypatch):
    real, taken = scratch.fcntl.flock, []

    def late(lock, operation):
        if not taken:
            taken.extend(place.iterdir())
            scratch._delete_if_left(taken[0])
        real(lock, operation)

    monkeypatch.setattr(scratch.fcntl, "flock", late)
    with scratch.folder() as folder:
        assert folder.exists()
        assert not taken[0].exists()
