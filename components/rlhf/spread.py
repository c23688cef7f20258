"""A model's layers on all accelerators of one process, which take turns: for inference with models that one of them cannot hold.

Hidden states go from device to device and weights stay where they are, whereas divided layers (`rlhf.sharding`) are put together
for each token. accelerate's `dispatch_model` does the same, but leaves the model in cycles of references: it would still be there
while the next one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from components.rlhf.models import devices
from components.rlhf.trunk import transformer_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_spread(load: Callable[[torch.device | None], Loaded]) -> Loaded:
    """A model with its layers on all accelerators that this process has to itself.

    Args:
        load: gives the model, its weights on the device that it is told; None: on this process's own.

    Raises:
        DoNotRetry: there are several, and the library does not say which the model's layers are.
    """
    places = devices()
    model, tokenizer = load(torch.device("cpu") if len(places) > 1 else None)
    if len(places) > 1:
        spread_layers(model, places)
    return model, tokenizer


def spread_layers(model: PreTrainedModel, places: Sequence[torch.device]) -> None:
    """Puts as many layers on each device, in their order, and all else on the first; there input is expected and output given.

    Raises:
        DoNotRetry: the library does not say which the model's layers are.
    """
    backbone = model.base_model
    name, layers = transformer_layers(backbone)
    for number, layer in enumerate(layers):
        _put(layer, places[number * len(places) // len(layers)])
    for own, module in (*backbone.named_children(), *model.named_children()):
        if module is not backbone and own != name:
            _put(module, places[0])


def _put(module: nn.Module, place: torch.device) -> None:
    """Puts a module on a device, and from now on all that it is given."""
    module.to(place)
    module.register_forward_pre_hook(partial(_bring, place), with_kwargs=True)


def _bring(place: torch.device, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    return _on(place, given), _on(place, named)


def _on(place: torch.device, value: Any) -> Any:
    """The value with its tensors there; a cache, whose layers lie where their keys are made, stays as it is."""
    if isinstance(value, Tensor):
        return value.to(place)
    if isinstance(value, tuple):
        return tuple(_on(place, each) for each in value)
    if isinstance(value, dict):
        return {key: _on(place, each) for key, each in value.items()}
    return value
