"""Shapes of well-known models, for plans that are made without their files.

Each stands here with the count of parameters that its makers publish; a test builds the shape and counts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import LlamaConfig


class Shape(NamedTuple):
    """A Llama-like model: its dimensions, and how many parameters they make."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    parameters: int


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 49152, True, 134_515_008),
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 128256, True, 1_235_814_400),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128256, False, 8_030_261_248),
}


def llama_config(shape: Shape, context_tokens: int) -> LlamaConfig:
    """The configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=context_tokens,
    )
