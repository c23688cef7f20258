"""What an ensemble of reward models gets right on held-out rankings, and how far its members err together.

Members that share a base and its pretraining tend to be wrong on the same pairs, and what all of them believe, no aggregation can
correct: how often that happens is measured here (Coste 2023, arXiv 2310.02743).

Shapes: M members, N completions of all rankings, P strict preferences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from components.rlhf.accuracy_report import ScoredRanking, mean_over_pairs, pair_hits
from components.rlhf.reward import Aggregation, aggregate
from components.rlhf.statistics import Estimate, as_json, finite, pearson


def aggregated(members: Sequence[Sequence[ScoredRanking]], how: Aggregation, variance_weight: float = 0.0) -> list[ScoredRanking]:
    """The rankings with the ensemble's scores in place of its members' (see `aggregate`)."""
    scores_MN = torch.tensor([[float(s) for each in scored for s in each.scores] for scored in members], dtype=torch.float64)
    flat = iter(aggregate(scores_MN, how, variance_weight).tolist())
    return [each._replace(scores=[next(flat) for _ in each.scores]) for each in members[0]]


def ensemble_report(members: Sequence[Sequence[ScoredRanking]], seed: int, resamples: int = 2000) -> dict[str, Any]:
    """The report as plain JSON.

    Keys:
        members, mean, worst: pair accuracy {value, low, high} of each member, and of their mean and their lowest score.
        error_correlation: Pearson's, of "member i is wrong" and "member j is wrong" over pairs, averaged over i < j; 0 if they err
            independently, 1 if on the same pairs; null where a member makes no error, or nothing but errors.
        all_wrong: share {value, low, high} of pairs that every member orders the wrong way (equal scores count one half).
        all_wrong_if_independent: what that share would be if errors were independent: the product of the members' error rates.
        sentence: the last three in words.

    Args:
        members: for each member the same rankings with its centred scores, in deviations of its scores.
        seed, resamples: of the bootstrap over prompts.
    """
    hits = [pair_hits(scored) for scored in members]
    prompt_P = hits[0].prompt_P
    wrong_MP = 1 - np.array([each.right_P for each in hits])

    def accuracy(right_P: Any) -> dict[str, float | None]:
        return as_json(mean_over_pairs(right_P, prompt_P, seed, resamples))

    correlations = [pearson(a_P, b_P) for a_P, b_P in combinations(wrong_MP, 2)]
    correlation = finite(float(np.mean(correlations)))
    all_wrong = mean_over_pairs(wrong_MP.prod(0), prompt_P, seed, resamples)
    independent = finite(float(wrong_MP.mean(1).prod())) if len(prompt_P) else None
    return {
        "members": [accuracy(each.right_P) for each in hits],
        "mean": accuracy(pair_hits(aggregated(members, "mean")).right_P),
        "worst": accuracy(pair_hits(aggregated(members, "worst")).right_P),
        "error_correlation": correlation,
        "all_wrong": as_json(all_wrong),
        "all_wrong_if_independent": independent,
        "sentence": _sentence(len(members), all_wrong, independent, correlation),
    }


def _sentence(members: int, all_wrong: Estimate, independent: float | None, correlation: float | None) -> str:
    if independent is None:
        return "There is no held-out pair to compare the members on."
    known = "cannot be told" if correlation is None else f"is {correlation:.2f}"
    return (
        f"All {members} members are wrong on {all_wrong.value:.1%} of the pairs ({all_wrong.low:.1%} to {all_wrong.high:.1%}); "
        f"independent errors would give {independent:.1%}. The mean correlation of their errors {known}."
    )
