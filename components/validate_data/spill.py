"""Rankings as numbers on disk, in files by prompt: all of a prompt can be looked at together without all others in memory.

Some 120 bytes a ranking of four completions. With 64 files, 10 million such rankings are 160,000 (and 20 MB) at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.rlhf.records import UNKNOWN_RATER
from components.validate_data.rows import Ints, Rows

FILES, FILE_BITS = 64, 6
NOBODY = -1  # the number of a rater who is not known
_ROW = np.dtype(
    [
        ("row", "i8"),
        ("prompt", "u8"),
        ("task", "u8"),
        ("rater", "i4"),
        ("source", "i4"),
        ("size", "i4"),
        ("valid", "?"),
        ("test", "?"),
        ("train", "?"),
    ]
)
_COMPLETION = np.dtype([("text", "u8"), ("rank", "i4"), ("length", "i4"), ("refuses", "?")])
_ID = np.dtype([("id", "u8"), ("row", "i8")])
_TIME = np.dtype([("rater", "i4"), ("seconds", "f8")])


class Part(NamedTuple):
    """All N rankings of some prompts: `rows_N` with the fields of `_ROW`, and their M completions in the same order."""

    rows_N: NDArray[Any]
    completions_M: NDArray[Any]

    def valid(self) -> Part:
        """Only rankings of two completions or more whose ranks are a ranking."""
        kept = self.rows_N["valid"]
        return Part(self.rows_N[kept], self.completions_M[np.repeat(kept, self.rows_N["size"])])


class Spill:
    """Takes the batches of a snapshot in their order; then gives them back by prompt.

    Attributes:
        rows, completions, refusals: how many there were.
        raters, sources: numbers of the names; "unknown" is no rater and has `NOBODY`.
        rankings: of each rater, by number.
        ordered, best_first: rankings of each source that prefer something, and those of them that list the better ones first.
    """

    def __init__(self, folder: Path) -> None:
        self.rows = self.completions = self.refusals = 0
        self.raters: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.rankings: Counter[int] = Counter()
        self.ordered: Counter[int] = Counter()
        self.best_first: Counter[int] = Counter()
        self._folder = folder
        folder.mkdir(parents=True)

    def add(self, rows: Rows) -> None:
        table = np.empty(len(rows.id_N), dtype=_ROW)
        table["row"] = np.arange(self.rows, self.rows + len(table))
        table["prompt"], table["task"] = rows.prompt_N, rows.task_N
        table["rater"] = _numbers(rows.raters, self.raters, {UNKNOWN_RATER})
        table["source"] = _numbers(rows.sources, self.sources, set())
        table["size"], table["valid"], table["test"], table["train"] = rows.sizes_N, rows.valid_N, rows.test_N, rows.train_N
        completions = np.empty(len(rows.text_M), dtype=_COMPLETION)
        completions["text"], completions["rank"] = rows.text_M, rows.rank_M
        completions["length"], completions["refuses"] = rows.length_M, rows.refuses_M
        self.completions += len(completions)
        self.refusals += int(rows.refuses_M.sum())
        self._count(table, completions)
        file = table["prompt"] >> np.uint64(64 - FILE_BITS)
        self._write("rows", file, table)
        self._write("completions", np.repeat(file, table["size"]), completions)
        ids = np.rec.fromarrays([rows.id_N, table["row"]], dtype=_ID)
        self._write("ids", rows.id_N >> np.uint64(64 - FILE_BITS), ids)
        timed = (table["rater"] != NOBODY) & np.isfinite(rows.seconds_N)
        times = np.rec.fromarrays([table["rater"][timed], rows.seconds_N[timed]], dtype=_TIME)
        self._write("times", times["rater"] % FILES, times)
        self.rows += len(table)

    def _count(self, table: NDArray[Any], completions: NDArray[Any]) -> None:
        for number, count in zip(*np.unique(table["rater"], return_counts=True), strict=True):
            self.rankings[int(number)] += int(count)
        row = np.repeat(np.arange(len(table)), table["size"])
        step = np.diff(completions["rank"])
        step[row[1:] != row[:-1]] = 0
        falls = np.bincount(row[1:], weights=step < 0, minlength=len(table)) > 0
        prefers = table["valid"] & (falls | (np.bincount(row[1:], weights=step > 0, minlength=len(table)) > 0))
        for counter, chosen in ((self.ordered, prefers), (self.best_first, prefers & ~falls)):
            for number, count in zip(*np.unique(table["source"][chosen], return_counts=True), strict=True):
                counter[int(number)] += int(count)

    def _write(self, kind: str, file_N: NDArray[Any], records: NDArray[Any]) -> None:
        order = np.argsort(file_N, kind="stable")
        ends = np.cumsum(np.bincount(file_N.astype(np.int64), minlength=FILES))
        for number, records_of in enumerate(np.split(records[order], ends[:-1])):
            if len(records_of):
                with open(self._folder / f"{kind}-{number:02}", "ab") as file:
                    file.write(records_of.tobytes())

    def _read(self, kind: str, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        for number in range(FILES):
            path = self._folder / f"{kind}-{number:02}"
            yield np.fromfile(path, dtype=dtype) if path.exists() else np.empty(0, dtype=dtype)

    def parts(self) -> Iterator[Part]:
        """Every ranking once, all of a prompt in one part."""
        for rows, completions in zip(self._read("rows", _ROW), self._read("completions", _COMPLETION), strict=True):
            if len(rows):
                yield Part(rows, completions)

    def repeated_ids(self, most: int) -> tuple[int, list[int]]:
        """How many rankings have the id of another one before them, and the rows of the first `most` of those."""
        count, examples = 0, []
        for records in self._read("ids", _ID):
            records = records[np.lexsort((records["row"], records["id"]))]
            again = records["row"][1:][records["id"][1:] == records["id"][:-1]]
            count += len(again)
            examples += again[:most].tolist()
        return count, sorted(examples)[:most]

    def times(self) -> Iterator[tuple[Ints, NDArray[np.float64]]]:
        """(rater, seconds) of the rankings whose time is known, by rater and then by time; all of a rater in one part."""
        for records in self._read("times", _TIME):
            records = records[np.lexsort((records["seconds"], records["rater"]))]
            yield records["rater"].astype(np.int64), records["seconds"].astype(np.float64)


def _numbers(names: pa.Array, known: dict[str, int], nobody: set[str]) -> NDArray[np.int32]:
    encoded = names.dictionary_encode()
    numbers = [NOBODY if name in nobody else known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]
