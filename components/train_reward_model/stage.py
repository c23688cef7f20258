"""Trains the reward model that PPO optimises, and a judge on other rankings that PPO never sees.

Goes in:  a snapshot of rankings, and the policy that SFT made.
Comes out: two reward models as plain Hugging Face folders on S3, and a report of what each gets right on held-out rankings.
Alone:    python -m components.train_reward_model --snapshot-uri s3://… --policy-uri s3://…

Both start from the policy with a new head and learn all C(K,2) pairs of a ranking in one batch element, for one epoch: more
overfits (Ouyang 2022, section 3.5 and appendix C.2). The rankings are divided between them by prompt (the judge is what Gao 2022
calls a proxy of the gold model).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.models import (
    ADAPTER_FOLDER,
    Role,
    adapter_role,
    add_adapter,
    context_tokens,
    load_policy,
    merge_adapter_into,
    new_scorer,
    save_adapter,
    save_model,
    scorer_role,
)
from components.rlhf.optimisation import Optimiser, data_order, load_weights, weights_of
from components.rlhf.records import iterate_snapshot
from components.rlhf.reward import Centring, Ties, ranking_loss
from components.rlhf.tokens import Encoded, show
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings
from components.train_reward_model.examples import (
    EncodedRanking,
    encode_rankings,
    group_scores,
    join_where_it_pays,
    pack,
    split_for_judge,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "reward"
CENTRING_RANKINGS = 512  # enough for a mean and a deviation to two digits; in a snapshot's order, which is as good as random
_log = logging.getLogger(__name__)


class Config(Settings):
    RUNTIME_ONLY = frozenset({"micro_batch_tokens", "threads", "checkpoint_seconds"})

    judge_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the prompts whose rankings teach the judge instead of the reward model."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rankings; more than one overfits."""
    batch_rankings: int = Field(16, ge=1)
    """Rankings in one optimiser step, each with all its pairs."""
    micro_batch_tokens: int = Field(8192, ge=64)
    """Tokens in one forward pass, padding included; changes memory and speed, not the gradient."""
    max_tokens: int = Field(0, ge=0)
    """Longest prompt and completion together; longer prompts are cut at the front; 0: the model's context."""
    max_rankings: int = Field(0, ge=0)
    """Learn from at most this many rankings (both models together); 0: all."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay, on matrices."""
    ties: Ties = "drop"
    """Tied pairs: no loss ("drop"), or half the loss in both directions ("half")."""
    margin: float = Field(0.0, ge=0)
    """By how much the better score must lead, in raw score units."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels taken to be the wrong way round."""
    centring: float = Field(0.0, ge=0)
    """Weight of the squared raw scores in the loss."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the LoRA adapter; 0 trains all weights."""
    lora_alpha: int = Field(32, ge=1)
    """LoRA's alpha: updates are scaled by alpha / rank."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights; bfloat16 only with an adapter, whose own weights stay float32."""
    seed: int = 0
    """Seed of the head, the adapter and the order of the rankings; the judge's is one higher."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints, in seconds; 0 saves one after every step."""


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings, as ingest_rankings wrote it."""
    policy_uri: str
    """Policy that train_sft made: the reward models start from it."""


class Outputs(NamedTuple):
    reward_model_uri: str
    judge_model_uri: str


class Trained(NamedTuple):
    """A trained reward model and what is known of it."""

    folder: Path
    report: dict[str, Any]
    history: list[dict[str, float]]
    facts: dict[str, Any]


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read and divide the rankings; 2. train both models and measure them on held-out rankings; 3. publish."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.precision == "bfloat16" and not config.lora_rank:
        raise DoNotRetry(
            "train_reward_model.precision = bfloat16 without an adapter loses small steps", "set lora_rank, or float32"
        )
    outputs = Outputs(context.uri("reward_models") + "/reward", context.uri("reward_models") + "/judge")
    if all(context.published_before(uri) for uri in outputs):
        return outputs

    # 1. Rankings.
    snapshot, policy = context.scratch / "snapshot", context.scratch / "policy"
    context.storage.fetch_folder(inputs.snapshot_uri, snapshot)
    context.storage.fetch_folder(inputs.policy_uri, policy)
    model, tokenizer = load_policy(policy, config.precision)
    limit = min(config.max_tokens or context_tokens(model), context_tokens(model))
    tokenizer.model_max_length = limit  # saved with the models: what they are asked later is cut as what they learned from
    train = encode_rankings(tokenizer, iterate_snapshot(snapshot, "train"), limit)
    test = encode_rankings(tokenizer, iterate_snapshot(snapshot, "test"), limit)
    if not test.rankings:
        raise DoNotRetry("no held-out ranking to measure a reward model on", "raise ingest_rankings.test_fraction or max_tokens")
    chosen = train.rankings[: config.max_rankings or None]  # a snapshot's order is that of digests: as good as random
    sides = split_for_judge(chosen, config.judge_fraction)
    first = sides[0][0]
    _log.info("one ranking's best: %s", show(tokenizer, Encoded(first.prompts[0], first.completions[first.ranking.ranks.index(1)])))
    del model

    # 2. Train and measure.
    counts = {"left_out": train.left_out + test.left_out, "cut_prompts": train.cut_prompts + test.cut_prompts}
    trained = {}
    for number, (name, side) in enumerate(zip(("reward", "judge"), sides, strict=True)):
        trained[name] = train_one(config, config.seed + number, name, policy, tokenizer, side, test.rankings, limit, context)

    # 3. Publish.
    from components.rlhf.report_page import reward_model_page

    page = context.scratch / "reward_model.html"
    reward = trained["reward"]
    page.write_text(reward_model_page(reward.report, trained["judge"].report, reward.history), encoding="utf-8")
    context.publish_html(page)
    context.summary.update(rankings=len(sides[0]), judge_rankings=len(sides[1]), **counts)
    for name, each in trained.items():
        accuracy = each.report["overall"]
        keys = {f"{name}_accuracy{suffix}": accuracy[key] for key, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))}
        context.summary.update({key: value for key, value in keys.items() if value is not None})
    for (name, each), uri in zip(trained.items(), outputs, strict=True):
        (each.folder / "accuracy.json").write_text(json.dumps(each.report, indent=2), encoding="utf-8")
        context.tracker.artifact(each.folder / "accuracy.json", name)
        role = "reward_model" if name == "reward" else "judge_model"
        parents = {"snapshot": inputs.snapshot_uri, "policy": inputs.policy_uri}
        context.storage.publish_folder(each.folder, uri, context.marker(role, **each.facts, **counts, parents=parents))
        Checkpoints(context, name, 0).clear()
    return outputs


def train_one(
    config: Config,
    seed: int,
    name: str,
    policy: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[EncodedRanking],
    test: Sequence[EncodedRanking],
    limit_tokens: int,
    context: Context,
) -> Trained:
    """One reward model: trained, centred, measured on the test rankings, and saved to a local folder."""
    model = new_scorer(policy, seed, config.precision)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.score.float()
    if config.lora_rank:
        add_adapter(model, ADAPTER, config.lora_rank, config.lora_alpha, seed)
        model.requires_grad_(False)
        role = adapter_role(model, ADAPTER, model.score, trainable=True, head_trainable=True)
        role.activate()
    else:
        role = scorer_role(model, trainable=True)
    train, test = (join_where_it_pays(role, each, tokenizer.pad_token_id) for each in (train, test))
    history = train_loop(config, seed, name, role, train, tokenizer.pad_token_id, context)

    # Centred so that what raters put first scores mean 0 (checklist: demonstrations score 0), in units of the spread.
    sample = train[:CENTRING_RANKINGS]
    raw = scores_of(role, sample, tokenizer.pad_token_id, config.micro_batch_tokens)
    best = [s for each, scores in zip(sample, raw, strict=True) for s, r in zip(scores, each.ranking.ranks, strict=True) if r == 1]
    everything = torch.tensor([s for scores in raw for s in scores])
    deviation = float(everything.std(correction=0))
    if not math.isfinite(deviation) or deviation < 1e-6:
        raise DoNotRetry(f"the {name} model gives every completion the same score", "check the rankings, or the learning rate")
    centring = Centring(sum(best) / len(best), deviation)

    raw_test = scores_of(role, test, tokenizer.pad_token_id, config.micro_batch_tokens)
    scored = [
        ScoredRanking(each.ranking, [s - centring.mean for s in scores], [len(c) for c in each.completions])
        for each, scores in zip(test, raw_test, strict=True)
    ]
    report = accuracy_report(scored, seed=seed)
    folder = save_scorer(config, seed, role, model, policy, tokenizer, centring, context.scratch / name)
    facts = {
        "centring": centring._asdict(),
        "rankings": len(train),
        "accuracy": report["overall"],
        "max_tokens": limit_tokens,
        "seed": seed,
    }
    return Trained(folder, report, history, facts)


def save_scorer(
    config: Config,
    seed: int,
    role: Role,
    model: PreTrainedModel,
    policy: Path,
    tokenizer: PreTrainedTokenizerBase,
    centring: Centring,
    folder: Path,
) -> Path:
    """A plain `AutoModelForSequenceClassification` folder; the centring constants lie in its `config.json`."""
    plain = model
    if config.lora_rank:
        plain = new_scorer(policy, seed)
        plain.config.pad_token_id = tokenizer.pad_token_id
        merge_adapter_into(plain, model, ADAPTER)
        plain.score.load_state_dict(role.head.state_dict())
        save_adapter(model, ADAPTER, folder / ADAPTER_FOLDER, config.lora_rank, config.lora_alpha)
    plain.config.score_mean, plain.config.score_deviation = centring
    plain.config.problem_type = "regression"  # so that a text-classification pipeline gives the raw score, not its sigmoid
    save_model(plain, tokenizer, folder)
    return folder


def train_loop(
    config: Config, seed: int, name: str, role: Role, rankings: Sequence[EncodedRanking], pad_id: int, context: Context
) -> list[dict[str, float]]:
    """Trains in place, from the last checkpoint if there is one; gives loss and pair accuracy of each step's batch."""
    steps = max(1, math.ceil(config.epochs * len(rankings) / config.batch_rankings))
    optimiser = Optimiser(
        role.trainable,
        learning_rate=config.learning_rate,
        steps=steps,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
    )
    checkpoints = Checkpoints(context, name, config.checkpoint_seconds)
    history: list[dict[str, float]] = []
    if saved := checkpoints.load():
        _log.info("%s: continuing after step %d", name, saved["optimiser"]["taken"])
        load_weights(role.trainable, saved["weights"])
        optimiser.load(saved["optimiser"])
        history = saved["history"]
    order = data_order(len(rankings), steps * config.batch_rankings, seed)
    with context.deferred_stop() as stop:
        for step in context.progress.track(range(len(history), steps), steps, f"{name} steps", start=len(history)):
            batch = [rankings[i] for i in order[step * config.batch_rankings : (step + 1) * config.batch_rankings]]
            loss, accuracy = accumulate(config, role, batch, pad_id)
            if not math.isfinite(loss):
                raise DoNotRetry(f"the {name} model diverged: loss {loss} at step {step}", "lower train_reward_model.learning_rate")
            rate = optimiser.learning_rate
            norm = optimiser.step()
            history.append({"step": step, "loss": loss, "accuracy": accuracy, "gradient_norm": norm, "learning_rate": rate})
            context.tracker.metrics({f"{name}_{k}": v for k, v in history[-1].items() if k != "step"}, step)
            if stop.is_set() or (checkpoints.due() and step + 1 < steps):
                checkpoints.save({"weights": weights_of(role.trainable), "optimiser": optimiser.state(), "history": history})
            if stop.is_set():
                context.leave()
    return history


def accumulate(config: Config, role: Role, rankings: Sequence[EncodedRanking], pad_id: int) -> tuple[float, float]:
    """Adds the gradient of the batch's ranking loss; gives the loss and the share of its pairs in the right order.

    Micro-batches hold whole rankings and count by the batch's own sum of weights, so they change nothing but memory.
    """
    weights = [each.ranking.confidence or 1.0 for each in rankings]
    total_weight = sum(weights)
    weight_of = {id(each): weight for each, weight in zip(rankings, weights, strict=True)}
    loss_sum = right = pairs = 0.0
    for group in pack(rankings, config.micro_batch_tokens):
        group_weights = [weight_of[id(each)] for each in group]
        scores_N = group_scores(role, group, pad_id)
        loss = ranking_loss(
            scores_N,
            [each.ranking.ranks for each in group],
            weights=group_weights,
            ties=config.ties,
            margin=config.margin,
            label_smoothing=config.label_smoothing,
            centring=config.centring,
        )
        share = loss * (sum(group_weights) / total_weight)
        share.backward()
        loss_sum += share.item()
        values, first = scores_N.tolist(), 0
        for each in group:
            for better, worse in each.ranking.pairs():
                right += values[first + better] > values[first + worse]
                pairs += 1
            first += len(each.completions)
    return loss_sum, right / pairs if pairs else 0.5


@torch.no_grad()
def scores_of(role: Role, rankings: Sequence[EncodedRanking], pad_id: int, max_tokens: int) -> list[list[float]]:
    """Raw scores of every completion, ranking by ranking."""
    found: dict[int, list[float]] = {}
    for group in pack(rankings, max_tokens):
        flat = iter(group_scores(role, group, pad_id).tolist())
        found |= {id(each): [next(flat) for _ in each.completions] for each in group}
    return [found[id(each)] for each in rankings]
