"""What an evaluation says that it takes of the memory, beside the tensors that there are when it samples, reads and scores."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from components.evaluate.memory import evaluation_shares
from components.rlhf.attention import use_short_rows
from components.rlhf.live_bytes import LiveBytes
from components.rlhf.memory import weights_bytes
from components.rlhf.models import policy_role
from components.rlhf.rollout import sample_tokens, token_logprobs
from components.rlhf.tokens import right_pad

PAD, ROWS = 0, 12


@pytest.mark.parametrize(
    ("prompt", "new", "vocabulary", "most"),
    [
        (90, 4, 50, "the prompts' cache and one layer's activations"),
        (600, 4, 50, "the prompts' cache and one layer's activations"),
        (4, 30, 50, "cache"),
        (20, 20, 3000, "hidden states and logits"),
    ],
)
def test_the_plan_is_the_weights_and_the_pass_that_takes_most(prompt: int, new: int, vocabulary: int, most: str) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    use_short_rows(model)
    role = policy_role(model)
    prompts = [[1] * (prompt - row % 3) for row in range(ROWS)]  # with padding, as prompts have
    generator = torch.Generator().manual_seed(0)
    with LiveBytes() as live, torch.no_grad():
        sample_tokens(role, prompts, max_new_tokens=new, temperature=1.0, pad_id=PAD, eos_id=-1, generator=generator)
        token_logprobs(role, right_pad(prompts, [[2] * new] * ROWS, PAD), temperature=1.0, pad_id=PAD)
    weights, largest = evaluation_shares(config, "float32", ROWS, prompt, new, "cpu")
    assert weights.bytes == weights_bytes(model)
    assert largest.what == most
    assert largest.bytes == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("tied", [False, True])
def test_of_two_devices_the_first_has_half_of_the_layers_and_all_else(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=25, num_attention_heads=4, tie_word_embeddings=tied
    )
    model = AutoModelForCausalLM.from_config(config)
    there = weights_bytes(model) - sum(weights_bytes(layer) for layer in model.model.layers[13:])
    *shares, largest = evaluation_shares(config, "float32", ROWS, 4, 30, "cpu", devices=2)
    assert sum(share.bytes for share in shares) == there
    *_, whole = evaluation_shares(config, "float32", ROWS, 4, 30, "cpu")
    assert largest.what == whole.what == "cache"
    assert largest.bytes < whole.bytes, "a cache is where its layers are"
