"""Watches a run of PPO: what ends it, when it stops, and which policy it keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from components.ppo_finetune.progress import Progress
    from components.ppo_finetune.stage import Config


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
    if row["kl_sampler"] > config.max_kl_sampler:
        raise DoNotRetry(
            f"rollouts at update {row['update']} are not the policy's: {row['kl_sampler']:.3g} nats per token from the engine that "
            f"samples to the trainer, over {config.max_kl_sampler} (largest difference {row['logprob_mismatch']:.3g})",
            "set ppo_finetune.rollout_engine to torch; if vLLM is only inexact, set precision to float32, or raise max_kl_sampler",
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
    """Keeps the policy of this update, unless the judge likes an earlier one better by more than a standard error.

    What is compared is the judge's smoothed reward less a penalty for the KL. Without the penalty the judge is no witness far from
    SFT: it learned from answers near SFT's, as the reward model did, and both go on rising where the truth falls (Gao 2022).
    Without the error chance says which of many equal policies is kept, often a half-trained one (tests/benchmarks/README.md).
    """
    row = progress.history[-1]
    window = progress.history[-config.judge_window :]
    row["judge_smoothed"] = smoothed(progress.history, "judge_reward", config.judge_window)
    row["reward_smoothed"] = smoothed(progress.history, "reward", config.judge_window)
    row["judge_error_smoothed"] = math.hypot(*(each["judge_error"] for each in window)) / len(window)
    distance = max(0.0, smoothed(progress.history, "kl_reference", config.judge_window))
    row["judge_penalised"] = row["judge_smoothed"] - config.judge_kl_penalty * distance
    if fallen(progress) <= 0:
        progress.best = [weights.detach().clone() for weights in progress.roles.policy.trainable]
        progress.best_update = row["update"]


def liked_best(progress: Progress) -> dict[str, Any]:
    """The update with the highest penalised reward of the judge so far."""
    return max(progress.history, key=lambda row: row["judge_penalised"])


def fallen(progress: Progress) -> float:
    """How far the judge's penalised reward has fallen from its highest, beyond the standard error of their difference.

    In deviations of the judge's scores. Means that share updates differ by less chance than that, so the error is on the safe side.
    """
    now, best = progress.history[-1], liked_best(progress)
    error = math.hypot(now["judge_error_smoothed"], best["judge_error_smoothed"])
    return float(best["judge_penalised"] - now["judge_penalised"] - error)


def over_optimised(config: Config, progress: Progress) -> bool:
    """Whether the judge's penalised reward has surely fallen from its highest while the reward model's has risen since."""
    rose = progress.history[-1]["reward_smoothed"] > liked_best(progress)["reward_smoothed"]
    return bool(rose and fallen(progress) > config.judge_tolerance)
