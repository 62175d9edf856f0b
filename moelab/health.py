"""What is installed here, what will therefore work, and what made some rows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    import pandas as pd

_PACKAGES = ("triton", "torch", "pandas", "pyarrow", "matplotlib", "papermill", "nbconvert")


def examine() -> dict[str, Any]:
    """Look at this machine.

    Returns:
        ``{"installed": {package: version or None}, "gpu": name or None, "works":
        {command: what to expect}, ...}``; nothing here raises.
    """
    installed = {name: _version(name) for name in _PACKAGES}
    gpu, trouble = _gpu()
    return {
        "moelab": __version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "installed": installed,
        "gpu": gpu,
        "works": {
            "sweep": _probe(),
            "report": _report(installed),
            "kernels on a GPU": f"yes, on {gpu}" if gpu else f"no: {trouble}",
        },
        "tuned": _tuned(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> tuple[str | None, str]:
    """Name the first GPU, or say why there is none to use."""
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(0), ""
        built = torch.version.cuda or torch.version.hip
        return None, "PyTorch sees no GPU" if built else "PyTorch is a CPU build"
    except (ImportError, RuntimeError) as error:
        return None, f"PyTorch does not work: {error}"


def _probe() -> str:
    """Say how LDS will be told with the installed Triton."""
    try:
        from . import compiler, targets

        slow = {
            backend
            for backend, name in (("AMD", "gfx950"), ("NVIDIA", "sm_90"))
            if not compiler.is_checked(targets.get(name))
        }
    except (ImportError, RuntimeError) as error:
        return f"no: Triton does not work: {error}"
    if not slow:
        return f"yes: Triton {compiler.triton_version()}'s lowering is known, compiles stop early"
    return (
        f"yes, slowly: the lowering of Triton {compiler.triton_version()} for "
        f"{' and '.join(sorted(slow))} is not one that was checked, so kernels compile in full"
    )


def _report(installed: dict[str, str | None]) -> str:
    missing = [name for name in ("papermill", "nbconvert") if not installed[name]]
    return f"no: install {', '.join(missing)}" if missing else "yes"


def _tuned() -> dict[str, str]:
    """Say by file what launchers choose from, and which kernels changed since."""
    from . import tuned

    return {str(path): _choices(path) for path in tuned.files()}


def _choices(path: Path) -> str:
    from . import kernels, tuned

    try:
        found = tuned.read(path)
        names = {row["kernel"] for row in found["rows"]}
        changed = tuned.stale(found, {name: kernels.source_hash(name) for name in names})
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return f"not usable: {error}"
    makers = found["made_by"]
    gpus, dates = ({maker[name] for maker in makers} for name in ("gpu", "date"))
    said = f"{len(found['rows'])} choices, {', '.join(map(str, sorted(gpus, key=str)))}"
    said += f", {max(map(str, dates))}"
    if changed:
        said += (
            f"; used but stale: {', '.join(sorted(changed))} changed since, `moelab tune` measures "
            "anew"
        )
    return said


def provenance(rows: pd.DataFrame) -> pd.DataFrame:
    """Name what rows were made with, and what reads them now."""
    import pandas as pd

    methods = {
        "allocation": "compiler left after allocating LDS",
        "full": "full compile",
    }
    told = rows["method"].dropna().map(methods).value_counts()
    facts = {
        "rows": len(rows),
        "distinct compiles": rows["compile_key"].nunique(),
        "Triton": ", ".join(sorted(rows["triton"].unique())),
        "moelab that wrote them": ", ".join(sorted(rows["moelab"].unique())),
        "LDS told by": "; ".join(f"{method} ({count:,} rows)" for method, count in told.items()),
        "moelab that reads them": f"{__version__}, commit {_commit() or 'unknown'}",
        "Python": platform.python_version(),
        "machine": f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return pd.DataFrame({"what": facts.keys(), "value": map(str, facts.values())})


def _commit() -> str | None:
    """Name the checkout's commit, with a + where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
