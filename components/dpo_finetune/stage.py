"""Direct preference optimisation: the policy learns the rankings themselves, without reward model and rollouts.

Goes in:  the SFT policy, and the rankings of the snapshot that the judge did not learn from.
Comes out: a policy as a plain Hugging Face folder on S3, with `training.jsonl`: the same as PPO's.
Alone:    python -m components.dpo_finetune --snapshot-uri s3://… --sft-uri s3://… --judge-model-uri s3://…

Rafailov 2023 (2305.18290): section 4 for the objective, appendix A.3 for rankings of K completions.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.adapters import adapter_role, add_adapter, save_policy
from components.rlhf.distributed import any_of, check_same, passes, total
from components.rlhf.dpo import Loss, dpo_loss, group_logprobs
from components.rlhf.models import Precision, Role, context_tokens, device, load_policy, policy_role
from components.rlhf.optimisation import Optimiser, data_order, load_weights, weights_of
from components.rlhf.rankings import (
    EncodedRanking,
    Encoding,
    encode_rankings,
    join_where_it_pays,
    over_processes,
    pack,
    teaches_judge,
)
from components.rlhf.records import iterate_snapshot
from components.rlhf.reward import Ties
from components.rlhf.sharding import divide_layers
from components.rlhf.tokens import Encoded, show
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.job import Distributed
from components.services.launch import Context, Settings
from components.services.storage import MARKER, join

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "policy"
LOWER_RATE = "lower dpo_finetune.learning_rate"
_log = logging.getLogger(__name__)


class Config(Distributed):
    RUNTIME_ONLY = frozenset({"micro_batch_tokens", "processes", "nodes", "shard", "threads", "checkpoint_seconds"})

    loss: Loss = "pairs"
    """Likelihood of a ranking: the mean over its pairs ("pairs"), or that of the whole order ("plackett_luce")."""
    beta: float = Field(0.3, gt=0)
    """Implicit reward per nat of log-ratio to the reference; smaller lets the policy go further from it."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rankings."""
    batch_rankings: int = Field(16, ge=1)
    """Rankings in one optimiser step, each with all its completions."""
    micro_batch_tokens: int = Field(8192, ge=64)
    """Tokens in one forward pass, padding included; changes memory and speed, not the gradient."""
    max_tokens: int = Field(0, ge=0)
    """Longest prompt and completion together; longer prompts are cut at the front; 0: the model's context."""
    max_rankings: int = Field(0, ge=0)
    """Learn from at most this many rankings; 0: all that are not the judge's."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    ties: Ties = "drop"
    """Tied pairs: no loss ("drop"), or, with loss "pairs", half the loss in both directions ("half")."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels taken to be the wrong way round; with loss "pairs" only."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the policy's LoRA adapter; 0 trains all weights."""
    lora_alpha: int = Field(32, ge=1)
    """LoRA's alpha: updates are scaled by alpha / rank."""
    lora_layers: int = Field(0, ge=0)
    """The last so many layers carry the adapter; 0: all."""
    precision: Precision = "float32"
    """Type of the weights; in bfloat16, those that are trained (all, or adapters) are kept and stepped in float32 too."""
    seed: int = 0
    """Seed of the adapter and of the order of the rankings."""
    shard: bool = False
    """Divide weights, gradients and moments of the layers over the processes (FSDP2): for models that one GPU cannot hold."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints, in seconds; 0 saves one after every step."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.loss == "plackett_luce" and (self.ties == "half" or self.label_smoothing):
            raise ValueError('ties "half" and label_smoothing are of pairs: loss "plackett_luce" has neither')
        if self.shard and self.precision == "bfloat16" and not self.lora_rank:
            raise ValueError("shard trains float32 weights: set precision to float32, or lora_rank")
        return self


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings, as ingest_rankings wrote it."""
    sft_uri: str
    """Policy that train_sft made: where DPO starts, and its reference."""
    judge_model_uri: str
    """Judge that train_reward_model made: what it learned from is left to it."""


class Outputs(NamedTuple):
    policy_uri: str


class Measured(NamedTuple):
    """What implicit rewards say of some rankings: sums over strict pairs and over completions that are ranked first.

    Fields:
        right: pairs whose better completion has the higher reward; equal ones count one half.
        lead: reward of the better minus that of the worse.
        first_log_ratio: log p - log p_reference of what is ranked first, in nats.
    """

    right: float
    lead: float
    pairs: int
    first_log_ratio: float
    first: int

    def means(self) -> dict[str, float]:
        pairs, first = max(1, self.pairs), max(1, self.first)
        return {
            "accuracy": self.right / pairs,
            "margin": self.lead / pairs,
            "first_log_ratio": self.first_log_ratio / first,
        }


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read the rankings; 2. log-probabilities of the reference; 3. train; 4. measure on held-out rankings; 5. publish."""
    if config.threads:
        torch.set_num_threads(config.threads)
    uri = context.uri("policies")
    if context.published_before(uri):
        return Outputs(uri)

    # 1. Rankings that the judge did not learn from, so that it stays a stranger to this policy as to PPO's.
    snapshot, sft = context.scratch / "snapshot", context.scratch / "sft"
    context.storage.fetch_folder(inputs.snapshot_uri, snapshot)
    context.storage.fetch_folder(inputs.sft_uri, sft)
    model, tokenizer = load_policy(sft, config.precision, torch.device("cpu") if config.shard else None)
    role = _trainable(config, model)
    fraction = judge_fraction(context.storage.get_json(join(inputs.judge_model_uri, MARKER)), inputs.judge_model_uri)
    train, test = read_rankings(config, model, tokenizer, snapshot, fraction)
    some = train.rankings[0]
    _log.info(
        "%d rankings; one's best: %s",
        len(train.rankings),
        show(tokenizer, Encoded(some.prompts[0], some.completions[some.ranking.ranks.index(1)])),
    )
    rows = join_where_it_pays(role, [*train.rankings, *test.rankings], tokenizer.pad_token_id)
    learned, held_out = rows[: len(train.rankings)], rows[len(train.rankings) :]

    # 2. and 3. Training; the reference is the policy before its first step, so no second model is in memory.
    history, reference = train_loop(config, role, learned, held_out, tokenizer.pad_token_id, context)

    # 4. Held-out rankings, by the same report as the reward model's. Before training every implicit reward is 0.
    after = logprobs_of(config, role, held_out, tokenizer.pad_token_id)
    rewards = [config.beta * (a - b) for a, b in zip(after, reference[len(learned) :], strict=True)]
    scored = [
        ScoredRanking(each.ranking, r.tolist(), [len(c) for c in each.completions])
        for each, r in zip(held_out, rewards, strict=True)
    ]
    accuracy = accuracy_report(scored, seed=config.seed)["overall"]
    means = measure(held_out, rewards, config.beta).means()

    # 5. Publish.
    recent = history[-max(1, len(history) // 10) :]
    context.summary.update(
        rankings=len(learned),
        steps=len(history),
        loss=sum(row["loss"] for row in recent) / len(recent),
        margin=means["margin"],
        first_log_ratio=means["first_log_ratio"],
        left_out=train.left_out + test.left_out,
        cut_prompts=train.cut_prompts + test.cut_prompts,
    )
    ends = {"value": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
    context.summary.update({name: accuracy[end] for end, name in ends.items() if accuracy[end] is not None})
    folder = context.scratch / "policy"
    save_policy(model, tokenizer, folder, base=sft, adapter=ADAPTER if config.lora_rank else "")
    training = folder / "training.jsonl"
    training.write_text("".join(json.dumps(each) + "\n" for each in history), encoding="utf-8")
    context.tracker.artifact(training)
    parents = {"snapshot": inputs.snapshot_uri, "sft": inputs.sft_uri, "judge_model": inputs.judge_model_uri}
    facts = {"rankings": len(learned), "steps": len(history), "judge_fraction": fraction, "accuracy": accuracy}
    context.storage.publish_folder(folder, uri, context.marker("policy", **facts, parents=parents))
    Checkpoints(context, "dpo", config.checkpoint_seconds).clear()
    return Outputs(uri)


def judge_fraction(marker: dict[str, Any], uri: str) -> float:
    """Share of the prompts that taught the judge, from its own `rankloop.json`: it cannot differ from what was done.

    Raises:
        DoNotRetry: this is no judge, or it does not say.
    """
    fraction = marker.get("config", {}).get("judge_fraction")
    if marker.get("role") != "judge_model" or not isinstance(fraction, (int, float)):
        raise DoNotRetry(
            f"{uri} is a {marker.get('role')!r} with judge_fraction {fraction!r}, not a judge that train_reward_model made",
            "correct the input judge_model_uri",
        )
    return float(fraction)


def read_rankings(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, snapshot: Path, fraction: float
) -> tuple[Encoding, Encoding]:
    """Rankings to learn from, which are none of the judge's, and those of the test split.

    Raises:
        DoNotRetry: there is none of one kind.
    """
    limit = min(config.max_tokens or context_tokens(model.config), context_tokens(model.config))
    ours = (r for r in iterate_snapshot(snapshot, "train") if not teaches_judge(r.prompt, fraction))
    train = encode_rankings(tokenizer, ours, limit)
    test = encode_rankings(tokenizer, iterate_snapshot(snapshot, "test"), limit)
    if not train.rankings:
        raise DoNotRetry(
            f"no ranking to learn from: the judge has {fraction:.0%} of the prompts, and {train.left_out} rankings do not fit "
            f"{limit} tokens",
            "bring more rankings, lower train_reward_model.judge_fraction or raise dpo_finetune.max_tokens",
        )
    if not test.rankings:
        raise DoNotRetry("no held-out ranking to measure a policy on", "raise ingest_rankings.test_fraction or max_tokens")
    # A snapshot's order is that of digests: as good as random.
    return train._replace(rankings=train.rankings[: config.max_rankings or None]), test


def _trainable(config: Config, model: PreTrainedModel) -> Role:
    if config.lora_rank:
        model.requires_grad_(False)
        add_adapter(model, ADAPTER, config.lora_rank, config.lora_alpha, config.seed, config.lora_layers)
        role = adapter_role(model, ADAPTER, model.get_output_embeddings(), trainable=True, head_trainable=False)
        role.activate()
    else:
        role = policy_role(model, trainable=True)
    if config.shard:
        divide_layers([role], device())
    return role


def train_loop(
    config: Config,
    role: Role,
    rankings: Sequence[EncodedRanking],
    held_out: Sequence[EncodedRanking],
    pad_id: int,
    context: Context,
) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Trains in place, from the last checkpoint if there is one.

    Returns:
        What was logged of each step, and the reference's log-probabilities [K] of each ranking, the held-out ones last. They are
        computed once, before the first step, whatever the epochs; a checkpoint keeps them, since the weights are others by then.
    """
    steps = max(1, math.ceil(config.epochs * len(rankings) / config.batch_rankings))
    optimiser = Optimiser(role.trainable, learning_rate=config.learning_rate, steps=steps, warmup_fraction=config.warmup_fraction)
    checkpoints = Checkpoints(context, "dpo", config.checkpoint_seconds)
    history: list[dict[str, float]] = []
    everything = [*rankings, *held_out]
    if saved := checkpoints.load():
        _log.info("continuing after step %d", saved["optimiser"]["taken"])
        load_weights(role.trainable, saved["weights"])
        optimiser.load(saved["optimiser"])
        history = saved["history"]
        for row in history:
            context.tracker.row(row, int(row["step"]))
        reference = list(saved["reference"].split([len(each.completions) for each in everything]))
    else:
        _log.info("log-probabilities of %d rankings under the reference", len(everything))
        reference = logprobs_of(config, role, everything, pad_id)
    check_same("DPO", role.trainable)
    order = data_order(len(rankings), steps * config.batch_rankings, config.seed)

    def state() -> dict[str, Any]:
        kept = {"weights": weights_of(role.trainable), "optimiser": optimiser.state(), "history": history}
        return kept | {"reference": torch.cat(reference)}

    with context.deferred_stop() as stop:
        for step in context.progress.track(range(len(history), steps), steps, "steps", start=len(history)):
            chosen = order[step * config.batch_rankings : (step + 1) * config.batch_rankings]
            row = accumulate(config, role, [rankings[i] for i in chosen], [reference[i] for i in chosen], pad_id)
            if not math.isfinite(row["loss"]):
                raise DoNotRetry(f"DPO diverged: loss {row['loss']} at step {step}", LOWER_RATE)
            row["learning_rate"] = optimiser.learning_rate
            row["gradient_norm"] = optimiser.step()
            history.append({"step": step, **row})
            context.tracker.row(row, step)
            stopping, due = any_of(stop.is_set(), checkpoints.due())
            if stopping or (due and step + 1 < steps):
                check_same("DPO", role.trainable)
                checkpoints.save(state())
            if stopping:
                context.leave()
    if not all(bool(weight.isfinite().all()) for weight in weights_of(role.trainable)):
        raise DoNotRetry(f"DPO diverged: weights are not finite after step {steps - 1}", LOWER_RATE)
    return history, reference


def accumulate(
    config: Config, role: Role, rankings: Sequence[EncodedRanking], reference: Sequence[Tensor], pad_id: int
) -> dict[str, float]:
    """Adds the gradient of the batch's loss; gives the loss and what the implicit rewards say of its pairs.

    Micro-batches hold whole rankings and count by the batch's own sum of weights, so they change nothing but memory.
    """
    total_weight = sum(each.ranking.confidence or 1.0 for each in rankings)
    reference_of = {id(each): logprobs_K for each, logprobs_K in zip(rankings, reference, strict=True)}
    loss_sum = 0.0
    seen: list[Measured] = []
    costs = [each.rows * each.row_tokens for each in rankings]
    for group, counts in passes(rankings, costs, lambda own: pack(own, config.micro_batch_tokens), role.divided):
        weights = [each.ranking.confidence or 1.0 for each in group]
        reference_N = torch.cat([reference_of[id(each)] for each in group]).to(role.device)
        rewards_N = config.beta * (group_logprobs(role, group, pad_id) - reference_N)
        loss = dpo_loss(
            rewards_N,
            [each.ranking.ranks for each in group],
            loss=config.loss,
            weights=weights,
            ties=config.ties,
            label_smoothing=config.label_smoothing,
        )
        share = loss * (counts * sum(weights) / total_weight)
        share.backward()
        loss_sum += share.item()
        if not counts:
            continue
        rewards = rewards_N.detach().cpu().split([len(each.completions) for each in group])
        seen.append(measure(group, rewards, config.beta))
    loss_sum, *measured = total(loss_sum, *(sum(each[number] for each in seen) for number in range(len(Measured._fields))))
    return {"loss": loss_sum, **Measured._make(measured).means()}


def measure(rankings: Sequence[EncodedRanking], rewards: Sequence[Tensor], beta: float) -> Measured:
    """What the implicit rewards [K] of each ranking say of its pairs."""
    right = lead = first_log_ratio = 0.0
    pairs = first = 0
    for each, rewards_K in zip(rankings, rewards, strict=True):
        values = rewards_K.tolist()
        for better, worse in each.ranking.pairs():
            ahead = values[better] - values[worse]
            right += 1.0 if ahead > 0 else 0.5 if ahead == 0 else 0.0
            lead += ahead
            pairs += 1
        best = [value / beta for value, rank in zip(values, each.ranking.ranks, strict=True) if rank == 1]
        first_log_ratio += sum(best)
        first += len(best)
    return Measured(right, lead, pairs, first_log_ratio, first)


def logprobs_of(config: Config, role: Role, rankings: Sequence[EncodedRanking], pad_id: int) -> list[Tensor]:
    """Log-probabilities [K] of every ranking's completions under the policy as it is now, on the CPU."""
    return over_processes(role, rankings, config.micro_batch_tokens, lambda group: group_logprobs(role, group, pad_id))
