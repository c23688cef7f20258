"""What changes during a run of PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from components.ppo_finetune.roles import Roles
from components.ppo_finetune.update import Optimisers
from components.rlhf.optimisation import Optimiser, load_weights, weights_of
from components.rlhf.sharding import divide_like
from components.rlhf.vllm_sampler import VllmSampler

if TYPE_CHECKING:
    from components.ppo_finetune.stage import Config


class Progress:
    """Everything of a run that changes, and so everything that a checkpoint holds.

    Attributes:
        update: the next one; the number of updates done.
        beta: the KL coefficient.
        history: what was logged, update by update.
        best: the policy's weights in the last update than which the judge liked no other better (`watch.keep_best`).
        engine: that samples, where the policy does not itself; in no checkpoint, for it gets the weights anew at each rollout.
    """

    def __init__(self, config: Config, roles: Roles, engine: VllmSampler | None = None) -> None:
        self.engine = engine
        steps = config.updates * config.epochs * config.minibatches
        value_steps = config.updates * (config.value_epochs or config.epochs) * config.minibatches
        self.roles = roles
        self.optimisers = Optimisers(
            Optimiser(
                roles.policy.trainable,
                learning_rate=config.learning_rate,
                steps=steps - config.critic_warmup_updates * config.epochs * config.minibatches,
                warmup_fraction=config.warmup_fraction,
            ),
            Optimiser(
                roles.value.trainable,
                learning_rate=config.value_learning_rate,
                steps=value_steps,
                warmup_fraction=config.warmup_fraction,
            ),
        )
        self.update = 0
        self.beta = config.beta
        self.history: list[dict[str, Any]] = []
        self.best: list[torch.Tensor] = []
        self.best_update = 0
        # Sampling and the order of the rows draw from streams of their own.
        self.sampling = torch.Generator().manual_seed(config.seed * 1_000_003 + 1)
        self.order = torch.Generator().manual_seed(config.seed * 1_000_003 + 2)

    def state(self) -> dict[str, Any]:
        return {
            "update": self.update,
            "beta": self.beta,
            "history": self.history,
            "best": weights_of(self.best),
            "best_update": self.best_update,
            "policy": weights_of(self.roles.policy.trainable),
            "value": weights_of(self.roles.value.trainable),
            "policy_optimiser": self.optimisers.policy.state(),
            "value_optimiser": self.optimisers.value.state(),
            "sampling": self.sampling.get_state(),
            "order": self.order.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.update, self.beta, self.history = state["update"], state["beta"], state["history"]
        self.best = [divide_like(p, saved) for p, saved in zip(self.roles.policy.trainable, state["best"], strict=True)]
        self.best_update = state["best_update"]
        load_weights(self.roles.policy.trainable, state["policy"])
        load_weights(self.roles.value.trainable, state["value"])
        self.optimisers.policy.load(state["policy_optimiser"])
        self.optimisers.value.load(state["value_optimiser"])
        self.sampling.set_state(state["sampling"])
        self.order.set_state(state["order"])
