"""Memory of a training, in bytes: counted before a model is loaded, and measured.

What a forward pass keeps for its backward pass is not estimated by a formula: the model is built on torch's `meta` device, which
computes shapes and nothing else, and what autograd saves there is added up.
"""

from __future__ import annotations

import copy
import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor

from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.attention import use_short_rows
from components.rlhf.models import Precision, Role, device, dtype_of, policy_role
from components.rlhf.rollout import LOGIT_BYTES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 2**30
FLOAT_BYTES = 4  # what is trained is kept, stepped and its gradient added up in float32
UNUSABLE = 0.3  # of the activations on a CPU: held by malloc, not usable again for micro-batches of another shape; 0.2 to 0.5 seen
FUSED, FUSED_MASKED = "shape_of_fused", "shape_of_fused_masked"  # attention on an accelerator, as `saved_bytes` sees it


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


def shape_only(config: PretrainedConfig, precision: Precision) -> PreTrainedModel:
    """A causal language model without weights, with a configuration of its own.

    transformers gives a model the very configuration that it is made from and writes into it which attention to use: what is built
    from the caller's afterwards would attend as shapes do.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=dtype_of(precision)).eval()
    if device().type == "cpu":
        use_short_rows(model)
    else:
        _use_fused(model)
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


def saved_bytes(role: Role, rows: int, tokens: int, joined: bool = False) -> int:
    """What a forward pass of `rows` sequences of `tokens` tokens through a `shape_role` keeps for its backward pass.

    Args:
        joined: several completions share a row, so that attention needs a mask.
    """
    if role.backbone.config._attn_implementation in (FUSED, FUSED_MASKED):
        role.backbone.set_attn_implementation(FUSED_MASKED if joined else FUSED)
    own = {parameter.untyped_storage()._cdata for parameter in role.backbone.parameters()}
    saved: dict[int, int] = {}
    alive = []  # a storage that is freed would give its address to another

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    ids_BT = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    mask_BTT = torch.ones((rows, tokens, tokens), dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        role.hidden(ids_BT, mask_BTT)
    return sum(saved.values())


class _Fused(torch.autograd.Function):
    """Keeps what torch's fused attention keeps: inputs, output and a float32 number for each query; computes nothing.

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
        raise NotImplementedError("shapes have no gradients")


def _fused(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value, None), None


def _fused_masked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any
) -> tuple[Tensor, None]:
    """With a mask each query head gets keys and values of its own."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    return _Fused.apply(query, key, value, mask), None


def _use_fused(model: PreTrainedModel) -> None:
    if model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, attention in ((FUSED, _fused), (FUSED_MASKED, _fused_masked)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(FUSED)


class Passes(NamedTuple):
    """The micro-batches of a training.

    Fields:
        rows: of one optimiser step.
        row_tokens: of the longest row.
        micro_batch_tokens: at most so many tokens in one, or else one row.
        activation_checkpointing: layers are computed again in the backward pass.
        joined: several completions share a row.
    """

    rows: int
    row_tokens: int
    micro_batch_tokens: int
    activation_checkpointing: bool = False
    joined: bool = False


def pass_bytes(role: Role, passes: Passes, layers: int) -> int:
    """The most that a forward and backward pass of one micro-batch hold, without the gradient of what is trained.

    Args:
        role: a `shape_role`.
        layers: how many of its last layers are trained.
    """
    tokens = passes.row_tokens
    rows = min(passes.rows, max(1, passes.micro_batch_tokens // tokens))
    in_micro_batch = min(max(passes.micro_batch_tokens, tokens), passes.rows * tokens)  # shorter rows fill it better
    saved = saved_bytes(role, rows, tokens, passes.joined) * in_micro_batch // (rows * tokens)
    one_layer = saved // layers
    if passes.activation_checkpointing:  # each layer keeps its input, and one at a time is computed again
        itemsize = next(role.backbone.parameters()).element_size()
        saved = one_layer + in_micro_batch * role.backbone.config.hidden_size * layers * itemsize
    unusable = UNUSABLE if device().type == "cpu" else 0.0
    return int(saved * (1 + unusable)) + one_layer


def training_shares(
    config: PretrainedConfig, precision: Precision, passes: Passes, *, lora_rank: int, lora_layers: int, scorer: bool
) -> list[Share]:
    """The shares of a training of one role: a policy by likelihood or preferences, or a reward model (`scorer`)."""
    model = shape_only(config, precision)
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
    backward = pass_bytes(role, passes, lora_layers or config.num_hidden_layers) + (0 if scorer else 3 * LOGIT_BYTES)
    step = 0 if device().type == "cpu" else trained  # on an accelerator AdamW steps all at once, with room of its own
    phases = [
        Share("step", "gradient and activations", trained + backward),
        Share("step", "gradient and AdamW's own room", trained + step),
    ]
    return [*shares, max(phases, key=lambda share: share.bytes)]


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
