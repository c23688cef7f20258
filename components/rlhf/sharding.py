"""Layers divided over the processes, for models that one device cannot hold: FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each process keeps one part of every transformer layer: of its weights, gradients and moments. A layer is put together for its
forward and its backward pass, and taken apart again (Rajbhandari 2020, "ZeRO", stage 3). Embeddings, the last norm, the head and
adapters stay whole: they are used outside of the layers too. Checkpoints hold whole tensors, so another number of processes can
read them, or one that divides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from components.rlhf.distributed import processes, rank
from components.rlhf.trunk import transformer_layers

if TYPE_CHECKING:
    from components.rlhf.models import Role


def divide_layers(roles: Sequence[Role], place: torch.device) -> None:
    """Divides the layers of the backbone that all of these roles have over the processes, and puts the roles on `place`.

    A single process keeps it whole. The model may lie in the host's memory: its layers go to the device one by one, each already
    divided. What is trained is then in `role.trainable` under new names, so this comes before the optimiser.

    Raises:
        DoNotRetry: the library does not say which the model's layers are.
    """
    backbone = roles[0].backbone
    if processes() > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(place.type, (processes(),))
        replaced: dict[int, nn.Parameter] = {}
        for layer in transformer_layers(backbone)[1]:
            layer.to(place)
            weights = dict(layer.named_parameters())
            adapters = {weight for name, weight in weights.items() if "lora_" in name}
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
            layer.set_gradient_divide_factor(1.0)  # the loss is divided by counts of the whole batch: gradients are summed
            layer.set_force_sum_reduction_for_comms(True)  # Gloo has no other
            replaced |= {id(weights[name]): parameter for name, parameter in layer.named_parameters()}
        # A root that divides nothing itself: under it a layer's buffers are freed when the next layer needs some. Each for itself,
        # all would keep theirs to the end of the backward pass.
        fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()))
        for role in roles:
            role.trainable = [replaced.get(id(parameter), parameter) for parameter in role.trainable]
            role.divided = True
    backbone.to(place)
    for role in roles:
        role.head.to(place)


def divided(parameters: Sequence[Tensor]) -> bool:
    """Whether one of them is divided over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients down to a norm of `limit`, and gives the norm before that; of divided ones all parts count."""
    if not divided(parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if isinstance(g, DTensor) == kind] for kind in (True, False)]
    norms = [nn.utils.get_total_norm(each, foreach=False) for each in kinds if each]
    norm = torch.stack([put_together(each) for each in norms]).norm()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=False)
    return norm


def whole(value: Any) -> Any:
    """The value with every divided tensor in it put together, in the host's memory of the first process.

    All processes must call it. The others, which write nothing, get their own parts back.
    """
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, DTensor):
        together = put_together(value)
        return together.cpu() if rank() == 0 else value
    return value


def put_together(tensor: Tensor) -> Tensor:
    """The whole tensor on this process's device, whether it is divided or not. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divide_like(parameter: Tensor, value: Any) -> Any:
    """What `whole` gave, divided as the parameter is: a tensor of its shape, or a dict of such and of numbers."""
    if isinstance(value, dict):
        return {key: divide_like(parameter, each) for key, each in value.items()}
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
