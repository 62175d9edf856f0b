"""What stands in for the GPU in a captured process: no GPU, no kernel, no memory.

`install` runs before the process's own code and waits for its imports: once ``torch`` is
there, tensors on ``cuda`` become fake ones (`device`), once ``triton`` is, its launches are
written down instead of run (`driver`). Nothing but the standard library is loaded earlier,
so that a process that uses neither starts as fast as it did.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# JSON: the folder to write to and the target to stand in for.
VARIABLE = "MOELAB_CAPTURE"


def install() -> None:
    """Stand in for the target that the environment names, in this process."""
    from . import recorder

    asked = json.loads(os.environ[VARIABLE])
    recorder.start(asked["folder"])
    sys.meta_path.insert(0, _AfterImport({"torch": _torch, "triton": _triton}))


def _torch() -> None:
    from . import device

    device.install(_target())


def _triton() -> None:
    from . import driver

    driver.install(_target())


def _target() -> Any:
    from .. import targets

    return targets.get(json.loads(os.environ[VARIABLE])["target"])


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function when a module has just been imported."""

    def __init__(self, then: dict[str, Callable[[], None]]):
        self.then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        then = self.then.pop(name, None)
        if then is None:
            return None
        # This finder knows the name no more: the others answer.
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_go_on(module: ModuleType) -> None:
                execute(module)
                then()

            spec.loader.exec_module = execute_and_go_on  # type: ignore[method-assign]
        return spec
