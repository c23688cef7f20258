"""The five roles of PPO: policy, reference, value, reward model and judge, on one shared base or each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from components.rlhf.models import (
    ADAPTER_FOLDER,
    Precision,
    Role,
    adapter_role,
    add_adapter,
    copy_adapter,
    load_adapter,
    load_head,
    load_policy,
    load_scorer,
    merge_adapter_into,
    policy_role,
    save_model,
    scorer_role,
)
from components.rlhf.reward import Centring
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY, VALUE, REWARD, JUDGE = "policy", "value", "reward", "judge"


class Roles(NamedTuple):
    """Who takes part. Only policy and value are trained; all are in eval mode (no dropout).

    Fields:
        model: the causal model that carries the policy.
        reward_centring, judge_centring: turn raw scores into those that are optimised, logged and compared.
        lora: whether the roles are adapters on one base.
    """

    policy: Role
    reference: Role
    value: Role
    reward: Role
    judge: Role
    reward_centring: Centring
    judge_centring: Centring
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lora: bool


def load_roles(sft: Path, reward: Path, judge: Path, *, precision: Precision, lora_rank: int, lora_alpha: int, seed: int) -> Roles:
    """Loads every role.

    Raises:
        DoNotRetry: adapters are asked for, and a reward model has none for this base.
    """
    model, tokenizer = load_policy(sft, precision)
    (reward_head, reward_config), (judge_head, judge_config) = load_head(reward), load_head(judge)
    reward_centring, judge_centring = Centring.of(reward_config), Centring.of(judge_config)
    value_head = value_head_of(reward_head, reward_centring)
    if lora_rank:
        roles = _adapters(model, (reward_head, judge_head), value_head, reward, judge, lora_rank, lora_alpha, seed)
    else:
        value_model, _ = load_scorer(reward)
        value_model.score = value_head
        roles = (
            policy_role(model, trainable=True),
            policy_role(load_policy(sft, precision)[0]),
            scorer_role(value_model, trainable=True),
            scorer_role(load_scorer(reward)[0]),
            scorer_role(load_scorer(judge)[0]),
        )
    return Roles(*roles, reward_centring, judge_centring, model, tokenizer, bool(lora_rank))


def value_head_of(score: nn.Linear, centring: Centring) -> nn.Linear:
    """The value model starts from the reward model: a head that gives the centred score."""
    head = nn.Linear(score.in_features, 1, device=score.weight.device)
    head.weight.data.copy_(score.weight / centring.deviation)
    head.bias.data.fill_(-centring.mean / centring.deviation)
    return head


def _adapters(
    model: PreTrainedModel,
    heads: tuple[nn.Linear, nn.Linear],
    value_head: nn.Linear,
    reward: Path,
    judge: Path,
    lora_rank: int,
    lora_alpha: int,
    seed: int,
) -> tuple[Role, Role, Role, Role, Role]:
    for folder in (reward, judge):
        if not (folder / ADAPTER_FOLDER).is_dir():
            raise DoNotRetry(
                "ppo_finetune.lora_rank is set, but the reward model was trained in full and cannot share the policy's base",
                "set train_reward_model.lora_rank too, or ppo_finetune.lora_rank to 0",
            )
    model.requires_grad_(False)
    add_adapter(model, POLICY, lora_rank, lora_alpha, seed)
    rank, alpha = load_adapter(model, REWARD, reward / ADAPTER_FOLDER)
    load_adapter(model, JUDGE, judge / ADAPTER_FOLDER)
    add_adapter(model, VALUE, rank, alpha, seed)
    copy_adapter(model, REWARD, VALUE)
    model.eval()
    language_head = model.get_output_embeddings()
    return (
        adapter_role(model, POLICY, language_head, trainable=True, head_trainable=False),
        adapter_role(model, "", language_head, trainable=False, head_trainable=False),
        adapter_role(model, VALUE, value_head, trainable=True, head_trainable=True),
        adapter_role(model, REWARD, heads[0].requires_grad_(False), trainable=False, head_trainable=False),
        adapter_role(model, JUDGE, heads[1].requires_grad_(False), trainable=False, head_trainable=False),
    )


def save_policy(roles: Roles, sft: Path, folder: Path) -> None:
    """The policy as a plain Hugging Face folder; an adapter is merged into a fresh float32 copy of its base."""
    if roles.lora:
        plain, _ = load_policy(sft)
        merge_adapter_into(plain, roles.model, POLICY)
        save_model(plain, roles.tokenizer, folder)
    else:
        save_model(roles.model, roles.tokenizer, folder)
