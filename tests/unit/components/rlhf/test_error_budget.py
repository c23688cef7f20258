"""However often candidates are looked at, luck passes one at most as often as the budget says; and a better one still passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from components.rlhf.error_budget import Look, next_look, win_rate_interval, win_rate_low

BUDGET = 0.05
REPETITIONS, LOOKS, PROMPTS = 400, 50, 256


def spent_alphas(looks: int) -> list[float]:
    alphas: list[float] = []
    for _ in range(looks):
        alphas.append(next_look(BUDGET, alphas).alpha)
    return alphas


def test_the_first_looks_by_hand() -> None:
    assert next_look(0.06, []) == pytest.approx(Look(1, 0.03, 0.03, 0.06))
    assert next_look(0.06, [0.03]) == pytest.approx(Look(2, 0.01, 0.04, 0.06))
    assert next_look(0.06, [0.03, 0.01]) == pytest.approx(Look(3, 0.005, 0.045, 0.06))


def test_looks_never_spend_more_than_the_budget_though_it_is_changed_on_the_way() -> None:
    assert sum(spent_alphas(1000)) == pytest.approx(BUDGET * 1000 / 1001)
    assert next_look(0.05, [0.1]) == Look(2, 0.0, 0.1, 0.05)  # lowered below what is spent: nothing passes
    assert next_look(0.05, [0.045]) == pytest.approx(Look(2, 0.005, 0.05, 0.05))


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_a_candidate_that_is_no_better_passes_within_the_budget_where_the_naive_gate_passes_it(ties: float) -> None:
    """400 champions, each looked at 50 times with 256 prompts: true win rate one half."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(PROMPTS, [(1 - ties) / 2, ties, (1 - ties) / 2], (REPETITIONS, LOOKS))
    won, tied, lost = (counts[..., each] for each in range(3))
    passed = (win_rate_low(won, tied, lost, spent_alphas(LOOKS)) > 0.5).any(axis=1).sum()
    assert binomtest(int(passed), REPETITIONS, BUDGET, "greater").pvalue > 0.001
    deviation = np.sqrt(won + tied / 4 - (won + tied / 2) ** 2 / PROMPTS) / PROMPTS
    naive = ((won + tied / 2) / PROMPTS - 1.96 * deviation > 0.5).any(axis=1).mean()
    assert naive > 0.5, "the usual 95 % interval at every look"


def test_looks_that_share_their_prompts_stay_within_the_budget_too() -> None:
    """The same candidate again and again, on the same prompts, each with a chance of its own; over all prompts one half."""
    rng = np.random.default_rng(1)
    chances = rng.beta(0.5, 0.5, (REPETITIONS, 1, PROMPTS))
    won = (rng.random((REPETITIONS, LOOKS, PROMPTS)) < chances).sum(axis=2)
    passed = (win_rate_low(won, 0, PROMPTS - won, spent_alphas(LOOKS)) > 0.5).any(axis=1).sum()
    assert binomtest(int(passed), REPETITIONS, BUDGET, "greater").pvalue > 0.001


@pytest.mark.parametrize(
    ("rate", "look", "power"),  # as the README says
    [(0.6, 1, 0.877), (0.65, 1, 0.998), (0.65, 2, 0.993), (0.65, 10, 0.922), (0.6, 10, 0.406), (0.7, 50, 0.991)],
)
def test_a_better_candidate_still_passes(rate: float, look: int, power: float) -> None:
    won = np.arange(PROMPTS + 1)
    passes = win_rate_low(won, 0, PROMPTS - won, spent_alphas(look)[-1]) > 0.5
    assert binom.pmf(won, PROMPTS, rate)[passes].sum() == pytest.approx(power, abs=0.0006)


@pytest.mark.parametrize("alpha", [0.025, 0.002])
@pytest.mark.parametrize("shares", [(0.5, 0.0, 0.5), (0.3, 0.5, 0.2), (0.85, 0.1, 0.05), (0.02, 0.96, 0.02), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("prompts", [10, 80])
def test_either_end_is_wrong_as_often_as_it_says_at_most(alpha: float, shares: tuple[float, float, float], prompts: int) -> None:
    drawn = 40_000
    counts = np.random.default_rng(2).multinomial(prompts, shares, drawn)
    unique, times = np.unique(counts, axis=0, return_counts=True)
    low = win_rate_low(*unique.T, alpha)
    wrong = int(times[low > shares[0] + shares[1] / 2 + 1e-12].sum())
    assert binomtest(wrong, drawn, alpha, "greater").pvalue > 0.001


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 60)] * 3).filter(any), st.sampled_from([0.025, 0.001, 1e-6]))
def test_against_one_half_it_is_the_exact_sign_test(counts: tuple[int, int, int], alpha: float) -> None:
    won, tied, lost = counts
    p_value = binomtest(won, won + lost, 0.5, "greater").pvalue if won + lost else 1.0
    assert (win_rate_low(won, tied, lost, alpha) > 0.5) == (p_value < 0.9 * alpha)
    interval = win_rate_interval([1.0] * won + [0.5] * tied + [0.0] * lost, alpha)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    other = win_rate_interval([0.0] * won + [0.5] * tied + [1.0] * lost, alpha)
    assert (1 - other.high, 1 - other.low) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(("outcomes", "alpha"), [([], 0.02), ([1.0, math.nan], 0.02), ([1.0] * 9, 0.0), ([1.0] * 9, math.nan)])
def test_what_is_not_known_has_no_ends(outcomes: list[Any], alpha: float) -> None:
    assert all(math.isnan(each) for each in win_rate_interval(outcomes, alpha))


def test_other_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0, 0\.5 or 1, not 0\.7"):
        win_rate_interval([1.0, 0.7], 0.02)
