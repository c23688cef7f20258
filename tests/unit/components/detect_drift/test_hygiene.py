"""When an alarm may start a retrain; and what the page shows of odd states."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from components.detect_drift.page import drift_page
from components.detect_drift.stage import Config, Inputs, one_line
from components.detect_drift.state import Hygiene, blocked
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings

NOW = datetime(2026, 6, 15, tzinfo=UTC)
RULES = Hygiene(min_new_rankings=100, cooldown_days=7, max_retrains_per_month=2, dry_run=False)


def began(*days_ago: float) -> list[dict[str, Any]]:
    return [{"at": (NOW - timedelta(days=days)).isoformat()} for days in days_ago]


@pytest.mark.parametrize(
    ("retrains", "new", "rules", "why"),
    [
        (began(), 100, RULES, ""),
        (began(), 99, RULES, "only 99 rankings are new"),
        (began(6.9), 100, RULES, "the last retrain began 6.9 days ago"),
        (began(7), 100, RULES, ""),
        (began(8, 29), 100, RULES, "2 retrains began in the last 30 days"),
        (began(8, 30), 100, RULES, ""),
        (began(29, 3), 100, RULES, "the last retrain began 3.0 days ago"),
        (began(), 100, RULES._replace(dry_run=True), "this is a dry run"),
        (began(), 99, RULES._replace(dry_run=True), "only 99"),
        (began(), 100, RULES._replace(max_retrains_per_month=0), "0 retrains began"),
    ],
)
def test_the_first_rule_that_forbids_it_is_the_reason(retrains: list[Any], new: int, rules: Hygiene, why: str) -> None:
    said = blocked(rules, retrains, new, NOW)
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_a_reason_survives_kfp() -> None:
    assert one_line("drift in \"x\"\n{'y'} `z` \\") == "drift in  x    y    z   "
    assert len(one_line("x" * 5000)) == 1000


@pytest.mark.parametrize("config", [{"alpha": 0}, {"alpha": 1}, {"channels": []}, {"channels": ["prices"]}, {"alhpa": 0.1}])
def test_wrong_settings_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(DoNotRetry, match=r"detect_drift\."):
        parse_settings(Config, config, "detect_drift")
    assert Inputs(snapshot_uri="s3://a/b").snapshot_uri == "s3://a/b"


def test_the_page_of_a_watch_without_a_champion_says_only_that() -> None:
    document = {
        "decision": "wait",
        "reason": "nobody <b>",
        "snapshot_uri": "s3://a/b",
        "champion": None,
        "config": {"alpha": 0.05},
        "alarm": None,
        "looks": [],
        "tests": [],
        "missing": {},
    }
    page = drift_page(document)
    assert "Decision: wait. nobody &lt;b&gt;" in page
    assert "<svg" not in page
