"""Tests that learn: what they say does not depend on how units are cut into looks, survives storage, and finds what is there."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from components.detect_drift import watch
from components.detect_drift.scores import classifier, classify, novelty, standardise
from components.detect_drift.watch import Learned, Ranked, chance

KEYS = [f"unit {i}" for i in range(120)]
KINDS = ["train" if i % 7 else "test" for i in range(120)]


def points(shift: float, seed: int = 0, units: int = 120) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(units, 4))
    found[:, 0] += shift
    return found


def learned() -> Learned:
    old = points(0, 1, 200)
    return Learned("prompts: classifier", 0.01, old[:100], ["train"] * 100, old[100:])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 119), max_size=5))
def test_evidence_does_not_depend_on_the_looks(cuts: list[int]) -> None:
    new = points(1.0)
    whole, cut = learned(), learned()
    bets = whole.look(KEYS, KINDS, new)
    pieces = []
    ends = sorted({0, *cuts, 120})
    for first, last in pairwise(ends):
        pieces += cut.look(KEYS[first:last], KINDS[first:last], new[first:last])
        cut = Learned.restore(cut.name, json.loads(json.dumps(cut.facts())), load(save(cut.arrays())))  # and survives storage
    assert [bet.p for bet in pieces] == [bet.p for bet in bets]
    assert cut.log_evidence == pytest.approx(whole.log_evidence, rel=1e-9)
    assert cut.highest == pytest.approx(whole.highest, rel=1e-9)
    assert cut.limit == whole.limit == pytest.approx(math.log(100))


def test_a_unit_that_teaches_is_never_ranked_and_each_is_one_of_both() -> None:
    test = learned()
    bets = test.look(KEYS, KINDS, points(1.0))
    teaching = {key for key in KEYS if chance("side of prompts: classifier", key) <= 0.5}
    assert not teaching & {bet.key for bet in bets}
    assert len(test.arrays()["new"]) == len(teaching)
    assert len(test.arrays()["points"]) == 100 + len(KEYS) - len(teaching)


def test_a_shift_is_found_and_stays_found_and_none_is_not() -> None:
    shifted, quiet = learned(), learned()
    shifted.look(KEYS, KINDS, points(2.5))
    quiet.look(KEYS, KINDS, points(0.0))
    assert shifted.alarmed
    assert shifted.effect()[1] > 0.8
    assert not quiet.alarmed
    assert quiet.effect()[1] < 0.5 < quiet.effect()[2]
    more = [f"later {i}" for i in range(400)]
    shifted.look(more, ["train"] * 400, points(0.0, 9, 400))
    assert shifted.alarmed, "an alarm stays an alarm"
    assert shifted.log_evidence < shifted.highest


def test_ranked_tests_survive_storage_and_gains_add_up() -> None:
    test = Ranked("raters: mix", 0.02, [""] * 60, np.arange(60.0))
    bets = test.look(KEYS, [""] * 120, np.full(120, 59.5))
    assert sum(bet.gain for bet in bets) == pytest.approx(test.log_evidence, rel=1e-9)
    again = Ranked.restore(test.name, json.loads(json.dumps(test.facts())), load(save(test.arrays())))
    assert again.look(["x"], [""], np.array([10.0])) == test.look(["x"], [""], np.array([10.0]))
    assert again.effect() == test.effect()


def test_false_alarms_of_a_learning_test_stay_below_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 streams of 150 units against references of 60 + 60, at alpha 0.2: an inflated error would show."""
    alarms = 0
    for repetition in range(100):
        monkeypatch.setattr(watch, "chance", lambda purpose, key, r=repetition: chance(f"{r} {purpose}", key))
        every = points(0, repetition, 270)
        test = Learned("t", 0.2, every[:60], [""] * 60, every[60:120])
        test.look([str(i) for i in range(150)], [""] * 150, every[120:])
        alarms += test.alarmed
    assert alarms <= 28  # 0.2 x 100 and two standard errors


def test_the_alarm_fails_closed_on_what_is_not_a_number() -> None:
    test = Ranked("raters: mix", 0.02, [""] * 30, np.arange(30.0))
    test.highest = math.nan
    assert test.alarmed


def test_novelty_is_the_mean_distance_to_the_nearest_by_hand() -> None:
    reference = np.array([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0]])
    assert novelty(np.array([[0.0, 0.0], [10.0, 0.0]]), reference) == pytest.approx([(0 + 1 + 10) / 3, (0 + 10 + 101**0.5) / 3])
    many = points(0, 3, 300)
    one_by_one = [np.sort(np.linalg.norm(many[:200] - point, axis=1))[:5].mean() for point in many[200:]]
    np.testing.assert_allclose(novelty(many[200:], many[:200]), one_by_one, rtol=1e-6)


def test_the_classifier_is_at_the_optimum_of_its_loss() -> None:
    old, new = points(0, 1), points(1.5, 2, 60)
    beta = classifier(old, new)

    def loss(weights: np.ndarray) -> float:
        a = np.logaddexp(0, classify(old, weights)).sum() * 60 / 120 + np.logaddexp(0, -classify(new, weights)).sum()
        return float(a + 0.5 * (weights[:-1] ** 2).sum() + 0.5e-3 * weights[-1] ** 2)

    for direction in np.eye(5):
        assert loss(beta) < min(loss(beta + 0.01 * direction), loss(beta - 0.01 * direction))


def test_features_are_standardised_and_constant_ones_do_no_harm() -> None:
    features = np.random.default_rng(0).normal(3, 5, (200, 6))
    features[:, 2] = 7.0
    out = standardise(features)(features)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(out.std(0), 1, rtol=0.01)
    assert np.isfinite(standardise(np.ones((30, 4)))(np.ones((30, 4)))).all()
