"""Shares of clustered trials from six sums per owner: exact over any number of trials, in memory that does not grow with them.

Pairs of one ranking, and rankings of one prompt, are not independent, so a prompt is a cluster. The variance of a share is the
ratio estimator's over clusters; the interval is Wilson's at the effective number of trials that this variance stands for, with
Student's factor for few clusters (Korn and Graubard 1998, Survey Methodology 24, 193; Wilson's instead of Clopper's interval as in
Franco et al. 2019, doi 10.1093/jssam/smy019).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from components.rlhf.statistics import UNKNOWN, Estimate, Floats

HITS, TRIALS, HITS_SQUARED, HITS_TRIALS, TRIALS_SQUARED, CLUSTERS = range(6)


def empty_sums(*owners: int) -> Floats:
    """Sums [..., 6] of owners who have no trial yet."""
    return np.zeros((*owners, 6))


def add_trials(sums: Floats, owner: ArrayLike, cluster: NDArray[np.int64], hit: ArrayLike) -> None:
    """Adds trials [N] to the sums [owners, 6] in place. All trials of a cluster must come in one call.

    Args:
        owner: number of the owner of each trial, such as its rater.
        cluster: number of its cluster, from 0.
        hit: 1 where it succeeded, else 0.
    """
    if not len(cluster):
        return
    width = int(cluster.max()) + 1
    keys, group = np.unique(np.asarray(owner, dtype=np.int64) * width + cluster, return_inverse=True)
    hits, trials = np.bincount(group, weights=np.asarray(hit, dtype=np.float64)), np.bincount(group).astype(np.float64)
    moments = np.stack([hits, trials, hits * hits, hits * trials, trials * trials, np.ones_like(hits)], axis=1)
    np.add.at(sums, keys // width, moments)


def share(sums: Floats, error: float = 0.05) -> Estimate:
    """The share of hits of one owner, with its interval at 1 - `error`; NaN without a trial.

    Args:
        sums: [6].
        error: chance that the interval misses the truth; divide it by the number of intervals that are looked at together.
    """
    hits, trials, hits_squared, hits_trials, trials_squared, clusters = (float(each) for each in sums)
    if trials == 0 or not all(map(math.isfinite, sums)):
        return UNKNOWN
    value = hits / trials
    effective = effective_trials(value, hits_squared - 2 * value * hits_trials + value**2 * trials_squared, trials, clusters, error)
    z2 = _normal_quantile(error) ** 2
    centre = (value + z2 / (2 * effective)) / (1 + z2 / effective)
    half = math.sqrt(z2) / (1 + z2 / effective) * math.sqrt(value * (1 - value) / effective + z2 / (4 * effective**2))
    return Estimate(value, min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half)))


def effective_trials(value: float, residual: float, trials: float, clusters: float, error: float) -> float:
    """Independent trials that tell as much as these; at most the clusters where all clusters have the same share.

    Args:
        residual: sum over clusters of (hits - value * trials)^2.
    """
    from scipy.stats import t

    if clusters < 2:
        return 1.0
    variance = max(0.0, residual) / trials**2 * clusters / (clusters - 1)
    independent = min(trials, value * (1 - value) / variance) if variance > 1e-15 else clusters
    return float(independent * (t.isf(error / 2, max(1.0, trials - 1)) / t.isf(error / 2, clusters - 1)) ** 2)


def _normal_quantile(error: float) -> float:
    from scipy.stats import norm

    return float(norm.isf(error / 2))
