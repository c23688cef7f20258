"""The K-way loss against hand-worked numbers, and scores against plain Hugging Face."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from components.rlhf.models import init_head, load_scorer, new_scorer, save_model, scorer_role
from components.rlhf.reward import Centring, aggregate, ranking_loss, score, sequence_scores
from components.rlhf.tokens import encode_completion, encode_prompt


def _nll(lead: float) -> float:
    return math.log(1 + math.exp(-lead))


def test_pair_by_hand() -> None:
    loss = ranking_loss(torch.tensor([1.0, 3.0]), [[2, 1]])
    assert loss.item() == pytest.approx(_nll(2.0))


def test_line_09_k_way_equals_its_pairs_with_weight_one_over_k_choose_2() -> None:
    scores = [0.5, -1.0, 2.0, 0.1]
    ranks = [2, 4, 1, 3]
    pairs = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
    expected = sum(_nll(scores[i] - scores[j]) for i, j in pairs) / 6
    assert len(pairs) == 6
    assert ranking_loss(torch.tensor(scores), [ranks]).item() == pytest.approx(expected, abs=1e-6)


def test_line_09_rankings_of_different_k_weigh_the_same() -> None:
    three, two = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.3, 0.0])
    one = ranking_loss(three, [[1, 2, 3]])
    other = ranking_loss(two, [[1, 2]])
    both = ranking_loss(torch.cat([three, two]), [[1, 2, 3], [1, 2]])
    assert both.item() == pytest.approx((one.item() + other.item()) / 2)


def test_line_10_ties_are_dropped_or_halved_and_never_ordered_by_position() -> None:
    scores = torch.tensor([1.0, 0.0, -2.0])
    ranks = [[1, 1, 3]]
    dropped = (_nll(3.0) + _nll(2.0)) / 3
    halved = dropped + (0.5 * _nll(1.0) + 0.5 * _nll(-1.0)) / 3
    assert ranking_loss(scores, ranks).item() == pytest.approx(dropped)
    assert ranking_loss(scores, ranks, ties="half").item() == pytest.approx(halved)
    swapped = ranking_loss(torch.tensor([0.0, 1.0, -2.0]), ranks, ties="half")
    assert swapped.item() == pytest.approx(halved)
    assert ranking_loss(torch.tensor([1.0, 2.0]), [[1, 1]]).item() == 0.0


def test_line_11_margin_smoothing_centring_and_weights_by_hand() -> None:
    scores = torch.tensor([2.0, 1.0])
    assert ranking_loss(scores, [[1, 2]], margin=0.5).item() == pytest.approx(_nll(0.5))
    assert ranking_loss(scores, [[1, 2]], label_smoothing=0.1).item() == pytest.approx(0.9 * _nll(1.0) + 0.1 * _nll(-1.0))
    assert ranking_loss(scores, [[1, 2]], centring=0.01).item() == pytest.approx(_nll(1.0) + 0.01 * 2.5)
    four = torch.tensor([2.0, 1.0, 0.0, 3.0])
    weighted = ranking_loss(four, [[1, 2], [1, 2]], weights=[1.0, 0.25])
    assert weighted.item() == pytest.approx((_nll(1.0) + 0.25 * _nll(-3.0)) / 1.25)


def test_loss_refuses_scores_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 scores for rankings of 2 completions"):
        ranking_loss(torch.zeros(3), [[1, 2]])


def test_line_09_one_gradient_per_completion() -> None:
    """With K = 3 and order 0 > 1 > 2, the middle one is pushed up by one pair and down by another."""
    scores = torch.zeros(3, requires_grad=True)
    ranking_loss(scores, [[1, 2, 3]]).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3])


def test_line_11_the_same_completion_scores_the_same_twice_though_its_config_has_dropout(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Dropout would make the two completions of a pair go through two different networks."""
    model.config.attention_dropout = 0.9
    save_model(model, tokenizer, tmp_path)
    scorer = new_scorer(tmp_path, seed=0)
    role = scorer_role(scorer, trainable=True)
    first, again = (sequence_scores(role, [[5, 6, 9]], [[8, 12, 1]], tokenizer.pad_token_id) for _ in range(2))
    assert torch.equal(first, again)
    scorer.train()
    assert not torch.equal(first, sequence_scores(role, [[5, 6, 9]], [[8, 12, 1]], tokenizer.pad_token_id)), "this would see it"


def test_line_07_head_is_drawn_with_the_square_root() -> None:
    """The deviation is 1/sqrt(d+1); a paper lost the root, and a library copied that."""
    head = torch.nn.Linear(4095, 1)
    init_head(head, seed=0)
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert head.bias.item() == 0.0


def test_line_07_a_reward_model_starts_from_the_policy(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path)
    scorer = new_scorer(tmp_path, seed=0)
    for name, weight in model.model.named_parameters():
        torch.testing.assert_close(scorer.model.get_parameter(name), weight)


@pytest.fixture
def scorer_folder(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    save_model(model, tokenizer, tmp_path / "policy")
    scorer = new_scorer(tmp_path / "policy", seed=1)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    scorer.config.score_mean, scorer.config.score_deviation = 0.25, 2.0
    save_model(scorer, tokenizer, tmp_path / "scorer")
    return tmp_path / "scorer"


ANSWERS = ["yes .", "no , thank you , the cat sat on the red mat .", "please restart", "the dog"]


def test_line_08_the_same_text_scores_the_same_here_and_in_plain_transformers(scorer_folder: Path, prompts: Any) -> None:
    """The score is the head at the last real token, whatever padding and batch."""
    scorer, tokenizer = load_scorer(scorer_folder)
    ours = score(scorer, tokenizer, prompts, ANSWERS, batch_size=4)
    plain = AutoModelForSequenceClassification.from_pretrained(scorer_folder)
    assert (plain.config.score_mean, plain.config.score_deviation) == (0.25, 2.0)
    for prompt, answer, centred in zip(prompts, ANSWERS, ours, strict=True):
        ids = [*encode_prompt(tokenizer, prompt, 60)[0], *encode_completion(tokenizer, answer)]
        with torch.no_grad():
            raw = plain(torch.tensor([ids])).logits.item()
            padded = [*ids, *[tokenizer.pad_token_id] * 7]
            in_padding = plain(torch.tensor([padded]), attention_mask=torch.tensor([[1] * len(ids) + [0] * 7])).logits.item()
        assert raw == pytest.approx(in_padding, abs=1e-4)
        assert centred.item() == pytest.approx((raw - 0.25) / 2.0, abs=1e-4)


def test_line_08_scores_do_not_depend_on_the_batch(scorer_folder: Path, prompts: Any) -> None:
    scorer, tokenizer = load_scorer(scorer_folder)
    together = score(scorer, tokenizer, prompts, ANSWERS, batch_size=4)
    backwards = score(scorer, tokenizer, prompts[::-1], ANSWERS[::-1], batch_size=1).flip(0)
    torch.testing.assert_close(together, backwards, atol=1e-4, rtol=1e-4)


def test_line_21_a_loaded_scorer_is_frozen_and_has_no_dropout(scorer_folder: Path) -> None:
    scorer, _ = load_scorer(scorer_folder)
    assert not scorer.training
    assert not any(p.requires_grad for p in scorer.parameters())


def test_gradient_reaches_the_backbone(scorer_folder: Path) -> None:
    scorer, tokenizer = load_scorer(scorer_folder)
    role = scorer_role(scorer, trainable=True)
    scores = sequence_scores(role, [[5, 6], [7]], [[8, 1], [9, 10, 1]], tokenizer.pad_token_id)
    ranking_loss(scores, [[1, 2]]).backward()
    assert all(p.grad is not None for name, p in scorer.named_parameters())


def test_centring_without_constants_changes_nothing(model: Any) -> None:
    assert Centring.of(model.config)(torch.tensor([1.5])).item() == 1.5


def test_line_15_mean_worst_case_and_mean_minus_variance_by_hand() -> None:
    """Coste 2023. The first completion's 1, 2, 3 have mean 2 and population variance 2/3; the second is -1 to all."""
    scores = torch.tensor([[1.0, -1.0, 4.0], [2.0, -1.0, -4.0], [3.0, -1.0, 0.0]])
    assert aggregate(scores, "mean").tolist() == pytest.approx([2.0, -1.0, 0.0])
    assert aggregate(scores, "worst").tolist() == [1.0, -1.0, -4.0]
    assert aggregate(scores, "mean_minus_variance", 0.5).tolist() == pytest.approx([2 - 1 / 3, -1.0, -16 / 3])
    assert aggregate(scores, "mean_minus_variance", 0.0).tolist() == pytest.approx([2.0, -1.0, 0.0])


def test_line_15_one_member_is_its_own_score_bit_by_bit_and_order_does_not_matter() -> None:
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for how in ("mean", "worst", "mean_minus_variance"):
        assert torch.equal(aggregate(scores[:1], how, 0.7), scores[0])
        torch.testing.assert_close(aggregate(scores.flip(0), how, 0.7), aggregate(scores, how, 0.7))
