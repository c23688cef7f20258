"""The five roles of PPO: policy, reference, value, reward model and judge, on one shared base or each on its own.

The reward model may be an ensemble: then it is several roles of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from components.rlhf.adapters import ADAPTER_FOLDER, AdapterShape, adapter_role, add_adapter, copy_adapter, load_adapter
from components.rlhf.models import (
    Precision,
    Role,
    device,
    load_head,
    load_policy,
    load_scorer,
    member_folders,
    policy_role,
    scorer_role,
)
from components.rlhf.reward import Centring
from components.rlhf.sharding import divide_layers
from components.rlhf.trunk import Trunk, shared_trunk
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY, VALUE, REWARD, JUDGE = "policy", "value", "reward", "judge"


class Member(NamedTuple):
    """One reward model of an ensemble; `centring` turns its raw scores into those that are optimised, logged and compared."""

    role: Role
    centring: Centring


class Roles(NamedTuple):
    """Who takes part. Only policy and value are trained; all are in eval mode (no dropout).

    Fields:
        members: of the reward model; one, unless it is an ensemble.
        judge_centring: turns the judge's raw scores into those that are logged and compared.
        model: the causal model that carries the policy.
        trunk: the layers below all adapters, which the roles share; None if there are none.
    """

    policy: Role
    reference: Role
    value: Role
    members: tuple[Member, ...]
    judge: Role
    judge_centring: Centring
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trunk: Trunk | None

    @property
    def reward(self) -> Role:
        """The reward model's first member, from which the value model starts."""
        return self.members[0].role

    @property
    def reward_centring(self) -> Centring:
        return self.members[0].centring

    @property
    def divided(self) -> bool:
        """Whether all roles' layers are divided over the processes (`rlhf.sharding`)."""
        return self.policy.divided


def load_roles(
    sft: Path,
    reward: Path,
    judge: Path,
    *,
    precision: Precision,
    lora_rank: int,
    lora_alpha: int,
    lora_layers: int = 0,
    seed: int,
    shard: bool = False,
) -> Roles:
    """Loads every role.

    Args:
        sft, reward, judge: folders of the policy, the reward model (with its further members) and the judge.
        precision: of every role's weights but for adapters and scores' heads, which are float32.
        lora_rank: of the policy's adapter; 0: every role is a model of its own, and the other `lora_` arguments mean nothing.
        lora_layers: how many of the last layers carry the policy's adapter; 0: all.
        seed: of the policy's adapter.
        shard: divide every model's layers over the processes.

    Raises:
        DoNotRetry: adapters are asked for, and a reward model has none for this base.
    """
    place = torch.device("cpu") if shard else None  # from there its layers go to the device one by one

    def alone(role: Role) -> Role:
        """A role with a model of its own; divided before the next is read, so that the host holds one whole model at a time."""
        if shard:
            divide_layers([role], device())
        return role

    model, tokenizer = load_policy(sft, precision, place)
    folders = [*member_folders(reward), judge]
    heads, configs = zip(*(load_head(folder) for folder in folders), strict=True)
    centrings = [Centring.of(each) for each in configs]
    value_head = value_head_of(heads[0], centrings[0])
    trunk = None
    if lora_rank:
        shape = AdapterShape(lora_rank, lora_alpha, lora_layers)
        (policy, reference, value, *scorers), trunk = _adapters(model, heads, value_head, folders, shape, seed, shard)
    else:
        policy = alone(policy_role(model, trainable=True))
        reference = alone(policy_role(load_policy(sft, precision, place)[0]))
        value_model, _ = load_scorer(reward, precision, place)
        value_model.score = value_head
        value = alone(scorer_role(value_model, trainable=True))
        scorers = [alone(scorer_role(load_scorer(folder, precision, place)[0])) for folder in folders]
    *members, judge_member = map(Member, scorers, centrings)
    return Roles(policy, reference, value, tuple(members), *judge_member, model, tokenizer, trunk)


def value_head_of(score: nn.Linear, centring: Centring) -> nn.Linear:
    """The value model starts from the reward model: a head that gives the centred score."""
    head = nn.Linear(score.in_features, 1, device=score.weight.device)
    head.weight.data.copy_(score.weight / centring.deviation)
    head.bias.data.fill_(-centring.mean / centring.deviation)
    return head


def _adapters(
    model: PreTrainedModel,
    heads: Sequence[nn.Linear],
    value_head: nn.Linear,
    folders: Sequence[Path],
    shape: AdapterShape,
    seed: int,
    shard: bool,
) -> tuple[list[Role], Trunk | None]:
    """Policy, reference, value, and the reward model's members and the judge, whose heads and folders are given in this order.

    Beside them the trunk that they share.
    """
    for folder in folders:
        if not (folder / ADAPTER_FOLDER).is_dir():
            raise DoNotRetry(
                "ppo_finetune.lora_rank is set, but the reward model was trained in full and cannot share the policy's base",
                "set train_reward_model.lora_rank too, or ppo_finetune.lora_rank to 0",
            )
    model.requires_grad_(False)
    add_adapter(model, POLICY, shape.rank, shape.alpha, seed, shape.layers)
    names = [REWARD, *(f"{REWARD}-{number}" for number in range(1, len(folders) - 1)), JUDGE]
    shapes = [load_adapter(model, name, folder / ADAPTER_FOLDER) for name, folder in zip(names, folders, strict=True)]
    add_adapter(model, VALUE, shapes[0].rank, shapes[0].alpha, seed, shapes[0].layers)
    copy_adapter(model, REWARD, VALUE)
    model.eval()
    language_head = model.get_output_embeddings()
    roles = [
        adapter_role(model, POLICY, language_head, trainable=True, head_trainable=False),
        adapter_role(model, "", language_head, trainable=False, head_trainable=False),
        adapter_role(model, VALUE, value_head, trainable=True, head_trainable=True),
        *(
            adapter_role(model, name, head.requires_grad_(False), trainable=False, head_trainable=False)
            for name, head in zip(names, heads, strict=True)
        ),
    ]
    if shard:
        divide_layers(roles, device())
    trunk = shared_trunk(model.base_model, trunk_layers(model.config.num_hidden_layers, [shape, *shapes]))
    for role in roles:
        role.upper = trunk and trunk.upper
    return roles, trunk


def trunk_layers(layers: int, adapters: Sequence[AdapterShape]) -> int:
    """How many of a model's layers lie below all of these adapters."""
    return layers - max(each.layers or layers for each in adapters)
