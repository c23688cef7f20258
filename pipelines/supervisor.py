"""Runs the graph in a child process, shows its progress, and ends it cleanly whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from components.services.exits import EXIT_INTERRUPTED, EXIT_RETRY
from components.services.launch import FAILURE_VARIABLE
from components.services.progress import EVENTS_VARIABLE
from pipelines import METHODS, stages_of
from pipelines.watchdog import Watchdog

GRACE_SECONDS = 20.0  # a stage saves its checkpoint when it is told to stop
POLL_SECONDS = 0.1


class View(Protocol):
    """What shows a run to a person."""

    def started(self, stage: str) -> None: ...
    def progress(self, stage: str, done: int, total: int | None, what: str) -> None: ...
    def ended(self, event: dict[str, Any]) -> None: ...
    def reused(self, stage: str) -> None: ...
    def failed(self, event: dict[str, Any]) -> None: ...


class Result(NamedTuple):
    """How a run ended.

    Fields:
        exit_code: 0, or a code of `components.services.exits`.
        message: why it failed, with a remedy; empty if it did not.
        events: the last event of every stage that ran.
        reused: stages whose result was in the cache.
        seconds: wall-clock time of the graph.
    """

    exit_code: int
    message: str
    events: dict[str, dict[str, Any]]
    reused: list[str]
    seconds: float


class Supervisor:
    """One run of the graph.

    Args:
        folder: for this run's files: arguments, events, failure record and `run.log`.
        request: what `pipelines.local_run` reads.
        environment: variables of the child, on top of this process's own.
        view: what shows the run.
    """

    def __init__(self, folder: Path, request: dict[str, Any], environment: dict[str, str], view: View) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "run.log"
        self._events_file, self._failure_file = folder / "events.jsonl", folder / "failure.json"
        self._request_file = folder / "request.json"
        self._stages = stages_of(request["arguments"]["method"])
        self._request_file.write_text(json.dumps(request, indent=2), encoding="utf-8")
        self._environment = environment | {
            EVENTS_VARIABLE: str(self._events_file),
            FAILURE_VARIABLE: str(self._failure_file),
            "PYTHONUNBUFFERED": "1",
        }
        self._view = view
        self._events: dict[str, dict[str, Any]] = {}
        self._order: list[str] = []
        self._reused: list[str] = []
        self._signal = 0

    def run(self) -> Result:
        """Runs to the end, or to the first SIGINT or SIGTERM, which the stage that is running receives too."""
        started = time.monotonic()
        self._events_file.touch()
        with open(self.log, "wb") as log, self._signals():
            child = subprocess.Popen(
                [sys.executable, "-m", "pipelines.local_run", str(self._request_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
            watchdog = Watchdog()
            watchdog.guard(child.pid)
            try:
                with open(self._events_file, encoding="utf-8") as events:
                    while child.poll() is None and not self._signal:
                        self._read(events.readline)
                        time.sleep(POLL_SECONDS)
                    if self._signal:
                        _end(child, self._signal)
                    self._read(events.readline)
            finally:
                _end(child, signal.SIGKILL)
                watchdog.stop()
        return self._result(child.returncode, time.monotonic() - started)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def remember(number: int, frame: types.FrameType | None) -> None:
            self._signal = self._signal or number

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _read(self, readline: Callable[[], str]) -> None:
        while line := readline():
            event = json.loads(line)
            stage = event["stage"]
            if event["event"] == "start":
                self._say_reused(stage)
                self._view.started(stage)
            elif event["event"] == "progress":
                self._view.progress(stage, event["done"], event["total"], event["what"])
            else:
                self._events[stage] = event
                (self._view.ended if event["event"] == "end" else self._view.failed)(event)

    def _say_reused(self, stage: str) -> None:
        """A stage that begins proves that those before it were reused, if they never began.

        PPO and DPO do not wait for each other, so neither proves anything of the other.
        """
        self._order.append(stage)
        before = self._stages[: self._stages.index(stage)] if stage in self._stages else ()
        beside = METHODS["both"] if stage in METHODS["both"] else ()
        for each in before:
            if each not in self._order and each not in self._reused and each not in beside:
                self._reused.append(each)
                self._view.reused(each)

    def _result(self, code: int, seconds: float) -> Result:
        if self._signal:
            exit_code = EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_RETRY
            return Result(exit_code, "interrupted; finished stages are kept", self._events, self._reused, seconds)
        if code == 0:
            return Result(0, "", self._events, self._reused, seconds)
        if self._failure_file.exists():
            failure = json.loads(self._failure_file.read_text(encoding="utf-8"))
            return Result(failure["exit_code"], f"{failure['stage']}: {failure['message']}", self._events, self._reused, seconds)
        tail = "\n    ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        killed = "; it was killed, perhaps for memory" if code < 0 else ""
        return Result(
            1,
            f"the graph failed without a stage's word{killed}; the end of its log:\n    {tail}",
            self._events,
            self._reused,
            seconds,
        )


def _end(child: subprocess.Popen[bytes], number: int) -> None:
    """Signals the child's whole group, waits for the stage to leave, and kills what is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
    deadline = time.monotonic() + GRACE_SECONDS
    while _group_lives(child) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _group_lives(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True
