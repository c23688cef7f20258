"""How far the engine that samples is from the model that learns, and what corrects it.

Shapes: B completions, T tokens.

Both have the same weights, but where they compute with different kernels, precisions or batches their log-probabilities differ. Two
things are then wrong in PPO. The ratio would not be 1 before the first step: so the old log-probabilities are always the trainer's
own. And tokens come from the sampler's distribution, not from the old policy's: a weight per token, truncated so that a rare token
cannot rule the gradient, corrects what the policy learns from them (Ionides 2008, "Truncated importance sampling"; for such engines
Yao 2025, "Your efficient RL framework secretly brings you off-policy RL training"; with three policies, as here, Hilton 2021,
arXiv 2110.00641).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from components.rlhf.ppo import masked_mean


class Mismatch(NamedTuple):
    """Of the completion tokens, in nats: the largest and the mean |difference| of their log-probabilities, and the KL per token.

    `kl` is the mean of r - 1 - log r with r = p_trainer / p_sampler, an estimate of KL(sampler, trainer) that is never negative
    (Schulman, "Approximating KL").
    """

    largest: float
    mean: float
    kl: float


def mismatch(logprobs_BT: Tensor, sampled_BT: Tensor, mask_BT: Tensor) -> Mismatch:
    """The trainer's log-probabilities against the sampler's."""
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - sampled_BT, 0.0)
    return Mismatch(
        float(log_ratio_BT.abs().max()),
        float(masked_mean(log_ratio_BT.abs(), mask_BT)),
        float(masked_mean(log_ratio_BT.exp() - 1 - log_ratio_BT, mask_BT)),
    )


def sampler_weights(logprobs_BT: Tensor, sampled_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_sampler, cap) of each completion token [B, T]; 1 elsewhere. Constants: no gradient goes through them."""
    return torch.where(mask_BT, logprobs_BT - sampled_BT, 0.0).exp().clamp(max=cap).detach()
