"""Win rates by group of prompts: which group a prompt is in, how many make one, and what holds for the worst of many."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from components.evaluate.groups import GroupBy, groups_of, groups_section, lowest, measure_groups
from components.evaluate.judges.pairs import Judgement, Pair
from components.evaluate.measures import Measures
from components.rlhf.error_budget import win_rate_interval
from components.rlhf.gate import RULES, decide
from components.rlhf.records import Message, Ranking
from components.rlhf.statistics import Estimate
from components.simulated_world.grammar import draw_request

RULE = next(rule for rule in RULES if rule.measure == "worst_group_win_rate_over_sft")


def ranking(text: str, source: str, criterion: str | None = None) -> Ranking:
    prompt: list[Message] = [{"role": "user", "content": text}]
    return Ranking(text + source, prompt, ["a", "b"], [1, 2], "ann", source, None, None, criterion, None, "test")._replace(
        criterion=criterion, policies=None
    )


def measured(
    outcomes: list[float | None], groups: list[list[str]], min_prompts: int, asked: list[bool] | None = None
) -> tuple[Measures, dict[str, list[dict[str, Any]]]]:
    """Of one opponent; a verdict of None is a prompt that the judge was silent about, or was not asked about."""
    pairs = [Pair(row, "sft", "q", "a", "b", row % 3 - 1) for row in range(len(outcomes))]
    judgements = [Judgement(each, put, {}) for each, put in zip(outcomes, asked or [True] * len(outcomes), strict=True)]
    return measure_groups(pairs, judgements, groups, min_prompts, 0.5, 0, 200)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("source", [["desk", "shop"], ["shop"], []]),
        ("criterion", [["harm", "not stated"], ["harm"], []]),
        ("simulated", [["no request of the simulated world"]] * 3),
    ],
)
def test_a_prompt_is_in_the_groups_that_its_rankings_name(by: GroupBy, expected: list[list[str]]) -> None:
    rankings = [ranking("p", "desk"), ranking("p", "shop", "harm"), ranking("q", "shop", "harm"), ranking("not asked", "x")]
    prompts = [rankings[0].prompt, rankings[2].prompt, ranking("r", "y").prompt]
    assert groups_of(rankings, prompts, by) == expected


def test_groups_of_the_simulated_world_are_what_is_asked() -> None:
    rng = random.Random(0)
    drawn = [draw_request(rng, "test", harmful_fraction=0.3) for _ in range(20)]
    found = groups_of([], [[{"role": "user", "content": text}] for _, text in drawn], "simulated")
    assert found == [["harmful" if request.harmful else request.problem] for request, _ in drawn]
    assert ["harmful"] in found


def test_rates_of_groups_by_hand_and_a_small_group_is_not_known() -> None:
    wins: list[float | None] = [1.0] * 30 + [0.0] * 10 + [1.0] * 8 + [0.0] * 12 + [0.0] * 3
    groups = [["big"]] * 40 + [["middle"]] * 20 + [["small"]] * 3
    measures, tables = measured(wins, groups, 20)
    assert [(row["group"], row["prompts"]) for row in tables["sft"]] == [("middle", 20), ("big", 40), ("small", 3)]
    assert tables["sft"][2]["win_rate"] is None
    big, middle = (win_rate_interval([1.0] * w + [0.0] * lost, 0.05 / 4) for w, lost in ((30, 10), (8, 12)))
    assert tables["sft"][1]["win_rate"] == big._asdict()
    assert measures == {"worst_group_win_rate_over_sft": middle._asdict()}
    evaluation = {"config": {"group_by": "source", "min_group_prompts": 20}, "groups": tables}
    section = groups_section(evaluation)
    assert section.tables[0].rows[2] == ["small", 3, "not known", "not known"]
    assert "each at 97.5 %" in section.paragraphs[0]
    assert measured(wins, groups, 41)[0] == {}


def test_a_score_that_is_not_finite_makes_the_worst_group_unknown_and_fails_the_gate() -> None:
    wins: list[float | None] = [1.0] * 40 + [math.nan]
    measures, tables = measured(wins, [["a"]] * 20 + [["b"]] * 21, 20)
    assert tables["sft"][0]["group"] == "b", "the unknown one stands first"
    for found in (measures, {}):
        rows = {row["measure"]: row["verdict"] for row in decide(found, {RULE.threshold: 0.0})[0]}
        assert rows[RULE.measure] == "fail"
    rows = {row["measure"]: row["verdict"] for row in decide({}, {RULE.threshold: None})[0]}
    assert rows[RULE.measure] == "not required"


def test_a_group_is_as_large_as_what_its_judge_was_asked_and_silence_counts_either_way() -> None:
    some: list[float | None] = [0.0] * 30 + [None] * 10
    unasked, tables = measured(some, [["a"]] * 40, 35, [True] * 30 + [False] * 10)
    assert unasked == {}, "30 prompts are fewer than 35"
    assert tables["sft"] == [{"group": "a", "prompts": 30, "win_rate": None, "length_controlled": None}]
    silent, tables = measured(some, [["a"]] * 40, 35)
    assert tables["sft"][0]["prompts"] == 40
    lost, won = (win_rate_interval([0.0] * 30 + [filled] * 10, 0.025) for filled in (0.0, 1.0))
    assert silent["worst_group_win_rate_over_sft"] == {"value": 0.0, "low": lost.low, "high": won.high}


def test_a_judge_that_is_silent_about_most_of_a_group_fails_the_gate() -> None:
    """At the high end silence counts as won: without this a silent judge would carry the row, which reads that end."""
    measures, _ = measured([1.0] * 40 + [0.0] * 9 + [None] * 11, [["a"]] * 40 + [["b"]] * 20, 20)
    rows = {row["measure"]: row["verdict"] for row in decide(measures, {RULE.threshold: 0.5})[0]}
    assert rows[RULE.measure] == "fail"


def test_the_gate_fails_where_a_large_group_is_surely_worse_though_a_small_one_has_the_lowest_rate() -> None:
    large, small = Estimate(0.45, 0.41, 0.49), Estimate(0.4, 0.2, 0.65)
    assert lowest([large, small, Estimate(0.9, 0.8, 0.95)]) == Estimate(0.4, 0.2, 0.49)


def test_of_many_groups_that_are_no_worse_the_worst_is_seldom_taken_for_bad() -> None:
    """20 groups of 25 prompts, each truly at one half, 400 times: the upper end of the lowest is below 0.5 in 2.5 % at most."""
    rng = np.random.default_rng(0)
    ends = [win_rate_interval([1.0] * w + [0.0] * (25 - w), 0.05 / 40).high for w in range(26)]
    bad = sum(min(ends[w] for w in rng.binomial(25, 0.5, 20)) < 0.5 for _ in range(400))
    assert bad <= 18, "2.5 % of 400 and three standard deviations"
    assert min(ends) < 0.5, "and it is found where it is true"
