"""Watches a run of PPO: what ends it, when it stops, and which policy it keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from components.rlhf.optimisation import weights_of
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from components.ppo_finetune.stage import Config, Progress


def check(config: Config, row: dict[str, Any]) -> None:
    """Ends a run that has gone wrong.

    Raises:
        DoNotRetry: a number that is not finite, a KL that blew up, or one answer to everything; it says which.
    """
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise DoNotRetry(f"PPO diverged at update {row['update']}: {', '.join(bad)} not finite", "lower ppo_finetune.learning_rate")
    if row["kl_reference"] > config.max_kl_reference:
        raise DoNotRetry(
            f"KL blow-up at update {row['update']}: {row['kl_reference']:.1f} nats, over {config.max_kl_reference}",
            "raise ppo_finetune.beta, set kl_target, or lower the learning rate",
        )
    if row["same_answer_fraction"] > config.max_same_answer_fraction:
        raise DoNotRetry(
            f"collapse at update {row['update']}: {row['same_answer_fraction']:.0%} of the completions are one and the same text",
            "raise ppo_finetune.beta or lower the learning rate",
        )


def smoothed(history: list[dict[str, Any]], key: str, window: int) -> float:
    """Mean of the last `window` updates."""
    values = [row[key] for row in history[-window:]]
    return sum(values) / len(values)


def keep_best(config: Config, progress: Progress) -> None:
    """Keeps the policy of this update if the judge's penalised reward is the highest so far: smoothed, less a penalty for its KL.

    Without the penalty the judge is no witness far from SFT: it learned from answers near SFT's, as the reward model did, and both
    go on rising where the truth falls (tests/benchmarks/README.md; Gao 2022 for the truth against the root of KL).
    """
    row = progress.history[-1]
    row["judge_smoothed"] = smoothed(progress.history, "judge_reward", config.judge_window)
    row["reward_smoothed"] = smoothed(progress.history, "reward", config.judge_window)
    distance = max(0.0, smoothed(progress.history, "kl_reference", config.judge_window))
    row["judge_penalised"] = row["judge_smoothed"] - config.judge_kl_penalty * distance
    if row["judge_penalised"] >= max(each["judge_penalised"] for each in progress.history):
        progress.best = [weights.clone() for weights in weights_of(progress.roles.policy.trainable)]
        progress.best_update = row["update"]


def over_optimised(config: Config, progress: Progress) -> bool:
    """Whether the judge's penalised reward has fallen from its best while the reward model's has risen since."""
    now, best = progress.history[-1], progress.history[progress.best_update]
    fell = now["judge_penalised"] < best["judge_penalised"] - config.judge_tolerance
    return bool(fell and now["reward_smoothed"] > best["reward_smoothed"])
