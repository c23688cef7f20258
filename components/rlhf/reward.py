"""Reward models: scores of completions, and the K-way ranking loss that trains them.

Shapes: R rankings, K completions, N completions of all rankings, T tokens, D hidden, M members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from components.rlhf.models import Role, context_tokens, scorer_role
from components.rlhf.records import Message
from components.rlhf.tokens import Batch, Joined, encode_completion, encode_prompt, join, length_batches, right_pad

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Ties = Literal["drop", "half"]
Aggregation = Literal["mean", "worst", "mean_minus_variance"]


class Centring(NamedTuple):
    """What turns a raw score into the one that PPO and the reports use: (raw - mean) / deviation."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, config: PretrainedConfig) -> Centring:
        """The constants that lie in a saved reward model's `config.json`; a model without them is taken as it is."""
        return cls(float(getattr(config, "score_mean", 0.0)), float(getattr(config, "score_deviation", 1.0)))

    def __call__(self, raw: Tensor, /) -> Tensor:
        return (raw - self.mean) / self.deviation


def aggregate(scores_MN: Tensor, how: Aggregation, variance_weight: float = 0.0) -> Tensor:
    """One score [N] per completion from the centred scores of an ensemble's members (Coste 2023, arXiv 2310.02743).

    "mean" is their mean. "worst" is the lowest (worst-case optimisation): a completion is worth what its harshest member gives.
    "mean_minus_variance" is mean - variance_weight * variance (uncertainty-weighted optimisation), with the population variance
    over the members: what they disagree on is worth less. With one member all three are its score.

    Args:
        scores_MN: in deviations of each member's scores, so that no member counts more because its scale is larger.
        variance_weight: the paper's lambda, in 1 / deviation.
    """
    if how == "worst":
        return scores_MN.amin(0)
    mean_N = scores_MN.mean(0)
    if how == "mean":
        return mean_N
    return mean_N - variance_weight * scores_MN.var(0, correction=0)


def ranking_loss(
    scores_N: Tensor,
    ranks: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
    ties: Ties = "drop",
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> Tensor:
    """Mean over rankings of the sum over pairs of -log sigmoid(better - worse - margin), each pair with weight 1/C(K,2).

    Ouyang 2022, equation 1: all pairs of one ranking stand in one batch element, so that each completion needs one forward pass and
    no pair is seen without the others. Tied pairs give nothing ("drop"), or half of the loss both ways ("half"), which pulls
    their scores together; either way C(K,2) counts them, so a ranking with ties weighs less than one without.

    Args:
        scores_N: raw scores of the completions, ranking by ranking.
        ranks: the R rankings' ranks, 1 = best; their lengths add up to N.
        weights: one per ranking, such as the rater's confidence; default 1. The mean is over the sum of weights.
        margin: the better score must lead by this much.
        label_smoothing: in [0, 0.5): the share of labels taken to be the wrong way round.
        centring: weight of the squared scores, which keeps scores near 0 (Eisenstein 2023).
    """
    better, worse, pair_weights, squares = [], [], [], scores_N.new_zeros(())
    total = 0.0
    first = 0
    for number, each in enumerate(ranks):
        k = len(each)
        weight = 1.0 if weights is None else weights[number]
        total += weight
        share = weight * 2 / (k * (k - 1))
        for i in range(k):
            for j in range(i + 1, k):
                if each[i] != each[j]:
                    i_better = each[i] < each[j]
                    better.append(first + (i if i_better else j))
                    worse.append(first + (j if i_better else i))
                    pair_weights.append(share)
                elif ties == "half":
                    better += [first + i, first + j]
                    worse += [first + j, first + i]
                    pair_weights += [share / 2, share / 2]
        if centring:
            squares = squares + weight * scores_N[first : first + k].square().mean()
        first += k
    if first != len(scores_N):
        raise ValueError(f"{len(scores_N)} scores for rankings of {first} completions")
    if total == 0 or not (pair_weights or centring):
        return scores_N.sum() * 0.0
    index = torch.tensor([better, worse], device=scores_N.device, dtype=torch.long)
    weight_P = torch.tensor(pair_weights, device=scores_N.device)
    lead_P = scores_N[index[0]] - scores_N[index[1]] - margin
    loss_P = -functional.logsigmoid(lead_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * functional.logsigmoid(-lead_P)
    return ((loss_P * weight_P).sum() + centring * squares) / total


def sequence_scores(role: Role, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Raw score [N] of each completion: the head at its last token, whatever the padding and the batch."""
    return batch_scores(role, right_pad(prompts, completions, pad_id).to(role.device))


def batch_scores(role: Role, batch: Batch) -> Tensor:
    """Raw score [B] of each row: the head at its last real token."""
    hidden_BTD = role.hidden(batch.ids_BT, trunk_BTD=batch.trunk_BTD)
    last_B = batch.attention_BT.sum(1) - 1
    return _head(role, hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B])


def _head(role: Role, hidden_ND: Tensor) -> Tensor:
    scores_N: Tensor = role.head(hidden_ND.to(role.head.weight.dtype)).float().squeeze(-1)
    return scores_N


def ranking_scores(
    role: Role, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], pad_id: int
) -> Tensor:
    """As `sequence_scores`, for prompts with several completions each; a prompt is computed once for all of them.

    Scores [N] in the order of the completions, prompt by prompt.
    """
    joined = Joined(*(each.to(role.device) for each in join(prompts, completions, pad_id)))
    hidden_BTD = role.hidden(joined.ids_BT, joined.attention_BTT, joined.positions_BT)
    return _head(role, hidden_BTD[joined.row_N, joined.last_N])


def sharing_pays(prompt_tokens: int, completion_tokens: Sequence[int], hidden_size: int) -> bool:
    """Whether one row with all completions costs less than a row for each.

    Counts multiplications of a transformer block: 12 d^2 a token in its linear layers, and 2 d T a token in attention, which is
    computed for half of the T^2 pairs in a causal row and for all of them in a joined one.
    """
    alone = sum(t * (1 + t / (12 * hidden_size)) for t in (prompt_tokens + c for c in completion_tokens))
    together = prompt_tokens + sum(completion_tokens)
    return together * (1 + together / (6 * hidden_size)) < alone


@torch.no_grad()
def sharing_works(role: Role, prompt: Sequence[int], completions: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Whether this model gives the same scores either way: not with sliding windows, or states that run through the sequence."""
    together_N = ranking_scores(role, [prompt], [completions], pad_id)
    alone_N = sequence_scores(role, [prompt] * len(completions), completions, pad_id)
    tolerance = 1e-4 if next(role.backbone.parameters()).dtype == torch.float32 else 0.05
    return bool(torch.allclose(together_N, alone_N, rtol=tolerance, atol=tolerance * max(1.0, float(alone_N.abs().max()))))


@torch.no_grad()
def score_tokens(
    role: Role, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, pad_id: int, max_tokens: int
) -> Tensor:
    """As `sequence_scores` for any number of completions, in length-sorted batches of at most `max_tokens` tokens; on the CPU."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    scores_N = torch.empty(len(lengths))
    for rows in length_batches(lengths, max_tokens):
        scores_N[rows] = sequence_scores(role, [prompts[i] for i in rows], [completions[i] for i in rows], pad_id).cpu()
    return scores_N


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    *,
    batch_size: int,
) -> Tensor:
    """Centred scores [N] of texts, each ended by EOS.

    A prompt is cut at the front to what the model's context holds, or to the length that it was trained on where that is shorter
    (`model_max_length` of its tokenizer).

    Raises:
        PromptTooLong: a prompt and its completion do not fit, even with the prompt cut at the front.
    """
    answers = [encode_completion(tokenizer, text) for text in completions]
    limit = min(context_tokens(model.config), tokenizer.model_max_length)
    encoded = [encode_prompt(tokenizer, prompt, limit - len(answer))[0] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(len(p) + len(a) for p, a in zip(encoded, answers, strict=True))
    raw = score_tokens(scorer_role(model), encoded, answers, pad_id=tokenizer.pad_token_id, max_tokens=batch_size * longest)
    return Centring.of(model.config)(raw)
