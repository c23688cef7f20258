"""Closes the pipeline's MLflow run with its true status. The graph's exit handler: it runs whether the graph failed or not.

Goes in:  the final state as KFP names it, and the error.
Comes out: nothing.
Alone:    python -m components.close_run --state SUCCEEDED
"""

from __future__ import annotations

import os
from typing import NamedTuple

from components.services.launch import Context, Settings
from components.services.tracking import PARENT_VARIABLE, client, mlflow_errors

STATUS = {"SUCCEEDED": "FINISHED", "COMPLETE": "FINISHED", "SKIPPED": "FINISHED", "CANCELLED": "KILLED"}


class Config(Settings):
    pass


class Inputs(Settings):
    state: str
    """Final state of the pipeline, as KFP names it; anything unknown counts as failed."""
    error: str = ""
    """KFP's error message."""


class Outputs(NamedTuple):
    status: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """Sets the parent run's status; without a parent run there is nothing to close."""
    status = STATUS.get(inputs.state, "FAILED")
    parent = os.environ.get(PARENT_VARIABLE, "")
    if parent:
        with mlflow_errors():
            mlflow = client()
            mlflow.set_tag(parent, "rankloop.state", inputs.state)
            if inputs.error:
                mlflow.set_tag(parent, "rankloop.error", inputs.error[:5000])
            mlflow.set_terminated(parent, status)
    context.summary["status"] = status
    return Outputs(status)
