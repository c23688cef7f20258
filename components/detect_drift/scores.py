"""Scores of units: how strange one is (learned from reference units alone), and how much it looks like the new ones.

Shapes: N units, D features. A score is fixed before the units that it ranks are looked at: it learns from units that never enter
their bag (`ranks`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from components.detect_drift.betting import Floats

NEIGHBOURS = 5
COMPONENTS = 16  # principal components kept: with 500 units to learn from, more would be noise
RIDGE = 1.0  # of the classifier, on features of variance 1: a Gaussian prior of deviation 1 on each weight
NEWTON_STEPS = 12
CELLS = 4_000_000  # of a block of distances: 32 MB


class Standard(NamedTuple):
    """An affine map to features of variance 1: principal components of the text features, and the length as it is.

    Fields:
        mean_D, map_DC: features -> components, scaled to deviation 1 on the units that it was learned from.
    """

    mean_D: Floats
    map_DC: Floats

    def __call__(self, features_ND: Floats) -> Floats:
        return np.asarray((features_ND - self.mean_D) @ self.map_DC, dtype=np.float64)


def standardise(features_ND: Floats) -> Standard:
    """Learns the map. The last feature (log length) keeps an axis of its own: a principal component would drown it."""
    mean_D = features_ND.mean(axis=0)
    centred = features_ND - mean_D
    texts, length = centred[:, :-1], centred[:, -1]
    _, deviations, axes = np.linalg.svd(texts / np.sqrt(max(1, len(texts) - 1)), full_matrices=False)
    kept = min(COMPONENTS, int((deviations > 1e-6 * max(deviations[:1].max(initial=0.0), 1e-30)).sum()))
    map_DC = np.zeros((features_ND.shape[1], kept + 1))
    map_DC[:-1, :kept] = axes[:kept].T / deviations[:kept]
    map_DC[-1, -1] = 1 / max(float(length.std()), 1e-6)
    return Standard(mean_D, map_DC)


def novelty(points_NC: Floats, reference_MC: Floats) -> Floats:
    """Mean distance [N] to the nearest reference units: large where there were none. It knows many topics without being told.

    Papers: Ramaswamy 2000, "Efficient algorithms for mining outliers"; as a conformal score, Laxhammar and Falkman 2010.
    """
    near = min(NEIGHBOURS, len(reference_MC))
    squares_M = (reference_MC**2).sum(axis=1)
    found = np.empty(len(points_NC))
    rows = max(1, CELLS // max(1, len(reference_MC)))
    for first in range(0, len(points_NC), rows):
        block = points_NC[first : first + rows]
        distances = (block**2).sum(axis=1)[:, None] - 2 * block @ reference_MC.T + squares_M
        nearest = np.partition(distances, near - 1, axis=1)[:, :near]
        found[first : first + rows] = np.sqrt(np.maximum(nearest, 0)).mean(axis=1)
    return found


def classifier(old_NC: Floats, new_MC: Floats) -> Floats:
    """Weights [C + 1] of a logistic regression that tells new units from old ones, the intercept last; both sides weigh the same.

    Ridge, by Newton's method: a classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv 1610.06545) that keeps no one waiting.
    """
    x = np.concatenate([old_NC, new_MC])
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = np.repeat([0.0, 1.0], [len(old_NC), len(new_MC)])
    units = len(new_MC)  # evidence of the smaller side: the larger is scaled down to it
    weight = np.repeat([units / len(old_NC), 1.0], [len(old_NC), len(new_MC)])
    prior = np.full(x.shape[1], RIDGE)
    prior[-1] = 1e-3
    beta = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        gradient = x.T @ (weight * (y - p)) - prior * beta
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + np.diag(prior)
        step = np.linalg.solve(hessian, gradient)
        beta = beta + step
        if np.abs(step).max() < 1e-4:
            break
    return beta


def classify(points_NC: Floats, beta: Floats) -> Floats:
    """Log-odds [N] of being new."""
    return np.asarray(points_NC @ beta[:-1] + beta[-1], dtype=np.float64)
