"""Aliases as values: what a promotion moves, what differs from the log, and which difference is a late request."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from components.register_model.aliases import OWNED, STRAY_SECONDS, Aliases, applied, companion_of, differences, exchange, strays
from components.register_model.audit import Record

VERSIONS = st.sampled_from(["1", "2", "3"])
ALIASES = st.dictionaries(st.sampled_from(["policy", "reward"]), st.dictionaries(st.sampled_from(OWNED), VERSIONS))


def test_the_first_champion_has_no_previous_one() -> None:
    assert exchange({}, [("reward", "1"), ("policy", "1")]) == [("reward", "champion", "1"), ("policy", "champion", "1")]


def test_the_reward_model_moves_first_and_its_previous_champion_belongs_to_the_policy_s() -> None:
    now: Aliases = {"policy": {"champion": "2", "previous_champion": "1"}, "reward": {"champion": "5", "previous_champion": "4"}}
    moves = exchange(now, [("reward", "5"), ("policy", "3")])
    assert [model for model, _, _ in moves] == ["reward", "reward", "policy", "policy"]
    assert applied(now, moves) == {
        "policy": {"champion": "3", "previous_champion": "2"},
        "reward": {"champion": "5", "previous_champion": "5"},
    }


@given(ALIASES, ALIASES)
def test_applying_what_differs_gives_what_was_found(expected: Aliases, found: Aliases) -> None:
    moved = differences(expected, found)
    after = applied(expected, [(model, alias, to) for model, alias, _, to in moved])
    assert differences(after, found) == []
    assert all(before != to for _, _, before, to in moved)


def test_a_companion_needs_a_name_and_a_version() -> None:
    assert companion_of({"reward_model_name": "reward", "reward_model_version": "3"}) == ("reward", "3")
    assert companion_of({"reward_model_version": "3"}) is None


def log(ended_by: str, at: str = "2026-01-02T00:00:00.000000Z") -> list[Record]:
    """A promotion to version 2 by session "a" that was ended by a session, and one to version 3."""

    def record(number: int, session: str, **content: Any) -> Record:
        return Record(number, "", {"session": session, "at": at, **content})

    def moves(to: str) -> list[dict[str, str]]:
        return [{"model": "policy", "alias": "champion", "from": "", "to": to}]

    return [
        record(1, "a", event="begun", moves=moves("2")),
        record(2, ended_by, event="done", of=1, moves=[]),
        record(3, "b", event="begun", moves=moves("3")),
        record(4, "b", event="done", of=3, moves=[]),
    ]


NOON = 1767355200.0  # 2026-01-02T12:00:00Z
TO_2 = ("policy", "champion", "3", "2")


def test_a_late_request_is_one_to_where_a_change_led_that_another_process_ended() -> None:
    assert strays(log(ended_by="b"), [TO_2], NOON) == [TO_2]
    assert strays(log(ended_by="a"), [TO_2], NOON) == [], "its own process ended it: nothing of it is under way"
    assert strays(log(ended_by="b"), [("policy", "champion", "3", "1")], NOON) == [], "no change led there"
    assert strays(log(ended_by="b"), [("policy", "previous_champion", "3", "2")], NOON) == [], "it moved another alias"
    assert strays(log(ended_by="b"), [TO_2], NOON + STRAY_SECONDS) == [], "after a day it is a person"
