"""The native record: one rater's ordering of K completions of one prompt. A pair is K = 2.

A snapshot is a folder of Parquet files in `SCHEMA` whose rows are sorted by digest. Its name is the digest of its content, so the
same rankings give the same name whatever files or order they came in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

Split = Literal["train", "test"]
ROLES = ("system", "user", "assistant")
UNKNOWN_RATER = "unknown"  # where the source does not say
BATCH_ROWS, BATCH_BYTES = 8192, 32 * 2**20  # of a snapshot in memory at a time


class Message(TypedDict):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


class Ranking(NamedTuple):
    """One rater's ordering of K >= 2 completions of one prompt.

    What was ranked:
        prompt: chat messages, the last one the user's.
        completions: K answers, in the order in which they were shown.
        ranks: K integers, 1 = best. Equal ranks are ties; ranks are dense or competition style ("1, 1, 3").
    Who ranked it, and how:
        rater_id: pseudonym of the rater; "unknown" where the source does not say.
        source: where the ranking came from, such as a labelling project.
        collected_at: ISO 8601 in UTC ("2026-01-31T12:00:00Z"), or None.
        confidence: the rater's, in (0, 1], or None.
        criterion: what was judged ("overall", "helpfulness", ...), or None.
        policies: K names of the models that wrote the completions, or None.
    Bookkeeping:
        ranking_id: the source's id, or the digest of the content.
        split: "train", or "test" for prompts that no model may learn from.
    """

    ranking_id: str
    prompt: list[Message]
    completions: list[str]
    ranks: list[int]
    rater_id: str
    source: str
    collected_at: str | None
    confidence: float | None
    policies: list[str] | None
    criterion: str | None
    split: Split

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Every strict preference as (index of the better, index of the worse); ties yield nothing."""
        for i, j in combinations(range(len(self.ranks)), 2):
            if self.ranks[i] < self.ranks[j]:
                yield i, j
            elif self.ranks[j] < self.ranks[i]:
                yield j, i


_STRING_LIST = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        pa.field("ranking_id", pa.string(), nullable=False),
        pa.field("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), nullable=False),
        pa.field("completions", _STRING_LIST, nullable=False),
        pa.field("ranks", pa.list_(pa.int32()), nullable=False),
        pa.field("rater_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("collected_at", pa.string()),
        pa.field("confidence", pa.float64()),
        pa.field("policies", _STRING_LIST),
        pa.field("criterion", pa.string()),
        pa.field("split", pa.string(), nullable=False),
    ]
)


def prompt_key(prompt: Sequence[Message]) -> str:
    """SHA-256 of a prompt's messages: equal prompts have equal keys."""
    text = json.dumps([[m["role"], m["content"]] for m in prompt], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def messages_of(prompt: object) -> list[Message]:
    """A prompt as a person writes it, a text of the user or chat messages, as messages.

    Raises:
        ValueError: it is neither, something in it is empty, or it is not valid Unicode.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise ValueError("the prompt is neither a text nor messages")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise ValueError(f"not a chat message: {message!r}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(f"not a chat message: {message!r}")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a character: {error}") from error
    return [Message(role=message["role"], content=message["content"]) for message in messages]


def iterate_snapshot(folder: Path, split: Split | None = None) -> Iterator[Ranking]:
    """The rankings of a snapshot in its own order, read in batches; `split` keeps only that one."""
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                if split is None or row["split"] == split:
                    yield Ranking(**_row(row))


def snapshot_batches(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The same as columns: whole row groups together, up to 8192 rows and 32 MB; `columns` reads those alone.

    Row groups of an ingest are small, and read one by one half of the time would go into their overhead.
    """
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            groups: list[int] = []
            rows = size = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if groups and (rows + group.num_rows > BATCH_ROWS or size + group.total_byte_size > BATCH_BYTES):
                    yield from _batches(file, groups, columns)
                    groups, rows, size = [], 0, 0
                groups.append(number)
                rows, size = rows + group.num_rows, size + group.total_byte_size
            yield from _batches(file, groups, columns)


def _batches(file: pq.ParquetFile, groups: list[int], columns: Sequence[str] | None) -> list[pa.RecordBatch]:
    found: list[pa.RecordBatch] = file.read_row_groups(groups, columns=columns, use_threads=False).combine_chunks().to_batches()
    return found


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in Ranking._fields}
