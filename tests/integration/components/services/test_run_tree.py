"""One MLflow run tree for a pipeline run: with KFP's MLflow plugin, with one that sets no variables, and without it.

KFP's backend cannot run here. What its plugin does to the server was read in its source (backend/src/apiserver/plugins/mlflow and
backend/src/v2/common/plugins/mlflow) and is done by `Plugin` below to a real MLflow server.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from mlflow.entities import Metric, Param, Run

from components.close_run import stage as close_run
from components.services.attempts import NODE_VARIABLE, RUN_VARIABLE
from components.services.exits import Retry
from components.services.launch import launch
from components.services.run_tree import PARENT_TAG, RUN_TAG, _parent_of, join_run_tree
from components.services.storage import Storage
from components.services.tracking import ADOPTED_VARIABLE, EXPERIMENT_VARIABLE, PARENT_VARIABLE, client, experiment_id
from pipelines.local_services import LocalServices


@pytest.fixture(autouse=True)
def _own_process() -> Iterator[None]:
    """A stage takes its process's signal handlers, and names its parent run in the environment; here the process is the test's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    before = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run_id(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline run in a cluster."""
    found = str(uuid.uuid4())
    monkeypatch.setenv(RUN_VARIABLE, found)
    monkeypatch.setenv(NODE_VARIABLE, "rlhf-x7k2p.root.train-sft.executor(0)")
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    return found


def pod(stage: str, inputs: dict[str, Any]) -> int:
    """Runs a stage as its pod does and gives the exit code; what it set in the environment is gone with its process."""
    before = dict(os.environ)
    try:
        launch(stage, {}, inputs)
    except SystemExit as ended:
        return int(str(ended.code))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def everywhere() -> list[str]:
    return [each.experiment_id for each in client().search_experiments(max_results=1000)]


def parents(run_id: str) -> list[Run]:
    return list(client().search_runs(everywhere(), f"tags.`{RUN_TAG}` = '{run_id}'"))


def children(parent: str) -> dict[str, Run]:
    """The runs below a parent, by the names that a person sees; two of one name would be seen as one too few."""
    found = client().search_runs(everywhere(), f"tags.`{PARENT_TAG}` = '{parent}'")
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


class Plugin:
    """What KFP 2.17's MLflow plugin does to the server around a run and around each attempt of a task."""

    def __init__(self, run_id: str) -> None:
        self.mlflow = client()
        name = f"KFP-Default-{run_id[:8]}"
        self.experiment = self.mlflow.create_experiment(name)
        tags = {"mlflow.runName": "rlhf", RUN_TAG: run_id, "kfp.pipeline_run_url": f"/#/runs/details/{run_id}"}
        self.parent = self.mlflow.create_run(self.experiment, tags=tags).info.run_id

    def on_task_start(self, task: str) -> tuple[str, dict[str, str]]:
        """The driver's: a nested run, and the variables of the container."""
        run = self.mlflow.create_run(self.experiment, tags={"mlflow.runName": task, PARENT_TAG: self.parent}).info.run_id
        variables = {ADOPTED_VARIABLE: run, "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}
        return run, {**variables, "MLFLOW_EXPERIMENT_ID": self.experiment}

    def on_task_end(self, run: str, status: str, parameters: dict[str, Any], metrics: dict[str, float]) -> None:
        """The launcher's, after every attempt: inputs as JSON, and what the task logged. It only notes it where that fails."""
        now = int(time.time() * 1000)
        try:
            self.mlflow.log_batch(
                run,
                metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
                params=[Param(key, json.dumps(value)) for key, value in parameters.items()],
            )
        except Exception as refused:
            print(refused)
        self.mlflow.set_terminated(run, status)


def test_with_the_plugin_its_runs_are_the_tree(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin(run_id)
    inputs = {"state": "SUCCEEDED", "error": ""}
    run, variables = plugin.on_task_start("close-run")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pod("close_run", inputs) == 0
    plugin.on_task_end(run, "FINISHED", inputs, {"status": 1.0})

    assert [each.info.run_id for each in parents(run_id)] == [plugin.parent]
    assert children(plugin.parent).keys() == {"close-run"}, "no run beside the one that KFP made"
    ours = client().get_run(run)
    assert ours.data.tags["rankloop.stage"] == "close_run"
    assert ours.data.params["state"] == "SUCCEEDED"
    assert client().get_run(plugin.parent).data.tags["rankloop.state"] == "SUCCEEDED", "it closes the parent that KFP made"


def test_a_retry_goes_on_in_the_run_that_the_plugin_ended(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver makes it once a task; the launcher ends it after every attempt, with parameters that cannot be changed."""
    plugin = Plugin(run_id)
    run, variables = plugin.on_task_start("close-run")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    inputs = {"state": "SUCCEEDED", "error": "a text"}
    plugin.on_task_end(run, "FAILED", inputs, {})  # an attempt whose pod never came to our code
    assert client().get_run(run).data.params["state"] == '"SUCCEEDED"', "as KFP writes it"
    seen = []
    monkeypatch.setattr(
        close_run, "run", lambda *_: seen.append(client().get_run(run).info.status) or close_run.Outputs("FINISHED")
    )
    monkeypatch.setenv(NODE_VARIABLE, "rlhf-x7k2p.root.close-run.executor(1)")
    assert pod("close_run", inputs) == 0
    assert seen == ["RUNNING"]
    assert client().get_run(run).info.status == "FINISHED"
    assert children(plugin.parent).keys() == {"close-run"}


def test_a_plugin_that_sets_no_variables_still_gives_the_parent(run_id: str) -> None:
    plugin = Plugin(run_id)
    assert pod("close_run", {"state": "SUCCEEDED"}) == 0
    assert [each.info.run_id for each in parents(run_id)] == [plugin.parent]
    (ours,) = children(plugin.parent).values()
    assert ours.info.experiment_id == plugin.experiment
    assert client().get_run(plugin.parent).info.status == "FINISHED"


def test_without_the_plugin_the_first_stage_makes_the_parent_and_the_last_closes_it(run_id: str) -> None:
    assert pod("stop_run", {"stage": "validate_data", "reason": "too few rankings"}) == 65
    assert pod("close_run", {"state": "FAILED", "error": "stop-run failed"}) == 0
    (parent,) = parents(run_id)
    found = children(parent.info.run_id)
    assert {name: run.info.status for name, run in found.items()} == {"stop_run": "FAILED", "close_run": "FINISHED"}
    assert parent.info.status == "FAILED"
    assert parent.info.experiment_id == experiment_id(client())
    assert PARENT_TAG not in parent.data.tags


def test_stages_that_begin_together_share_one_parent(run_id: str, services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENT_VARIABLE, f"together-{run_id}")
    client().create_experiment(f"together-{run_id}")
    together, found = threading.Barrier(4), []

    def begin() -> None:
        storage = Storage()
        looked = storage.exists

        def look_and_wait(uri: str) -> bool:
            there = looked(uri)
            together.wait(30)  # until all have seen that there is none
            return there

        monkeypatch.setattr(storage, "exists", look_and_wait)
        found.append(_parent_of(run_id, storage, services.storage_root))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {each.info.run_id for each in parents(run_id)} == set(found), "the three that came too late removed theirs"
    assert len(set(found)) == 1


def test_outside_of_a_cluster_or_below_a_named_parent_nothing_is_made(
    services: LocalServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (RUN_VARIABLE, NODE_VARIABLE, ADOPTED_VARIABLE, PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    join_run_tree(Storage(), services.storage_root)
    assert PARENT_VARIABLE not in os.environ
    monkeypatch.setenv(PARENT_VARIABLE, "made-by-rankloop-run")
    monkeypatch.setenv(RUN_VARIABLE, "some-run")
    join_run_tree(Storage(), services.storage_root)
    assert os.environ[PARENT_VARIABLE] == "made-by-rankloop-run"


def test_a_server_that_is_down_is_a_failure_to_retry(run_id: str, services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Retry, match=r"MLflow at http://127\.0\.0\.1:9"):
        join_run_tree(Storage(), services.storage_root)
