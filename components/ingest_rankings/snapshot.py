"""The snapshot: rankings sorted by digest, without duplicates, as Parquet files, in memory that does not grow with their number.

An external sort. Each ranking becomes canonical JSON, whose SHA-256 is the record's digest, and is appended to one of 64 files on
disk by the digest's first bits. Each file is then sorted by digest alone (some 150 bytes a record) and its records are copied in
that order into Parquet. The snapshot's digest is the SHA-256 of the record digests in order, so it depends on which rankings
there are, and on nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.json import ParseOptions, ReadOptions, read_json

from components.ingest_rankings.alike import Alike
from components.ingest_rankings.batches import COUNT_FILES, DIGEST_BYTES, RECORD_FILES, UNLOOKED, Batch, Policies, prepare
from components.ingest_rankings.beside import Beside
from components.ingest_rankings.quarantine import Quarantine
from components.rlhf.records import SCHEMA, Ranking

RATERS_KNOWN = 100_000  # of whom nothing is written again; a rater who is forgotten is
BATCH_ROWS = 512  # made ready for the sort at a time
GROUP_ROWS, GROUP_BYTES = 1000, 2 * 2**20  # of a Parquet row group, in records and their JSON
PART_ROWS, PART_BYTES = 200_000, 256 * 2**20  # of a Parquet file
_BUFFER_BYTES = 2**14  # of each partition's file
_HEAD_BYTES = DIGEST_BYTES + 4  # digest and size, before each record
_SCAN_BYTES = 2**20  # of a partition that are read at once where its heads are looked for


class Snapshot(NamedTuple):
    """What was written. `marker`, the content of `rankloop.json`, depends on the rankings only."""

    digest: str
    rankings: int
    marker: dict[str, Any]


class _Partitions:
    """Append-only files; what begins with one of 256 bytes goes to one of them by its first bits."""

    def __init__(self, folder: Path, files: int) -> None:
        folder.mkdir(parents=True)
        self._width = 256 // files
        self.paths = [folder / f"{number:02x}" for number in range(files)]
        self._files = [open(path, "wb", buffering=_BUFFER_BYTES) for path in self.paths]
        self.sizes = np.zeros(files, dtype=np.uint64)

    def append(self, parts: Sequence[bytes]) -> None:
        """One part for each file."""
        for file, part in zip(self._files, parts, strict=True):
            if part:
                file.write(part)
        self.sizes += np.array([len(part) for part in parts], dtype=np.uint64)

    def append_one(self, data: bytes) -> None:
        self._files[data[0] // self._width].write(data)

    def path_of(self, first: int) -> Path:
        """The file of what begins with this byte."""
        return self.paths[first // self._width]

    def close(self) -> None:
        for file in self._files:
            file.close()


class SnapshotWriter:
    """Takes rankings in any order; `write` makes the Parquet files.

    Args:
        folder: an empty folder on a disk that holds all rankings as JSON.
        policies: of rankings that are alike; `UNLOOKED` does not look for them.
    """

    def __init__(self, folder: Path, policies: Policies = UNLOOKED) -> None:
        self.added = 0
        self.alike = Alike(policies, folder / "alike", self._record_at)
        self._read: dict[Path, BinaryIO] = {}
        self._records = _Partitions(folder / "records", RECORD_FILES)
        self._prompts = _Partitions(folder / "prompts", COUNT_FILES)
        self._raters = _Partitions(folder / "raters", COUNT_FILES)
        self._known_raters: set[str] = set()
        self._policies = policies
        self._waiting: list[tuple[Ranking, int]] = []
        self._origin = ""

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        self.alike.close()
        self._close_read()

    def _close(self) -> None:
        for partitions in (self._records, self._prompts, self._raters):
            partitions.close()

    def add(self, ranking: Ranking, origin: str = "", row: int = 0) -> None:
        """Takes a ranking that stands in `row` of the file `origin`."""
        if origin != self._origin or len(self._waiting) >= BATCH_ROWS:
            self._take_waiting()
            self._origin = origin
        self._waiting.append((ranking, row))
        self.added += 1

    def _take_waiting(self) -> None:
        if self._waiting:
            rankings, rows = zip(*self._waiting, strict=True)
            self._waiting = []
            self._write(prepare(rankings, rows, self._policies), self._origin)

    def take(self, batch: Batch, origin: str) -> None:
        """Takes rankings of the file `origin` that are made ready by the same policies."""
        self._take_waiting()
        self._write(batch, origin)
        self.added += len(batch.places)

    def _write(self, batch: Batch, origin: str) -> None:
        self.alike.take(batch, origin, self._records.sizes)
        self._records.append(batch.records)
        self._prompts.append(batch.prompts)
        for rater_id in sorted(batch.raters - self._known_raters):
            if len(self._known_raters) >= RATERS_KNOWN:
                self._known_raters.clear()
            self._known_raters.add(rater_id)
            self._raters.append_one(hashlib.sha256(rater_id.encode()).digest())

    def _close_read(self) -> None:
        for file in self._read.values():
            file.close()

    def _record_at(self, first: int, offset: int) -> bytes:
        """The record of the sort's file for digests with this first byte that was added at `offset`."""
        path = self._records.path_of(first)
        if path not in self._read:
            self._read[path] = open(path, "rb", buffering=0)
        head = os.pread(self._read[path].fileno(), _HEAD_BYTES, offset)
        return os.pread(self._read[path].fileno(), int.from_bytes(head[DIGEST_BYTES:], "big"), offset + len(head))

    def kept_records(self, quarantine: Quarantine) -> Iterator[tuple[bytes, bytes]]:
        """`sorted_records` without those that the policies for rankings that are alike drop or quarantine."""
        self._take_waiting()
        self._close()
        self.alike.find()
        self._close_read()
        return self.alike.kept(self.sorted_records(), quarantine)

    def sorted_records(self) -> Iterator[tuple[bytes, bytes]]:
        """(digest, canonical JSON) of every distinct ranking, in order of digest. To be read once: files go when done."""
        self._take_waiting()
        self._close()
        for path in self._records.paths:
            if path.stat().st_size:
                with open(path, "rb", buffering=0) as file:
                    places = sorted(_places(file))
                    last = b""
                    for digest, start, size in places:
                        if digest != last:  # read, not mapped: the pages of a mapped file count as memory until it is closed
                            yield digest, os.pread(file.fileno(), size, start)
                        last = digest
            path.unlink()

    def write(self, records: Iterable[tuple[bytes, bytes]], folder: Path) -> Snapshot:
        """Writes `records` (those of `sorted_records`) to `folder/part-*.parquet`."""
        whole, facts = hashlib.sha256(), _Facts()
        with _Parts(folder, facts) as parts:
            for digest, record in records:
                whole.update(digest)
                parts.append(record)
        marker = {
            "role": "rankings",
            "digest": whole.hexdigest(),
            "prompts": _distinct(self._prompts),
            "raters": _distinct(self._raters),
            **facts.summary(),
        }
        return Snapshot(whole.hexdigest(), facts.rankings, marker)


def _places(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(digest, offset, size) of each record of a partition."""
    read, begins, place = b"", 0, 0
    while True:
        if place + _HEAD_BYTES > begins + len(read):
            file.seek(place)
            read, begins = file.read(_SCAN_BYTES), place
            if not read:
                return
        head = read[place - begins : place - begins + _HEAD_BYTES]
        size = int.from_bytes(head[DIGEST_BYTES:], "big")
        yield head[:DIGEST_BYTES], place + _HEAD_BYTES, size
        place += _HEAD_BYTES + size


def _distinct(partitions: _Partitions) -> int:
    """How many different digests were written."""
    return sum(len(set(_digests(path))) for path in partitions.paths)


def _digests(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while digest := file.read(DIGEST_BYTES):
            yield digest


class _Facts:
    """What a snapshot's marker tells, counted table by table."""

    def __init__(self) -> None:
        self.rankings = self.pairs = 0
        self.sizes: Counter[int] = Counter()
        self.splits: Counter[str] = Counter({"train": 0, "test": 0})
        self.sources: Counter[str] = Counter()

    def count(self, table: pa.Table) -> None:
        self.rankings += table.num_rows
        for ranks, rankings in Counter(map(tuple, table["ranks"].to_pylist())).items():
            k, ties = len(ranks), Counter(ranks)
            self.pairs += rankings * (k * (k - 1) - sum(n * (n - 1) for n in ties.values())) // 2
            self.sizes[k] += rankings
        self.splits.update(table["split"].to_pylist())
        self.sources.update(table["source"].to_pylist())

    def summary(self) -> dict[str, Any]:
        """`pairs`: strict preferences; `completions_per_ranking`: K to number of rankings."""
        return {
            "rankings": self.rankings,
            "pairs": self.pairs,
            "completions_per_ranking": {str(k): n for k, n in sorted(self.sizes.items())},
            "splits": dict(self.splits),
            "sources": dict(sorted(self.sources.items())),
        }


class _Parts:
    """Appends records to Parquet files of bounded size, in row groups of bounded size, and counts them."""

    def __init__(self, folder: Path, facts: _Facts) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._facts = facts
        self._records: list[bytes] = []
        self._bytes = self._part_rows = self._part_bytes = self._parts = 0
        self._writer: pq.ParquetWriter | None = None
        self._tables, self._beside = Beside(), Beside()  # one makes tables, which the other writes

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
                self._tables.finish()
                self._beside.finish()
        finally:
            self._tables.close()
            self._beside.close()
            self._end_part()

    def append(self, record: bytes) -> None:
        self._records.append(record)
        self._bytes += len(record)
        if len(self._records) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()
            if self._part_rows >= PART_ROWS or self._part_bytes >= PART_BYTES:
                self._part_rows = self._part_bytes = 0
                self._tables.call(self._beside.call, self._end_part)

    def _flush(self) -> None:
        if self._records:
            self._tables.call(self._make, self._records)
            self._part_rows, self._part_bytes = self._part_rows + len(self._records), self._part_bytes + self._bytes
            self._records, self._bytes = [], 0

    def _make(self, records: list[bytes]) -> None:
        self._beside.call(self._write, _table(records))

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            path = self._folder / f"part-{self._parts:05d}.parquet"
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
            self._parts += 1
        self._facts.count(table)
        self._writer.write_table(table)

    def _end_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _table(records: list[bytes]) -> pa.Table:
    """Canonical JSON of so many records as a table; Arrow's own reader takes a third of the time of Python's objects."""
    lines = b"\n".join(records)
    table = read_json(
        pa.BufferReader(lines),
        read_options=ReadOptions(use_threads=False, block_size=len(lines) + 1),  # a record must fit into a block
        parse_options=ParseOptions(explicit_schema=SCHEMA, newlines_in_values=False, unexpected_field_behavior="error"),
    )
    return table.cast(SCHEMA)  # nothing but that some fields are never null, which the reader does not say
