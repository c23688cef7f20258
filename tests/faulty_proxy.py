"""A TCP proxy on loopback that misbehaves on demand, between a client and a real server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SLOW_DOWN = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_BODY),
    _BODY,
)
CHUNK = 16384


class FaultyProxy:
    """Hands connections on to a server, or does what `fault` says to new and open ones.

    Attributes:
        address: `http://127.0.0.1:port`.
        fault: "" for none; "down" resets every connection; "503" answers each request with `503 Slow Down`; "slow" waits
            `delay_seconds` before each piece of a reply; "cut" resets a connection after `cut_bytes` of a reply.
        times: how many connections still meet the fault; afterwards all is well. Negative: all of them.
        met: how many connections have met a fault.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.fault, self.times, self.met = "", -1, 0
        self.delay_seconds, self.cut_bytes = 0.05, 1000
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def misbehave(self, fault: str, times: int = -1) -> None:
        """Sets the fault. Open connections are reset, so that the next request meets it."""
        with self._lock:
            self.fault, self.times = fault, times
            for each in list(self._open):
                _reset(each)
            self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.misbehave("down")

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            fault = self.fault if self.times else ""
            if fault:
                self.met += 1
                self.times -= 1
            self._open.add(client)
        with contextlib.suppress(OSError):
            if fault == "down":
                _reset(client)
            elif fault == "503":
                client.recv(CHUNK)
                client.sendall(SLOW_DOWN)
                client.shutdown(socket.SHUT_WR)
                while client.recv(CHUNK):  # closing on unread bytes would reset the connection, and the answer would be lost
                    pass
            else:
                self._hand_on(client, fault)
        client.close()
        with self._lock:
            self._open.discard(client)

    def _hand_on(self, client: socket.socket, fault: str) -> None:
        with socket.create_connection(self._upstream) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            sent = 0
            while data := server.recv(CHUNK):
                if fault == "slow":
                    time.sleep(self.delay_seconds)
                if fault == "cut" and sent + len(data) > self.cut_bytes:
                    client.sendall(data[: self.cut_bytes - sent])
                    _reset(client)
                    return
                client.sendall(data)
                sent += len(data)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Ends a connection with RST, as a killed server or a firewall does."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at `upstream` (`http://host:port`), for the time of a `with`."""
    proxy = FaultyProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
