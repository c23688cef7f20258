"""Training state as one safetensors blob: tensors, and the JSON of everything else. No pickle.

A state is a nested dict/list of tensors, numbers, strings, booleans and None, such as a torch `state_dict`, an optimiser's state
or a list of metrics. Tensors are stored by their path; the rest is JSON in the file's metadata.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from safetensors import safe_open

_TENSOR = "__tensor__"
_INTEGER_KEYS = "__integer_keys__"
_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(state: Any, path: str) -> None:
    """Writes `state` to a file. Shared or non-contiguous tensors are stored in full.

    One tensor after the other: the library's own writer first holds a second copy of all of them, which for a model that is trained
    in full is as much as its weights and its optimiser together.
    """
    tensors: dict[str, torch.Tensor] = {}
    document = _take_tensors(state, "", tensors)
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # each then begins where its type may
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(document)}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
        tensors[path] = value.detach()
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
