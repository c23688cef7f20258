"""The snapshot: its digest by an independent calculation, its order, its counts, its files, and its flat memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.ingest_rankings import snapshot as module
from components.ingest_rankings.snapshot import SnapshotWriter
from components.rlhf.records import SCHEMA, Ranking, iterate_snapshot


def ranking(number: int, **changes: Any) -> Ranking:
    fields: dict[str, Any] = {
        "ranking_id": f"id-{number}",
        "prompt": [{"role": "user", "content": f"Frage {number} äöü ☃"}],
        "completions": ["a", "b", "c"],
        "ranks": [1, 2, 3],
        "rater_id": f"r{number % 3}",
        "source": "desk",
        "collected_at": None,
        "confidence": 0.1,
        "policies": None,
        "criterion": "overall",
        "split": "train",
    }
    return Ranking(**{**fields, **changes})


def write(folder: Path, rankings: list[Ranking]) -> module.Snapshot:
    with SnapshotWriter(folder / "sort") as writer:
        for each in rankings:
            writer.add(each)
        return writer.write(writer.sorted_records(), folder / "snapshot")


def oracle(rankings: list[Ranking]) -> list[bytes]:
    """Record digests by the standard library: sorted keys, no white space, UTF-8."""
    records = [json.dumps(r._asdict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False) for r in rankings]
    return sorted({hashlib.sha256(record.encode()).digest() for record in records})


def test_digest_order_and_duplicates_by_an_independent_calculation(tmp_path: Path) -> None:
    rankings = [ranking(n) for n in range(300)]
    found = write(tmp_path, [*rankings, *rankings[:50]])
    digests = oracle(rankings)
    assert found.rankings == 300
    assert found.digest == hashlib.sha256(b"".join(digests)).hexdigest()
    stored = list(iterate_snapshot(tmp_path / "snapshot"))
    assert [oracle([each])[0] for each in stored] == digests
    assert sorted(stored) == sorted(rankings)


def test_marker_counts_by_hand(tmp_path: Path) -> None:
    rankings = [
        ranking(1),  # 3 pairs
        ranking(1, ranking_id="again", ranks=[1, 1, 3], rater_id="r9"),  # 2 pairs
        ranking(2, completions=["a", "b"], ranks=[1, 1], split="test", source="other"),  # a tie: none
    ]
    found = write(tmp_path, [*rankings, rankings[0]])
    assert found.marker == {
        "role": "rankings",
        "digest": found.digest,
        "rankings": 3,
        "prompts": 2,
        "raters": 3,
        "pairs": 5,
        "completions_per_ranking": {"2": 1, "3": 2},
        "splits": {"train": 2, "test": 1},
        "sources": {"desk": 2, "other": 1},
    }


def test_parts_and_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_ROWS", 40)
    monkeypatch.setattr(module, "PART_ROWS", 100)
    rankings = [ranking(n) for n in range(250)]
    found = write(tmp_path, rankings)
    paths = sorted((tmp_path / "snapshot").iterdir())
    assert [path.name for path in paths] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    files = [pq.ParquetFile(path) for path in paths]
    groups = [[file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] for file in files]
    assert groups == [[40, 40, 40], [40, 40, 40], [10]]
    assert all(file.schema_arrow == SCHEMA for file in files)
    assert found.digest == hashlib.sha256(b"".join(oracle(rankings))).hexdigest()  # not of the files


def test_same_rankings_make_the_same_bytes(tmp_path: Path) -> None:
    rankings = [ranking(n) for n in range(50)]
    write(tmp_path / "one", rankings)
    write(tmp_path / "two", rankings[::-1])
    first, second = [(tmp_path / name / "snapshot" / "part-00000.parquet").read_bytes() for name in ("one", "two")]
    assert first == second


def test_snapshot_ingested_again_is_itself(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    found = write(tmp_path, [ranking(n, confidence=None if n % 2 else 1.0, policies=["x"] * 3) for n in range(20)])
    again = ingest(tmp_path / "snapshot")
    assert again.snapshot == found
    assert again.reasons == {}


_MEASURE = """
import json, resource, sys
from pathlib import Path
from components.ingest_rankings.snapshot import SnapshotWriter
from components.ingest_rankings.formats import Parsed, parse
from components.ingest_rankings.rows import read_rows

class Lines:
    def __init__(self, rows): self.rows, self.number, self.left = rows, 0, b""
    def read(self, size):
        while len(self.left) < size and self.number < self.rows:
            self.number += 1
            replies = [f"{k} {self.number} " * 90 for k in range(2)]
            row = {"prompt": f"question {self.number}", "completions": replies, "ranks": [1, 2]}
            self.left += json.dumps(row).encode() + b"\\n"
        data, self.left = self.left[:size], self.left[size:]
        return data

folder = Path(sys.argv[1])
with SnapshotWriter(folder / "sort") as writer:
    for row in read_rows(Lines(int(sys.argv[2])), "generated", folder, 10**6):
        (parsed,) = parse(row.value, "auto", "s", 0.1)
        assert isinstance(parsed, Parsed)
        writer.add(parsed.ranking)
    snapshot = writer.write(writer.sorted_records(), folder / "snapshot")
print(snapshot.rankings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def test_memory_is_flat(tmp_path: Path) -> None:
    """Twenty times the rankings (2 and 54 MB as JSON) add less than 24 MiB to the process's peak."""
    peaks = {}
    for rows in (2_000, 40_000):
        (tmp_path / str(rows)).mkdir()
        command = [sys.executable, "-c", _MEASURE, str(tmp_path / str(rows)), str(rows)]
        written, peak_bytes = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert written == rows
        peaks[rows] = peak_bytes
    assert peaks[40_000] - peaks[2_000] < 24 * 2**20, peaks
