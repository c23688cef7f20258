"""What a stage says when one of its processes has failed: the cause, not its echo."""

from __future__ import annotations

import pytest

from components.services.exits import DoNotRetry, Retry
from components.services.job import Outcome
from components.services.processes import ProcessFailed, failure

ECHO = Outcome(rank=0, exit_code=75, message="process 0 lost contact with another one", lost_contact=True, time=1.0)
KILLED = Outcome(rank=1, exit_code=-9, message="SIGKILL")


def test_a_killed_process_is_named_with_its_signal() -> None:
    error = failure([ECHO, KILLED], 2, "")
    assert isinstance(error, Retry)
    assert error.message == "process 1 of 2 was killed by SIGKILL"
    assert "memory" in error.remedy


def test_what_a_process_says_itself_comes_before_all_and_the_earliest_first() -> None:
    data = Outcome(rank=1, exit_code=65, message="bad row 3", remedy="correct it", time=5.0)
    later = Outcome(rank=2, exit_code=75, message="S3 is away", time=6.0)
    stopped = Outcome(rank=3, exit_code=-15, message="SIGTERM")  # by torchrun, after the first failure
    error = failure([ECHO, later, stopped, data], 4, "")
    assert isinstance(error, DoNotRetry)
    assert str(error) == "bad row 3\n  remedy: correct it"


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        (Outcome(rank=1, exit_code=75, message="S3 is away"), Retry, "S3 is away"),
        (Outcome(rank=1, exit_code=130), KeyboardInterrupt, ""),
        (Outcome(rank=1, exit_code=1, message="KeyError: 'x'"), ProcessFailed, "process 1 of 2: KeyError: 'x'"),
    ],
)
def test_it_ends_as_that_process_did(end: Outcome, kind: type[BaseException], said: str) -> None:
    error = failure([ECHO, end], 2, "")
    assert type(error) is kind
    assert str(error) == said


def test_who_said_nothing_is_named_with_what_else_is_known() -> None:
    error = failure([ECHO], 3, "TrainJob a1: Failed, node-1 Failed")
    assert isinstance(error, Retry)
    assert error.message == "of 3 processes 1, 2 ended without a word; TrainJob a1: Failed, node-1 Failed"
