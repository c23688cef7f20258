"""Shares from sums: by hand, against Wilson's formula, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from components.rlhf.cluster_sums import add_trials, empty_sums, share
from components.rlhf.statistics import wilson_interval


def test_the_sums_by_hand() -> None:
    """Clusters 0 and 1 of owner 0 with 2 of 3 and 0 of 1 hits; cluster 1 of owner 1 with 1 of 1."""
    sums = empty_sums(2)
    add_trials(sums, [0, 0, 0, 0, 1], np.array([0, 0, 0, 1, 1]), [1, 1, 0, 0, 1])
    assert sums.tolist() == [[2, 4, 4, 6, 10, 2], [1, 1, 1, 1, 1, 1]]
    add_trials(sums, [], np.array([], dtype=int), [])
    assert sums[0, 1] == 4


def test_the_interval_by_hand() -> None:
    """Three clusters with 3 of 4, 1 of 2 and 2 of 2: share 3/4, residuals 0, -1/2 and 1/2, variance (1/2) / 64 * 3/2."""
    sums = empty_sums(1)
    add_trials(sums, np.zeros(8, int), np.array([0, 0, 0, 0, 1, 1, 2, 2]), [1, 1, 1, 0, 1, 0, 1, 1])
    effective = (3 / 4 * 1 / 4) / (0.5 / 64 * 3 / 2)
    effective = min(8, effective) * (t.isf(0.025, 7) / t.isf(0.025, 2)) ** 2
    found = share(sums[0])
    expected = wilson_interval(0.75 * effective, effective)
    assert found == pytest.approx(tuple(expected))


def test_what_cannot_be_known_is_not() -> None:
    assert all(map(math.isnan, share(empty_sums(1)[0])))
    broken = empty_sums(1)
    add_trials(broken, [0], np.array([0]), [math.nan])
    assert all(map(math.isnan, share(broken[0])))
    one = empty_sums(1)
    add_trials(one, np.zeros(100, int), np.zeros(100, dtype=int), np.ones(100))
    assert share(one[0]).low < 0.25, "one prompt is one, however many pairs it has"


def test_clusters_that_are_all_alike_are_as_many_trials_as_clusters() -> None:
    sums = empty_sums(1)
    add_trials(sums, np.zeros(60, int), np.repeat(np.arange(20), 3), np.ones(60))
    factor = (t.isf(0.025, 59) / t.isf(0.025, 19)) ** 2
    assert share(sums[0]).low == pytest.approx(wilson_interval(20 * factor, 20 * factor).low)


@pytest.mark.parametrize(("clusters", "size", "value", "correlation"), [(10, 6, 0.6, 0.3), (60, 4, 0.85, 0.2)])
def test_the_interval_covers_the_truth_about_95_times_in_100(clusters: int, size: int, value: float, correlation: float) -> None:
    rng, repetitions, missed = np.random.default_rng(0), 600, 0
    a, b = value * (1 / correlation - 1), (1 - value) * (1 / correlation - 1)
    for _ in range(repetitions):
        cluster = np.repeat(np.arange(clusters), rng.integers(1, size + 1, clusters))
        sums = empty_sums(1)
        add_trials(sums, np.zeros_like(cluster), cluster, rng.random(len(cluster)) < rng.beta(a, b, clusters)[cluster])
        found = share(sums[0])
        missed += not found.low <= value <= found.high
    assert missed / repetitions < 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5
    assert missed > 0


def test_a_smaller_error_makes_a_wider_interval() -> None:
    sums = empty_sums(1)
    add_trials(sums, np.zeros(200, int), np.arange(200) // 2, np.arange(200) % 3 == 0)
    wide, narrow = share(sums[0], 0.001), share(sums[0], 0.05)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
