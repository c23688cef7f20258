"""Agreement of raters who compared the same two completions of a prompt by the same criterion, and the ceiling it sets.

The unit is a pair of completions, for any two rankings that share one can be compared, whatever else each of them held. A rater who
is not known agrees with nobody: two rankings by "unknown" may be of one person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from components.rlhf.records import UNKNOWN_RATER, Ranking, prompt_key
from components.rlhf.statistics import (
    UNKNOWN,
    Estimate,
    Floats,
    accuracy_ceiling,
    as_json,
    cluster_share,
    finite,
)

Ints = NDArray[np.int64]
MOST_VOTES = 1000  # on one pair that are compared with each other, the first ones; their number grows with its square
_PAIRS_PER_CHUNK = 1_000_000  # of votes in memory at a time: some 50 MB
_LEVELS = 3  # the second is better, a tie, the first is better


class Votes(NamedTuple):
    """N judgements of pairs of completions, in any order.

    Fields:
        item_N: the pair: prompt, criterion and both completions.
        prompt_N: number of its prompt, from 0.
        rater_N: number of the rater, from 0; negative where nobody knows who it was.
        verdict_N: 1 the pair's first completion is better, -1 its second, 0 a tie. Which one is first is the item's matter.
    """

    item_N: NDArray[Any]
    prompt_N: Ints
    rater_N: Ints
    verdict_N: Ints

    def of(self, rows: NDArray[Any]) -> Votes:
        return Votes(*(each[rows] for each in self))


def votes_of(rankings: Iterable[Ranking]) -> Votes:
    """Every comparison in the rankings."""
    items: dict[tuple[str, str | None, str, str], int] = {}
    prompts: dict[str, int] = {}
    raters: dict[str, int] = {}
    rows = []
    for ranking in rankings:
        key = prompt_key(ranking.prompt)
        prompt = prompts.setdefault(key, len(prompts))
        rater = -1 if ranking.rater_id == UNKNOWN_RATER else raters.setdefault(ranking.rater_id, len(raters))
        for i, j in combinations(range(len(ranking.completions)), 2):
            (one, first), (other, second) = sorted(zip((ranking.completions[i], ranking.completions[j]), (i, j), strict=True))
            if one == other:
                continue
            item = items.setdefault((key, ranking.criterion, one, other), len(items))
            rows.append((item, prompt, rater, int(np.sign(ranking.ranks[second] - ranking.ranks[first]))))
    return Votes(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def pairs_of_votes(votes: Votes) -> Iterator[tuple[Ints, Ints]]:
    """Places (a, b) of any two votes on the same item by different known raters, the one with the lower rater first; in chunks."""
    known = np.flatnonzero(votes.rater_N >= 0)
    order = known[np.lexsort((votes.rater_N[known], votes.item_N[known]))]
    _, starts, counts = np.unique(votes.item_N[order], return_index=True, return_counts=True)
    counts = np.minimum(counts, MOST_VOTES)
    starts, counts = starts[counts > 1], counts[counts > 1]
    made = np.cumsum(counts * (counts - 1) // 2)
    first = 0
    while first < len(counts):
        done = made[first - 1] if first else 0
        after = max(first + 1, int(np.searchsorted(made, done + _PAIRS_PER_CHUNK, side="right")))
        a, b = _within(starts[first:after], counts[first:after])
        a, b = order[a], order[b]
        different = votes.rater_N[a] != votes.rater_N[b]
        yield a[different], b[different]
        first = after


def _within(starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """All pairs of places i < j within groups of neighbours."""
    ones, others = [], []
    for size in np.unique(counts):
        i, j = np.triu_indices(int(size), 1)
        base = starts[counts == size][:, None]
        ones.append((base + i).ravel())
        others.append((base + j).ravel())
    return np.concatenate(ones), np.concatenate(others)


class PromptAgreement(NamedTuple):
    """What is known of each of P prompts that several raters compared; enough for every measure and its bootstrap.

    Fields:
        agreed_P, compared_P: pairs of strict judgements by two raters that are equal, and all of them.
        coincidences_PVV: Krippendorff's coincidences of verdicts -1, 0 and 1, with one judgement of each rater on an item.
    """

    agreed_P: Floats
    compared_P: Floats
    coincidences_PVV: Floats

    @staticmethod
    def join(parts: Iterable[PromptAgreement]) -> PromptAgreement:
        empty = PromptAgreement(np.zeros(0), np.zeros(0), np.zeros((0, _LEVELS, _LEVELS)))
        return PromptAgreement(*(np.concatenate(each) for each in zip(empty, *parts, strict=True)))


def agreement_by_prompt(votes: Votes) -> PromptAgreement:
    """The prompts on which two known raters judged the same pair, in order of their number."""
    prompts = int(votes.prompt_N.max()) + 1 if len(votes.prompt_N) else 0
    agreed, compared = np.zeros(prompts), np.zeros(prompts)
    for a, b in pairs_of_votes(votes):
        strict = (votes.verdict_N[a] != 0) & (votes.verdict_N[b] != 0)
        prompt = votes.prompt_N[a[strict]]
        same = votes.verdict_N[a[strict]] == votes.verdict_N[b[strict]]
        agreed += np.bincount(prompt, weights=same, minlength=prompts)
        compared += np.bincount(prompt, minlength=prompts)
    coincidences = _coincidences(votes, prompts)
    kept = (compared > 0) | (coincidences.sum(axis=(1, 2)) > 0)
    return PromptAgreement(agreed[kept], compared[kept], coincidences[kept])


def _coincidences(votes: Votes, prompts: int) -> Floats:
    """[prompts, V, V]: of each item with m judgements, every ordered pair of two of them counts 1 / (m - 1)."""
    known = votes.of(np.flatnonzero(votes.rater_N >= 0))
    order = np.lexsort((known.rater_N, known.item_N))
    item, rater = known.item_N[order], known.rater_N[order]
    once = np.ones(len(order), dtype=bool)
    once[1:] = (item[1:] != item[:-1]) | (rater[1:] != rater[:-1])
    known = known.of(order[once])
    _, first, group = np.unique(known.item_N, return_index=True, return_inverse=True)
    counts = np.zeros((len(first), _LEVELS))
    np.add.at(counts, (group, known.verdict_N + 1), 1)
    judged = counts.sum(axis=1)
    several = judged > 1
    counts, judged, prompt = counts[several], judged[several], known.prompt_N[first[several]]
    ordered = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(_LEVELS)
    result = np.zeros((prompts, _LEVELS, _LEVELS))
    np.add.at(result, prompt, ordered / (judged - 1)[:, None, None])
    return result


def krippendorff_alpha(coincidences: Floats) -> Floats:
    """Krippendorff's alpha [...] of coincidences [..., V, V], ordinal: a tie lies between the two preferences. NaN: nothing varies.

    Krippendorff 2011 (Computing Krippendorff's Alpha-Reliability): 1 - (n - 1) sum(o d) / sum(n_c n_k d). 1 is agreement, 0 what
    chance gives. The formula is ours because it is needed for thousands of resamples of sums, which no library takes: NLTK's, by
    which the tests check it, walks through single judgements, and the one that everybody uses is under the GPL.
    """
    margin = coincidences.sum(axis=-1)
    middle = np.cumsum(margin, axis=-1) - margin / 2
    distance = (middle[..., :, None] - middle[..., None, :]) ** 2
    observed = (coincidences * distance).sum(axis=(-2, -1))
    expected = (margin[..., :, None] * margin[..., None, :] * distance).sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - (margin.sum(axis=-1) - 1) * observed / np.where(expected > 0, expected, np.nan))


def pairwise_agreement(prompts: PromptAgreement, seed: int, resamples: int = 2000) -> Estimate:
    """Share of pairs of strict judgements by two raters that are equal, with the bootstrap's interval over prompts."""
    return cluster_share(prompts.agreed_P, prompts.compared_P, seed, resamples)


def alpha_estimate(prompts: PromptAgreement, seed: int, resamples: int = 1000) -> Estimate:
    """Krippendorff's alpha with the percentile bootstrap's interval over prompts; NaN where nothing varies, or for one prompt."""
    value = float(krippendorff_alpha(prompts.coincidences_PVV.sum(axis=0)))
    size = len(prompts.agreed_P)
    if not math.isfinite(value) or size < 2:
        return UNKNOWN
    generator, flat = np.random.default_rng(seed), prompts.coincidences_PVV.reshape(size, -1)
    rows = max(1, _PAIRS_PER_CHUNK // size)
    drawn = [
        krippendorff_alpha((generator.multinomial(size, np.full(size, 1 / size), each) @ flat).reshape(each, _LEVELS, _LEVELS))
        for each in (min(rows, resamples - first) for first in range(0, resamples, rows))
    ]
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def human_ceiling(prompts: PromptAgreement, seed: int, resamples: int = 2000) -> dict[str, Any]:
    """What a perfect model could score against single raters, as plain JSON: {agreement, ceiling_low, ceiling_high}.

    `agreement` is {value, low, high, pairs}, and the ends are those of `accuracy_ceiling`; null where no two raters overlap.
    """
    agreement = pairwise_agreement(prompts, seed, resamples)
    low, high = accuracy_ceiling(agreement.value)
    return {
        "agreement": {**as_json(agreement), "pairs": int(prompts.compared_P.sum())},
        "ceiling_low": finite(low),
        "ceiling_high": finite(high),
    }
