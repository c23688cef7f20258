"""Bytes to rows: kinds told by content, one bad row does not stop the others, a damaged file does."""

import gzip
import io
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.ingest_rankings import rows
from components.ingest_rankings.rows import _ARRAY, Row, read_rows
from components.services.exits import DoNotRetry

SCRATCH = Path(tempfile.gettempdir())


def read(data: bytes, scratch: Path = SCRATCH, max_row_bytes: int = 1000) -> list[Row]:
    return list(read_rows(io.BytesIO(data), "the file", scratch, max_row_bytes))


def reasons(rows: list[Row]) -> list[tuple[int, str]]:
    return [(row.number, row.problem.reason if row.problem else "") for row in rows]


def test_lines_with_blank_ones_and_any_line_end() -> None:
    rows = read(b'{"a": 1}\r\n\n  \n{"a": 2}\n{"a": 3}')
    assert [(row.number, row.value) for row in rows] == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert read(b'\xef\xbb\xbf{"a": 1}\n')[0].value == {"a": 1}


def test_gzip_is_told_by_content() -> None:
    assert read(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))[1].value == {"a": 2}
    assert read(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))[1].value == {"a": 2}  # as `cat a.gz b.gz` makes


def test_each_bad_line_has_its_reason() -> None:
    lines = [b'{"a": "\xff"}', b'{"a": 1', b"[1, 2]", b'"text"', b'{"a": NaN}', b'{"a": "\\ud800"}', b"\x00", b'{"a": 1}']
    found = reasons(read(b"\n".join(lines)))
    assert found == [
        (1, "not UTF-8"),
        (2, "not JSON"),
        (3, "not a JSON object"),
        (4, "not a JSON object"),
        (5, "not JSON"),
        (6, "not JSON"),
        (7, "not JSON"),
        (8, ""),
    ]


def test_wrong_byte_is_located() -> None:
    problem = read(b'{"a": "\xff"}')[0].problem
    assert problem is not None
    assert problem.detail == "byte 8 is 0xff"


def test_deep_nesting_is_a_problem_of_its_row() -> None:
    assert reasons(read(b"[" * 900 + b"\n" + b'{"a": ' * 100 + b'\n{"a": 1}')) == [(1, "not JSON"), (2, "not JSON"), (3, "")]


def test_long_line_is_skipped_without_being_held() -> None:
    class Endless(io.RawIOBase):
        """64 MiB in one line, then a good line; made while it is read."""

        left = 64 * 2**20

        def read(self, size: int = -1) -> bytes:
            if self.left:
                piece = min(size, self.left)
                self.left -= piece
                return b"x" * piece
            self.read = io.BytesIO(b'\n{"a": 1}\n').read  # type: ignore[method-assign]
            return self.read(size)

    import tracemalloc

    tracemalloc.start()
    stream: Any = Endless()
    rows = list(read_rows(stream, "the file", SCRATCH, 1000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons(rows) == [(1, "row too long"), (2, "")]
    assert rows[0].problem is not None
    assert rows[0].problem.detail == f"{64 * 2**20 + 1} bytes; max_row_bytes = 1000"
    assert peak_bytes < 4 * 2**20


def test_longest_allowed_line() -> None:
    line = b'{"a": "' + b"x" * 991 + b'"}'
    assert len(line) == 1000
    assert reasons(read(line + b"\n" + line)) == [(1, ""), (2, "")]
    assert reasons(read(line + b" \n" + line)) == [(1, "row too long"), (2, "")]


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_gzip_cut_off_ends_the_ingestion(cut: int) -> None:
    packed = gzip.compress(b"".join(b'{"a": "%d"}\n' % (n * n * 7919) for n in range(5000)))
    with pytest.raises(DoNotRetry, match="the file: its compressed data breaks after row"):
        read(packed[:-cut])


def test_damaged_gzip_ends_the_ingestion() -> None:
    packed = bytearray(gzip.compress(b'{"a": 1}\n' * 5000))
    packed[len(packed) // 2] ^= 255
    with pytest.raises(DoNotRetry, match="the file: its compressed data breaks after row"):
        read(bytes(packed))


@pytest.mark.parametrize(("start", "kind"), [(b"PK\x03\x04", "a zip archive"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\x00", "xz")])
def test_other_archives_are_named(start: bytes, kind: str) -> None:
    with pytest.raises(DoNotRetry, match=f"the file is .*{kind}"):
        read(start + b"...")


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def test_parquet_is_told_by_content_and_leaves_no_copy(tmp_path: Path) -> None:
    data = parquet(pa.table({"a": list(range(600)), "b": [{"c": None}] * 600}), row_group_size=100)
    rows = read(data, tmp_path)
    assert [(row.number, row.value) for row in rows] == [(n + 1, {"a": n, "b": {"c": None}}) for n in range(600)]
    assert read(gzip.compress(data), tmp_path)[599].value == rows[599].value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [5, 200, -1])
def test_parquet_cut_off_ends_the_ingestion(tmp_path: Path, end: int) -> None:
    with pytest.raises(DoNotRetry, match="the file is not a readable Parquet file"):
        read(parquet(pa.table({"a": list(range(600))}))[:end], tmp_path)


def test_wrong_text_in_a_table_is_a_problem_of_its_row(tmp_path: Path) -> None:
    wrong = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    rows = read(parquet(pa.table({"a": wrong})), tmp_path)
    assert reasons(rows) == [(1, ""), (2, "not UTF-8"), (3, "")]


@given(st.binary(max_size=300) | st.lists(st.binary(max_size=30), max_size=8).map(b"\n".join))
def test_any_bytes_are_rows_problems_or_a_refused_file(data: bytes) -> None:
    try:
        rows = read(data)
    except DoNotRetry:
        assert data[:2] in (b"\x1f\x8b", b"PK", b"BZ", b"\xfd7", b"\x28\xb5", b"PA", b"AR", b"\xff\xff") or _ARRAY.match(data)
        return
    body = data.removeprefix(b"\xef\xbb\xbf")
    assert [row.number for row in rows] == [n for n, line in enumerate(body.split(b"\n"), 1) if line.strip()]
    assert all((row.value is None) == (row.problem is not None) for row in rows)


@given(st.binary(max_size=300))
def test_any_bytes_after_a_gzip_header(data: bytes) -> None:
    packed = gzip.compress(b'{"a": 1}\n')
    for candidate in (packed + data, packed[:10] + data):
        try:
            rows = read(candidate)
        except DoNotRetry:
            continue
        assert all((row.value is None) == (row.problem is not None) for row in rows)


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    ended=st.booleans(),
    reads=st.lists(st.integers(1, 40), min_size=1),
)
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], ended: bool, reads: list[int]) -> None:
    """Against the slow way: all bytes split at their line ends."""
    data = b'{"a": 1}\n' + b"\n".join(lines) + (b"\n" if ended else b"")

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            reads.append(reads.pop(0))
            return super().read(min(reads[0], size or 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK_BYTES", 50)
        found = list(read_rows(Slow(data), "the file", SCRATCH, 20))
    whole = data.split(b"\n")
    expected = [(number, line) for number, line in enumerate(whole, 1) if line.strip() or len(line) > 20]
    assert [(row.number, row.raw.rstrip(b"\n")) for row in found] == [(number, line[:21]) for number, line in expected]
    for row, (number, line) in zip(found, expected, strict=True):
        size = len(line) + (number < len(whole))
        long = row.problem is not None and row.problem.reason == "row too long"
        assert long == (len(line) > 20)
        assert not long or row.problem is None or row.problem.detail == f"{size} bytes; max_row_bytes = 20"
