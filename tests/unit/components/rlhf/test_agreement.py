"""Agreement by hand, alpha on the published example, and the ceiling of the accuracy report from the same numbers."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.metrics.agreement import AnnotationTask

from components.rlhf import agreement
from components.rlhf.agreement import (
    PromptAgreement,
    Votes,
    agreement_by_prompt,
    alpha_estimate,
    human_ceiling,
    krippendorff_alpha,
    pairs_of_votes,
    pairwise_agreement,
    votes_of,
)
from components.rlhf.records import Message, Ranking


def ranking(prompt: str, rater: str, order: str, criterion: str | None = None) -> Ranking:
    """Completions by their letters, best first; "a=b" ties."""
    groups = [group.split("=") for group in order.split(">")]
    texts = sorted(text for group in groups for text in group)
    ranks = [next(place for place, group in enumerate(groups, 1) if text in group) for text in texts]
    message = [Message(role="user", content=prompt)]
    return Ranking(f"{prompt}-{rater}", message, texts, ranks, rater, "test", None, None, None, criterion, "train")


def test_pairwise_agreement_by_hand() -> None:
    """p: a>b>c and a>c>b agree on ab and ac of three; q: x=y leaves one strict comparison of nobody else's."""
    rankings = [ranking("p", "ann", "a>b>c"), ranking("p", "bob", "a>c>b"), ranking("q", "ann", "a>b"), ranking("q", "bob", "a=b")]
    found = agreement_by_prompt(votes_of(rankings))
    assert (found.agreed_P.tolist(), found.compared_P.tolist()) == ([2, 0], [3, 0])
    assert pairwise_agreement(found, seed=0).value == pytest.approx(2 / 3)


def test_only_known_and_different_raters_on_the_same_task_are_compared() -> None:
    assert not agreement_by_prompt(votes_of([ranking("p", "ann", "a>b"), ranking("p", "ann", "b>a")])).compared_P.size
    assert not agreement_by_prompt(votes_of([ranking("p", "unknown", "a>b"), ranking("p", "ann", "b>a")])).compared_P.size
    assert not agreement_by_prompt(votes_of([ranking("p", "ann", "a>b", "tone"), ranking("p", "bob", "b>a")])).compared_P.size
    assert not agreement_by_prompt(votes_of([])).compared_P.size
    subset = agreement_by_prompt(votes_of([ranking("p", "ann", "a>b>c"), ranking("p", "bob", "c>a")]))
    assert (subset.agreed_P.tolist(), subset.compared_P.tolist()) == ([0], [1])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 4), st.integers(-1, 1)), max_size=40), st.integers(1, 7))
def test_pairs_of_votes_are_those_of_the_slow_loop(rows: list[tuple[int, int, int]], chunk: int) -> None:
    item, rater, verdict = (np.array(each, dtype=np.int64) for each in (zip(*rows, strict=True) if rows else ([], [], [])))
    votes = Votes(item, item, rater, verdict)
    slow = {
        (i, j) if rater[i] < rater[j] else (j, i)
        for i, j in combinations(range(len(rows)), 2)
        if item[i] == item[j] and rater[i] != rater[j] and rater[i] >= 0 and rater[j] >= 0
    }
    before = agreement._PAIRS_PER_CHUNK
    agreement._PAIRS_PER_CHUNK = chunk
    try:
        found = [pair for a, b in pairs_of_votes(votes) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    finally:
        agreement._PAIRS_PER_CHUNK = before
    assert set(found) == slow
    assert len(found) == len(slow)


# Krippendorff 2011, section C: four observers, twelve units, five values; the nominal alpha is 0.743 and the ordinal one 0.815.
OBSERVERS = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")


def coincidences(observers: tuple[str, ...], values: int) -> np.ndarray:
    units = [[int(each) - 1 for each in unit if each != "."] for unit in zip(*map(str.split, observers), strict=True)]
    found = np.zeros((values, values))
    for unit in units:
        for i, a in enumerate(unit):
            for j, b in enumerate(unit):
                found[a, b] += (i != j) / max(1, len(unit) - 1)
    return found


def test_alpha_of_the_published_example() -> None:
    table = coincidences(OBSERVERS, 5)
    assert table.sum() == pytest.approx(40), "values that can be paired"
    assert krippendorff_alpha(table) == pytest.approx(0.815, abs=0.0005)


def test_alpha_with_two_values_is_the_nominal_one_by_hand() -> None:
    """Krippendorff 2011, section A: o01 = 4 twice, n0 = 14, n1 = 6 of n = 20: 1 - 19 * 4 / (14 * 6) = 0.095."""
    assert krippendorff_alpha(np.array([[10.0, 4.0], [4.0, 2.0]])) == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_alpha_of_votes_by_hand() -> None:
    """Three pairs, two raters: equal, opposite, equal: coincidences 2, 1, 1, 2 of n = 6, so 1 - 5 * 1 / 9 = 4/9."""
    item = np.array([0, 0, 1, 1, 2, 2])
    votes = Votes(item, item, np.array([0, 1] * 3), np.array([1, 1, 1, -1, -1, -1]))
    found = agreement_by_prompt(votes)
    assert found.coincidences_PVV.sum(axis=0)[::2, ::2].tolist() == [[2, 1], [1, 2]]
    estimate = alpha_estimate(found, seed=0)
    assert estimate.value == pytest.approx(4 / 9)
    assert estimate.low <= estimate.value <= estimate.high


def test_a_rater_counts_once_on_an_item_for_alpha_and_a_tie_lies_between() -> None:
    item = np.zeros(3, dtype=int)
    twice = agreement_by_prompt(Votes(item, item, np.array([0, 0, 1]), np.array([1, -1, 1])))
    assert twice.coincidences_PVV[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 2]]
    half = np.array([[4.0, 1, 0], [1, 4, 1], [0, 1, 4]])
    whole = np.array([[4.0, 0, 1], [0, 6, 0], [1, 0, 4]])
    assert krippendorff_alpha(half) > krippendorff_alpha(whole), "a tie against a preference is half a disagreement"


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from([-1, 0, 1])),
        min_size=2,
        max_size=30,
        unique_by=lambda v: v[:2],
    )
)
def test_alpha_is_nltk_s_with_the_ordinal_distance(rows: list[tuple[int, int, int]]) -> None:
    item, rater, verdict = np.array(rows).T
    table = agreement_by_prompt(Votes(item, item, rater, verdict)).coincidences_PVV.sum(axis=0)
    ours = float(krippendorff_alpha(table))
    margin = table.sum(axis=1)
    middle = np.cumsum(margin) - margin / 2  # the distance of NLTK's caller: it has the nominal one, and interval's of numbers
    if math.isnan(ours):
        return  # nothing varies, or nobody shares an item
    task = AnnotationTask(
        [(str(r), str(i), v) for i, r, v in rows], distance=lambda a, b: float(middle[a + 1] - middle[b + 1]) ** 2
    )
    assert ours == pytest.approx(task.alpha(), abs=1e-9)


def test_raters_who_toss_coins_have_no_alpha_and_agree_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    item = np.repeat(np.arange(2000), 2)
    votes = Votes(item, item // 5, np.tile([0, 1], 2000), rng.choice([-1, 1], 4000))
    found = agreement_by_prompt(votes)
    alpha, agreed = alpha_estimate(found, seed=0), pairwise_agreement(found, seed=0)
    assert alpha.low < 0 < alpha.high
    assert agreed.low < 0.5 < agreed.high
    assert 0.02 < agreed.high - agreed.low < 0.07, "2000 tosses: 0.5 +- 0.022"
    assert 0.04 < alpha.high - alpha.low < 0.14


def test_what_does_not_vary_has_no_alpha() -> None:
    same = agreement_by_prompt(Votes(np.repeat([0, 1], 2), np.repeat([0, 1], 2), np.array([0, 1] * 2), np.ones(4, dtype=int)))
    assert math.isnan(alpha_estimate(same, seed=0).value)
    assert math.isnan(alpha_estimate(PromptAgreement.join([]), seed=0).value)


def test_the_ceiling_is_that_of_the_accuracy_report() -> None:
    from components.rlhf.accuracy_report import ScoredRanking, accuracy_report

    rankings = [
        ranking(f"p{i}", rater, "a>b>c" if (i + turn) % 4 else "c>a>b") for i in range(20) for turn, rater in enumerate("xy")
    ]
    report = accuracy_report([ScoredRanking(each, [0.0, 1.0, 2.0], [1, 1, 1]) for each in rankings], seed=3)["human"]
    assert {key: report[key] for key in ("agreement", "ceiling_low", "ceiling_high")} == human_ceiling(
        agreement_by_prompt(votes_of(rankings)), seed=3
    )
    assert report["agreement"]["value"] == pytest.approx((10 * 3 + 10 * 1) / 60)
