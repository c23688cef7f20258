"""Adapters on the last layers only: what lies below them is computed once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model, GPT2Config, GPT2Model, GraniteConfig, GraniteModel

from components.ppo_finetune.roles import trunk_layers
from components.rlhf.adapters import (
    AdapterShape,
    adapter_parameters,
    adapter_role,
    add_adapter,
    load_adapter,
    merge_adapter_into,
    save_adapter,
)
from components.rlhf.models import load_policy, policy_role, save_model
from components.rlhf.scratch_model import new_model
from components.rlhf.trunk import shared_trunk, transformer_layers
from components.services.exits import DoNotRetry

IDS = torch.tensor([[5, 9, 12, 7, 30], [8, 3, 40, 2, 2]])


@pytest.fixture
def model(tokenizer: Any) -> Any:
    made = new_model(tokenizer, layers=4, hidden=16, heads=2, context_tokens=64, seed=0)
    return made.requires_grad_(False)


def _disturbed(model: Any, adapter: str, layers: int, seed: int) -> None:
    add_adapter(model, adapter, rank=2, alpha=4, seed=seed, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, adapter).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_an_adapter_stands_on_the_last_layers_and_on_no_other(model: Any) -> None:
    _disturbed(model, "first", 0, 1)
    _disturbed(model, "last", 1, 2)
    assert {int(name.split(".")[2]) for name in adapter_parameters(model, "first")} == {0, 1, 2, 3}
    assert {int(name.split(".")[2]) for name in adapter_parameters(model, "last")} == {3}
    per_layer = [name for name in adapter_parameters(model, "first") if ".3." in name]
    assert len(adapter_parameters(model, "last")) == len(per_layer) == 2 * 7, "A and B of every linear layer"
    with pytest.raises(DoNotRetry, match="lora_layers is 5, and the model has 4 layers"):
        add_adapter(model, "more", rank=2, alpha=4, seed=0, layers=5)


def test_roles_above_a_trunk_are_the_roles_computed_whole_and_so_are_their_gradients(model: Any) -> None:
    head = model.get_output_embeddings()
    _disturbed(model, "policy", 2, 1)
    _disturbed(model, "value", 1, 2)
    trunk = shared_trunk(model.base_model, trunk_layers(4, [AdapterShape(2, 4, 2), AdapterShape(2, 4, 1)]))
    assert trunk is not None
    assert len(trunk.upper.layers) == 2
    below_BTD = trunk(IDS)
    for name in ("policy", "value", ""):
        role = adapter_role(model, name, head, trainable=bool(name), head_trainable=False)
        role.upper = trunk.upper
        results = []
        for given in (None, below_BTD):
            hidden_BTD = role.hidden(IDS, trunk_BTD=given)
            if name:
                hidden_BTD.square().sum().backward()
            results.append((hidden_BTD, [p.grad.clone() for p in role.trainable]))
            for parameter in role.trainable:
                parameter.grad = None
        (whole_BTD, whole_gradients), (above_BTD, above_gradients) = results
        assert torch.equal(whole_BTD, above_BTD)
        for one, other in zip(whole_gradients, above_gradients, strict=True):
            assert one.abs().sum() > 0
            assert torch.equal(one, other)


def test_an_adapter_of_the_last_layers_is_saved_loaded_and_merged(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "base")
    _disturbed(model, "all", 0, 1)
    _disturbed(model, "last", 1, 2)
    role = adapter_role(model, "last", model.get_output_embeddings(), trainable=True, head_trainable=False)
    expected = role.hidden(IDS)
    save_adapter(model, "last", tmp_path / "adapter", 2, 4, 1)
    plain, _ = load_policy(tmp_path / "base")
    merge_adapter_into(plain, model, "last")
    torch.testing.assert_close(policy_role(plain).hidden(IDS), expected, atol=1e-5, rtol=1e-5)
    other, _ = load_policy(tmp_path / "base")
    assert load_adapter(other, "last", tmp_path / "adapter") == (2, 4, 1)
    loaded = adapter_role(other, "last", other.get_output_embeddings(), trainable=False, head_trainable=False)
    torch.testing.assert_close(loaded.hidden(IDS), expected)


def test_only_what_lies_below_every_adapter_is_shared(model: Any) -> None:
    assert trunk_layers(4, [AdapterShape(2, 4, 1), AdapterShape(2, 4, 3)]) == 1
    assert trunk_layers(4, [AdapterShape(2, 4, 1), AdapterShape(2, 4, 0)]) == 0
    assert shared_trunk(model.base_model, 0) is None


def test_a_backbone_that_cannot_be_cut_is_found_out() -> None:
    """Granite scales what goes into the first layer, GPT-2 adds positions to it, and Gemma 2 has windows in every other layer."""
    size: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    granite = GraniteModel(GraniteConfig(**size, **heads, embedding_multiplier=3.0)).eval()
    assert shared_trunk(granite, 1) is None
    assert shared_trunk(GraniteModel(GraniteConfig(**size, **heads, embedding_multiplier=1.0)).eval(), 1) is not None
    gpt2 = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    assert shared_trunk(gpt2, 1) is None
    assert transformer_layers(gpt2)[0] == "h"
    gemma = Gemma2Model(Gemma2Config(**size, **heads, head_dim=8)).eval()
    assert shared_trunk(gemma, 1) is None
