"""Rows that belong together, such as the scores of one rater for one prompt, brought together on disk.

Each row is appended, as JSON, to one of 64 files by its key's first bits; each file is then read alone. So memory grows with a 64th
of the rows, not with all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jmespath
import orjson
from jmespath.exceptions import JMESPathError

from components.ingest_rankings.rows import Rejected, Row, shown

FILES = 64
ROWS = "rows"  # the field of a group that holds them


class Group(NamedTuple):
    """`row.value` is `{"rows": […]}` in the order of reading; file and number are those of the first."""

    file: str
    row: Row


class Grouping:
    """Takes rows in any order; `groups` gives them by key.

    Args:
        expression: JMESPath over a row; its value is the key, whatever its type.
        folder: where the files are written; it must not exist.

    Raises:
        ValueError: not a JMESPath expression.
    """

    def __init__(self, expression: str, folder: Path) -> None:
        try:
            self._expression = jmespath.compile(expression)
        except JMESPathError as error:
            raise ValueError(f"not a JMESPath expression: {error}") from error
        self._folder = folder

    def __enter__(self) -> Grouping:
        self._folder.mkdir()
        self._files = [open(self._folder / f"{number:02x}", "w+b") for number in range(FILES)]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, file: str, number: int, value: dict[str, Any]) -> None:
        """Keeps a row until its group is whole.

        Raises:
            Rejected: the row has no key, or holds what JSON has not.
        """
        try:
            key = self._expression.search(value)
        except JMESPathError as error:
            raise Rejected("the row's group cannot be told", str(error)) from error
        if key is None or (isinstance(key, list) and None in key):
            raise Rejected("the row's group cannot be told", f"{self._expression.expression} is {shown(key)}")
        try:
            digest = hashlib.sha256(orjson.dumps(key, option=orjson.OPT_SORT_KEYS)).hexdigest()
            line = orjson.dumps([digest, file, number, value])
        except orjson.JSONEncodeError as error:
            raise Rejected("unreadable value", str(error)) from error
        self._files[int(digest[:2], 16) % FILES].write(line + b"\n")

    def groups(self) -> Iterator[Group]:
        for file in self._files:
            file.seek(0)
            gathered: dict[str, list[tuple[str, int, Any]]] = {}
            for line in file:
                digest, *row = orjson.loads(line)
                gathered.setdefault(digest, []).append(tuple(row))
            for rows in gathered.values():
                value = {ROWS: [each[2] for each in rows]}
                yield Group(rows[0][0], Row(rows[0][1], value, value))
