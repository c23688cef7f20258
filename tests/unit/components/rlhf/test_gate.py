"""The gate fails closed, and its rows are recomputed from the JSON that it wrote."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from components.rlhf.gate import RULES, decide

THRESHOLDS = {
    "min_win_rate_over_sft": 0.5,
    "min_win_rate_over_champion": 0.5,
    "max_kl_reference": 10.0,
    "min_distinct_2_ratio": 0.5,
    "max_length_ratio": 2.0,
    "min_eos_fraction": 0.9,
}
GOOD: dict[str, Any] = {
    "win_rate_over_sft": {"value": 0.8, "low": 0.7, "high": 0.9},
    "win_rate_over_champion": {"value": 0.6, "low": 0.51, "high": 0.7},
    "kl_reference": {"value": 3.0, "low": 2.0, "high": 4.0},
    "distinct_2_ratio": {"value": 0.8, "low": None, "high": None},
    "length_ratio": {"value": 1.1, "low": 1.0, "high": 1.2},
    "eos_fraction": {"value": 0.99, "low": 0.95, "high": 1.0},
    "judge_score_candidate": {"value": None, "low": None, "high": None},  # not the gate's
}
ENDS = {rule.measure: rule.end for rule in RULES}


def with_number(measure: str, value: Any) -> dict[str, Any]:
    return {**GOOD, measure: {**GOOD[measure], ENDS[measure]: value}}


def failed(measures: Any, thresholds: Any = THRESHOLDS) -> list[str]:
    rows, gate = decide(measures, thresholds)
    names = [row["measure"] for row in rows if row["verdict"] == "fail"]
    assert gate == ("fail" if names else "pass")
    return names


def test_good_measures_pass_and_every_rule_has_a_row() -> None:
    rows, gate = decide(GOOD, THRESHOLDS)
    assert gate == "pass"
    assert [row["measure"] for row in rows] == list(ENDS)
    assert rows[0]["relation"] == "low >"
    assert rows[0]["sentence"] == "Lower end of the judge's win rate over SFT is 0.7; > 0.5 is required."


@pytest.mark.parametrize("measure", list(ENDS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.99", True])
def test_whatever_is_not_a_finite_number_fails(measure: str, value: Any) -> None:
    assert failed(with_number(measure, value)) == [measure]


@pytest.mark.parametrize("measure", list(ENDS))
def test_missing_measure_fails(measure: str) -> None:
    assert failed({name: value for name, value in GOOD.items() if name != measure}) == [measure]
    assert failed({**GOOD, measure: None}) == [measure]
    assert failed({**GOOD, measure: 0.99}) == [measure]  # a bare number has no interval
    assert failed({}) == list(ENDS)


@pytest.mark.parametrize(
    ("measure", "at", "better", "passes_at"),
    [
        ("win_rate_over_sft", 0.5, 0.5000001, False),  # as good as SFT is not better than SFT
        ("win_rate_over_champion", 0.5, 0.5000001, False),
        ("kl_reference", 10.0, 9.9999, True),
        ("distinct_2_ratio", 0.5, 0.5001, True),
        ("length_ratio", 2.0, 1.9999, True),
        ("eos_fraction", 0.9, 0.9001, True),
    ],
)
def test_at_on_and_beyond_the_threshold(measure: str, at: float, better: float, passes_at: bool) -> None:
    assert failed(with_number(measure, at)) == ([] if passes_at else [measure])
    assert failed(with_number(measure, better)) == []
    assert failed(with_number(measure, 2 * at - better)) == [measure]


def test_lower_end_decides_over_the_win_rate_and_not_its_value() -> None:
    assert failed({**GOOD, "win_rate_over_sft": {"value": 0.9, "low": 0.49, "high": 1.0}}) == ["win_rate_over_sft"]


def test_only_the_champions_threshold_may_be_null() -> None:
    no_champion = {name: value for name, value in GOOD.items() if name != "win_rate_over_champion"}
    assert failed(no_champion, {**THRESHOLDS, "min_win_rate_over_champion": None}) == []
    for rule in RULES:
        absent = {name: value for name, value in THRESHOLDS.items() if name != rule.threshold}
        assert failed(GOOD, absent) == [rule.measure]  # absent is not null
        assert failed(GOOD, {**THRESHOLDS, rule.threshold: math.nan}) == [rule.measure]
        if rule.threshold != "min_win_rate_over_champion":
            assert failed(GOOD, {**THRESHOLDS, rule.threshold: None}) == [rule.measure]


def test_decision_survives_json_and_is_json() -> None:
    rows, gate = decide(GOOD, THRESHOLDS)
    assert decide(json.loads(json.dumps(GOOD)), json.loads(json.dumps(THRESHOLDS))) == (rows, gate)
    broken = decide(with_number("kl_reference", math.nan), {**THRESHOLDS, "max_length_ratio": math.inf})[0]
    assert json.loads(json.dumps(broken, allow_nan=False)) == broken
