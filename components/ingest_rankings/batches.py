"""Rankings made ready for the sort, many at a time: their records by file, and the keys by which those that are alike are found.

That is most of an ingest's work and needs nothing but the rankings, so that any process may do it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from components.ingest_rankings.formats import canonical
from components.ingest_rankings.likeness import near_keys, near_owner, near_text, same_key, turns_of
from components.rlhf.records import UNKNOWN_RATER, Ranking

SameRanking = Literal["drop", "report", "keep"]
Near = Literal["report", "quarantine", "keep"]
RECORD_FILES = 64  # with 10 million rankings 160,000 digests are sorted at a time, in 25 MB
COUNT_FILES = 16  # of prompts, and of raters; with those below 192 open files are well below the 256 that some systems allow
KEY_FILES = {"same_ranking": 16, "last_turn": 16, "near_duplicates": 64}
DIGEST_BYTES = 32
PLACE = np.dtype([("high", ">u8"), ("low", ">u8"), ("offset", "<u8"), ("file", "<u4"), ("row", "<u8")])
KEY = np.dtype([("key", ">u8"), ("rest", ">u8"), ("number", "<u4")])
BAND = np.dtype([("key", "<u8"), ("number", "<u4")])


class Policies(NamedTuple):
    """What becomes of each kind of alikeness; `keep` does not look for it."""

    same_ranking: SameRanking
    near_duplicates: Near
    last_turn: Near


UNLOOKED = Policies("keep", "keep", "keep")


class Keys(NamedTuple):
    """`entries`, `KEY` or `BAND` with numbers from 0, in the order of their files; `counts`, how many go to each file."""

    entries: NDArray[Any]
    counts: NDArray[np.int64]


class Batch(NamedTuple):
    """Rankings of one file, ready for the sort.

    Fields:
        records: for each file of the sort what is appended to it: digest, size and canonical JSON of each ranking.
        places: `PLACE` of each ranking; `offset` is that in its part of `records`, and `file` is 0.
        known_rater: one byte for each, 1 where the rater is known.
        keys: by kind, of those that are looked for.
        prompts: for each file of prompts their digests.
        raters: who they are.
    """

    records: list[bytes]
    places: NDArray[Any]
    known_rater: bytes
    keys: dict[str, Keys]
    prompts: list[bytes]
    raters: frozenset[str]


def prepare(rankings: Sequence[Ranking], rows: Sequence[int], policies: Policies) -> Batch:
    """The rankings, which stand in these rows of one file, in their order."""
    digests: list[bytes] = []
    offsets: list[int] = []
    records: list[list[bytes]] = [[] for _ in range(RECORD_FILES)]
    sizes = [0] * RECORD_FILES
    prompts: list[list[bytes]] = [[] for _ in range(COUNT_FILES)]
    for ranking in rankings:
        record = canonical(ranking._asdict())
        digest = hashlib.sha256(record).digest()
        file = digest[0] * RECORD_FILES >> 8
        digests.append(digest)
        offsets.append(sizes[file])
        records[file] += (digest, len(record).to_bytes(4, "big"), record)
        sizes[file] += DIGEST_BYTES + 4 + len(record)
        prompt = hashlib.sha256(orjson.dumps(ranking.prompt)).digest()
        prompts[prompt[0] * COUNT_FILES >> 8].append(prompt)
    places = np.zeros(len(rankings), dtype=PLACE)
    halves = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 4)
    places["high"], places["low"], places["offset"], places["row"] = halves[:, 0], halves[:, 1], offsets, rows
    return Batch(
        records=[b"".join(parts) for parts in records],
        places=places,
        known_rater=bytes(ranking.rater_id != UNKNOWN_RATER for ranking in rankings),
        keys={kind: _keys(kind, rankings) for kind in KEY_FILES if getattr(policies, kind) != "keep"},
        prompts=[b"".join(parts) for parts in prompts],
        raters=frozenset(ranking.rater_id for ranking in rankings),
    )


def _keys(kind: str, rankings: Sequence[Ranking]) -> Keys:
    if kind == "near_duplicates":
        keys = near_keys([(near_text(ranking), near_owner(ranking.rater_id, ranking.criterion)) for ranking in rankings])
        bands = np.empty(keys.size, dtype=BAND)
        bands["key"], bands["number"] = keys.ravel(), np.repeat(np.arange(len(keys), dtype=np.uint32), keys.shape[1])
        return _by_file(bands, KEY_FILES[kind])
    if kind == "same_ranking":
        found = {number: same_key(ranking) for number, ranking in enumerate(rankings)}
    else:
        turns = {number: turns_of(ranking.prompt) for number, ranking in enumerate(rankings) if len(ranking.prompt) > 2}
        found = {number: key.before + key.last for number, key in turns.items() if key}
    entries = np.empty(len(found), dtype=KEY)
    halves = np.frombuffer(b"".join(found.values()), dtype=">u8").reshape(-1, 2)
    entries["key"], entries["rest"], entries["number"] = halves[:, 0], halves[:, 1], list(found)
    return _by_file(entries, KEY_FILES[kind])


def file_of(keys: NDArray[Any], files: int) -> NDArray[np.int64]:
    """The file of each key, by its first bits; `files` is a power of 2."""
    return (keys.astype(np.uint64) >> np.uint64(65 - files.bit_length())).astype(np.int64)


def _by_file(entries: NDArray[Any], files: int) -> Keys:
    file = file_of(entries["key"], files)
    return Keys(entries[np.argsort(file.astype(np.uint8), kind="stable")], np.bincount(file, minlength=files))
