"""DPO's losses against hand-worked numbers, closed forms and slow loops; log-probabilities against plain Hugging Face."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from components.rlhf.dpo import dpo_loss, group_logprobs, plackett_luce_loss
from components.rlhf.models import policy_role
from components.rlhf.rankings import EncodedRanking
from components.rlhf.records import Ranking

BOTH = ("pairs", "plackett_luce")


def nll(lead: float) -> float:
    return math.log(1 + math.exp(-lead))


@pytest.mark.parametrize("loss", BOTH)
def test_two_completions_are_equation_seven(loss: Any) -> None:
    """-log sigmoid(beta log(p_w / ref_w) - beta log(p_l / ref_l)), Rafailov 2023."""
    beta, policy, reference = 0.1, [-12.0, -9.0], [-10.0, -14.0]
    rewards = torch.tensor([beta * (p - r) for p, r in zip(policy, reference, strict=True)])
    # better is the second: 0.1 (-9 + 14) - 0.1 (-12 + 10) = 0.5 + 0.2
    assert dpo_loss(rewards, [[2, 1]], loss=loss).item() == pytest.approx(nll(0.7))
    assert dpo_loss(rewards, [[1, 2]], loss=loss).item() == pytest.approx(nll(-0.7))


def test_pairs_are_the_mean_of_all_pairs_each_alone() -> None:
    rewards, ranks = [0.5, -1.0, 2.0, 0.1], [2, 4, 1, 3]
    alone = [
        dpo_loss(torch.tensor([rewards[i], rewards[j]]), [[ranks[i], ranks[j]]]).item()
        for i, j in itertools.combinations(range(4), 2)
    ]
    assert dpo_loss(torch.tensor(rewards), [ranks]).item() == pytest.approx(sum(alone) / 6)


def test_plackett_luce_is_the_slow_product_of_softmaxes() -> None:
    """The best of all, then the best of what is left, and so on: appendix A.3, equation 18."""
    rewards, order = [0.5, -1.0, 2.0, 0.1], [2, 0, 3, 1]  # the third is best
    probability = 1.0
    for place in range(4):
        left = [math.exp(rewards[i]) for i in order[place:]]
        probability *= math.exp(rewards[order[place]]) / sum(left)
    ranks = [order.index(i) + 1 for i in range(4)]
    assert plackett_luce_loss(torch.tensor(rewards), [ranks]).item() == pytest.approx(-math.log(probability) / 3, rel=1e-6)


def test_plackett_luce_gives_all_orders_of_a_ranking_probability_one() -> None:
    rewards = torch.tensor([0.3, -0.7, 1.1])
    losses = [plackett_luce_loss(rewards, [ranks]).item() for ranks in itertools.permutations((1, 2, 3))]
    assert sum(math.exp(-2 * loss) for loss in losses) == pytest.approx(1.0)


def test_tied_completions_are_not_set_against_each_other() -> None:
    a, b, c = 1.0, 0.0, -2.0
    ends_tied = [1, 2, 2]  # one choice: a among all three
    best = math.log(sum(math.exp(x) for x in (a, b, c))) - a
    assert plackett_luce_loss(torch.tensor([a, b, c]), [ends_tied]).item() == pytest.approx(best / 2)
    begins_tied = [1, 1, 3]  # a against c, and b against c
    assert plackett_luce_loss(torch.tensor([a, b, c]), [begins_tied]).item() == pytest.approx((nll(a - c) + nll(b - c)) / 2)
    swapped = plackett_luce_loss(torch.tensor([b, a, c]), [begins_tied]).item()
    assert swapped == pytest.approx((nll(a - c) + nll(b - c)) / 2), "a tie has no order, not even by position"
    dense = plackett_luce_loss(torch.tensor([a, b, c]), [[1, 1, 2]]).item()
    assert dense == pytest.approx(swapped), "ranks may be dense or skip"


@pytest.mark.parametrize("loss", BOTH)
def test_a_ranking_of_ties_only_teaches_nothing(loss: Any) -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    value = dpo_loss(rewards, [[1, 1, 1]], loss=loss)
    value.backward()
    assert value.item() == 0.0
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0.0, 0.0, 0.0]


def test_ties_may_be_pulled_together_and_labels_doubted() -> None:
    rewards = torch.tensor([1.0, 0.0])
    assert dpo_loss(rewards, [[1, 1]], ties="half").item() == pytest.approx(0.5 * nll(1.0) + 0.5 * nll(-1.0))
    assert dpo_loss(rewards, [[1, 2]], label_smoothing=0.1).item() == pytest.approx(0.9 * nll(1.0) + 0.1 * nll(-1.0))


@pytest.mark.parametrize("loss", BOTH)
def test_confidence_weighs_a_ranking_and_k_does_not(loss: Any) -> None:
    two, three = torch.tensor([0.3, -0.4]), torch.tensor([1.0, 0.0, -1.0])
    one, other = dpo_loss(two, [[1, 2]], loss=loss).item(), dpo_loss(three, [[3, 1, 2]], loss=loss).item()
    together = torch.cat([two, three])
    ranks = [[1, 2], [3, 1, 2]]
    assert dpo_loss(together, ranks, loss=loss).item() == pytest.approx((one + other) / 2)
    weighted = dpo_loss(together, ranks, loss=loss, weights=[1.0, 0.25])
    assert weighted.item() == pytest.approx((one + 0.25 * other) / 1.25)


def test_where_the_policy_is_its_reference_the_gradient_is_not_zero() -> None:
    """All implicit rewards are 0 there; a loss that vanished would never begin to learn."""
    for loss, expected in (("pairs", [-1 / 3, 0.0, 1 / 3]), ("plackett_luce", [-1 / 3, -1 / 12, 5 / 12])):
        rewards = torch.zeros(3, requires_grad=True)
        dpo_loss(rewards, [[1, 2, 3]], loss=loss).backward()  # type: ignore[arg-type]
        assert rewards.grad is not None
        assert rewards.grad.tolist() == pytest.approx(expected), loss  # by hand: softmax of what is left, minus the chosen, over 2


@pytest.mark.parametrize("loss", BOTH)
def test_rewards_that_do_not_fit_are_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="rankings of 2 completions"):
        dpo_loss(torch.zeros(3), [[1, 2]], loss=loss)


@pytest.mark.parametrize("loss", BOTH)
def test_rewards_of_any_size_stay_finite(loss: Any) -> None:
    rewards = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    value = dpo_loss(rewards, [[1, 2, 3]], loss=loss)
    value.backward()
    assert rewards.grad is not None
    assert math.isfinite(value.item())
    assert rewards.grad.isfinite().all()


def encoded(prompt: list[int], completions: list[list[int]], joined: bool) -> EncodedRanking:
    k = len(completions)
    ranking = Ranking("", [], [""] * k, list(range(1, k + 1)), "", "", None, None, None, None, "train")
    return EncodedRanking(ranking, [prompt] * k, completions, joined)


def by_hand(model: Any, prompt: list[int], completion: list[int], pad_id: int) -> float:
    """Sum of log-softmax over the completion's tokens, one sequence at a time, without the pad token, which is never an answer."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double()
    logits[:, pad_id] = -torch.inf
    logprobs = torch.log_softmax(logits, -1)
    return sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))


@pytest.mark.parametrize("joined", [False, True])
def test_log_probabilities_are_those_of_plain_forwards_whatever_padding_and_rows(model: Any, tokenizer: Any, joined: bool) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    completions = [[[20, 21, 1], [22, 1]], [[23, 24, 25, 26, 1], [1], [27, 28, 1]]]
    pad = tokenizer.pad_token_id
    role = policy_role(model, trainable=True)
    group = [encoded(p, c, joined) for p, c in zip(prompts, completions, strict=True)]
    ours = group_logprobs(role, group, pad)
    with torch.no_grad():
        expected = [by_hand(model, p, c, pad) for p, each in zip(prompts, completions, strict=True) for c in each]
    assert ours.tolist() == pytest.approx(expected, abs=1e-4)
    alone = torch.cat([group_logprobs(role, [each], pad) for each in group])
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_the_same_in_one_row_and_in_rows_of_their_own(model: Any, tokenizer: Any) -> None:
    role = policy_role(model, trainable=True)
    found = []
    for joined in (False, True):
        group = [encoded([5, 6, 7, 8], [[20, 21, 1], [22, 1], [23, 24, 25, 1]], joined)]
        model.zero_grad()
        dpo_loss(0.5 * group_logprobs(role, group, tokenizer.pad_token_id), [[2, 1, 3]], loss="plackett_luce").backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-3)
