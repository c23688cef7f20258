"""What a reward model gets right, on rankings that it was not trained on: accuracy, calibration, length, and the human ceiling.

Accuracy is the share of strict preferences that the scores order the same way; equal scores count one half, tied ranks are left
out. Intervals are the cluster bootstrap's over prompts, since pairs of one prompt are not independent. Confidence is the
Bradley-Terry model's: the better one wins with probability sigmoid(score difference), which is what the ranking loss fits
(Ouyang 2022, section 3.5).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from components.rlhf.agreement import agreement_by_prompt, human_ceiling, votes_of
from components.rlhf.records import Ranking, prompt_key
from components.rlhf.statistics import (
    Estimate,
    Floats,
    as_json,
    cluster_share,
    expected_calibration_error,
    finite,
    pearson,
    reliability,
    spearman,
)

CONFIDENCE_EDGES = (0.5, 0.75, 0.9)  # of the rater's own confidence, in (0, 1]
LENGTH_BINS = 4  # quantiles of the mean length of a pair


class ScoredRanking(NamedTuple):
    """A ranking with the reward model's K centred scores and the K lengths of its completions in tokens, EOS included."""

    ranking: Ranking
    scores: Sequence[float]
    lengths_tokens: Sequence[int]


class _Pair(NamedTuple):
    """One strict preference: what was ranked, and of the better and the worse completion the score and length in tokens."""

    cluster: int
    ranking: Ranking
    better: int
    worse: int
    margin: float
    length_better: int
    length_worse: int


class Hits(NamedTuple):
    """What the scores make of P strict preferences.

    Fields:
        right_P: 1 where they order a preference as the rater did, 0.5 where they are equal, else 0.
        prompt_P: the number of its prompt; the same for every scoring of the same rankings.
    """

    right_P: Floats
    prompt_P: NDArray[np.int64]


def pair_hits(scored: Sequence[ScoredRanking]) -> Hits:
    """Every strict preference, ranking by ranking."""
    clusters: dict[str, int] = {}
    return _hits([pair for each in scored for pair in _pairs(each, clusters)])


def mean_over_pairs(
    values_P: Floats, prompt_P: NDArray[np.int64], seed: int, resamples: int = 2000, share: bool = True
) -> Estimate:
    """Mean with the cluster bootstrap's interval over prompts; NaN for no pair. `share`: as for `cluster_share`."""
    if not len(values_P):
        return cluster_share([], [], seed, resamples)
    counts = np.bincount(prompt_P)
    return cluster_share(np.bincount(prompt_P, weights=values_P), counts, seed, resamples, share)


def accuracy_report(scored: Sequence[ScoredRanking], seed: int, resamples: int = 2000) -> dict[str, Any]:
    """The report as plain JSON: finite numbers, text, or null where there is nothing to estimate from.

    Keys:
        rankings, prompts, ties: how many (ties in pairs).
        overall: {value, low, high, pairs}.
        by: {rater, source, criterion, policy_pair, confidence, length_tokens, better_is}, each a list of
            {group, value, low, high, pairs}, most pairs first.
        calibration: {ece, bins}.
        length: {pearson, spearman, within_rankings} correlations with the score, and `always_longer` as `overall`.
        human: {agreement, ceiling_low, ceiling_high, above_ceiling, sentence}.

    Args:
        scored: rankings that neither this model nor the policy it started from was trained on.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: a score is not finite, or the numbers of scores, lengths and completions differ.
    """
    for each in scored:
        _check(each)
    clusters: dict[str, int] = {}
    pairs = [pair for each in scored for pair in _pairs(each, clusters)]
    hits, prompts = _hits(pairs)

    def share(values: Floats, chosen: Sequence[int] | None = None) -> dict[str, Any]:
        rows = list(range(len(pairs))) if chosen is None else chosen
        return {**as_json(mean_over_pairs(values[rows], prompts[rows], seed, resamples)), "pairs": len(rows)}

    def by(key: Callable[[_Pair], str | None]) -> list[dict[str, Any]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for row, pair in enumerate(pairs):
            if (name := key(pair)) is not None:
                groups[name].append(row)
        return [{"group": name, **share(hits, rows)} for name, rows in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))]

    overall = share(hits)
    return {
        "rankings": len(scored),
        "prompts": len({prompt_key(each.ranking.prompt) for each in scored}),
        "ties": sum(math.comb(len(s.scores), 2) for s in scored) - len(pairs),
        "overall": overall,
        "by": {
            "rater": by(lambda p: p.ranking.rater_id),
            "source": by(lambda p: p.ranking.source),
            "criterion": by(lambda p: p.ranking.criterion or "not given"),
            "policy_pair": by(_policy_pair),
            "confidence": by(_confidence_bin),
            "length_tokens": by(_length_bin(pairs)),
            "better_is": by(lambda p: ("longer", "equally long", "shorter")[int(1 - np.sign(p.length_better - p.length_worse))]),
        },
        "calibration": _calibration(pairs),
        "length": {
            **_length_correlations(scored),
            "always_longer": share(np.array([0.5 + 0.5 * np.sign(p.length_better - p.length_worse) for p in pairs])),
        },
        "human": _human(scored, overall, seed, resamples),
    }


def _check(scored: ScoredRanking) -> None:
    name, k = scored.ranking.ranking_id, len(scored.ranking.completions)
    if not len(scored.scores) == len(scored.lengths_tokens) == len(scored.ranking.ranks) == k:
        raise ValueError(
            f"ranking {name}: {len(scored.scores)} scores and {len(scored.lengths_tokens)} lengths for {k} completions"
        )
    if not all(math.isfinite(score) for score in scored.scores):
        raise ValueError(f"ranking {name}: the reward model's scores {list(scored.scores)} are not finite")


def _pairs(scored: ScoredRanking, clusters: dict[str, int]) -> list[_Pair]:
    cluster = clusters.setdefault(prompt_key(scored.ranking.prompt), len(clusters))
    scores, lengths = scored.scores, scored.lengths_tokens
    return [
        _Pair(cluster, scored.ranking, i, j, float(scores[i]) - float(scores[j]), int(lengths[i]), int(lengths[j]))
        for i, j in scored.ranking.pairs()
    ]


def _hits(pairs: Sequence[_Pair]) -> Hits:
    right_P = np.array([1.0 if p.margin > 0 else 0.5 if p.margin == 0 else 0.0 for p in pairs])
    return Hits(right_P, np.array([p.cluster for p in pairs], dtype=np.int64))


def _policy_pair(pair: _Pair) -> str | None:
    policies = pair.ranking.policies
    return " and ".join(sorted((policies[pair.better], policies[pair.worse]))) if policies else None


def _confidence_bin(pair: _Pair) -> str:
    confidence = pair.ranking.confidence
    if confidence is None:
        return "not given"
    low = 0.0
    for edge in CONFIDENCE_EDGES:
        if confidence < edge:
            return f"{low:g} to below {edge:g}"
        low = edge
    return f"{low:g} to 1"


def _length_bin(pairs: Sequence[_Pair]) -> Callable[[_Pair], str]:
    """Names of quantile bins of the mean length of a pair's completions."""
    means = [(p.length_better + p.length_worse) / 2 for p in pairs]
    if not means:
        return lambda pair: "none"
    edges = np.unique(np.quantile(means, np.linspace(0, 1, LENGTH_BINS + 1)))
    inner = edges[1:-1]

    def name(pair: _Pair) -> str:
        index = int(np.searchsorted(inner, (pair.length_better + pair.length_worse) / 2, side="right"))
        return f"{edges[index]:.4g} to {edges[min(index + 1, len(edges) - 1)]:.4g}"

    return name


def _calibration(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Of each pair the probability that the model gives to the side it prefers, against how often that side was preferred."""
    margins = np.array([p.margin for p in pairs])
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700)))
    bins = reliability(confidence, np.where(margins == 0, 0.5, margins > 0))
    return {"ece": finite(expected_calibration_error(bins)), "bins": [each._asdict() for each in bins]}


def _length_correlations(scored: Sequence[ScoredRanking]) -> dict[str, float | None]:
    """Correlation of score and length over all completions, and of their deviations from the mean of their ranking."""
    scores = [np.asarray(each.scores, dtype=np.float64) for each in scored]
    lengths = [np.asarray(each.lengths_tokens, dtype=np.float64) for each in scored]
    if not scored:
        return {"pearson": None, "spearman": None, "within_rankings": None}
    x, y = np.concatenate(scores), np.concatenate(lengths)
    within = pearson(np.concatenate([s - s.mean() for s in scores]), np.concatenate([n - n.mean() for n in lengths]))
    return {"pearson": finite(pearson(x, y)), "spearman": finite(spearman(x, y)), "within_rankings": finite(within)}


def _human(scored: Sequence[ScoredRanking], overall: dict[str, Any], seed: int, resamples: int) -> dict[str, Any]:
    """Agreement of raters who ordered the same two completions of a prompt by the same criterion, and the ceiling it sets."""
    found = human_ceiling(agreement_by_prompt(votes_of(each.ranking for each in scored)), seed, resamples)
    low, high, agreement = found["ceiling_low"], found["ceiling_high"], found["agreement"]
    value = overall["value"]
    above = high is not None and value is not None and value > high
    if high is None:
        sentence = "No two raters ordered the same completions of a prompt, so the human ceiling is not known."
    elif above:
        sentence = (
            f"Accuracy {value:.3f} is above the human ceiling {high:.3f}: a leak of test rankings into training until proven "
            f"otherwise (agreement {agreement['value']:.3f} from {agreement['pairs']} pairs)."
        )
    else:
        sentence = f"A perfect model would reach between {low:.3f} and {high:.3f}, by the agreement of the raters."
    return {**found, "above_ceiling": above, "sentence": sentence}
