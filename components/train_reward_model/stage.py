"""Trains the reward model that PPO optimises, and a judge on other rankings that PPO never sees.

Goes in:  a snapshot of rankings, and the policy that SFT made.
Comes out: two reward models as plain Hugging Face folders on S3, and a report of what each gets right on held-out rankings. The
           first may be an ensemble (Coste 2023).
Alone:    python -m components.train_reward_model --snapshot-uri s3://… --policy-uri s3://…

Both start from the policy with a new head and learn all C(K,2) pairs of a ranking in one batch element, for one epoch: more
overfits (Ouyang 2022, section 3.5 and appendix C.2). The rankings are divided between them by prompt (the judge is what Gao 2022
calls a proxy of the gold model).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from components.rlhf.accuracy_report import ScoredRanking
from components.rlhf.models import context_tokens, read_policy
from components.rlhf.rankings import encode_rankings, split_for_judge
from components.rlhf.records import iterate_snapshot
from components.rlhf.reward import Ties
from components.rlhf.reward_training import recipe_of, train_and_score
from components.rlhf.tokens import Encoded, show
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.job import Distributed
from components.services.launch import Context, Settings
from components.train_reward_model.studies import learning_curve, plan_subsets
from components.train_reward_model.training import ensemble, train_one

_log = logging.getLogger(__name__)


class Config(Distributed):
    RUNTIME_ONLY = frozenset(
        {"activation_checkpointing", "micro_batch_tokens", "processes", "nodes", "shard", "threads", "checkpoint_seconds"}
    )

    judge_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the prompts whose rankings teach the judge instead of the reward model."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rankings; more than one overfits."""
    batch_rankings: int = Field(16, ge=1)
    """Rankings in one optimiser step, each with all its pairs."""
    micro_batch_tokens: int = Field(8192, ge=64)
    """Tokens in one forward pass, padding included; changes memory and speed, not the gradient."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them: less memory, a third more work."""
    max_tokens: int = Field(0, ge=0)
    """Longest prompt and completion together; longer prompts are cut at the front; 0: the model's context."""
    max_rankings: int = Field(0, ge=0)
    """Learn from at most this many rankings (both models together); 0: all."""
    ensemble_members: int = Field(1, ge=1)
    """Reward models that PPO scores with, each with a seed of its own; the judge stays a single one."""
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
    curve_points: int = Field(0, ge=0)
    """Does more data help? Trains also on 1/2, 1/4, 1/8 ... of the reward model's rankings, so many times; 0: no."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the LoRA adapter; 0 trains all weights."""
    lora_alpha: int = Field(32, ge=1)
    """LoRA's alpha: updates are scaled by alpha / rank."""
    lora_layers: int = Field(0, ge=0)
    """The last so many layers carry the adapter; 0: all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights; in bfloat16, those that are trained (all, or adapters) are kept and stepped in float32 too."""
    seed: int = 0
    """Seed of the head, the adapter and the order of the rankings; the judge's is one higher, further members' follow."""
    shard: bool = False
    """Divide weights, gradients and moments of the layers over the processes (FSDP2): for models that one GPU cannot hold."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints, in seconds; 0 saves one after every step."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.shard and self.precision == "bfloat16" and not self.lora_rank:
            raise ValueError("shard trains float32 weights: set precision to float32, or lora_rank")
        return self


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings, as ingest_rankings wrote it."""
    policy_uri: str
    """Policy that train_sft made: the reward models start from it."""


class Outputs(NamedTuple):
    reward_model_uri: str
    judge_model_uri: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read and divide the rankings; 2. train the models and measure them on held-out rankings; 3. a study; 4. publish."""
    if config.threads:
        torch.set_num_threads(config.threads)
    outputs = Outputs(context.uri("reward_models") + "/reward", context.uri("reward_models") + "/judge")
    if context.published_before(*outputs):
        return outputs

    # 1. Rankings.
    snapshot, policy = context.scratch / "snapshot", context.scratch / "policy"
    context.storage.fetch_folder(inputs.snapshot_uri, snapshot)
    context.storage.fetch_folder(inputs.policy_uri, policy)
    tokenizer, policy_config = read_policy(policy)
    limit = min(config.max_tokens or context_tokens(policy_config), context_tokens(policy_config))
    tokenizer.model_max_length = limit  # saved with the models: what they are asked later is cut as what they learned from
    train = encode_rankings(tokenizer, iterate_snapshot(snapshot, "train"), limit)
    test = encode_rankings(tokenizer, iterate_snapshot(snapshot, "test"), limit)
    if not test.rankings:
        raise DoNotRetry("no held-out ranking to measure a reward model on", "raise ingest_rankings.test_fraction or max_tokens")
    chosen = train.rankings[: config.max_rankings or None]  # a snapshot's order is that of digests: as good as random
    sides = split_for_judge(chosen, config.judge_fraction)
    subsets = plan_subsets(sides[0], config.curve_points, config.batch_rankings)
    first = sides[0][0]
    _log.info("one ranking's best: %s", show(tokenizer, Encoded(first.prompts[0], first.completions[first.ranking.ranks.index(1)])))

    # 2. Train and measure.
    counts = {"left_out": train.left_out + test.left_out, "cut_prompts": train.cut_prompts + test.cut_prompts}
    trained = {}
    members = [f"reward-{number}" for number in range(1, config.ensemble_members)]
    for number, name in enumerate(("reward", "judge", *members)):
        side = sides[name == "judge"]
        trained[name] = train_one(config, config.seed + number, name, policy, tokenizer, side, test.rankings, limit, context)
    whole = trained["reward"].scored
    if members:
        trained["reward"] = ensemble(trained["reward"], [trained.pop(name) for name in members], config.seed)

    # 3. Does more data help, where that is asked for.
    def keep(name: str) -> Checkpoints:
        return Checkpoints(context, name, config.checkpoint_seconds)

    scored: dict[int, Sequence[ScoredRanking]] = {len(sides[0]): whole}
    for name, subset in subsets.items():
        recipe = recipe_of(config.model_dump())
        scored[len(subset)] = train_and_score(recipe, config.seed, name, policy, tokenizer, subset, test.rankings, context, keep)
    if subsets:
        trained["reward"].report["curve"] = learning_curve(scored, config.seed)

    # 4. Publish.
    from components.train_reward_model.page import reward_model_page

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
        rows = "".join(json.dumps(row) + "\n" for row in each.history)
        (each.folder / "training.jsonl").write_text(rows, encoding="utf-8")
        role = "reward_model" if name == "reward" else "judge_model"
        parents = {"snapshot": inputs.snapshot_uri, "policy": inputs.policy_uri}
        context.storage.publish_folder(each.folder, uri, context.marker(role, **each.facts, **counts, parents=parents))
    for name in ("reward", "judge", *members, *subsets, *(f"{each}-scores" for each in subsets)):
        Checkpoints(context, name, 0).clear()
    return outputs
