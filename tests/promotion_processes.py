"""Processes that promote: forked, killed before a request of theirs or paused there, and how each ended.

Every request to S3 and to MLflow goes through urllib3, and only requests that write change anything that anybody else can see. So a
process that is killed before its n-th write, for every n, has been killed at every instruction there is.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import uuid
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import urllib3.connectionpool

from components.register_model.audit import acting
from components.register_model.promotion import Registry
from components.services.exits import StageFailure
from components.services.storage import Storage
from components.services.tracking import client

WRITES = r"PUT|POST|DELETE|PATCH"


@cache
def _storage(process: int) -> Storage:
    """One for each process: a fork must not share connections."""
    return Storage()


class Pair(NamedTuple):
    """A policy in the registry with its reward model; both have versions 1, 2, …, and nothing has an alias."""

    policy: str
    reward: str

    def registry(self, lock_seconds: float = 20) -> Registry:
        uri = f"s3://rankloop/registry/{self.policy}"
        return Registry(client(), _storage(os.getpid()), uri, self.policy, lock_seconds, acting("a test"))

    def aliases(self) -> tuple[dict[str, str], dict[str, str]]:
        found = self.registry().aliases(self)
        return found[self.policy], found[self.reward]

    def promote(self, version: str, over: str, lock_seconds: float = 20, by_hand: bool = False) -> None:
        self.registry(lock_seconds).promote(version, (self.reward, version), over, {}, by_hand=by_hand)


def new_pair(versions: int = 3) -> Pair:
    """Registers both models with so many versions. No model is behind them: nothing that is tested with them loads one."""
    pair = Pair(*(f"{kind}-{uuid.uuid4().hex[:10]}" for kind in ("policy", "reward")))
    mlflow = client()
    for name in pair:
        mlflow.create_registered_model(name)
        for version in range(1, versions + 1):
            tags = {"reward_model_name": pair.reward, "reward_model_version": str(version)} if name == pair.policy else {}
            mlflow.create_model_version(name, f"s3://rankloop/nothing/{version}", tags=tags)
    return pair


def fork(work: Callable[[], object]) -> int:
    """Begins `work` in a process of its own and gives its id; what it says goes to nobody, its exit code says how it ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    except StageFailure as failure:
        code = failure.exit_code
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stop_before(request: int, pattern: str = WRITES, number: int = signal.SIGKILL) -> None:
    """Lets this process receive a signal, SIGKILL or SIGSTOP, before its n-th request (from 0) whose method and path match."""
    made = 0
    original = urllib3.connectionpool.HTTPConnectionPool.urlopen

    def urlopen(pool, method, url, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal made
        if re.search(pattern, f"{method} {url}"):
            if made == request:
                os.kill(os.getpid(), number)
            made += 1
        return original(pool, method, url, *args, **kwargs)

    urllib3.connectionpool.HTTPConnectionPool.urlopen = urlopen  # type: ignore[method-assign]
