"""The training of a reward model: a recipe and rankings in, a role that scores out. What keeps its checkpoints is the caller's.

The stage that trains the reward model and the study that trains others like it share this loop, so that they differ in their
rankings alone (Ouyang 2022, section 3.5: one epoch over whole rankings, all C(K,2) pairs of a ranking in one batch element).
"""

from __future__ import annotations

import gc
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import torch

from components.rlhf.accuracy_report import ScoredRanking
from components.rlhf.activations import checkpoint_activations
from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.distributed import any_of, check_same, passes, total
from components.rlhf.models import Precision, Role, device, new_scorer, scorer_role
from components.rlhf.optimisation import Optimiser, data_order, load_weights, weights_of
from components.rlhf.rankings import EncodedRanking, group_scores, join_where_it_pays, over_processes, pack
from components.rlhf.reward import Ties, ranking_loss
from components.rlhf.sharding import divide_layers
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "reward"
_log = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """How a reward model learns; each is a setting of train_reward_model, which says what it means."""

    epochs: float
    batch_rankings: int
    micro_batch_tokens: int
    activation_checkpointing: bool
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    ties: Ties
    margin: float
    label_smoothing: float
    centring: float
    lora_rank: int
    lora_alpha: int
    lora_layers: int
    precision: Precision
    shard: bool = False


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe among the settings of train_reward_model."""
    return Recipe(**{name: settings[name] for name in Recipe._fields if name in settings})


class Outside(Protocol):
    """What a training needs of its stage: where numbers and progress go, and how it is asked to stop."""

    tracker: Any
    progress: Any

    def deferred_stop(self) -> AbstractContextManager[threading.Event]: ...

    def leave(self) -> NoReturn: ...


class Kept(Protocol):
    """A state that outlives the process."""

    def load(self) -> Any | None: ...

    def due(self) -> bool: ...

    def save(self, state: Any) -> None: ...


def new_role(recipe: Recipe, seed: int, policy: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, Role]:
    """A reward model that has learned nothing yet, and its trainable role."""
    if recipe.shard:
        gc.collect()  # divided layers refer to each other, so those of the model before are freed only now
    model = new_scorer(policy, seed, recipe.precision, torch.device("cpu") if recipe.shard else None)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.score.float()
    if recipe.lora_rank:
        add_adapter(model, ADAPTER, recipe.lora_rank, recipe.lora_alpha, seed, recipe.lora_layers)
        model.requires_grad_(False)
        role = adapter_role(model, ADAPTER, model.score, trainable=True, head_trainable=True)
        role.activate()
    else:
        role = scorer_role(model, trainable=True)
    if recipe.activation_checkpointing:
        checkpoint_activations(role.backbone)
    if recipe.shard:
        divide_layers([role], device())
    return model, role


def train_and_score(
    recipe: Recipe,
    seed: int,
    name: str,
    policy: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[EncodedRanking],
    test: Sequence[EncodedRanking],
    outside: Outside,
    keep: Callable[[str], Kept],
) -> list[ScoredRanking]:
    """The test rankings with the raw scores of a model that learned `train` alone.

    The scores are kept beside the checkpoints until the stage clears them, so that a killed stage trains no finished model again.
    """
    finished = keep(f"{name}-scores")
    if (raw := finished.load()) is None:
        _, role = new_role(recipe, seed, policy, tokenizer)
        learned, asked = (join_where_it_pays(role, each, tokenizer.pad_token_id) for each in (train, test))
        train_loop(recipe, seed, name, role, learned, tokenizer.pad_token_id, outside, keep(name))
        raw = scores_of(role, asked, tokenizer.pad_token_id, recipe.micro_batch_tokens)
        if not all(math.isfinite(score) for scores in raw for score in scores):
            raise DoNotRetry(f"the {name} model diverged: scores that are not finite", "lower train_reward_model.learning_rate")
        finished.save(raw)
    return with_scores(test, raw)


def with_scores(rankings: Sequence[EncodedRanking], scores: Sequence[Sequence[float]]) -> list[ScoredRanking]:
    """The rankings as the reports take them."""
    return [
        ScoredRanking(each.ranking, own, [len(c) for c in each.completions]) for each, own in zip(rankings, scores, strict=True)
    ]


def train_loop(
    recipe: Recipe,
    seed: int,
    name: str,
    role: Role,
    rankings: Sequence[EncodedRanking],
    pad_id: int,
    outside: Outside,
    kept: Kept,
) -> list[dict[str, float]]:
    """Trains in place, from the last checkpoint if there is one; gives loss and pair accuracy of each step's batch."""
    steps = max(1, math.ceil(recipe.epochs * len(rankings) / recipe.batch_rankings))
    optimiser = Optimiser(
        role.trainable,
        learning_rate=recipe.learning_rate,
        steps=steps,
        warmup_fraction=recipe.warmup_fraction,
        weight_decay=recipe.weight_decay,
    )
    history: list[dict[str, float]] = []
    if saved := kept.load():
        _log.info("%s: continuing after step %d", name, saved["optimiser"]["taken"])
        load_weights(role.trainable, saved["weights"])
        optimiser.load(saved["optimiser"])
        history = saved["history"]
        for row in history:
            outside.tracker.row(row, int(row["step"]), f"{name}_")
    check_same(name, role.trainable)
    order = data_order(len(rankings), steps * recipe.batch_rankings, seed)
    with outside.deferred_stop() as stop:
        for step in outside.progress.track(range(len(history), steps), steps, f"{name} steps", start=len(history)):
            batch = [rankings[i] for i in order[step * recipe.batch_rankings : (step + 1) * recipe.batch_rankings]]
            loss, accuracy = accumulate(recipe, role, batch, pad_id)
            if not math.isfinite(loss):
                raise DoNotRetry(f"the {name} model diverged: loss {loss} at step {step}", "lower train_reward_model.learning_rate")
            rate = optimiser.learning_rate
            norm = optimiser.step()
            history.append({"step": step, "loss": loss, "accuracy": accuracy, "gradient_norm": norm, "learning_rate": rate})
            outside.tracker.row(history[-1], step, f"{name}_")
            stopping, due = any_of(stop.is_set(), kept.due())
            if stopping or due:  # after the last step too: another training may follow, and be killed
                check_same(name, role.trainable)
                kept.save({"weights": weights_of(role.trainable), "optimiser": optimiser.state(), "history": history})
            if stopping:
                outside.leave()
    return history


def accumulate(recipe: Recipe, role: Role, rankings: Sequence[EncodedRanking], pad_id: int) -> tuple[float, float]:
    """Adds the gradient of the batch's ranking loss; gives the loss and the share of its pairs in the right order.

    Micro-batches hold whole rankings and count by the batch's own sum of weights, so they change nothing but memory.
    """
    weights = [each.ranking.confidence or 1.0 for each in rankings]
    total_weight = sum(weights)
    weight_of = {id(each): weight for each, weight in zip(rankings, weights, strict=True)}
    loss_sum = right = pairs = 0.0
    costs = [each.rows * each.row_tokens for each in rankings]
    for group, counts in passes(rankings, costs, lambda own: pack(own, recipe.micro_batch_tokens), role.divided):
        group_weights = [weight_of[id(each)] for each in group]
        scores_N = group_scores(role, group, pad_id)
        loss = ranking_loss(
            scores_N,
            [each.ranking.ranks for each in group],
            weights=group_weights,
            ties=recipe.ties,
            margin=recipe.margin,
            label_smoothing=recipe.label_smoothing,
            centring=recipe.centring,
        )
        share = loss * (counts * sum(group_weights) / total_weight)
        share.backward()
        loss_sum += share.item()
        if not counts:
            continue
        values, first = scores_N.tolist(), 0
        for each in group:
            for better, worse in each.ranking.pairs():
                right += values[first + better] > values[first + worse]
                pairs += 1
            first += len(each.completions)
    loss_sum, right, pairs = total(loss_sum, right, pairs)
    return loss_sum, right / pairs if pairs else 0.5


@torch.no_grad()
def scores_of(role: Role, rankings: Sequence[EncodedRanking], pad_id: int, max_tokens: int) -> list[list[float]]:
    """Raw scores of every completion, ranking by ranking."""
    found = over_processes(role, rankings, max_tokens, lambda group: group_scores(role, group, pad_id))
    return [scores_K.tolist() for scores_K in found]
