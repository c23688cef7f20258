"""Attention by plain matrix products is the library's: values, gradients, masks, grouped heads, and beside a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from components.rlhf import attention
from components.rlhf.attention import SHORT_ROWS, use_short_rows


@pytest.fixture
def models() -> tuple[Any, Any]:
    """The same weights twice, with grouped heads: the library's attention and ours."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    theirs, ours = (LlamaModel(copy.deepcopy(config)).eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    use_short_rows(ours)
    assert (theirs.config._attn_implementation, ours.config._attn_implementation) == ("sdpa", SHORT_ROWS)
    return theirs, ours


IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [None, LEFT_PADDED, RIGHT_PADDED], ids=["whole", "left", "right"])
def test_values_and_gradients(models: tuple[Any, Any], mask: torch.Tensor | None) -> None:
    real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    found = []
    for model in models:
        hidden = model(input_ids=IDS, attention_mask=mask).last_hidden_state
        hidden[real].square().sum().backward()
        found.append((hidden[real].detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_one_token_at_a_time_with_a_cache(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    whole = theirs(input_ids=IDS, attention_mask=LEFT_PADDED).last_hidden_state[:, -2:]
    first = ours(input_ids=IDS[:, :4], attention_mask=LEFT_PADDED[:, :4], use_cache=True)
    steps = []
    cache = first.past_key_values
    for length in (5, 6):
        out = ours(
            input_ids=IDS[:, length - 1 : length],
            attention_mask=LEFT_PADDED[:, :length],
            position_ids=torch.full((2, 1), length - 1),
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1)[1], whole[1], atol=1e-5, rtol=1e-5)


def test_long_rows_are_left_to_the_library(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from transformers.integrations import sdpa_attention

    plain = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    models[1](input_ids=IDS)
    assert not calls
    monkeypatch.setattr(attention, "LONGEST", 5)
    models[1](input_ids=IDS)
    assert len(calls) == 2  # layers
