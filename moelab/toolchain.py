"""Tritons side by side: each in a folder of its own, or in a Python of its own.

A folder holds nothing but one Triton, first on the path of a process that this Python
starts: the environment stays as it was. A Python that has its own Triton, a nightly or a
fork, is started as it is and borrows moelab, whose compiling half is pure Python.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import scratch

# What moelab needs to compile in a Python that is not its own.
_BORROWED = ("moelab", "pebble", "elftools", "tqdm")

_EXAMINE = """
import json, platform, sys
if sys.version_info < (3, 11):
    sys.exit(f"Python {platform.python_version()}; moelab needs 3.11 or later")
import triton
print(json.dumps([platform.python_version(), triton.__version__]))
"""


class ToolchainError(Exception):
    """There is no such Triton, or it can't be installed or used; the message says which."""


@dataclass(frozen=True)
class Toolchain:
    """A Triton, and how a process comes to use it.

    Args:
        name: what users call it: a version, or a Python's path.
        python: the interpreter to start.
        folder: first on its path; None where the interpreter has its own Triton.
        own_python: the interpreter is another than this one, and borrows moelab.
    """

    name: str
    python: str
    folder: Path | None
    own_python: bool = False

    @property
    def is_here(self) -> bool:
        """This process has it."""
        return self.folder is None and not self.own_python

    @contextlib.contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """Give the environment in which ``python`` imports this Triton and moelab."""
        with contextlib.ExitStack() as stack:
            if self.own_python:
                borrowed = stack.enter_context(scratch.folder())
                for package in _BORROWED:
                    (borrowed / package).symlink_to(_package(package))
                path = [str(borrowed)]
            else:
                path = [str(self.folder)] if self.folder else []
                path.append(str(_package("moelab").parent))
                path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            yield os.environ | {"PYTHONPATH": os.pathsep.join(path)}

    def versions(self) -> tuple[str, str]:
        """Start it once: its versions of Python and Triton.

        Raises:
            ToolchainError: it does not start, or has no Triton; with its own words.
        """
        with self.environment() as environment:
            started = subprocess.run(
                [self.python, "-c", _EXAMINE], env=environment, capture_output=True, text=True
            )
        if started.returncode:
            words = (started.stderr.strip().splitlines() or ["no output"])[-1]
            raise ToolchainError(f"{self.name}: {words}")
        try:
            python, triton = json.loads(started.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            raise ToolchainError(f"{self.name} is no Python: it ran nothing") from None
        return python, triton


def _package(name: str) -> Path:
    """Find a package's folder."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ToolchainError(f"{name} is not installed beside moelab")
    return Path(spec.origin).parent


def home() -> Path:
    """Where Tritons are kept: ``$MOELAB_TOOLCHAINS``, or the user's data folder.

    Raises:
        ToolchainError: the user has none.
    """
    if chosen := os.environ.get("MOELAB_TOOLCHAINS"):
        return Path(chosen)
    try:
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    except RuntimeError:
        raise ToolchainError(
            "this user has no home folder; set MOELAB_TOOLCHAINS to where Tritons are to be kept"
        ) from None
    return Path(data) / "moelab" / "toolchains"


def folder(version: str) -> Path:
    """Where a version of Triton is kept; its wheel is built for this Python."""
    return home() / sysconfig.get_config_var("SOABI").rsplit("-", 3)[0] / version


def install(version: str) -> Toolchain:
    """Install a Triton beside the others; nothing if it is there.

    Args:
        version: as the package index spells it, ``3.7.1``.
    Raises:
        ToolchainError: pip can't install it; with pip's words.
    """
    if not re.fullmatch(r"\d+(\.\d+)+[\w.+-]*", version):
        raise ToolchainError(f"{version!r} is no version of Triton; give for example 3.7.1")
    place = folder(version)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a half-filled folder would be taken for a Triton.
        partial = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=place.parent))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        try:
            done = subprocess.run(
                [*pip, "--target", str(partial), f"triton=={version}"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
                words = "\n".join(errors or done.stderr.splitlines()[-1:])
                raise ToolchainError(f"pip could not install triton {version}: {words}")
            partial.chmod(0o755)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Toolchain(version, sys.executable, place)


def remove(version: str) -> Path:
    """Delete an installed Triton; returns where it was.

    Raises:
        ToolchainError: it is not one that `install` made.
    """
    place = folder(version)
    if version not in {toolchain.name for toolchain in installed()}:
        raise ToolchainError(_unknown(version))
    shutil.rmtree(place)
    return place


def installed() -> list[Toolchain]:
    """List what `install` made for this Python, by version."""

    def numbers(place: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in place.name.split(".")]

    # One that begins with a dot is still being filled, or was given up.
    places = [place for place in folder("*").parent.glob("[!.]*") if (place / "triton").is_dir()]
    return [Toolchain(p.name, sys.executable, p) for p in sorted(places, key=numbers)]


def find(name: str | None = None) -> Toolchain:
    """Find a Triton.

    Args:
        name: a version that is installed here or by `install`, the path of a Python
            that has its own Triton, or None for the environment's.
    Raises:
        ToolchainError: there is none of that name; the message lists those there are.
    """
    own = _own_version()
    if name is None or name == own:
        return Toolchain(own or "none", sys.executable, None)
    if os.sep in name:
        python = Path(name).expanduser()
        if not os.access(python, os.X_OK) or python.is_dir():
            raise ToolchainError(f"{name} is not a Python that can be started")
        return Toolchain(name, str(python.absolute()), None, own_python=True)
    for toolchain in installed():
        if toolchain.name == name:
            return toolchain
    raise ToolchainError(_unknown(name))


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _unknown(name: str) -> str:
    have = ", ".join(toolchain.name for toolchain in installed()) or "none"
    return (
        f"no Triton {name!r} in {folder(name).parent} (there: {have}; in this environment: "
        f"{_own_version()}); run `moelab toolchain install {name}`, or give the path of a "
        "Python that has its own Triton"
    )
