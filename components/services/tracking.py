"""MLflow: one run per stage, a child of the pipeline's run.

`MLFLOW_TRACKING_URI` names the server. The pipeline's run is `RANKLOOP_PARENT_RUN_ID` (run_tree.py: who makes it). A run that the
orchestrator made for this very task (`MLFLOW_RUN_ID`, as KFP's MLflow plugin sets it) is adopted instead of making one.
Without a tracking server a stage still runs; it says so and tracks nothing.

A server that goes away while a stage works does not stop it: metrics are sent beside the work and kept while nobody takes them, and
at the end the stage waits for the server to come back, for `RANKLOOP_TRACKING_PATIENCE` seconds (300), before it gives up.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.services.exits import DoNotRetry, Retry

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_VARIABLE = "RANKLOOP_PARENT_RUN_ID"
ADOPTED_VARIABLE = "MLFLOW_RUN_ID"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
DEFAULT_EXPERIMENT = "rankloop"
PATIENCE_VARIABLE = "RANKLOOP_TRACKING_PATIENCE"
DEFAULT_PATIENCE = 300.0  # a rolled-out server, or a database that is started again, is back by then
SECONDS_BETWEEN_BATCHES = 2.0
SECONDS_TO_LEAVE = 5.0  # for a request under way when a stage is told to stop or has failed
LONGEST_PAUSE = 15.0  # between two attempts to reach a server that is away, in seconds
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
        self.seconds = 0.0  # that the stage has waited for MLflow so far
        self._client: MlflowClient | None = None
        self._pending: list[tuple[str, float, int, int]] = []
        self._lock = threading.Lock()  # of `_pending`
        self._enough = threading.Event()  # a batch is full, or the stage ends
        self._ending = False
        self._refused: DoNotRetry | None = None
        self._sender: threading.Thread | None = None

    def start(self, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Opens the stage's run, with its resolved config and inputs as parameters and as `config.json`.

        Raises:
            Retry: the server cannot be reached. Nothing is done yet, so there is nothing to wait for.
        """
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            _log.warning("MLFLOW_TRACKING_URI is not set: %s is not tracked", self.stage)
            return
        self._client = client()
        self._ask(lambda mlflow: self._open(mlflow, config, inputs), patience=0)
        self._begin_sending()

    def adopt(self, run_id: str) -> None:
        """Goes on with a run that another process has opened and will close, if there is one; `send_rest` ends it here."""
        if run_id:
            self._client, self.run_id = client(), run_id
            self._begin_sending()

    def _begin_sending(self) -> None:
        self._sender = threading.Thread(target=self._send_beside, name="mlflow-metrics", daemon=True)
        self._sender.start()

    def _open(self, mlflow: MlflowClient, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        adopted = os.environ.get(ADOPTED_VARIABLE, "")
        logged: Mapping[str, str] = {}
        if adopted:
            # KFP makes it once a task and ends it with every attempt, when it also logs the task's inputs in its own notation: a
            # retry finds it failed and with parameters, of which MLflow lets none be changed.
            self.run_id = adopted
            mlflow.update_run(adopted, status="RUNNING")
            mlflow.set_tag(adopted, "rankloop.stage", self.stage)
            logged = mlflow.get_run(adopted).data.params
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

        params = [Param(f"{key}", str(value)[:6000]) for key, value in {**config, **inputs}.items() if key not in logged]
        for first in range(0, len(params), 100):
            mlflow.log_batch(self.run_id, params=params[first : first + 100])
        mlflow.log_text(self.run_id, json.dumps({"config": dict(config), "inputs": dict(inputs)}, indent=2), "config.json")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs numbers at a step, without waiting for MLflow; `finish` waits until all are sent.

        Raises:
            DoNotRetry: MLflow has refused numbers that were logged before.
        """
        if self._refused:
            raise self._refused
        now = int(time.time() * 1000)
        with self._lock:
            self._pending += [(key, float(value), now, step) for key, value in values.items()]
            if len(self._pending) >= METRICS_PER_BATCH:
                self._enough.set()

    def row(self, row: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Logs the decimal numbers of one row of a training's history.

        A resumed training logs the rows of its checkpoint again: what the killed attempt had not sent yet would be missing, and its
        MLflow run is another one.
        """
        self.metrics({prefix + key: value for key, value in row.items() if isinstance(value, float)}, step)

    def tags(self, values: Mapping[str, str], patience: float | None = None) -> None:
        def set_all(mlflow: MlflowClient) -> None:
            for key, value in values.items():
                mlflow.set_tag(self.run_id, key, value)

        self._ask(set_all, patience)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Stores a file with the run, below `folder`."""
        self._ask(lambda mlflow: mlflow.log_artifact(self.run_id, str(path), folder or None))

    def finish(self, status: str, record: Mapping[str, str] | None = None) -> None:
        """Sends what is pending and closes the run as `FINISHED`, `FAILED` or `KILLED`.

        Args:
            status: of the run. Only a stage that has finished waits for a server that is away: one that failed, or is told to
                stop, has no time.
            record: tags to be set before.
        """
        patience = _patience() if status == "FINISHED" else 0.0
        self.send_rest(status)
        self.tags(record or {}, patience)
        self._ask(lambda mlflow: mlflow.set_terminated(self.run_id, status), patience)

    def send_rest(self, status: str) -> None:
        """Sends what is pending; waits for a server that is away as `finish` does."""
        patience = _patience() if status == "FINISHED" else 0.0
        self._ending = True
        self._enough.set()
        if self._sender is not None:
            self._sender.join(None if patience else SECONDS_TO_LEAVE)
        if self._refused and status == "FINISHED":
            raise self._refused
        if not self._refused and not (self._sender and self._sender.is_alive()):
            self._ask(self._send_pending, patience)

    def _ask(self, request: Callable[[MlflowClient], None], patience: float | None = None) -> None:
        """Makes a request, again and again while the server is away, for `patience` seconds; each may be sent twice."""
        if self._client is None:
            return
        began, pause = time.monotonic(), 1.0
        try:
            while True:
                try:
                    with mlflow_errors():
                        request(self._client)
                    return
                except Retry as failure:
                    left = (_patience() if patience is None else patience) - (time.monotonic() - began)
                    if left <= 0:
                        raise
                    _log.warning("%s; asked again for %.0f seconds", failure.message, left)
                    time.sleep(min(pause, left))
                    pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self.seconds += time.monotonic() - began

    def _send_beside(self) -> None:
        """What the sending thread does: batch after batch; what nobody takes is kept."""
        assert self._client is not None
        pause = SECONDS_BETWEEN_BATCHES
        while not self._ending:
            self._enough.wait(pause)
            self._enough.clear()
            try:
                with mlflow_errors():
                    self._send_pending(self._client)
                pause = SECONDS_BETWEEN_BATCHES
            except Retry as failure:
                if pause == SECONDS_BETWEEN_BATCHES:
                    _log.warning("%s; the work goes on, and its metrics are kept", failure.message)
                pause = LONGEST_PAUSE
            except DoNotRetry as failure:
                self._refused = failure
                return

    def _send_pending(self, mlflow: MlflowClient) -> None:
        from mlflow.entities import Metric

        while self._pending:
            batch = self._pending[:METRICS_PER_BATCH]
            mlflow.log_batch(self.run_id, metrics=[Metric(*each) for each in batch])
            with self._lock:
                del self._pending[: len(batch)]


def _patience() -> float:
    """Seconds that a stage waits for a server that is away, before its work is given up."""
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        return float(text or DEFAULT_PATIENCE)
    except ValueError:
        raise DoNotRetry(f"{PATIENCE_VARIABLE} = {text!r} is not a number of seconds", "correct or remove it") from None


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
