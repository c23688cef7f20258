"""Rankings that are alike: the same one from two exports, near duplicates, conversations that differ in their last turn only.

    same_ranking     one rater's order of the same completions for the same conversation: another id, source or white space
    near_duplicates  one rater's rankings with nearly the same conversation and completions, rank by rank (MinHash, then Jaccard)
    last_turn        conversations of several turns that are the same up to their last one

Each kind has its policy; nothing of it is silent: counts and the first examples, with both origins, are in the report. A rater who
was asked twice and answered at two times gave two rankings: those stay, for they tell how consistent the rater is. Of the same
rankings the one with the smallest record digest stays, so that neither the order of files nor a parent snapshot nor shards that are
merged later change what stays. Of a rater who is not known nothing is dropped: two of them may be two people.

On disk lie, for each ranking, its place (36 bytes), the key of the same ranking (20), 16 band keys (192) and, of several turns, the
key of its conversation (20), in 16 or 64 files by the key's first bits. In memory are one file at a time, 2 bytes for each ranking,
and 30 for each that goes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from components.ingest_rankings.batches import BAND, KEY, KEY_FILES, PLACE, Batch, Policies, file_of
from components.ingest_rankings.likeness import how_near
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.rows import Rejected

KINDS = ("same_ranking", "near_duplicates", "last_turn")
NEARLY = 0.8  # similarity of near duplicates, as in the validation gate
COMPARISONS = 50_000  # of two rankings, some 100 microseconds each; where near duplicates are quarantined there is no limit
REASONS = {  # of what a policy quarantines
    "near_duplicates": "nearly the same as another ranking",
    "last_turn": "differs from another conversation in the last turn only",
}
SECONDS = len("2026-01-31T12:00:00")  # of a time: exports round its fractions
EXAMPLES = 5  # of each kind in the report
SLOT_BITS = 22  # of a table of counts at most: 32 MB
_OUT = np.dtype([("number", "<u4"), ("of", "<u4"), ("kind", "u1"), ("similarity", "<f4")])
_OUT_PACKED = struct.Struct("<IIBf")


class Alike:
    """Sees each ranking as it goes to the sort, finds those that are alike, and lets the others through.

    Args:
        folder: for the files; it must not exist.
        record_at: canonical JSON of a ranking by the first byte of its digest and its offset (`SnapshotWriter.record_at`).
    """

    def __init__(self, policies: Policies, folder: Path, record_at: Callable[[int, int], bytes]) -> None:
        folder.mkdir(parents=True)
        self.counts: dict[str, dict[str, int]] = {kind: {"found": 0, "rater_unknown": 0} for kind in KINDS}
        self.quarantined = 0
        self._policies = policies
        self._record_at = record_at
        self._folder = folder
        self._origins: dict[str, int] = {}
        self._known_rater = bytearray()
        self._added = 0
        self._compared = 0
        self._examples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self._places_file = open(folder / "places", "w+b")
        self._files = {
            kind: [open(folder / f"{kind}-{number:02}", "wb", buffering=2**12) for number in range(KEY_FILES[kind])]
            for kind in KINDS
            if getattr(policies, kind) != "keep"
        }

    def close(self) -> None:
        self._places_file.close()
        self._close_keys()

    def _close_keys(self) -> None:
        for files in self._files.values():
            for file in files:
                file.close()

    def take(self, batch: Batch, origin: str, starts: NDArray[np.uint64]) -> None:
        """Keeps the keys of rankings of the file `origin`, whose records begin at `starts` of the sort's files."""
        places = batch.places
        places["offset"] += starts[file_of(places["high"], len(starts))]
        places["file"] = self._origins.setdefault(origin, len(self._origins))
        self._places_file.write(places.tobytes())
        self._known_rater += batch.known_rater
        for kind, keys in batch.keys.items():
            entries = keys.entries
            entries["number"] += np.uint32(self._added)
            first = 0
            for file, count in zip(self._files[kind], keys.counts.tolist(), strict=True):
                file.write(entries[first : first + count].tobytes())
                first += count
        self._added += len(places)

    # -- finding -------------------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Finds what is alike among all that was added, and writes what must go by the files of the sort."""
        self._close_keys()
        self._places_file.flush()
        self._origin_names = list(self._origins)
        self._again = np.zeros(self._added, dtype=bool)  # the same as another one, or near to it
        with open(self._folder / "out", "wb") as out:
            for kind, found in (("same_ranking", self._same), ("last_turn", self._turns), ("near_duplicates", self._near)):
                removes = getattr(self._policies, kind) in ("drop", "quarantine")
                for number, of, similar in found() if kind in self._files else ():
                    self._note(kind, number, of, similar)
                    if removes and (self._known_rater[number] or kind == "last_turn"):
                        out.write(_OUT_PACKED.pack(number, of, KINDS.index(kind), similar))

    def _note(self, kind: str, number: int, of: int, similar: float) -> None:
        counts, examples = self.counts[kind], self._examples[kind]
        counts["found"] += 1
        counts["rater_unknown"] += not self._known_rater[number]
        if len(examples) < EXAMPLES:
            pair = {"one": self._named(of), "other": self._named(number)}
            examples.append(pair | ({"similarity": round(similar, 3)} if kind == "near_duplicates" else {}))

    def _by_key(self, kind: str, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        """The entries of each file that share their key with another one, by key; not those of what was found before."""
        for number in range(KEY_FILES[kind]):
            entries = np.fromfile(self._folder / f"{kind}-{number:02}", dtype=dtype)
            keys = entries["key"].astype(np.uint64)
            # Only keys whose last bits come twice are sorted: a sort of all takes three times as long.
            bits = min((4 * len(keys)).bit_length(), SLOT_BITS)
            slots = (keys & np.uint64((1 << bits) - 1)).astype(np.int64)
            crowded = np.bincount(slots)[slots] > 1
            entries, keys = entries[crowded], keys[crowded]
            in_order = np.sort(keys)
            twice = in_order[1:][in_order[1:] == in_order[:-1]]
            if len(twice):
                shared = entries[twice[np.searchsorted(twice[:-1], keys)] == keys]
                shared = shared[~self._again[shared["number"]]]
                yield shared[np.argsort(shared["key"], kind="stable")]

    def _groups(self, entries: NDArray[Any], *fields: str) -> Iterator[NDArray[Any]]:
        """Entries of the same values in `fields`, each group by digest and without a record that comes again."""
        places = self._places(entries["number"])
        order = np.lexsort((entries["number"], places["low"], places["high"], *(entries[name] for name in reversed(fields))))
        entries, places = entries[order], places[order]
        new = np.ones(len(entries), dtype=bool)
        new[1:] = np.any([entries[name][1:] != entries[name][:-1] for name in fields], axis=0)
        again = (places["low"][1:] == places["low"][:-1]) & (places["high"][1:] == places["high"][:-1])
        for group in np.split(np.arange(len(entries)), np.flatnonzero(new)[1:]):
            kept = group[[True, *(~again[group[1:] - 1])]] if len(group) else group
            if len(kept) > 1:
                yield entries[kept]

    def _same(self) -> Iterator[tuple[int, int, float]]:
        """Of each time one stays. A ranking whose time is not known is one of the others, wherever there are any."""
        for entries in self._by_key("same_ranking", KEY):
            for group in self._groups(entries, "key", "rest"):
                stays: dict[str, int] = {}
                untimed = []
                for number in group["number"].tolist():
                    if at := self._record(number)["collected_at"]:
                        first = stays.setdefault(at[:SECONDS], number)
                        if first != number:
                            self._again[number] = True
                            yield number, first, 1.0
                    else:
                        untimed.append(number)
                first = min(stays.values(), key=group["number"].tolist().index) if stays else untimed.pop(0)
                for number in untimed:
                    self._again[number] = True
                    yield number, first, 1.0

    def _turns(self) -> Iterator[tuple[int, int, float]]:
        """Of a conversation the rankings of the last turn with the smallest key stay."""
        for entries in self._by_key("last_turn", KEY):
            for group in self._groups(entries, "key"):
                least = group["rest"].min()
                first = int(group["number"][group["rest"] == least][0])
                for number in group["number"][group["rest"] != least].tolist():
                    yield number, first, 1.0

    def _near(self) -> Iterator[tuple[int, int, float]]:
        """Candidates are compared with the first of theirs in each band, until one is near enough."""
        most = COMPARISONS if self._policies.near_duplicates == "report" else 2**62
        far: set[tuple[int, int]] = set()
        for entries in self._by_key("near_duplicates", BAND):
            for group in self._groups(entries, "key"):
                first, *others = [number for number in group["number"].tolist() if not self._again[number]] or [-1]
                for number in others:
                    if (first, number) in far:
                        continue
                    if self._compared >= most:
                        return
                    self._compared += 1
                    similar = how_near(self._record(first), self._record(number))
                    if similar >= NEARLY:
                        self._again[number] = True
                        yield number, first, similar
                    elif len(far) < COMPARISONS:
                        far.add((first, number))

    def _places(self, numbers: Iterable[int]) -> NDArray[Any]:
        """Read, not mapped: pages that were once looked at would stay in memory."""
        file, size = self._places_file.fileno(), PLACE.itemsize
        return np.frombuffer(b"".join([os.pread(file, size, int(number) * size) for number in numbers]), dtype=PLACE)

    def _record(self, number: int) -> dict[str, Any]:
        (place,) = self._places([number])
        record: dict[str, Any] = orjson.loads(self._record_at(int(place["high"]) >> 56, int(place["offset"])))
        return record

    def _origin(self, number: int) -> tuple[str, int]:
        (place,) = self._places([number])
        return self._origin_names[int(place["file"])], int(place["row"])

    def _named(self, number: int) -> dict[str, Any]:
        file, row = self._origin(number)
        return {"ranking_id": self._record(number)["ranking_id"], "file": file, "row": row}

    # -- what goes and what stays --------------------------------------------------------------------------------------

    def kept(self, records: Iterable[tuple[bytes, bytes]], quarantine: Quarantine) -> Iterator[tuple[bytes, bytes]]:
        """The records, by digest, but for those that must go; those that a policy quarantines are given to `quarantine`."""
        out = np.fromfile(self._folder / "out", dtype=_OUT)
        places = self._places(out["number"])
        order = np.lexsort((out["kind"], places["high"]))
        out, places = out[order], places[order]
        firsts = (places["high"].astype(np.uint64) >> np.uint64(56)).astype(np.int64)
        byte, gone = -1, dict[bytes, Any]()
        for digest, record in records:
            if digest[0] != byte:
                byte, gone = digest[0], {}
                for number in range(np.searchsorted(firsts, byte), np.searchsorted(firsts, byte, side="right")):
                    gone.setdefault(places[number].tobytes()[:16], out[number])
            entry = gone.get(digest[:16]) if gone else None
            if entry is None:
                yield digest, record
                continue
            reason = REASONS.get(KINDS[int(entry["kind"])])
            if reason is not None:
                file, row = self._origin(int(entry["of"]))
                detail = f"that of {file}, row {row}; similarity {float(entry['similarity']):.2f}"
                quarantine.add(*self._origin(int(entry["number"])), Rejected(reason, detail), b"")
                self.quarantined += 1

    def report(self) -> dict[str, Any]:
        """Counts and first examples of each kind, for the ingest report."""
        found = {
            kind: {"policy": getattr(self._policies, kind), **self.counts[kind], "examples": self._examples[kind]} for kind in KINDS
        }
        limited = self._policies.near_duplicates == "report" and self._compared >= COMPARISONS
        found["near_duplicates"] |= {"comparisons": self._compared, "all_compared": not limited}
        return found
