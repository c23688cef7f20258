"""A failure for good ends the pipeline run's further attempts at once. What runs is the command of the compiled graph's pod."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from components.services.attempts import NODE_VARIABLE, RUN_VARIABLE, WAITS_VARIABLE, is_retry, pipeline_run, wait_before_retry
from components.services.exits import DoNotRetry
from components.services.final_failure import FOLDER, FinalFailure
from components.services.storage import Storage, join
from components.services.tracking import PARENT_VARIABLE
from pipelines.local_services import LocalServices, free_ports
from tests.cluster_graphs import compiled
from tests.stage_processes import StageProcess, publish_snapshot

REPOSITORY = Path(__file__).parents[2]
IMPORTED_BY_THE_STAGE = "components.ingest_rankings.snapshot"


class Attempt(NamedTuple):
    code: int
    message: str
    imported_the_stage: bool
    waited: bool = False


@pytest.fixture
def variables(services: LocalServices, tmp_path: Path) -> dict[str, str]:
    """Those of a pod, as the graph gives them."""
    found = {key: value for key, value in os.environ.items() if key != PARENT_VARIABLE}
    found |= {RUN_VARIABLE: str(uuid.uuid4()), "RANKLOOP_FAILURE_FILE": str(tmp_path / "failure.json"), "TMPDIR": str(tmp_path)}
    return found | {"PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def attempt(number: int, variables: dict[str, str], inputs: dict[str, Any], folder: Path) -> Attempt:
    """Runs the pod of `merge_shards` as Argo would its attempt of that number, and notes what Python imported."""
    container = compiled("sharded_ingest", "gpu").executors()["exec-merge-shards"]
    executor_input = {
        "inputs": {"parameterValues": inputs},
        "outputs": {
            "outputFile": str(folder / "output.json"),
            "artifacts": {
                "metrics": {
                    "artifacts": [
                        {"name": "m", "uri": str(folder / "m"), "type": {"schemaTitle": "system.Metrics"}, "metadata": {}}
                    ]
                }
            },
        },
    }
    arguments = [json.dumps(executor_input) if each == "{{$}}" else each for each in container["args"]]
    pod = {**variables, NODE_VARIABLE: f"sharded-ingest-x7k2p.root.merge-shards.executor({number})", "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*container["command"], *arguments], env=pod, capture_output=True, text=True, check=False)
    failure = Path(variables["RANKLOOP_FAILURE_FILE"])
    message = json.loads(failure.read_text(encoding="utf-8"))["message"] if failure.exists() else done.stderr[-500:]
    failure.unlink(missing_ok=True)
    return Attempt(done.returncode, message, IMPORTED_BY_THE_STAGE in done.stderr, "KFP tries again at once" in done.stdout)


def asked(place: str) -> dict[str, Any]:
    return {"config": {"rater_ids": "kept"}, "rankings": place, "shard_reports": [f"{place}/ingests/none"]}


def test_a_retry_ends_at_once_with_the_same_message_and_the_run_tried_again_does_not(
    variables: dict[str, str], services: LocalServices, tmp_path: Path
) -> None:
    inputs = asked(f"{services.storage_root}/{uuid.uuid4().hex}")
    first = attempt(0, variables, inputs, tmp_path)
    assert first.code == 65, first.message
    assert first.imported_the_stage
    assert "does not exist" in first.message

    second = attempt(1, variables, inputs, tmp_path)
    assert second == Attempt(65, first.message, False)
    mended = attempt(0, variables, inputs, tmp_path)  # somebody has the run's failed tasks tried again
    assert mended.imported_the_stage


def test_a_failure_that_a_retry_can_help_leaves_nothing(variables: dict[str, str], services: LocalServices, tmp_path: Path) -> None:
    away = {**variables, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_ports(1)[0]}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    inputs = asked(f"{services.storage_root}/{uuid.uuid4().hex}")
    first = attempt(0, away, inputs, tmp_path)
    assert first.code == 75, first.message
    assert first.imported_the_stage
    assert list(Storage().list(join(services.storage_root, FOLDER, variables[RUN_VARIABLE]))) == []


def test_what_a_retry_can_help_waits_before_it_ends_but_for_the_last_attempt(
    variables: dict[str, str], services: LocalServices, tmp_path: Path
) -> None:
    """What fails for good does not wait."""
    given = {each["name"]: each["value"] for each in compiled("sharded_ingest", "gpu").executors()["exec-merge-shards"]["env"]}
    assert given[WAITS_VARIABLE] == "15 30 60"
    variables = {**variables, WAITS_VARIABLE: "1 2"}
    away = {**variables, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_ports(1)[0]}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    inputs = asked(f"{services.storage_root}/{uuid.uuid4().hex}")
    assert [attempt(number, away, inputs, tmp_path).waited for number in range(3)] == [True, True, False]
    final = attempt(1, variables, inputs, tmp_path)  # there is nothing to merge
    assert (final.code, final.waited) == (65, False)


def test_a_stage_that_was_told_to_stop_does_not_wait(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-empted attempt has no time for it, and the next one need not wait for a service."""
    monkeypatch.setenv(NODE_VARIABLE, f"{uuid.uuid4().hex}.root.train-sft.executor(0)")
    monkeypatch.setenv(WAITS_VARIABLE, "60")
    root = f"{services.storage_root}/{uuid.uuid4().hex}"
    process = StageProcess("train_sft", root, publish_snapshot(root), pause_after=3)
    process.signal(signal.SIGTERM)
    ended = process.ended()
    assert ended.returncode == 75, ended.stderr
    assert "was asked to stop (SIGTERM)" in ended.stderr
    assert "KFP tries again at once" not in ended.stderr


@pytest.mark.parametrize(("attempt", "seconds"), [(0, 0.5), (1, 60)])
def test_the_wait_before_a_retry_is_the_attempts_and_a_signal_ends_it(
    attempt: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODE_VARIABLE, f"rlhf-x7k2p.root.train-sft.executor({attempt})")
    monkeypatch.setenv(WAITS_VARIABLE, "0.5 60")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, signal.SIG_IGN)
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.monotonic()
    try:
        wait_before_retry()
        waited = time.monotonic() - started
    finally:
        timer.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert min(seconds, 1) <= waited < 30


def test_wrong_settings_are_final_too(variables: dict[str, str], services: LocalServices, tmp_path: Path) -> None:
    inputs = {**asked(services.storage_root), "config": {"speed": 1}}
    first = attempt(0, variables, inputs, tmp_path)
    assert (first.code, first.imported_the_stage) == (65, True)
    assert "ingest_rankings.speed: there is no such key" in first.message
    assert attempt(1, variables, inputs, tmp_path) == Attempt(65, first.message, False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rlhf-x7k2p.root.train-sft.executor(0)", False),
        ("rlhf-x7k2p.root.train-sft.executor(3)", True),
        ("rlhf-x7k2p.root.for-loop-1.iteration-iterator(0:0).executor", False),  # no retries within ParallelFor
        ("", True),
    ],
)
def test_argos_name_of_the_pod_tells_a_retry(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_VARIABLE, name)
    assert is_retry() is expected


def test_without_the_runs_id_argos_workflow_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    monkeypatch.setenv(NODE_VARIABLE, "rlhf-x7k2p.root.train-sft.executor(0)")
    assert pipeline_run() == "rlhf-x7k2p"
    monkeypatch.setenv(RUN_VARIABLE, "8a1e")
    assert pipeline_run() == "8a1e"


def test_another_run_is_not_bound_by_it(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NODE_VARIABLE, raising=False)
    for run in ("one", "other"):
        monkeypatch.setenv(RUN_VARIABLE, run + uuid.uuid4().hex)
        final = FinalFailure(services.storage_root, "train_sft", "key")
        final.check()
        final.keep(f"bad data in run {run}")
        with pytest.raises(DoNotRetry, match=f"bad data in run {run}"):
            FinalFailure(services.storage_root, "train_sft", "key").check()
        FinalFailure(services.storage_root, "train_sft", "other key").check()


def test_outside_of_a_cluster_nothing_is_kept(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    monkeypatch.delenv(NODE_VARIABLE, raising=False)
    root = f"{services.storage_root}/{uuid.uuid4().hex}"
    final = FinalFailure(root, "train_sft", "key")
    final.keep("bad data")
    final.check()
    assert list(Storage().list(join(root, FOLDER))) == []


def test_a_store_that_cannot_be_asked_is_no_reason_to_stop(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "a-run")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    final = FinalFailure(services.storage_root, "train_sft", "key")
    final.check()
    final.keep("bad data")
