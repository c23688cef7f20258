"""How far a sampler is from the trainer, and the weights that correct it: by hand, and against the mean that they restore."""

from __future__ import annotations

import math

import pytest
import torch

from components.rlhf.mismatch import mismatch, sampler_weights

NAN = math.nan
MASK = torch.tensor([[False, True, True], [False, True, False]])
TRAINER = torch.tensor([[0.0, -1.0, -2.0], [NAN, -0.5, NAN]])
SAMPLER = torch.tensor([[9.0, -1.3, -1.8], [NAN, -0.5, NAN]])


def test_line_22_largest_mean_and_kl_of_the_difference_by_hand() -> None:
    found = mismatch(TRAINER, SAMPLER, MASK)  # differences 0.3, -0.2 and 0
    assert found.largest == pytest.approx(0.3, rel=1e-5)
    assert found.mean == pytest.approx(0.5 / 3, rel=1e-5)
    assert found.kl == pytest.approx((math.exp(0.3) - 1.3 + math.exp(-0.2) - 0.8) / 3, rel=1e-4)


def test_line_22_one_distribution_differs_by_nothing() -> None:
    assert mismatch(TRAINER, TRAINER.clone(), MASK) == (0.0, 0.0, 0.0)


def test_line_22_a_token_weighs_what_the_trainer_gives_it_over_the_samplers_up_to_the_cap() -> None:
    sampler = torch.tensor([[9.0, -3.0, -1.8], [NAN, -0.5, NAN]])
    weights = sampler_weights(TRAINER.requires_grad_(), sampler, MASK, 2.0)
    expected = torch.tensor([[1.0, 2.0, math.exp(-0.2)], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad


def test_line_22_weighted_means_over_the_samplers_tokens_are_means_over_the_trainers() -> None:
    """Exactly, over all tokens of a vocabulary of five, where the cap is out of reach; without weights they are not."""
    trainer, sampler = torch.log_softmax(torch.tensor([[0.1, 1.0, -1.0, 0.5, 0.0], [0.6, 0.2, -0.5, 0.9, 0.3]]), -1)
    worth = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0])
    weights = sampler_weights(trainer[None], sampler[None], torch.ones(1, 5, dtype=torch.bool), 100.0)[0]
    truth = (trainer.exp() * worth).sum()
    torch.testing.assert_close((sampler.exp() * weights * worth).sum(), truth)
    assert abs(float((sampler.exp() * worth).sum() - truth)) > 0.1
