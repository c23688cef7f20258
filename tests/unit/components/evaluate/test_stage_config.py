"""Configuration of the stage: its thresholds reach the gate, and numbers that JSON cannot hold are refused before any work."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from components.evaluate.stage import Config, thresholds_of
from components.rlhf.gate import OPTIONAL, RULES
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings

EVERYTHING = ("champion", "groups", "refusals", "instructions", "texts")


def test_thresholds_are_the_gates() -> None:
    whole = thresholds_of(Config(champion_margin=0.05), EVERYTHING)
    assert set(whole) == {rule.threshold for rule in RULES}
    assert whole["min_win_rate_over_champion"] == pytest.approx(0.45)
    alone = thresholds_of(Config(champion_margin=0.05), ())
    assert {name for name, value in alone.items() if value is None} == set(OPTIONAL)


@pytest.mark.parametrize(
    ("missing", "thresholds"),
    [
        ("groups", ["min_worst_group_win_rate"]),
        ("refusals", ["max_harmful_refusal_drop", "max_harmless_refusal_rise"]),
        ("instructions", ["max_instruction_drop"]),
        ("texts", ["max_plain_perplexity_ratio"]),
    ],
)
def test_only_what_is_missing_is_not_required(missing: str, thresholds: list[str]) -> None:
    found = thresholds_of(Config(), [each for each in EVERYTHING if each != missing])
    over = "_over" if missing == "groups" else ""
    expected = {f"{each}{over}_{policy}" for each in thresholds for policy in ("sft", "champion")}
    assert {name for name, value in found.items() if value is None} == expected
    alone = thresholds_of(Config(), [each for each in EVERYTHING if each != "champion"])
    assert {name for name, value in alone.items() if value is None} == {name for name in OPTIONAL if name.endswith("champion")}


def test_line_40_each_threshold_is_the_configs_own() -> None:
    """Those against SFT and champion have one key for both; the champion's win rate has its margin."""
    names = [name for name in Config.model_fields if any(rule.threshold.startswith(name) for rule in RULES)]
    values = {name: 0.01 * (1 + number) for number, name in enumerate(names)}
    found = thresholds_of(Config(**values), EVERYTHING)
    for threshold, value in found.items():
        key = re.sub(r"(_over)?_(sft|champion)$", "", threshold)
        if threshold != "min_win_rate_over_champion":
            assert value == values[threshold if threshold in values else key], threshold


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
        ("max_false_pass_probability", 0.5),
        ("max_false_pass_probability", 0),
        ("max_overoptimisation_gap", math.nan),
        ("policy_name", "a/b"),  # it is part of a place on S3
        ("group_by", "topic"),
        ("probe_texts", ""),
    ],
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(DoNotRetry, match=f"evaluate.{key}"):
        parse_settings(Config, {key: value}, "evaluate")
