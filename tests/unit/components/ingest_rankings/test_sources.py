"""Local sources: files, folders, folders saved by `datasets`, and the streaming reader behind hf://."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from components.ingest_rankings.sources import find_source, source_fingerprint
from components.services.exits import DoNotRetry
from components.services.storage import Storage

ROWS: list[dict[str, Any]] = [{"prompt": f"question {n}", "completions": ["yes", "no"], "ranks": [1, 2]} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def find(uri: str | Path, scratch: Path) -> Any:
    return find_source(str(uri), Storage(), scratch, 1000)


def test_folder_reads_data_and_lists_the_rest(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "more" / "b.json.gz").write_bytes(gzip.compress(LINES))
    for beside in ("LICENSE", "README.md", "rankloop.json", ".cache/c.jsonl", ".d.jsonl"):
        (folder / beside).write_bytes(LINES)
    source = find(folder, tmp_path)
    assert [file.uri for file in source.files] == [str(folder / "a.jsonl"), str(folder / "more" / "b.json.gz")]
    assert source.skipped == [str(folder / name) for name in ("LICENSE", "README.md", "rankloop.json")]
    result = ingest(folder)
    assert (result.read, result.snapshot.rankings, result.duplicates) == (10, 5, 5)


@pytest.mark.parametrize("name", ["LICENSE", "rankings", "rankings.jsonl.gz", "x.parquet"])
def test_named_file_is_read_whatever_its_name(tmp_path: Path, ingest: Callable[..., Any], name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    assert ingest(tmp_path / name).snapshot.rankings == 5


def test_parquet_and_lines_are_the_same_rankings(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert ingest(tmp_path).snapshot.digest == ingest({"rows.jsonl": LINES}).snapshot.digest


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/nowhere/x.jsonl", "no such file or folder"),
        ("", "no such file or folder"),
        ("gs://bucket/x", "unknown scheme"),
        ("~nobody/x.jsonl", "no such file or folder"),
        ("x" * 300, "no such file or folder"),
        ("a\0b", "no such file or folder"),
        ("hf://", "names no dataset"),
        ("s3://", "is not an S3 URI"),
    ],
)
def test_wrong_source_is_named(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(DoNotRetry, match=message) as caught:
        find(uri, tmp_path)
    assert repr(uri) in caught.value.message
    assert caught.value.remedy
    with pytest.raises(DoNotRetry, match=message):
        source_fingerprint(uri)


def test_folder_without_data_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match="no data file there"):
        find(tmp_path, tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DoNotRetry, match=r"skipped: .*notes\.txt"):
        find(tmp_path, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_the_right_to_read_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(DoNotRetry, match=r"a\.jsonl cannot be read"):
        list(find(tmp_path / "a.jsonl", tmp_path).files[0].rows())


# -- datasets --------------------------------------------------------------------------------------------------------------


def test_saved_dataset(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    result = ingest(tmp_path / "saved")
    assert result.snapshot.digest == ingest({"a.jsonl": LINES}).snapshot.digest
    assert [file.file.uri for file in result.files] == [str(tmp_path / "saved")]


def test_saved_splits(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}).save_to_disk(tmp_path / "saved")
    result = ingest(tmp_path / "saved")
    assert result.snapshot.digest == ingest({"a.jsonl": LINES}).snapshot.digest
    assert [(file.file.uri, file.rows) for file in result.files] == [(f"{tmp_path}/saved:test", 2), (f"{tmp_path}/saved:train", 3)]


def test_saved_dataset_with_selected_rows_and_messages(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    rows = [
        {"chosen": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "b"}]}
        for n in range(700)
    ]  # fmt: skip
    Dataset.from_list(rows).select(range(0, 700, 2)).save_to_disk(tmp_path / "saved")
    result = ingest(tmp_path / "saved")
    assert (result.read, result.snapshot.rankings) == (350, 350)
    assert {each.prompt[0]["content"] for each in result.rankings} == {f"q{n}" for n in range(0, 700, 2)}


def test_saved_dataset_that_lacks_its_data(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DoNotRetry, match="saved is not a complete folder"):
        find(tmp_path / "saved", tmp_path)


def test_streaming_reader_with_and_without_a_split(tmp_path: Path, ingest: Callable[..., Any]) -> None:
    """`datasets` takes a local folder for a name, so this is the code that reads from the hub."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[3:]))
    whole = ingest(f"hf://{folder}")
    assert whole.snapshot.digest == ingest({"a.jsonl": LINES}).snapshot.digest
    assert [(file.file.uri, file.rows) for file in whole.files] == [(f"hf://{folder}:test", 2), (f"hf://{folder}:train", 3)]
    assert ingest(f"hf://{folder}:train").read == 3
    with pytest.raises(DoNotRetry, match="cannot be read"):
        ingest(f"hf://{folder}:validation")


def test_hub_that_cannot_be_reached_is_worth_a_retry() -> None:
    code = (
        "import pathlib, sys\n"
        "from components.ingest_rankings.sources import find_source, source_fingerprint\n"
        "from components.services.exits import Retry\n"
        "assert len(source_fingerprint('hf://owner/name@main')) == 64\n"
        "try:\n"
        "    find_source('hf://owner/name', None, pathlib.Path('.'), 1000)\n"
        "except Retry as error:\n"
        "    print(error.message)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "the hub cannot be reached for hf://owner/name" in done.stdout, done.stderr


# -- fingerprints ----------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    first = source_fingerprint(str(folder))
    (folder / "README.md").write_text("no data")
    assert source_fingerprint(str(folder)) == first
    (folder / "a.jsonl").write_bytes(LINES.replace(b"yes", b"yea"))  # same size
    changed = source_fingerprint(str(folder))
    (folder / "b.jsonl").write_bytes(LINES)
    assert len({first, changed, source_fingerprint(str(folder)), source_fingerprint(str(folder / "b.jsonl"))}) == 4
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl").unlink()
    assert source_fingerprint(str(folder)) == first


def test_fingerprint_of_a_saved_dataset(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    Dataset.from_list(ROWS[:4]).save_to_disk(tmp_path / "two")
    assert source_fingerprint(str(tmp_path / "one")) != source_fingerprint(str(tmp_path / "two"))
    assert source_fingerprint(f"hf://{tmp_path / 'one'}") == source_fingerprint(str(tmp_path / "one"))
