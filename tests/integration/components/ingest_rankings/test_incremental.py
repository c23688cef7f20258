"""A prefix where files keep arriving: what was read before is not read again, and the result is the one of reading everything."""

import gzip
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from components.ingest_rankings import sources
from components.ingest_rankings.stage import Config, Inputs, Outputs, run
from components.rlhf.records import iterate_snapshot
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context
from components.services.storage import MARKER, Storage, join

ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {n}", "completions": ["yes", "no", "perhaps"], "scores": [n, 1, 0.5], "rater_id": f"r{n % 3}"}
    for n in range(60)
]
BAD = b'{"prompt": "cut o\n'


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def root(services: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of the store for this test's artifacts."""
    uri = join(services.storage_root, f"incremental-{uuid.uuid4().hex}")
    monkeypatch.setenv("RANKLOOP_STORAGE", uri)
    return uri


def ingest(root: str, scratch: Path, **config: Any) -> tuple[Outputs, dict[str, Any]]:
    """One run over `<root>/source`, and its report."""
    folder = scratch / uuid.uuid4().hex
    folder.mkdir(parents=True)
    parsed, inputs = Config(**config), Inputs(rankings=f"{root}/source")
    outputs = run(parsed, inputs, Context("ingest_rankings", parsed, inputs, folder))
    return outputs, Storage().get_json(join(outputs.ingest_uri, MARKER))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the source's files as they are read."""
    names: list[str] = []
    original = sources._object_blocks

    def noted(item: Any, *rest: Any) -> Any:
        names.append(item.uri.rpartition("/")[2])
        return original(item, *rest)

    monkeypatch.setattr(sources, "_object_blocks", noted)
    return names


def test_only_new_files_are_read_and_the_result_is_that_of_reading_all(root: str, tmp_path: Path, opened: list[str]) -> None:
    storage = Storage()
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:20]) + BAD)
    storage.put_bytes(f"{root}/source/b.jsonl.gz", gzip.compress(lines(ROWS[10:30])))
    first, report_1 = ingest(root, tmp_path)
    assert (report_1["parents"], report_1["new"]) == ({}, {"files": 2, "read": 41, "quarantined": 1})
    storage.put_bytes(f"{root}/source/c.jsonl", BAD + lines(ROWS[25:60]))
    opened.clear()
    second, report_2 = ingest(root, tmp_path)
    assert opened == ["c.jsonl"]
    assert report_2["new"] == {"files": 1, "read": 36, "quarantined": 1}
    assert report_2["parents"] == {"snapshot": first.snapshot_uri, "ingest": first.ingest_uri}
    assert storage.get_json(join(second.snapshot_uri, MARKER))["parents"] == {"snapshot": first.snapshot_uri}

    opened.clear()
    everything, report_3 = ingest(root, tmp_path, known_files="reread")
    assert opened == ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    assert everything.snapshot_uri == second.snapshot_uri
    whole = ("read", "accepted", "duplicates", "quarantined", "reasons", "files", "snapshot_uri")
    assert {name: report_3[name] for name in whole} == {name: report_2[name] for name in whole}
    assert (report_2["read"], report_2["accepted"], report_2["duplicates"], report_2["quarantined"]) == (77, 60, 15, 2)

    opened.clear()
    again, report_4 = ingest(root, tmp_path)
    assert opened == []
    assert again.snapshot_uri == second.snapshot_uri
    assert {name: report_4[name] for name in whole} == {name: report_2[name] for name in whole}


def test_a_file_that_changed_behind_its_key_is_noticed(root: str, tmp_path: Path, opened: list[str]) -> None:
    storage = Storage()
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:20]))
    storage.put_bytes(f"{root}/source/b.jsonl", lines(ROWS[20:30]))
    first, _ = ingest(root, tmp_path)
    storage.put_bytes(f"{root}/source/b.jsonl", lines(ROWS[30:40]))
    with pytest.raises(DoNotRetry, match=r"1 files that were read before have changed\n.*b\.jsonl: \d+ bytes with ETag"):
        ingest(root, tmp_path)
    opened.clear()
    second, report = ingest(root, tmp_path, changed_files="reread")
    assert opened == ["a.jsonl", "b.jsonl"]
    assert (report["accepted"], report["parents"]) == (30, {})
    assert second.snapshot_uri != first.snapshot_uri


def test_a_digest_is_verified_on_demand(root: str, tmp_path: Path) -> None:
    storage = Storage()
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:20]))
    ingest(root, tmp_path)
    ingest(root, tmp_path, known_files="verify")
    (mark,) = [item.uri for item in storage.list(f"{root}/watermarks/")]
    content = storage.get_json(mark)
    (name,) = content["files"]
    content["files"][name]["sha256"] = "0" * 64  # as if what was read then had been something else
    storage.put_json(mark, content)
    ingest(root, tmp_path)
    with pytest.raises(DoNotRetry, match=r"SHA-256 0000.* when it was read"):
        ingest(root, tmp_path, known_files="verify")


def test_another_form_or_a_lost_snapshot_reads_everything(root: str, tmp_path: Path, opened: list[str]) -> None:
    storage = Storage()
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:20]))
    first, _ = ingest(root, tmp_path)
    opened.clear()
    ingest(root, tmp_path, test_fraction=0.5)
    assert opened == ["a.jsonl"]
    storage.delete(join(first.snapshot_uri, MARKER))
    opened.clear()
    again, report = ingest(root, tmp_path)
    assert opened == ["a.jsonl"]
    assert (again.snapshot_uri, report["parents"]) == (first.snapshot_uri, {})


@pytest.mark.parametrize("policy", ["report", "quarantine"])
def test_the_same_rankings_of_a_parent_count_as_seen(root: str, tmp_path: Path, opened: list[str], policy: str) -> None:
    """Whichever of two has the smaller digest stays, so that some of the parent's go."""
    storage, shared = Storage(), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{**row, "ranking_id": f"first-{n}"} for n, row in enumerate(ROWS[:30])]
    rows += [{**row, "prompt": [*shared, {"role": "user", "content": row["prompt"]}]} for row in ROWS[30:34]]
    again = [{**row, "ranking_id": f"again-{n}", "source": "other"} for n, row in enumerate(rows[:28])]
    turns = [{**row, "prompt": [*shared, {"role": "user", "content": row["prompt"] + "?"}]} for row in ROWS[34:38]]
    storage.put_bytes(f"{root}/source/a.jsonl", lines(rows))
    first, _ = ingest(root, tmp_path, last_turn=policy)
    storage.put_bytes(f"{root}/source/b.jsonl", lines(again + turns))
    opened.clear()
    second, report = ingest(root, tmp_path, last_turn=policy)
    assert opened == ["b.jsonl"]
    assert (report["alike"]["same_ranking"]["found"], report["duplicates"]) == (28, 28)
    storage.fetch_folder(second.snapshot_uri, tmp_path / "second")
    kept = [each.ranking_id.split("-")[0] for each in iterate_snapshot(tmp_path / "second")]
    assert min(kept.count("first"), kept.count("again")) >= 5
    origins = {each["file"] for pair in report["alike"]["same_ranking"]["examples"] for each in (pair["one"], pair["other"])}
    assert origins == {first.snapshot_uri, f"{root}/source/b.jsonl"}
    whole, report_2 = ingest(root, tmp_path, last_turn=policy, known_files="reread")
    assert whole.snapshot_uri == second.snapshot_uri
    counts = ("read", "accepted", "duplicates", "quarantined", "reasons")
    assert {name: report_2[name] for name in counts} == {name: report[name] for name in counts}
    assert report["quarantined"] == (7 if policy == "quarantine" else 0)


def test_another_salt_is_noticed_for_its_raters_would_not_join(
    root: str, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, variable = Storage(), "RANKLOOP_RATER_SALT"
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:20]))
    first, report_1 = ingest(root, tmp_path)
    storage.put_bytes(f"{root}/source/b.jsonl", lines(ROWS[20:30]))
    with monkeypatch.context() as patch:
        patch.setenv(variable, "another salt of someone")
        with pytest.raises(DoNotRetry, match=rf"{variable} is not the one of {first.snapshot_uri}.*\n.*known_files to reread"):
            ingest(root, tmp_path)
        opened.clear()
        _, report_2 = ingest(root, tmp_path, known_files="reread")
        assert opened == ["a.jsonl", "b.jsonl"]
        assert storage.get_json(join(report_2["snapshot_uri"], MARKER))["raters"] == 3
        again, _ = ingest(root, tmp_path)  # from its own watermark
        assert again.snapshot_uri == report_2["snapshot_uri"]
    assert report_1["rater_salt_fingerprint"] != report_2["rater_salt_fingerprint"]
    kept = [item.uri for item in storage.list(f"{root}/ingests/") if item.uri.endswith(MARKER)]
    assert len(kept) == 3, "no report has replaced another, and the refused ingest left none"
    assert all(os.environ[variable].encode() not in storage.get_bytes(item.uri) for item in storage.list(root))


def test_a_file_that_is_gone_leaves_its_rankings(root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage()
    for name, rows in (("a", ROWS[:20]), ("b", ROWS[20:30])):
        storage.put_bytes(f"{root}/source/{name}.jsonl", lines(rows))
    first, _ = ingest(root, tmp_path)
    storage.delete(f"{root}/source/a.jsonl")
    second, _ = ingest(root, tmp_path)
    assert second.snapshot_uri == first.snapshot_uri
    assert "1 files are gone whose rankings stay" in caplog.text


def test_an_object_that_changes_between_listing_and_reading_is_worth_a_retry(root: str) -> None:
    storage = Storage()
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:20]))
    (item,) = storage.list(f"{root}/source/")
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS[:21]))
    with pytest.raises(Retry, match="changed since it was listed"), storage.open_read(item.uri, item.etag):
        pass
