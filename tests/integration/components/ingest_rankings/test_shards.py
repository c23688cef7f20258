"""Shards of a source on a real object store: merged they are what a single ingest makes, also as a graph that fans out."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from components.ingest_rankings.stage import Config, Inputs, Outputs, run
from components.services.exits import DoNotRetry
from components.services.launch import Context
from components.services.storage import MARKER, Storage, join

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"question {n}",
        "completions": ["yes", "no", "perhaps"],
        "scores": [n, 1, 0.5],
        "rater_id": f"r{n % 3}",
        "margin": 1,
    }
    for n in range(60)
]
BAD = b'{"prompt": "cut o\n'
FILES = 7


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def place(services: Any) -> str:
    """A prefix whose files have rows in common: whole records, and the same rankings of another export."""
    root = join(services.storage_root, f"shards-{uuid.uuid4().hex}")
    for number in range(FILES):
        rows = ROWS[8 * number : 8 * number + 12]
        again = [{**row, "ranking_id": f"{number}-{place}", "source": "other"} for place, row in enumerate(ROWS[5 * number :][:6])]
        Storage().put_bytes(f"{root}/source/{number}.jsonl", lines(rows + again) + BAD * number)
    Storage().put_bytes(f"{root}/source/LICENSE", b"free")
    return root


@pytest.fixture(autouse=True)
def _storage(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOOP_STORAGE", place)


def ingest(place: str, scratch: Path, shard_reports: tuple[str, ...] = (), **config: Any) -> tuple[Outputs, dict[str, Any]]:
    folder = scratch / uuid.uuid4().hex
    folder.mkdir(parents=True)
    parsed, inputs = Config(**config), Inputs(rankings=f"{place}/source", shard_reports=shard_reports)
    outputs = run(parsed, inputs, Context("ingest_rankings", parsed, inputs, folder))
    return outputs, Storage().get_json(join(outputs.ingest_uri, MARKER))


@pytest.mark.parametrize(("shards", "policies"), [(3, {}), (12, {"near_duplicates": "quarantine", "same_ranking": "report"})])
def test_merged_shards_are_what_one_ingest_makes(place: str, tmp_path: Path, shards: int, policies: dict[str, str]) -> None:
    parts = [ingest(place, tmp_path, shard=f"{number}/{shards}", **policies) for number in range(1, shards + 1)]
    assert sum(len(report["files"]) for _, report in parts) == FILES
    if shards > FILES:
        assert min(report["read"] for _, report in parts) == 0, "a shard may have no file"
    merged, report = ingest(place, tmp_path, tuple(outputs.ingest_uri for outputs, _ in reversed(parts)), **policies)
    single, whole = ingest(place, tmp_path, known_files="reread", **policies)
    assert merged.snapshot_uri == single.snapshot_uri
    counts = ("read", "accepted", "duplicates", "quarantined", "declined", "reasons", "files", "skipped", "ignored_fields")
    assert {name: report[name] for name in counts} == {name: whole[name] for name in counts}
    assert report["alike"]["same_ranking"]["found"] == whole["alike"]["same_ranking"]["found"] > 10
    assert report["read"] == sum(18 + number for number in range(FILES)) - sum(
        12 - len(ROWS[8 * n : 8 * n + 12]) for n in range(FILES)
    )
    assert report["reasons"]["not JSON"] == 21
    Storage().fetch_folder(merged.ingest_uri, tmp_path / "merged")
    Storage().fetch_folder(single.ingest_uri, tmp_path / "single")
    entries = [sorted((tmp_path / name / "quarantine.jsonl").read_bytes().splitlines()) for name in ("merged", "single")]
    cut = [[line for line in each if b"not JSON" in line] for each in entries]
    assert cut[0] == cut[1]
    assert len(cut[0]) == 21
    assert report["parents"] == {"shards": [outputs.ingest_uri for outputs, _ in parts]}


def test_what_does_not_belong_together_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (ingest(place, tmp_path, shard=f"{number}/2")[0].ingest_uri for number in (1, 2))
    other = ingest(place, tmp_path, shard="2/2", test_fraction=0.3)[0].ingest_uri
    for given, said in (
        ((first,), r"of 1/2: not each shard once"),
        ((first, first), "of 1/2, 1/2: not each shard once"),
        ((first, other), r"has test_fraction = 0\.3, and here it is 0\.1"),
    ):
        with pytest.raises(DoNotRetry, match=said):
            ingest(place, tmp_path, given)
    monkeypatch.setenv("RANKLOOP_RATER_SALT", "another salt of someone")
    with pytest.raises(DoNotRetry, match="rater_salt_fingerprint"):
        ingest(place, tmp_path, (first, second))


def test_the_graph_fans_out_and_merges(place: str, tmp_path: Path) -> None:
    arguments = {"rankings": f"{place}/source", "shards": ["1/2", "2/2"], "ingest_rankings_config": {"source": "desk"}}
    script = f"""
import json
from kfp import local
from pipelines.sharded_ingest import sharded_ingest_graph
local.init(local.SubprocessRunner(use_venv=False), pipeline_root={str(tmp_path / "kfp")!r}, raise_on_error=True)
print("made", json.dumps(sharded_ingest_graph()(**{arguments!r}).outputs))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("made ")).removeprefix("made "))
    single, _ = ingest(place, tmp_path, source="desk")
    assert made["snapshot_uri"] == single.snapshot_uri
    report = Storage().get_json(join(made["ingest_uri"], MARKER))
    assert len(report["parents"]["shards"]) == 2
