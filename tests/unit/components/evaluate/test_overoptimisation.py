"""Gao's form is found again from points that it made; the gap against numbers worked by hand; what is not finite is not known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluate.measures import Answer
from components.evaluate.overoptimisation import (
    LEAST_UPDATES,
    deviations_of,
    fit_gao,
    fit_training,
    measure_gap,
    overoptimisation_section,
)
from components.rlhf.gate import RULES, decide


def answers(reward: Any, judge: Any) -> list[Answer]:
    return [
        Answer(f"a {i}", 3, True, {"reward": float(r), "judge": float(j)})
        for i, (r, j) in enumerate(zip(reward, judge, strict=True))
    ]


def gao(d: Any, start: float, alpha: float, beta: float) -> list[float]:
    return [start + x * (alpha - beta * math.log(x)) if x > 0 else start for x in d]


@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(-2, 2), st.integers(LEAST_UPDATES, 60))
def test_points_of_the_form_give_its_numbers_again(start: float, alpha: float, beta: float, updates: int) -> None:
    d = np.linspace(0, 3, updates)
    fit = fit_gao(d, gao(d, start, alpha, beta))
    assert fit is not None
    assert (fit.start, fit.alpha, fit.beta) == pytest.approx((start, alpha, beta), abs=1e-6)
    assert fit.error == pytest.approx(0, abs=1e-6)
    assert fit.at(d) == pytest.approx(gao(d, start, alpha, beta), abs=1e-6)
    if beta > 0.1:
        around = fit.at([0.9 * fit.peak, fit.peak, 1.1 * fit.peak])
        assert around[1] == around.max()


def test_a_reward_that_only_rises_has_no_peak() -> None:
    d = np.linspace(0, 3, 20)
    fit = fit_gao(d, d**2)
    assert fit is not None
    assert fit.beta < 0
    assert math.isnan(fit.peak)


def test_noise_moves_the_fit_little() -> None:
    d = np.sqrt(np.linspace(0, 9, 60))
    noisy = np.array(gao(d, 0.5, 1.2, 0.7)) + np.random.default_rng(0).normal(0, 0.1, 60)
    fit = fit_gao(d, noisy)
    assert fit is not None
    assert fit.peak == pytest.approx(math.exp(1.2 / 0.7 - 1), rel=0.15)
    assert fit.error == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize(
    ("d", "reward"),
    [
        ([], []),
        (range(5), range(5)),  # too few
        ([1.0] * 20, range(20)),  # the KL never moved
        ([math.nan] * 20, range(20)),
        ([-1.0] * 20, range(20)),
        (range(20), [math.inf] * 20),
    ],
)
def test_what_tells_nothing_is_not_fitted(d: Any, reward: Any) -> None:
    assert fit_gao(list(d), list(reward)) is None


def test_updates_that_are_not_finite_are_left_out() -> None:
    d = np.linspace(0, 3, 20)
    reward = gao(d, 0, 1, 0.5)
    reward[7] = math.nan
    fit = fit_gao(d, reward)
    assert fit is not None
    assert fit.updates == 19


def test_the_gap_by_hand() -> None:
    sft = answers([0, 2, 0, 2] * 5, [0, 0, 20, 20] * 5)  # deviations 1 and 10
    candidate = answers([2, 4, 2, 4] * 5, [5, 5, 25, 25] * 5)  # gains of 2 and 5, so 2 and 0.5 deviations
    found = measure_gap(candidate, sft, 0, 100)
    assert deviations_of(sft) == {"reward": 1.0, "judge": 10.0}
    assert {name: each["value"] for name, each in found.items()} == pytest.approx(
        {"reward_gain": 2.0, "judge_gain": 0.5, "overoptimisation_gap": 1.5}
    )


def test_the_gaps_interval_covers_the_true_one() -> None:
    """Both scorers see the same quality with an error each; the candidate gains 1, and 0.6 of it in the reward's error alone."""
    rng = np.random.default_rng(0)
    covered = 0
    true = (1.0 - 0.4) / math.sqrt(2)
    for seed in range(60):
        quality, errors = rng.normal(size=120), rng.normal(size=(4, 120))
        sft = answers(quality + errors[0], quality + errors[1])
        better = rng.normal(size=120)
        found = measure_gap(answers(better + 1 + errors[2], better + 0.4 + errors[3]), sft, seed, 200)["overoptimisation_gap"]
        assert found["low"] is not None
        assert found["high"] is not None
        covered += found["low"] <= true <= found["high"]
    assert 51 <= covered, "of 60 at 95 %"


RULE = next(rule for rule in RULES if rule.measure == "overoptimisation_gap")


@pytest.mark.parametrize(
    ("candidate", "sft"),
    [
        (answers([1, math.nan, 2], [1, 2, 3]), answers([1, 2, 3], [1, 2, 3])),
        (answers([1, 2, 3], [1, 2, 3]), answers([1, 2, 3], [1, math.inf, 3])),
        (answers([1, 2, 3], [1, 2, 3]), answers([1, 1, 1], [1, 2, 3])),  # no deviation to measure with
        (answers([1], [1]), answers([0], [0])),
    ],
)
def test_a_gap_that_is_not_known_fails_the_gate(candidate: list[Answer], sft: list[Answer]) -> None:
    found = measure_gap(candidate, sft, 0, 100)
    assert found["overoptimisation_gap"] == {"value": None, "low": None, "high": None}
    rows = {row["measure"]: row["verdict"] for row in decide(found, {RULE.threshold: 1.0})[0]}
    assert rows[RULE.measure] == "fail"


def test_the_gate_looks_at_the_upper_end() -> None:
    sft = answers(np.arange(40) % 4, np.arange(40) % 5)
    found = measure_gap(answers(np.arange(40) % 4 + 1, np.arange(40) % 5), sft, 0, 200)
    high = found["overoptimisation_gap"]["high"]
    assert high is not None
    verdicts = []
    for threshold in (high, high - 1e-6):
        rows = {row["measure"]: row["verdict"] for row in decide(found, {RULE.threshold: threshold})[0]}
        verdicts.append(rows[RULE.measure])
    assert verdicts == ["pass", "fail"]


def test_the_section_shows_fits_of_ppo_and_says_where_there_are_none() -> None:
    d = np.linspace(0, 3, 20)
    training = [
        {"update": i, "kl_reference": x**2, "reward": r, "judge_reward": j, "chosen": i == 12}
        for i, (x, r, j) in enumerate(zip(d, gao(d, 1, 2, 0.2), gao(d, 0, 2, 1.0), strict=True))
    ]
    deviations = {"reward": 2.0, "judge": 0.5}
    fits = fit_training(training, deviations)
    assert fits["judge"]["peak"] == pytest.approx(math.e)
    assert (fits["reward"]["alpha"], fits["judge"]["alpha"]) == pytest.approx((1.0, 4.0))
    sft = answers([0, 2, 0, 2] * 5, [0, 0, 20, 20] * 5)
    evaluation = {"measures": measure_gap(sft, sft, 0, 100), "overoptimisation": {"fits": fits, "deviations": deviations}}
    section = overoptimisation_section(evaluation, training)
    assert section.tables[1].rows[1][-1] == pytest.approx(d[12])
    assert section.tables[1].rows[1][3] == pytest.approx(math.e)
    assert section.tables[1].rows[0][3] == "beyond 3, not reached", "the reward's would be at 8103"
    assert "chosen update" in section.figures[0]
    dpo = [{"step": i, "margin": 0.1} for i in range(20)]
    assert fit_training(dpo, deviations) == {}
    empty = {"measures": evaluation["measures"], "overoptimisation": {"fits": {}, "deviations": deviations}}
    assert "There is no curve to fit" in overoptimisation_section(empty, dpo).paragraphs[1]
