"""Registers the policy and its reward model, and promotes them if every gate says so.

Goes in:  the policy, its reward model, and the evaluation that compared it with SFT and champion.
Comes out: the version in the registry, and the alias that it carries.
Alone:    python -m components.register_model --candidate-uri s3://… --reward-model-uri s3://… --evaluation-uri s3://… --gate pass
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from components.register_model.aliases import CHALLENGER, CHAMPION
from components.register_model.audit import acting
from components.register_model.card import description, escape, model_card
from components.register_model.lineage import digest_tags, pick, read_lineage, read_versions
from components.register_model.page import registry_page
from components.register_model.promotion import ROLLED_BACK_TAG, Registry
from components.register_model.verdict import final_gate, read_verdict
from components.register_model.versions import (
    SERVED_TAG,
    Task,
    create_version,
    find_version,
    lineage_tags,
    log_model,
    served_digests,
    served_place,
)
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
    """How long a promotion may pause before another may take its lock over, in seconds."""
    intended_use: str = ""
    """What the policy is meant for, in Markdown, for the model card."""
    limits: str = ""
    """Known limits, in Markdown, for the model card, which adds what any policy of this pipeline has."""
    licence: str = ""
    """Licence of the policy, in Markdown, for the model card."""


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


class Model(NamedTuple):
    """A model to register.

    Fields:
        name: in the registry.
        task: of its pipeline.
        tag: the one that holds `uri`, its folder on S3.
        tags: the others.
        card: in Markdown.
        config: generation parameters for a server.
    """

    name: str
    task: Task
    tag: str
    uri: str
    tags: Mapping[str, str]
    card: str
    config: Mapping[str, Any]


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read the evaluation, decide again; 2. register, unless it was before; 3. promote, or leave as challenger; 4. show it."""
    # 1. The gate, decided from its numbers and not from anybody's word.
    verdict = read_verdict(context.storage, inputs.evaluation_uri)
    evaluation = verdict.evaluation
    for key in ("candidate_uri", "reward_model_uri"):
        if evaluation.get(key) != getattr(inputs, key):
            raise DoNotRetry(
                f"{inputs.evaluation_uri} is of another {key}: {evaluation.get(key)}, not {getattr(inputs, key)}",
                "give the evaluation of this very policy",
            )
    gate = final_gate(inputs.gate, verdict)

    # 2. Versions. A retry after a crash finds what was registered and goes on from there.
    mlflow = client()
    if not context.tracker.run_id:
        raise DoNotRetry("there is no MLflow run to register under", "set MLFLOW_TRACKING_URI")
    registry = Registry(
        mlflow,
        context.storage,
        context.uri("registry", config.policy_name),
        config.policy_name,
        config.lock_seconds,
        acting("register_model", context.tracker.run_id),
    )
    candidate = context.storage.get_json(join(inputs.candidate_uri, MARKER))
    tags = lineage_tags(candidate, evaluation | {"gate": gate}, verdict.rows) | {"evaluation_uri": inputs.evaluation_uri}
    lineage = read_lineage(context.storage, tags)
    tags |= digest_tags(lineage)
    card = model_card(config.policy_name, lineage, evaluation, verdict.rows, gate, config.model_dump(mode="json"))
    reward_tags = {key: value for key, value in tags.items() if key in ("snapshot_uri", "digest.reward_model", "digest.snapshot")}
    reward_text = f"Reward model on {escape(evaluation['snapshot_uri'])}, against which a policy of {config.policy_name} learned."
    reward = Model(
        config.reward_model_name, "text-classification", "reward_model_uri", inputs.reward_model_uri, reward_tags, reward_text, {}
    )
    companion = (config.reward_model_name, _version(context, registry, reward))
    tags |= {"reward_model_name": companion[0], "reward_model_version": companion[1]}
    if reason := retrain_reason(mlflow):
        tags["retrain_reason"] = reason
    # A server answers as the policy did when it was judged.
    drawn = {key: evaluation["config"][key] for key in ("max_new_tokens", "temperature") if key in evaluation.get("config", {})}
    policy = Model(
        config.policy_name, "text-generation", "policy_uri", inputs.candidate_uri, tags, card, {"do_sample": True, **drawn}
    )
    version = _version(context, registry, policy)

    # 3. Aliases.
    evidence = {
        "evaluation": inputs.evaluation_uri,
        "evaluation_digest": verdict.digest,
        "gate": gate,
        "policy": inputs.candidate_uri,
        "reward_model": inputs.reward_model_uri,
    }
    if registry.settle()[config.policy_name].get(CHAMPION) == version:
        alias = "unchanged"
    else:
        registry.nominate(version, companion, evidence)
        alias = CHALLENGER
        if gate == "pass" and rolled_back(registry, version):
            _log.warning("not promoted: version %s was rolled back by a person, who alone may promote it again", version)
        elif gate == "pass":
            registry.promote(version, companion, str(evaluation.get("champion_version", "")), evidence)
            alias = CHAMPION
    context.summary.update(
        version=version, alias=alias, gate=gate, policy_name=config.policy_name, reward_model_version=companion[1]
    )

    # 4. The page, and the card as a file.
    versions = read_versions(mlflow, config.policy_name)
    shown = pick(versions, config.policy_name, version)
    page = registry_page(config.policy_name, versions, shown, lineage, verdict.rows, registry.audit.records())
    for name, text in (("model_card.md", card), ("models.html", page)):
        (context.scratch / name).write_text(text, encoding="utf-8")
    context.tracker.artifact(context.scratch / "model_card.md")
    context.publish_html(context.scratch / "models.html")
    context.storage.upload_file(context.scratch / "models.html", context.uri("registry", f"{config.policy_name}/models.html"))
    return Outputs(version, alias)


def rolled_back(registry: Registry, version: str) -> bool:
    return bool(registry.tags(version).get(ROLLED_BACK_TAG))


def retrain_reason(mlflow: MlflowClient) -> str:
    """Why the drift watch started this pipeline run, or "" if it did not."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    if not parent:
        return ""
    with mlflow_errors():
        return str(mlflow.get_run(parent).data.tags.get("rankloop.retrain_reason", ""))


def _version(context: Context, registry: Registry, model: Model) -> str:
    """The version of a model, made if there is none yet.

    Logging takes as long as the model is large and is done before the lock; of several processes that do it for the same model,
    such as a retry beside the attempt that was believed dead, one makes the version and the others find it.
    """
    mlflow, run_id = client(), context.tracker.run_id
    if found := find_version(mlflow, model.name, model.tag, model.uri):
        _log.info("%s is version %s of %s already", model.uri, found, model.name)
        return found
    folder = context.scratch / model.tag
    context.storage.fetch_folder(model.uri, folder)
    logged = log_model(mlflow, run_id, model.task, model.name, folder, model.card, model.config)
    served = json.dumps(served_digests(logged.uri, context.scratch / f"{model.tag}-served"), indent=2, sort_keys=True).encode()
    context.storage.put_bytes(join(registry.uri, served_place(logged.uri)), served)
    tags = {**model.tags, model.tag: model.uri, SERVED_TAG: hashlib.sha256(served).hexdigest()}
    with registry.lock() as lease:
        found = find_version(mlflow, model.name, model.tag, model.uri)
        if not found:
            lease.renew()
            found = create_version(mlflow, run_id, model.name, logged, tags, description(model.card))
    return found
