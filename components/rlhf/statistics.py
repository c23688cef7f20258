"""Estimates with intervals: win rates, pair accuracy, calibration, correlation, diversity, perplexity, rater agreement. Pure numpy.

Every interval is at 95 %. Whatever cannot be computed (no data, no variance) is NaN, never a silent zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
CELLS_PER_CHUNK = 4_000_000  # of a bootstrap's resamples x items: 32 MB of indices
# Priors of the length-controlled regression, in units of one standard deviation of the length difference: wide enough not to
# matter with data (Gelman 2008), and without them perfectly separated wins would send the coefficients to infinity.
INTERCEPT_PRIOR_SD, SLOPE_PRIOR_SD = 10.0, 2.5
BLEU_EPSILON = 0.1  # matches that an order without any is given

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval, all in the value's unit; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float


class ReliabilityBin(NamedTuple):
    """Predictions whose confidence is in [low, high): how many, their mean confidence, and how often they were right."""

    low: float
    high: float
    predictions: int
    confidence: float
    accuracy: float


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def wilson_interval(successes: float, trials: float) -> Estimate:
    """Share of successes with Wilson's score interval, which also holds at shares of 0 and 1. NaN for no trials."""
    if trials == 0:
        return UNKNOWN
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def mean(values: ArrayLike, seed: int, resamples: int = 2000) -> Estimate:
    """Mean of independent values with the percentile bootstrap's interval. NaN for none, or if one is not finite."""
    items = np.asarray(values, dtype=np.float64)
    return cluster_share(items, np.ones_like(items), seed, resamples, share=False)


def win_rate(wins: ArrayLike, seed: int, resamples: int = 2000) -> Estimate:
    """Share of prompts won, with the paired bootstrap's percentile interval.

    Both policies answer the same prompts, so that one outcome per prompt is the unit that is resampled. Outcomes that are all
    the same would give an interval of no width whatever their number; then the interval is Wilson's.

    Args:
        wins: one number per prompt: 1 won, 0.5 tied, 0 lost.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: an outcome is none of 0, 0.5 and 1.
    """
    items = _outcomes(wins)
    return cluster_share(items, np.ones_like(items), seed, resamples)


def length_controlled_win_rate(wins: ArrayLike, length_difference: ArrayLike, seed: int, resamples: int = 2000) -> Estimate:
    """Probability of winning at equal length, after a logistic regression of the outcome on the difference of lengths.

    log-odds(win) = a + b * difference / (its root mean square), ties as half a win; the result is sigmoid(a). The idea is that
    of Dubois 2024 (arXiv 2404.04475) without its terms for the model and for the prompt's difficulty. Where one policy's
    completions are always the longer, the value at zero is an extrapolation.

    Args:
        wins: one number per prompt: 1 won, 0.5 tied, 0 lost.
        length_difference: the candidate's length minus the other's, one per prompt, any unit.
        seed: of the resampling (prompts are resampled, the regression is fitted to each resample).
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: an outcome is none of 0, 0.5 and 1.
    """
    outcomes, difference = _outcomes(wins), np.asarray(length_difference, dtype=np.float64)
    if outcomes.size == 0:
        return UNKNOWN
    scale = math.sqrt(float(np.mean(difference**2)))
    standard = difference / scale if scale > 0 else difference
    value = float(_win_probability_at_zero(outcomes[None], standard[None])[0])
    if np.all(outcomes == outcomes[0]):
        wilson = wilson_interval(float(outcomes.sum()), outcomes.size)
        return Estimate(value, min(value, wilson.low), max(value, wilson.high))
    drawn = [_win_probability_at_zero(outcomes[rows], standard[rows]) for rows in _resampled(outcomes.size, seed, resamples)]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def cluster_share(hits: ArrayLike, counts: ArrayLike, seed: int, resamples: int = 2000, share: bool = True) -> Estimate:
    """sum(hits) / sum(counts) with the cluster bootstrap's percentile interval.

    Pairs of one ranking, and rankings of one prompt, are not independent: whole clusters are resampled. Clusters that all
    have the same share would give an interval of no width; for a share it is then Wilson's over the number of clusters.

    Args:
        hits: number of successes per cluster (or sum of values, with `share` False).
        counts: number of trials per cluster; clusters without trials are left out.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
        share: whether the result is a share of trials, which Wilson's interval can bound.
    """
    hits, counts = np.asarray(hits, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    hits, counts = hits[counts > 0], counts[counts > 0]
    if hits.size == 0:
        return UNKNOWN
    value = float(hits.sum() / counts.sum())
    if not math.isfinite(value):
        return UNKNOWN
    if share and np.all(hits / counts == hits[0] / counts[0]):
        return wilson_interval(value * hits.size, hits.size)._replace(value=value)
    drawn = [hits[rows].sum(axis=1) / counts[rows].sum(axis=1) for rows in _resampled(hits.size, seed, resamples)]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def paired_difference(ours: ArrayLike, theirs: ArrayLike) -> Estimate:
    """Share of successes on our side minus that on theirs, of the same trials, with Newcombe's interval. NaN for no trials.

    Newcombe 1998 (Statistics in Medicine 17, 2635), method 10: Wilson's intervals of both shares, joined by their correlation.
    Unlike a bootstrap it does not promise certainty where no trial differs: 10 equal outcomes are few, whatever they are.

    Args:
        ours, theirs: success or not, of each trial.
    """
    a, b = np.asarray(ours, dtype=bool), np.asarray(theirs, dtype=bool)
    if a.size == 0:
        return UNKNOWN
    p, q = (wilson_interval(int(each.sum()), each.size) for each in (a, b))
    both, only_a, only_b, neither = (float(each.sum()) for each in (a & b, a & ~b, ~a & b, ~a & ~b))
    association = both * neither - only_a * only_b
    if association > 0:
        association = max(association - a.size / 2, 0.0)  # the correction of method 10
    scale = math.sqrt((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    correlation = association / scale if scale > 0 else 0.0

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x**2 - 2 * correlation * x * y + y**2))

    value = (only_a - only_b) / a.size
    return Estimate(value, value - joined(p.value - p.low, q.high - q.value), value + joined(p.high - p.value, q.value - q.low))


def perplexity(nats: ArrayLike, tokens: ArrayLike, seed: int, resamples: int = 2000) -> Estimate:
    """exp of the mean negative log-likelihood per token, with the cluster bootstrap's percentile interval.

    Args:
        nats: negative log-likelihood of each text, summed over its tokens.
        tokens: of each text; a text is a cluster, and one without tokens is left out.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    return _exp(cluster_share(nats, tokens, seed, resamples, share=False))


def perplexity_ratio(
    nats: ArrayLike, tokens: ArrayLike, other_nats: ArrayLike, other_tokens: ArrayLike, seed: int, resamples: int = 2000
) -> Estimate:
    """One perplexity divided by another, with the paired bootstrap's percentile interval: a prompt is drawn for both sides.

    Args:
        nats, tokens: as in `perplexity`, one text per prompt.
        other_nats, other_tokens: the same of the divisor; a prompt without tokens on either side is left out.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    a, n, b, m = (np.asarray(each, dtype=np.float64) for each in (nats, tokens, other_nats, other_tokens))
    a, n, b, m = (each[(n > 0) & (m > 0)] for each in (a, n, b, m))
    if a.size == 0 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return UNKNOWN
    value = float(a.sum() / n.sum() - b.sum() / m.sum())
    drawn = [
        a[rows].sum(axis=1) / n[rows].sum(axis=1) - b[rows].sum(axis=1) / m[rows].sum(axis=1)
        for rows in _resampled(a.size, seed, resamples)
    ]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return _exp(Estimate(value, float(low), float(high)))


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> list[ReliabilityBin]:
    """Predictions between two outcomes, by their confidence in [0.5, 1], in bins of equal width; empty bins are left out."""
    confidences, hits = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    width = 0.5 / bins
    index = np.clip(((confidences - 0.5) / width).astype(int), 0, bins - 1)
    result = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            low = 0.5 + number * width
            accuracy = float(hits[inside].mean())
            result.append(ReliabilityBin(low, low + width, int(inside.sum()), float(confidences[inside].mean()), accuracy))
    return result


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean of |accuracy - confidence| over the bins, weighted by their counts (Guo 2017). NaN for none."""
    total = sum(each.predictions for each in bins)
    return sum(each.predictions * abs(each.accuracy - each.confidence) for each in bins) / total if total else math.nan


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation in [-1, 1]; NaN for fewer than two points or where one side does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.size < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else math.nan


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], ties at their mean rank; NaN as for `pearson`."""
    return pearson(average_ranks(x), average_ranks(y))


def average_ranks(values: ArrayLike) -> Floats:
    """Ranks from 1 (smallest); equal values share the mean of their ranks."""
    items = np.asarray(values, dtype=np.float64)
    _, group, counts = np.unique(items, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    return np.asarray((last - (counts - 1) / 2)[group], dtype=np.float64)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams of words among all n-grams of the texts (Li 2016, arXiv 1510.03055). NaN if there are none.

    It falls with the amount of text, so compare sets of the same prompts, with the lengths beside it.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean BLEU of each text with all the others as its references (Zhu 2018, arXiv 1802.01886): 1 if each is said twice.

    BLEU is Papineni's: clipped precisions of 1 to `order` words, their geometric mean, and the brevity penalty at the reference's
    length that is nearest. An order without a match has 0.1 matches (Chen 2014, smoothing 1), and a text without any word of the
    others' has 0. Texts shorter than `order` words are compared in the orders that they have; those without words are left out.
    NaN for fewer than two texts.

    Only the largest and the second largest count of an n-gram in one text are needed to clip by all other texts, so the cost is
    linear in the words and no sample of the texts has to be drawn. Like distinct-n it grows with the number of texts: compare
    equally many.
    """
    words = [each for each in map(str.split, texts) if each]
    if len(words) < 2:
        return math.nan
    lengths = Counter(map(len, words))
    log_precisions = np.zeros((len(words), order))
    for n in range(1, order + 1):
        grams = [Counter(tuple(each[i : i + n]) for i in range(len(each) - n + 1)) for each in words]
        largest: dict[tuple[str, ...], tuple[int, int, int]] = {}  # n-gram: its largest count, of which text, and the next largest
        for text, counts in enumerate(grams):
            for gram, count in counts.items():
                first, owner, second = largest.get(gram, (0, -1, 0))
                largest[gram] = (count, text, first) if count > first else (first, owner, max(second, count))
        for text, counts in enumerate(grams):
            matches = 0
            for gram, count in counts.items():
                first, owner, second = largest[gram]
                matches += min(count, second if owner == text else first)
            if counts:
                smoothed = matches if matches or n == 1 else BLEU_EPSILON
                log_precisions[text, n - 1] = math.log(smoothed / counts.total()) if smoothed else -math.inf
    total = 0.0
    for text, length in enumerate(map(len, words)):
        others = [each for each, count in lengths.items() if count > (each == length)]
        nearest = min(others, key=lambda each: (abs(each - length), each))
        total += math.exp(min(0.0, 1 - nearest / length) + log_precisions[text].sum() / min(order, length))
    return total / len(words)


def accuracy_ceiling(agreement: float) -> tuple[float, float]:
    """Both ends of what a perfect model could score against single raters who agree with each other in a share `agreement`.

    The lower end is the agreement itself. The upper end assumes raters who err independently, each right with probability p:
    a = p^2 + (1 - p)^2, so p = (1 + sqrt(2a - 1)) / 2. Below a = 0.5 that has no solution and p = 0.5 is the nearest.
    """
    if not math.isfinite(agreement):
        return math.nan, math.nan
    return agreement, max(agreement, (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2)


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as {value, low, high}, null for what is not finite."""
    return {name: finite(value) for name, value in estimate._asdict().items()}


def finite(value: float) -> float | None:
    """The number, or None if JSON cannot hold it."""
    return float(value) if math.isfinite(value) else None


def _exp(estimate: Estimate) -> Estimate:
    with np.errstate(over="ignore"):  # infinite, which as_json and the gate know
        return Estimate(*(float(np.exp(each)) for each in estimate))


def _outcomes(wins: ArrayLike) -> Floats:
    items: Any = np.asarray(wins, dtype=np.float64)
    if not np.isin(items, (0.0, 0.5, 1.0)).all():
        raise ValueError(f"outcomes are 0, 0.5 or 1, not {items[~np.isin(items, (0.0, 0.5, 1.0))][0]}")
    return np.asarray(items, dtype=np.float64)


def _resampled(size: int, seed: int, resamples: int) -> list[NDArray[np.int64]]:
    """Indices drawn with replacement, in chunks [resamples of the chunk, size]."""
    generator = np.random.default_rng(seed)
    rows = max(1, CELLS_PER_CHUNK // size)
    return [generator.integers(0, size, (min(rows, resamples - first), size)) for first in range(0, resamples, rows)]


def _win_probability_at_zero(wins_RN: Floats, difference_RN: Floats) -> Floats:
    """sigmoid(intercept) of R logistic regressions with Gaussian priors, by Newton's method. [R]"""
    a_R, b_R = np.zeros(len(wins_RN)), np.zeros(len(wins_RN))
    prior_a, prior_b = INTERCEPT_PRIOR_SD**-2, SLOPE_PRIOR_SD**-2
    for _ in range(50):
        p_RN = 1 / (1 + np.exp(-np.clip(a_R[:, None] + b_R[:, None] * difference_RN, -30, 30)))
        weight_RN = p_RN * (1 - p_RN)
        gradient_a = (wins_RN - p_RN).sum(1) - prior_a * a_R
        gradient_b = ((wins_RN - p_RN) * difference_RN).sum(1) - prior_b * b_R
        h_aa = weight_RN.sum(1) + prior_a
        h_ab = (weight_RN * difference_RN).sum(1)
        h_bb = (weight_RN * difference_RN**2).sum(1) + prior_b
        determinant = h_aa * h_bb - h_ab**2
        step_a = np.clip((h_bb * gradient_a - h_ab * gradient_b) / determinant, -2, 2)  # clipped: a full step may overshoot
        step_b = np.clip((h_aa * gradient_b - h_ab * gradient_a) / determinant, -2, 2)
        a_R, b_R = a_R + step_a, b_R + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return np.asarray(1 / (1 + np.exp(-a_R)), dtype=np.float64)
