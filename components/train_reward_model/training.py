"""Trains one reward model, centres it, measures it on held-out rankings, and saves it as a plain folder; or makes several one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.adapters import ADAPTER_FOLDER, merge_adapter_into, save_adapter
from components.rlhf.ensemble_report import aggregated, ensemble_report
from components.rlhf.models import MEMBER_FOLDER, Role, new_scorer, save_model
from components.rlhf.rankings import EncodedRanking, join_where_it_pays
from components.rlhf.reward import Centring
from components.rlhf.reward_training import ADAPTER, new_role, recipe_of, scores_of, train_loop, with_scores
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.launch import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from components.train_reward_model.stage import Config

CENTRING_RANKINGS = 512  # enough for a mean and a deviation to two digits; in a snapshot's order, which is as good as random


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
    recipe = recipe_of(config.model_dump())
    model, role = new_role(recipe, seed, policy, tokenizer)
    train, test = (join_where_it_pays(role, each, tokenizer.pad_token_id) for each in (train, test))
    history = train_loop(
        recipe, seed, name, role, train, tokenizer.pad_token_id, context, Checkpoints(context, name, config.checkpoint_seconds)
    )

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
