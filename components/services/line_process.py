"""A process of ours that answers JSON lines: one request, one answer, over a socket that nobody else can reach.

For what cannot live in this process, because its packages exclude ours. The line is a pair of connected sockets: no port that
another process could take or call, no pickle, and what the process prints goes to its log. It sees the other end close when we end,
however that happens.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from components.services.exits import DoNotRetry, Retry

LOG_LINES = 15  # the last ones, which a failure's message holds
STOP_SECONDS = 10.0  # to leave by itself, once the line is closed
NOT_FOR_IT = ("AWS_", "MLFLOW_", "RANKLOOP_", "HF_TOKEN", "KFP_")  # credentials and addresses that it has no use for
FOR_ITS_OWN_JOB = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_",
)

_log = logging.getLogger(__name__)


class LineProcess:
    """A started process. As a context manager it is gone at the end, whatever happened.

    Args:
        command: its program and arguments; the number of the socket's file descriptor is added as the last one.
        name: how messages call it.
        log: file that takes what it prints.
        environment: variables on top of this process's own, less credentials and what torchrun sets for us.

    Raises:
        DoNotRetry: there is no such program.
    """

    def __init__(self, command: Sequence[str], name: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        self._socket, theirs = socket.socketpair()
        self._unread = b""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith((*NOT_FOR_IT, *FOR_ITS_OWN_JOB))}
        with theirs, open(log, "wb") as output:
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                    env={**inherited, **environment},
                    start_new_session=True,  # Ctrl-C is for us: we end it
                )
            except OSError as error:
                self._socket.close()
                raise DoNotRetry(
                    f"{name} cannot be started: {command[0]}: {error.strerror}", "name an interpreter that exists"
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer to a request.

        Raises:
            Retry: it is dead, it gave no answer within `seconds`, or it failed and says that another try may help.
            DoNotRetry: it refuses, and would again.
        """
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            answer = self._line(deadline)
        except TimeoutError as error:
            self.close(0.0)
            raise self._failure(f"gave no answer within {seconds:g} seconds and was ended") from error
        except OSError as error:
            raise self._dead() from error
        if answer is None:
            raise self._dead()
        if "error" in answer:
            kind = Retry if answer["again"] else DoNotRetry
            raise kind(f"{self.name}: {answer['error']}", answer.get("remedy", ""))
        return answer

    def _line(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None where it closed its end first."""
        pieces = [self._unread]
        while b"\n" not in pieces[-1]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            if not (piece := self._socket.recv(2**20)):
                return None
            pieces.append(piece)
        line, _, self._unread = b"".join(pieces).partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _dead(self) -> Retry:
        self.close()
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " (the kernel kills so where memory runs out)" if code == -9 else ""
        return self._failure(how + hint)

    def _failure(self, what: str) -> Retry:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        tail = "\n".join(f"  | {line[:300]}" for line in lines)
        return Retry(
            f"{self.name} {what}; the last it wrote:\n{tail or '  | (nothing)'}", "run again to continue from the checkpoint"
        )

    def close(self, patience_seconds: float = STOP_SECONDS) -> None:
        """Closes the line, and ends the process and what it started if it does not leave by itself."""
        self._socket.close()
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)  # it leads a session of its own, and is not reaped yet
            self._process.wait()

    def __enter__(self) -> LineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(STOP_SECONDS if error is None else 0.0)
