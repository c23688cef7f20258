"""Completions that stand in one row behind their prompt: the same scores and gradients as in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.rlhf.models import new_scorer, save_model, scorer_role
from components.rlhf.reward import ranking_loss, ranking_scores, sequence_scores, sharing_pays, sharing_works
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.tokens import join

PAD = 0
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
COMPLETIONS = [[[20, 21, 1], [22, 1]], [[23, 24, 25, 26, 1], [1], [27, 28, 1]]]


@pytest.fixture
def scorer(tmp_path: Any) -> Any:
    tokenizer = train_tokenizer(["my printer is slow and my phone is loud"], 300, 64)
    save_model(new_model(tokenizer, layers=2, hidden=16, heads=2, context_tokens=64, seed=0), tokenizer, tmp_path)
    return new_scorer(tmp_path, seed=1)


def test_rows_by_hand() -> None:
    joined = join([[5, 6]], [[[20, 1], [21]]], PAD)
    assert joined.ids_BT.tolist() == [[5, 6, 20, 1, 21]]
    assert joined.positions_BT.tolist() == [[0, 1, 2, 3, 2]]
    assert joined.attention_BTT[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert (joined.row_N.tolist(), joined.last_N.tolist()) == ([0, 0], [3, 4])


def test_padding_is_never_looked_at_by_what_is_read() -> None:
    joined = join(PROMPTS, COMPLETIONS, PAD)
    lengths = [len(p) + sum(map(len, c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for row, length in enumerate(lengths):
        assert not joined.attention_BTT[row, :length, length:].any()
        assert joined.attention_BTT[row].any(-1).all(), "a row without any token to look at would be NaN"


def test_line_09_scores_behind_a_shared_prompt_are_those_of_separate_rows(scorer: Any) -> None:
    role = scorer_role(scorer, trainable=True)
    ranks = [[2, 1], [1, 3, 2]]
    pairs = [(p, c) for p, each in zip(PROMPTS, COMPLETIONS, strict=True) for c in each]
    gradients = []
    for scores_N in (
        ranking_scores(role, PROMPTS, COMPLETIONS, PAD),
        torch.cat([sequence_scores(role, [p], [c], PAD) for p, c in pairs]),
    ):
        ranking_loss(scores_N, ranks).backward()
        gradients.append([scores_N.detach(), *(p.grad.clone() for p in role.trainable if p.grad is not None)])
        scorer.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 10
    for joined, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(joined, alone, atol=1e-5, rtol=1e-4)


def test_a_model_that_cannot_share_is_found_out(scorer: Any) -> None:
    role = scorer_role(scorer)
    assert sharing_works(role, PROMPTS[1], COMPLETIONS[1], PAD)
    whole = type(role).hidden
    try:  # as a recurrent model, which takes everything in front of a token as its past
        type(role).hidden = lambda self, ids_BT, *_, **__: whole(self, ids_BT)
        assert not sharing_works(role, PROMPTS[1], COMPLETIONS[1], PAD)
    finally:
        type(role).hidden = whole


def test_sharing_pays_unless_attention_over_the_long_row_outweighs_the_prompt() -> None:
    assert sharing_pays(prompt_tokens=100, completion_tokens=[50, 50], hidden_size=576)
    assert sharing_pays(prompt_tokens=10, completion_tokens=[50] * 9, hidden_size=576)
    # by hand, d = 10: together 210 (1 + 210 / 60) = 945; alone 2 x 110 (1 + 110 / 120) = 421.7
    assert not sharing_pays(prompt_tokens=10, completion_tokens=[100, 100], hidden_size=10)
