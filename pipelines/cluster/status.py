"""What became of a run: its tasks as KFP has them, the failures that the stages kept on S3, its MLflow run, its pods' logs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from components.services.exits import DoNotRetry, Retry, StageFailure
from components.services.final_failure import FOLDER as FAILURES
from components.services.launch import STORAGE_VARIABLE
from components.services.run_tree import FOLDER as TREES
from components.services.storage import Storage, join
from components.services.tracking import client, mlflow_errors
from pipelines import STAGES, WATCH
from pipelines.cluster.connection import Connection, Refused

NAMES = {each.replace("_", "-"): each for each in (*STAGES, WATCH, "close_run", "stop_run", "ingest_shard", "merge_shards")}
_DRIVER = re.compile(r"driver(\(\d+\))?$")
_EXECUTOR = re.compile(r"executor(\((\d+)\))?$")


class Task(NamedTuple):
    """A node of the run.

    Fields:
        stage: the stage that it belongs to, or its own name.
        name: as KFP shows it.
        kind: "executor", "driver" or "other": a stage's pod that works, KFP's own pod that prepares it, or a node above.
        pod: its pod; "" if it has none.
        error: what KFP says, one line.
    """

    stage: str
    name: str
    kind: str
    state: str
    pod: str
    seconds: float | None
    error: str


class Failure(NamedTuple):
    """Why a stage failed, in its own words, and where that was found."""

    stage: str
    message: str


def run_of(kfp: Connection, run_id: str) -> Any:
    """The run.

    Raises:
        DoNotRetry: there is none with this id.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id):
        raise DoNotRetry(f"{run_id!r} is no id of a run", "give the id that `rankloop submit` printed")
    return kfp.ask(f"run {run_id}", kfp.client.runs.run_service_get_run, run_id)


def newest_runs(kfp: Connection, count: int, experiment_id: str) -> list[Any]:
    """The newest runs of the experiment."""
    reply = kfp.ask(
        "runs", kfp.client.runs.run_service_list_runs, page_size=count, sort_by="created_at desc", experiment_id=experiment_id
    )
    return list(reply.runs or ())


def tasks_of(run: Any) -> list[Task]:
    """The run's tasks in the order in which they started.

    A stage is two pods: KFP's driver and the executor that works, and the latter's node is called "executor". It belongs to the
    nearest node above it that has a stage's name.
    """
    details = list((run.run_details.task_details if run.run_details else None) or ())
    parents: dict[str, Any] = {}
    for each in details:
        for child in each.child_tasks or ():
            for key in (child.pod_name, child.task_id):
                if key:
                    parents[key] = each
    started = sorted(details, key=lambda each: str(each.start_time or each.create_time or "9"))
    return [_task(each, parents) for each in started]


def _task(detail: Any, parents: Mapping[str, Any]) -> Task:
    name = str(detail.display_name or "")
    stage, above, seen = _stage(name), detail, 0
    while not stage and seen < len(parents):
        above = parents.get(above.pod_name or "") or parents.get(above.task_id or "")
        if above is None:
            break
        stage, seen = _stage(str(above.display_name or "")), seen + 1
    kind = "driver" if stage and _DRIVER.search(name) else "executor" if stage and _EXECUTOR.match(name) else "other"
    error = " ".join(str(detail.error.message or "").split())[:300] if detail.error else ""
    return Task(stage or name, name, kind, str(detail.state or ""), str(detail.pod_name or ""), _seconds(detail), error)


def _stage(name: str) -> str:
    """`"ppo-finetune-2-driver"` -> `"ppo_finetune"`; "" for what is no stage's."""
    plain = re.sub(r"(-driver)?(\(\d+\))?$", "", name)
    return NAMES.get(plain) or NAMES.get(re.sub(r"-\d+$", "", plain), "")


def _seconds(detail: Any) -> float | None:
    ends = (detail.start_time, detail.end_time)
    return (ends[1] - ends[0]).total_seconds() if all(isinstance(each, datetime) for each in ends) else None


def failures_of(run_id: str) -> list[Failure]:
    """Why stages failed for good, from S3; [] where RANKLOOP_STORAGE is not set."""
    root = os.environ.get(STORAGE_VARIABLE, "")
    if not root:
        return []
    storage, found = Storage(), []
    prefix = join(root, FAILURES, re.sub(r"[^A-Za-z0-9._-]", "-", run_id)) + "/"
    for item in storage.list(prefix):
        stage = item.uri.removeprefix(prefix).rpartition("-")[0]
        found.append(Failure(stage, str(storage.get_json(item.uri)["message"])))
    return found


def mlflow_of(run_id: str) -> tuple[str, list[Failure]]:
    """The page of the run's MLflow run, and the failures that its stages noted there; "" and [] where it is not known."""
    root, uri = os.environ.get(STORAGE_VARIABLE, ""), os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not root or not uri.startswith("http"):
        return "", []
    storage, record = Storage(), join(root, TREES, re.sub(r"[^A-Za-z0-9._-]", "-", run_id) + ".json")
    if not storage.exists(record):
        return "", []
    parent = str(storage.get_json(record)["mlflow_run_id"])
    with mlflow_errors():
        mlflow = client()
        experiment = mlflow.get_run(parent).info.experiment_id
        children = mlflow.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1000)
    tags = [each.data.tags for each in children]
    failures = [Failure(each.get("mlflow.runName", ""), each["rankloop.failure"]) for each in tags if "rankloop.failure" in each]
    return f"{uri}/#/experiments/{experiment}/runs/{parent}", failures


def attempts_of(tasks: list[Task]) -> list[Task]:
    """The pods in which stages worked. Where a stage may be retried, its attempts are below a node "executor" without a pod."""
    found = [each for each in tasks if each.kind == "executor"]
    retried = {each.stage for each in found if each.name.endswith(")")}
    return [each for each in found if each.name.endswith(")") or each.stage not in retried]


def pods_of(run: Any, stage: str) -> list[Task]:
    """The pods in which a stage worked, the last attempt last; all stages' without a name.

    Raises:
        DoNotRetry: the run has no such pod yet, or no such stage.
    """
    wanted = stage.replace("-", "_")
    tasks = [each for each in attempts_of(tasks_of(run)) if each.pod]
    found = [each for each in tasks if not stage or each.stage == wanted]
    if not found:
        known = ", ".join(dict.fromkeys(each.stage for each in tasks)) or "none yet"
        raise DoNotRetry(f"run {run.run_id} has no pod of {stage or 'any stage'}; it has: {known}", "see `rankloop status`")
    return found


def log_of(kfp: Connection, run_id: str, pod: str, follow: bool) -> Iterator[str]:
    """The pod's log as KFP's API server gives it, from the pod or, once that is gone, from its archive.

    KFP has this call in no contract, and its client has none for it; it is what KFP's own pages use.
    """
    client = kfp.client.runs.run_service_get_run.__self__.api_client
    what = f"log of pod {pod}"
    with kfp.errors(what):
        reply = client.call_api(
            "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log",
            "GET",
            {"run_id": run_id, "node_id": pod},
            [("follow", "true")] if follow else [],
            {"Accept": "text/plain"},
            auth_settings=["Bearer"],
            response_type="str",
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(5, 3600) if follow else (5, 60),
        )
        try:
            left = b""
            for piece in reply.stream(2**16, decode_content=True):
                *lines, left = (left + piece).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
            if left:
                yield left.decode(errors="replace")
        finally:
            reply.release_conn()


def log_or_remedy(kfp: Connection, run_id: str, pod: str, follow: bool) -> Iterator[str]:
    """As `log_of`; where KFP has no log any more, the message says how to ask Kubernetes.

    Raises:
        DoNotRetry: KFP refuses, or has none.
    """
    try:
        yield from log_of(kfp, run_id, pod, follow)
    except (Refused, Retry) as error:
        if isinstance(error, Refused) and error.status == 401:
            raise
        raise DoNotRetry(error.message, f"kubectl -n {kfp.namespace or 'kubeflow'} logs {pod} -c main") from error


def said_by(run_id: str) -> tuple[str, list[Failure], list[str]]:
    """MLflow's page, the stages' failures without repeats, and what could not be asked: a store that is away hides no status."""
    page, failures, silent = "", [], []
    try:
        failures += failures_of(run_id)
    except StageFailure as error:
        silent.append(error.message)
    try:
        page, noted = mlflow_of(run_id)
        failures += noted
    except StageFailure as error:
        silent.append(error.message)
    return page, list(dict.fromkeys(failures)), silent
