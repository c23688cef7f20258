"""Folds of raters, and what is read from them, worked by hand; and with raters whose tastes are known."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from components.rater_study.folds import Fold, Scored, across_raters, divide_raters, plan_folds
from components.rater_study.page import study_page
from components.rater_study.stage import Config, known
from components.rlhf.accuracy_report import ScoredRanking
from components.rlhf.rankings import EncodedRanking
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings
from tests.six_rankings import SIX, ranking, scored


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
    for fold in folds:
        assert not {each.ranking.rater_id for each in fold.train} & set(fold.raters)
        assert {newcomer[i].ranking.rater_id for i in fold.held_out} <= set(fold.raters)
        assert {newcomer[i].ranking.rater_id for i in fold.own} == {each.ranking.rater_id for each in fold.train}
        held_out += fold.held_out
    assert sorted(held_out) == list(range(7))
    assert 6 not in [i for fold in folds for i in fold.own]


def test_line_14_too_few_raters_are_refused_with_the_remedy() -> None:
    with pytest.raises(DoNotRetry, match=r"folds = 4, but the rankings are by 3 known rater\(s\)\n.*at most 3"):
        plan_folds(SIX, SIX, 4, seed=0)
    unknown = [ranking(i, "unknown") for i in range(6)]
    with pytest.raises(DoNotRetry, match="set folds to 0"):
        plan_folds(unknown, unknown, 2, seed=0)
    tied = [ranking(0, "ann", [1, 1]), ranking(1, "bob"), ranking(2, "cem")]
    with pytest.raises(DoNotRetry, match=r"of 3 \(raters ann\) has no held-out preference"):
        plan_folds(SIX, tied, 3, seed=0)


def test_line_14_the_usual_model_learns_as_many_rankings_of_all_raters() -> None:
    rankings = [ranking(i, f"rater-{i % 5}") for i in range(100)]
    folds = plan_folds(rankings, rankings, 5, seed=0)
    assert [len(fold.usual) for fold in folds] == [len(fold.train) for fold in folds] == [80] * 5
    for fold in folds:
        assert len({each.ranking.ranking_id for each in fold.usual}) == 80
        assert {each.ranking.rater_id for each in fold.usual} == {f"rater-{i}" for i in range(5)}
    assert folds[0].usual != folds[1].usual
    assert plan_folds(rankings, rankings, 5, seed=0)[0].usual == folds[0].usual


def test_line_14_means_and_standard_errors_by_hand() -> None:
    """Three folds with held-out accuracies 1/2, 1, 0 and own accuracies 1, 1/2, 3/4; the usual models are right in 5 of 6."""
    places = [([0, 3], [1, 2, 4, 5]), ([1, 4], [0, 2, 3, 5]), ([2, 5], [0, 1, 3, 4])]
    margins = [[1, 1, 1, -1, 1, 1], [1, 1, -1, -1, 1, 1], [1, 1, -1, 1, -1, -1]]
    usual = scored(SIX, [1, 1, 1, 1, 1, -1])
    folds = [
        (Fold([name], SIX[:4], SIX[:4], held_out, own), Scored(scored(SIX, each), usual))
        for name, (held_out, own), each in zip(("ann", "bob", "cem"), places, margins, strict=True)
    ]
    report = across_raters(folds, seed=0)
    assert [each["held_out"] for each in report["folds"]] == [{"value": v, "pairs": 2} for v in (0.5, 1.0, 0.0)]
    assert [each["own"] for each in report["folds"]] == [{"value": v, "pairs": 4} for v in (1.0, 0.5, 0.75)]
    assert [each["usual"] for each in report["folds"]] == [{"value": v, "pairs": 2} for v in (1.0, 1.0, 0.5)]
    over = report["over_folds"]
    assert over["held_out"] == {"mean": 0.5, "standard_error": pytest.approx(0.5 / 3**0.5)}
    assert over["own"] == {"mean": 0.75, "standard_error": pytest.approx(0.25 / 3**0.5)}
    # differences 1/2, -1/2, 3/4: mean 1/4, squared deviations 1/16 + 9/16 + 4/16 over 2
    assert over["difference"] == {"mean": 0.25, "standard_error": pytest.approx((7 / 16 / 3) ** 0.5)}
    assert (
        "0.500 ± 0.289 on raters never seen, 0.750 ± 0.144 on raters learned from, difference 0.250 ± 0.382"
        in (report["sentences"][1])
    )
    # On the same six preferences: never seen 3 of 6, usual 5 of 6; prompt by prompt 0, 0, 1, 1, 0, 0.
    assert (report["never_seen"]["value"], report["usual"]["value"]) == (0.5, pytest.approx(5 / 6))
    difference = report["difference"]
    assert (difference["value"], difference["pairs"]) == (pytest.approx(1 / 3), 6)
    assert 0 <= difference["low"] < 1 / 3 < difference["high"] <= 1
    assert "too little to tell" in report["sentences"][0]


def by_taste(rankings: Sequence[EncodedRanking], train: Sequence[EncodedRanking]) -> list[ScoredRanking]:
    """Of a model that knows exactly whom it learned from: always right on them, and always wrong on everybody else."""
    raters = {each.ranking.rater_id for each in train}
    return scored(rankings, [1.0 if each.ranking.rater_id in raters else -1.0 for each in rankings])


def test_line_14_raters_with_tastes_of_their_own_are_strangers_to_a_model_of_the_others() -> None:
    rankings = [ranking(i, f"rater-{i % 5}") for i in range(40)]
    folds = plan_folds(rankings, rankings, 5, seed=0)
    report = across_raters([(f, Scored(by_taste(rankings, f.train), by_taste(rankings, f.usual))) for f in folds], seed=0)
    assert report["over_folds"]["held_out"] == {"mean": 0.0, "standard_error": 0.0}
    assert report["over_folds"]["own"] == {"mean": 1.0, "standard_error": 0.0}
    assert [report[name]["value"] for name in ("never_seen", "usual", "difference")] == [0, 1, 1]
    assert "knowing the raters helps" in report["sentences"][0]
    assert [each["rankings"] for each in report["folds"]] == [32] * 5
    json.dumps(report, allow_nan=False)


def test_two_rankings_of_a_prompt_in_two_folds_are_one_cluster() -> None:
    """Twenty prompts, each ordered by both raters: forty preferences with the interval of twenty."""
    rankings = [ranking(i, rater) for i in range(20) for rater in ("ann", "bob")]
    right = [1.0 if i // 2 % 2 else -1.0 for i in range(40)]
    folds = [Fold([name], [], [], [i for i in range(40) if i % 2 == place], [0]) for place, name in enumerate(("ann", "bob"))]
    report = across_raters([(fold, Scored(scored(rankings, right), scored(rankings, right))) for fold in folds], seed=0)
    width = report["never_seen"]["high"] - report["never_seen"]["low"]
    assert 0.35 < width < 0.6, "0.5 +- 1.96 sqrt(1/4 / 20) = 0.44; of 40 it would be 0.31"


def test_rankings_of_nobody_are_left_out() -> None:
    assert known([ranking(0, "unknown"), ranking(1, "ann")]) == [ranking(1, "ann")]


def test_one_fold_is_refused() -> None:
    with pytest.raises(DoNotRetry, match="one fold leaves nobody to learn from"):
        parse_settings(Config, {"folds": 1}, "rater_study")


def test_the_page_shows_the_study() -> None:
    fold = Fold(["ann", "<bob>"], SIX[:4], SIX[:4], [0, 3], [1, 2])
    other = Fold(["cem"], SIX[:3], SIX[:3], [1, 2], [0])
    sides = Scored(scored(SIX, [1] * 6), scored(SIX, [1, -1] * 3))
    report = across_raters([(fold, sides), (other, sides)], seed=0)
    page = study_page(report, "s3://x/reward")
    assert all(sentence in page for sentence in report["sentences"])
    assert "ann, &lt;bob&gt;" in page
    assert "<bob>" not in page
