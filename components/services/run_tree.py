"""One MLflow run tree for a pipeline run, whoever made its parent.

| the parent run | made by | found by |
|---|---|---|
| on a laptop | `rankloop run` | `RANKLOOP_PARENT_RUN_ID` |
| in a cluster, KFP's MLflow plugin on | KFP's API server, and a nested run a task | the task's own run, `MLFLOW_RUN_ID` |
| the same, but it sets no variables | KFP's API server | its tag `kfp.pipeline_run_id` |
| in a cluster, plugin off | the first stage | a record on S3, of which exactly one can be written |

The plugin sets variables where an administrator switched `injectUserEnvVars` on. What is found is put in
`RANKLOOP_PARENT_RUN_ID`, where every stage looks for it.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from typing import TYPE_CHECKING

from components.services.attempts import pipeline_run
from components.services.storage import Storage, join
from components.services.tracking import ADOPTED_VARIABLE, PARENT_VARIABLE, client, experiment_id, mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "kfp.pipeline_run_id"  # KFP's plugin gives it to the parent run; so do we
PARENT_TAG = "mlflow.parentRunId"
FOLDER = "pipeline-runs"
EXPERIMENTS = 1000  # looked at for a parent that KFP made


def join_run_tree(storage: Storage, root: str) -> None:
    """Names the parent run in the environment, and makes it if this is the first stage of a pipeline run that has none.

    Nothing happens without a tracking server, where the parent is named already, or outside of a pipeline run.

    Raises:
        Retry, DoNotRetry: MLflow or S3 cannot be reached, or refuses.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get(PARENT_VARIABLE):
        return
    parent = ""
    adopted, run = os.environ.get(ADOPTED_VARIABLE, ""), pipeline_run()
    if adopted:
        with mlflow_errors():
            parent = client().get_run(adopted).data.tags.get(PARENT_TAG, "")
    elif run:
        parent = _parent_of(run, storage, root)
    if parent:
        os.environ[PARENT_VARIABLE] = parent


def _parent_of(run: str, storage: Storage, root: str) -> str:
    record = join(root, FOLDER, re.sub(r"[^A-Za-z0-9._-]", "-", run) + ".json")
    if storage.exists(record):
        return str(storage.get_json(record)["mlflow_run_id"])
    with mlflow_errors():
        mlflow = client()
        found = _made_by_kfp(mlflow, run)
        made = "" if found else mlflow.create_run(experiment_id(mlflow), tags={"mlflow.runName": run, RUN_TAG: run}).info.run_id
        # `writer` because a write whose reply was lost is told by what is there: it must be no other stage's.
        content = json.dumps({"mlflow_run_id": found or made, "writer": uuid.uuid4().hex}).encode()
        if storage.put_if(record, content):
            return found or made
        if made:
            mlflow.delete_run(made)  # another stage of the same run was first
    return str(storage.get_json(record)["mlflow_run_id"])


def _made_by_kfp(mlflow: MlflowClient, run: str) -> str:
    """The run that KFP's plugin made for the pipeline run, or ""."""
    experiments = [each.experiment_id for each in mlflow.search_experiments(max_results=EXPERIMENTS)]
    name = run.replace("'", "")
    for found in mlflow.search_runs(experiments, f"tags.`{RUN_TAG}` = '{name}'", max_results=100):
        if PARENT_TAG not in found.data.tags:
            return str(found.info.run_id)
    return ""
