"""Processes of their own for what may crash, hang or take all memory, which then costs only itself.

Each task has a time and a memory limit, and every worker ends with the process that asked it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker
from typing import Any

from pebble import ProcessPool
from pebble.pool.process import PoolManager, WorkerManager

from . import interrupts


class Workers:
    """Processes that do tasks.

    Args:
        number: how many.
        memory: bytes that a task may take.
    """

    def __init__(self, number: int, memory: int):
        self._open = contextlib.ExitStack()
        self._open.enter_context(_script_left_out())
        self._pool = _Pool(
            max_workers=number,
            initializer=attach,
            initargs=[os.getpid(), memory],
            # Triton and LLVM threads do not survive a fork.
            context=multiprocessing.get_context("spawn"),
        )
        self._open.callback(self._pool.join)
        # Whatever ends: no worker goes on for nobody.
        self._open.callback(self._pool.stop)

    def submit(self, timeout_s: float, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Let a worker do a task.

        Args:
            timeout_s: after this the task's process is ended by SIGALRM.
        Returns:
            a future, which raises what the task raises; `pebble.ProcessExpired` where its process
            died; `BrokenProcessPool` where a process dies before it takes a task.
        """
        return self._pool.schedule(_within, args=[timeout_s, task, *arguments])

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._open.close()


class _Pool(ProcessPool):
    """Pebble's, with `_Manager`."""

    def __init__(self, *, context: Any, **options: Any):
        super().__init__(context=context, **options)
        self._pool_manager = _Manager(self._context, context)


class _Manager(PoolManager):
    """Pebble's, which looks for a dead worker's task only when it has read the worker's last words.

    In pebble 5.2.3 one thread reads what workers say, and another finds the dead. If a worker
    dies right after it took a task and the second thread is first, then nothing is known of that
    task: its future never ends, or all tasks are given up. Here the reading thread does both.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        # Of the pool's own class, but for how it starts one.
        self.worker_manager.__class__ = _Starter
        self._dead: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def stop(self) -> None:
        # Pebble closes the channels first: a worker that is just starting misses their locks,
        # and says so with a traceback.
        self.worker_manager.force_stop_workers()
        self.worker_manager.close_channels()

    def handle_worker_expiration(self, expiration: tuple[Any, ...]) -> None:
        self._dead.put(expiration)

    def process_next_message(self, timeout: float) -> None:
        dead = [self._dead.get() for _ in range(self._dead.qsize())]
        if not dead:
            super().process_next_message(timeout)
            return
        channel = self.worker_manager.pool_channel
        # Closed where the pool is stopped meanwhile.
        with contextlib.suppress(OSError):
            while channel is not None and channel.poll(0):
                super().process_next_message(0)
        for expiration in dead:
            super().handle_worker_expiration(expiration)


class _Starter(WorkerManager):
    """Pebble's, whose workers hear no Ctrl-C before they come to ignoring it."""

    def new_worker(self) -> None:
        # It unblocks interrupts where it is started.
        resource_tracker.ensure_running()
        with interrupts.kept_from_children():
            super().new_worker()


@contextlib.contextmanager
def _script_left_out() -> Iterator[None]:
    """Keep workers from importing the script that asks, of which they need nothing.

    One without an ``if __name__ == "__main__"`` would ask again in each of them.
    """
    script = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {
        name: script[name] for name in ("__file__", "__spec__") if name in script
    }
    script.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        script.update(kept)


def attach(parent: int, memory: int | None = None) -> None:
    """Leave interrupts to the parent, die with it, and take no more memory than is given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool's handler waits until LLVM returns to Python, and the pool three seconds for it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    subprocess.Popen = _Attached  # type: ignore[misc]
    if memory is not None:
        # What a process may write to: RLIMIT_AS counts libraries and reserved addresses, too.
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _Attached(subprocess.Popen[Any]):
    """A worker's ptxas or linker: hanging, it must not outlive the worker that waits for it."""

    def __init__(self, *args: Any, **options: Any):
        worker = os.getpid()
        # LLVM catches interrupts, which would undo that its children ignore them.
        options["preexec_fn"] = lambda: attach(worker)
        super().__init__(*args, **options)


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _within(timeout_s: float, task: Callable[..., Any], *arguments: Any) -> Any:
    """Let the kernel end a worker that takes too long, whatever it is in.

    The pool's own timeout reads the wall clock: set forward by an hour, it would end every
    task; set back, none.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return task(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def how_it_ended(code: int | None) -> str:
    """Name the signal or the exit code that a process ended with."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
