"""How a stage ends: exit codes, where the reason is left, and the state of its MLflow run."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.close_run import stage
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context, launch
from components.services.tracking import client, experiment_id
from pipelines.local_services import LocalServices, free_ports


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A stage takes the signal handlers of its process; here the process is the test's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def failure_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, services: LocalServices) -> Path:
    path = tmp_path / "failure.json"
    monkeypatch.setenv("RANKLOOP_FAILURE_FILE", str(path))
    return path


Run = Callable[[Any, Any, Context], Any]


def raising(error: BaseException) -> Run:
    def run(config: Any, inputs: Any, context: Context) -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "status", "said"),
    [
        (DoNotRetry("bad row 3", "correct it"), 65, "FAILED", "bad row 3\n  remedy: correct it"),
        (Retry("the network is away", "run again"), 75, "FAILED", "the network is away"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/scratch/part-0"),
            75,
            "FAILED",
            "no space left on device: /scratch/part-0",
        ),
        (KeyboardInterrupt(), 130, "KILLED", "interrupted"),
        (ValueError("a defect"), 1, "FAILED", "ValueError: a defect"),
    ],
)
def test_the_way_a_stage_ends_is_its_exit_code_and_its_reason_is_recorded(
    error: BaseException, code: int, status: str, said: str, failure_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "run", raising(error))
    with pytest.raises(SystemExit) as ended:
        launch("close_run", {}, {"state": "SUCCEEDED"})
    assert ended.value.code == code
    record = json.loads(failure_file.read_text(encoding="utf-8"))
    assert record["stage"] == "close_run"
    assert record["exit_code"] == code
    assert said in record["message"]
    mlflow = client()
    newest = mlflow.search_runs([experiment_id(mlflow)], "tags.rankloop.stage = 'close_run'", max_results=1)[0]
    assert newest.info.status == status
    assert newest.data.tags["rankloop.exit_code"] == str(code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stage_that_saves_nothing(number: int, failure_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, inputs: Any, context: Context) -> Any:
        signal.raise_signal(number)
        raise AssertionError("went on after the signal")

    monkeypatch.setattr(stage, "run", run)
    with pytest.raises(SystemExit) as ended:
        launch("close_run", {}, {"state": "SUCCEEDED"})
    assert ended.value.code == (75 if number == signal.SIGTERM else 130)


def test_an_unknown_key_or_input_ends_it_before_anything_happens(failure_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "run", raising(AssertionError("ran")))
    for config, inputs in (({"speed": 1}, {"state": "SUCCEEDED"}), ({}, {"state": "SUCCEEDED", "sta": 1}), ({}, {})):
        with pytest.raises(SystemExit) as ended:
            launch("close_run", config, inputs)
        assert ended.value.code == 65
        assert "close_run." in json.loads(failure_file.read_text(encoding="utf-8"))["message"]


def test_without_a_store_it_says_which_variable_to_set(failure_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKLOOP_STORAGE")
    with pytest.raises(SystemExit) as ended:
        launch("close_run", {}, {"state": "SUCCEEDED"})
    assert ended.value.code == 65
    assert "set RANKLOOP_STORAGE=s3://" in json.loads(failure_file.read_text(encoding="utf-8"))["message"]


def test_mlflow_down_at_the_start_is_a_failure_to_retry(failure_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(SystemExit) as ended:
        launch("close_run", {}, {"state": "SUCCEEDED"})
    assert ended.value.code == 75
    assert "MLflow at http://127.0.0.1" in json.loads(failure_file.read_text(encoding="utf-8"))["message"]


def test_the_run_that_the_orchestrator_made_is_adopted(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client()
    run = mlflow.create_run(experiment_id(mlflow))
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    launch("close_run", {}, {"state": "SUCCEEDED"})
    after = mlflow.get_run(run.info.run_id)
    assert after.info.status == "FINISHED"
    assert after.data.params["state"] == "SUCCEEDED"


def test_the_scratch_folder_is_gone_afterwards(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def run(config: Any, inputs: Any, context: Context) -> Any:
        seen.append(context.scratch)
        (context.scratch / "large").write_bytes(b"x")
        raise DoNotRetry("no")

    monkeypatch.setattr(stage, "run", run)
    with pytest.raises(SystemExit):
        launch("close_run", {}, {"state": "SUCCEEDED"})
    assert seen
    assert not seen[0].exists()


def test_each_report_goes_to_its_own_artifact(services: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, inputs: Any, context: Context) -> Any:
        for name in ("main.html", "raters.html", "third.html"):
            (context.scratch / name).write_text(name, encoding="utf-8")
            context.publish_html(context.scratch / name)
        return ()

    monkeypatch.setattr(stage, "run", run)
    main, raters = (SimpleNamespace(path=str(tmp_path / name / "artifact")) for name in ("one", "two"))
    launch("close_run", {}, {"state": "SUCCEEDED"}, html=main, pages={"raters.html": raters})
    assert Path(main.path).read_text(encoding="utf-8") == "main.html"
    assert Path(raters.path).read_text(encoding="utf-8") == "raters.html"
    launch("close_run", {}, {"state": "SUCCEEDED"})  # without KFP there is nowhere to put them
