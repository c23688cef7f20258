"""Registers the policy and its reward model, and promotes them if every gate says so.

Goes in:  the policy, its reward model, and the evaluation that compared it with SFT and champion.
Comes out: the version in the registry, and the alias that it carries.
Alone:    python -m components.register_model --candidate-uri s3://… --reward-model-uri s3://… --evaluation-uri s3://… --gate pass
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from components.register_model.promotion import CHALLENGER, CHAMPION, champion_of, promote
from components.register_model.versions import create_version, find_version, lineage_tags
from components.rlhf.gate import decide
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings
from components.services.storage import MARKER, join
from components.services.tracking import PARENT_VARIABLE, client, mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


class Config(Settings):
    policy_name: str = Field("rankloop-policy", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the registered policy."""
    reward_model_name: str = Field("rankloop-reward-model", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the registered reward model."""
    lock_seconds: float = Field(60.0, gt=0)
    """How long a promotion may hold the lock before another may take it over, in seconds."""


class Inputs(Settings):
    candidate_uri: str
    """Policy to register."""
    reward_model_uri: str
    """Reward model that it was optimised against."""
    evaluation_uri: str
    """Evaluation of this policy."""
    gate: str
    """The evaluation's verdict as the graph saw it; anything but "pass" promotes nothing."""


class Outputs(NamedTuple):
    version: str
    alias: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read the evaluation and decide again; 2. register, unless it was before; 3. promote, or leave as challenger."""
    # 1. The gate, decided from its numbers and not from anybody's word.
    evaluation = context.storage.get_json(join(inputs.evaluation_uri, "evaluation.json"))
    for key in ("candidate_uri", "reward_model_uri"):
        if evaluation.get(key) != getattr(inputs, key):
            raise DoNotRetry(
                f"{inputs.evaluation_uri} is of another {key}: {evaluation.get(key)}, not {getattr(inputs, key)}",
                "give the evaluation of this very policy",
            )
    rows, decided = decide(evaluation.get("measures", {}), evaluation.get("thresholds", {}))
    gate = final_gate(inputs.gate, evaluation, decided)

    # 2. Versions. A retry after a crash finds what was registered and goes on from there.
    registry = client()
    if not context.tracker.run_id:
        raise DoNotRetry("there is no MLflow run to register under", "set MLFLOW_TRACKING_URI")
    candidate = context.storage.get_json(join(inputs.candidate_uri, MARKER))
    tags = lineage_tags(candidate, evaluation | {"gate": gate}, rows) | {"evaluation_uri": inputs.evaluation_uri}
    text = f"{candidate['stage']} on {evaluation['snapshot_uri']}. " + " ".join(row["sentence"] for row in rows)
    reward_tags = {"reward_model_uri": inputs.reward_model_uri, "snapshot_uri": evaluation["snapshot_uri"]}
    reward_version = _version(
        context, config.reward_model_name, "text-classification", "reward_model_uri", inputs.reward_model_uri, reward_tags, ""
    )
    tags["reward_model_version"] = reward_version
    if reason := retrain_reason(registry):
        tags["retrain_reason"] = reason
    version = _version(context, config.policy_name, "text-generation", "policy_uri", inputs.candidate_uri, tags, text)
    champion = champion_of(registry, config.policy_name)

    # 3. Aliases.
    if version == champion:
        alias = "unchanged"
    else:
        with mlflow_errors():
            registry.set_registered_model_alias(config.reward_model_name, CHALLENGER, reward_version)
            registry.set_registered_model_alias(config.policy_name, CHALLENGER, version)
        alias = CHALLENGER
        if gate == "pass":
            promote(
                registry,
                context.storage,
                context.uri("registry", config.policy_name),
                name=config.policy_name,
                version=version,
                compared_with=str(evaluation.get("champion_version", "")),
                companion=(config.reward_model_name, reward_version),
                evidence={"evaluation": inputs.evaluation_uri, "policy": inputs.candidate_uri, "run": context.tracker.run_id},
                lock_seconds=config.lock_seconds,
            )
            alias = CHAMPION
    context.summary.update(
        version=version, alias=alias, gate=gate, policy_name=config.policy_name, reward_model_version=reward_version
    )
    return Outputs(version, alias)


def final_gate(passed_in: str, evaluation: Mapping[str, Any], decided: str) -> str:
    """ "pass" only if the graph, the evaluation and the numbers themselves all say so; says who did not."""
    voices = {"the graph": passed_in, "the evaluation": evaluation.get("gate"), "its numbers": decided}
    against = [f"{who} ({said})" for who, said in voices.items() if said != "pass"]
    if against:
        _log.warning("not promoted: the gate is not passed by %s", ", ".join(against))
    return "fail" if against else "pass"


def retrain_reason(registry: MlflowClient) -> str:
    """Why the drift watch started this pipeline run, or "" if it did not."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    if not parent:
        return ""
    with mlflow_errors():
        return str(registry.get_run(parent).data.tags.get("rankloop.retrain_reason", ""))


def _version(context: Context, name: str, task: Any, tag: str, uri: str, tags: Mapping[str, str], text: str) -> str:
    """The version of the model at `uri`, made if there is none yet."""
    registry = client()
    if found := find_version(registry, name, tag, uri):
        _log.info("%s is version %s of %s already", uri, found, name)
        return found
    folder = context.scratch / tag
    context.storage.fetch_folder(uri, folder)
    return create_version(registry, context.tracker.run_id, name, task, folder, {tag: uri, **tags}, text)
