"""The tracking server, asked by several runs at once."""

import threading
import time
import uuid
from typing import Any

import pytest

from components.services.exits import DoNotRetry
from components.services.tracking import EXPERIMENT_VARIABLE, PATIENCE_VARIABLE, Tracker, client, experiment_id
from tests.faulty_proxy import faulty_proxy

RUNS = 4


def test_first_runs_at_the_same_time_share_one_experiment(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENT_VARIABLE, f"new-{uuid.uuid4().hex}")
    together, found = threading.Barrier(RUNS), []

    def first_run() -> None:
        mlflow = client()
        look, looks = mlflow.get_experiment_by_name, []

        def look_and_wait(name: str) -> Any:
            looks.append(look(name))
            if len(looks) == 1:
                together.wait(30)  # until all have seen that there is none
            return looks[-1]

        mlflow.get_experiment_by_name = look_and_wait  # type: ignore[method-assign]
        found.append(experiment_id(mlflow))

    threads = [threading.Thread(target=first_run) for _ in range(RUNS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == RUNS
    assert len(set(found)) == 1


def test_what_mlflow_refuses_ends_the_stage_that_logs_on(services: Any) -> None:
    tracker = Tracker("close_run")
    tracker.start({}, {})
    tracker.metrics({"what? no name!": 1.0})

    def log_on() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            tracker.metrics({"loss": 1.0})
            time.sleep(0.1)

    with pytest.raises(DoNotRetry, match="rejects the request"):
        log_on()
    tracker.finish("FAILED")
    assert client().get_run(tracker.run_id).info.status == "FAILED"


def test_a_server_that_is_away_is_waited_for_at_the_end_and_nothing_is_lost(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(services.environment["MLFLOW_TRACKING_URI"]) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv(PATIENCE_VARIABLE, "60")
        tracker = Tracker("close_run")
        tracker.start({}, {})
        proxy.misbehave("503")
        for step in range(700):  # more than one batch
            tracker.metrics({"loss": float(step)}, step)
        assert tracker.seconds < 5, "logging does not wait for the server"
        threading.Timer(3, proxy.misbehave, [""]).start()
        tracker.finish("FINISHED")
        run = client().get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        history = client().get_metric_history(tracker.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(700)]


def test_a_patience_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, services: Any) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "a minute")
    tracker = Tracker("close_run")
    tracker.start({}, {})
    with pytest.raises(DoNotRetry, match="RANKLOOP_TRACKING_PATIENCE = 'a minute' is not a number of seconds"):
        tracker.finish("FINISHED")
    tracker.finish("FAILED")
