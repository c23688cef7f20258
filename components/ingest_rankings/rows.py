"""Rows out of bytes: JSON lines, plain or gzip, and Parquet, told apart by their first bytes and never by their name.

Rows come one at a time, so memory does not grow with the file. A row that cannot be parsed is a `Row` with a problem and reading
goes on. A file that cannot be read to its end (gzip or Parquet cut off) stops the whole ingestion instead: how many of its rows
are missing is unknown, so no count could add up.
"""

from __future__ import annotations

import gzip
import io
import reprlib
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from components.services.exits import DoNotRetry

READ_BYTES = 2**18  # of a stream at a time
TABLE_ROWS = 256  # of a table in memory at a time
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
UTF8_MARK = b"\xef\xbb\xbf"
_UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"ARROW1": "an Arrow file",
}
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


class Rejected(ValueError):
    """Why a row is not a ranking: `reason`, one of a few fixed texts that are counted, and `detail` with the value found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Row(NamedTuple):
    """One row of a file. `number` is its line, or its place in a table, from 1; `value` is None where there is a problem."""

    number: int
    value: Any
    raw: Any
    problem: Rejected | None = None


_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 6, 6
_short.maxstring, _short.maxother = 80, 80


def shown(value: Any) -> str:
    """A value in a message: one line, cut where it is long or deep."""
    return _short.repr(value)


def read_rows(stream: BinaryIO, uri: str, scratch: Path, max_row_bytes: int) -> Iterator[Row]:
    """The rows of one file.

    Args:
        stream: the file's bytes; it need not be seekable.
        uri: the file's name in messages.
        scratch: folder for a copy of a Parquet file, which can only be read from its end.
        max_row_bytes: a longer JSON line is rejected without being held in memory.

    Raises:
        DoNotRetry: the file is cut off, damaged, or of a kind that cannot be read.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, _Raw(stream)), READ_BYTES)
    start = buffered.peek(8)[:8]
    line = 0
    try:
        if start.startswith(GZIP_MAGIC):
            buffered = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=buffered)), READ_BYTES)
            start = buffered.peek(8)[:8]
        for magic, kind in _UNREADABLE.items():
            if start.startswith(magic):
                raise DoNotRetry(f"{uri} is {kind}", "give JSON lines (plain or gzip) or Parquet")
        if start.startswith(PARQUET_MAGIC):
            yield from _parquet_rows(buffered, uri, scratch)
            return
        for row in _lines(buffered, max_row_bytes):
            line = row.number
            yield row
    except _BROKEN_GZIP as error:
        raise DoNotRetry(
            f"{uri}: the gzip stream breaks after line {line} ({error})",
            "the file is cut off or damaged: copy it here again. Nothing was ingested, for the number of lost rows is unknown",
        ) from error


class _Raw(io.RawIOBase):
    """A stream that has only `read` (such as an S3 body) as one that can be buffered."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _lines(stream: io.BufferedReader[Any], max_row_bytes: int) -> Iterator[Row]:
    """Blank lines are no rows; a UTF-8 byte order mark before the first line is no part of it."""
    number = 0
    while line := stream.readline(max_row_bytes + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(UTF8_MARK)
        if len(line) > max_row_bytes and not line.endswith(b"\n"):
            size = len(line)
            while rest := stream.readline(READ_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            problem = Rejected("row too long", f"{size} bytes; max_row_bytes = {max_row_bytes}")
            yield Row(number, None, line, problem)
        elif line.strip():
            yield parse_line(number, line)


def parse_line(number: int, line: bytes) -> Row:
    """One JSON line. UTF-8 is strict and numbers are JSON's: `NaN`, a lone surrogate or a wrong byte is a problem."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            return Row(number, None, line, Rejected("not UTF-8", f"byte {wrong.start + 1} is 0x{line[wrong.start]:02x}"))
        return Row(number, None, line, Rejected("not JSON", str(error)))
    if not isinstance(value, dict):
        hint = "; a JSON array is not JSON lines, write one object a line" if isinstance(value, list) else ""
        return Row(number, None, line, Rejected("not a JSON object", shown(value) + hint))
    return Row(number, value, line)


def _parquet_rows(stream: BinaryIO, uri: str, scratch: Path) -> Iterator[Row]:
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".parquet") as copy:
        shutil.copyfileobj(stream, copy, READ_BYTES)
        copy.flush()
        try:
            file = pq.ParquetFile(copy.name, pre_buffer=False, buffer_size=READ_BYTES)
            yield from table_rows(file.iter_batches(batch_size=TABLE_ROWS))
        except (pa.ArrowException, OSError) as error:
            raise DoNotRetry(f"{uri} is not a readable Parquet file: {error}", "copy or write it again") from error


def table_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    """The rows of a table; one whose values cannot be read (a text that is not UTF-8) does not hide the others."""
    number = 0
    for batch in batches:
        try:
            values: list[Any] | None = batch.to_pylist()
        except (ValueError, OverflowError):
            values = None
        for place in range(batch.num_rows):
            number += 1
            if values is not None:
                yield Row(number, values[place], values[place])
                continue
            try:
                value = batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Row(number, None, error.object, Rejected("not UTF-8", str(error)))
            except (ValueError, OverflowError) as error:
                yield Row(number, None, b"", Rejected("unreadable value", str(error)))
            else:
                yield Row(number, value, value)
