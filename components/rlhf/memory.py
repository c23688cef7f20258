"""Memory of a training, in bytes: counted before a model is loaded, and measured.

What a forward and backward pass hold is not estimated by a formula: the model is built on torch's `meta` device, which computes
shapes and nothing else, the pass is made there, and the tensors that are alive are counted.
"""

from __future__ import annotations

import copy
import ctypes
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor

from components.rlhf.activations import checkpoint_activations
from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.attention import LONGEST, SHORT_ROWS, use_short_rows
from components.rlhf.live_bytes import LiveBytes
from components.rlhf.models import Precision, Role, device, dtype_of, policy_role
from components.rlhf.rollout import ChosenLogprobs
from components.rlhf.trunk import transformer_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 2**30
FLOAT_BYTES = 4  # what is trained is kept, stepped and its gradient added up in float32
UNUSABLE = 0.3  # of the activations on a CPU: held by malloc, not usable again for micro-batches of another shape; 0.2 to 0.5 seen
WORKSPACE_BYTES = 32 * 2**20  # CUBLAS_WORKSPACE_CONFIG's default on Hopper; 8 MiB on older cards (torch's notes on CUDA)
FUSED, FUSED_MASKED = "shape_of_fused", "shape_of_fused_masked"  # attention by torch's kernel, as `LiveBytes` sees it


class Share(NamedTuple):
    """What one role takes of the memory, and for what."""

    role: str
    what: str
    bytes: int


def table(shares: list[Share]) -> str:
    """The shares as aligned lines with their sum, in GiB."""
    rows = [*shares, Share("all", "sum", sum(each.bytes for each in shares))]
    wide = max(len(f"{each.role}: {each.what}") for each in rows)
    return "\n".join(f"{f'{each.role}: {each.what}':<{wide}}  {each.bytes / GIB:7.3f} GiB" for each in rows)


def shape_only(config: PretrainedConfig, precision: Precision, kind: str) -> PreTrainedModel:
    """A causal language model without weights that attends as one on a `kind` of device does; its configuration is its own.

    transformers gives a model the very configuration that it is made from and writes into it which attention to use: what is built
    from the caller's afterwards would attend as shapes do.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=dtype_of(precision)).eval()
    if kind == "cpu":
        use_short_rows(model)
        _register_fused()
    elif model.config._attn_implementation == "sdpa":
        _register_fused()
        model.set_attn_implementation(FUSED)
    return model


def shape_role(model: PreTrainedModel, rank: int, layers: int = 0) -> Role:
    """The role of a `shape_only` model that is trained: in full, or as an adapter of this rank on so many layers (0: all)."""
    if not rank:
        return policy_role(model, trainable=True)
    with torch.device("meta"):
        add_adapter(model, "shape", rank, rank, 0, layers)
    model.requires_grad_(False)
    return adapter_role(model, "shape", model.get_output_embeddings(), trainable=True, head_trainable=False)


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    return sum({id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}.values())


def weights_file_bytes(folder: Path) -> int:
    """Bytes of a saved model's weights, as they lie in its files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def backward_bytes(role: Role, rows: int, tokens: int, *, joined: bool = False, predicted: int = 0) -> int:
    """The most that a forward and backward pass of `rows` sequences of `tokens` tokens through a `shape_role` hold.

    Without the weights and without the gradient that is added up, but with that of each weight while it is made.

    Args:
        joined: several completions share a row, so that attention needs a mask.
        predicted: tokens of a sequence whose likelihood is looked at; 0: the backward pass begins at the hidden states.
    """
    role.activate()
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in role.trainable]
    ids_BT = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    mask_BTT = torch.ones((rows, tokens, tokens), dtype=torch.bool, device="meta")
    with _attending(role, tokens, masked=joined), LiveBytes() as live:
        hidden_BTD = role.hidden(ids_BT, mask_BTT)
        if predicted:
            hidden_ND, targets_N, head = (
                hidden_BTD[:, -predicted:].reshape(-1, hidden_BTD.shape[2]),
                ids_BT[:, -predicted:],
                role.head,
            )
            logprobs_N, _ = ChosenLogprobs.apply(hidden_ND, head.weight, head.bias, targets_N.reshape(-1), 1.0, 0, False)
            logprobs_N.sum().backward()
        else:
            hidden_BTD.backward(torch.empty_like(hidden_BTD))
    for hook in hooks:
        hook.remove()
    mask = 0 if joined else mask_BTT.numel() * hidden_BTD.element_size()  # one is made only where it is needed
    return live.peak - mask


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@torch.no_grad()
def forward_bytes(role: Role, rows: int, tokens: int, *, masked: bool) -> int:
    """The most that a forward pass without a backward pass holds, beside the weights; without a cache.

    Args:
        masked: against padding on the left, as before sampling.
    """
    ids_BT = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    mask_BTT = torch.ones((rows, tokens, tokens), dtype=torch.bool, device="meta")
    with _attending(role, tokens, masked), LiveBytes() as live:
        hidden_BTD = role.hidden(ids_BT, mask_BTT)
    mask = 0 if masked else mask_BTT.numel() * hidden_BTD.element_size()  # one is made only where it is needed
    return live.peak - mask


@contextmanager
def _attending(role: Role, tokens: int, masked: bool) -> Iterator[None]:
    """Within it a `shape_role` attends as on its device with so many keys: fused on an accelerator, and for long rows on a CPU."""
    own = role.backbone.config._attn_implementation
    if own == FUSED or (own == SHORT_ROWS and tokens > LONGEST):
        role.backbone.set_attn_implementation(FUSED_MASKED if masked else FUSED)
    try:
        yield
    finally:
        role.backbone.set_attn_implementation(own)


class _Fused(torch.autograd.Function):
    """Makes and keeps what torch's fused attention does: inputs, output and a float32 number for each query; computes nothing.

    On `meta` torch itself would take its unfused path and keep all T^2 scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if not query.is_meta:
            raise RuntimeError("attention that only plans memory was given real numbers; it computes nothing")
        rows, heads, tokens, size = query.shape
        mixed_BTHD = query.new_empty((rows, tokens, heads, size))
        ctx.save_for_backward(query, key, value, mask, mixed_BTHD, query.new_empty((rows, heads, tokens), dtype=torch.float32))
        return mixed_BTHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value, None), None


def _fused_masked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any
) -> tuple[Tensor, None]:
    """With a mask each query head gets keys and values of its own."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    return _Fused.apply(query, key, value, mask), None


def _register_fused() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, attention in ((FUSED, _fused), (FUSED_MASKED, _fused_masked)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)


class Passes(NamedTuple):
    """The micro-batches of a training.

    Fields:
        rows: of one optimiser step.
        row_tokens: of the longest row.
        micro_batch_tokens: at most so many tokens in one, or else one row.
        activation_checkpointing: layers are computed again in the backward pass.
        joined: several completions share a row.
        varied: the other rows are shorter and may fill a micro-batch to its limit; else all are as long.
    """

    rows: int
    row_tokens: int
    micro_batch_tokens: int
    activation_checkpointing: bool = False
    joined: bool = False
    varied: bool = True


def pass_bytes(role: Role, passes: Passes, kind: str, predicted: int) -> int:
    """The most that a forward and backward pass of one micro-batch hold, without the gradient that is added up.

    Args:
        role: a `shape_role`.
        kind: of the device.
        predicted: tokens of a row whose likelihood is looked at.
    """
    tokens = passes.row_tokens
    rows = min(passes.rows, max(1, passes.micro_batch_tokens // tokens))
    if passes.activation_checkpointing:
        checkpoint_activations(role.backbone)
    held = backward_bytes(role, rows, tokens, joined=passes.joined, predicted=predicted)
    if passes.varied:
        held = held * min(max(passes.micro_batch_tokens, tokens), passes.rows * tokens) // (rows * tokens)
    return int(held * (1 + (UNUSABLE if kind == "cpu" else 0.0)))


def training_shares(
    config: PretrainedConfig, precision: Precision, passes: Passes, kind: str, *, lora_rank: int, lora_layers: int, scorer: bool
) -> list[Share]:
    """The shares of a training of one role on a `kind` of device.

    Args:
        scorer: it is a reward model; else a policy, by likelihood or preferences.
    """
    model = shape_only(config, precision, kind)
    role = shape_role(model, lora_rank, lora_layers)
    head = model.get_output_embeddings().weight
    without_head = scorer and not config.tie_word_embeddings
    count = sum(parameter.numel() for parameter in role.trainable)
    if without_head and not lora_rank:
        count -= head.numel()
    trained = count * FLOAT_BYTES
    base = weights_bytes(model) - (trained if lora_rank else 0) - (head.numel() * head.element_size() if without_head else 0)
    shares = [Share("base" if lora_rank else "model", f"weights, {precision}", base)]
    if lora_rank:
        shares.append(Share("adapter", "weights, float32", trained))
    elif precision == "bfloat16":
        shares.append(Share("model", "float32 copy", trained))
    shares.append(Share("adapter" if lora_rank else "model", "AdamW's moments", 2 * trained))
    backward = pass_bytes(role, passes, kind, predicted=0 if scorer else passes.row_tokens)
    step = 0 if kind == "cpu" else trained  # on an accelerator AdamW steps all at once, with room of its own
    phases = [
        Share("step", "gradient and activations", trained + backward),
        Share("step", "gradient and AdamW's own room", trained + step),
    ]
    return [*shares, *device_shares(kind), max(phases, key=lambda share: share.bytes)]


def device_shares(kind: str) -> list[Share]:
    """What torch's libraries hold beside all tensors."""
    return [Share("device", "workspace of cuBLAS", WORKSPACE_BYTES)] if kind == "cuda" else []


def sharding_shares(divided: int, together: int, processes: int) -> list[Share]:
    """What one process saves, and what it holds for a while, where layers are divided (Rajbhandari 2020, "ZeRO", stage 3).

    Args:
        divided: bytes of all that is divided: weights, gradients and moments of the layers.
        together: bytes of the layers that are whole at one time: one that computes, and one that is fetched or given back.
        processes: over which they are divided, 2 or more.
    """
    return [
        Share("sharding", f"layers on the other {processes - 1}", -divided * (processes - 1) // processes),
        Share("sharding", "layers that are put together for a pass", together),
    ]


def spread_shares(model: PreTrainedModel, devices: int) -> list[Share]:
    """Bytes that the first of so many devices has of a `shape_only` model whose layers are spread over them (`rlhf.spread`)."""
    layers = transformer_layers(model.base_model)[1]
    elsewhere = len(layers) - math.ceil(len(layers) / devices)
    shares = [Share("model", "weights", weights_bytes(model))]
    if elsewhere:
        shares.append(Share("model", f"layers on the other {devices - 1}", -weights_bytes(layers) * elsewhere // len(layers)))
    return shares


def cache_bytes(config: PretrainedConfig, precision: Precision, rows: int, tokens: int) -> int:
    """Bytes of the keys and values of `rows` sequences of `tokens` tokens."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * rows * tokens * config.num_hidden_layers * heads * head * dtype_of(precision).itemsize


def release_free_memory() -> None:
    """Returns free memory to the system, where the allocator is glibc's.

    It keeps what is freed for blocks of the same size; where micro-batches have other shapes each time, what it keeps grows.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def held_bytes() -> int:
    """What the process holds now: of the accelerator's memory if there is one, else resident."""
    if device().type != "cpu":
        return int(torch.accelerator.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that the process has held so far, in the same sense."""
    if device().type != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
