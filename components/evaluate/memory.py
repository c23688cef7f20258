"""What an evaluation will take of the memory, before a model is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from components.rlhf.memory import FLOAT_BYTES, Share, cache_bytes, device_shares, forward_bytes, shape_only, spread_shares
from components.rlhf.models import Precision, dtype_of, policy_role
from components.rlhf.rollout import LOGIT_BYTES, step_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def evaluation_shares(
    config: PretrainedConfig, precision: Precision, rows: int, prompt_tokens: int, new_tokens: int, kind: str, devices: int = 1
) -> list[Share]:
    """The shares, in bytes, of the one model that is loaded at a time and of the pass that takes most, on a `kind` of device.

    Policies, reward model and judge are of one shape; a scorer takes a little less than a policy.

    Args:
        rows: answers that are sampled or scored at once.
        prompt_tokens, new_tokens: of the longest prompt and answer.
        devices: over which the layers are spread (`rlhf.spread`). The shares are those of the first, which has embeddings and head.
    """
    model = shape_only(config, precision, kind)
    role = policy_role(model)
    tokens = prompt_tokens + new_tokens
    layers, item_bytes = config.num_hidden_layers, dtype_of(precision).itemsize
    here = math.ceil(layers / devices)

    def cache(longest: int) -> int:  # of one layer twice, while a token is added
        return cache_bytes(config, precision, rows, longest) * (here + 1) // layers

    prefill = cache(prompt_tokens) + forward_bytes(role, rows, prompt_tokens, masked=True)
    hidden = rows * tokens * config.hidden_size * item_bytes
    logit_bytes = FLOAT_BYTES + (0 if precision == "float32" else item_bytes)  # each as it is computed, and in float32
    logits = min(rows * new_tokens * config.vocab_size, LOGIT_BYTES // FLOAT_BYTES) * logit_bytes
    phases = [
        Share("sampling", "the prompts' cache and one layer's activations", prefill),
        Share("sampling", "cache", cache(tokens) + step_bytes(rows, config.vocab_size)),
        Share("scoring", "one layer's activations", forward_bytes(role, rows, tokens, masked=False)),
        Share("scoring", "hidden states and logits", hidden + logits),
    ]
    return [*spread_shares(model, devices), *device_shares(kind), max(phases, key=lambda share: share.bytes)]
