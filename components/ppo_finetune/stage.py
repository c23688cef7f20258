"""PPO against the reward model, watched by a judge that is never optimised.

Goes in:  the SFT policy, the reward model, the judge, and the snapshot whose prompts are answered.
Comes out: the last policy than which the judge likes none better, as a plain Hugging Face folder on S3, with `training.jsonl`.
Alone:    python -m components.ppo_finetune --snapshot-uri s3://… --sft-uri s3://… --reward-model-uri s3://… --judge-model-uri …

Ouyang 2022, section 3.5; when to stop follows Gao 2022: where the reward still rises and the judge's falls, the reward model is
being exploited.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from components.ppo_finetune.engine import roll_out, rollout_engine
from components.ppo_finetune.memory import plan
from components.ppo_finetune.pretraining import examples_of_update, read_texts, windows
from components.ppo_finetune.progress import Progress
from components.ppo_finetune.prompts import read_prompts
from components.ppo_finetune.roles import POLICY, load_roles
from components.ppo_finetune.update import Stopwatch, look_at, optimise, statistics
from components.ppo_finetune.watch import check, keep_best, over_optimised
from components.rlhf.activations import checkpoint_activations
from components.rlhf.adapters import save_policy
from components.rlhf.distributed import any_of, check_same
from components.rlhf.memory import GIB, peak_bytes, release_free_memory, table
from components.rlhf.models import context_tokens, member_folders, read_policy
from components.rlhf.optimisation import data_order, load_weights
from components.rlhf.ppo import next_beta
from components.rlhf.reward import Aggregation
from components.rlhf.rollout import Completion
from components.rlhf.tokens import Encoded
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.job import Distributed
from components.services.launch import Context, Settings

_log = logging.getLogger(__name__)


class Config(Distributed):
    RUNTIME_ONLY = frozenset(
        {"activation_checkpointing", "micro_batch_tokens", "processes", "nodes", "shard", "threads", "checkpoint_seconds"}
        | {"vllm_python", "vllm_memory_fraction", "vllm_sleep", "vllm_timeout_seconds"}
    )

    updates: int = Field(50, ge=1)
    """PPO updates, each with fresh completions."""
    batch_prompts: int = Field(64, ge=2)
    """Prompts of one update."""
    samples_per_prompt: int = Field(1, ge=1)
    """Completions of each prompt in one update; more than one share the prompt's computation in the rollout."""
    max_new_tokens: int = Field(64, ge=1)
    """Budget of a completion, in tokens."""
    max_prompt_tokens: int = Field(0, ge=0)
    """Longest prompt, in tokens; longer ones are cut at the front; 0: what the model's context leaves."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities are taken at it too."""
    no_eos_score: float = -3.0
    """Score of a completion without EOS, instead of the reward model's; in deviations of its scores."""
    cut_completions: Literal["fixed", "scored"] = "fixed"
    """A completion without EOS: gets no_eos_score ("fixed"), or is scored as if it ended there, as in evaluation ("scored")."""
    reward_aggregation: Aggregation = "mean"
    """Score of an ensemble of reward models: its members' "mean", the "worst" of them, or "mean_minus_variance"."""
    variance_weight: float = Field(0.1, ge=0)
    """Weight of the members' variance in "mean_minus_variance" (Coste 2023's lambda), in 1 / deviation of the score."""
    epochs: int = Field(4, ge=1)
    """Passes over the completions of an update."""
    value_epochs: int = Field(0, ge=0)
    """Passes of the value model, at most as many as the policy's: they cost as much; 0: as many."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps of one pass."""
    micro_batch_tokens: int = Field(8192, ge=64)
    """Tokens in one forward pass, padding included; changes memory and speed, not the gradient."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them: less memory, a third more work."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate of the policy."""
    value_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the value model."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rates rise."""
    beta: float = Field(0.05, ge=0)
    """Coefficient of the KL penalty at the start, in deviations of the score per nat."""
    kl_target: float = Field(0.0, ge=0)
    """KL to the reference that beta is steered to, in nats per completion; 0 keeps beta fixed."""
    kl_horizon: int = Field(2000, ge=1)
    """Completions over which beta can change by 20 %."""
    max_kl_reference: float = Field(50.0, gt=0)
    """KL per completion, in nats, beyond which the run has blown up and fails."""
    max_kl_old: float = Field(0.0, ge=0)
    """KL per token from the policy that sampled, in nats, beyond which an update leaves the policy alone; 0: no bound."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip: float = Field(0.2, gt=0)
    """How far the policy's ratio may leave 1 before its gradient stops."""
    value_clip: float = Field(0.2, gt=0)
    """How far the value may leave the old value, in deviations of the score."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value loss."""
    whiten_rewards: bool = False
    """Scale the per-token rewards to variance 1, keeping their mean."""
    pretraining_coefficient: float = Field(0.0, ge=0)
    """Weight of the pretraining texts' loss per token beside the policy's (PPO-ptx); 0: none."""
    pretraining_examples: int = Field(8, ge=1)
    """Windows of pretraining text in one optimiser step."""
    pretraining_tokens: int = Field(256, ge=2)
    """Longest window of pretraining text, in tokens; at most the model's context."""
    critic_warmup_updates: int = Field(0, ge=0)
    """Updates at the start in which only the value model learns."""
    judge_window: int = Field(5, ge=1)
    """Updates over which reward and judge are averaged before they are compared."""
    judge_tolerance: float = Field(0.3, gt=0)
    """How far the judge's penalised reward may surely fall while the reward rises before PPO stops, in deviations of its scores."""
    judge_kl_penalty: float = Field(0.05, ge=0)
    """What a nat of KL to the reference takes off the judge's reward, in deviations of its scores: far from it the judge errs."""
    max_same_answer_fraction: float = Field(0.5, gt=0, le=1)
    """Share of an update's completions that may be one and the same text before the run counts as collapsed."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the policy's LoRA adapter; 0 trains all weights. Needs reward models with adapters."""
    lora_alpha: int = Field(32, ge=1)
    """LoRA's alpha: updates are scaled by alpha / rank."""
    lora_layers: int = Field(0, ge=0)
    """The last so many layers carry the adapter; 0: all. What lies below all adapters is computed once for all roles and passes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights; in bfloat16, those that are trained (all, or adapters) are kept and stepped in float32 too."""
    shard: bool = False
    """Divide weights, gradients and moments of the layers over the processes (FSDP2): for models that one GPU cannot hold."""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """What samples the completions: this process ("torch"), or vLLM as a process beside it ("vllm")."""
    sampler_ratio_cap: float = Field(2.0, ge=0)
    """Truncation of the importance weight, trainer over sampler, of a token that another engine than torch drew; 0: no weights."""
    max_kl_sampler: float = Field(0.1, gt=0)
    """KL per token from the engine that samples to the trainer, in nats, beyond which the run fails: they are not one policy."""
    vllm_python: str = ""
    """Interpreter that has vLLM, which needs other packages than this one; empty: this one."""
    vllm_memory_fraction: float = Field(0.3, gt=0, lt=1)
    """Share of the GPU's memory for vLLM's weights and cache; on a CPU its cache is as large as an update needs."""
    vllm_sleep: bool = False
    """On a GPU, vLLM gives its memory back between rollouts: its weights then lie in the host's memory."""
    vllm_timeout_seconds: float = Field(900.0, gt=0)
    """Longest that vLLM may take to start, or for the rollouts of one update, in seconds; then the stage ends for a retry."""
    seed: int = 0
    """Seed of the sampling; the order of the prompts has a stream of its own."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints, in seconds; 0 saves one after every update."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.minibatches > self.batch_prompts * self.samples_per_prompt:
            raise ValueError(f"{self.minibatches} minibatches of {self.batch_prompts * self.samples_per_prompt} completions")
        if self.value_epochs > self.epochs:
            raise ValueError(f"value_epochs {self.value_epochs} is more than epochs {self.epochs}")
        if self.shard and self.precision == "bfloat16" and not self.lora_rank:
            raise ValueError("shard trains float32 weights: set precision to float32, or lora_rank")
        if self.processes * self.nodes > self.batch_prompts:
            raise ValueError(f"{self.processes * self.nodes} processes share {self.batch_prompts} prompts: some would have none")
        return self


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings: the prompts of its train split are answered."""
    sft_uri: str
    """Policy that train_sft made: where PPO starts, and its reference."""
    reward_model_uri: str
    """Reward model that is optimised."""
    judge_model_uri: str
    """Reward model trained on other rankings, which watches."""
    pretraining: str = ""
    """Plain text for the pretraining mix: JSON lines {"text": …}, a file or an s3:// object; needs pretraining_coefficient."""
    fingerprint: str = ""
    """Digest of the pretraining text; unused by the stage, it makes an orchestrator's cache key follow its content."""


class Outputs(NamedTuple):
    policy_uri: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. load the roles and the prompts; 2. update; 3. take the policy that was kept; 4. publish."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if bool(inputs.pretraining) != bool(config.pretraining_coefficient):
        raise DoNotRetry(
            f"ppo_finetune.pretraining = {inputs.pretraining!r} and pretraining_coefficient = {config.pretraining_coefficient}: "
            "one without the other does nothing",
            "set both, or neither",
        )
    texts = read_texts(inputs.pretraining, context.storage) if inputs.pretraining else []
    if texts:
        context.depends_on(texts)
    uri = context.uri("policies")
    if context.published_before(uri):
        return Outputs(uri)

    # 1. Roles and prompts.
    folders = {name: context.scratch / name for name in ("snapshot", "sft", "reward", "judge")}
    for folder, source in zip(
        folders.values(), (inputs.snapshot_uri, inputs.sft_uri, inputs.reward_model_uri, inputs.judge_model_uri), strict=True
    ):
        context.storage.fetch_folder(source, folder)
    if config.reward_aggregation != "mean" and len(member_folders(folders["reward"])) == 1:
        raise DoNotRetry(
            f"ppo_finetune.reward_aggregation is {config.reward_aggregation!r}, but the reward model is no ensemble",
            "set train_reward_model.ensemble_members to 2 or more, or reward_aggregation to mean",
        )
    tokenizer, model_config = read_policy(folders["sft"])
    prompts, left_out = read_prompts(config, tokenizer, model_config, folders["snapshot"])
    _log.info("%d prompts; one of them: %s", len(prompts), " ".join(tokenizer.convert_ids_to_tokens(prompts[0])))
    scorers = [*member_folders(folders["reward"]), folders["judge"]]
    shares = plan(config, folders["sft"], scorers, [len(prompt) for prompt in prompts])
    _log.info("memory:\n%s", table(shares))
    roles = load_roles(
        folders["sft"],
        folders["reward"],
        folders["judge"],
        precision=config.precision,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_layers=config.lora_layers,
        seed=config.seed,
        shard=config.shard,
    )
    if config.activation_checkpointing:
        for role in (roles.policy, roles.value):
            checkpoint_activations(role.backbone)

    # 2. Updates.
    limit_tokens = min(config.pretraining_tokens, context_tokens(model_config))
    with rollout_engine(config, roles, folders["sft"], prompts, context.scratch) as engine:
        progress = Progress(config, roles, engine)
        why = train(config, progress, prompts, context, windows(roles.tokenizer, texts, limit_tokens))

    peak_gib = peak_bytes() / GIB  # publishing takes memory of its own
    _log.info("memory: %.3f GiB at the peak", peak_gib)

    # 3. The policy that was kept.
    load_weights(roles.policy.trainable, progress.best)
    chosen = progress.history[progress.best_update]
    for each in progress.history:
        each["chosen"] = each["update"] == progress.best_update

    # 4. Publish.
    first = progress.history[0]
    context.summary.update(
        updates=progress.update,
        chosen_update=progress.best_update,
        stopped=why,
        reward_before=first["reward"],
        reward=chosen["reward"],
        judge_reward_before=first["judge_reward"],
        judge_reward=chosen["judge_reward"],
        kl_reference=chosen["kl_reference"],
        memory_planned_gib=sum(share.bytes for share in shares) / GIB,
        memory_peak_gib=peak_gib,
    )
    folder = context.scratch / "policy"
    save_policy(roles.model, roles.tokenizer, folder, base=folders["sft"], adapter=POLICY if config.lora_rank else "")
    training = folder / "training.jsonl"
    training.write_text("".join(json.dumps(each) + "\n" for each in progress.history), encoding="utf-8")
    context.tracker.artifact(training)
    facts = {
        "stopped": why,
        "chosen_update": progress.best_update,
        "updates": progress.update,
        "prompts": len(prompts),
        "left_out_prompts": left_out,
        "chosen": chosen,
    }
    parents = {"snapshot": inputs.snapshot_uri, "sft": inputs.sft_uri, "reward_model": inputs.reward_model_uri}
    parents["judge_model"] = inputs.judge_model_uri
    context.storage.publish_folder(folder, uri, context.marker("policy", **facts, parents=parents))
    Checkpoints(context, "ppo", config.checkpoint_seconds).clear()
    return Outputs(uri)


def train(
    config: Config, progress: Progress, prompts: list[list[int]], context: Context, pretraining: Sequence[Encoded] = ()
) -> str:
    """Updates until the number is reached or the judge falls; gives the reason for the end.

    The rollouts of update u measure the policy before it, so one more than the updates is needed to measure the last.
    """
    checkpoints = Checkpoints(context, "ppo", config.checkpoint_seconds)
    if saved := checkpoints.load():
        progress.load(saved)
        for row in progress.history:
            context.tracker.row(row, row["update"])
        _log.info("continuing after update %d", progress.update)
    trained = [*progress.roles.policy.trainable, *progress.roles.value.trainable]
    check_same("PPO", trained)
    order = data_order(len(prompts), (config.updates + 1) * config.batch_prompts, config.seed)
    steps = config.epochs * config.minibatches
    with context.deferred_stop() as stop:
        todo = range(progress.update, config.updates + 1)
        for update in context.progress.track(todo, config.updates + 1, "updates", start=progress.update):
            chosen = order[update * config.batch_prompts : (update + 1) * config.batch_prompts]
            examples = examples_of_update(pretraining, update, config.pretraining_examples * steps, config.seed)
            one_update(config, progress, [prompts[i] for i in chosen], update == config.updates, examples)
            row = progress.history[-1]
            context.tracker.row(row, update)
            check(config, row)
            if over_optimised(config, progress):
                _log.warning("the judge's penalised reward falls while the reward rises: stopped after update %d", update)
                return "over_optimised"
            progress.update = min(update + 1, config.updates)
            stopping, due = any_of(stop.is_set(), checkpoints.due())
            if update < config.updates and (stopping or due):
                check_same("PPO", trained)
                checkpoints.save(progress.state())
            if stopping:
                context.leave()
    return "finished"


def one_update(
    config: Config, progress: Progress, prompts: list[list[int]], last: bool, pretraining: Sequence[Encoded] = ()
) -> list[Completion]:
    """Rolls out, measures, keeps the policy if it is the best so far and, unless it is the last, optimises; gives the answers."""
    watch = Stopwatch()
    completions = roll_out(config, progress.roles, prompts, progress.sampling, progress.engine)
    watch.lap("rollout")
    experience = look_at(config, progress.roles, completions)
    watch.lap("score")
    row: dict[str, Any] = {"update": len(progress.history), **statistics(experience), "beta": progress.beta}
    progress.history.append(row)
    keep_best(config, progress)
    if not last:
        row["learning_rate"] = progress.optimisers.policy.learning_rate
        critic_only = row["update"] < config.critic_warmup_updates
        row |= optimise(
            config, progress.roles, progress.optimisers, experience, progress.beta, progress.order, critic_only, pretraining
        )
        release_free_memory()
        watch.lap("optimise")
    seconds = sum(watch.seconds.values())
    row |= {**watch.seconds, "tokens_per_second": float(experience.batch.completion_mask_BT.sum()) / seconds}
    if config.kl_target:
        progress.beta = next_beta(
            progress.beta, row["kl_reference"], target=config.kl_target, samples=len(completions), horizon=config.kl_horizon
        )
    return completions
