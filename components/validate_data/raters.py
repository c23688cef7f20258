"""What is known of each rater, and of each two of them: numbers with intervals, and flags that are raised on proof only.

A flag is looked for in every rater at once, so its interval is at 1 - 0.05 / (number of raters, or of pairs of raters): the chance
that a pool of good raters gets any flag of that kind is 5 % (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from components.rlhf.cluster_sums import CLUSTERS, HITS, TRIALS, share
from components.rlhf.statistics import Estimate, Floats
from components.validate_data.comparisons import BIASES, Comparisons
from components.validate_data.rows import Ints

ERROR = 0.05
SHARED_PROMPTS = 10  # with others, below which nothing is said of agreement
COPY_MARGIN = 0.1  # by which an agreement must be above what is predicted: two raters may share a taste
SESSION_SECONDS = 3600.0  # a longer gap is a pause

RANDOM = "agreement with the others is not proven to be above chance"
FLAGS = {  # of a proven bias: (towards, away)
    "longer": ("prefers the longer", "prefers the shorter"),
    "first_shown": ("prefers what is shown first", "avoids what is shown first"),
    "refusal": ("prefers refusals", "avoids refusals"),
}


class Rater(NamedTuple):
    """One known rater.

    Fields:
        rankings: how many, and `fraction` of all rankings.
        shares: of "longer", "first_shown", "refusal", "agreement", "self_contradiction" and "cycle" (see `Comparisons`).
        seconds: median time from one ranking to the next within a session; NaN where times are not known.
        flags: in words.
    """

    name: str
    rankings: int
    fraction: float
    shares: Mapping[str, Estimate]
    seconds: float
    flags: Sequence[str]


class Copying(NamedTuple):
    """Two raters who agree far more often than their agreement with others predicts."""

    one: int
    other: int
    agreement: Estimate
    predicted: float


class Pool(NamedTuple):
    """All known raters, most rankings first.

    Fields:
        compared: names of the raters in `agreement` [T, T], shares that are NaN where two raters have nothing in common.
        small, random, copying: shares of all rankings that are made by raters with few rankings, at random level, or copying.
        tested, tested_pairs: raters, and pairs of raters, with enough in common with others to say anything.
    """

    raters: Sequence[Rater]
    compared: Sequence[str]
    agreement: Floats
    copying_pairs: Sequence[tuple[str, str, Estimate, float]]
    small: float
    random: float
    copying: float
    tested: int
    tested_pairs: int


def pool_of(
    names: Sequence[str],
    rankings: Sequence[int],
    all_rankings: int,
    sums: Comparisons,
    seconds: Floats,
    few_rankings: int,
    limits: Mapping[str, float],
) -> Pool:
    """Every rater, with flags.

    Args:
        names, rankings, seconds: of each known rater, by number.
        all_rankings: of the snapshot, those of unknown raters included.
        few_rankings: fewer than so many are flagged.
        limits: of each of `BIASES`, how far from one half a share may be before it is flagged.
    """
    flags: list[list[str]] = [[] for _ in names]
    for number, count in enumerate(rankings):
        if count < few_rankings:
            flags[number].append(f"fewer than {few_rankings} rankings")
    for bias in BIASES:
        error = ERROR / max(1, len(names))
        for number, row in enumerate(sums.by_rater[bias]):
            side = _proven(share(row, error), limits[bias])
            if side:
                flags[number].append(FLAGS[bias][side < 0])
    random, tested = at_random_level(sums.by_rater["agreement"])
    for number in random:
        flags[number].append(RANDOM)
    copying, tested_pairs = copying_pairs(sums)
    for pair in copying:
        for one, other in ((pair.one, pair.other), (pair.other, pair.one)):
            flags[one].append(f"agrees with {names[other]} far more than with others")
    raters = [
        Rater(
            name,
            rankings[number],
            rankings[number] / all_rankings,
            {measure: share(rows[number]) for measure, rows in sums.by_rater.items()},
            float(seconds[number]),
            flags[number],
        )
        for number, name in enumerate(names)
    ]

    def fraction(chosen: Iterable[int]) -> float:
        return sum(rankings[number] for number in set(chosen)) / all_rankings

    with np.errstate(invalid="ignore"):
        between = sums.between[:, :, HITS] / sums.between[:, :, TRIALS]
    return Pool(
        sorted(raters, key=lambda rater: (-rater.rankings, rater.name)),
        [names[number] for number in sums.compared],
        np.where(np.isnan(between), between.T, between),
        [(names[pair.one], names[pair.other], pair.agreement, pair.predicted) for pair in copying],
        fraction(number for number, count in enumerate(rankings) if count < few_rankings),
        fraction(random),
        fraction(number for pair in copying for number in (pair.one, pair.other)),
        tested,
        tested_pairs,
    )


def _proven(estimate: Estimate, limit: float) -> int:
    """1 or -1 if the whole interval is further than `limit` above or below one half, else 0."""
    return int(estimate.low > 0.5 + limit) - int(estimate.high < 0.5 - limit)


def at_random_level(agreement: Floats) -> tuple[list[int], int]:
    """Raters whose agreement with the others [raters, 6] is at random level; and how many were tested.

    That is: the interval holds one half or lies below it, it lies below the agreement of the other raters among themselves, since
    few comparisons alone prove nothing, and the value is nearer to one half than to theirs, since one may be worse and no coin.
    A worse rater may still be taken for a coin until more comparisons are there: the flag says that nothing better is proven.
    """
    tested = np.flatnonzero(agreement[:, CLUSTERS] >= SHARED_PROMPTS)
    hits, trials = agreement[:, HITS].sum() / 2, agreement[:, TRIALS].sum() / 2  # each comparison is in the sums of two raters
    found = []
    for number in tested:
        if (rest := trials - agreement[number, TRIALS]) <= 0:
            continue
        others = (hits - agreement[number, HITS]) / rest
        estimate = share(agreement[number], ERROR / len(tested))
        if estimate.low <= 0.5 and estimate.high < others and estimate.value < (0.5 + others) / 2:
            found.append(int(number))
    return found, len(tested)


def copying_pairs(sums: Comparisons) -> tuple[list[Copying], int]:
    """Pairs of raters whose agreement is far above what theirs with everybody else predicts; and how many pairs were tested.

    Far above: the whole interval lies above the prediction and a margin, and above what the upper ends of their agreement with the
    others would predict.
    """
    with_all, numbers = sums.by_rater["agreement"], sums.compared
    tested = np.argwhere(sums.between[:, :, CLUSTERS] >= SHARED_PROMPTS)
    hits, trials = with_all[:, HITS].sum() / 2, with_all[:, TRIALS].sum() / 2
    found = []
    for i, j in tested:
        own, a, b = sums.between[i, j], with_all[numbers[i]], with_all[numbers[j]]
        rest = [share(each - own) for each in (a, b)]
        others = trials - own[TRIALS]
        if others <= 0 or not all(math.isfinite(each.value) for each in rest):
            continue
        any_two = (hits - own[HITS]) / others
        predicted = predicted_agreement(rest[0].value, rest[1].value, any_two)
        most = max(predicted + COPY_MARGIN, predicted_agreement(rest[0].high, rest[1].high, any_two))
        if own[HITS] / own[TRIALS] > most:
            estimate = share(own, ERROR / len(tested))
            if estimate.low > most:
                found.append(Copying(numbers[i], numbers[j], estimate, predicted))
    return found, len(tested)


def predicted_agreement(one: float, other: float, any_two: float) -> float:
    """How often two raters agree whose agreement with the others is `one` and `other`, where any two agree in a share `any_two`.

    If raters err independently, each right with a probability p of their own, two of them agree with 2a - 1 = (2p - 1)(2p' - 1),
    so that 2a - 1 = (2 one - 1)(2 other - 1) / (2 any_two - 1): two average raters are predicted to agree as any two do.
    """
    a, b, c = (max(0.0, 2 * each - 1) for each in (one, other, any_two))
    return 0.5 + 0.5 * min(1.0, a * b / c) if c > 0 else max(one, other)


def median_gaps(times: Iterable[tuple[Ints, NDArray[np.float64]]], raters: int) -> Floats:
    """Median seconds [raters] from one ranking of a rater to the next, of gaps within a session; NaN where there is none.

    Args:
        times: (rater, seconds), sorted by both, all of a rater in one piece.
    """
    found = np.full(raters, math.nan)
    for rater, seconds in times:
        gaps = np.diff(seconds)
        within = (rater[1:] == rater[:-1]) & (gaps <= SESSION_SECONDS)
        owners, gaps = rater[1:][within], gaps[within]
        for own in np.split(np.arange(len(owners)), np.flatnonzero(np.diff(owners)) + 1):
            if len(own):
                found[owners[own[0]]] = np.median(gaps[own])
    return found
