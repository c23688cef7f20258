"""Raters whose faults are known are found, and good ones are left alone."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from components.rlhf.cluster_sums import add_trials, empty_sums
from components.rlhf.records import Ranking
from components.simulated_world.generate import simulate_rankings
from components.validate_data.comparisons import Comparisons
from components.validate_data.raters import RANDOM, at_random_level, copying_pairs, median_gaps, predicted_agreement
from components.validate_data.stage import Config
from tests.unit.components.validate_data.snapshots import facts_of, ranking

RIGHT = 0.85  # of good raters: two of them agree on 0.745 of all comparisons


def pool(seed: int, raters: int, prompts: int, right: dict[int, float], copies: dict[int, int]) -> Comparisons:
    """Sums of raters who decide one pair of each prompt: right with their own probability, or what another one said."""
    rng = np.random.default_rng(seed)
    said = rng.random((raters, prompts)) < np.array([right.get(number, RIGHT) for number in range(raters)])[:, None]
    for copier, original in copies.items():
        said[copier] = np.where(rng.random(prompts) < 0.95, said[original], said[copier])
    sums = Comparisons([prompts] * raters, [], False)
    rows = []
    for a, b in combinations(range(raters), 2):
        shared = np.flatnonzero(rng.random(prompts) < 0.3)
        rows.append(np.stack([np.full_like(shared, a), np.full_like(shared, b), shared, said[a, shared] == said[b, shared]]))
    one, other, prompt, same = np.concatenate(rows, axis=1)
    add_trials(sums.between.reshape(-1, 6), one * raters + other, prompt, same)
    add_trials(sums.by_rater["agreement"], np.concatenate([one, other]), np.tile(prompt, 2), np.tile(same, 2))
    return sums


def test_the_prediction_by_hand() -> None:
    """Right with 0.9 and 0.7 among raters right with 0.8: they agree with the others on 0.74 and 0.62, and with each other 0.66."""
    assert predicted_agreement(0.74, 0.62, 0.68) == pytest.approx(0.9 * 0.7 + 0.1 * 0.3)
    assert predicted_agreement(0.68, 0.68, 0.68) == pytest.approx(0.68), "two average raters agree as any two do"
    assert predicted_agreement(0.5, 0.9, 0.8) == 0.5, "nobody agrees with a coin"
    assert predicted_agreement(0.95, 0.95, 0.6) == 1
    assert predicted_agreement(0.6, 0.7, 0.5) == 0.7, "among coins nothing can be predicted"


def test_a_rater_who_tosses_coins_is_found_and_copiers_are() -> None:
    sums = pool(seed=1, raters=8, prompts=300, right={2: 0.5}, copies={5: 4})
    assert at_random_level(sums.by_rater["agreement"]) == ([2], 8)
    found, tested = copying_pairs(sums)
    assert tested == 28
    assert [(each.one, each.other) for each in found] == [(4, 5)]
    assert found[0].agreement.value > 0.9
    assert found[0].predicted < 0.85


def test_a_pool_of_good_raters_gets_a_flag_of_a_kind_one_time_in_twenty_at_most() -> None:
    """60 pools; the chance of more than 8 with a flag is below 0.3 % at a rate of 5 %."""
    pools = [pool(seed, raters=6, prompts=60, right={5: 0.95}, copies={}) for seed in range(60)]
    assert sum(bool(at_random_level(each.by_rater["agreement"])[0]) for each in pools) <= 8
    assert sum(bool(copying_pairs(each)[0]) for each in pools) <= 8


def test_few_comparisons_and_a_pool_of_coins_prove_nothing() -> None:
    few = pool(seed=1, raters=8, prompts=9, right={2: 0.5}, copies={5: 4})
    assert at_random_level(few.by_rater["agreement"])[0] == []
    assert copying_pairs(few)[0] == []
    coins = pool(seed=2, raters=5, prompts=200, right=dict.fromkeys(range(5), 0.5), copies={})
    assert at_random_level(coins.by_rater["agreement"])[0] == [], "no worse than the others"
    alone = Comparisons([10, 10], [], False)
    assert at_random_level(alone.by_rater["agreement"]) == ([], 0)
    assert copying_pairs(alone) == ([], 0)


def test_two_raters_alone_are_not_called_copiers() -> None:
    """There is nobody else whose agreement with them could say what to expect."""
    sums = pool(seed=1, raters=2, prompts=300, right={}, copies={1: 0})
    assert copying_pairs(sums) == ([], 1)


def test_gaps_between_rankings_by_hand() -> None:
    first = (np.array([0, 0, 0, 0, 2]), np.array([0.0, 10.0, 30.0, 10_000.0, 5.0]))  # gaps 10, 20, and a pause
    second = (np.array([1, 1]), np.array([100.0, 107.0]))
    assert median_gaps([first, second], 4)[:2].tolist() == [15.0, 7.0]
    assert all(map(math.isnan, median_gaps([first, second], 4)[2:]))


def many(rater: str, number: int, longer_wins: bool) -> list[Ranking]:
    """60 pairs, of which the longer one wins in nine of ten, or in one; each of both is shown first in half of them."""
    rankings = []
    for i in range(60):
        texts = ["short", f"longer {i}"] if i % 20 < 10 else [f"longer {i}", "short"]
        wins = longer_wins == (i % 10 > 0)
        rankings.append(
            ranking(
                1000 * number + i,
                rater_id=rater,
                completions=texts,
                ranks=[1 if text.startswith("longer") == wins else 2 for text in texts],
                collected_at=f"2026-01-01T00:{i // 2:02}:{30 * (i % 2):02}Z",
            )
        )
    return rankings


def test_the_facts_of_raters_by_hand() -> None:
    rankings = [*many("ann", 1, True), *many("bob", 2, False), ranking(0, rater_id="new"), ranking(9000, rater_id="unknown")]
    facts = facts_of(rankings, config=Config())
    raters = {rater.name: rater for rater in facts.pool.raters}
    assert [rater.name for rater in facts.pool.raters] == ["ann", "bob", "new"], "most rankings first; nobody is no rater"
    assert (raters["ann"].rankings, raters["ann"].fraction, raters["ann"].seconds) == (60, 60 / 122, 30)
    assert raters["ann"].shares["longer"].value == 0.9
    assert list(raters["ann"].flags) == ["prefers the longer"]
    assert list(raters["bob"].flags) == ["prefers the shorter"]
    assert list(raters["new"].flags) == ["fewer than 20 rankings"]
    assert facts.whole["small_rater_fraction"] == 1 / 122
    assert facts.whole["largest_rater_fraction"] == 60 / 122
    assert facts.whole["raters"] == 4
    assert "random_rater_fraction" in facts.unknown
    assert "10 prompts in common" in facts.unknown["copying_fraction"]


def test_in_the_simulated_world_the_careless_rater_is_found_and_nobody_else() -> None:
    rows = [ranking(number, **record) for number, record in enumerate(simulate_rankings(3000, seed=0))]
    facts = facts_of(rows, config=Config())
    assert {rater.name: list(rater.flags) for rater in facts.pool.raters if rater.flags} == {"rater-12": [RANDOM]}
    assert facts.whole["random_rater_fraction"] == pytest.approx(sum(row.rater_id == "rater-12" for row in rows) / 3000)
    assert facts.whole["copying_fraction"] == 0
    assert facts.estimates["other_language_fraction"].value == 0


def test_sums_of_one_owner_are_not_those_of_another() -> None:
    sums = empty_sums(2)
    add_trials(sums, [0, 1], np.array([0, 0]), [1, 0])
    assert sums[:, :2].tolist() == [[1, 1], [0, 1]]
