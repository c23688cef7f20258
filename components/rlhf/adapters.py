"""LoRA adapters: several roles on one frozen base, on all of its layers or on the last few.

Policy, reward model and value model are adapters with heads of their own; the reference is the base with its adapters off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from components.rlhf.models import Role, load_policy, save_model
from components.rlhf.trunk import transformer_layers
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FOLDER = "adapter"  # beside a merged model


class AdapterShape(NamedTuple):
    """LoRA's rank and alpha, and how many of the last layers carry it (0: all)."""

    rank: int
    alpha: int
    layers: int


def lora_config(rank: int, alpha: int, targets: str | list[str] = "all-linear") -> LoraConfig:
    """LoRA on linear layers of the backbone, without dropout (the ratio of PPO needs the same network twice)."""
    from peft import LoraConfig

    from components.rlhf.lora import LoraLinear

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, bias="none")
    config._register_custom_module({nn.Linear: LoraLinear})
    return config


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers that carry adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def adapter_role(model: PreTrainedModel, adapter: str, head: nn.Module, trainable: bool, head_trainable: bool) -> Role:
    """The role that `adapter` plays on a shared base; `adapter=""` is the base itself (the reference)."""
    layers = [layer for _, layer in adapted_layers(model)]

    def activate() -> None:
        for layer in layers:
            carries = adapter in layer.lora_A
            layer.enable_adapters(carries)
            if carries:
                layer.set_adapter(adapter, inference_mode=not trainable)

    parameters: list[nn.Parameter] = []
    if trainable:
        parameters += adapter_parameters(model, adapter).values()
    if head_trainable:
        parameters += list(head.requires_grad_(True).parameters())
    return Role(model.base_model, head, parameters, activate)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by name."""
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name and "lora_" in name}


def add_adapter(model: PreTrainedModel, adapter: str, rank: int, alpha: int, seed: int, layers: int = 0) -> None:
    """Adds an adapter that changes nothing yet (B = 0); A is drawn from the seed, whatever was drawn before.

    Args:
        layers: that many of the transformer's last layers carry it; 0: all of them.

    Raises:
        DoNotRetry: the model has fewer layers, or the library does not say which they are.
    """
    from peft import inject_adapter_in_model

    targets: str | list[str] = "all-linear"
    if layers:
        name, blocks = transformer_layers(model.base_model)
        if layers > len(blocks):
            raise DoNotRetry(f"lora_layers is {layers}, and the model has {len(blocks)} layers", "lower it, or set it to 0 for all")
        targets = [
            f"{name}.{number}.{each}".removesuffix(".base_layer")
            for number in range(len(blocks) - layers, len(blocks))
            for each, module in blocks[number].named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in each
        ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(rank, alpha, targets), model.base_model, adapter_name=adapter)
    model.base_model.to(model.device)
    for parameter in adapter_parameters(model, adapter).values():
        parameter.data = parameter.data.float()  # small, and AdamW's steps would be lost in bfloat16


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Makes adapter `target` equal to `source`."""
    weights = adapter_parameters(model, source)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, target).items():
            parameter.copy_(weights[name.replace(f".{target}.", f".{source}.")])


def save_adapter(model: nn.Module, adapter: str, folder: Path, rank: int, alpha: int, layers: int = 0) -> None:
    """Writes one adapter beside the merged model, so that PPO can hang it on the base that it shares."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name.replace(f".{adapter}.", "."): p.detach().cpu() for name, p in adapter_parameters(model, adapter).items()}
    save_file(weights, folder / "adapter.safetensors")
    (folder / "adapter.json").write_text(json.dumps({"rank": rank, "alpha": alpha, "layers": layers}), encoding="utf-8")


def save_peft_adapter(model: PreTrainedModel, adapter: str, folder: Path, rank: int, alpha: int, layers: int = 0) -> None:
    """Writes one adapter of the policy as `peft` writes it, so that any server of the base can put it on."""
    from peft import LoraConfig

    weights = adapter_parameters(model, adapter)
    modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in weights})
    pattern, blocks = transformer_layers(model.base_model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules,
        layers_to_transform=list(range(len(blocks) - layers, len(blocks))) if layers else None,
        layers_pattern=pattern if layers else None,
    )
    config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace(f'.{adapter}.', '.')}": p.detach().cpu().contiguous() for name, p in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def load_adapter(model: PreTrainedModel, adapter: str, folder: Path) -> AdapterShape:
    """Adds the adapter that `save_adapter` wrote, under the name `adapter`; gives its shape.

    Raises:
        ValueError: it does not fit this base.
    """
    shape = adapter_shape(folder)
    add_adapter(model, adapter, shape.rank, shape.alpha, 0, shape.layers)
    weights = load_file(folder / "adapter.safetensors")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, adapter).items():
            key = name.replace(f".{adapter}.", ".")
            if key not in weights or weights[key].shape != parameter.shape:
                raise ValueError(f"{folder}: the adapter has no weight {key} of {tuple(parameter.shape)}")
            parameter.copy_(weights[key])
    return shape


def adapter_shape(folder: Path) -> AdapterShape:
    """The shape of the adapter that `save_adapter` wrote."""
    facts = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    return AdapterShape(facts["rank"], facts["alpha"], facts.get("layers", 0))


def adapter_bytes(folder: Path) -> int:
    """Bytes of the float32 weights of the adapter beside a saved reward model; 0 if it has none."""
    path = folder / ADAPTER_FOLDER / "adapter.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as weights:
        return 4 * sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


def merge_adapter_into(target: PreTrainedModel, source: PreTrainedModel, adapter: str) -> None:
    """Adds what an adapter of `source` learned to the weights of `target`, a fresh copy of its base."""
    with torch.no_grad():
        for name, layer in adapted_layers(source):
            if adapter not in layer.lora_A:
                continue
            weight = target.get_submodule(name).weight
            weight += layer.get_delta_weight(adapter).to(weight)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, base: Path, adapter: str) -> None:
    """A policy as `save_model` writes it; `adapter`, if there is one, is merged into a fresh float32 copy of `base`.

    The copy is made on the CPU: beside a model in bfloat16 the device may not have room for it.
    """
    if adapter:
        plain, _ = load_policy(base, place=torch.device("cpu"))
        merge_adapter_into(plain, model, adapter)
        model = plain
    save_model(model, tokenizer, folder)
