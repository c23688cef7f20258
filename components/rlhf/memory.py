"""Memory of a training, in bytes: counted before a model is loaded, and measured.

What a forward pass keeps for its backward pass is not estimated by a formula: the model is built on torch's `meta` device, which
computes shapes and nothing else, and what autograd saves there is added up.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from torch import Tensor

from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.attention import use_short_rows
from components.rlhf.models import Precision, Role, device, dtype_of, policy_role

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 2**30


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
    """A causal language model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype_of(precision)).eval()
    if device().type == "cpu":
        use_short_rows(model)
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


def saved_bytes(role: Role, rows: int, tokens: int) -> int:
    """What a forward pass of `rows` sequences of `tokens` tokens through a `shape_role` keeps for its backward pass."""
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
