"""The layers below the adapters: one frozen trunk for all roles, so that it is computed once for all of them.

Where adapters stand on the last layers of a shared base only, the hidden states in front of these are the same for policy,
reference, reward model, judge and value model, and no training changes them. PPO computes them once an update; all scores,
log-probabilities and passes of the optimisation go on from there. What trlX calls a hydra shares the trunk of policy and reference
in this way (Havrilla 2023, "trlX: A Framework for Large Scale Reinforcement Learning from Human Feedback").

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from components.services.exits import DoNotRetry

_log = logging.getLogger(__name__)


def transformer_layers(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a backbone's transformer layers, and its name in it.

    Raises:
        DoNotRetry: there is none, or more than one.
    """
    depth = backbone.config.num_hidden_layers
    found = [(name, m) for name, m in backbone.named_children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise DoNotRetry(
            f"{type(backbone).__name__} has no list of {depth} layers that is its own, so they cannot be told apart",
            "set lora_layers to 0 and shard to false; a stage that only reads or samples needs one GPU",
        )
    return found[0]


class Trunk:
    """The first layers of a shared backbone.

    Attributes:
        upper: the backbone from there on; it takes the trunk's output as `inputs_embeds`.
    """

    def __init__(self, backbone: nn.Module, layers: int) -> None:
        name, blocks = transformer_layers(backbone)
        self._lower = _with_modules(backbone, {name: blocks[:layers], "norm": nn.Identity()})
        self.upper = _with_modules(backbone, {name: blocks[layers:]})

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of right-padded rows."""
        hidden_BTD: Tensor = self._lower(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD


def shared_trunk(backbone: nn.Module, layers: int) -> Trunk | None:
    """The trunk of so many layers, if this backbone can be cut there: whole or in two, it must give the same.

    It does where the token embedding goes straight into the first layer and one module, `norm`, follows on the last (Llama, Qwen,
    Mistral, OLMo and the like), and all layers attend alike. Otherwise None: roles are then computed whole, which costs time and
    changes nothing.
    """
    kinds = set(getattr(backbone.config, "layer_types", None) or [])  # told apart by their number, which a cut would change
    if not layers or len(kinds) > 1 or not isinstance(getattr(backbone, "norm", None), nn.Module):
        return None
    trunk = Trunk(backbone, layers)
    ids_BT = torch.arange(8, device=next(backbone.parameters()).device)[None] % backbone.config.vocab_size
    with torch.no_grad():
        whole_BTD = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        in_two_BTD = trunk.upper(inputs_embeds=trunk(ids_BT), use_cache=False).last_hidden_state
    if not torch.equal(whole_BTD, in_two_BTD):
        _log.warning("%s cannot be cut below its adapters: every role is computed whole", type(backbone).__name__)
        return None
    return trunk


def _with_modules(backbone: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A backbone that shares all modules of another but those given; and its hooks, which put divided layers together."""
    twin: nn.Module = object.__new__(type(backbone))  # `copy.copy` would make a new, empty model of one that is divided
    twin.__dict__.update(backbone.__dict__)
    twin._modules = {**backbone._modules, **modules}
    return twin
