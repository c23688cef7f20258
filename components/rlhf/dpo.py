"""Direct preference optimisation: the policy itself is the reward model. Losses over a ranking's implicit rewards.

The implicit reward of a completion is beta (log p - log p_reference) of the whole completion (Rafailov 2023, 2305.18290, equation 5
without its constant, which cancels). Maximising the likelihood of human rankings under it solves the same problem as PPO does, a
reward with a penalty of beta nats of KL, without rollouts and without a reward model (section 4).

Shapes: R rankings, K completions, N completions of all rankings, M tokens of all completions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from components.rlhf.models import Role
from components.rlhf.rankings import EncodedRanking, over_rows
from components.rlhf.reward import Ties, ranking_loss
from components.rlhf.rollout import ChosenLogprobs, token_logprobs
from components.rlhf.tokens import Joined, join, right_pad

Loss = Literal["pairs", "plackett_luce"]


def dpo_loss(
    rewards_N: Tensor,
    ranks: Sequence[Sequence[int]],
    *,
    loss: Loss = "pairs",
    weights: Sequence[float] | None = None,
    ties: Ties = "drop",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean over rankings of the negative log-likelihood of their orders under implicit rewards.

    "pairs": the mean over the C(K,2) pairs, each as in Rafailov 2023, equation 7; it is the reward model's `ranking_loss`, ties and
    all. "plackett_luce": appendix A.3, `plackett_luce_loss`. With K = 2 both are equation 7.

    Args:
        rewards_N: implicit rewards of the completions, ranking by ranking.
        ranks: the R rankings' ranks, 1 = best; their lengths add up to N.
        weights: one per ranking, such as the rater's confidence; default 1. The mean is over the sum of weights.
        ties, label_smoothing: of the pairs, as in `ranking_loss`; smoothing is the conservative DPO of Mitchell 2023.
    """
    if loss == "pairs":
        return ranking_loss(rewards_N, ranks, weights=weights, ties=ties, label_smoothing=label_smoothing)
    return plackett_luce_loss(rewards_N, ranks, weights)


def plackett_luce_loss(rewards_N: Tensor, ranks: Sequence[Sequence[int]], weights: Sequence[float] | None = None) -> Tensor:
    """Mean over rankings of the mean over K - 1 choices of -log softmax(chosen among itself and all that is ranked below it).

    Rafailov 2023, appendix A.3, divided by K - 1, so that a ranking counts the same whatever its K, as with pairs.

    A tie says nothing about the order of the tied, so each of them is chosen among itself and what is ranked below the tie, never
    against another of the tie: that is the model's own probability of such a choice (Luce 1959). The likelihood of the whole,
    summed over all orders of m tied ones, would need m! terms. What is ranked last gives nothing, tied or not. K - 1 stays the
    divisor, so a ranking with ties at its end weighs less, as with pairs.
    """
    parts: list[Tensor] = []
    total = 0.0
    first = 0
    for number, each in enumerate(ranks):
        k = len(each)
        weight = 1.0 if weights is None else weights[number]
        total += weight
        rewards_K = rewards_N[first : first + k]
        rank_K = torch.tensor(each, device=rewards_N.device)
        among_KK = (rank_K[None] > rank_K[:, None]) | torch.eye(k, dtype=torch.bool, device=rewards_N.device)
        best_K = torch.where(among_KK, rewards_K[None], -torch.inf).logsumexp(1)
        parts.append(weight / (k - 1) * (best_K - rewards_K).sum())
        first += k
    if first != len(rewards_N):
        raise ValueError(f"{len(rewards_N)} rewards for rankings of {first} completions")
    return torch.stack(parts).sum() / total if total else rewards_N.sum() * 0.0


def group_logprobs(role: Role, group: Sequence[EncodedRanking], pad_id: int) -> Tensor:
    """Log-probability [N] of each completion of a group that `pack` made, EOS included, in nats, ranking by ranking.

    At temperature 1: the distribution of the policy itself.
    """
    if group[0].joined:
        return _joined_logprobs(role, group, pad_id)

    def logprobs(prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
        batch = right_pad(prompts, completions, pad_id).to(role.device)
        return token_logprobs(role, batch, temperature=1.0, pad_id=pad_id)[0].sum(1)

    return over_rows(role, group, logprobs)


def _joined_logprobs(role: Role, group: Sequence[EncodedRanking], pad_id: int) -> Tensor:
    """As `group_logprobs`, for rankings whose completions share a row: each prompt is computed once."""
    joined = Joined(*(t.to(role.device) for t in join([e.prompts[0] for e in group], [e.completions for e in group], pad_id)))
    hidden_BTD = role.hidden(joined.ids_BT, joined.attention_BTT, joined.positions_BT)
    row_M: list[int] = []
    before_M: list[int] = []  # the position that predicts the token
    target_M: list[int] = []
    owner_M: list[int] = []
    owner = 0
    for row, each in enumerate(group):
        start = len(each.prompts[0])
        for completion in each.completions:
            # A completion's first token is predicted by the end of the prompt, not by what stands in front of it in the row.
            before_M += [len(each.prompts[0]) - 1, *range(start, start + len(completion) - 1)]
            row_M += [row] * len(completion)
            target_M += completion
            owner_M += [owner] * len(completion)
            start += len(completion)
            owner += 1
    index = torch.tensor([row_M, before_M, target_M, owner_M], device=role.device)
    logprobs_M, _ = ChosenLogprobs.apply(
        hidden_BTD[index[0], index[1]], role.head.weight, role.head.bias, index[2], 1.0, pad_id, False
    )
    return torch.zeros(owner, device=role.device).index_add(0, index[3], logprobs_M)
