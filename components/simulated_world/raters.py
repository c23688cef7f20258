"""Twelve simulated raters: the true preference, seen through each one's noise and biases."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple


class Rater(NamedTuple):
    """One rater. Utilities are in units of the true preference.

    Fields:
        rater_id: pseudonym.
        noise: scale of the Gumbel noise on each completion; 0.5 makes the better of two that differ by 1 win 88 % of the time.
        length_bias: added per ten words over thirty.
        position_bias: added to the completion that was shown first.
        careless: share of rankings that this rater makes at random.
    """

    rater_id: str
    noise: float
    length_bias: float = 0.0
    position_bias: float = 0.0
    careless: float = 0.0

    def utilities(self, rng: random.Random, truths: Sequence[float], lengths_words: Sequence[int]) -> list[float]:
        """What this rater feels about each of the K completions, in the order shown."""
        if rng.random() < self.careless:
            return [rng.gauss(0, 1) for _ in truths]
        return [
            truth
            + self.length_bias * (length - 30) / 10
            + (self.position_bias if place == 0 else 0.0)
            - self.noise * math.log(-math.log(rng.random() or 1e-12))
            for place, (truth, length) in enumerate(zip(truths, lengths_words, strict=True))
        ]


RATERS = (
    Rater("rater-01", noise=0.4),
    Rater("rater-02", noise=0.4),
    Rater("rater-03", noise=0.5),
    Rater("rater-04", noise=0.5),
    Rater("rater-05", noise=0.5, length_bias=0.3),
    Rater("rater-06", noise=0.6, length_bias=0.5),
    Rater("rater-07", noise=0.6, length_bias=-0.3),
    Rater("rater-08", noise=0.5, position_bias=0.6),
    Rater("rater-09", noise=0.6, position_bias=0.4),
    Rater("rater-10", noise=0.8),
    Rater("rater-11", noise=0.8, length_bias=0.2, position_bias=0.3),
    Rater("rater-12", noise=0.5, careless=0.8),
)

TIE_WIDTH = 0.4  # a rater cannot tell apart what feels nearer than this


def to_ranks(utilities: Sequence[float]) -> list[int]:
    """Utilities to dense ranks, 1 = best; neighbours nearer than `TIE_WIDTH` in the sorted order are tied."""
    order = sorted(range(len(utilities)), key=lambda i: -utilities[i])
    ranks = [0] * len(utilities)
    rank = 1
    anchor = utilities[order[0]]
    for i in order:
        if anchor - utilities[i] > TIE_WIDTH:
            rank += 1
            anchor = utilities[i]
        ranks[i] = rank
    return ranks
