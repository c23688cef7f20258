"""The stage against a real object store: prefixes, paging, what is published, and what is not when something is wrong."""

import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.ingest_rankings.rows import read_rows
from components.ingest_rankings.sources import source_fingerprint
from components.ingest_rankings.stage import Config, Inputs, Outputs, run
from components.rlhf.records import iterate_snapshot
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context
from components.services.storage import MARKER, Storage, join

ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {n}", "completions": ["yes", "no", "perhaps"], "scores": [n, 1, 0.5], "rater_id": f"r{n % 3}"}
    for n in range(60)
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def root(services: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of the store for this test's artifacts."""
    uri = join(services.storage_root, f"ingest-{uuid.uuid4().hex}")
    monkeypatch.setenv("RANKLOOP_STORAGE", uri)
    return uri


def ingest(rankings: str, scratch: Path, **config: Any) -> tuple[Outputs, Context]:
    scratch.mkdir(parents=True, exist_ok=True)
    parsed, inputs = Config(**config), Inputs(rankings=rankings)
    context = Context("ingest_rankings", parsed, inputs, scratch)
    return run(parsed, inputs, context), context


def written(root: str) -> list[str]:
    """Every object that a stage may have left."""
    return [item.uri for kind in ("rankings", "ingests") for item in Storage().list(f"{root}/{kind}/")]


def test_prefix_of_several_objects_and_forms(root: str, tmp_path: Path) -> None:
    storage, source = Storage(), f"{root}/source"
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS[40:]), table)
    storage.put_bytes(f"{source}/a.jsonl", lines(ROWS[:20]) + b'{"prompt": "cut o')
    storage.put_bytes(f"{source}/deep/er/b.jsonl.gz", gzip.compress(lines(ROWS[10:40])))
    storage.put_bytes(f"{source}/c.parquet", table.getvalue())
    storage.put_bytes(f"{source}/LICENSE", b"free")
    storage.put_bytes(f"{source}-old/z.jsonl", lines([{"prompt": "old", "chosen": "a", "rejected": "b"}]))
    outputs, context = ingest(source, tmp_path / "one")

    counts = {"read": 71, "accepted": 60, "duplicates": 10, "quarantined": 1}
    assert context.summary == {**counts, "rankings": 60}
    marker = storage.fetch_folder(outputs.snapshot_uri, tmp_path / "fetched")
    assert marker["role"] == "rankings"
    assert outputs.snapshot_uri == f"{root}/rankings/{marker['digest']}"
    # n > 1, n = 1 (a tie) and n = 0 as scores against 1 and 0.5: three pairs, two in the tie
    assert (marker["rankings"], marker["prompts"], marker["raters"], marker["pairs"]) == (60, 60, 3, 59 * 3 + 2)
    found = list(iterate_snapshot(tmp_path / "fetched"))
    assert {each.prompt[0]["content"]: each.ranks for each in found} == {
        f"question {n}": {0: [3, 1, 2], 1: [1, 1, 3]}.get(n, [1, 2, 3]) for n in range(60)
    }
    report = storage.fetch_folder(outputs.ingest_uri, tmp_path / "report")
    assert report["role"] == "ingest"
    assert {name: report[name] for name in counts} == counts
    assert report["reasons"] == {"not JSON": 1}
    assert report["skipped"] == [f"{source}/LICENSE"]
    assert report["snapshot_uri"] == outputs.snapshot_uri
    assert [(each["uri"], each["rows"], each["formats"]) for each in report["files"]] == [
        (f"{source}/a.jsonl", 21, {"kway": 20}),
        (f"{source}/c.parquet", 20, {"kway": 20}),
        (f"{source}/deep/er/b.jsonl.gz", 30, {"kway": 30}),
    ]
    (entry,) = [json.loads(line) for line in (tmp_path / "report" / "quarantine.jsonl").read_bytes().splitlines()]
    assert (entry["file"], entry["row"], entry["reason"]) == (f"{source}/a.jsonl", 21, "not JSON")

    # The same rankings from one local file: the same snapshot, which is not written again.
    storage.put_json(join(outputs.snapshot_uri, MARKER), {**marker, "untouched": True})
    (tmp_path / "all.jsonl").write_bytes(lines(ROWS[::-1]))
    again, _ = ingest(str(tmp_path / "all.jsonl"), tmp_path / "two")
    assert again.snapshot_uri == outputs.snapshot_uri
    assert again.ingest_uri != outputs.ingest_uri
    assert storage.get_json(join(again.snapshot_uri, MARKER))["untouched"] is True


def test_listing_of_more_than_one_page(root: str, tmp_path: Path) -> None:
    storage, objects = Storage(), 1007  # S3 lists 1000 at a time
    rows = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(objects)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: storage.put_bytes(f"{root}/source/{n:05d}.jsonl", lines([rows[n]])), range(objects)))
    _, context = ingest(f"{root}/source/", tmp_path)
    assert context.summary["accepted"] == objects


def test_exact_key_is_read_whatever_its_name(root: str, tmp_path: Path) -> None:
    Storage().put_bytes(f"{root}/source/export", gzip.compress(lines(ROWS)))
    Storage().put_bytes(f"{root}/source/export.jsonl", lines(ROWS[:1]))
    assert ingest(f"{root}/source/export", tmp_path)[1].summary["read"] == 60


def test_report_of_an_earlier_attempt_is_replaced(root: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS[:5]))
    first, _ = ingest(str(path), tmp_path / "one")
    path.write_bytes(lines(ROWS[:7]))
    second, _ = ingest(str(path), tmp_path / "two")
    assert first.ingest_uri == second.ingest_uri
    assert first.snapshot_uri != second.snapshot_uri
    assert Storage().get_json(join(second.ingest_uri, MARKER))["read"] == 7


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ("s3://no-such-bucket-here/x", "bucket 'no-such-bucket-here'"),
        ("{root}/nothing", "no such object"),
        ("{root}/sour", "no such object"),
    ],
)
def test_wrong_place_is_named(root: str, tmp_path: Path, rankings: str, message: str) -> None:
    Storage().put_bytes(f"{root}/source/a.jsonl", lines(ROWS))
    with pytest.raises(DoNotRetry, match=message):
        ingest(rankings.format(root=root), tmp_path)
    assert written(root) == []


def test_wrong_secret_is_refused(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage().put_bytes(f"{root}/source/a.jsonl", lines(ROWS))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # which remembers the right one
        with pytest.raises(DoNotRetry, match=r"refuses access to .*/source"):
            ingest(f"{root}/source", tmp_path)
    assert written(root) == []


def test_store_that_is_down_is_worth_a_retry(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Retry, match="cannot be reached"):
        ingest(f"{root}/source", tmp_path)


def test_connection_lost_in_the_middle_is_worth_a_retry(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that announces a megabyte, sends two rows and closes."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(2**16)
            head = "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nContent-Type: application/json\r\n\r\n"
            connection.sendall(head.encode() + lines(ROWS[:2]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(Retry, match="cannot be reached"), Storage().open_read("s3://bucket/a.jsonl") as stream:
            list(read_rows(stream, "s3://bucket/a.jsonl", tmp_path, 10**6))
        thread.join()


def test_upload_to_a_bucket_that_does_not_exist_names_it(root: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(DoNotRetry, match="bucket 'no-such-bucket-here'"):
        Storage().upload_file(tmp_path / "a", "s3://no-such-bucket-here/a")


def test_nothing_is_written_when_a_file_is_cut_off(root: str, tmp_path: Path) -> None:
    storage = Storage()
    storage.put_bytes(f"{root}/source/a.jsonl", lines(ROWS))
    storage.put_bytes(f"{root}/source/b.jsonl.gz", gzip.compress(lines(ROWS))[:-20])
    with pytest.raises(DoNotRetry, match=r"b\.jsonl\.gz: its compressed data breaks after row \d+"):
        ingest(f"{root}/source", tmp_path)
    assert written(root) == []


def test_nothing_is_written_when_no_row_is_a_ranking(root: str, tmp_path: Path) -> None:
    Storage().put_bytes(f"{root}/source/a.json", b'[{"prompt": "x"},\n {"prompt": "y"}]')
    with pytest.raises(DoNotRetry, match=r"no ranking in 2 rows of 1 files\n.*a\.json, row 1: unknown form"):
        ingest(f"{root}/source", tmp_path)
    Storage().put_bytes(f"{root}/empty/a.json", b"\n")
    with pytest.raises(DoNotRetry, match="no ranking in 0 rows of 1 files"):
        ingest(f"{root}/empty", tmp_path / "two")
    assert written(root) == []


def test_fingerprint_of_a_prefix_follows_its_content(root: str) -> None:
    storage, source = Storage(), f"{root}/source"
    storage.put_bytes(f"{source}/a.jsonl", lines(ROWS[:1]))
    first = source_fingerprint(source)
    storage.put_bytes(f"{source}/README", b"about")
    assert source_fingerprint(source) == first
    storage.put_bytes(f"{source}/a.jsonl", lines(ROWS[:1]).replace(b"yes", b"yea"))
    assert source_fingerprint(source) != first
    storage.put_bytes(f"{source}/a.jsonl", lines(ROWS[:1]))
    assert source_fingerprint(source) == first


# -- as a process ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_worth_a_retry(root: str, environment: dict[str, str], tiny_disk: Path, tmp_path: Path) -> None:
    many = [{**row, "ranking_id": f"{n}-{m}"} for n, row in enumerate(ROWS) for m in range(100)]
    (tmp_path / "a.jsonl").write_bytes(lines(many))
    options, variables = command("--rankings", str(tmp_path / "a.jsonl")), {**environment, "TMPDIR": str(tiny_disk)}
    done = subprocess.run(options, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "no space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tiny_disk.iterdir()) == []
    assert written(root) == []


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "components.ingest_rankings", *options]


@pytest.fixture
def environment(root: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Untracked, with a scratch place that must be empty afterwards."""
    (tmp_path / "scratch").mkdir()
    values = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RANKLOOP_"))}
    values["RANKLOOP_RATER_SALT"] = os.environ["RANKLOOP_RATER_SALT"]
    yield {**values, "RANKLOOP_STORAGE": root, "TMPDIR": str(tmp_path / "scratch")}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_alone_it_prints_its_outputs(root: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    options = command("--rankings", str(tmp_path / "a.jsonl"), "--test-fraction", "0.5")
    done = subprocess.run(options, env=environment, capture_output=True, text=True, check=True)
    outputs = json.loads(done.stdout)
    assert Storage().get_json(join(outputs["ingest_uri"], MARKER))["config"]["test_fraction"] == 0.5
    assert Storage().get_json(join(outputs["snapshot_uri"], MARKER))["splits"]["test"] > 15


def test_without_a_salt_it_reads_nothing_and_says_what_to_do(root: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    without = {name: value for name, value in environment.items() if name != "RANKLOOP_RATER_SALT"}
    done = subprocess.run(
        command("--rankings", str(tmp_path / "a.jsonl")), env=without, capture_output=True, text=True, check=False
    )
    assert done.returncode == 65
    assert "the salt of the raters' pseudonyms, RANKLOOP_RATER_SALT, is not set\n  remedy: put a random text there" in done.stderr
    assert written(root) == []


def test_missing_file_ends_with_65_and_says_so(root: str, environment: dict[str, str]) -> None:
    done = subprocess.run(command("--rankings", "/nowhere/x"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert "ingest_rankings failed: rankings = '/nowhere/x': no such file or folder" in done.stderr
    assert "remedy: check the path" in done.stderr
    assert "Traceback" not in done.stderr
    assert written(root) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopped_while_reading_it_leaves_nothing(
    root: str, environment: dict[str, str], tmp_path: Path, number: int, code: int
) -> None:
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)
    process = subprocess.Popen(command("--rankings", str(pipe)), env=environment, stderr=subprocess.PIPE, text=True)
    with open(pipe, "wb", buffering=0) as writer:  # opens when the stage opens it
        writer.write(lines(ROWS))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert written(root) == []
