"""What PPO will take of the memory, role by role, before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch

from components.ppo_finetune.roles import trunk_layers
from components.rlhf.adapters import ADAPTER_FOLDER, AdapterShape, adapter_bytes, adapter_shape
from components.rlhf.memory import (
    FLOAT_BYTES,
    Passes,
    Share,
    cache_bytes,
    device_shares,
    forward_bytes,
    held_bytes,
    pass_bytes,
    shape_only,
    shape_role,
    sharding_shares,
    weights_bytes,
    weights_file_bytes,
)
from components.rlhf.models import device, dtype_of
from components.rlhf.rollout import PREFILL_MICRO_BATCHES, step_bytes
from components.rlhf.trunk import transformer_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VLLM_BLOCK_TOKENS = 128  # in which vLLM hands out its cache on a CPU; a completion's last one is not full
VLLM_OWN_BYTES = 2**30  # of the process on a CPU, beside weights and cache: 0.9 to 1.2 GiB seen


class Knobs(Protocol):
    """What the plan needs of the stage's configuration."""

    batch_prompts: int
    samples_per_prompt: int
    max_new_tokens: int
    micro_batch_tokens: int
    activation_checkpointing: bool
    processes: int
    nodes: int
    shard: bool
    lora_rank: int
    lora_layers: int
    precision: Literal["float32", "bfloat16"]
    rollout_engine: Literal["torch", "vllm"]
    vllm_memory_fraction: float


class Scorer(NamedTuple):
    """A member of the reward model, or the judge, as an adapter: its bytes and shape. Without LoRA each is a model of its own."""

    bytes: int = 0
    shape: AdapterShape | None = None


def plan(knobs: Knobs, sft: Path, scorers: Sequence[Path], prompt_tokens: Sequence[int]) -> list[Share]:
    """The shares on this process's device: what it holds already, every role, and the phase that takes most.

    Args:
        sft: folder of the policy.
        scorers: folders of the reward model's members and, last, of the judge; the value model is as the first of them.
        prompt_tokens: lengths of the prompts.
    """
    from transformers import AutoConfig

    found = [Scorer(adapter_bytes(f), adapter_shape(f / ADAPTER_FOLDER)) if knobs.lora_rank else Scorer() for f in scorers]
    config, kind = AutoConfig.from_pretrained(sft), device().type
    held = Share("process", "held before the models are loaded", held_bytes())
    shares = [held, *update_shares(knobs, config, found, max(prompt_tokens), weights_file_bytes(sft), kind)]
    if knobs.rollout_engine == "vllm":
        tokens = max(prompt_tokens) + knobs.max_new_tokens
        shares.append(Share("vLLM", "a process of its own: weights and cache", vllm_bytes(knobs, config, tokens)))
    return shares


def update_shares(
    knobs: Knobs, config: PretrainedConfig, scorers: Sequence[Scorer], prompt_tokens: int, file_bytes: int, kind: str
) -> list[Share]:
    """The shares, in bytes of one process, of every role on a `kind` of device and of the phase that takes most.

    Args:
        scorers: the reward model's members and, last, the judge.
        prompt_tokens: of the longest prompt.
        file_bytes: of the policy's weights.
    """
    model = shape_only(config, knobs.precision, kind)
    base = weights_bytes(model)
    processes = knobs.processes * knobs.nodes
    shards = processes if knobs.shard else 1
    layers_bytes = weights_bytes(transformer_layers(model.base_model)[1]) if shards > 1 else 0  # of one model
    role = shape_role(model, knobs.lora_rank, knobs.lora_layers)
    trained = sum(parameter.numel() for parameter in role.trainable) * FLOAT_BYTES
    tokens = prompt_tokens + knobs.max_new_tokens
    prompts = math.ceil(knobs.batch_prompts / processes)
    samples = prompts * knobs.samples_per_prompt
    shares = device_shares(kind)
    if knobs.lora_rank:
        scorer = [each.bytes for each in scorers]
        weights, value = trained, scorer[0]
        value_trained = value
        shares += [Share("reference", f"the base that all share, {knobs.precision}", base), Share("policy", "adapter", trained)]
        shapes = [AdapterShape(knobs.lora_rank, 0, knobs.lora_layers), *(each.shape for each in scorers if each.shape)]
        if trunk_layers(config.num_hidden_layers, shapes):
            rows = knobs.batch_prompts * knobs.samples_per_prompt  # each process has room for those of all
            hidden = rows * tokens * config.hidden_size * dtype_of(knobs.precision).itemsize
            shares.append(Share("trunk", "what lies below the adapters, of every token", hidden))
    else:
        head = model.get_output_embeddings().weight
        itemsize = head.element_size()
        value = base - (0 if config.tie_word_embeddings else head.numel() * itemsize)
        weights, value_trained = trained // FLOAT_BYTES * itemsize, value // itemsize * FLOAT_BYTES
        scorer = [value] * len(scorers)
        shares += [Share("reference", "weights", base), Share("policy", "weights", weights)]
        if knobs.precision == "bfloat16":
            shares += [Share("policy", "float32 copy", trained), Share("value", "float32 copy", value_trained)]
    shares += [
        Share("policy", "AdamW's moments", 2 * trained),
        Share("policy", "copy of the best so far", weights),
        Share("value", "adapter" if knobs.lora_rank else "weights", value),
        Share("value", "AdamW's moments", 2 * value_trained),
        Share("reward", "adapter" if knobs.lora_rank else "weights", sum(scorer[:-1])),
        Share("judge", "adapter" if knobs.lora_rank else "weights", scorer[-1]),
    ]
    passes = Passes(samples, tokens, knobs.micro_batch_tokens, knobs.activation_checkpointing)
    backward = pass_bytes(role, passes, kind, predicted=knobs.max_new_tokens)
    gradient = max(trained, value_trained)  # of one role at a time
    layers = config.num_hidden_layers
    if shards > 1 and knobs.lora_rank:  # of all roles only the base
        shares += sharding_shares(layers_bytes, 2 * layers_bytes // layers, shards)
    elif shards > 1:  # policy and value with two moments each, the best policy, the reference and the scorers
        shares += sharding_shares((8 + len(scorers)) * layers_bytes, 4 * layers_bytes // layers, shards)  # with gradients
        gradient -= layers_bytes * (shards - 1) // shards
    backward += gradient
    prefill = cache_bytes(config, knobs.precision, prompts, prompt_tokens) * (layers + 1) // layers
    prefill_rows = min(prompts, max(1, PREFILL_MICRO_BATCHES * knobs.micro_batch_tokens // prompt_tokens))
    prefill += forward_bytes(role, prefill_rows, prompt_tokens, masked=True)
    sampling = cache_bytes(config, knobs.precision, samples, tokens) * (layers + 1) // layers
    sampling += step_bytes(samples, config.vocab_size)
    phases = [Share("update", "gradient and activations", backward)]
    if knobs.rollout_engine == "torch":
        phases.append(Share("update", "cache of the rollout", sampling))
        phases.append(Share("update", "the prompts' cache and one layer's activations", prefill))
    if kind == "cpu":  # the base's file is mapped while it is read, and most of the other shares are not there yet
        later = sum(share.bytes for share in shares if share.role not in ("process", "reference"))
        phases.append(Share("start", "weights in their file, beyond what comes later", file_bytes - later))
    return [*shares, max(phases, key=lambda share: share.bytes)]


def vllm_cache_bytes(knobs: Knobs, config: PretrainedConfig, tokens: int) -> int:
    """Keys and values of all completions of an update, of `tokens` tokens with their prompts, in vLLM's blocks."""
    rows = knobs.batch_prompts * knobs.samples_per_prompt
    return cache_bytes(config, knobs.precision, rows, tokens + VLLM_BLOCK_TOKENS)


def vllm_bytes(knobs: Knobs, config: PretrainedConfig, tokens: int) -> int:
    """What vLLM takes beside this process: on a GPU the share that it may, on a CPU weights, cache and itself."""
    if device().type == "cuda":
        return int(knobs.vllm_memory_fraction * torch.cuda.get_device_properties(device()).total_memory)
    weights = weights_bytes(shape_only(config, knobs.precision, "cpu"))
    return VLLM_OWN_BYTES + weights + vllm_cache_bytes(knobs, config, tokens)
