"""What members get right together and alone, against counts worked by hand and errors drawn to be independent."""

from __future__ import annotations

import json
import random

import pytest

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.ensemble_report import aggregated, ensemble_report
from components.rlhf.records import Ranking


def scored(margins: list[float]) -> list[ScoredRanking]:
    """One pair of a prompt of its own for each margin of the better over the worse."""
    return [
        ScoredRanking(
            Ranking(
                f"r{i}", [{"role": "user", "content": f"p{i}"}], ["a", "b"], [1, 2], "ann", "desk", None, None, None, None, "test"
            ),
            [margin, 0.0],
            [3, 4],
        )
        for i, margin in enumerate(margins)
    ]


def test_line_15_counts_by_hand() -> None:
    # Wrong: the first member on pairs 2 and 3, the second on pairs 1 and 2; an equal score is half wrong.
    members = [scored([1.0, 2.0, -1.0, -3.0]), scored([1.0, -1.0, -2.0, 4.0])]
    report = ensemble_report(members, seed=0)
    assert [each["value"] for each in report["members"]] == [0.5, 0.5]
    assert report["mean"]["value"] == 0.75  # means 1, 0.5, -1.5, 0.5
    # Worst of each completion: the better gets 1, -1, -2, -3 and the other 0
    assert report["worst"]["value"] == 0.25
    # errors (0, 0, 1, 1) and (0, 1, 1, 0) do not correlate; both wrong on one pair of four, as independent errors would be
    assert report["error_correlation"] == pytest.approx(0.0)
    assert report["all_wrong"]["value"] == 0.25
    assert report["all_wrong_if_independent"] == 0.25
    tie = ensemble_report([scored([0.0, 1.0]), scored([-1.0, 1.0])], seed=0)
    assert tie["all_wrong"]["value"] == 0.25
    json.dumps(report, allow_nan=False)


def test_line_15_members_that_err_together_are_told_from_those_that_do_not() -> None:
    rng = random.Random(0)
    alone = [scored([rng.choice((1.0, 1.0, 1.0, -1.0)) for _ in range(2000)]) for _ in range(3)]
    independent = ensemble_report(alone, seed=0, resamples=200)
    assert independent["error_correlation"] == pytest.approx(0.0, abs=0.05)
    assert independent["all_wrong"]["value"] == pytest.approx(0.25**3, abs=0.008)
    assert independent["all_wrong"]["low"] < independent["all_wrong_if_independent"] < independent["all_wrong"]["high"]
    together = ensemble_report([alone[0]] * 3, seed=0, resamples=200)
    assert together["error_correlation"] == pytest.approx(1.0)
    assert together["all_wrong"]["value"] == pytest.approx(0.25, abs=0.03)
    assert together["all_wrong"]["low"] > 5 * together["all_wrong_if_independent"]
    assert f"wrong on {together['all_wrong']['value']:.1%} of the pairs" in together["sentence"]


def test_accuracy_is_that_of_the_accuracy_report() -> None:
    members = [scored([1.0, 0.0, -1.0, 2.0, 3.0]), scored([-1.0, 0.5, 2.0, 1.0, -1.0])]
    report = ensemble_report(members, seed=3)
    for mine, ranks in zip([*report["members"], report["mean"]], [*members, aggregated(members, "mean")], strict=True):
        overall = accuracy_report(ranks, seed=3)["overall"]
        assert mine == {key: overall[key] for key in mine}


def test_without_errors_or_pairs_it_says_so() -> None:
    right = ensemble_report([scored([1.0, 2.0]), scored([1.0, -1.0])], seed=0)
    assert right["error_correlation"] is None
    assert right["sentence"].endswith("cannot be told.")
    nothing = ensemble_report([[], []], seed=0)
    assert nothing["mean"]["value"] is None
    assert nothing["sentence"] == "There is no held-out pair to compare the members on."
