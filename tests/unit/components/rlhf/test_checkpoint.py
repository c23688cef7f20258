"""Checkpoints give back what was saved, bit by bit, and read nothing but safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.rlhf import checkpoint
from components.rlhf.optimisation import Optimiser, data_order


def test_line_37_a_nested_state_comes_back_bit_equal(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    state = {
        "weights": [torch.randn(3, 4), torch.randn(5).to(torch.bfloat16), torch.arange(4)],
        "shared": [torch.ones(2)[None].expand(3, 2)],
        "generator": generator.get_state(),
        "history": [{"loss": 0.1, "step": 1, "why": None, "ok": True}, {}],
        "numbers": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}, 11: {"step": 2}},
        "inf": float("inf"),
    }
    checkpoint.save(state, str(tmp_path / "c.safetensors"))
    loaded = checkpoint.load(str(tmp_path / "c.safetensors"))
    assert set(loaded) == set(state)
    for one, other in zip(state["weights"], loaded["weights"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert torch.equal(loaded["shared"][0], torch.ones(3, 2))
    assert loaded["history"] == state["history"]
    assert list(loaded["numbers"]) == [0, 11]
    assert torch.equal(loaded["numbers"][0]["step"], torch.tensor(3.0))
    assert loaded["inf"] == float("inf")
    torch.Generator().set_state(loaded["generator"])


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a rankloop checkpoint"):
        checkpoint.load(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mistake_restart_an_optimiser_continues_where_it_stopped(tmp_path: Path, dtype: torch.dtype) -> None:
    """Ten steps at once, and four, a checkpoint, a new process' objects, six: bit-equal weights."""

    def steps(weights: list[torch.nn.Parameter], optimiser: Optimiser, first: int, last: int) -> None:
        for step in range(first, last):
            for number, weight in enumerate(weights):
                ((0.1 * step - 0.3 * number) / 2 * weight**2).sum().backward()
            optimiser.step()

    def fresh() -> tuple[list[torch.nn.Parameter], Optimiser]:
        start = (torch.arange(6.0).view(2, 3) - 2, torch.ones(3))
        weights = [torch.nn.Parameter(values.to(dtype)) for values in start]
        return weights, Optimiser(weights, learning_rate=0.01, steps=10, weight_decay=0.1)

    whole, optimiser = fresh()
    steps(whole, optimiser, 0, 10)
    part, optimiser = fresh()
    steps(part, optimiser, 0, 4)
    path = str(tmp_path / "o.safetensors")
    checkpoint.save({"weights": [p.detach() for p in part], "optimiser": optimiser.state()}, path)
    resumed, optimiser = fresh()
    saved = checkpoint.load(path)
    with torch.no_grad():
        for weight, value in zip(resumed, saved["weights"], strict=True):
            weight.copy_(value)
    optimiser.load(saved["optimiser"])
    steps(resumed, optimiser, 4, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_weights_in_bfloat16_go_where_float32_goes_rounded() -> None:
    """Below 1 bfloat16 has steps of 1/256: in itself it would lose every step of 0.001, and stay at 1."""
    weights = [torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    optimisers = [Optimiser([each], learning_rate=1e-3, steps=20, warmup_fraction=0) for each in weights]
    for _ in range(10):
        for weight, optimiser in zip(weights, optimisers, strict=True):
            (weight * torch.tensor([[0.5, 1.0], [-1.0, 2.0]], dtype=weight.dtype)).sum().backward()
            optimiser.step()
    float32, bfloat16 = weights
    assert bfloat16.dtype == torch.bfloat16
    assert float32[0, 0].item() == pytest.approx(1 - 0.001 * (10 - 36 / 19), abs=1e-5)  # the rate falls by 1/19 from step 2 on
    assert torch.equal(bfloat16, float32.bfloat16())
    assert bfloat16[0, 0] < 1 < bfloat16[1, 0]


def test_gradients_in_bfloat16_are_added_up_in_float32() -> None:
    """In bfloat16 256 + 1 is 256: of five hundred micro-batches' gradients of 1 half would be lost."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimiser = Optimiser([weight], learning_rate=1e-3, steps=2)
    for _ in range(500):
        weight.sum().backward()
    optimiser.discard()
    for _ in range(500):
        weight.sum().backward()
    assert optimiser.step() == 500.0


def test_line_29_epsilon_is_one_in_a_hundred_thousand() -> None:
    """Adam's first step is lr g / (|g| + eps): half of lr for a gradient of 1e-5, nearly all of it with the usual eps of 1e-8."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = Optimiser([weight], learning_rate=0.5, steps=4, warmup_fraction=0)
    weight.grad = torch.tensor([1e-5])
    optimiser.step()
    assert weight.item() == pytest.approx(-0.25, rel=1e-4)


def test_line_29_one_norm_over_all_gradients_is_bounded_and_the_rate_ends_at_zero() -> None:
    """Gradients 30 and 40 are clipped to 0.6 and 0.8, and a second step with 0.3 and 0.4 is not. By hand, Adam without correction
    has m = 0.9 * 0.1 g1 + 0.1 g2 and v = 0.95 * 0.05 g1^2 + 0.05 g2^2; corrected by 1 - 0.9^2 and 1 - 0.95^2."""
    weights = [torch.nn.Parameter(torch.zeros(1, 1)), torch.nn.Parameter(torch.zeros(1))]
    optimiser = Optimiser(weights, learning_rate=0.5, steps=2, warmup_fraction=0)
    expected = [0.0, 0.0]
    for step, gradients in enumerate(([30.0, 40.0], [0.3, 0.4])):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.full_like(weight, gradient)
        rate = optimiser.learning_rate
        assert optimiser.step() == pytest.approx([50.0, 0.5][step]), "the norm before clipping"
        for number, (first, second) in enumerate(((0.6, 0.3), (0.8, 0.4))):
            m = first if step == 0 else (0.09 * first + 0.1 * second) / 0.19
            v = first**2 if step == 0 else (0.0475 * first**2 + 0.05 * second**2) / 0.0975
            expected[number] -= rate * m / (v**0.5 + 1e-5)
    assert [weight.item() for weight in weights] == pytest.approx(expected, rel=1e-5)
    assert optimiser.learning_rate == 0.0


def test_line_20_data_order_is_a_shuffle_per_epoch_and_fixed_by_the_seed() -> None:
    order = data_order(10, 25, seed=1)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == data_order(10, 25, seed=1) != data_order(10, 25, seed=2)
    assert json.dumps(data_order(10, 40, seed=1)[:25]) == json.dumps(order)  # a longer run begins the same
