"""Floating-point operations of a model, counted from its configuration; a multiplication and its addition are two.

Kaplan 2020 (2001.08361), section 2.1, with grouped keys and values and a gated feed-forward layer: a forward pass costs two
operations for each weight of a linear layer and token, and attention two products with the half of the tokens that a token sees.
The embedding is looked up, and costs nothing; the head costs only where a token is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_weights(config: PretrainedConfig) -> int:
    """Weights of the linear layers of one transformer layer."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    attention = config.hidden_size * size * (2 * heads + 2 * groups)
    return int(attention + 3 * config.hidden_size * config.intermediate_size)


def forward_flops(config: PretrainedConfig, lengths: Sequence[int], predicted: int = 0) -> int:
    """A forward pass of sequences of these lengths, in tokens, of which `predicted` in all go through the language head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = 2 * layer_weights(config) * sum(lengths)
    attention = 2 * config.num_attention_heads * size * sum(each * each for each in lengths)  # a token sees half of the others
    return int(config.num_hidden_layers * (linear + attention) + 2 * predicted * config.vocab_size * config.hidden_size)


def training_flops(forward: int, *, adapters: bool, adapted_share: float = 1.0) -> int:
    """Forward and backward pass together, without what activation checkpointing computes a second time.

    The backward pass makes the gradient of every layer's input, and of its weights where these are trained; with adapters the
    base's weights are not, and the adapters' own products are left out (a percent at rank 32).

    Args:
        adapted_share: of the layers, those that carry an adapter: the backward pass ends below the first of them.
    """
    return int(forward * (1 + adapted_share)) if adapters else 3 * forward
