"""Skip what needs a GPU where there is none; stand in for another Triton."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch
    import triton

    if triton.knobs.runtime.interpret:
        reason = "TRITON_INTERPRET=1 runs kernels on the CPU; this shape needs a GPU"
    elif not torch.cuda.is_available():
        reason = "needs a GPU; torch.cuda.is_available() is False"
    else:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Let workers find a GPU; returns what tells how it is, and which turns it gave."""
    from moelab import workers

    code = "import sys, fake_gpu; fake_gpu.install(); " + workers._CODE
    monkeypatch.setattr(workers, "_CODE", code)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    log = tmp_path / "turns"

    def tell(**how):
        monkeypatch.setenv("FAKE_GPU", json.dumps({"log": str(log)} | how))

    tell()
    log.touch()
    tell.turns = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    return tell


@pytest.fixture
def pretend_triton():
    """Put the installed Triton into a folder once more, under another version.

    Args:
        async_copy: what it does for AMD targets where nobody chose; None is as installed.
    """
    return _pretend


def _pretend(folder, version, async_copy=None):
    import triton

    package, real = folder / "triton", Path(triton.__file__).parent
    _mirror(real, package, "__init__.py", lambda text: text.replace(triton.__version__, version))
    if async_copy is not None:
        (package / "backends").unlink()
        _mirror(real / "backends", package / "backends", "amd")
        decide = f"\n\ndef is_async_copy_enabled(arch):\n    return {async_copy}\n"
        amd = Path("backends", "amd")
        _mirror(real / amd, package / amd, "compiler.py", lambda text: text + decide)
    # Its entry points name the backends.
    (metadata,) = real.parent.glob("triton-*.dist-info")
    (folder / metadata.name).symlink_to(metadata)


def _mirror(real, copy, own, change=None):
    """Link a folder's files into another, but for one, which is changed or left out."""
    copy.mkdir(parents=True)
    for path in real.iterdir():
        if path.name not in (own, "__pycache__"):
            (copy / path.name).symlink_to(path)
    if change:
        (copy / own).write_text(change((real / own).read_text()))
