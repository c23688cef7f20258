"""Memory that is planned from shapes alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from components.rlhf import memory
from components.rlhf.memory import Passes, shape_only, shape_role, training_shares


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_plan_changes_nothing_of_what_is_built_and_trained_after_it(
    kind: str, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator a plan attends with a stand-in. It once stayed in the configuration, and in models made from that."""
    ids = torch.arange(12).view(2, 6)

    def gradients(config: LlamaConfig) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected, config = gradients(tiny()), tiny()
    before = config.to_dict()
    monkeypatch.setattr(memory, "device", lambda: torch.device(kind))
    training_shares(config, "bfloat16", Passes(4, 8, 16, joined=joined), lora_rank=2, lora_layers=1, scorer=False)
    assert config.to_dict() == before
    assert config._attn_implementation == tiny()._attn_implementation
    for found, wanted in zip(gradients(config), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_stand_in_refuses_real_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda"))
    role = shape_role(shape_only(tiny(), "float32"), 0)
    role.backbone.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="only plans memory"):
        role.hidden(torch.zeros((1, 4), dtype=torch.long))
