"""Blocks sorted out by several processes, in the order in which they were read.

Most of an ingest is work on Python's objects, which one process does on one core. The processes are started when there is enough to
do for them, and get blocks of rows and give back rankings that are ready for the sort, through the standard library's connections:
pipes to children of this process alone, so nothing that came from outside is read as Python's objects. What they make does not
depend on how many there are. One that is killed ends the ingest; when the ingest ends, in whatever way, they end.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from components.ingest_rankings.rows import Block
from components.ingest_rankings.sorter import Reading, Sorted, Sorter
from components.services.exits import Retry

ALONE_BLOCKS = 8  # of half a megabyte: a process is ready after a second, in which one sorts out ten thousand rankings
PIPE_BYTES = 2**20
MOST = 8  # processes by default: one that unpacks and writes cannot feed more
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_PROGRAM = """
import os, sys
from multiprocessing.connection import Connection
sys.path[:] = Connection(os.dup(0), writable=False).recv()
from components.ingest_rankings.processes import work
work()
"""


def cores() -> int:
    """That this process may use: those of its affinity, and of its container's limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_LIMIT.read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


def processes_of(setting: int) -> int:
    return setting or min(cores(), MOST)


class _Failed(NamedTuple):
    """A defect, as the process that met it tells it."""

    told: str


class Sorting:
    """Sorts out blocks here, and in processes where there are to be more than one and enough blocks."""

    def __init__(self, reading: Reading, processes: int) -> None:
        self._reading = reading
        self._sorter = Sorter(reading)
        self._count = processes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._blocks: queue.Queue[tuple[Block, Future[Sorted]] | None] = queue.Queue(processes)
        self._ready = threading.Event()

    def __enter__(self) -> Sorting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for _ in self._threads:  # without their processes they are through with what waits at once
            self._blocks.put(None)

    def each(self, blocks: Iterable[tuple[str, Block]]) -> Iterator[tuple[str, Sorted]]:
        """What became of each block, in their order, with the name that came with it.

        Raises:
            Retry: a process was ended by somebody else.
        """
        pending: deque[tuple[str, Future[Sorted]]] = deque()
        for number, (name, block) in enumerate(blocks):
            if self._count > 1 and number == ALONE_BLOCKS:
                self._start()
            future: Future[Sorted] = Future()
            if self._ready.is_set():
                self._blocks.put((block, future))
            else:
                future.set_result(self._sorter.sort(block))
            pending.append((name, future))
            while pending and (pending[0][1].done() or len(pending) > 2 * self._count):
                yield pending[0][0], pending.popleft()[1].result()
        while pending:
            yield pending[0][0], pending.popleft()[1].result()

    def _start(self) -> None:
        for _ in range(self._count):
            process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
            for pipe in (process.stdin, process.stdout):
                _widen(pipe)
            # A thread that waits for a pipe may outlive a signal's exception; it ends with its process.
            thread = threading.Thread(target=self._serve, args=(process,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Gives a process block after block; once it fails, every block that this thread gets fails."""
        assert process.stdin
        assert process.stdout
        asked = Connection(os.dup(process.stdin.fileno()), readable=False)
        replies = Connection(os.dup(process.stdout.fileno()), writable=False)
        failure: BaseException | None = None
        try:
            asked.send(sys.path)
            asked.send(self._reading)
            replies.recv()
        except (OSError, EOFError):
            failure = _ended(process)
        self._ready.set()
        while item := self._blocks.get():
            block, future = item
            try:
                if failure is None:
                    asked.send(block)
                    found = replies.recv()
                    if isinstance(found, _Failed):
                        failure = RuntimeError(f"a process of the ingest failed:\n{found.told}")
            except (OSError, EOFError):
                failure = _ended(process)
            except Exception as error:  # what cannot be sent: the one who waits must learn of it
                failure = error
            if failure is None:
                future.set_result(found)
            else:
                future.set_exception(failure)


def _ended(process: subprocess.Popen[bytes]) -> Retry:
    code = process.wait()
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return Retry(
        f"a process of the ingest (pid {process.pid}) was ended {how}; nothing is published",
        "run again; where memory is short (SIGKILL), give more of it, or set ingest_rankings.processes to 1",
    )


def _widen(pipe: IO[bytes] | None) -> None:
    """Lets a whole block wait in a pipe, where the system can do that: 64 KB at a time would be a change of process each."""
    if pipe is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):  # a user's pipes have a limit
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def work() -> None:
    """What each process does: blocks come from its standard input, and what became of them goes to its standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    asked, replies = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what a library may print is no reply
    sorter = Sorter(asked.recv())
    replies.send(None)
    while True:
        try:
            block = asked.recv()
        except EOFError:  # no more of them, or nobody who could send one
            return
        try:
            found: Sorted | _Failed = sorter.sort(block)
        except Exception:
            found = _Failed(traceback.format_exc())
        try:
            replies.send(found)
        except BrokenPipeError:
            os._exit(1)  # the one who asked is gone; a close of the pipe would fail again
