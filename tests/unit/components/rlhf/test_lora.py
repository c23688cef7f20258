"""Our forward and backward pass of a LoRA layer, against the library's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners import lora

from components.rlhf.adapters import adapted_layers, adapter_parameters, adapter_role, add_adapter
from components.rlhf.lora import LoraLinear
from components.rlhf.scratch_model import new_model, train_tokenizer

IDS = torch.tensor([[5, 9, 12, 7, 30], [8, 8, 31, 40, 2]])


@pytest.fixture
def model() -> Any:
    tokenizer = train_tokenizer(["my printer is slow and my phone is loud"], 300, 64)
    made = new_model(tokenizer, layers=2, hidden=16, heads=2, context_tokens=64, seed=0)
    made.requires_grad_(False)
    for seed, name in enumerate(("policy", "value")):
        add_adapter(made, name, rank=3, alpha=7, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(made, name).values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def outcome(model: Any, adapter: str, inputs: Any = IDS) -> list[torch.Tensor]:
    """Hidden states, and the gradients of the adapter."""
    role = adapter_role(model, adapter, torch.nn.Identity(), trainable=True, head_trainable=False)
    hidden = role.hidden(inputs)
    (hidden.float() * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    gradients = [p.grad for p in role.trainable if p.grad is not None]
    assert len(gradients) == len(role.trainable) == 28
    model.zero_grad()
    return [hidden.detach(), *gradients]


@pytest.mark.parametrize("adapter", ["policy", "value"])
def test_outputs_and_gradients_are_the_librarys(adapter: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {type(layer) for _, layer in adapted_layers(model)} == {LoraLinear}
    ours = outcome(model, adapter)
    monkeypatch.setattr(LoraLinear, "forward", lora.Linear.forward)
    for a, b in zip(ours, outcome(model, adapter), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_without_an_adapter_it_is_the_base(model: Any) -> None:
    tokenizer = train_tokenizer(["my printer is slow and my phone is loud"], 300, 64)
    plain = new_model(tokenizer, layers=2, hidden=16, heads=2, context_tokens=64, seed=0)
    role = adapter_role(model, "", torch.nn.Identity(), trainable=False, head_trainable=False)
    expected = plain.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(role.hidden(IDS), expected, atol=1e-6, rtol=1e-6)


def test_in_bfloat16_it_stays_near_float32_and_adapters_get_float32_gradients(model: Any) -> None:
    exact = outcome(model, "policy")
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    near = outcome(model, "policy")
    assert near[0].dtype == torch.bfloat16
    for a, b in zip(near, exact, strict=True):
        assert (a.float() - b).norm() < 0.05 * b.norm()
    assert {g.dtype for g in near[1:]} == {torch.float32}
