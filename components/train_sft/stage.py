"""Supervised fine-tuning: makes the starting policy.

Goes in:  a snapshot of rankings, and demonstrations if there are any.
Comes out: a policy as a plain Hugging Face folder on S3.
Alone:    python -m components.train_sft --snapshot-uri s3://… --epochs 2

The policy starts from a pretrained model, or from scratch with a tokenizer trained on the data. It learns demonstrations if they
are given, else the completions of the rankings. Ouyang 2022, section 3.5 ("SFT").
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from components.rlhf.activations import checkpoint_activations
from components.rlhf.distributed import any_of, check_same
from components.rlhf.likelihood import add_nll_gradient, mean_nll
from components.rlhf.models import Role, context_tokens, device, policy_role, save_model
from components.rlhf.optimisation import Optimiser, data_order, load_weights, weights_of
from components.rlhf.records import iterate_snapshot
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.sharding import divide_layers
from components.rlhf.spread import load_spread
from components.rlhf.tokens import Encoded, PromptTooLong, encode_completion, encode_prompt, show
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.job import Distributed
from components.services.launch import Context, Settings, json_digest
from components.services.storage import Storage
from components.train_sft.examples import Example, from_rankings, read_demonstrations
from components.train_sft.pretrained import load_pretrained, model_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOWER_RATE = "lower train_sft.learning_rate"
_log = logging.getLogger(__name__)


class Config(Distributed):
    RUNTIME_ONLY = frozenset(
        {"activation_checkpointing", "micro_batch_tokens", "processes", "nodes", "shard", "threads", "checkpoint_seconds"}
    )

    base_model: str = ""
    """Pretrained model: local folder, s3:// folder, gguf:FILE, gguf:PACKAGE or Hub name; empty: from scratch."""
    vocabulary: int = Field(768, ge=300)
    """From scratch: tokens of the tokenizer that is trained on the data, at most."""
    layers: int = Field(2, ge=1)
    """From scratch: transformer layers."""
    hidden: int = Field(160, ge=8)
    """From scratch: width of the hidden states."""
    heads: int = Field(4, ge=1)
    """From scratch: attention heads."""
    context_tokens: int = Field(256, ge=16)
    """From scratch: longest prompt and completion together, in tokens."""
    completions: Literal["all", "top"] = "all"
    """Without demonstrations: learn all completions of the rankings, or only those ranked first."""
    epochs: float = Field(2.0, ge=0)
    """Passes over the examples; 0 takes a pretrained model as it is."""
    batch_size: int = Field(32, ge=1)
    """Examples in one optimiser step."""
    micro_batch_tokens: int = Field(8192, ge=64)
    """Tokens in one forward pass, padding included; changes memory and speed, not the gradient."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them: less memory, a third more work."""
    learning_rate: float = Field(4e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay, on matrices."""
    test_examples: int = Field(512, ge=0)
    """Held-out completions whose loss is measured at the end, at most."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of a pretrained model's weights; in bfloat16 they are kept and stepped in float32 too."""
    seed: int = 0
    """Seed of the initial weights and of the order of the examples."""
    shard: bool = False
    """Divide weights, gradients and moments of the layers over the processes (FSDP2): for models that one GPU cannot hold."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints, in seconds; 0 saves one after every step."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.shard and self.precision == "bfloat16":
            raise ValueError("shard trains float32 weights: set precision to float32")
        return self


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings, as ingest_rankings wrote it."""
    demonstrations: str = ""
    """JSONL file or s3:// object of {"prompt", "completion"}; empty: learn from the rankings' completions."""
    fingerprint: str = ""
    """Digest of demonstrations and base model (`fingerprint_of`); unused here, it makes an orchestrator's cache key follow them."""


class Outputs(NamedTuple):
    policy_uri: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read the examples; 2. make or load the model; 3. train; 4. measure on held-out examples; 5. publish."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.base_model and config.epochs == 0:
        raise DoNotRetry("train_sft.epochs = 0 without train_sft.base_model: a random model is not a policy", "set either")

    # 1. Examples. Only the train split is learned from; demonstrations are all for training.
    snapshot = context.scratch / "snapshot"
    context.storage.fetch_folder(inputs.snapshot_uri, snapshot)
    test = list(from_rankings(iterate_snapshot(snapshot, "test"), config.completions))
    if inputs.demonstrations:
        train = read_demonstrations(inputs.demonstrations, context.storage)
    else:
        train = list(from_rankings(iterate_snapshot(snapshot, "train"), config.completions))
    if not train:
        raise DoNotRetry(f"{inputs.snapshot_uri} has no rankings in the train split", "lower ingest_rankings.test_fraction")
    context.depends_on([model_digest(config.base_model), [tuple(e) for e in train]])
    uri = context.uri("policies")
    if context.published_before(uri):
        return Outputs(uri)

    # 2. Model and tokenizer.
    if config.base_model:
        model, tokenizer = _pretrained(config, context)
    else:
        model, tokenizer = _from_scratch(config, train)
    parameters = sum(p.numel() for p in model.parameters())
    encoded, left_out = encode(tokenizer, train, context_tokens(model.config))
    _log.info(
        "policy of %.2f M parameters; %d examples; one of them: %s", parameters / 1e6, len(encoded), show(tokenizer, encoded[0])
    )

    # 3. Train.
    role = policy_role(model, trainable=True)
    if config.activation_checkpointing:
        checkpoint_activations(role.backbone)
    if config.shard:
        divide_layers([role], device())
    steps = math.ceil(config.epochs * len(encoded) / config.batch_size)
    history = train_loop(config, role, encoded, steps, tokenizer.pad_token_id, context) if steps else []
    recent = [row["loss"] for row in history[-max(1, steps // 10) :]]
    loss = sum(recent) / len(recent) if recent else None

    # 4. Held-out loss, in nats per token.
    held_out, _ = encode(tokenizer, test[: config.test_examples], context_tokens(model.config), required=False)
    test_loss = mean_nll(role, held_out, tokenizer.pad_token_id, config.micro_batch_tokens) if held_out else None

    # 5. Publish.
    context.summary.update(parameters=parameters, examples=len(encoded), left_out=left_out)
    context.summary.update({k: v for k, v in (("loss", loss), ("test_loss", test_loss)) if v is not None})
    folder = context.scratch / "policy"
    save_model(model, tokenizer, folder)
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    facts = {"parameters": parameters, "examples": len(encoded), "left_out": left_out, "steps": steps, "test_loss": test_loss}
    context.storage.publish_folder(folder, uri, context.marker("policy", **facts, parents={"snapshot": inputs.snapshot_uri}))
    Checkpoints(context, "sft", config.checkpoint_seconds).clear()
    return Outputs(uri)


def fingerprint_of(demonstrations: str, base_model: str, storage: Storage) -> str:
    """A digest that changes whenever the content of either does; for the cache key, which knows names and no content."""
    examples = [tuple(e) for e in read_demonstrations(demonstrations, storage)] if demonstrations else []
    return json_digest([examples, model_digest(base_model)])


def _pretrained(config: Config, context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model where it is trained, or, if it is taken as it is, on all accelerators: it is only read then."""

    def load(place: torch.device | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_pretrained(config.base_model, config.precision, context.storage, context.scratch, place)

    if config.shard:
        return load(torch.device("cpu"))  # from there its layers go to the device one by one
    return load(None) if config.epochs else load_spread(load)


def _from_scratch(config: Config, examples: Sequence[Example]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    texts = (text for e in examples for text in (*(m["content"] for m in e.prompt), e.completion))
    tokenizer = train_tokenizer(texts, config.vocabulary, config.context_tokens)
    model = new_model(
        tokenizer,
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        context_tokens=config.context_tokens,
        seed=config.seed,
    )
    return model, tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit_tokens: int, required: bool = True
) -> tuple[list[Encoded], int]:
    """Token ids of the examples, and how many were left out because completion and prompt do not fit the context.

    Raises:
        DoNotRetry: `required`, and none of them fits.
    """
    result: list[Encoded] = []
    cut_prompts = 0
    for example in examples:
        completion = encode_completion(tokenizer, example.completion)
        try:
            prompt, cut = encode_prompt(tokenizer, example.prompt, limit_tokens - len(completion))
        except PromptTooLong:
            continue
        cut_prompts += cut
        result.append(Encoded(prompt, completion))
    left_out = len(examples) - len(result)
    if left_out or cut_prompts:
        _log.warning(
            "%d of %d examples do not fit the context of %d tokens and are left out; %d lost the front of their prompt",
            left_out,
            len(examples),
            limit_tokens,
            cut_prompts,
        )
    if required and not result:
        raise DoNotRetry(f"no example fits the context of {limit_tokens} tokens", "use a model with a longer context")
    return result, left_out


def train_loop(
    config: Config, role: Role, examples: Sequence[Encoded], steps: int, pad_id: int, context: Context
) -> list[dict[str, float]]:
    """Trains in place, from the last checkpoint if there is one; gives loss, gradient norm and learning rate of each step."""
    optimiser = Optimiser(
        role.trainable,
        learning_rate=config.learning_rate,
        steps=steps,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
    )
    checkpoints = Checkpoints(context, "sft", config.checkpoint_seconds)
    history: list[dict[str, float]] = []
    if saved := checkpoints.load():
        _log.info("continuing after step %d", saved["optimiser"]["taken"])
        load_weights(role.trainable, saved["weights"])
        optimiser.load(saved["optimiser"])
        history = saved["history"]
        for row in history:
            context.tracker.row(row, int(row["step"]))
    check_same("SFT", role.trainable)
    order = data_order(len(examples), steps * config.batch_size, config.seed)
    with context.deferred_stop() as stop:
        for step in context.progress.track(range(len(history), steps), steps, "steps", start=len(history)):
            chosen = [examples[i] for i in order[step * config.batch_size : (step + 1) * config.batch_size]]
            loss = add_nll_gradient(role, chosen, pad_id, config.micro_batch_tokens)
            if not math.isfinite(loss):
                raise DoNotRetry(f"SFT diverged: loss {loss} at step {step}", LOWER_RATE)
            rate = optimiser.learning_rate
            norm = optimiser.step()
            history.append({"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate})
            context.tracker.row(history[-1], step)
            stopping, due = any_of(stop.is_set(), checkpoints.due())
            if stopping or (due and step + 1 < steps):
                check_same("SFT", role.trainable)
                checkpoints.save({"weights": weights_of(role.trainable), "optimiser": optimiser.state(), "history": history})
            if stopping:
                context.leave()
    if not all(bool(weight.isfinite().all()) for weight in weights_of(role.trainable)):
        raise DoNotRetry(f"SFT diverged: weights are not finite after step {steps - 1}", LOWER_RATE)
    return history
