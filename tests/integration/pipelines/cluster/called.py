"""Calls a command of `rankloop` in this process."""

from __future__ import annotations

from typing import NamedTuple

from typer.testing import CliRunner

from components.services.exits import StageFailure
from pipelines.cli import app


class Called(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    text: str


def rankloop(*arguments: str, standard_input: bytes | None = None) -> Called:
    result = CliRunner().invoke(app, list(arguments), input=standard_input)
    if isinstance(result.exception, StageFailure):
        return Called(result.exception.exit_code, str(result.exception))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Called(result.exit_code, result.output)
