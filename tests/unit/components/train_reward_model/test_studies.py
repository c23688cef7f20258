"""Subsets of the rankings, and the curve that is read from them, worked by hand."""

from __future__ import annotations

import pytest

from components.services.exits import DoNotRetry
from components.train_reward_model.page import reward_model_page
from components.train_reward_model.studies import learning_curve, plan_subsets
from tests.six_rankings import SIX, ranking, scored


def test_subsets_are_nested_halves() -> None:
    rankings = [ranking(i, "ann") for i in range(37)]
    subsets = plan_subsets(rankings, 3, smallest=4)
    assert {name: len(each) for name, each in subsets.items()} == {"curve-2": 18, "curve-4": 9, "curve-8": 4}
    assert subsets["curve-8"] == subsets["curve-4"][:4] == subsets["curve-2"][:4] == rankings[:4]
    assert plan_subsets(rankings, 0, smallest=100) == {}
    with pytest.raises(DoNotRetry, match=r"curve_points = 4 of 37 .* has 2, fewer than one batch of 4\n.*at most 3"):
        plan_subsets(rankings, 4, smallest=4)
    with pytest.raises(DoNotRetry, match="at most 0"):
        plan_subsets(rankings, 1, smallest=100)


def test_the_curve_by_hand() -> None:
    half, whole = scored(SIX, [1, -1, -1, -1, 1, 0]), scored(SIX, [1, 1, 1, -1, 1, 1])
    curve = learning_curve({40: whole, 20: half}, seed=0)
    assert [(p["rankings"], p["value"], p["pairs"]) for p in curve["points"]] == [(20, 2.5 / 6, 6), (40, 5 / 6, 6)]
    assert (curve["doubling"]["from"], curve["doubling"]["to"]) == (20, 40)
    assert curve["doubling"]["value"] == pytest.approx(2.5 / 6)
    # The paired interval of (0, 1, 1, 0, 0, 0.5): within the differences' own range, and never below 0.
    assert 0 <= curve["doubling"]["low"] < 2.5 / 6 < curve["doubling"]["high"] <= 1
    assert "from 20 to 40 rankings" in curve["sentence"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(-1.0, 1.0, "more rankings still help"), (1.0, -1.0, "more rankings make it worse"), (1.0, 1.0, "too little to tell")],
)
def test_the_curve_says_what_the_last_doubling_brought(before: float, after: float, said: str) -> None:
    rankings = [ranking(i, "ann") for i in range(40)]
    margins = [before if i % 2 else 1.0 for i in range(40)], [after if i % 2 else 1.0 for i in range(40)]
    curve = learning_curve({number: scored(rankings, each) for number, each in zip((8, 16), margins, strict=True)}, seed=0)
    assert said in curve["sentence"]


def test_the_page_shows_the_curve() -> None:
    from components.rlhf.accuracy_report import accuracy_report

    report = accuracy_report(scored(SIX, [1, 1, 1, -1, 1, 1]), seed=0)
    curve = learning_curve({40: scored(SIX, [1, 1, 1, -1, 1, 1]), 20: scored(SIX, [1] * 6), 10: scored(SIX, [-1] * 6)}, seed=0)
    page = reward_model_page({**report, "curve": curve}, report, [])
    assert curve["sentence"] in page
    assert all(f">{x}</text>" in page for x in (10, 20, 40)), "each number of rankings is a tick"
    assert "Does more data help?" not in reward_model_page(report, report, [])
