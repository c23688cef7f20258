"""One optimiser step: AdamW, clipping of the global gradient norm, warm-up and decay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.rlhf.ppo import learning_rate_factor

ADAM_EPSILON = 1e-5  # as the original RLHF code; 1e-8 makes early steps larger (Huang 2024, detail 18)


class Optimiser:
    """AdamW over some parameters, for a known number of steps.

    Args:
        parameters: what it may change.
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
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=ADAM_EPSILON)
        self._parameters = list(parameters)
        self._peak, self._steps, self._clip_norm = learning_rate, steps, clip_norm
        self._warmup = max(1, round(warmup_fraction * steps))
        self.taken = 0

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self._peak * learning_rate_factor(self.taken, self._steps, self._warmup)

    def step(self) -> float:
        """Applies the gradients that have been accumulated, clears them, and gives their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.taken += 1
        return float(norm)

    def discard(self) -> None:
        """Clears the gradients that have been accumulated."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"adamw": self._adamw.state_dict()["state"], "taken": self.taken}

    def load(self, state: dict[str, Any]) -> None:
        self._adamw.load_state_dict({"state": state["adamw"], "param_groups": self._adamw.state_dict()["param_groups"]})
        self.taken = state["taken"]


def data_order(examples: int, draws: int, seed: int) -> list[int]:
    """Indices of the examples in training order: every epoch its own shuffle."""
    rng = random.Random(f"order-{seed}")
    order: list[int] = []
    while len(order) < draws:
        epoch = list(range(examples))
        rng.shuffle(epoch)
        order += epoch
    return order[:draws]


def weights_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What a checkpoint keeps of the parameters, in their order."""
    return [p.detach() for p in parameters]


def load_weights(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    """Puts back what `weights_of` gave."""
    with torch.no_grad():
        for parameter, saved in zip(parameters, weights, strict=True):
            parameter.copy_(saved)
