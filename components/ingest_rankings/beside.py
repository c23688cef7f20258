"""Work beside the reading of rows, in a thread: what leaves Python's lock, such as unpacking and Parquet.

Neither thread outlives its owner by more than the call that it is in.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

CHUNKS = 4  # read ahead
PENDING = 2  # calls that wait
_WAIT_SECONDS = 0.1


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...


class ReadAhead:
    """A stream whose chunks a thread reads before they are asked for; an error comes in the place where it occurred."""

    def __init__(self, stream: Readable, chunk_bytes: int) -> None:
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._chunks: queue.Queue[bytes | BaseException] = queue.Queue(CHUNKS)
        self._stopped = threading.Event()
        self._left = b""
        self._thread = threading.Thread(target=self._run, daemon=True)  # a read from a pipe may never return
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                chunk = self._stream.read(self._chunk_bytes)
                self._put(chunk)
                if not chunk:
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: bytes | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._chunks.put(item, timeout=_WAIT_SECONDS)
                return
            except queue.Full:
                pass

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; b"" at the end, and ever after."""
        if not self._left:
            if not self._thread.is_alive() and self._chunks.empty():
                return b""
            item = self._chunks.get()
            if isinstance(item, BaseException):
                raise item
            self._left = item
        data, self._left = (self._left, b"") if size < 0 else (self._left[:size], self._left[size:])
        return data

    def close(self) -> None:
        """Stops reading; the stream belongs to the caller again."""
        self._stopped.set()
        self._thread.join(1)


class Beside:
    """Calls in their order in one thread, few of them waiting; an error of one is raised by the next `call`, or by `finish`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[Any]] = deque()

    def call(self, work: Callable[..., object], *arguments: Any) -> None:
        while len(self._pending) >= PENDING:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work, *arguments))

    def finish(self) -> None:
        """Waits for all."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Leaves out what has not begun, and waits for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)
