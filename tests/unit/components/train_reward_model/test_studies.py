"""Subsets, folds of raters, and what is read from them, worked by hand; and with raters whose tastes are known."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from components.rlhf.accuracy_report import ScoredRanking
from components.rlhf.rankings import EncodedRanking
from components.rlhf.records import Message, Ranking
from components.services.exits import DoNotRetry
from components.train_reward_model.page import reward_model_page
from components.train_reward_model.studies import (
    Fold,
    Plan,
    across_raters,
    divide_raters,
    learning_curve,
    plan_folds,
    plan_subsets,
    study,
)


def ranking(number: int, rater: str, ranks: list[int] | None = None) -> EncodedRanking:
    prompt = [Message(role="user", content=f"p{number}")]
    ranks = ranks or [1, 2]
    record = Ranking(f"r{number}", prompt, ["a"] * len(ranks), ranks, rater, "desk", None, None, None, None, "test")
    return EncodedRanking(record, [[3]] * len(ranks), [[4, 1]] * len(ranks))


def scored(rankings: Sequence[EncodedRanking], margins: Sequence[float]) -> list[ScoredRanking]:
    """Pairs whose better one leads by these margins."""
    return [ScoredRanking(each.ranking, [margin, 0.0], [2, 2]) for each, margin in zip(rankings, margins, strict=True)]


SIX = [ranking(i, rater) for i, rater in enumerate(("ann", "bob", "cem", "ann", "bob", "cem"))]


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


def test_every_rater_is_in_one_fold_and_folds_are_even() -> None:
    raters = [f"rater-{i}" for i in range(11)]
    folds = divide_raters(raters * 3, 3, seed=0)
    assert sorted(rater for fold in folds for rater in fold) == sorted(raters)
    assert sorted(map(len, folds)) == [3, 4, 4]
    assert divide_raters(reversed(raters), 3, seed=0) == folds
    assert divide_raters(raters, 3, seed=1) != folds


def test_line_14_a_fold_learns_nothing_of_the_raters_it_is_measured_on() -> None:
    newcomer = [*SIX, ranking(6, "new")]  # in the test split alone: held out in one fold, and nobody's own
    folds = plan_folds(SIX, newcomer, 2, seed=0)
    held_out = []
    for fold in folds.values():
        assert not {each.ranking.rater_id for each in fold.train} & set(fold.raters)
        assert {newcomer[i].ranking.rater_id for i in fold.held_out} <= set(fold.raters)
        assert {newcomer[i].ranking.rater_id for i in fold.own} == {each.ranking.rater_id for each in fold.train}
        held_out += fold.held_out
    assert sorted(held_out) == list(range(7))
    assert 6 not in [i for fold in folds.values() for i in fold.own]
    assert plan_folds(SIX, SIX, 0, seed=0) == {}


def test_line_14_too_few_raters_are_refused_with_the_remedy() -> None:
    with pytest.raises(DoNotRetry, match=r"rater_folds = 4, but the rankings are by 3 rater\(s\)\n.*at most 3"):
        plan_folds(SIX, SIX, 4, seed=0)
    unknown = [ranking(i, "unknown") for i in range(6)]
    with pytest.raises(DoNotRetry, match="set rater_folds to 0"):
        plan_folds(unknown, unknown, 2, seed=0)
    tied = [ranking(0, "ann", [1, 1]), ranking(1, "bob"), ranking(2, "cem")]
    with pytest.raises(DoNotRetry, match=r"of 3 \(raters ann\) has no held-out preference"):
        plan_folds(SIX, tied, 3, seed=0)


def test_line_14_means_and_standard_errors_by_hand() -> None:
    """Three folds with held-out accuracies 1/2, 1, 0 and own accuracies 1, 1/2, 3/4."""
    places = [([0, 3], [1, 2, 4, 5]), ([1, 4], [0, 2, 3, 5]), ([2, 5], [0, 1, 3, 4])]
    margins = [[1, 1, 1, -1, 1, 1], [1, 1, -1, -1, 1, 1], [1, 1, -1, 1, -1, -1]]
    folds = [
        (Fold([name], SIX[:4], held_out, own), scored(SIX, each))
        for name, (held_out, own), each in zip(("ann", "bob", "cem"), places, margins, strict=True)
    ]
    report = across_raters(folds)
    assert [each["held_out"] for each in report["folds"]] == [{"value": v, "pairs": 2} for v in (0.5, 1.0, 0.0)]
    assert [each["own"] for each in report["folds"]] == [{"value": v, "pairs": 4} for v in (1.0, 0.5, 0.75)]
    assert report["held_out"] == {"mean": 0.5, "standard_error": pytest.approx(0.5 / 3**0.5)}
    assert report["own"] == {"mean": 0.75, "standard_error": pytest.approx(0.25 / 3**0.5)}
    # differences 1/2, -1/2, 3/4: mean 1/4, squared deviations 1/16 + 9/16 + 4/16 over 2
    assert report["difference"] == {"mean": 0.25, "standard_error": pytest.approx((7 / 16 / 3) ** 0.5)}
    assert "never seen: 0.500 ± 0.289; on raters it learned from: 0.750 ± 0.144; difference 0.250 ± 0.382" in report["sentence"]


def test_line_14_raters_with_tastes_of_their_own_are_strangers_to_a_model_of_the_others() -> None:
    """A model that knows exactly whom it learned from is always right on them, and always wrong on everybody else."""
    rankings = [ranking(i, f"rater-{i % 5}") for i in range(40)]

    def train_and_score(name: str, train: Sequence[EncodedRanking]) -> list[ScoredRanking]:
        known = {each.ranking.rater_id for each in train}
        return scored(rankings, [1.0 if each.ranking.rater_id in known else -1.0 for each in rankings])

    plan = Plan(plan_subsets(rankings, 2, smallest=2), plan_folds(rankings, rankings, 5, seed=0))
    assert plan.names() == ["curve-2", "curve-4", *(f"fold-{i}" for i in range(1, 6))]
    found = study(plan, train_and_score, scored(rankings, [1.0] * 40), 40, seed=0)
    assert found["rater_folds"]["held_out"] == {"mean": 0.0, "standard_error": 0.0}
    assert found["rater_folds"]["own"] == {"mean": 1.0, "standard_error": 0.0}
    assert [each["rankings"] for each in found["rater_folds"]["folds"]] == [32] * 5
    assert [each["rankings"] for each in found["curve"]["points"]] == [10, 20, 40]
    json.dumps(found, allow_nan=False)
    assert study(Plan({}, {}), train_and_score, [], 40, seed=0) == {}


def test_the_page_shows_the_studies() -> None:
    from components.rlhf.accuracy_report import accuracy_report

    report = accuracy_report(scored(SIX, [1, 1, 1, -1, 1, 1]), seed=0)
    curve = learning_curve({40: scored(SIX, [1, 1, 1, -1, 1, 1]), 20: scored(SIX, [1] * 6), 10: scored(SIX, [-1] * 6)}, seed=0)
    fold = Fold(["ann", "<bob>"], SIX[:4], [0, 3], [1, 2])
    folds = across_raters([(fold, scored(SIX, [1] * 6)), (fold, scored(SIX, [-1] * 6))])
    page = reward_model_page({**report, "curve": curve, "rater_folds": folds}, report, [])
    assert curve["sentence"] in page
    assert folds["sentence"] in page
    assert "ann, &lt;bob&gt;" in page
    assert all(f">{x}</text>" in page for x in (10, 20, 40)), "each number of rankings is a tick"
    plain = reward_model_page(report, report, [])
    assert "Does more data help?" not in plain
    assert "Raters never seen" not in plain
