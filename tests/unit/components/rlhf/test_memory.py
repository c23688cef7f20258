"""Memory that is planned from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from components.rlhf import memory
from components.rlhf.activations import checkpoint_activations
from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.attention import use_short_rows
from components.rlhf.live_bytes import LiveBytes
from components.rlhf.memory import Passes, backward_bytes, pass_bytes, shape_only, shape_role, training_shares
from components.rlhf.models import policy_role
from components.rlhf.rollout import token_logprobs
from components.rlhf.tokens import right_pad


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
def test_a_plan_changes_nothing_of_what_is_built_and_trained_after_it(kind: str, joined: bool) -> None:
    """On an accelerator a plan attends with a stand-in. It once stayed in the configuration, and in models made from that."""
    ids = torch.arange(12).view(2, 6)

    def gradients(config: LlamaConfig) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected, config = gradients(tiny()), tiny()
    before = config.to_dict()
    training_shares(config, "bfloat16", Passes(4, 8, 16, joined=joined), kind, lora_rank=2, lora_layers=1, scorer=False)
    assert config.to_dict() == before
    assert config._attn_implementation == tiny()._attn_implementation
    for found, wanted in zip(gradients(config), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_stand_in_refuses_real_numbers() -> None:
    role = shape_role(shape_only(tiny(), "float32", "cuda"), 0)
    role.backbone.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="only plans memory"):
        role.hidden(torch.zeros((1, 4), dtype=torch.long))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_a_pass_holds_is_counted_without_weights(rank: int, checkpointed: bool) -> None:
    """As much as the tensors of the real model's pass that are alive at once."""
    model = AutoModelForCausalLM.from_config(tiny()).eval()
    use_short_rows(model)
    if rank:
        add_adapter(model, "policy", rank, rank, 0)
        model.requires_grad_(False)
        role = adapter_role(model, "policy", model.get_output_embeddings(), trainable=True, head_trainable=False)
    else:
        role = policy_role(model, trainable=True)
    if checkpointed:
        checkpoint_activations(role.backbone)
    batch = right_pad([[1] * 20] * 6, [[2] * 12] * 6, 0)
    with LiveBytes() as live:
        logprobs_BT, _ = token_logprobs(role, batch, temperature=1.0, pad_id=0)
        logprobs_BT.sum().backward()
    shape = shape_role(shape_only(tiny(), "float32", "cpu"), rank)
    passes = Passes(6, 32, 192, activation_checkpointing=checkpointed)
    gradient = 4 * sum(parameter.numel() for parameter in role.trainable)
    held = pass_bytes(shape, passes, "cpu", predicted=12) / (1 + memory.UNUSABLE)
    assert held + gradient == pytest.approx(live.peak, rel=0.1)
    assert pass_bytes(shape, passes._replace(rows=12, micro_batch_tokens=384), "cpu", 12) > 1.9 * held, "twice the rows"
    assert all(parameter.grad is None for parameter in shape.trainable)


@pytest.mark.parametrize("tokens", [32, 600])
def test_long_rows_keep_no_scores_on_a_cpu_either(tokens: int) -> None:
    """There torch's kernel attends, which the shapes alone would not show."""
    config = tiny()
    config.max_position_embeddings = 1024
    model = AutoModelForCausalLM.from_config(config).eval()
    use_short_rows(model)
    role = policy_role(model, trainable=True)
    batch = right_pad([[1] * (tokens - 12)] * 6, [[2] * 12] * 6, 0)
    with LiveBytes() as live:
        token_logprobs(role, batch, temperature=1.0, pad_id=0)[0].sum().backward()
    gradient = 4 * sum(parameter.numel() for parameter in role.trainable)
    shape = shape_role(shape_only(config, "float32", "cpu"), 0)
    before = shape.backbone.config._attn_implementation
    assert backward_bytes(shape, 6, tokens, predicted=12) + gradient == pytest.approx(live.peak, rel=0.1)
    assert shape.backbone.config._attn_implementation == before


def test_rows_of_many_lengths_fill_a_micro_batch_and_equal_ones_do_not() -> None:
    role = shape_role(shape_only(tiny(), "float32", "cuda"), 0)
    passes = Passes(8, 30, 50)
    assert pass_bytes(role, passes, "cuda", 0) == pytest.approx(
        pass_bytes(role, passes._replace(varied=False), "cuda", 0) * 50 / 30, abs=1
    )


def test_an_accelerators_attention_keeps_no_scores_and_a_cpus_does() -> None:
    def grows(kind: str) -> float:
        role = shape_role(shape_only(tiny(), "float32", kind), 0)
        return backward_bytes(role, 1, 64) / backward_bytes(role, 1, 32)

    assert grows("cuda") < 2, "twice the tokens; the gradient of a weight stays as large"
    assert grows("cpu") > 2.2


@pytest.mark.parametrize(("precision", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_the_shares_of_a_training_are_its_parameters_by_their_bytes(precision: Any, itemsize: int) -> None:
    passes = Passes(4, 8, 16)

    def shares(**how: Any) -> dict[str, int]:
        return {f"{each.role}: {each.what}": each.bytes for each in training_shares(tiny(), precision, passes, "cuda", **how)}

    full = AutoModelForCausalLM.from_config(tiny()).num_parameters()
    found = shares(lora_rank=0, lora_layers=0, scorer=False)
    assert found[f"model: weights, {precision}"] == pytest.approx(full * itemsize, abs=100)  # RoPE's buffers
    assert found.get("model: float32 copy") == (full * 4 if itemsize == 2 else None)
    assert found["model: AdamW's moments"] == 2 * full * 4
    scorer = shares(lora_rank=0, lora_layers=0, scorer=True)
    assert scorer["model: AdamW's moments"] == 2 * 4 * (full - 50 * 16), "a reward model has no language head"
    adapter = shares(lora_rank=2, lora_layers=1, scorer=False)
    numbers = 2 * (16 + 16 + 2 * (16 + 8) + 16 + 16 + 3 * (16 + 32))  # rank x (in + out) of q, k, v, o, gate, up, down
    assert adapter["adapter: weights, float32"] == 4 * numbers
    assert adapter["adapter: AdamW's moments"] == 8 * numbers
    assert adapter[f"base: weights, {precision}"] == found[f"model: weights, {precision}"]
    assert found["device: workspace of cuBLAS"] == memory.WORKSPACE_BYTES
