"""Conformal p-values: how strange is a new unit among all units before it?

A bag begins with the reference and takes in every unit after it was tested. While nothing changes, reference and new units are
exchangeable, so the place of the newest among all is uniform whatever the places before it were: the p-values are independent and
uniform (Vovk 2003; Vovk, Gammerman and Shafer 2022, "Algorithmic Learning in a Random World", part III). This holds for any
size of the reference and for any number of units.

Why not a two-sample test against a fixed reference: a finite reference is not the distribution that it was drawn from. A test that
compares with it again and again is a test of "new rankings are distributed exactly as those 1000 are", which is false without any
drift, and with enough new rankings it will say so. Betting on pairs of one new and one reference ranking (Shekhar and Ramdas
2023, arXiv 2112.09162; Podkopaev and Ramdas 2023, arXiv 2310.19384) is valid only while each reference ranking is used once, and
ends when they are used up. A rank among all that came before is valid for ever.

The score may be any function that was fixed without the units of the bag, and may change on the way as long as it never learns from
them: what is proved is that given the bag (with the newest in it) each of its members is equally likely to be the newest.

A unit can have a category, known before its score (here: the split). It is then ranked among its own kind only, and the p-values
are uniform as long as each kind stays as it was (Mondrian conformal prediction, in the same book): that there are more of
one kind is no drift.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np

from components.detect_drift.betting import Floats


def p_value(greater: int, equal: int, before: int, theta: float) -> float:
    """Smoothed p-value of a unit among `before` others and itself: small if few are as strange.

    Args:
        greater, equal: how many of the others have a greater, or the same score.
        theta: uniform on (0, 1], drawn anew for each unit; it breaks ties, the unit's with itself included.
    """
    return (greater + theta * (equal + 1)) / (before + 1)


class Bag:
    """The scores of all units so far, by category, in order."""

    def __init__(self, categories: Sequence[str], scores: Iterable[float]) -> None:
        self._sorted: dict[str, list[float]] = {}
        for category, score in zip(categories, scores, strict=True):
            self._sorted.setdefault(category, []).append(float(score))
        for each in self._sorted.values():
            each.sort()

    def test(self, category: str, score: float, theta: float) -> float:
        """The p-value of a new unit, which then belongs to the bag."""
        scores = self._sorted.setdefault(category, [])
        left, right = bisect.bisect_left(scores, score), bisect.bisect_right(scores, score)
        p = p_value(len(scores) - right, right - left, len(scores), theta)
        scores.insert(right, float(score))
        return p


def auc(new: Floats, reference: Floats, resamples: int = 400, seed: int = 0) -> tuple[float, float, float]:
    """Probability that a new unit scores higher than a reference unit, ties one half, with a bootstrap interval at 95 %.

    0.5: no difference in this score; 1: every new unit scores higher. NaN if a side is empty. Units are drawn again on both sides.
    """
    if not len(new) or not len(reference):
        return (float("nan"),) * 3
    ordered = np.sort(reference)
    below = np.searchsorted(ordered, new, "left")
    place_N = (below + np.searchsorted(ordered, new, "right")) / 2 / len(ordered)
    back = np.sort(new)
    place_M = 1 - (np.searchsorted(back, reference, "left") + np.searchsorted(back, reference, "right")) / 2 / len(back)
    value = float(place_N.mean())
    # The two-sample statistic is, to first order, a sum over both sides of these places (DeLong 1988): each side is drawn alone.
    generator = np.random.default_rng(seed)
    drawn = [
        value
        + place_N[generator.integers(0, len(place_N), len(place_N))].mean()
        + place_M[generator.integers(0, len(place_M), len(place_M))].mean()
        - 2 * value
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value, max(0.0, min(value, float(low))), min(1.0, max(value, float(high)))
