"""Trains one reward model, centres it, measures it on held-out rankings, and saves it as a plain folder; or makes several one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.activations import checkpoint_activations
from components.rlhf.adapters import ADAPTER_FOLDER, adapter_role, add_adapter, merge_adapter_into, save_adapter
from components.rlhf.ensemble_report import aggregated, ensemble_report
from components.rlhf.models import MEMBER_FOLDER, Role, new_scorer, save_model, scorer_role
from components.rlhf.optimisation import Optimiser, data_order, load_weights, weights_of
from components.rlhf.rankings import EncodedRanking, group_scores, join_where_it_pays, pack
from components.rlhf.reward import Centring, ranking_loss
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.launch import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from components.train_reward_model.stage import Config

ADAPTER = "reward"
CENTRING_RANKINGS = 512  # enough for a mean and a deviation to two digits; in a snapshot's order, which is as good as random
_log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A trained reward model and what is known of it; `scored` are the test rankings with its scores, centred but not scaled."""

    folder: Path
    scored: list[ScoredRanking]
    report: dict[str, Any]
    history: list[dict[str, float]]
    facts: dict[str, Any]


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
    model, role = new_role(config, seed, policy, tokenizer)
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
    scored = with_scores(test, [[s - centring.mean for s in scores] for scores in raw_test])
    report = accuracy_report(scored, seed=seed)
    folder = save_scorer(config, seed, role, model, policy, tokenizer, centring, context.scratch / name)
    facts = {
        "centring": centring._asdict(),
        "rankings": len(train),
        "accuracy": report["overall"],
        "max_tokens": limit_tokens,
        "seed": seed,
    }
    return Trained(folder, scored, report, history, facts)


def ensemble(first: Trained, others: Sequence[Trained], seed: int) -> Trained:
    """The members as one reward model: the others move into the first's folder, and the report is of their mean score.

    The mean of scores in deviations is put back into the members' mean unit, so that calibration means what it does for one model.
    """
    members = [first, *others]
    for number, each in enumerate(others, 1):
        each.folder.rename(first.folder / MEMBER_FOLDER.format(number))
    deviations = [each.facts["centring"]["deviation"] for each in members]
    centred = [
        [s._replace(scores=[score / deviation for score in s.scores]) for s in each.scored]
        for each, deviation in zip(members, deviations, strict=True)
    ]
    unit = sum(deviations) / len(deviations)
    mean = [s._replace(scores=[score * unit for score in s.scores]) for s in aggregated(centred, "mean")]
    report = {**accuracy_report(mean, seed=seed), "ensemble": ensemble_report(centred, seed)}
    facts = {**first.facts, "accuracy": report["overall"], "members": [each.facts for each in members]}
    return Trained(first.folder, mean, report, first.history, facts)


def train_and_score(
    config: Config,
    name: str,
    policy: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[EncodedRanking],
    test: Sequence[EncodedRanking],
    context: Context,
) -> list[ScoredRanking]:
    """The test rankings with the raw scores of a model that learned `train` alone: the recipe and the seed are the reward model's.

    The scores stay beside the checkpoints until the stage clears them, so that a killed stage trains no finished model again.
    """
    finished = Checkpoints(context, f"{name}-scores", 0)
    if (raw := finished.load()) is None:
        _, role = new_role(config, config.seed, policy, tokenizer)
        learned, asked = (join_where_it_pays(role, each, tokenizer.pad_token_id) for each in (train, test))
        train_loop(config, config.seed, name, role, learned, tokenizer.pad_token_id, context)
        raw = scores_of(role, asked, tokenizer.pad_token_id, config.micro_batch_tokens)
        if not all(math.isfinite(score) for scores in raw for score in scores):
            raise DoNotRetry(f"the {name} model diverged: scores that are not finite", "lower train_reward_model.learning_rate")
        finished.save(raw)
    return with_scores(test, raw)


def with_scores(rankings: Sequence[EncodedRanking], scores: Sequence[Sequence[float]]) -> list[ScoredRanking]:
    """The rankings as the reports take them."""
    return [
        ScoredRanking(each.ranking, own, [len(c) for c in each.completions]) for each, own in zip(rankings, scores, strict=True)
    ]


def new_role(config: Config, seed: int, policy: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, Role]:
    """A reward model that has learned nothing yet, and its trainable role."""
    model = new_scorer(policy, seed, config.precision)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.score.float()
    if config.lora_rank:
        add_adapter(model, ADAPTER, config.lora_rank, config.lora_alpha, seed, config.lora_layers)
        model.requires_grad_(False)
        role = adapter_role(model, ADAPTER, model.score, trainable=True, head_trainable=True)
        role.activate()
    else:
        role = scorer_role(model, trainable=True)
    if config.activation_checkpointing:
        checkpoint_activations(role.backbone)
    return model, role


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
        save_adapter(model, ADAPTER, folder / ADAPTER_FOLDER, config.lora_rank, config.lora_alpha, config.lora_layers)
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
        for row in history:
            context.tracker.row(row, int(row["step"]), f"{name}_")
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
            context.tracker.row(history[-1], step, f"{name}_")
            if stop.is_set() or checkpoints.due():  # after the last step too: another training may follow, and be killed
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
