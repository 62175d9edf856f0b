"""papermill's engine for our notebooks: this environment's kernel, over IPC.

Registered as the entry point ``moelab`` of papermill, so that
``papermill --engine moelab`` finds it too.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from traitlets import Unicode
from traitlets.config import Config

from . import scratch

# papermill loads its entry points, this one among them, while it is being imported. Where
# that happens in the next line it gets this placeholder, and the engine at the end.
MoelabEngine: Any = None

from papermill.engines import NBClientEngine, papermill_engines  # noqa: E402


class ThisInterpreter(AsyncKernelManager):
    """Start a kernel of the environment that runs papermill.

    The name of a kernelspec isn't looked up: a `python3` in the user's data
    folder comes before the environment's own.
    """

    progress = Unicode(os.devnull, help="Where the kernel shows progress bars.").tag(config=True)

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
        # ipykernel copies what compiled libraries print into the notebook, and
        # lets it through to our stdout too. In a file it can outlive a crash,
        # which the copy on its way to the notebook doesn't.
        with Path(self.connection_file).with_name("kernel.log").open("wb") as log:
            env = {**os.environ, "MOELAB_PROGRESS": self.progress}
            await super().start_kernel(stdout=log, stderr=log, env=env, **kwargs)


def _terminal() -> str:
    """Name this process's stderr for others: progress belongs there, not in the notebook.

    A log file is no such place: two writers would overwrite each other.
    """
    if sys.platform == "linux" and not stat.S_ISREG(os.fstat(2).st_mode):
        return f"/proc/{os.getpid()}/fd/2"
    return os.devnull


class _Engine(NBClientEngine):
    """papermill's engine with a kernel of this environment over IPC."""

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        return name or "python3"

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> str:
        return language or "python"

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
        # papermill's kernels race for TCP ports: 1 run of 40 in parallel died
        # (https://github.com/nteract/papermill/issues/511), over IPC 0 of 24.
        # The folder is of our own because home folders on network file systems
        # may take no sockets, and because a socket's path ends at 107 bytes.
        with scratch.folder() as folder:
            connection = {"connection_file": str(folder / "kernel.json")}
            if os.name == "posix" and len(os.fsencode(folder)) < 85:
                connection["transport"] = "ipc"
            kwargs["kernel_manager_class"] = ThisInterpreter
            progress = os.devnull if nb_man.pbar is None else _terminal()
            kwargs["config"] = Config(
                KernelManager=connection, ThisInterpreter={"progress": progress}
            )
            try:
                return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
            except (DeadKernelError, CellTimeoutError) as error:
                # A kernel that dies (a crash in a compiled library) raises past
                # papermill, which then calls the cell completed.
                started = [c for c in nb_man.nb.cells if c.metadata.papermill["start_time"]]
                if not started:
                    raise
                cell = started[-1]
                log = (folder / "kernel.log").read_text(errors="replace")
                cell.outputs.append(
                    nbformat.v4.new_output(
                        "error",
                        ename=type(error).__name__,
                        evalue=str(error),
                        traceback=log[-4000:].splitlines() or [str(error)],
                    )
                )
                nb_man.cell_exception(cell)
                return nb_man.nb


MoelabEngine = _Engine
papermill_engines.register("moelab", MoelabEngine)
