"""A promotion that is killed before each write there is, with what comes next: the registry is consistent, and the log is whole."""

from __future__ import annotations

from functools import partial

import pytest

from components.services.exits import DoNotRetry
from components.services.tracking import client
from tests.promotion_processes import check_log, killed, new_pair

pytestmark = pytest.mark.usefixtures("services")
SHORT = 0.3  # seconds of a lease whose holder is killed


def test_killed_before_any_write_the_same_run_again_completes_the_promotion_and_tells_it_once() -> None:
    pair = new_pair()
    pair.promote("1", "")
    now, other, request, seen = "1", "2", 0, set()
    while killed(partial(pair.promote, other, now, SHORT), request):
        seen.add((pair.aliases()[0]["champion"] == other, pair.aliases()[1]["champion"] == other))
        pair.promote(other, now)
        assert pair.aliases() == ({"champion": other, "previous_champion": now},) * 2, f"killed before write {request}"
        assert "promoted_at" in client().get_model_version(pair.policy, other).tags
        now, other, request = other, now, request + 1
    assert request > 14
    assert seen == {(False, False), (False, True), (True, True)}, "the reward model is never behind its policy"
    assert check_log(pair) == [("begun", "promote"), ("done", "promote")] * (request + 2)


@pytest.mark.parametrize("then", ["a rollback", "a promotion over the old champion"])
def test_killed_before_any_write_the_next_run_finds_a_consistent_registry(then: str) -> None:
    pair = new_pair()
    pair.promote("1", "")
    pair.promote("2", "1")
    now, before, other, request, begun = "2", "1", "3", 0, set()
    while killed(partial(pair.promote, other, now, SHORT, by_hand=True), request):
        head = pair.registry().audit.head()
        begun.add(has_begun := head is not None and head.content["aliases"][pair.policy]["champion"] == other)
        if then == "a rollback":
            pair.registry().rollback("a test")
            right = (now, other) if has_begun else (before, now)
        elif has_begun:
            with pytest.raises(DoNotRetry, match=rf"is version {other}, but the evaluation compared with {now}"):
                pair.promote(before, now)
            right = (other, now)
        else:
            pair.promote(other, now, by_hand=True)
            right = (other, now)
        assert pair.aliases() == ({"champion": right[0], "previous_champion": right[1]},) * 2, f"killed before write {request}"
        now, before = right
        other = next(version for version in "123" if version not in right)
        request += 1
    assert begun == {True, False}
    check_log(pair)
