"""The evidence is a test martingale: checked by integration, by exact enumeration, and by counting false alarms."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.detect_drift.betting import POWERS, STRATEGIES, Evidence, log_densities, no_evidence
from components.detect_drift.ranks import Bag, auc, p_value


def test_every_density_has_mean_one() -> None:
    """Exactly: steps are constant between edges, and a power becomes constant where p = u^(1/e)."""
    edges = np.array([0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 1])
    middles = (edges[:-1] + edges[1:]) / 2
    steps = np.exp(log_densities(middles)[:, : STRATEGIES - len(POWERS)])
    np.testing.assert_allclose((steps * np.diff(edges)[:, None]).sum(0), 1, rtol=1e-12)
    u = (np.arange(1000) + 0.5) / 1000
    for place, power in enumerate(POWERS):
        p = u ** (1 / power)  # where the integrand f(p) dp/du is constant
        f = np.exp(log_densities(p)[:, STRATEGIES - len(POWERS) + place])
        np.testing.assert_allclose(f * u ** (1 / power - 1) / power, 1, rtol=1e-9)


def test_the_evidence_is_worked_by_hand_for_two_bets() -> None:
    f = np.exp(log_densities([0.03, 0.5]))
    first, second = 1 - 2**-0.5, 2**-0.5 - 3**-0.5
    expected = first * (f[0] * f[1]).mean() + second * f[1].mean() + 3**-0.5
    value = no_evidence().bet([0.03]).bet([0.5]).log_value_R[0]
    assert math.exp(value) == pytest.approx(expected, rel=1e-12)


def test_many_bets_at_once_are_as_one_after_the_other() -> None:
    p = np.random.default_rng(5).uniform(0.001, 1, (40, 3))
    one = no_evidence(3)
    values = []
    for each in p:
        one = one.bet(each)
        values.append(one.log_value_R)
    first, head = no_evidence(3).bets_on(p[:17])
    last, tail = first.bets_on(p[17:])
    np.testing.assert_allclose(np.concatenate([head, tail]), values, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(last.log_awake_RJ, one.log_awake_RJ, rtol=1e-10)
    nothing, none = last.bets_on(p[:0])
    assert none.shape == (0, 3)
    assert nothing.bets == last.bets == 40


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0, 4.0), (1.0, 1.0, 2.0, 2.0)])
def test_its_expectation_is_one_by_enumerating_all_orders(values: tuple[float, ...]) -> None:
    """All 24 orders of 4 units, two of them reference, and 60 x 60 tie breakers: the mean of E is 1, with ties, too."""
    u = (np.arange(60) + 0.5) / 60
    thetas, weights = u ** (1 / POWERS[0]), u ** (1 / POWERS[0] - 1) / POWERS[0] / 60  # dense near 0, where densities are high

    @cache
    def mean_after(places: tuple[tuple[int, int, int], ...]) -> float:
        (a, b), (first, second) = np.meshgrid(*[p_value(*place, thetas) for place in places]), np.meshgrid(weights, weights)
        values = no_evidence(a.size).bet(a.ravel()).bet(b.ravel()).log_value_R
        return float((np.exp(values) * (first * second).ravel()).sum())

    def place(order: tuple[float, ...], n: int) -> tuple[int, int, int]:
        return sum(each > order[n] for each in order[:n]), sum(each == order[n] for each in order[:n]), n

    means = [mean_after((place(order, 2), place(order, 3))) for order in permutations(values)]
    assert max(means) > 1.5
    assert np.mean(means) == pytest.approx(1, abs=0.02)


def test_the_ranks_of_a_bag_are_uniform_and_independent_by_enumeration() -> None:
    """Of 120 orders of 5 different scores with 2 in the reference, each triple of places of the other three comes equally often."""
    seen: dict[tuple[int, ...], int] = {}
    for order in permutations(range(5)):
        bag = Bag([""] * 2, order[:2])
        triple = tuple(round(bag.test("", float(score), 1.0) * (n + 1)) for n, score in enumerate(order[2:], 2))
        seen[triple] = seen.get(triple, 0) + 1
    assert len(seen) == 3 * 4 * 5
    assert set(seen.values()) == {2}, "120 orders over 60 triples"
    assert Fraction(sum(seen.values()), len(seen)) == 2


def test_categories_are_ranked_among_themselves() -> None:
    bag = Bag(["a", "a", "b"], [1.0, 2.0, 50.0])
    assert bag.test("a", 3.0, 1.0) == pytest.approx(1 / 3)
    assert bag.test("b", 3.0, 1.0) == pytest.approx(1.0)
    assert bag.test("c", 3.0, 0.25) == pytest.approx(0.25), "alone: nothing to compare with"


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.01, 1))
def test_a_p_value_is_in_the_unit_interval_and_falls_with_the_score(scores: list[float], theta: float) -> None:
    low, high = Bag([""] * len(scores), scores), Bag([""] * len(scores), scores)
    assert 0 < high.test("", 6.0, theta) <= low.test("", -6.0, theta) <= 1


def test_false_alarms_over_many_looks_stay_below_alpha_with_a_small_reference() -> None:
    """300 streams of 250 units against references of 50, watched after every unit: the trap of a finite reference."""
    generator = np.random.default_rng(0)
    streams, reference, units = 300, 50, 250
    scores = generator.normal(size=(streams, reference + units))
    evidence, highest = no_evidence(streams), np.zeros(streams)
    for n in range(reference, reference + units):
        p = ((scores[:, :n] > scores[:, n, None]).sum(1) + generator.uniform(size=streams)) / (n + 1)
        evidence = evidence.bet(p)
        highest = np.maximum(highest, evidence.log_value_R)
    assert (highest >= math.log(20)).mean() <= 0.05
    fixed = no_evidence(streams)
    alarms = np.zeros(streams, dtype=bool)
    for n in range(reference, reference + units):  # what must not be done: the same 50, again and again
        p = ((scores[:, :reference] > scores[:, n, None]).sum(1) + generator.uniform(size=streams)) / (reference + 1)
        fixed = fixed.bet(p)
        alarms |= fixed.log_value_R >= math.log(20)
    assert alarms.mean() > 0.1


def test_a_drift_that_begins_late_costs_what_the_prior_says() -> None:
    p = np.random.default_rng(1).uniform(size=1500)
    quiet = no_evidence()
    for each in p:
        quiet = quiet.bet([each])
    early, late, bets = no_evidence(), quiet, {"early": 0, "late": 0}
    while early.log_value_R[0] < math.log(160):
        early, bets["early"] = early.bet([0.004]), bets["early"] + 1
    while late.log_value_R[0] < math.log(160):
        late, bets["late"] = late.bet([0.004]), bets["late"] + 1
    assert bets["early"] <= 3
    assert bets["late"] <= bets["early"] + 4


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_what_is_no_p_value_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p-values are in"):
        no_evidence().bet([p])


def test_evidence_survives_json_and_other_strategies_are_refused() -> None:
    evidence = no_evidence().bet([0.01]).bet([0.7])
    again = Evidence.from_json(json.loads(json.dumps(evidence.to_json())))
    assert again.bet([0.2]).log_value_R[0] == evidence.bet([0.2]).log_value_R[0]
    assert Evidence.from_json(no_evidence().to_json()).log_value_R[0] == 0
    with pytest.raises(ValueError, match="evidence of 3 strategies"):
        Evidence.from_json({"bets": 1, "log_awake": [0, 0, 0]})


def test_auc_by_hand_and_its_interval_holds_the_truth() -> None:
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 3.0]))[0] == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(100):
        value, low, high = auc(generator.normal(1, 1, 80), generator.normal(0, 1, 60), seed=seed)
        held += low <= 0.7602 <= high
        assert low <= value <= high
    assert held >= 88
    assert all(map(math.isnan, auc(np.array([]), np.array([1.0]))))
