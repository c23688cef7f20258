"""Maximum likelihood: the loss of supervised fine-tuning, and of PPO's pretraining mix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from components.rlhf.distributed import passes, total
from components.rlhf.models import Role
from components.rlhf.rollout import token_logprobs
from components.rlhf.tokens import Batch, Encoded, micro_batches


def add_nll_gradient(
    role: Role, examples: Sequence[Encoded], pad_id: int, micro_batch_tokens: int, *, weight: float = 1.0
) -> float:
    """Adds the gradient of `weight` times the mean loss per completion token of the whole batch; gives that loss, unweighted.

    The loss is the negative log-likelihood in nats. The mean is over the batch's own count of tokens, so micro-batches change
    nothing but memory.
    """
    tokens = sum(len(e.completion_ids) for e in examples)
    loss_sum = 0.0
    for batch, counts in _passes(role, examples, pad_id, micro_batch_tokens):
        logprobs_BT, _ = token_logprobs(role, batch, temperature=1.0, pad_id=pad_id)
        loss = -logprobs_BT.sum() / tokens
        (loss * (weight * counts)).backward()
        loss_sum += loss.item() * counts
    return total(loss_sum)[0]


@torch.no_grad()
def mean_nll(role: Role, examples: Sequence[Encoded], pad_id: int, micro_batch_tokens: int) -> float:
    """Negative log-likelihood per completion token, in nats."""
    nll = 0.0
    for batch, counts in _passes(role, examples, pad_id, micro_batch_tokens):
        nll -= token_logprobs(role, batch, temperature=1.0, pad_id=pad_id)[0].sum().item() * counts
    return total(nll)[0] / sum(len(e.completion_ids) for e in examples)


def _passes(role: Role, examples: Sequence[Encoded], pad_id: int, micro_batch_tokens: int) -> list[tuple[Batch, float]]:
    """This process's micro-batches, with the factors by which they count."""
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in examples]
    return passes(examples, lengths, lambda own: micro_batches(own, pad_id, micro_batch_tokens, role.device), role.divided)
