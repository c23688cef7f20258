"""What the champion's own models see in rankings: features of the texts from its policy, and the losses of its reward model.

Shapes: N units, K completions, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from components.detect_drift.betting import Floats
from components.rlhf.models import context_tokens, scorer_role
from components.rlhf.records import Ranking
from components.rlhf.reward import score_tokens
from components.rlhf.tokens import PromptTooLong, encode_completion, encode_prompt, length_batches, right_pad
from components.services.launch import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextFeatures(NamedTuple):
    """Of N rankings: mean hidden states of a middle layer, and log of the length in tokens as the last column [N, D + 1].

    `prompts` are those of the prompt; `completions` the mean over a ranking's K completions, read after the prompt.
    NaN in a whole row: it does not fit the model's context.
    """

    prompts_ND: Floats
    completions_ND: Floats


@torch.no_grad()
def text_features(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    max_tokens: int,
) -> TextFeatures:
    """Reads each prompt with each of its completions in one pass; mean-pools a middle layer, for the last is about next tokens.

    Args:
        max_tokens: tokens in a batch, padding included.
    """
    limit = min(context_tokens(model.config), tokenizer.model_max_length)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    owner: list[int] = []
    for number, ranking in enumerate(rankings):
        answers = [encode_completion(tokenizer, text) for text in ranking.completions]
        try:
            prompt, _ = encode_prompt(tokenizer, ranking.prompt, limit - max(map(len, answers)))
        except PromptTooLong:
            continue
        prompts += [prompt] * len(answers)
        completions += answers
        owner += [number] * len(answers)
    width = int(model.config.hidden_size) + 1
    sums = {side: np.zeros((len(rankings), width)) for side in ("prompts", "completions")}
    counts = np.zeros(len(rankings))
    batches = length_batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], max_tokens)
    for rows in context.progress.track(batches, len(batches), "texts read"):
        batch = right_pad([prompts[i] for i in rows], [completions[i] for i in rows], tokenizer.pad_token_id).to(model.device)
        states = model.base_model(batch.ids_BT, use_cache=False, output_hidden_states=True).hidden_states
        hidden_BTD = states[len(states) // 2].float()
        for side, mask_BT in (
            ("prompts", batch.attention_BT.bool() & ~batch.completion_mask_BT),
            ("completions", batch.completion_mask_BT),
        ):
            tokens_B = mask_BT.sum(1)
            mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / tokens_B[:, None]
            features = torch.cat([mean_BD, tokens_B[:, None].float().log()], dim=1).double().cpu().numpy()
            np.add.at(sums[side], [owner[i] for i in rows], features)
        np.add.at(counts, [owner[i] for i in rows], 1)
    with np.errstate(invalid="ignore"):  # 0 / 0: a ranking that does not fit
        return TextFeatures(*(sums[side] / counts[:, None] for side in ("prompts", "completions")))


class Judgement(NamedTuple):
    """What the reward model says of one ranking: `margins` in nats, one per strict pair, positive where it agrees with the rater.

    `loss` is the mean of -log sigmoid(margin) over the pairs, in nats: right and calibrated models have a low one.
    """

    margins: list[float]

    @property
    def loss(self) -> float:
        return sum(_softplus(-margin) for margin in self.margins) / len(self.margins) if self.margins else math.nan


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rankings: Sequence[Ranking], max_tokens: int
) -> list[Judgement]:
    """The reward model's margins on the pairs of each ranking; none where all are ties or the ranking does not fit its context.

    Raw scores: their differences are the log-odds that the model was trained to give; centring would rescale them.
    """
    limit = min(context_tokens(model.config), tokenizer.model_max_length)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for ranking in rankings:
        answers = [encode_completion(tokenizer, text) for text in ranking.completions]
        try:
            prompt, _ = encode_prompt(tokenizer, ranking.prompt, limit - max(map(len, answers)))
        except PromptTooLong:
            answers, prompt = [], []
        spans.append((len(prompts), len(answers)))
        prompts += [prompt] * len(answers)
        completions += answers
    if not prompts:
        return [Judgement([]) for _ in rankings]
    scores = score_tokens(scorer_role(model), prompts, completions, pad_id=tokenizer.pad_token_id, max_tokens=max_tokens).tolist()
    return [
        Judgement([scores[first + better] - scores[first + worse] for better, worse in ranking.pairs()] if count else [])
        for ranking, (first, count) in zip(rankings, spans, strict=True)
    ]


def mean_judgement(members: Sequence[Judgement]) -> Judgement:
    """What an ensemble says of one ranking: each margin, in nats, is the mean of its members' (raw scores, as in `judge`)."""
    return Judgement([sum(margins) / len(margins) for margins in zip(*(each.margins for each in members), strict=True)])


def _softplus(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
