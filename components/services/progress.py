"""What a person sees of a running stage: events in a file for the submitter, or a bar on the terminal.

A submitter that shows several stages sets `RANKLOOP_EVENTS` to a file and reads one JSON object a line from it:
`{"stage", "event": "start" | "progress" | "end" | "failed", "time", ...}`. Without it, a bar is drawn on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

EVENTS_VARIABLE = "RANKLOOP_EVENTS"
SECONDS_BETWEEN_EVENTS = 0.2

Item = TypeVar("Item")


class Progress:
    """Reports one stage's progress. `stage` is its name, as in the graph."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._path = os.environ.get(EVENTS_VARIABLE, "")

    def event(self, event: str, **fields: Any) -> None:
        """Appends one event to the submitter's file, if there is one."""
        if self._path:
            line = json.dumps({"stage": self.stage, "event": event, "time": time.time(), **fields}, default=str)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def track(self, items: Iterable[Item], total: int | None, what: str, start: int = 0) -> Iterator[Item]:
        """Yields the items and reports how many are done, of `total` if it is known, beginning at `start`."""
        if not self._path:
            yield from tqdm(items, total=total, initial=start, desc=what, disable=not sys.stderr.isatty())
            return
        reported = 0.0
        done = start
        for item in items:
            yield item
            done += 1
            if time.monotonic() - reported > SECONDS_BETWEEN_EVENTS:
                reported = time.monotonic()
                self.event("progress", done=done, total=total, what=what)
