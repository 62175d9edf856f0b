"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from moelab import disk


def test_a_file_keeps_its_mode_and_a_link_to_it_stays_a_link(tmp_path):
    path, link = tmp_path / "of rows", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    disk.replace(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert set(tmp_path.iterdir()) == {path, link}


def test_what_is_no_file_is_written_to(tmp_path):
    disk.replace(Path(os.devnull), "gone")
    with pytest.raises(disk.DiskFullError):
        disk.replace(Path("/dev/full"), "gone")


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, monkeypatch, step):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device", str(path))

    if step == "write":
        monkeypatch.setattr(disk.Path, "open", full)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(disk.Path, "replace", full)
    with pytest.raises(disk.DiskFullError, match="make room and run the same again") as error:
        disk.replace(path, "new")
    assert disk.is_full(error.value)
    monkeypatch.undo()
    assert [of.name for of in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"
