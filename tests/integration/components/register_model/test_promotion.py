"""Promotion where something goes wrong: paused beyond the lease, many at once, moved by others; kills are a system test."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from components.register_model.audit import faults
from components.register_model.promotion import ANCHOR_TAG
from components.services.exits import DoNotRetry
from components.services.tracking import client
from pipelines.local_services import LocalServices
from tests.promotion_processes import KILLED, Pair, check_log, fork, killed, new_pair, race, stop_before, wait

pytestmark = pytest.mark.usefixtures("services")
SHORT = 0.3  # seconds of a lease whose holder is killed or paused
SET_ALIAS = r"POST .*/registered-models/alias"


def test_only_one_of_many_at_once_wins_and_the_others_say_why(tmp_path: Path) -> None:
    pair = new_pair(versions=7)
    pair.promote("1", "")
    assert race(pair, "1", [str(version) for version in range(2, 8)], tmp_path).faults("1") == []
    check_log(pair)


def paused(pair: Pair, version: str, over: str, request: int, pattern: str) -> int:
    """A process that promotes and stops itself right before a request; its id once it has stopped."""

    def until_stopped() -> None:
        stop_before(request, pattern, signal.SIGSTOP)
        pair.promote(version, over, SHORT)

    process = fork(until_stopped)
    assert os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1])
    return process


def test_paused_before_it_decides_it_loses_to_the_one_that_came_meanwhile() -> None:
    pair = new_pair()
    pair.promote("1", "")
    process = paused(pair, "2", "1", 0, r"PUT .*/audit/")
    pair.promote("3", "1")
    os.kill(process, signal.SIGCONT)
    assert wait(process) == 75, "its record's number is taken"
    assert pair.aliases()[0] == {"champion": "3", "previous_champion": "1"}
    check_log(pair)


@pytest.mark.parametrize("request_number", range(4))
def test_paused_beyond_its_lease_it_moves_no_alias_over_the_new_champion(request_number: int) -> None:
    """Before the conditional write that precedes each move: the new champion is never moved, not even for a moment."""
    pair = new_pair()
    pair.promote("1", "")
    process = paused(pair, "2", "1", 2 + request_number, r"PUT .*/lock\.json")  # it takes two to get the lock
    pair.promote("3", "2")  # finishes the promotion of 2 first
    seen = watch(pair, lambda: (os.kill(process, signal.SIGCONT), wait(process)))
    assert seen == {("3", "2")}
    assert pair.aliases() == ({"champion": "3", "previous_champion": "2"},) * 2
    assert ("begun", "restore") not in check_log(pair)


@pytest.mark.parametrize("request_number", range(4))
@pytest.mark.parametrize("dies", [False, True])
def test_paused_inside_the_window_that_mlflow_leaves_it_is_noticed_and_put_back(request_number: int, dies: bool) -> None:
    """Between the conditional write and MLflow's doing: by itself when it goes on, or by the next run if it dies."""
    pair = new_pair()
    pair.promote("1", "")

    def until_stopped() -> None:
        stop_before(request_number, SET_ALIAS, signal.SIGSTOP)
        if dies:
            stop_before(request_number + 1, SET_ALIAS, signal.SIGKILL)
            stop_before(2, r"PUT .*/audit/", signal.SIGKILL)
        pair.promote("2", "1", SHORT)

    process = fork(until_stopped)
    assert os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1])
    pair.promote("3", "2")
    os.kill(process, signal.SIGCONT)
    assert wait(process) == (KILLED if dies else 0)
    right = {"champion": "3", "previous_champion": "2"}
    if dies:
        assert pair.aliases() != (right, right), "the late request did harm"
        assert pair.registry().settle()[pair.policy] == right
    assert pair.aliases() == (right, right)
    assert ("begun", "restore") in check_log(pair)


def watch(pair: Pair, work: Callable[[], object]) -> set[tuple[str, str]]:
    """Every (champion, previous champion) of the policy that could be seen while `work` ran."""
    seen, ended = set(), threading.Event()

    def look() -> None:
        registry = pair.registry()
        while not ended.is_set():
            now = registry.aliases([pair.policy])[pair.policy]
            seen.add((now["champion"], now["previous_champion"]))

    thread = threading.Thread(target=look)
    thread.start()
    work()
    ended.set()
    thread.join()
    return seen


def test_a_killed_holder_s_lease_ends() -> None:
    pair = new_pair()
    pair.promote("1", "")
    began = time.monotonic()
    assert killed(partial(pair.promote, "2", "1", 2.0), 0, r"PUT .*/audit/")
    pair.promote("3", "1")
    assert 2 < time.monotonic() - began < 20, "it was waited for, and no longer"
    assert pair.aliases()[0] == {"champion": "3", "previous_champion": "1"}


def test_what_a_person_moved_in_mlflow_is_respected_and_noted() -> None:
    pair = new_pair()
    pair.promote("1", "")
    pair.promote("2", "1")
    client().set_registered_model_alias(pair.policy, "champion", "3")
    with pytest.raises(DoNotRetry, match=r"champion of .* is version 3, but the evaluation compared with 2"):
        pair.promote("1", "2")
    assert pair.aliases()[0] == {"champion": "3", "previous_champion": "1"}
    last = pair.registry().audit.head()
    assert last is not None
    assert (last.content["event"], last.content["moves"]) == (
        "observed",
        [{"model": pair.policy, "alias": "champion", "from": "2", "to": "3"}],
    )
    pair.promote("1", "3")
    assert pair.aliases()[0] == {"champion": "1", "previous_champion": "3"}
    check_log(pair)


def test_a_rollback_changes_places_takes_the_reward_model_with_it_and_bars_the_way_back() -> None:
    pair = new_pair()
    pair.promote("1", "")
    with pytest.raises(DoNotRetry, match="has no previous_champion to go back to; the champion is version 1"):
        pair.registry().rollback("none")
    pair.promote("2", "1")
    began = time.monotonic()
    pair.registry().rollback("answers in the wrong language")
    assert time.monotonic() - began < 10
    assert pair.aliases() == ({"champion": "1", "previous_champion": "2"},) * 2
    with pytest.raises(DoNotRetry, match=r"version 2 of .* was rolled back by a person"):
        pair.promote("2", "1")
    assert pair.aliases() == ({"champion": "1", "previous_champion": "2"},) * 2
    pair.promote("2", "1", by_hand=True)
    pair.promote("1", "2")
    pair.promote("2", "1")
    assert pair.aliases()[0] == {"champion": "2", "previous_champion": "1"}
    reasons = [record.content["reason"] for record in pair.registry().audit.records() if record.content["event"] == "begun"]
    assert reasons[2] == "answers in the wrong language"
    check_log(pair)


def test_a_version_that_is_gone_ends_the_promotion_and_not_every_one_after_it() -> None:
    pair = new_pair()
    pair.promote("1", "")
    assert killed(partial(pair.promote, "2", "1", SHORT), 0, SET_ALIAS)
    client().delete_model_version(pair.policy, "2")
    client().delete_model_version(pair.reward, "2")
    pair.promote("3", "1")
    assert pair.aliases()[0]["champion"] == "3"
    assert ("abandoned", "promote") in check_log(pair)


def test_a_log_that_was_edited_or_cut_is_found_out(services: LocalServices) -> None:
    pair = new_pair()
    pair.promote("1", "")
    pair.promote("2", "1")
    registry = pair.registry()
    records, anchor = registry.audit.records(), client().get_registered_model(pair.policy).tags[ANCHOR_TAG]
    assert [record.number for record in records] == [1, 2, 3, 4]
    assert faults(records, anchor) == []
    assert faults(records[:-1], anchor) == ["record 4 is gone, though the registry remembers it: the end of the log was cut off"]
    assert "before record 3 records are missing" in faults(records[:1] + records[2:], anchor)
    edited = [records[0], records[1]._replace(digest="0" * 64), *records[2:]]
    assert faults(edited, anchor) == ["record 3 does not follow from the one before it: one of the two was changed"]
