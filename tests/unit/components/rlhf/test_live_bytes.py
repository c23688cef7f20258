"""Bytes of tensors that are alive."""

from __future__ import annotations

import pytest
import torch

from components.rlhf.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_counts_from_its_making_until_its_last_tensor_is_gone(device: str) -> None:
    outside = torch.ones(1000, device=device)
    with LiveBytes() as live:
        first = torch.ones(100, device=device)
        assert live.now == live.peak == 400
        view = first[:10]
        outside.add_(1)
        assert live.now == 400, "neither a view nor what was there before"
        second = first + 1
        del first
        assert live.now == 800, "the view still holds it"
        del view, second
        assert (live.now, live.peak) == (0, 800)
        live.forget()
        assert live.peak == 0


def test_a_backward_pass_is_seen() -> None:
    weight = torch.ones((10, 10), requires_grad=True)
    with LiveBytes() as live:
        kept = torch.tanh(torch.ones((10, 10)) @ weight)  # what is multiplied, and what tanh gave
        assert live.now == 800
        kept.sum().backward()
        assert live.now == 800, "the gradient came, and the product's input went with the graph"
        assert live.peak > live.now
