"""The local servers: keys that are checked, one owner of a folder, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage
from pipelines.local_services import LocalServices, environment_of, free_ports


def servers(home: Path) -> list[int]:
    """Process groups of the servers that work on this home."""
    found: list[int] = json.loads((home / "services.json").read_text(encoding="utf-8"))["processes"]
    return found


def alive(groups: list[int]) -> list[psutil.Process]:
    """What lives of the groups, workers of a server included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_they_start_keep_their_data_and_leave_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKLOOP_RATER_SALT", raising=False)
    with LocalServices(tmp_path) as services, environment_of(services):
        Storage().put_bytes("s3://rankloop/kept", b"data")
        with urllib.request.urlopen(services.tracking_uri + "/health", timeout=5) as reply:
            assert reply.status == 200
        groups = servers(tmp_path)
        assert len(alive(groups)) >= 2
        for process in alive(groups):
            for connection in process.net_connections():
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip in ("127.0.0.1", "::1"), connection
        first = dict(services.environment)
        salt = tmp_path / "rater-salt"
        assert (salt.read_text(), salt.stat().st_mode & 0o777) == (first["RANKLOOP_RATER_SALT"], 0o600)
        assert len(first["RANKLOOP_RATER_SALT"]) == 64
    assert not alive(groups)
    with LocalServices(tmp_path) as services, environment_of(services):
        assert Storage().get_bytes("s3://rankloop/kept") == b"data"
        assert services.environment["AWS_SECRET_ACCESS_KEY"] != first["AWS_SECRET_ACCESS_KEY"]
        assert services.environment["RANKLOOP_RATER_SALT"] == first["RANKLOOP_RATER_SALT"], "raters keep their pseudonyms"


def test_a_second_process_uses_the_servers_of_the_first_and_leaves_them(tmp_path: Path) -> None:
    with LocalServices(tmp_path) as first:
        with LocalServices(tmp_path) as second:
            assert second.attached
            assert second.tracking_uri == first.tracking_uri
        with urllib.request.urlopen(first.tracking_uri + "/health", timeout=5) as reply:
            assert reply.status == 200


USES_THEM = """
import signal, sys
from pathlib import Path
from pipelines.local_services import LocalServices
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell script starts what it puts in the background without it
with LocalServices(Path(sys.argv[1])) as services:
    print(services.attached, flush=True)
    if sys.stdin.read():
        raise ValueError
"""


@contextlib.contextmanager
def owner_that_leaves_before(home: Path, users: int, error: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    """A process that started the servers and is done, and behind it in the list others that still use them."""
    started: list[subprocess.Popen[str]] = []
    try:
        for number in range(1 + users):
            command = [sys.executable, "-c", USES_THEM, str(home)]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
            assert (output := started[-1].stdout) is not None
            assert output.readline() == f"{number > 0}\n"
        owner = started[0]
        assert owner.stdin is not None
        assert owner.stderr is not None
        owner.stdin.write("x" * error)
        owner.stdin.close()
        assert "Another process uses these servers" in owner.stderr.readline()
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("error", [False, True])
def test_their_owner_waits_for_all_who_still_use_them(tmp_path: Path, error: bool) -> None:
    with owner_that_leaves_before(tmp_path, 3, error) as processes:
        owner, *others = processes
        groups = servers(tmp_path)
        others[0].kill()
        others[1].communicate(timeout=30)
        time.sleep(1)
        assert owner.poll() is None
        assert all(alive([group]) for group in groups)
        others[2].communicate(timeout=30)
        assert owner.wait(timeout=30) == int(error)
        assert not alive(groups)


def test_an_owner_that_waits_is_told_to_stop_by_ctrl_c(tmp_path: Path) -> None:
    with owner_that_leaves_before(tmp_path, users=1) as (owner, _):
        groups = servers(tmp_path)
        os.killpg(owner.pid, signal.SIGINT)
        assert owner.wait(timeout=30) == -signal.SIGINT
        assert not alive(groups)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_they_end_with_their_owner_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "services", "--home", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    assert "MLflow: http://127.0.0.1:" in owner.stdout.readline()
    groups = servers(tmp_path)
    assert alive(groups)
    os.killpg(owner.pid, number)
    owner.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while alive(groups) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(groups)


def test_a_wrong_key_is_refused_and_says_what_to_check(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DoNotRetry, match="refuses access"):
        Storage().put_bytes("s3://rankloop/x", b"")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(DoNotRetry, match="AWS_ACCESS_KEY_ID"):
        Storage().get_bytes("s3://rankloop/x")


def test_nobody_reads_without_a_key(services: LocalServices) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(services.environment["AWS_ENDPOINT_URL_S3"] + "/rankloop/.ready", timeout=5)
    assert refused.value.code == 403


def test_a_store_that_is_down_is_a_failure_to_retry(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(Retry, match="cannot be reached"):
        Storage().put_bytes("s3://rankloop/x", b"")


def test_conditional_writes_have_one_winner(services: LocalServices) -> None:
    storage, uri = Storage(), "s3://rankloop/conditional"
    etag = storage.put_if(uri, b"first")
    assert etag
    assert storage.put_if(uri, b"second") == "", "it is there"
    changed = storage.put_if(uri, b"third", etag)
    assert changed
    assert storage.put_if(uri, b"fourth", etag) == "", "it is another by now"
    found = storage.get_version(uri)
    assert (found.data, found.etag) == (b"third", changed)
    assert -2 <= found.age_seconds <= 5
    assert storage.put_if("s3://rankloop/conditional-none", b"x", etag) == "", "there is nothing to replace"


def test_a_folder_is_published_whole_or_not_at_all(
    services: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    storage, uri = Storage(), "s3://rankloop/half"
    upload = storage.upload_file

    def fail_at_c(path: Path, target: str) -> None:
        if path.name == "c":
            raise OSError(28, "No space left on device")
        upload(path, target)

    monkeypatch.setattr(storage, "upload_file", fail_at_c)
    with pytest.raises(OSError, match="No space"):
        storage.publish_folder(tmp_path, uri, {"role": "test"})
    assert not list(storage.list(uri + "/"))
    monkeypatch.undo()
    storage.publish_folder(tmp_path, uri, {"role": "test"})
    assert storage.is_published(uri)


def test_boto3_needs_no_special_client(services: LocalServices) -> None:
    """The servers are plain S3: path style and signature version 4."""
    client = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    with pytest.raises(ClientError, match="NoSuchBucket"):
        client.list_objects_v2(Bucket="no-such-bucket")
