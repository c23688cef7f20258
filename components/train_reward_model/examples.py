"""Rankings as token ids, and which of the two reward models learns from which."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from components.rlhf.records import Ranking, prompt_key
from components.rlhf.tokens import PromptTooLong, encode_completion, encode_prompt
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class EncodedRanking(NamedTuple):
    """A ranking with its K completions as token ids, each ended by EOS.

    Fields:
        prompts: K times the same prompt, cut at the front where it does not fit with the longest completion.
        completions: K completions, never cut.
    """

    ranking: Ranking
    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of all K sequences, each as long as the longest."""
        return len(self.prompts) * max(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))


class Encoding(NamedTuple):
    """What became of a list of rankings: `left_out` did not fit, `cut_prompts` lost the front of their prompt."""

    rankings: list[EncodedRanking]
    left_out: int
    cut_prompts: int


def encode_rankings(tokenizer: PreTrainedTokenizerBase, rankings: Iterable[Ranking], limit_tokens: int) -> Encoding:
    """Token ids of rankings. One whose completions do not fit is left out as a whole and counted; none is cut silently."""
    result: list[EncodedRanking] = []
    left_out = cut_prompts = 0
    for ranking in rankings:
        completions = [encode_completion(tokenizer, text) for text in ranking.completions]
        try:
            prompt, cut = encode_prompt(tokenizer, ranking.prompt, limit_tokens - max(len(c) for c in completions))
        except PromptTooLong:
            left_out += 1
            continue
        cut_prompts += cut
        result.append(EncodedRanking(ranking, [prompt] * len(completions), completions))
    if left_out or cut_prompts:
        _log.warning(
            "%d rankings do not fit %d tokens and are left out; %d lost the front of their prompt",
            left_out,
            limit_tokens,
            cut_prompts,
        )
    return Encoding(result, left_out, cut_prompts)


def split_for_judge(rankings: Sequence[EncodedRanking], judge_fraction: float) -> tuple[list[EncodedRanking], list[EncodedRanking]]:
    """Rankings for the reward model and for the judge, by prompt: no prompt teaches both.

    Raises:
        DoNotRetry: one side has none.
    """
    bound = judge_fraction * 2**32
    sides: tuple[list[EncodedRanking], list[EncodedRanking]] = ([], [])
    for each in rankings:
        sides[int(prompt_key(each.ranking.prompt)[:8], 16) < bound].append(each)
    if not all(sides):
        raise DoNotRetry(
            f"{len(rankings)} rankings do not suffice for a reward model and a judge",
            "bring more prompts, or move train_reward_model.judge_fraction towards 0.5",
        )
    return sides


def pack(rankings: Sequence[EncodedRanking], max_tokens: int) -> list[list[EncodedRanking]]:
    """Whole rankings of similar length in groups whose padded size is at most `max_tokens` (one ranking at least)."""
    groups: list[list[EncodedRanking]] = []
    rows = longest = 0
    for each in sorted(rankings, key=lambda r: r.tokens // len(r.prompts)):
        length = each.tokens // len(each.prompts)
        if groups and (rows + len(each.prompts)) * max(longest, length) <= max_tokens:
            groups[-1].append(each)
            rows, longest = rows + len(each.prompts), max(longest, length)
        else:
            groups.append([each])
            rows, longest = len(each.prompts), length
    return groups
