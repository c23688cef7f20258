"""Configuration of the stage: its thresholds reach the gate, and numbers that JSON cannot hold are refused before any work."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components.evaluate.stage import Config, thresholds_of
from components.rlhf.gate import RULES
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings


def test_thresholds_are_the_gates() -> None:
    assert set(thresholds_of(Config(), compared=True)) == {rule.threshold for rule in RULES}
    assert thresholds_of(Config(champion_margin=0.05), compared=True)["min_win_rate_over_champion"] == pytest.approx(0.45)
    assert thresholds_of(Config(champion_margin=0.05), compared=False)["min_win_rate_over_champion"] is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_kl_reference", math.inf),
        ("min_win_rate_over_sft", math.nan),
        ("champion_margin", 0.5),  # a margin of one half would let anything in
        ("temperature", 0),
        ("prompts", 1),
        ("truth", "real"),
        ("max_kl", 3),
    ],
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(DoNotRetry, match=f"evaluate.{key}"):
        parse_settings(Config, {key: value}, "evaluate")
