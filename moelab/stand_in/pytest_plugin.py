"""A pytest plugin: tells which tests ended in an error, and whether for want of a GPU."""

from __future__ import annotations

from typing import Any

from . import recorder


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    """Write down the error that ended a test, unless it skipped itself."""
    error = call.excinfo.value if call.excinfo else None
    if error is not None and type(error).__name__ not in ("Skipped", "XFailed", "Exit"):
        recorder.ended(error)
