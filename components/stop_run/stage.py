"""Ends a run whose gate failed, or that was started with a wrong parameter.

Goes in:  the stage whose gate failed, if it is one, and the reason.
Comes out: nothing; the task fails with the do-not-retry code, and so the run does.
Alone:    python -m components.stop_run --stage validate_data --reason "…"
"""

from __future__ import annotations

from typing import NamedTuple

from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings


class Config(Settings):
    pass


class Inputs(Settings):
    stage: str
    """Stage whose gate failed; empty: a parameter of the run is wrong."""
    reason: str
    """Why, in one line."""


class Outputs(NamedTuple):
    pass


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """Always fails."""
    if not inputs.stage:
        raise DoNotRetry(inputs.reason, "correct the run's parameters")
    raise DoNotRetry(f"the gate of {inputs.stage} failed: {inputs.reason}", "see that stage's report in MLflow")
