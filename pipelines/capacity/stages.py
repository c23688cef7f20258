"""What each stage of a profile needs of a GPU for a model: memory by role, and work to be done.

Memory is that of the stages' own plans (`rlhf.memory`, `ppo_finetune.memory`), at the longest rows that the settings allow. Work is
counted at the same lengths, so hours are those of data that is as long as it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.dpo_finetune import stage as dpo
from components.evaluate import stage as evaluate
from components.evaluate.memory import evaluation_shares
from components.ppo_finetune import stage as ppo
from components.ppo_finetune.memory import Scorer, update_shares
from components.rlhf.adapters import AdapterShape
from components.rlhf.memory import (
    FLOAT_BYTES,
    Passes,
    Share,
    cache_bytes,
    device_shares,
    forward_bytes,
    shape_only,
    shape_role,
    sharding_shares,
    spread_shares,
    training_shares,
)
from components.rlhf.models import Precision, context_tokens, dtype_of, policy_role
from components.rlhf.reward import sharing_pays
from components.services.exits import DoNotRetry
from components.train_reward_model import stage as reward
from components.train_sft import stage as sft
from pipelines.capacity.gpus import PREFILL, SCORING, TRAINING
from pipelines.capacity.work import forward_flops, layer_weights, training_flops

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KIND = "cuda"
SMALLEST_MICRO_BATCH = 64  # what the stages accept
_POLICIES = 3  # that the evaluation samples from at most: the new one, SFT's, the champion


class Data(NamedTuple):
    """The rankings that a plan is for: how many, of how many completions, and how long in tokens."""

    rankings: int
    completions: int
    prompt_tokens: int
    completion_tokens: int


Division = Literal["", "sharded", "spread"]


class Job(NamedTuple):
    """Work of a stage.

    Fields:
        what: in words.
        kind: of `gpus.efficiency`, or 0 for decoding.
        flops, tokens: in all.
        steps, rows: of decoding: steps of so many rows each.
        cache_bytes: of decoding: of all rows, in the middle of the completions.
    """

    what: str
    kind: int
    flops: int
    tokens: int
    steps: int = 0
    rows: int = 0
    cache_bytes: int = 0


class Need(NamedTuple):
    """What a stage needs.

    Fields:
        stage: its name.
        shares: of one GPU's memory, with a micro-batch of so many tokens and so many GPUs.
        micro_batch_tokens: that its settings have.
        row_tokens: below this a micro-batch cannot be: it holds one row (or ranking) at least.
        division: how its layers can be divided over several GPUs, as in `shares` they are: "sharded" over processes that share the
            rows, "spread" over the GPUs of one process, which take turns, or not at all.
        jobs: its work.
    """

    stage: str
    shares: Callable[[int, int], list[Share]]
    micro_batch_tokens: int
    row_tokens: int
    division: Division
    jobs: list[Job]


def data_of(
    config: PretrainedConfig, stages: Mapping[str, Any], rankings: int, completions: int, prompt: int, completion: int
) -> Data:
    """The data, where 0 tokens stand for what PPO's settings allow.

    Raises:
        DoNotRetry: prompt and completion do not fit the model's context.
    """
    settings = stages["ppo_finetune"]
    completion = completion or settings["max_new_tokens"]
    context = context_tokens(config)
    prompt = prompt or settings["max_prompt_tokens"] or min(context, stages["train_sft"]["context_tokens"]) - completion
    if prompt < 1 or prompt + completion > context:
        raise DoNotRetry(
            f"a prompt of {prompt} and a completion of {completion} tokens do not fit the model's context of {context}",
            "give --prompt-tokens and --completion-tokens, or set ppo_finetune.max_prompt_tokens",
        )
    return Data(rankings, completions, prompt, completion)


def needs_of(config: PretrainedConfig, stages: Mapping[str, Any], method: tuple[str, ...], data: Data) -> list[Need]:
    """What the stages that compute on a GPU need, in the order of the graph.

    Args:
        stages: the profile's settings.
        method: the stages that fine-tune.
    """
    found = [_sft(config, stages, data), _reward(config, stages, data)]
    found += [_ppo(config, stages, data)] if "ppo_finetune" in method else []
    found += [_dpo(config, stages, data)] if "dpo_finetune" in method else []
    return [*found, _evaluate(config, stages, data)]


def parameters_of(config: PretrainedConfig) -> int:
    return sum(parameter.numel() for parameter in shape_only(config, "bfloat16", KIND).parameters())


def _ranking_rows(config: PretrainedConfig, data: Data, max_tokens: int) -> tuple[int, int, bool]:
    """Rows of a ranking and tokens of a row, and whether its completions share it, as the stages decide it."""
    room = max_tokens or context_tokens(config)
    completion = min(data.completion_tokens, room - 1)
    prompt = min(data.prompt_tokens, room - completion)
    joined = sharing_pays(prompt, [completion] * data.completions, config.hidden_size)
    return (1, prompt + data.completions * completion, True) if joined else (data.completions, prompt + completion, False)


def _division(precision: Precision, lora_rank: int) -> Division:
    """Layers of a training are divided where they are frozen, or trained in float32."""
    return "sharded" if lora_rank or precision == "float32" else ""


def _sharding(config: PretrainedConfig, precision: Precision, lora_rank: int, processes: int) -> list[Share]:
    """What changes where the layers of a training are divided, if they can be."""
    if processes == 1 or not _division(precision, lora_rank):
        return []
    each = 4 * FLOAT_BYTES  # weight, gradient, two moments
    if lora_rank:
        each = dtype_of(precision).itemsize
    divided = config.num_hidden_layers * layer_weights(config) * each
    return sharding_shares(divided, 2 * divided // config.num_hidden_layers, processes)


def _share(config: PretrainedConfig, layers: int) -> float:
    return (layers or config.num_hidden_layers) / config.num_hidden_layers


def _sft(config: PretrainedConfig, stages: Mapping[str, Any], data: Data) -> Need:
    settings = sft.Config(**stages["train_sft"])
    tokens = min(data.prompt_tokens + data.completion_tokens, context_tokens(config))
    if not settings.epochs:  # it takes the model as it is

        def shares(micro: int, devices: int) -> list[Share]:
            model = shape_only(config, settings.precision, KIND)
            held_out = forward_bytes(policy_role(model), max(1, micro // tokens), tokens, masked=False)
            return [
                *spread_shares(model, devices),
                *device_shares(KIND),
                Share("held-out loss", "one layer's activations", held_out),
            ]

        return Need("train_sft", shares, settings.micro_batch_tokens, tokens, "spread", [])

    def trained(micro: int, processes: int) -> list[Share]:
        passes = Passes(math.ceil(settings.batch_size / processes), tokens, micro, settings.activation_checkpointing)
        needed = training_shares(config, settings.precision, passes, KIND, lora_rank=0, lora_layers=0, scorer=False)
        return [*needed, *_sharding(config, settings.precision, 0, processes)]

    count = int(settings.epochs * data.rankings * (data.completions if settings.completions == "all" else 1))
    flops = count * training_flops(forward_flops(config, [tokens], data.completion_tokens), adapters=False)
    work = [Job("train", TRAINING, flops, count * tokens)]
    return Need("train_sft", trained, settings.micro_batch_tokens, tokens, _division(settings.precision, 0), work)


def _preferences(
    config: PretrainedConfig, name: str, settings: Any, data: Data, jobs: Callable[[int, int, float], list[Job]]
) -> Need:
    rows, tokens, joined = _ranking_rows(config, data, settings.max_tokens)
    scorer = name == "train_reward_model"

    def shares(micro: int, processes: int) -> list[Share]:
        passes = Passes(
            rows * math.ceil(settings.batch_rankings / processes),
            tokens,
            max(micro, rows * tokens),
            getattr(settings, "activation_checkpointing", False),
            joined,
        )
        how = {"lora_rank": settings.lora_rank, "lora_layers": settings.lora_layers, "scorer": scorer}
        needed = training_shares(config, settings.precision, passes, KIND, **how)
        return [*needed, *_sharding(config, settings.precision, settings.lora_rank, processes)]

    work = jobs(rows, tokens, _share(config, settings.lora_layers))
    division = _division(settings.precision, settings.lora_rank)
    return Need(name, shares, settings.micro_batch_tokens, rows * tokens, division, work)


def _reward(config: PretrainedConfig, stages: Mapping[str, Any], data: Data) -> Need:
    settings = reward.Config(**stages["train_reward_model"])

    def jobs(rows: int, tokens: int, share: float) -> list[Job]:
        count = min(data.rankings, settings.max_rankings or data.rankings)
        judged = settings.judge_fraction * count
        learned = int(settings.epochs * (judged + settings.ensemble_members * (count - judged)))
        each = forward_flops(config, [tokens] * rows)
        flops = learned * training_flops(each, adapters=bool(settings.lora_rank), adapted_share=share)
        return [Job("train reward model and judge", TRAINING, flops, learned * rows * tokens)]

    return _preferences(config, "train_reward_model", settings, data, jobs)


def _dpo(config: PretrainedConfig, stages: Mapping[str, Any], data: Data) -> Need:
    settings = dpo.Config(**stages["dpo_finetune"])
    left = int(data.rankings * (1 - stages["train_reward_model"]["judge_fraction"]))

    def jobs(rows: int, tokens: int, share: float) -> list[Job]:
        count = min(left, settings.max_rankings or left)
        each = forward_flops(config, [tokens] * rows, data.completions * data.completion_tokens)
        flops = int(settings.epochs * count * training_flops(each, adapters=bool(settings.lora_rank), adapted_share=share))
        return [
            Job("reference", SCORING, count * each, count * rows * tokens),
            Job("train", TRAINING, flops, int(settings.epochs * count * rows * tokens)),
        ]

    return _preferences(config, "dpo_finetune", settings, data, jobs)


def _sampling(config: PretrainedConfig, precision: Any, batches: int, prompts: int, rows: int, prompt: int, new: int) -> list[Job]:
    """Prefill and decoding of so many batches of prompts."""
    prefill = forward_flops(config, [prompt]) * prompts * batches
    cache = cache_bytes(config, precision, rows, prompt + new // 2)
    return [
        Job("prefill", PREFILL, prefill, batches * prompts * prompt),
        Job("decode", 0, 0, batches * rows * new, batches * new, rows, cache),
    ]


def _ppo(config: PretrainedConfig, stages: Mapping[str, Any], data: Data) -> Need:
    settings = ppo.Config(**stages["ppo_finetune"])
    member = reward.Config(**stages["train_reward_model"])
    prompt, new = min(data.prompt_tokens, settings.max_prompt_tokens or data.prompt_tokens), settings.max_new_tokens
    scorers = [Scorer()] * (member.ensemble_members + 1)
    division = _division(settings.precision, settings.lora_rank)
    if settings.lora_rank:
        shape = AdapterShape(member.lora_rank or settings.lora_rank, member.lora_alpha, member.lora_layers)
        role = shape_role(shape_only(config, settings.precision, KIND), shape.rank, shape.layers)
        size = FLOAT_BYTES * (sum(parameter.numel() for parameter in role.trainable) + config.hidden_size)
        scorers = [Scorer(size, shape)] * len(scorers)

    def shares(micro: int, processes: int) -> list[Share]:
        shared = {"micro_batch_tokens": micro, "processes": processes, "nodes": 1, "shard": bool(division)}
        return update_shares(settings.model_copy(update=shared), config, scorers, prompt, 0, KIND)

    rows, tokens, updates = settings.batch_prompts * settings.samples_per_prompt, prompt + new, settings.updates
    each, head = forward_flops(config, [tokens]), forward_flops(config, [], new)
    share = _share(config, settings.lora_layers) if settings.lora_rank else 1.0
    roles = 3 + len(scorers)  # policy, reference and value model besides
    scored = updates * rows * int(each * (1 - share + roles * share) + 2 * head)
    policy = training_flops(each + head, adapters=bool(settings.lora_rank), adapted_share=share)
    value = training_flops(each, adapters=bool(settings.lora_rank), adapted_share=share)
    policy_epochs = settings.epochs * max(0, updates - settings.critic_warmup_updates)
    value_epochs = (settings.value_epochs or settings.epochs) * updates
    trained = rows * (policy_epochs * policy + value_epochs * value)
    jobs = _sampling(config, settings.precision, updates, settings.batch_prompts, rows, prompt, new)
    jobs += [
        Job("score", SCORING, scored, updates * rows * roles * tokens),
        Job("optimise", TRAINING, trained, rows * (policy_epochs + value_epochs) * tokens),
    ]
    return Need("ppo_finetune", shares, settings.micro_batch_tokens, tokens, division, jobs)


def _evaluate(config: PretrainedConfig, stages: Mapping[str, Any], data: Data) -> Need:
    settings = evaluate.Config(**stages["evaluate"])
    prompt, new = min(data.prompt_tokens, settings.max_prompt_tokens or data.prompt_tokens), settings.max_new_tokens

    def shares(micro: int, devices: int) -> list[Share]:
        return evaluation_shares(config, settings.precision, settings.batch_size, prompt, new, KIND, devices)

    batches = math.ceil(settings.prompts / settings.batch_size) * _POLICIES
    jobs = _sampling(config, settings.precision, batches, settings.batch_size, settings.batch_size, prompt, new)
    count = settings.prompts * _POLICIES
    jobs.append(Job("judge", SCORING, count * forward_flops(config, [prompt + new]), count * (prompt + new)))
    return Need("evaluate", shares, SMALLEST_MICRO_BATCH, prompt + new, "spread", jobs)
