"""The reward model's report against counts worked by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.records import Ranking


def ranking(number: int, ranks: list[int], **changes: Any) -> Ranking:
    values: dict[str, Any] = {
        "ranking_id": f"r{number}",
        "prompt": [{"role": "user", "content": f"prompt {number}"}],
        "completions": [f"answer {number}-{i}" for i in range(len(ranks))],
        "ranks": ranks,
        "rater_id": "ann",
        "source": "desk",
        "collected_at": None,
        "confidence": None,
        "policies": None,
        "criterion": None,
        "split": "test",
    }
    return Ranking(**{**values, **changes})


def test_line_13_accuracy_and_its_slices_by_hand() -> None:
    scored = [
        # pairs 0>1, 0>2, 1>2; scores order 0>1 and 1>2 wrongly: 3 > 1 and 1 > 2 -> right, right (3 > 2), wrong
        ScoredRanking(ranking(1, [1, 2, 3], confidence=0.8), [3.0, 1.0, 2.0], [10, 20, 30]),
        # a tie in the ranks, and equal scores on 0>2
        ScoredRanking(ranking(2, [1, 1, 2], rater_id="bob", criterion="tone"), [0.5, 1.0, 0.5], [10, 10, 10]),
        ScoredRanking(ranking(3, [2, 1], policies=["b", "a"]), [1.0, 0.0], [40, 50]),
    ]
    report = accuracy_report(scored, seed=0)
    assert (report["rankings"], report["prompts"], report["ties"]) == (3, 3, 1)
    assert report["overall"]["pairs"] == 6
    assert report["overall"]["value"] == pytest.approx((2 + 1.5 + 0) / 6)
    assert report["overall"]["low"] < report["overall"]["value"] < report["overall"]["high"]
    by = {name: {row["group"]: (row["value"], row["pairs"]) for row in rows} for name, rows in report["by"].items()}
    assert by["rater"] == {"ann": (pytest.approx(0.5), 4), "bob": (0.75, 2)}
    assert by["source"] == {"desk": (pytest.approx(3.5 / 6), 6)}
    assert by["criterion"] == {"not given": (0.5, 4), "tone": (0.75, 2)}
    assert by["policy_pair"] == {"a and b": (0.0, 1)}
    assert by["confidence"] == {"not given": (0.5, 3), "0.75 to below 0.9": (pytest.approx(2 / 3), 3)}
    # better minus worse: -10, -20, -10 / 0, 0 / +10
    assert by["better_is"] == {"shorter": (pytest.approx(2 / 3), 3), "equally long": (0.75, 2), "longer": (0.0, 1)}
    assert sum(pairs for _, pairs in by["length_tokens"].values()) == 6
    # "always the longer": 0, 0, 0, one half twice, 1
    assert report["length"]["always_longer"]["value"] == pytest.approx(2 / 6)
    assert [row["pairs"] for row in report["by"]["rater"]] == [4, 2]  # most pairs first


def test_line_13_calibration_and_correlations_against_closed_forms() -> None:
    # One pair each with margin log 3: confidence 0.75; three right, one wrong: perfectly calibrated.
    scored = [ScoredRanking(ranking(i, [1, 2]), [math.log(3) * (1 if i else -1), 0.0], [5, 4]) for i in range(4)]
    calibration = accuracy_report(scored, seed=0)["calibration"]
    assert calibration["ece"] == pytest.approx(0.0, abs=1e-12)
    assert calibration["bins"][0]["predictions"] == 4
    # Scores that are the length, plus a different constant for each ranking: 1 within rankings, less over all.
    scored = [ScoredRanking(ranking(i, [1, 2, 3]), [1.0 - 9 * i, 2.0 - 9 * i, 3.0 - 9 * i], [1, 2, 3]) for i in range(5)]
    length = accuracy_report(scored, seed=0)["length"]
    assert length["within_rankings"] == pytest.approx(1.0)
    assert 0 < length["pearson"] < 0.2


def test_line_13_agreement_pairs_completions_by_their_text() -> None:
    """A second rater saw the same completions in another order; another criterion or the same rater again do not count."""
    first = ranking(1, [1, 2, 3])
    turned = first._replace(ranking_id="r1b", rater_id="bob", completions=first.completions[::-1], ranks=[2, 3, 1])
    # by text: first 0>1>2; bob 2>0>1: they agree on (0, 1) alone
    other = [
        first._replace(ranking_id="r1c", rater_id="eve", criterion="tone", ranks=[3, 2, 1]),
        first._replace(ranking_id="r1d", ranks=[3, 2, 1]),
    ]
    bob = turned._replace(ranks=[1, 3, 2])
    scored = [ScoredRanking(each, [3.0, 2.0, 1.0], [4, 5, 6]) for each in (first, bob, other[0])]
    human = accuracy_report(scored, seed=0)["human"]
    assert human["agreement"]["pairs"] == 3
    assert human["agreement"]["value"] == pytest.approx(1 / 3)
    assert human["ceiling_low"] == pytest.approx(1 / 3)
    assert human["ceiling_high"] == 0.5
    with_own = accuracy_report([*scored, ScoredRanking(other[1], [3.0, 2.0, 1.0], [4, 5, 6])], seed=0)["human"]
    assert with_own["agreement"]["pairs"] == 6  # ann's second go is compared with bob's, not with ann's first


def test_line_13_accuracy_above_the_ceiling_is_called_a_leak() -> None:
    scored = []
    for number in range(10):
        one = ranking(number, [1, 2])
        two = one._replace(ranking_id=f"r{number}b", rater_id="bob", ranks=[1, 2] if number < 6 else [2, 1])
        scored += [ScoredRanking(one, [1.0, 0.0], [3, 3]), ScoredRanking(two, [1.0, 0.0] if number < 6 else [0.0, 1.0], [3, 3])]
    human = accuracy_report(scored, seed=0)["human"]
    assert human["agreement"]["value"] == pytest.approx(0.6)
    assert human["ceiling_high"] == pytest.approx((1 + math.sqrt(0.2)) / 2)
    assert human["above_ceiling"]
    assert "leak" in human["sentence"]
    modest = [each._replace(scores=[1.0, 0.0] if number >= 2 else [0.0, 1.0]) for number, each in enumerate(scored)]
    below = accuracy_report(modest, seed=0)
    assert below["overall"]["value"] == pytest.approx(0.7)  # of 20: 4 of the raters' disagreements and 2 of its own wrong
    assert not below["human"]["above_ceiling"]


def test_report_is_json_even_of_nothing() -> None:
    for scored in ([], [ScoredRanking(ranking(1, [1, 1]), [0.0, 0.0], [1, 1])]):
        report = accuracy_report(scored, seed=0)
        assert json.loads(json.dumps(report, allow_nan=False))["overall"] == {
            "value": None,
            "low": None,
            "high": None,
            "pairs": 0,
        }
        assert report["human"]["agreement"]["value"] is None
        assert not report["human"]["above_ceiling"]


def test_line_13_interval_is_wider_than_of_independent_pairs() -> None:
    generator = np.random.default_rng(0)
    scored = []
    for number in range(60):
        sign = 1.0 if generator.random() < 0.7 else -1.0  # a ranking is all right or all wrong
        scored.append(ScoredRanking(ranking(number, [1, 2, 3, 4]), [4 * sign, 3 * sign, 2 * sign, sign], [1, 1, 1, 1]))
    overall = accuracy_report(scored, seed=0)["overall"]
    independent = 2 * 1.96 * math.sqrt(overall["value"] * (1 - overall["value"]) / overall["pairs"])
    assert overall["pairs"] == 360
    assert overall["high"] - overall["low"] > 2 * independent


def test_broken_scores_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"r7.*finite"):
        accuracy_report([ScoredRanking(ranking(7, [1, 2]), [math.nan, 0.0], [1, 1])], seed=0)
    with pytest.raises(ValueError, match=r"r8.*1 scores"):
        accuracy_report([ScoredRanking(ranking(8, [1, 2]), [0.0], [1, 1])], seed=0)
