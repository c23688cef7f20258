"""Configuration of the stage: its thresholds reach the gate, and numbers that JSON cannot hold are refused before any work."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components.evaluate.stage import Config, thresholds_of
from components.rlhf.gate import OPTIONAL, RULES
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings


def test_thresholds_are_the_gates() -> None:
    whole = thresholds_of(Config(champion_margin=0.05), compared=True, probed=True, grouped=True)
    assert set(whole) == {rule.threshold for rule in RULES}
    assert whole["min_win_rate_over_champion"] == pytest.approx(0.45)
    alone = thresholds_of(Config(champion_margin=0.05), compared=False, probed=False, grouped=False)
    assert {name for name, value in alone.items() if value is None} == set(OPTIONAL)


def test_line_40_each_threshold_is_the_configs_own() -> None:
    values = {rule.threshold: 0.01 * (1 + number) for number, rule in enumerate(RULES) if rule.threshold in Config.model_fields}
    assert len(values) == len(RULES) - 3, "the champion's is its margin, and both rows of the worst group have one"
    found = thresholds_of(Config(**values), compared=True, probed=True, grouped=True)
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_kl_reference", math.inf),
        ("min_win_rate_over_sft", math.nan),
        ("champion_margin", 0.5),  # a margin of one half would let anything in
        ("temperature", 0),
        ("prompts", 1),
        ("truth", "real"),
        ("max_perplexity_ratio", math.inf),
        ("max_harmful_refusal_drop", -0.1),
        ("refusal_phrases", ["i cannot", " "]),  # an empty phrase is in every answer
        ("max_kl", 3),
    ],
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(DoNotRetry, match=f"evaluate.{key}"):
        parse_settings(Config, {key: value}, "evaluate")
