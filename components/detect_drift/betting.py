"""Evidence against "nothing has changed", from p-values that come one by one: a test martingale that bets on small ones.

While nothing changes, the p-values are independent and uniform on (0, 1), and the evidence E_1, E_2, ... has expectation 1 at any
time. By Ville's inequality the probability that it EVER reaches 1/a is at most a, however often anybody
looks and whenever anybody stops (Ville 1939; Ramdas 2023, arXiv 2210.01948, section 2).

A bet is a density f on (0, 1): it multiplies the money that is on it by f(p), and the mean of f is 1. No single density is best for
every drift, so the money lies on a grid of them (a mixture of martingales is a martingale):

    steps   f = 1 - w + (w/q) [p <= q]   a share w of the units drifted, and those are among the q strangest
    powers  f = e p^(e-1)                 (Vovk 2003, "Testing exchangeability on-line")

Nobody knows when the drift begins, and money that bet on it for a year is gone. So at the k-th p-value the share
k^(-1/2) - (k+1)^(-1/2) of the first money leaves the mattress and is laid on the grid: a mixture over all beginnings, too. A drift
that begins at the k-th p-value has to win back 1.5 log k + 0.7 nats (12 after 1500), and not what a year of wrong bets would have
lost. It is the mixture behind Shiryaev's procedure, with a prior that has no horizon (Shin 2022,
arXiv 2203.03532, on e-detectors; Vovk 2021, arXiv 2102.10439, on conformal test martingales that decide when to retrain).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEP_SHARES = (
    0.1,
    0.25,
    0.5,
    0.9,
)  # w: nothing smaller is found within a month of rankings, and 0.9 survives a unit that did not drift
STEP_EDGES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4)  # q: below 0.005 lie five of a thousand reference units
POWERS = (0.15, 0.3, 0.5, 0.7, 0.85)

Floats = NDArray[np.float64]

_SHARE_J, _EDGE_J = (np.array(each) for each in zip(*[(w, q) for w in STEP_SHARES for q in STEP_EDGES], strict=True))
_POWER_J = np.array(POWERS)
STRATEGIES = len(_SHARE_J) + len(_POWER_J)


def log_densities(p: ArrayLike) -> Floats:
    """log f [..., J] of every strategy's density at p-values [...] in (0, 1]."""
    p_N1 = np.asarray(p, dtype=np.float64)[..., None]
    steps_NJ = np.log(1 - _SHARE_J + np.where(p_N1 <= _EDGE_J, _SHARE_J / _EDGE_J, 0.0))
    powers_NJ = np.log(_POWER_J) + (_POWER_J - 1) * np.log(p_N1)
    return np.concatenate([steps_NJ, powers_NJ], axis=-1)


class Evidence(NamedTuple):
    """A test martingale after some p-values. R repetitions side by side (R = 1 in production), J strategies.

    Fields:
        bets: how many p-values it has seen.
        log_awake_RJ: log of the money on each strategy; -inf before the first bet.
    """

    bets: int
    log_awake_RJ: Floats

    @property
    def log_value_R(self) -> Floats:
        """log E in nats: what is on the grid, and what is still in the mattress."""
        return _log_values(self.log_awake_RJ, np.array(self.bets))

    def bet(self, p_R: ArrayLike) -> Evidence:
        """The evidence after one more p-value of each repetition."""
        return self.bets_on(np.asarray(p_R, dtype=np.float64)[None])[0]

    def bets_on(self, p_NR: ArrayLike) -> tuple[Evidence, Floats]:
        """The evidence after N more p-values, and log E after each of them [N, R].

        With S_n the sum of log f over the first n, a strategy has S_n + log sum over k <= n of (woken at k) exp(-S_(k-1)).

        Raises:
            ValueError: a p-value is not in (0, 1]; NaN is not.
        """
        p = np.asarray(p_NR, dtype=np.float64)
        if not ((p > 0) & (p <= 1)).all():
            raise ValueError(f"p-values are in (0, 1], not {p[~((p > 0) & (p <= 1))][0]}")
        bets_N = self.bets + 1 + np.arange(len(p))
        sums_NRJ = np.cumsum(log_densities(p), axis=0)
        before_NRJ = np.concatenate([np.zeros((1, *sums_NRJ.shape[1:])), sums_NRJ[:-1]])[: len(p)]
        waking_N = np.log((bets_N**-0.5 - (bets_N + 1) ** -0.5) / STRATEGIES)
        woken_NRJ = np.concatenate([self.log_awake_RJ[None], waking_N[:, None, None] - before_NRJ])
        awake_NRJ = sums_NRJ + np.logaddexp.accumulate(woken_NRJ, axis=0)[1:]
        last = awake_NRJ[-1] if len(p) else self.log_awake_RJ
        return Evidence(self.bets + len(p), last), _log_values(awake_NRJ, bets_N[:, None])

    def to_json(self) -> dict[str, Any]:
        return {"bets": self.bets, "log_awake": [None if math.isinf(each) else float(each) for each in self.log_awake_RJ[0]]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Evidence:
        """Raises ValueError if the number of strategies is another: then the money is on bets that nobody knows any more."""
        money = [-math.inf if each is None else float(each) for each in value["log_awake"]]
        if len(money) != STRATEGIES:
            raise ValueError(f"evidence of {len(money)} strategies, and this code bets on {STRATEGIES}")
        return cls(int(value["bets"]), np.array([money]))


def _log_values(log_awake: Floats, bets: NDArray[np.int64]) -> Floats:
    """log of all money, from the strategies' along the last axis and the number of bets."""
    return np.asarray(np.logaddexp(np.logaddexp.reduce(log_awake, axis=-1), -0.5 * np.log1p(bets)), dtype=np.float64)


def no_evidence(repetitions: int = 1) -> Evidence:
    """E = 1: everything is in the mattress."""
    return Evidence(0, np.full((repetitions, STRATEGIES), -math.inf))
