"""The reward model's page: what line 13 asks for is on it, and what was studied on request."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.ensemble_report import ensemble_report
from components.rlhf.records import Message, Ranking
from components.rlhf.report_page import format_cell, interval_text
from components.train_reward_model.page import reward_model_page


@pytest.fixture(scope="module")
def scored() -> list[ScoredRanking]:
    """Forty rankings; each prompt is ordered by two raters, with confidence, criterion and policies."""
    rng = random.Random(0)
    found = []
    for i in range(40):
        prompt, ranks = [Message(role="user", content=f"p{i // 2}")], rng.sample([1, 2, 3], 3)
        confidence, criterion = rng.choice([0.6, 0.8, 1.0]), rng.choice(["tone", "facts"])
        ranking = Ranking(
            f"r{i}",
            prompt,
            ["a", "b", "c"],
            ranks,
            f"rater-{i % 2}",
            "desk",
            None,
            confidence,
            ["old", "new", "new"],
            criterion,
            "test",
        )
        found.append(
            ScoredRanking(ranking, [rng.random() - rank for rank in ranking.ranks], [rng.randrange(3, 30) for _ in range(3)])
        )
    return found


def cells(page: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", page)


def test_line_13_every_slice_and_measure_is_on_the_page(scored: list[ScoredRanking]) -> None:
    report = accuracy_report(scored, seed=0)
    page = reward_model_page(report, report, [])
    shown = cells(page)
    assert set(report["by"]) >= {"rater", "source", "criterion", "policy_pair", "confidence", "length_tokens"}
    for name, groups in report["by"].items():
        assert f"By {name.replace('_', ' ')}" in page
        for group in groups:
            row = [group["group"], *(format_cell(group[key]) for key in ("value", "low", "high", "pairs"))]
            first = shown.index(row[0])
            assert shown[first : first + 5] == row
    measured: list[dict[str, Any]] = [report["overall"], report["length"]["always_longer"], report["human"]["agreement"]]
    measured += [{"value": report["human"][end]} for end in ("ceiling_low", "ceiling_high")]
    measured += [{"value": report["calibration"]["ece"]}, {"value": report["length"]["spearman"]}]
    for each in measured:
        assert each["value"] is not None
        assert shown.count(interval_text(each)) >= 2, "of the reward model and of the judge"
    assert page.count("confidence of the model</text>") == 2  # a reliability plot each


def test_an_ensemble_has_a_section(scored: list[ScoredRanking]) -> None:
    worse = [each._replace(scores=[0.0, 1.0, 0.5]) for each in scored]
    ensemble = ensemble_report([scored, worse], seed=0)
    page = reward_model_page({**accuracy_report(scored, seed=0), "ensemble": ensemble}, accuracy_report(scored, seed=0), [])
    assert ensemble["sentence"] in page
    for each in (*ensemble["members"], ensemble["mean"], ensemble["worst"]):
        assert interval_text(each) in cells(page)
    assert "<h2>Ensemble</h2>" not in reward_model_page(accuracy_report(scored, seed=0), accuracy_report(scored, seed=0), [])
