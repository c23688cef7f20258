"""Processes that promote: forked, killed before a request of theirs or paused there, and how each ended.

Every request to S3 and to MLflow goes through urllib3, and only requests that write change anything that anybody else can see. So a
process that is killed before its n-th write, for every n, has been killed at every instruction there is.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import urllib3.connectionpool

from components.register_model.audit import acting, faults
from components.register_model.promotion import ANCHOR_TAG, Registry
from components.services.exits import EXIT_DO_NOT_RETRY, StageFailure
from components.services.storage import Storage
from components.services.tracking import client

KILLED = -signal.SIGKILL
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


def fork(work: Callable[[], object], told: str = os.devnull) -> int:
    """Begins `work` in a process of its own and gives its id; how it ended is its exit code, and `told` gets why it failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        logging.disable()
        work()
        code = 0
    except StageFailure as failure:
        code = failure.exit_code
        os.write(2, failure.message.encode())
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stop_before(request: int, pattern: str = WRITES, number: int = signal.SIGKILL, after: bool = False) -> None:
    """Lets this process receive a signal, SIGKILL or SIGSTOP, before its n-th request (from 0) whose method and path match.

    Args:
        after: as soon as the answer has come, instead.
    """
    made = 0
    original = urllib3.connectionpool.HTTPConnectionPool.urlopen

    def urlopen(pool, method, url, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal made
        if re.search(pattern, f"{method} {url}"):
            made += 1
            if made == request + 1:
                if after:
                    original(pool, method, url, *args, **kwargs)
                os.kill(os.getpid(), number)
        return original(pool, method, url, *args, **kwargs)

    urllib3.connectionpool.HTTPConnectionPool.urlopen = urlopen  # type: ignore[method-assign]


def killed(work: Callable[[], object], request: int, pattern: str = WRITES, after: bool = False) -> bool:
    """Whether a process that does `work` was killed before its n-th matching request, or after it; otherwise it has ended well."""

    def until_killed() -> None:
        stop_before(request, pattern, after=after)
        work()

    code = wait(fork(until_killed))
    assert code in (0, KILLED)
    return code == KILLED


class Race(NamedTuple):
    """How a round of promotions at the same time against the same champion went.

    Fields:
        codes: {version: exit code of the process that promoted it}.
        told: {version: why it failed}.
        champion, previous: the aliases of the policy afterwards; `reward_model`: whether its reward model's are the same.
    """

    codes: dict[str, int]
    told: dict[str, str]
    champion: str
    previous: str
    reward_model: bool

    def faults(self, old: str) -> list[str]:
        """What went wrong; `old` was the champion before."""
        winners = [version for version, code in self.codes.items() if code == 0]
        right = rf"the champion of \S+ is version {self.champion}, but the evaluation compared with {old}: version (\d+) stays .*"
        found = [] if len(winners) == 1 else [f"{len(winners)} won"]
        found += [] if winners == [self.champion] else [f"version {self.champion} is champion, but {winners} won"]
        found += [] if self.previous == old else [f"previous_champion is {self.previous}, not {old}"]
        found += [] if self.reward_model else ["the reward model's aliases are others"]
        for version, code in self.codes.items():
            said = re.fullmatch(right, self.told[version])
            if code and not (code == EXIT_DO_NOT_RETRY and said and said[1] == version):
                found.append(f"{version} ended with {code}: {self.told[version]}")
        return found


def race(pair: Pair, old: str, challengers: list[str], folder: Path) -> Race:
    """One process for each challenger, all at the same moment; nobody is told of the others."""
    start = time.time() + 0.05 * len(challengers)

    def promote(version: str) -> None:
        registry = pair.registry()
        time.sleep(max(0.0, start - time.time()))
        registry.promote(version, (pair.reward, version), old, {})

    processes = {each: fork(partial(promote, each), str(folder / each)) for each in challengers}
    codes = {version: wait(process) for version, process in processes.items()}
    policy, reward = pair.aliases()
    told = {version: (folder / version).read_text() for version in challengers}
    return Race(codes, told, policy["champion"], policy["previous_champion"], policy == reward)


def check_log(pair: Pair) -> list[tuple[str, str]]:
    """(event, action) of every record; the log is whole, what is begun is ended, and it says what MLflow says."""
    registry = pair.registry()
    records = registry.audit.records()
    anchor = client().get_registered_model(pair.policy).tags[ANCHOR_TAG]
    assert faults(records, anchor) == []
    assert anchor == f"{records[-1].number} {records[-1].digest}"
    content = [record.content for record in records]
    for first, second in zip(content, [*content[1:], {}], strict=True):
        if first["event"] == "begun":
            assert second["of"] == first["number"], "the next record is its end"
    found = registry.aliases(list(content[-1]["aliases"]))
    assert found == content[-1]["aliases"]
    return [(each["event"], each["action"]) for each in content]
