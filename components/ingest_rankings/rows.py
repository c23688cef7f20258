"""Rows out of bytes: JSON lines, JSON arrays of objects, Parquet and Arrow, plain or packed with gzip or zstd.

All are told apart by their first bytes, never by their name; only a table of text (CSV, TSV) is known by its name alone. Rows come
one at a time, so memory does not grow with the file. A row that cannot be parsed is a `Row` with a problem and reading goes on. A
file that cannot be read to its end (cut off, or damaged) stops the whole ingestion instead: how many of its rows are missing is
unknown, so no count could add up.
"""

from __future__ import annotations

import csv
import io
import re
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import ijson
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from isal import igzip
from isal.igzip_lib import IsalError

from components.ingest_rankings.beside import ReadAhead
from components.services.exits import DoNotRetry

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ_BYTES = 2**18  # of a stream at a time
BLOCK_BYTES = 2**19  # of lines that are looked at together
TABLE_ROWS = 256  # of a table in memory at a time
PEEK_BYTES = 64
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PARQUET_MAGIC, ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
PACKED = (".gz", ".zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
UTF8_MARK = b"\xef\xbb\xbf"
_UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
}
_BROKEN_PACKING = (EOFError, igzip.BadGzipFile, cast(type[Exception], IsalError), zstd.ZstdError)  # its stub says: an instance
_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")


DECLINED = "the rater gave no answer"  # the reason of what the tool's own rules set aside: skipped, discarded, a draft


class Rejected(ValueError):
    """Why a row is not a ranking: `reason`, one of a few fixed texts that are counted, and `detail` with the value found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


class Row(NamedTuple):
    """One row of a file. `number` is its line, or its place in a table, from 1; `value` is None where there is a problem."""

    number: int
    value: Any
    raw: Any
    problem: Rejected | None = None


class Lines(NamedTuple):
    """Whole lines of JSON that nobody has looked at: `lines` of them from line `number` on; the last may lack its end."""

    number: int
    lines: int
    data: bytes


Block = Lines | list[Row]  # consecutive rows of a file

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 6, 6
_short.maxstring, _short.maxother = 80, 80


def shown(value: Any) -> str:
    """A value in a message: one line, cut where it is long or deep."""
    return _short.repr(value)


def read_rows(stream: BinaryIO, uri: str, scratch: Path, max_row_bytes: int) -> Iterator[Row]:
    """The rows of `read_blocks`, one by one."""
    for block in read_blocks(stream, uri, scratch, max_row_bytes):
        yield from rows_of(block, max_row_bytes)


def rows_of(block: Block, max_row_bytes: int) -> Iterable[Row]:
    return parse_lines(block, max_row_bytes) if isinstance(block, Lines) else block


def read_blocks(stream: BinaryIO, uri: str, scratch: Path, max_row_bytes: int) -> Iterator[Block]:
    """The rows of one file, many at a time. What comes before a place that cannot be read is given first.

    Args:
        stream: the file's bytes; it need not be seekable.
        uri: the file's name in messages; its suffix says whether it is CSV or TSV.
        scratch: folder for a copy of a Parquet or an Arrow file, which can only be read from its end.
        max_row_bytes: a longer JSON line is rejected without being held in memory, a longer cell of a CSV ends the reading.

    Raises:
        DoNotRetry: the file is cut off, damaged, or of a kind that cannot be read.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, _Raw(stream)), READ_BYTES)
    start = buffered.peek(PEEK_BYTES)[:PEEK_BYTES]
    last = 0
    ahead: ReadAhead | None = None
    try:
        if start.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
            unpacked = igzip.IGzipFile(fileobj=buffered) if start.startswith(GZIP_MAGIC) else zstd.ZstdFile(buffered)
            ahead = ReadAhead(unpacked, READ_BYTES)
            buffered = io.BufferedReader(cast(io.RawIOBase, _Raw(cast(BinaryIO, ahead))), READ_BYTES)
            start = buffered.peek(PEEK_BYTES)[:PEEK_BYTES]
        for block in _blocks(buffered, start, uri, scratch, max_row_bytes):
            last = _last_number(block)
            yield block
    except _BROKEN_PACKING as error:
        raise DoNotRetry(f"{uri}: its compressed data breaks after row {last} ({error})", _CUT_OFF) from error
    finally:
        if ahead:
            ahead.close()


def _last_number(block: Block) -> int:
    if isinstance(block, Lines):
        return block.number + block.lines - 1
    return block[-1].number


def batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Some rows at a time; those before an error are given first."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) >= TABLE_ROWS:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


_CUT_OFF = "the file is cut off or damaged: copy it here again. Nothing was ingested, for the number of lost rows is unknown"


def _blocks(stream: io.BufferedReader[Any], start: bytes, uri: str, scratch: Path, max_row_bytes: int) -> Iterator[Block]:
    """The rows of unpacked bytes that begin with `start`."""
    for magic, kind in _UNREADABLE.items():
        if start.startswith(magic):
            raise DoNotRetry(f"{uri} is {kind}", "give JSON, CSV, Parquet or Arrow, plain or packed with gzip or zstd")
    if start.startswith(PARQUET_MAGIC):
        return batched(_parquet_rows(stream, uri, scratch))
    if start.startswith((ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC)):
        return batched(_arrow_rows(stream, uri, scratch, start.startswith(ARROW_FILE_MAGIC)))
    if start.startswith(UTF8_MARK):
        stream.read(len(UTF8_MARK))
    if delimiter := delimiter_of(uri):
        return batched(csv_rows(stream, uri, delimiter, max_row_bytes))
    if _ARRAY.match(start.removeprefix(UTF8_MARK)):
        return batched(_array_rows(stream, uri))
    return _lines(stream, max_row_bytes)


def delimiter_of(name: str) -> str:
    """Of the cells of a table of text, by the file's name; "" for any other file."""
    lower = name.lower()
    for suffix in PACKED:
        lower = lower.removesuffix(suffix)
    return next((delimiter for suffix, delimiter in DELIMITERS.items() if lower.endswith(suffix)), "")


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


def _lines(stream: io.BufferedReader[Any], max_row_bytes: int) -> Iterator[Block]:
    """Whole lines, some `BLOCK_BYTES` of them, and each that is too long by itself."""
    number, pieces, size = 1, list[bytes](), 0
    while True:
        try:
            chunk = stream.read1(READ_BYTES)
        except _BROKEN_PACKING:
            whole = b"".join(pieces)
            if end := whole.rfind(b"\n") + 1:
                yield Lines(number, whole.count(b"\n"), whole[:end])
            raise
        pieces.append(chunk)
        size += len(chunk)
        end = chunk.rfind(b"\n") + 1
        if chunk and not (end and size >= BLOCK_BYTES) and (end or size <= max(max_row_bytes, BLOCK_BYTES)):
            continue
        data = b"".join(pieces)
        end = data.rfind(b"\n") + 1 if chunk else len(data)
        if end:
            count = data.count(b"\n", 0, end) + (data[end - 1 : end] != b"\n")
            yield Lines(number, count, data[:end])
            number += count
        rest = data[end:]
        if len(rest) > max_row_bytes:
            size, after = _skip(stream, len(rest))
            yield [_too_long(number, rest[: max_row_bytes + 1], size, max_row_bytes)]
            number, rest = number + 1, after
        pieces, size = [rest], len(rest)
        if not chunk:
            return


def _skip(stream: io.BufferedReader[Any], size: int) -> tuple[int, bytes]:
    """Reads on to the end of a line of which `size` bytes are read: its bytes, and what was read behind it."""
    while chunk := stream.read1(READ_BYTES):
        end = chunk.find(b"\n") + 1
        if end:
            return size + end, chunk[end:]
        size += len(chunk)
    return size, b""


def _too_long(number: int, line: bytes, size: int, max_row_bytes: int) -> Row:
    return Row(number, None, line, Rejected("row too long", f"{size} bytes; max_row_bytes = {max_row_bytes}"))


def parse_lines(lines: Lines, max_row_bytes: int) -> Iterator[Row]:
    """Blank lines are no rows."""
    for number, line in enumerate(io.BytesIO(lines.data), lines.number):
        if len(line) - line.endswith(b"\n") > max_row_bytes:
            yield _too_long(number, line[: max_row_bytes + 1], len(line), max_row_bytes)
        elif not line.isspace():
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
        return Row(number, None, line, Rejected("not a JSON object", shown(value)))
    return Row(number, value, line)


def _array_rows(stream: io.BufferedReader[Any], uri: str) -> Iterator[Row]:
    """The elements of one JSON array, which need not be on lines of their own."""
    number = 0
    try:
        for number, value in enumerate(ijson.items(stream, "item", use_float=True), 1):
            problem = None if isinstance(value, dict) else Rejected("not a JSON object", shown(value))
            yield Row(number, value, value, problem)
    except ijson.JSONError as error:
        raise DoNotRetry(f"{uri}: the JSON array breaks after its element {number} ({error})", _CUT_OFF) from error


def csv_rows(stream: io.BufferedReader[Any], uri: str, delimiter: str, max_row_bytes: int) -> Iterator[Row]:
    """The records of a table of text below its header; every value is a text, and an empty cell is None.

    A record may span lines (RFC 4180); its number is that of the line where it begins.
    """
    csv.field_size_limit(max_row_bytes)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    records = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(records, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field limit" in str(error):
                raise DoNotRetry(f"{uri}, line {line}: a quoted cell does not end, or is too long ({error})", _CUT_OFF) from error
            yield Row(line, None, b"", Rejected("not a record of the table", str(error)))
            line = records.line_num + 1
            continue
        if cells is None:
            break
        if not header:
            header = cells
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DoNotRetry(f"{uri}: columns of the same name: {', '.join(map(repr, twice))}", "rename them in the first line")
        elif cells:
            value = {name: cell or None for name, cell in zip(header, cells, strict=False)}
            right = len(cells) == len(header)
            problem = None if right else Rejected("not one cell per column", f"{len(cells)} cells for {len(header)} columns")
            yield Row(line, value if right else None, cells, problem)
        line = records.line_num + 1


def _arrow_rows(stream: BinaryIO, uri: str, scratch: Path, is_file: bool) -> Iterator[Row]:
    """An Arrow file (Feather 2), or a stream, as `datasets` keeps its own."""
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".arrow") as copy:
        shutil.copyfileobj(stream, copy, READ_BYTES)
        copy.flush()
        try:
            with pa.memory_map(copy.name) as mapped:
                reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
                slices = (batch.slice(i, TABLE_ROWS) for batch in batches for i in range(0, batch.num_rows, TABLE_ROWS))
                yield from table_rows(slices, as_stored=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DoNotRetry(f"{uri} is not a readable Arrow file: {error}", "copy or write it again") from error


def _parquet_rows(stream: BinaryIO, uri: str, scratch: Path) -> Iterator[Row]:
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".parquet") as copy:
        shutil.copyfileobj(stream, copy, READ_BYTES)
        copy.flush()
        try:
            file = pq.ParquetFile(copy.name, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True)
            yield from table_rows(file.iter_batches(batch_size=TABLE_ROWS))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DoNotRetry(f"{uri} is not a readable Parquet file: {error}", "copy or write it again") from error


def table_rows(batches: Iterable[pa.RecordBatch], as_stored: bool = False) -> Iterator[Row]:
    """The rows of a table; one whose values cannot be read (a text that is not UTF-8) does not hide the others.

    Args:
        as_stored: the batches are bytes of a file that nobody has looked at, as Arrow's are: damaged ones make Arrow read beyond
            its memory unless each is validated. Parquet's are made by its reader.
    """
    number = 0
    for batch in batches:
        try:
            if as_stored:
                batch.validate(full=True)
            values: list[Any] | None = batch.to_pylist()
        except (ValueError, OverflowError):
            values = None
        for place in range(batch.num_rows):
            number += 1
            if values is not None:
                yield Row(number, values[place], values[place])
                continue
            one = batch.slice(place, 1)
            try:
                if as_stored:
                    one.validate(full=True)
                value = one.to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Row(number, None, error.object, Rejected("not UTF-8", str(error)))
            except (ValueError, OverflowError) as error:
                reason = "not UTF-8" if "UTF8" in str(error) else "unreadable value"
                yield Row(number, None, b"", Rejected(reason, str(error)))
            else:
                yield Row(number, value, value)
