"""A model spread over two devices that are not there: torch computes shapes and devices, and refuses operands of two devices.

A program of its own (`python -m tests.unit.components.rlhf.two_devices`), for the devices that it registers stay registered. It
prints JSON.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from components.rlhf import spread
from components.rlhf.models import devices, policy_role, scorer_role
from components.rlhf.reward import batch_scores
from components.rlhf.rollout import _keep_rows
from components.rlhf.tokens import Batch

KIND, COUNT = "imaginary", 2
ROWS, TOKENS = 3, 5
CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True
)


class Devices(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return COUNT


_moved: dict[int, tuple[Tensor, Tensor]] = {}


def move(module: nn.Module, place: torch.device) -> nn.Module:
    """`nn.Module.to`, which cannot move tensors without numbers; a weight that two modules share stays one."""
    for each in module.modules():
        for kept in (each._parameters, each._buffers):
            for name, value in kept.items():
                if value is not None and value.device != place:
                    there = value.to(place)
                    pair = (value, nn.Parameter(there, False) if kept is each._parameters else there)
                    kept[name] = _moved.setdefault(id(value), pair)[1]
    return module


def empty(layer: DynamicLayer, keys: Tensor, values: Tensor) -> None:
    """`torch.tensor([], device=...)` knows no simulation."""
    layer.keys, layer.values, layer.is_initialized = keys.new_empty(0), values.new_empty(0), True


def placed(model: PreTrainedModel) -> dict[str, Any]:
    """Where its parts are."""
    return {
        "layers": [str(next(layer.parameters()).device) for layer in model.base_model.layers],
        "rest": sorted({str(p.device) for name, p in model.named_parameters() if ".layers." not in name}),
    }


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(KIND, Devices())
    found: dict[str, Any] = {}
    with (
        FakeTensorMode(),
        torch.no_grad(),
        mock.patch.object(nn.Module, "to", move),
        mock.patch.object(DynamicLayer, "lazy_initialization", empty),
    ):
        found["devices"] = [str(each) for each in devices()]
        places = [torch.device(KIND, number) for number in range(COUNT)]
        ids_BT = torch.ones((ROWS, TOKENS), dtype=torch.long, device=places[0])
        policy = AutoModelForCausalLM.from_config(CONFIG).eval()
        spread.spread_layers(policy, places)
        role, cache = policy_role(policy), DynamicCache()
        found["policy"] = {**placed(policy), "tied": policy.lm_head.weight is policy.model.embed_tokens.weight}
        hidden_BTD = role.backbone(
            input_ids=ids_BT, attention_mask=ids_BT, position_ids=ids_BT, past_key_values=cache, use_cache=True
        ).last_hidden_state
        found["cache"] = [str(layer.keys.device) for layer in cache.layers]
        _keep_rows(cache, ids_BT[0, :2])
        logits_BV = torch.nn.functional.linear(hidden_BTD[:, -1], role.head.weight)
        found["logits"] = [str(logits_BV.device), str(role.device), [layer.keys.shape[0] for layer in cache.layers]]

        scorer = AutoModelForSequenceClassification.from_config(LlamaConfig(**{**CONFIG.to_dict(), "num_labels": 1})).eval()
        spread.spread_layers(scorer, places)
        true_BT = ids_BT.bool()
        scores_B = batch_scores(scorer_role(scorer), Batch(ids_BT, true_BT, true_BT))
        found["scorer"] = {**placed(scorer), "scores": str(scores_B.device)}

        with mock.patch.object(spread, "_bring", lambda place, module, given, named: (given, named)):
            nowhere = AutoModelForCausalLM.from_config(CONFIG).eval()
            spread.spread_layers(nowhere, places)
        try:
            policy_role(nowhere).hidden(ids_BT, positions_BT=ids_BT)
        except RuntimeError as error:
            found["unmoved"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
