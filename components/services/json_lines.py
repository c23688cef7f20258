"""A user's JSON lines: a file or an S3 object, gzip or not, each line checked; a bad one is named."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from components.services.exits import DoNotRetry
from components.services.storage import Storage

Row = TypeVar("Row")


def read_json_lines(uri: str, storage: Storage, parse: Callable[[Any], Row], *, what: str, form: str) -> list[Row]:
    """The rows of a file, in its order; blank lines are passed over.

    Args:
        uri: local path or `s3://` object.
        parse: makes a row of a line's JSON value; raises ValueError, KeyError or TypeError where it is none.
        what: one row in words ("demonstration"), for messages.
        form: what a line looks like, for messages.

    Raises:
        DoNotRetry: the file is missing, damaged or empty, or a line is no such row; the message names the line.
    """
    if uri.startswith("s3://"):
        data = storage.get_bytes(uri)
    else:
        if not os.path.isfile(uri):
            raise DoNotRetry(f"{what}s {uri} are not a file", "give a JSONL file or an s3:// URI")
        try:
            data = Path(uri).read_bytes()
        except OSError as error:
            raise DoNotRetry(f"{what}s {uri} cannot be read: {error.strerror}", "give this user the right to read it") from error
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DoNotRetry(f"{uri} is damaged: {error}", "write it again") from error
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                rows.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DoNotRetry(f"{uri}, line {number}: not a {what} ({error})", f"each line is {form}") from error
    if not rows:
        raise DoNotRetry(f"{uri} has no {what}s")
    return rows
