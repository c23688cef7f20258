"""Maximum likelihood: the loss of supervised fine-tuning, and of PPO's pretraining mix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from components.rlhf.models import Role
from components.rlhf.rollout import token_logprobs
from components.rlhf.tokens import Encoded, micro_batches


def add_nll_gradient(
    role: Role, examples: Sequence[Encoded], pad_id: int, micro_batch_tokens: int, *, weight: float = 1.0
) -> float:
    """Adds the gradient of `weight` times the mean loss per completion token of the whole batch; gives that loss, unweighted.

    The loss is the negative log-likelihood in nats. The mean is over the batch's own count of tokens, so micro-batches change
    nothing but memory.
    """
    tokens = sum(len(e.completion_ids) for e in examples)
    total = 0.0
    for batch in micro_batches(examples, pad_id, micro_batch_tokens, role.device):
        logprobs_BT, _ = token_logprobs(role, batch, temperature=1.0, pad_id=pad_id)
        loss = -logprobs_BT.sum() / tokens
        (loss * weight).backward()
        total += loss.item()
    return total


@torch.no_grad()
def mean_nll(role: Role, examples: Sequence[Encoded], pad_id: int, micro_batch_tokens: int) -> float:
    """Negative log-likelihood per completion token, in nats."""
    total = 0.0
    for batch in micro_batches(examples, pad_id, micro_batch_tokens, role.device):
        total -= token_logprobs(role, batch, temperature=1.0, pad_id=pad_id)[0].sum().item()
    return total / sum(len(e.completion_ids) for e in examples)
