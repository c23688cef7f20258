"""The commands as a person calls them, on a real S3 server; KFP is the stand-in of `tests/kfp_stand_in.py`, which keeps state."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from components.services.exits import Retry
from components.services.storage import Storage, join
from pipelines.cluster import connection
from pipelines.cluster.trigger import Claims
from pipelines.cluster.webhook import SIGNATURE, signature_of
from pipelines.local_services import LocalServices
from tests.integration.pipelines.cluster.called import Called, rankloop
from tests.kfp_stand_in import StandIn, stand_in


@pytest.fixture
def server(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(connection, "WAIT_SECONDS", 0.01)
    with stand_in() as running:
        monkeypatch.setenv("RANKLOOP_KFP_HOST", running.url)
        yield running


@pytest.fixture
def labels(services: LocalServices) -> str:
    """A prefix with one object of rankings."""
    prefix = join(services.storage_root, "labels", uuid.uuid4().hex)
    Storage().put_bytes(join(prefix, "a.jsonl"), b'{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}\n')
    return prefix


def event(uri: str, sequencer: str = "01") -> bytes:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    what = {"bucket": {"name": bucket}, "object": {"key": key, "eTag": "e", "sequencer": sequencer}}
    return json.dumps({"Records": [{"eventName": "ObjectCreated:Put", "s3": what}]}).encode()


def test_a_run_is_submitted_with_its_profile_and_the_graph_is_uploaded_once(server: StandIn, labels: str) -> None:
    first = rankloop("submit", "--rankings", labels, "--allow-tags", "--method", "dpo", "--set", "train_sft.epochs=2")
    assert first.code == 0, first.text
    (run,) = server.kept["runs"]
    assert f"run      {run['run_id']}" in first.text
    assert f"page     {server.url}/#/runs/details/{run['run_id']}" in first.text
    given = run["runtime_config"]["parameters"]
    assert (given["rankings"], given["method"], given["train_sft_config"]["epochs"]) == (labels, "dpo", 2)
    assert len(given["rankings_fingerprint"]) == 64
    assert run["service_account"] == "rankloop-stage"
    (version,) = server.kept["versions"]
    assert version["name"].startswith("rlhf-")
    assert "pipelineInfo" in version["body"]

    Storage().put_bytes(join(labels, "b.jsonl"), b'{"prompt": "q", "completions": ["a", "b"], "ranks": [2, 1]}\n')
    second = rankloop("submit", "--rankings", labels, "--allow-tags")
    assert "there already" in second.text
    assert len(server.kept["versions"]) == len(server.kept["pipelines"]) == len(server.kept["experiments"]) == 1
    again = server.kept["runs"][1]["runtime_config"]["parameters"]["rankings_fingerprint"]
    assert again != given["rankings_fingerprint"], "a new object is new content for KFP's cache"

    listed = rankloop("status")
    assert run["run_id"] in listed.text
    assert rankloop("status", run["run_id"]).code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rankings", "labels.jsonl"), "is a path of this machine, which no pod can read"),
        (("--rankings", "s3://b/x", "--set", "train_sft.base_model=./m"), "train_sft.base_model = './m' is a path of this machine"),
        (("--profile", "llm-1b"), "profile llm-1b brings no rankings"),
        (("--graph", "rhlf"), "unknown graph 'rhlf'; known: rlhf, drift_watch"),
    ],
)
def test_what_the_cluster_could_not_run_is_refused(arguments: tuple[str, ...], told: str, server: StandIn) -> None:
    called = rankloop("submit", "--allow-tags", *arguments)
    assert (called.code, server.asked) == (65, [])
    assert told in called.text


def test_schedules_are_applied_changed_listed_and_deleted(server: StandIn, labels: str, tmp_path: Path) -> None:
    file = tmp_path / "schedules.yaml"
    watch = {"cron": "0 0 3 * * *", "rankings": labels}
    file.write_text(yaml.safe_dump({"schedules": {"watch": watch}}), encoding="utf-8")

    def apply(*more: str) -> Called:
        return rankloop("schedule", "apply", str(file), "--allow-tags", *more)

    checked = apply("--check")
    assert (checked.code, {request.partition(" ")[0] for request in server.asked}) == (65, {"GET"}), "it only looks"
    assert re.search(r"^watch\n  \+ 0 0 3 \* \* \*, version drift-watch-[0-9a-f]{12}$", checked.text, re.M)
    assert apply().text.endswith("applied\n")
    (made,) = server.kept["recurringruns"]
    assert made["runtime_config"]["parameters"]["rankings_fingerprint"] == "", "it is the same in every run"
    uploaded = server.kept["versions"][0]["body"].replace("\r", "")
    graph = next(yaml.safe_load_all(uploaded.partition("\n\n")[2].partition("\n--")[0]))
    reading = [
        task
        for part in (graph["root"], *graph["components"].values())
        for task in part.get("dag", {}).get("tasks", {}).values()
        if task["componentRef"]["name"].startswith("comp-ingest-rankings")
    ]
    assert [task["cachingOptions"] for task in reading] == [{}, {}], "both the watch's and the retrain's read anew"
    assert apply().text == "all as it should be\n"
    assert apply("--check").code == 0

    file.write_text(yaml.safe_dump({"schedules": {"watch": {**watch, "enabled": False}}}), encoding="utf-8")
    changed = apply()
    assert "~ enabled: True → False" in changed.text
    (made,) = server.kept["recurringruns"]
    listed = rankloop("schedule", "list")
    assert listed.text == f"watch  0 0 3 * * *  disabled  {made['recurring_run_id']}\n"
    assert rankloop("schedule", "delete", "wacht").code == 65
    assert rankloop("schedule", "delete", "watch").code == 0
    assert server.kept["recurringruns"] == []


def test_two_who_apply_at_once_are_kept_apart(server: StandIn, labels: str, tmp_path: Path) -> None:
    from pipelines.cluster.schedules import lock

    file = tmp_path / "schedules.yaml"
    file.write_text(yaml.safe_dump({"schedules": {"watch": {"cron": "0 0 3 * * *", "rankings": labels}}}), encoding="utf-8")
    with lock(Storage(), os.environ["RANKLOOP_STORAGE"]):
        called = rankloop("schedule", "apply", str(file), "--allow-tags")
    assert called.code == 75
    assert "somebody else has been applying schedules" in called.text
    assert server.kept["recurringruns"] == []


def test_an_event_starts_one_run_however_often_it_is_delivered(server: StandIn, labels: str, tmp_path: Path) -> None:
    file = tmp_path / "event.json"
    file.write_bytes(event(join(labels, "a.jsonl")))
    first = rankloop("trigger", str(file), "--below", labels, "--allow-tags")
    assert first.code == 0, first.text
    second = rankloop("trigger", "-", "--below", labels, "--allow-tags", standard_input=event(join(labels, "a.jsonl")))
    (run,) = server.kept["runs"]
    assert f"run {run['run_id']}, started before" in second.text
    file.write_bytes(event(join(labels, "a.jsonl"), "02"))
    rankloop("trigger", str(file), "--below", labels, "--allow-tags")
    rankloop("trigger", "--key", "2026-01-02", "--below", labels, "--allow-tags")
    rankloop("trigger", "--key", "2026-01-02", "--below", labels, "--allow-tags")
    assert len(server.kept["runs"]) == 3
    file.write_bytes(event("s3://elsewhere/a.jsonl"))
    assert "nothing is started" in rankloop("trigger", str(file), "--below", labels, "--allow-tags").text
    assert len(server.kept["runs"]) == 3


def test_deliveries_at_the_same_time_start_one_run(services: LocalServices) -> None:
    begun: list[str] = []

    def begin(mark: str, may_be_there: bool) -> str:
        begun.append(mark)
        threading.Event().wait(0.3)
        return "r1"

    key, root = uuid.uuid4().hex, os.environ["RANKLOOP_STORAGE"]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: Claims(Storage(), root).once(key, begin), range(12)))
    assert len(begun) == 1
    assert sorted(found) == [("r1", False)] * 11 + [("r1", True)]


def test_a_claim_whose_owner_died_is_taken_over_by_one_who_looks_first(services: LocalServices) -> None:
    key, root = uuid.uuid4().hex, os.environ["RANKLOOP_STORAGE"]

    def die(mark: str, may_be_there: bool) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Claims(Storage(), root).once(key, die)
    with pytest.raises(Retry, match="another delivery of this event has been starting its run"):
        Claims(Storage(), root, patience_seconds=0).once(key, lambda *_: "never")
    threading.Event().wait(1.1)  # S3 tells an object's age in whole seconds
    looked: list[bool] = []
    claims = Claims(Storage(), root, lease_seconds=0)
    assert claims.once(key, lambda mark, may_be_there: looked.append(may_be_there) or "r2") == ("r2", True)
    assert looked == [True]


def test_a_run_whose_reply_was_lost_is_found_and_not_started_again(server: StandIn, labels: str) -> None:
    server.failures["POST runs"] = (1, 502, True)
    called = rankloop("trigger", "--key", uuid.uuid4().hex, "--below", labels, "--allow-tags")
    assert called.code == 0, called.text
    assert len(server.kept["runs"]) == 1


def test_what_failed_is_started_by_the_next_delivery(server: StandIn, labels: str) -> None:
    key = uuid.uuid4().hex
    server.failures["POST runs"] = (1, 403, False)
    assert rankloop("trigger", "--key", key, "--below", labels, "--allow-tags").code == 65
    assert rankloop("trigger", "--key", key, "--below", labels, "--allow-tags").code == 0
    assert len(server.kept["runs"]) == 1


def test_the_receiver_as_a_process_starts_a_run_and_ends_on_sigterm(server: StandIn, labels: str) -> None:
    key = "s" * 40
    command = ["trigger", "--serve", "--port", "0", "--below", labels, "--allow-tags"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RANKLOOP_WEBHOOK_SECRET": key},
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2].partition("/")[0])
        body = event(join(labels, "a.jsonl"))

        def deliver(_: int) -> int:
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            link.request("POST", "/events", body, {SIGNATURE: signature_of(body, key.encode())})
            return link.getresponse().status

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(deliver, range(3))) == [200] * 3
        assert len(server.kept["runs"]) == 1
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
        assert process.returncode == 0
        assert told.count("started before") == 2
    finally:
        process.kill()
        process.wait()


def test_a_refused_token_is_one_line_and_no_traceback(server: StandIn, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "right"
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", "wrong")
    command = [sys.executable, "-m", "pipelines.cli", "status", "r1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (65, "")
    first, remedy = done.stderr.splitlines()
    assert first == f"rankloop: KFP at {server.url} does not know who asks (401): the token is wrong, or has expired"
    assert remedy.startswith("  remedy: put a fresh token into RANKLOOP_KFP_TOKEN")
