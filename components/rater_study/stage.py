"""Does the reward model hold for raters whom it never saw? The k-fold study of InstructGPT, for a reward model that there is.

Goes in:  a reward model that train_reward_model made. Its marker says what it learned from, how, and from which policy.
Comes out: a report and a page; no model is kept.
Alone:    python -m components.rater_study --reward-model-uri s3://…/reward --folds 5

Raters are divided into folds. For each, one model learns the rankings of all other raters, and one as many rankings drawn from all
raters; both are measured on held-out preferences of the fold's raters (Ouyang 2022, section 5.1: 69.6 +- 0.9 % on raters never
seen, 72.4 +- 0.4 % on raters in training). Two trainings a fold, so no profile turns it on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator

from components.rater_study.folds import Scored, across_raters, plan_folds
from components.rlhf.accuracy_report import ScoredRanking
from components.rlhf.models import context_tokens, read_policy
from components.rlhf.rankings import EncodedRanking, encode_rankings, split_for_judge
from components.rlhf.records import UNKNOWN_RATER, iterate_snapshot
from components.rlhf.reward_training import recipe_of, train_and_score
from components.services.checkpoints import Checkpoints
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings
from components.services.storage import MARKER, join


class Config(Settings):
    RUNTIME_ONLY = frozenset({"micro_batch_tokens", "threads", "checkpoint_seconds"})

    folds: int = Field(0, ge=0)
    """Folds of raters, each with two trainings; 0: no study, and the graph leaves the stage out."""
    seed: int = 0
    """Seed of the folds, and of what the usual models learn; the trainings have the reward model's own."""
    micro_batch_tokens: int = Field(0, ge=0)
    """Tokens in one forward pass, padding included; 0: as the reward model was trained."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints, in seconds; 0 saves one after every step."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.folds == 1:
            raise ValueError("one fold leaves nobody to learn from: set folds to 2 or more, or to 0")
        return self


class Inputs(Settings):
    reward_model_uri: str
    """Reward model that train_reward_model made."""


class Outputs(NamedTuple):
    study_uri: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. what the reward model learned from; 2. the folds; 3. two trainings for each; 4. publish."""
    if config.threads:
        torch.set_num_threads(config.threads)
    outputs = Outputs(context.uri("rater_studies"))
    if context.published_before(outputs.study_uri):
        return outputs
    if not config.folds:
        raise DoNotRetry("rater_study.folds = 0: there is nothing to study", "set folds to 2 or more; InstructGPT's study had 5")

    # 1. The reward model's rankings.
    marker = _marker(inputs.reward_model_uri, context)
    snapshot, policy = context.scratch / "snapshot", context.scratch / "policy"
    context.storage.fetch_folder(marker["parents"]["snapshot"], snapshot)
    context.storage.fetch_folder(marker["parents"]["policy"], policy)
    settings = marker["config"]
    tokenizer, policy_config = read_policy(policy)
    limit = min(settings["max_tokens"] or context_tokens(policy_config), context_tokens(policy_config))
    train = encode_rankings(tokenizer, iterate_snapshot(snapshot, "train"), limit).rankings
    test = known(encode_rankings(tokenizer, iterate_snapshot(snapshot, "test"), limit).rankings)
    learned, _ = split_for_judge(train[: settings["max_rankings"] or None], settings["judge_fraction"])

    # 2. and 3. Two models for each fold, with the reward model's recipe and seed.
    folds = plan_folds(known(learned), test, config.folds, config.seed)
    recipe = recipe_of(settings)
    if config.micro_batch_tokens:
        recipe = recipe._replace(micro_batch_tokens=config.micro_batch_tokens)

    def keep(name: str) -> Checkpoints:
        return Checkpoints(context, name, config.checkpoint_seconds)

    def scores(name: str, rankings: Sequence[EncodedRanking]) -> list[ScoredRanking]:
        return train_and_score(recipe, settings["seed"], name, policy, tokenizer, rankings, test, context, keep)

    scored = [
        (fold, Scored(scores(f"without-{number}", fold.train), scores(f"usual-{number}", fold.usual)))
        for number, fold in enumerate(folds, 1)
    ]
    report = across_raters(scored, config.seed)

    # 4. Publish.
    _publish(report, inputs, outputs, context)
    for number in range(1, len(folds) + 1):
        for name in (f"without-{number}", f"usual-{number}"):
            for each in (name, f"{name}-scores"):
                keep(each).clear()
    return outputs


def known(rankings: Sequence[EncodedRanking]) -> list[EncodedRanking]:
    """The rankings whose rater is known: who is not may be anybody, of those left out too."""
    return [each for each in rankings if each.ranking.rater_id != UNKNOWN_RATER]


def _marker(uri: str, context: Context) -> Mapping[str, Any]:
    marker: Mapping[str, Any] = context.storage.get_json(join(uri, MARKER))
    if marker.get("role") != "reward_model" or not {"snapshot", "policy"} <= set(marker.get("parents", {})):
        raise DoNotRetry(
            f"{uri} is no reward model of train_reward_model, but {marker.get('role')!r}", "give its output reward_model_uri"
        )
    return marker


def _publish(report: Mapping[str, Any], inputs: Inputs, outputs: Outputs, context: Context) -> None:
    from components.rater_study.page import study_page

    folder: Path = context.scratch / "study"
    folder.mkdir()
    page, document = folder / "rater_study.html", folder / "rater_study.json"
    page.write_text(study_page(report, inputs.reward_model_uri), encoding="utf-8")
    document.write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8")
    context.publish_html(page)
    context.tracker.artifact(document)
    for name in ("never_seen", "usual", "difference"):
        ends = {f"{name}{suffix}": report[name][key] for key, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))}
        context.summary.update({key: value for key, value in ends.items() if value is not None})
    context.summary["folds"] = len(report["folds"])
    marker = context.marker("rater_study", report=dict(report), parents={"reward_model": inputs.reward_model_uri})
    context.storage.publish_folder(folder, outputs.study_uri, marker)
