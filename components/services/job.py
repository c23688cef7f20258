"""How many processes share a training, what they run, and what each of them says when it ends: plain records, without torch."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

from pydantic import Field

from components.services.launch import Settings

JOB_VARIABLE = "RANKLOOP_JOB"


class Distributed(Settings):
    """Configuration of a training that several processes may share."""

    processes: int = Field(1, ge=1)
    """Processes on each node, one for each GPU: they share each step's work, and the result is the same within rounding."""
    nodes: int = Field(1, ge=1)
    """Nodes; with more than one the stage starts a Kubeflow TrainJob of so many pods and follows it."""


class Job(Settings):
    """What several processes run together."""

    name: str
    """The same for every attempt at the same work."""
    stage: str
    """Name of the package below `components`."""
    config: dict[str, Any]
    """Values of its `Config`."""
    inputs: dict[str, Any]
    """Values of its `Inputs`."""
    root: str
    """The `s3://` URI below which the stage's artifacts lie."""
    outcomes: str
    """The `s3://` URI below which each process says how it ended."""
    run_id: str
    """The stage's MLflow run; empty: none."""


class Outcome(Settings):
    """How one process ended."""

    rank: int
    """Its number."""
    exit_code: int = 0
    """As the stage's own."""
    message: str = ""
    """Why it failed."""
    remedy: str = ""
    """What to do about it."""
    lost_contact: bool = False
    """Whether it failed because another one was gone."""
    time: float = 0.0
    """When it failed, in seconds since 1970."""
    outputs: dict[str, Any] = Field(default_factory=dict)
    """The stage's outputs, from the first process."""
    summary: dict[str, Any] = Field(default_factory=dict)
    """The stage's summary, from the first process."""
    pages: list[str] = Field(default_factory=list)
    """Names of the reports that lie beside this, from the first process."""


def die_with_parent() -> None:
    """Lets no process go on alone when what started it was killed: its work would be done twice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
