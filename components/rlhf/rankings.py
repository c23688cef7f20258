"""Rankings as token ids: who may learn from which, and batches of whole rankings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from components.rlhf.distributed import passes, summed
from components.rlhf.models import Role
from components.rlhf.records import Message, Ranking, prompt_key
from components.rlhf.reward import ranking_scores, sequence_scores, sharing_pays, sharing_works
from components.rlhf.tokens import PromptTooLong, encode_completion, encode_prompt, tight_batches
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class EncodedRanking(NamedTuple):
    """A ranking with its K completions as token ids, each ended by EOS.

    Fields:
        prompts: K times the same prompt, cut at the front where it does not fit with the longest completion.
        completions: K completions, never cut.
        joined: whether all K stand in one row behind their prompt, which is then computed once.
    """

    ranking: Ranking
    prompts: list[list[int]]
    completions: list[list[int]]
    joined: bool = False

    @property
    def rows(self) -> int:
        return 1 if self.joined else len(self.completions)

    @property
    def row_tokens(self) -> int:
        """Length of its longest row."""
        lengths = [len(each) for each in self.completions]
        return len(self.prompts[0]) + (sum(lengths) if self.joined else max(lengths))


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


def teaches_judge(prompt: Sequence[Message], judge_fraction: float) -> bool:
    """Whether a prompt's rankings belong to the judge: decided by the prompt's digest alone, whatever the snapshot."""
    return int(prompt_key(prompt)[:8], 16) < judge_fraction * 2**32


def split_for_judge(rankings: Sequence[EncodedRanking], judge_fraction: float) -> tuple[list[EncodedRanking], list[EncodedRanking]]:
    """Rankings for the reward model and for the judge, by prompt: no prompt teaches both.

    Raises:
        DoNotRetry: one side has none.
    """
    sides: tuple[list[EncodedRanking], list[EncodedRanking]] = ([], [])
    for each in rankings:
        sides[teaches_judge(each.ranking.prompt, judge_fraction)].append(each)
    if not all(sides):
        raise DoNotRetry(
            f"{len(rankings)} rankings do not suffice for a reward model and a judge",
            "bring more prompts, or move train_reward_model.judge_fraction towards 0.5",
        )
    return sides


def join_where_it_pays(role: Role, rankings: Sequence[EncodedRanking], pad_id: int) -> list[EncodedRanking]:
    """The rankings, marked as joined where that is cheaper; none if this model does not score joined rows as separate ones."""
    hidden_size = int(role.backbone.config.hidden_size)
    paying = [sharing_pays(len(r.prompts[0]), [len(c) for c in r.completions], hidden_size) for r in rankings]
    if not any(paying):
        return list(rankings)
    probe = min((r for r, pays in zip(rankings, paying, strict=True) if pays), key=lambda r: r.row_tokens)
    if not sharing_works(role, probe.prompts[0], probe.completions, pad_id):
        _log.warning("this model scores completions that share a row differently: each gets a row of its own")
        return list(rankings)
    _log.info("the prompt is computed once for all completions in %d of %d rankings", sum(paying), len(rankings))
    return [each._replace(joined=pays) for each, pays in zip(rankings, paying, strict=True)]


def group_scores(role: Role, group: Sequence[EncodedRanking], pad_id: int) -> Tensor:
    """Raw scores [N] of the completions of a group that `pack` made, ranking by ranking."""
    if group[0].joined:
        return ranking_scores(role, [each.prompts[0] for each in group], [each.completions for each in group], pad_id)
    return over_rows(role, group, lambda prompts, completions: sequence_scores(role, prompts, completions, pad_id))


def over_rows(role: Role, group: Sequence[EncodedRanking], look: Callable[[list[list[int]], list[list[int]]], Tensor]) -> Tensor:
    """What `look` gives [n] of prompts and completions, for all N completions of a group with a row each, ranking by ranking.

    Among many completions of one prompt some are far longer than the others, so rows of similar length are looked at together. Of a
    role that is divided over processes all are: a group is one forward pass there, or the processes would not make equally many.
    """
    prompts = [prompt for each in group for prompt in each.prompts]
    completions = [completion for each in group for completion in each.completions]
    if role.divided:
        return look(prompts, completions)
    parts = tight_batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    found_N = torch.cat([look([prompts[i] for i in part], [completions[i] for i in part]) for part in parts])
    return found_N[torch.tensor([row for part in parts for row in part]).argsort()]


@torch.no_grad()
def over_processes(
    role: Role, rankings: Sequence[EncodedRanking], max_tokens: int, look: Callable[[Sequence[EncodedRanking]], Tensor]
) -> list[Tensor]:
    """What `look` gives [N] of a group's completions, for all rankings: float32 [K] each, on the CPU. Processes share the work."""
    different = list({id(each): each for each in rankings}.values())
    first, end = {}, 0  # where a ranking's completions are among all
    for each in different:
        first[id(each)] = end
        end += len(each.completions)
    found_N = torch.zeros(end)
    costs = [each.rows * each.row_tokens for each in different]
    for group, counts in passes(different, costs, lambda own: pack(own, max_tokens), role.divided):
        values = look(group).float().cpu()
        if counts:
            for each, part_K in zip(group, values.split([len(r.completions) for r in group]), strict=True):
                found_N[first[id(each)] : first[id(each)] + len(part_K)] = part_K
    summed(found_N)
    return [found_N[first[id(each)] : first[id(each)] + len(each.completions)] for each in rankings]


def pack(rankings: Sequence[EncodedRanking], max_tokens: int) -> list[list[EncodedRanking]]:
    """Whole rankings of similar length in groups whose padded size is at most `max_tokens` (one ranking at least)."""
    groups: list[list[EncodedRanking]] = []
    rows = 0
    for each in sorted(rankings, key=lambda r: (r.joined, r.row_tokens)):
        rows += each.rows
        if groups and groups[-1][0].joined == each.joined and rows * each.row_tokens <= max_tokens:
            groups[-1].append(each)
        else:
            groups.append([each])
            rows = each.rows
    return groups
