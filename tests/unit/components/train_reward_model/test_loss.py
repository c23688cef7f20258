"""The loss of a batch of rankings against plain torch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from components.rlhf.models import new_scorer, save_model, scorer_role
from components.rlhf.rankings import EncodedRanking, encode_rankings
from components.rlhf.records import Ranking
from components.rlhf.reward_training import accumulate
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.simulated_world.generate import simulate_rankings
from components.train_reward_model.stage import Config


def rankings(count: int) -> list[Ranking]:
    empty = {"confidence": None}
    return [Ranking(**{**empty, **r, "ranking_id": str(i)}) for i, r in enumerate(simulate_rankings(count, seed=0))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for r in rankings(60) for text in (r.prompt[0]["content"], *r.completions)], 400, 128)


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("base")
    save_model(new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=128, seed=0), tokenizer, folder)
    scorer = new_scorer(folder, seed=1)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    return scorer


def by_hand(model: Any, batch: list[EncodedRanking]) -> torch.Tensor:
    """-log sigmoid(better - worse) over C(K,2), ties giving nothing, weighted mean over rankings; one sequence at a time."""
    total, weights = torch.zeros(()), 0.0
    for each in batch:
        scores = [model(torch.tensor([p + c])).logits[0, 0] for p, c in zip(each.prompts, each.completions, strict=True)]
        losses = [-logsigmoid(scores[better] - scores[worse]) for better, worse in each.ranking.pairs()]
        weight = each.ranking.confidence or 1.0
        total = total + weight * sum(losses, torch.zeros(())) / math.comb(len(scores), 2)
        weights += weight
    return total / weights


def test_line_09_the_loss_and_its_gradient_are_those_of_all_pairs_whatever_the_micro_batches(tokenizer: Any, model: Any) -> None:
    some = rankings(12)
    some = [r._replace(confidence=[None, 0.5, 0.9][i % 3]) for i, r in enumerate(some)]
    some[0] = some[0]._replace(completions=some[0].completions[:2], ranks=[2, 1])
    some[1] = some[1]._replace(ranks=[1, 1, 2, 3])
    batch = encode_rankings(tokenizer, some, 128).rankings
    role = scorer_role(model, trainable=True)
    joined = [each._replace(joined=True) for each in batch]
    mixed = [a if number % 2 else b for number, (a, b) in enumerate(zip(batch, joined, strict=True))]
    model.zero_grad()
    expected = by_hand(model, batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for micro_batch_tokens, rows in itertools.product((64, 700, 100_000), (batch, joined, mixed)):
        model.zero_grad()
        loss, accuracy = accumulate(Config(micro_batch_tokens=micro_batch_tokens), role, rows, tokenizer.pad_token_id)
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert 0 <= accuracy <= 1
        assert math.isfinite(loss)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def watched(model: Any, batch: list[EncodedRanking], pad_id: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids [N, T], where the gradient at the last hidden states is not 0 [N, T]) of every forward pass over a batch."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"]
        output.last_hidden_state.register_hook(lambda gradient: seen.append((ids, gradient.abs().sum(-1) > 0)))

    hook = model.model.register_forward_hook(watch, with_kwargs=True)
    accumulate(Config(), scorer_role(model, trainable=True), batch, pad_id)
    hook.remove()
    model.zero_grad()
    return seen


def test_line_09_a_ranking_costs_its_completions_and_not_its_pairs(tokenizer: Any, model: Any) -> None:
    """K = 4: four rows where twelve sides of six pairs are compared, or the tokens of the prompt once and of each completion."""
    batch = encode_rankings(tokenizer, rankings(3), 128).rankings
    assert {len(each.completions) for each in batch} == {4}
    assert sum(len(ids) for ids, _ in watched(model, batch, tokenizer.pad_token_id)) == 3 * 4
    joined = [each._replace(joined=True) for each in batch]
    real = sum(int((ids != tokenizer.pad_token_id).sum()) for ids, _ in watched(model, joined, tokenizer.pad_token_id))
    assert real == sum(len(each.prompts[0]) + sum(map(len, each.completions)) for each in batch)


def test_mistake_divergence_only_the_last_real_token_has_a_loss(tokenizer: Any, model: Any) -> None:
    """One library compares two texts at every position from where they part, so that one side is scored on its padding."""
    ranking = rankings(1)[0]._replace(completions=["my printer is slow", "my printer is slow and my phone is loud"], ranks=[2, 1])
    batch = encode_rankings(tokenizer, [ranking], 128).rankings
    ((ids, touched),) = watched(model, batch, tokenizer.pad_token_id)
    lengths = [len(p) + len(c) for p, c in zip(batch[0].prompts, batch[0].completions, strict=True)]
    assert lengths[0] < lengths[1] == ids.shape[1]
    assert [row.nonzero().squeeze(1).tolist() for row in touched] == [[length - 1] for length in lengths]


def test_line_11_one_epoch_and_none_of_the_extra_terms_is_the_default() -> None:
    config = Config()
    assert config.epochs == 1
    assert (config.margin, config.label_smoothing, config.centring) == (0, 0, 0)
