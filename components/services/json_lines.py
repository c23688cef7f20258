"""Small files of JSON lines that a person gives: all rows or none, and a row that is wrong is named."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from components.services.exits import DoNotRetry
from components.services.storage import Storage

Item = TypeVar("Item")


def read_json_lines(uri: str, storage: Storage, parse: Callable[[object], Item], what: str, form: str) -> list[Item]:
    """The rows of a local file or an S3 object, gzip or not, as `parse` makes them.

    Args:
        parse: row to item; raises ValueError, KeyError or TypeError for a row that is none.
        what: name of an item, such as "demonstration".
        form: how a line has to look, for the remedy.

    Raises:
        DoNotRetry: the file is missing, damaged or empty, or a line is not an item; the message names the line.
    """
    if uri.startswith("s3://"):
        data = storage.get_bytes(uri)
    else:
        path = Path(uri)
        if not path.is_file():
            raise DoNotRetry(f"{what}s {uri} are not a file", "give a JSONL file or an s3:// URI")
        data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DoNotRetry(f"{uri} is damaged: {error}", "write it again") from error
    items = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                items.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise DoNotRetry(f"{uri}, line {number}: not a {what} ({error})", f"each line is {form}") from error
    if not items:
        raise DoNotRetry(f"{uri} has no {what}s")
    return items
