"""Activation checkpointing: a layer's activations are computed again in the backward pass instead of being kept.

It costs one more forward pass of each layer, and leaves of every layer only its input. The library's own switch acts on modules in
training mode alone, where it would bring dropout back, and it takes their cache away, which sampling needs. Here it acts wherever
gradients are recorded, in eval mode too, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from components.services.exits import DoNotRetry


def checkpoint_activations(backbone: nn.Module) -> None:
    """Makes every transformer layer of the backbone keep only its input for the backward pass. Doing it twice is doing it once.

    The backward pass computes a layer again as it is then: on a shared base the same role must still be active (`Role.activate`).

    Raises:
        DoNotRetry: the library does not say which of this model's layers can be computed again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise DoNotRetry(
            f"{type(backbone).__name__} has no layers that can be computed again", "set activation_checkpointing to false"
        )
    for layer in layers:
        if "forward" not in vars(layer):
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_or_checkpoint(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        # Without dropout nothing is drawn, so there is no random state to restore.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    return forward_or_checkpoint
