"""The tracking server, asked by several runs at once."""

import threading
import uuid
from typing import Any

import pytest

from components.services.tracking import EXPERIMENT_VARIABLE, client, experiment_id

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
