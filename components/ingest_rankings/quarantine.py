"""Rows that are not rankings, with their reasons: all counted, the first ones kept as JSON lines."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from components.ingest_rankings.personal_data.policy import PersonalData
from components.ingest_rankings.raters import Raters
from components.ingest_rankings.rows import Rejected

RAW_CHARACTERS = 50_000  # of a row that are kept
EXAMPLES = 3  # in an error message


class Quarantine:
    """Writes `{"file", "row", "reason", "detail", "raw"}` per rejected row to `path`, at most `limit` of them.

    `personal` and `raters` say what of a row may be written.
    """

    def __init__(self, path: Path, limit: int, personal: PersonalData, raters: Raters) -> None:
        self.rows = 0
        self.kept = 0
        self.reasons: Counter[str] = Counter()
        self.examples: list[str] = []
        self._limit = limit
        self._personal = personal
        self._raters = raters
        self._file: io.BufferedWriter = open(path, "wb")

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, file: str, row: int, problem: Rejected, raw: Any) -> None:
        self.rows += 1
        self.reasons[problem.reason] += 1
        if len(self.examples) >= EXAMPLES and self.kept >= self._limit:
            return
        problem, raw = self._personal.redacted(*self._raters.redacted(problem, raw))
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{file}, row {row}: {problem}")
        if self.kept >= self._limit:
            return
        self.kept += 1
        entry = {"file": file, "row": row, "reason": problem.reason, "detail": problem.detail, "raw": raw_text(raw)}
        self._file.write(_readable(entry) + b"\n")

    def take_over(self, path: Path, reasons: Mapping[str, int]) -> None:
        """Adds what another ingest wrote to `path`, and its counts."""
        self.rows += sum(reasons.values())
        self.reasons.update(reasons)
        with open(path, "rb") as lines:
            for line in islice(lines, self._limit - self.kept):
                self._file.write(line)
                self.kept += 1


def raw_text(raw: Any) -> str:
    """A row as it was found: a line without its end, wrong bytes as `\\xff`; a table's row as JSON. Long ones are cut."""
    if isinstance(raw, bytes):
        return raw[:RAW_CHARACTERS].rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    try:
        return orjson.dumps(raw, default=str, option=orjson.OPT_NON_STR_KEYS).decode()[:RAW_CHARACTERS]
    except (orjson.JSONEncodeError, RecursionError):
        return repr(raw)[:RAW_CHARACTERS]


def _readable(entry: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(entry)
    except orjson.JSONEncodeError:  # a lone surrogate, which is why the row is here
        clean = {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in entry.items()}
        return orjson.dumps(clean)
