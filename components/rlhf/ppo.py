"""PPO's arithmetic, as pure functions over [B, T] tensors.

Shapes: B completions, T positions of right-padded prompt + completion. Every mask is True on completion tokens, EOS included;
whatever stands elsewhere is ignored, NaN included.

Sources: Schulman 2017 (1707.06347) for the losses, Schulman 2016 (1506.02438) for GAE, Ziegler 2019 (1909.08593) for the adaptive
coefficient, Huang 2024 (2403.17031) for the details in which implementations differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def masked_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the mask; 0 where it is empty."""
    return torch.where(mask_BT, values_BT, 0.0).sum()


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the mask; 0 where it is empty."""
    return masked_sum(values_BT, mask_BT) / mask_BT.sum().clamp(min=1)


def masked_variance(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Population variance over the mask."""
    return masked_mean((values_BT - masked_mean(values_BT, mask_BT)).square(), mask_BT)


def whiten(values_BT: Tensor, mask_BT: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Values scaled to population variance 1 over the mask, with mean exactly 0, or their own mean with `keep_mean`."""
    mean = masked_mean(values_BT, mask_BT)
    whitened_BT = (values_BT - mean) * torch.rsqrt(masked_variance(values_BT, mask_BT) + 1e-8)
    if keep_mean:
        whitened_BT = whitened_BT + mean
    return torch.where(mask_BT, whitened_BT, 0.0)


def last_token(mask_BT: Tensor) -> Tensor:
    """Index [B] of each row's last completion token."""
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions_T, -1).max(1).values


def token_rewards(scores_B: Tensor, logprobs_old_BT: Tensor, logprobs_reference_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """Reward per token: -beta (log pi_old - log pi_ref), not clamped, and the score once, on the last completion token."""
    rewards_BT = torch.where(mask_BT, -beta * (logprobs_old_BT - logprobs_reference_BT), 0.0)
    rewards_BT[torch.arange(len(scores_B), device=scores_B.device), last_token(mask_BT)] += scores_B
    return rewards_BT


def advantages_and_returns(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns they imply; the value after the last token is 0.

    The advantages are not whitened here: returns are advantages + values, and whitening would falsify them.
    """
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = torch.zeros_like(rewards_BT[:, 0])
    running_B = torch.zeros_like(next_value_B)
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        running_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * running_B, 0.0)
        advantages_BT[:, t] = running_B
        next_value_B = values_BT[:, t]
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0)


class Loss(NamedTuple):
    """A loss summed over tokens, to be divided by the global count of tokens, and what is logged of it (sums too)."""

    total: Tensor
    clipped: Tensor
    kl_old: Tensor


def policy_loss(
    logprobs_BT: Tensor,
    logprobs_old_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip: float = 0.2,
    weights_BT: Tensor | None = None,
) -> Loss:
    """PPO's clipped surrogate, as a sum over tokens, weighted by `weights_BT` where another engine drew them (`rlhf.mismatch`).

    `kl_old` sums r - 1 - log r, an unbiased estimate of KL(old, new) that is never negative (Schulman, "Approximating KL").
    """
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - logprobs_old_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    return Loss(
        total=masked_sum(loss_BT if weights_BT is None else weights_BT * loss_BT, mask_BT),
        clipped=masked_sum((clipped_BT > plain_BT).float(), mask_BT).detach(),
        kl_old=masked_sum(ratio_BT - 1 - log_ratio_BT, mask_BT).detach(),
    )


def value_loss(values_BT: Tensor, values_old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float = 0.2) -> Loss:
    """Half the squared error of the value, clipped around the old value, as a sum over tokens."""
    near_BT = values_old_BT + (values_BT - values_old_BT).clamp(-clip, clip)
    plain_BT, clipped_BT = (values_BT - returns_BT).square(), (near_BT - returns_BT).square()
    return Loss(
        total=0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT),
        clipped=masked_sum((clipped_BT > plain_BT).float(), mask_BT).detach(),
        kl_old=values_BT.new_zeros(()),
    )


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    variance = masked_variance(returns_BT, mask_BT)
    if variance < 1e-12:
        return 0.0
    return float(1 - masked_variance(returns_BT - values_BT, mask_BT) / variance)


def next_beta(beta: float, kl_reference: float, *, target: float, samples: int, horizon: int) -> float:
    """The adaptive KL coefficient: beta (1 + clip(KL/target - 1, +-0.2) samples/horizon). Ziegler 2019, section 2.2."""
    error = min(max(kl_reference / target - 1, -0.2), 0.2)
    return beta * (1 + error * samples / horizon)


def learning_rate_factor(update: int, updates: int, warmup: int) -> float:
    """Share of the peak rate: rises linearly over `warmup` updates, then falls linearly towards 0 after the last."""
    if update < warmup:
        return (update + 1) / warmup
    return max(0.0, (updates - update) / max(1, updates - warmup))
