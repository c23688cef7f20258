"""Activation checkpointing in eval mode: the same gradients, fewer activations kept, sampling untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from components.rlhf.activations import checkpoint_activations
from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.models import Role, policy_role
from components.rlhf.reward import ranking_scores
from components.rlhf.rollout import sample_tokens, token_logprobs
from components.rlhf.scratch_model import new_model
from components.rlhf.tokens import right_pad
from components.services.exits import DoNotRetry

IDS = torch.arange(3, 3 + 40).reshape(2, 20)


def deep_model(tokenizer: Any) -> Any:
    return new_model(tokenizer, layers=4, hidden=16, heads=2, context_tokens=64, seed=0)


def roles_on(model: Any, lora: bool) -> list[Role]:
    """The policy; or two adapters on one base, which are not zero."""
    if not lora:
        return [policy_role(model, trainable=True)]
    model.requires_grad_(False)
    for number, name in enumerate(("policy", "value")):
        add_adapter(model, name, rank=2, alpha=4, seed=number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    head = model.get_output_embeddings()
    return [adapter_role(model, name, head, trainable=True, head_trainable=False) for name in ("policy", "value")]


def gradients_and_bytes(model: Any, lora: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of every role in turn, and what autograd kept for them, in bytes."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() * (not isinstance(tensor, nn.Parameter))
        return tensor

    found: list[torch.Tensor] = []
    for role in roles_on(model, lora):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = role.hidden(IDS).square().mean()
        loss.backward()
        found += [p.grad.clone() for p in role.trainable if p.grad is not None]
    assert not model.training
    return found, kept


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradients_are_the_same_and_few_activations_are_kept(tokenizer: Any, lora: bool) -> None:
    plain, checkpointed = deep_model(tokenizer), deep_model(tokenizer)
    checkpoint_activations(checkpointed.base_model)
    expected, kept = gradients_and_bytes(plain, lora)
    found, kept_again = gradients_and_bytes(checkpointed, lora)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)
    assert kept_again < kept / 4


def test_twice_is_once(tokenizer: Any) -> None:
    model = deep_model(tokenizer)
    checkpoint_activations(model.base_model)
    first = [vars(layer)["forward"] for layer in model.base_model.layers]
    checkpoint_activations(model.base_model)
    assert [vars(layer)["forward"] for layer in model.base_model.layers] == first


def test_no_dropout_comes_on() -> None:
    """GPT-2's own layers drop a tenth in training mode: the library's switch needs that mode, ours must not."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0.5, attn_pdrop=0.5)
    model = GPT2LMHeadModel(config).eval()
    role = policy_role(model, trainable=True)
    expected = role.hidden(IDS).detach()
    checkpoint_activations(role.backbone)
    hidden = role.hidden(IDS)
    assert torch.equal(hidden, expected)
    hidden.square().mean().backward()
    once = [p.grad.clone() for p in role.trainable if p.grad is not None]
    model.zero_grad()
    role.hidden(IDS).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(once, (p for p in role.trainable if p.grad is not None), strict=True))


def test_sampling_with_its_cache_joined_rows_and_log_probabilities_do_not_change(tokenizer: Any) -> None:
    found = []
    for checkpointed in (False, True):
        model = deep_model(tokenizer)
        role = policy_role(model, trainable=True)
        if checkpointed:
            checkpoint_activations(role.backbone)
        seed = torch.Generator().manual_seed(0)
        drawn = sample_tokens(role, [[3, 5, 7], [9]], max_new_tokens=8, temperature=1.0, pad_id=2, eos_id=1, generator=seed)
        batch = right_pad([[3, 5, 7]], [drawn[0][0]], 2)
        logprobs, _ = token_logprobs(role, batch, temperature=1.0, pad_id=2)
        scorer = Role(role.backbone, nn.Linear(16, 1), role.trainable)
        nn.init.ones_(scorer.head.weight)
        scores = ranking_scores(scorer, [[3, 5, 7]], [[[9, 1], [11, 12, 1]]], 2)
        assert scores.requires_grad
        assert torch.equal(torch.tensor(drawn[0][0]), batch.ids_BT[batch.completion_mask_BT])
        torch.testing.assert_close(logprobs[batch.completion_mask_BT], drawn[0][1], atol=1e-4, rtol=1e-4)
        found.append((drawn[0][0], drawn[1][0], logprobs.detach(), scores.detach() - scorer.head.bias.detach()))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[0][3], found[1][3])


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(DoNotRetry, match="Linear has no layers that can be computed again"):
        checkpoint_activations(nn.Linear(2, 2))
