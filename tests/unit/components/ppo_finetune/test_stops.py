"""When PPO refuses, stops, fails, and which policy it keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components.ppo_finetune.stage import Config
from components.ppo_finetune.watch import check, keep_best, over_optimised
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings

FINE = {"update": 3, "reward": 0.1, "kl_reference": 2.0, "same_answer_fraction": 0.1, "kl_sampler": 1e-4, "logprob_mismatch": 0.1}


@pytest.mark.parametrize("key", ["top_k", "top_p", "repetition_penalty"])
def test_line_16_other_sampling_than_temperature_is_refused(key: str) -> None:
    with pytest.raises(DoNotRetry, match=f"ppo_finetune.{key}: there is no such key"):
        parse_settings(Config, {key: 0.9}, "ppo_finetune")


def test_line_36_each_failure_says_which_it_was() -> None:
    config = Config()
    check(config, FINE)
    with pytest.raises(DoNotRetry, match=r"diverged at update 3: reward not finite"):
        check(config, {**FINE, "reward": float("nan")})
    with pytest.raises(DoNotRetry, match=r"KL blow-up at update 3: 51.0 nats"):
        check(config, {**FINE, "kl_reference": 51.0})
    with pytest.raises(DoNotRetry, match=r"collapse at update 3: 60% of the completions"):
        check(config, {**FINE, "same_answer_fraction": 0.6})


def test_line_22_rollouts_of_another_policy_end_the_run() -> None:
    with pytest.raises(
        DoNotRetry, match=r"rollouts at update 3 are not the policy's: 0.453 nats per token.*largest difference 2.59"
    ):
        check(Config(), {**FINE, "kl_sampler": 0.453, "logprob_mismatch": 2.587})
    check(Config(max_kl_sampler=0.5), {**FINE, "kl_sampler": 0.453, "logprob_mismatch": 2.587})


def _replay(
    config: Config, rewards: list[float], judges: list[float], distances: list[float] | None = None, error: float = 0.0
) -> tuple[Any, list[bool]]:
    weight = torch.nn.Parameter(torch.zeros(()))
    roles = SimpleNamespace(policy=SimpleNamespace(trainable=[weight]))
    progress = SimpleNamespace(history=[], roles=roles, best=[], best_update=0)
    stops = []
    for update, (reward, judge, nats) in enumerate(zip(rewards, judges, distances or [0.0] * len(rewards), strict=True)):
        weight.data.fill_(float(update))
        row = {"update": update, "reward": reward, "judge_reward": judge, "judge_error": error, "kl_reference": nats}
        progress.history.append(row)
        keep_best(config, progress)  # type: ignore[arg-type]
        stops.append(over_optimised(config, progress))  # type: ignore[arg-type]
    return progress, stops


def test_line_35_the_judge_falls_while_the_reward_rises_stop_and_keep_the_best() -> None:
    config = Config(judge_window=1, judge_tolerance=0.3)
    progress, stops = _replay(config, [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.9, 0.7, 0.5])
    assert stops == [False, False, False, False, True]
    assert progress.best_update == 2
    assert progress.best[0].item() == 2.0  # the weights that the rollouts of update 2 measured


def test_line_35_a_judge_that_falls_with_the_reward_is_no_over_optimisation() -> None:
    config = Config(judge_window=1, judge_tolerance=0.3)
    _, stops = _replay(config, [1.0, 0.5, 0.0], [1.0, 0.5, 0.0])
    assert not any(stops)


def test_line_35_a_judge_that_rises_with_the_distance_alone_is_not_believed() -> None:
    """Penalised by hand at 0.05 a nat: 0, 0.5 - 0.1, 0.9 - 0.25, 1.0 - 0.5, 1.1 - 1.0; a KL below 0 is an estimate of 0."""
    rewards, judges, distances = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.9, 1.0, 1.1], [-0.1, 2.0, 5.0, 10.0, 20.0]
    progress, stops = _replay(Config(judge_window=1, judge_kl_penalty=0.05), rewards, judges, distances)
    assert [row["judge_penalised"] for row in progress.history] == pytest.approx([0.0, 0.4, 0.65, 0.5, 0.1])
    assert progress.best_update == 2
    assert stops == [False, False, False, False, True]
    free, stops = _replay(Config(judge_window=1, judge_kl_penalty=0.0), rewards, judges, distances)
    assert free.best_update == 4
    assert not any(stops)


def test_of_policies_that_the_judge_cannot_tell_apart_the_last_is_kept() -> None:
    """An error of 0.06 for each update: of a mean of two 0.06 / √2, of two such means' difference 0.06.

    Means: 0.0, 0.3, 0.65, 0.625, 0.6, 0.575; the highest less the error is 0.59.
    """
    judges = [0.0, 0.6, 0.7, 0.55, 0.65, 0.5]
    progress, stops = _replay(Config(judge_window=2), [0.0] * 6, judges, error=0.06)
    assert progress.history[2]["judge_error_smoothed"] == pytest.approx(0.06 / 2**0.5)
    assert progress.best_update == 4
    assert progress.best[0].item() == 4.0
    assert not any(stops)
    sure, _ = _replay(Config(judge_window=2), [0.0] * 6, judges)
    assert sure.best_update == 2


def test_the_stop_looks_at_the_highest_and_not_at_what_is_kept() -> None:
    """Kept is 0.7, within the error 0.1 √2 of 0.8; a fall of 0.43 is within tolerance and error, one of 0.45 is not."""
    config = Config(judge_window=1, judge_tolerance=0.3)
    progress, stops = _replay(config, [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.8, 0.7, 0.37, 0.35], error=0.1)
    assert progress.best_update == 2
    assert stops == [False, False, False, False, True]


def test_one_lucky_update_is_smoothed_away() -> None:
    config = Config(judge_window=3)
    progress, _ = _replay(config, [0.0] * 6, [0.0, 0.9, 0.0, 0.4, 0.6, 0.6])
    assert progress.best_update == 5
