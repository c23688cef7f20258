"""MLflow: one run per stage, a child of the pipeline's run.

`MLFLOW_TRACKING_URI` names the server. The pipeline's run is `RANKLOOP_PARENT_RUN_ID`, made by the submitter. A run that the
orchestrator made for this very task (`MLFLOW_RUN_ID`, as KFP's MLflow plugin sets it) is adopted instead of making one.
Without a tracking server a stage still runs; it says so and tracks nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.services.exits import DoNotRetry, Retry

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_VARIABLE = "RANKLOOP_PARENT_RUN_ID"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
DEFAULT_EXPERIMENT = "rankloop"
SECONDS_BETWEEN_FLUSHES = 2.0
METRICS_PER_BATCH = 500  # MLflow takes at most 1000 in one request

_log = logging.getLogger(__name__)


def client() -> MlflowClient:
    """An MLflow client that gives up after some ten seconds instead of MLflow's own minutes.

    Raises:
        DoNotRetry: `MLFLOW_TRACKING_URI` is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise DoNotRetry("MLFLOW_TRACKING_URI is not set", "set it to the MLflow server's address")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(uri)


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turns MLflow's exceptions into `Retry` (not reachable, server error) or `DoNotRetry` (refused)."""
    import requests
    from mlflow.exceptions import MlflowException

    where = os.environ.get("MLFLOW_TRACKING_URI", "")
    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()
        if status in (401, 403):
            raise DoNotRetry(
                f"MLflow at {where} refuses access: {error}", "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        if 400 <= status < 500:
            raise DoNotRetry(f"MLflow at {where} rejects the request: {error}") from error
        raise Retry(f"MLflow at {where} failed: {error}", "check that the server is up, then run again") from error
    except (requests.RequestException, ConnectionError) as error:
        raise Retry(f"MLflow at {where} cannot be reached: {error}", "check that the server is up, then run again") from error


class Tracker:
    """One stage's MLflow run. All methods do nothing when `run_id` is empty (no tracking server)."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.run_id = ""
        self.seconds = 0.0  # spent in requests so far
        self._client: MlflowClient | None = None
        self._pending: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    @contextmanager
    def _request(self) -> Iterator[MlflowClient]:
        assert self._client is not None
        started = time.perf_counter()
        with mlflow_errors():
            yield self._client
        self.seconds += time.perf_counter() - started

    def start(self, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Opens the stage's run, with its resolved config and inputs as parameters and as `config.json`."""
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            _log.warning("MLFLOW_TRACKING_URI is not set: %s is not tracked", self.stage)
            return
        self._client = client()
        adopted = os.environ.get("MLFLOW_RUN_ID", "")
        with self._request() as mlflow:
            if adopted:
                self.run_id = adopted
            else:
                parent = os.environ.get(PARENT_VARIABLE, "")
                tags = {"mlflow.runName": self.stage, "rankloop.stage": self.stage}
                if parent:
                    tags["mlflow.parentRunId"] = parent
                    experiment = mlflow.get_run(parent).info.experiment_id
                else:
                    experiment = experiment_id(mlflow)
                self.run_id = mlflow.create_run(experiment, tags=tags).info.run_id
            from mlflow.entities import Param

            params = [Param(f"{key}", str(value)[:6000]) for key, value in {**config, **inputs}.items()]
            for first in range(0, len(params), 100):
                mlflow.log_batch(self.run_id, params=params[first : first + 100])
            mlflow.log_text(self.run_id, json.dumps({"config": dict(config), "inputs": dict(inputs)}, indent=2), "config.json")

    def adopt(self, run_id: str) -> None:
        """Goes on with a run that another process has opened, if there is one."""
        if run_id:
            self._client, self.run_id = client(), run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs numbers at a step. They are sent in batches; `finish` sends the rest."""
        now = int(time.time() * 1000)
        self._pending += [(key, float(value), now, step) for key, value in values.items()]
        if len(self._pending) >= METRICS_PER_BATCH or time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def row(self, row: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Logs the decimal numbers of one row of a training's history.

        A resumed training logs the rows of its checkpoint again: what the killed attempt had not sent yet would be missing, and its
        MLflow run is another one.
        """
        self.metrics({prefix + key: value for key, value in row.items() if isinstance(value, float)}, step)

    def flush(self) -> None:
        pending, self._pending, self._flushed = self._pending, [], time.monotonic()
        if not self.run_id or not pending:
            return
        from mlflow.entities import Metric

        entities = [Metric(*each) for each in pending]
        with self._request() as mlflow:
            for first in range(0, len(entities), METRICS_PER_BATCH):
                mlflow.log_batch(self.run_id, metrics=entities[first : first + METRICS_PER_BATCH])

    def tags(self, values: Mapping[str, str]) -> None:
        if self.run_id:
            with self._request() as mlflow:
                for key, value in values.items():
                    mlflow.set_tag(self.run_id, key, value)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Stores a file with the run, below `folder`."""
        if self.run_id:
            with self._request() as mlflow:
                mlflow.log_artifact(self.run_id, str(path), folder or None)

    def finish(self, status: str) -> None:
        """Sends what is pending and closes the run as `FINISHED`, `FAILED` or `KILLED`."""
        self.flush()
        if self.run_id:
            with self._request() as mlflow:
                mlflow.set_terminated(self.run_id, status)


def carrier_of(model: str, alias: str) -> tuple[str, dict[str, str]] | None:
    """The version of a registered model that carries an alias, with its tags; None if no version does, or there is no such model.

    Raises:
        DoNotRetry: there is no registry.
        Retry: it cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_errors():
        registry = client()
        try:
            aliases = registry.get_registered_model(model).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if alias not in aliases:
            return None
        version = str(aliases[alias])
        return version, dict(registry.get_model_version(model, version).tags)


def experiment_id(mlflow: MlflowClient) -> str:
    """The id of the experiment `MLFLOW_EXPERIMENT_NAME` (default `rankloop`), which is made if it is not there."""
    name = os.environ.get(EXPERIMENT_VARIABLE, DEFAULT_EXPERIMENT)
    from mlflow.exceptions import MlflowException

    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return mlflow.create_experiment(name)
        except MlflowException as error:  # of two first runs of a server at the same time one makes it
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = mlflow.get_experiment_by_name(name)
    return found.experiment_id
