"""PPO's arithmetic against numbers worked by hand and against slow, independent code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from components.rlhf import ppo

YES_3_2 = torch.tensor([[True, True, True], [True, True, False]])


def test_line_26_mean_and_population_variance_ignore_what_is_not_real_even_nan() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, float("nan")]])
    assert ppo.masked_mean(values, YES_3_2).item() == pytest.approx(3.0)
    assert ppo.masked_variance(values, YES_3_2).item() == pytest.approx(2.0)  # population: (4+1+0+1+4)/5
    assert ppo.masked_mean(values, torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


def test_mistake_whitening_the_mean_is_not_added_back() -> None:
    """One library adds the mean back after whitening the advantages, so that they are not centred at all."""
    values = torch.tensor([[10.0, 12.0, 14.0], [16.0, 18.0, 999.0]])
    whitened = ppo.whiten(values, YES_3_2)
    expected = [-math.sqrt(2), -math.sqrt(0.5), 0.0, math.sqrt(0.5), math.sqrt(2)]
    assert whitened[YES_3_2].tolist() == pytest.approx(expected, abs=1e-5)
    assert whitened[YES_3_2].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert whitened[1, 2].item() == 0.0


def test_line_26_reward_whitening_keeps_the_mean() -> None:
    values = torch.tensor([[10.0, 12.0, 14.0], [16.0, 18.0, 0.0]])
    kept = ppo.whiten(values, YES_3_2, keep_mean=True)[YES_3_2]
    assert kept.mean().item() == pytest.approx(14.0, abs=1e-4)
    assert kept.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_line_23_kl_penalty_per_token_and_the_score_once_on_the_last_real_one() -> None:
    """Two rows of one prompt token, two and one completion tokens, and padding."""
    old = torch.tensor([[0.0, -1.0, -2.0, -9.0], [0.0, -1.0, -1.5, -9.0]])
    reference = torch.tensor([[0.0, -1.5, -1.0, -5.0], [0.0, -2.0, -1.0, -5.0]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    rewards = ppo.token_rewards(torch.tensor([3.0, -2.0]), old, reference, mask, beta=0.1)
    # -0.1 * (log pi_old - log pi_ref): 0.5 nats above -> -0.05; 1 nat below -> +0.1
    expected = torch.tensor([[0.0, -0.05, 0.1 + 3.0, 0.0], [0.0, -0.1 - 2.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_mistake_clamping_a_token_that_the_reference_likes_more_is_paid_for() -> None:
    """One library cuts each token's KL off at 0: then swapping probability between two tokens costs, and nothing pays it back."""
    old, reference = torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
    rewards = ppo.token_rewards(torch.zeros(1), old, reference, torch.ones(1, 2, dtype=torch.bool), beta=0.5)
    assert rewards.tolist() == [[1.0, -1.0]]


def test_mistake_placement_the_score_is_on_eos_and_nothing_behind_it() -> None:
    """One library puts it one position later, onto padding, or nowhere if the row is full."""
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    zeros = torch.zeros(2, 4)
    rewards = ppo.token_rewards(torch.tensor([2.0, -1.0]), zeros, zeros, mask, beta=0.1)
    assert rewards.tolist() == [[0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, -1.0]]
    _, returns = ppo.advantages_and_returns(rewards, zeros, mask, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[0.0, 2.0, 2.0, 0.0], [0.0, -1.0, -1.0, -1.0]]


@pytest.mark.parametrize("padding", [0, 50])
def test_mistake_averaging_padding_makes_no_statistic_smaller(padding: int) -> None:
    """Ratios 2, 1/2 in one row and 4 in the other, all with advantage 1: means over three tokens, however long the rows are."""
    log_ratio = torch.tensor([[math.log(2), -math.log(2)], [math.log(4), 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    log_ratio, mask = (pad(each, (0, padding), value=value) for each, value in ((log_ratio, 9.0), (mask, False)))
    entropy = torch.where(mask, 1.5, 9.0)
    loss = ppo.policy_loss(log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio), mask, clip=0.2)
    tokens = mask.sum()
    assert (loss.kl_old / tokens).item() == pytest.approx((2 + 0.5 + 4 - 3 - math.log(4)) / 3)
    assert (loss.clipped / tokens).item() == pytest.approx(2 / 3)
    assert (loss.total / tokens).item() == pytest.approx(-(1.2 + 0.5 + 1.2) / 3)
    assert ppo.masked_mean(entropy, mask).item() == 1.5


def test_line_24_advantages_by_hand() -> None:
    """gamma 1, lambda 0.5: deltas 1+3-2, 0+1-3, 2+0-1 -> 2, -2, 1; A3 = 1, A2 = -2 + .5, A1 = 2 - .75."""
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    values = torch.tensor([[2.0, 3.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo.advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[1.25, -1.5, 1.0]]
    assert returns.tolist() == [[3.25, 1.5, 2.0]]


def _slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum over l of (gamma lambda)^l delta_{t+l}, over one completion without padding."""
    padded = [*values, 0.0]
    deltas = [r + gamma * padded[t + 1] - padded[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("seed", range(5))
def test_line_24_advantages_equal_their_definition_whatever_stands_around(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(4, 12, generator=generator), torch.randn(4, 12, generator=generator)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    spans = [(2, 9), (0, 12), (5, 6), (3, 10)]
    for row, (first, last) in enumerate(spans):
        mask[row, first:last] = True
    noisy_rewards = torch.where(mask, rewards, float("nan"))
    advantages, returns = ppo.advantages_and_returns(noisy_rewards, torch.where(mask, values, float("inf")), mask)
    for row, (first, last) in enumerate(spans):
        slow = _slow_advantages(rewards[row, first:last].tolist(), values[row, first:last].tolist(), 1.0, 0.95)
        assert advantages[row, first:last].tolist() == pytest.approx(slow, abs=1e-4)
        assert (returns - advantages)[row, first:last].tolist() == pytest.approx(values[row, first:last].tolist(), abs=1e-4)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_line_27_policy_loss_by_hand() -> None:
    """Ratios 1.5, 0.5, 1.1 with advantages 1, -1, 2 and clip 0.2: max(-A r, -A clip(r))."""
    ratios, advantages = torch.tensor([[1.5, 0.5, 1.1]]), torch.tensor([[1.0, -1.0, 2.0]])
    loss = ppo.policy_loss(ratios.log(), torch.zeros(1, 3), advantages, torch.ones(1, 3, dtype=torch.bool), clip=0.2)
    assert loss.total.item() == pytest.approx(-1.2 + 0.8 - 2.2)
    assert loss.clipped.item() == 2
    assert loss.kl_old.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)))


def test_line_27_a_clipped_token_has_no_gradient_and_a_padded_one_neither() -> None:
    logprobs = torch.tensor([[1.5, 1.1, 0.9]]).log().requires_grad_()
    mask = torch.tensor([[True, True, False]])
    ppo.policy_loss(logprobs, torch.zeros(1, 3), torch.ones(1, 3), mask).total.backward()
    assert isinstance(logprobs.grad, Tensor)
    assert logprobs.grad.tolist()[0] == pytest.approx([0.0, -1.1, 0.0])


def test_line_27_value_loss_by_hand() -> None:
    """Old 0, new 1, return 2, clip 0.2: max((1-2)^2, (0.2-2)^2) / 2; old 0, new 0.1, return 0: 0.01 / 2."""
    loss = ppo.value_loss(
        torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), clip=0.2
    )
    assert loss.total.item() == pytest.approx(0.5 * (1.8**2 + 0.1**2))
    assert loss.clipped.item() == 1


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full((1, 3), 2.0), returns, mask) == pytest.approx(0.0)
    assert ppo.explained_variance(returns, torch.ones(1, 3), mask) == 0.0


def test_line_31_adaptive_beta_by_hand() -> None:
    """Error clipped at +-0.2: KL 9 over target 6 is +0.5 -> 0.2; 0.1 * (1 + 0.2 * 64 / 640)."""
    assert ppo.next_beta(0.1, 9.0, target=6.0, samples=64, horizon=640) == pytest.approx(0.1 * 1.02)
    assert ppo.next_beta(0.1, 0.0, target=6.0, samples=64, horizon=640) == pytest.approx(0.1 * 0.98)
    assert ppo.next_beta(0.1, 6.6, target=6.0, samples=64, horizon=640) == pytest.approx(0.1 * 1.01)


def test_line_29_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [ppo.learning_rate_factor(step, 10, 2) for step in range(11)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
