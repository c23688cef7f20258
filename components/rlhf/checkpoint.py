"""Training state as one safetensors blob: tensors, and the JSON of everything else. No pickle.

A state is a nested dict/list of tensors, numbers, strings, booleans and None, such as a torch `state_dict`, an optimiser's state
or a list of metrics. Tensors are stored by their path; the rest is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_TENSOR = "__tensor__"
_INTEGER_KEYS = "__integer_keys__"


def save(state: Any, path: str) -> None:
    """Writes `state` to a file. Tensors are copied to the CPU; shared or non-contiguous ones are stored in full."""
    tensors: dict[str, torch.Tensor] = {}
    document = _take_tensors(state, "", tensors)
    save_file(tensors, path, metadata={"state": json.dumps(document)})


def load(path: str) -> Any:
    """The state that `save` wrote; tensors on the CPU, bit-equal.

    Raises:
        ValueError: the file was not written by `save`.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "state" not in metadata:
            raise ValueError(f"{path} is not a rankloop checkpoint: it has no state")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return _put_tensors(json.loads(metadata["state"]), tensors)


def _take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        result = {str(key): _take_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
        if value and all(isinstance(key, int) for key in value):
            return {_INTEGER_KEYS: result}  # an optimiser's state is keyed by parameter number
        return result
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _INTEGER_KEYS in value:
            return {int(key): _put_tensors(item, tensors) for key, item in value[_INTEGER_KEYS].items()}
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value
