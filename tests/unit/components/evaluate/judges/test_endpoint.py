"""What is asked of a judging model, and what its words mean."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluate.judges.endpoint import Reply, judgement_of, request_of, verdict_of
from components.evaluate.judges.judge import position_bias
from components.evaluate.judges.pairs import SAME_TEXT, Pair
from components.evaluate.judges.settings import JudgeSettings

CONFIG = JudgeSettings(judges=["endpoint"], gate_judge="endpoint", endpoint_url="http://x/v1", endpoint_model="m")


@pytest.mark.parametrize(
    ("text", "ours_first", "ours_second"),
    [
        ("A", 1.0, 0.0),
        (" b.\n", 0.0, 1.0),
        ("Tie", 0.5, 0.5),
        ("", None, None),
        ("A B", None, None),
        ("Answer A", None, None),
        ("A\nbecause", None, None),
        ("C", None, None),
        ("А", None, None),  # Cyrillic
    ],
)
def test_only_one_word_is_a_verdict(text: str, ours_first: float | None, ours_second: float | None) -> None:
    assert verdict_of(text, True) == ours_first
    assert verdict_of(text, False) == ours_second


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        *(("A", "B", 1.0), ("B", "A", 0.0), ("tie", "tie", 0.5)),
        *(("A", "A", 0.5), ("B", "B", 0.5)),  # the place decided
        *(("A", "tie", 0.5), ("tie", "A", 0.5)),
        *(("A", "hm", None), ("hm", "B", None)),
    ],
)
def test_both_orders_must_agree(first: str, second: str, outcome: float | None) -> None:
    judged = judgement_of((Reply(first, 1), Reply(second, 1)))
    assert judged.outcome == outcome
    assert judged.asked
    assert ("replies" in judged.details) == (outcome is None)


def test_position_bias_is_counted_over_pairs_that_were_asked() -> None:
    said = [("A", "B"), ("A", "A"), ("A", "A"), ("tie", "tie"), ("A", "hm")]
    judged = [judgement_of((Reply(first, 1), Reply(second, 1))) for first, second in said]
    bias = position_bias([*judged, SAME_TEXT])
    assert bias["order_changes_verdict_endpoint"].value == 2 / 4
    assert bias["first_shown_preferred_endpoint"].value == 5 / 6


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.text(), st.booleans())
def test_answers_cannot_leave_their_place(question: str, ours: str, theirs: str, ours_first: bool) -> None:
    """An answer that repeats a whole request, marks and all, adds no mark of its own request."""
    earlier = request_of(Pair(0, "sft", question, ours, theirs, 0), ours_first, CONFIG)["messages"][0]["content"]
    request = request_of(Pair(0, "sft", question, earlier, theirs, 0), ours_first, CONFIG)
    text = request["messages"][0]["content"]
    mark = text.partition('"===== ')[2].partition('"')[0]
    assert text.count(f"===== {mark}") == 5
    a, b = (earlier, theirs) if ours_first else (theirs, earlier)
    assert f"===== {mark} answer A\n{a}\n===== {mark} answer B\n{b}\n===== {mark} end" in text


def test_a_request_says_which_is_which_and_holds_no_policy_name() -> None:
    pair = Pair(3, "champion", "Why {a}?", "Because {b}.", "No {mark}.", 0)
    first, second = (json.dumps(request_of(pair, ours_first, CONFIG)) for ours_first in (True, False))
    assert first.index("Because {b}.") < first.index("No {mark}.")
    assert second.index("Because {b}.") > second.index("No {mark}.")
    assert not [name for name in ("champion", "candidate", "sft") if name in first]
