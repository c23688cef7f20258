"""Shapes of well-known models, for plans that are made without their files.

Each stands here with the count of parameters that its makers publish; a test builds the shape and counts them.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig

CONTEXT_TOKENS = 131072  # of the Llamas below; the profile's limits cut what is used of it
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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


def config_of(model: str) -> PretrainedConfig:
    """The configuration of a model: a folder or its config.json, a name of `SHAPES`, or a name on the Hub.

    Raises:
        DoNotRetry: it cannot be read, or is no causal language model of a kind whose work is counted here.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    known = {name.lower(): shape for name, shape in SHAPES.items()}
    if not path.exists() and (shape := known.get(model.rpartition("/")[2].lower().removesuffix("-instruct"))):
        return llama_config(shape, CONTEXT_TOKENS)
    place = path.parent if path.name == "config.json" else path
    if path.exists() and not (place / "config.json").is_file():
        raise DoNotRetry(f"{path} has no config.json", "give a model's folder, or its config.json")
    try:
        config = AutoConfig.from_pretrained(place if path.exists() else model)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        near = difflib.get_close_matches(model, list(SHAPES), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        lines = str(error).splitlines() or [type(error).__name__]
        raise DoNotRetry(
            f"unknown model {model!r}{hint} {lines[0]}",
            f"give a folder or config.json, a name on the Hub if it can be reached, or one of {', '.join(SHAPES)}",
        ) from error
    if any(getattr(config, name, 0) for name in _EXPERTS):
        raise DoNotRetry(f"{model} has experts: what it computes for a token is not counted here", "plan with a dense model")
    if missing := [key for key in ("hidden_size", "num_hidden_layers", "intermediate_size") if not hasattr(config, key)]:
        raise DoNotRetry(f"{model}: its config.json has no {', '.join(missing)}", "plan with a causal language model")
    return config
