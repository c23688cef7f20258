"""One optimiser step: AdamW, clipping of the global gradient norm, warm-up and decay; in float32, whatever the weights are in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.rlhf import sharding
from components.rlhf.distributed import sum_gradients
from components.rlhf.ppo import learning_rate_factor

ADAM_EPSILON = 1e-5  # as the original RLHF code; 1e-8 makes early steps larger (Huang 2024, detail 18)


class Optimiser:
    """AdamW over some parameters, for a known number of steps.

    Parameters in bfloat16 are trained through float32 copies (Micikevicius 2018, section 3.1): beside a weight of 1 bfloat16 has no
    step below 1/128, and what a learning rate of 1e-5 changes would be lost. Their gradients are moved to the copies as they come,
    and so are added up over micro-batches in float32.

    Args:
        parameters: what it may change; those in bfloat16 belong to no other optimiser, for their gradients go to this one.
        learning_rate: the peak, reached after the warm-up; falls linearly towards 0 after the last step.
        steps: how many there will be.
        warmup_fraction: share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only; vectors (norms, biases) are not decayed.
        clip_norm: upper bound of the global gradient norm.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        steps: int,
        warmup_fraction: float = 0.05,
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._parameters = list(parameters)
        self._copies = [p if p.dtype == torch.float32 else _float_copy(p) for p in parameters]
        groups = [
            {"params": [p for p in self._copies if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self._copies if p.dim() <= 1], "weight_decay": 0.0},
        ]
        one_by_one = False if sharding.divided(self._copies) else None  # a divided and a whole one fit into no common kernel
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=betas, eps=ADAM_EPSILON, foreach=one_by_one
        )
        self._peak, self._steps, self._clip_norm = learning_rate, steps, clip_norm
        self._warmup = max(1, round(warmup_fraction * steps))
        self.taken = 0

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self._peak * learning_rate_factor(self.taken, self._steps, self._warmup)

    def step(self) -> float:
        """Applies the gradients that have been accumulated, by all processes, clears them, and gives their norm before clipping."""
        sum_gradients(self._copies)
        norm = sharding.clip_gradients(self._copies, self._clip_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, copy in self._copied():
                parameter.copy_(copy)
        self.taken += 1
        return float(norm)

    def discard(self) -> None:
        """Clears the gradients that have been accumulated."""
        self._adamw.zero_grad(set_to_none=True)

    def _copied(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters that are trained through a copy, with it."""
        return ((p, copy) for p, copy in zip(self._parameters, self._copies, strict=True) if copy is not p)

    def state(self) -> dict[str, Any]:
        copies = [copy.detach() for _, copy in self._copied()]
        return {"adamw": sharding.whole(self._adamw.state_dict()["state"]), "taken": self.taken, "copies": copies}

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave; of the parameters themselves it changes nothing (`load_weights` does)."""
        load_weights([copy for _, copy in self._copied()], state["copies"])
        parameters = [p for g in self._adamw.param_groups for p in g["params"]]  # as AdamW numbers them
        moments = {number: sharding.divide_like(parameters[number], each) for number, each in state["adamw"].items()}
        self._adamw.load_state_dict({"state": moments, "param_groups": self._adamw.state_dict()["param_groups"]})
        self.taken = state["taken"]


def _float_copy(parameter: nn.Parameter) -> nn.Parameter:
    """A float32 copy, to which each gradient of the parameter is added as soon as a backward pass has made it."""
    copy = nn.Parameter(parameter.detach().float())

    def move_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None, "called after a gradient was made"
        copy.grad = parameter.grad.float() if copy.grad is None else copy.grad.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move_gradient)
    return copy


def data_order(examples: int, draws: int, seed: int) -> list[int]:
    """Indices of the examples in training order: every epoch its own shuffle."""
    rng = random.Random(f"order-{seed}")
    order: list[int] = []
    while len(order) < draws:
        epoch = list(range(examples))
        rng.shuffle(epoch)
        order += epoch
    return order[:draws]


def weights_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """What a checkpoint keeps of the parameters, in their order; of divided ones all of it, in the first process."""
    return [sharding.whole(p.detach()) for p in parameters]


def load_weights(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    """Puts back what `weights_of` gave."""
    with torch.no_grad():
        for parameter, saved in zip(parameters, weights, strict=True):
            parameter.copy_(sharding.divide_like(parameter, saved))
