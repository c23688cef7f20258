"""The choice between two candidates: bounds first, then the judge; on prompts that the verdict does not ask."""

from __future__ import annotations

from typing import Any

import pytest

from components.evaluate.choice import BOUNDS, divide, in_order
from components.rlhf.gate import RULES
from components.rlhf.records import Message
from components.services.exits import DoNotRetry


def candidate(uri: str, score: float | None, *broken: str) -> dict[str, Any]:
    return {"uri": uri, "judge_score": {"value": score, "low": None, "high": None}, "broken": list(broken)}


def order(*found: dict[str, Any]) -> list[str]:
    return [each["uri"] for each in in_order(found)]


def test_the_judge_decides_between_candidates_within_the_bounds() -> None:
    assert order(candidate("ppo", 0.4), candidate("dpo", 0.5)) == ["dpo", "ppo"]
    assert order(candidate("ppo", -0.1), candidate("dpo", -0.2)) == ["ppo", "dpo"]


def test_who_would_fail_the_gate_is_not_chosen_for_being_liked() -> None:
    assert order(candidate("ppo", 9.0, "kl_reference"), candidate("dpo", 0.1)) == ["dpo", "ppo"]
    both = candidate("ppo", 0.1, "eos_fraction"), candidate("dpo", 9.0, "kl_reference", "length_ratio")
    assert order(*both) == ["ppo", "dpo"]


def test_a_score_that_is_none_is_the_lowest_and_equals_keep_their_order() -> None:
    assert order(candidate("ppo", None), candidate("dpo", -99.0)) == ["dpo", "ppo"]
    assert order(candidate("ppo", 0.0), candidate("dpo", 0.0)) == ["ppo", "dpo"]
    assert order(candidate("ppo", None), candidate("dpo", None)) == ["ppo", "dpo"]


def test_the_bounds_are_rows_of_the_gate() -> None:
    assert set(BOUNDS) < {rule.measure for rule in RULES}


def prompts(count: int) -> list[list[Message]]:
    return [[Message(role="user", content=str(number))] for number in range(count)]


@pytest.mark.parametrize(("count", "verdict"), [(8, 4), (7, 4), (2, 1)])
def test_no_prompt_serves_both_the_choice_and_the_verdict(count: int, verdict: int) -> None:
    asked, others = divide(prompts(count))
    assert (asked + others, len(asked)) == (prompts(count), verdict)


def test_one_prompt_is_too_few() -> None:
    with pytest.raises(DoNotRetry, match="does not suffice for a choice"):
        divide(prompts(1))
