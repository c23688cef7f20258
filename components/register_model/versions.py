"""Versions in the MLflow registry: models in the transformers flavour, with the whole lineage in their tags."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.services.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

Task = Literal["text-generation", "text-classification"]
SERVED_TAG = "digest.served"  # SHA-256 of the list of digests of the files that MLflow keeps and serves
TAG_CHARACTERS = 5000  # MLflow's limit


class Logged(NamedTuple):
    """A model in MLflow's artifact store, not yet a version: its `models:/` URI and its id."""

    uri: str
    model_id: str


def find_version(client: MlflowClient, name: str, tag: str, value: str) -> str:
    """The first version of `name` whose `tag` is `value`, or "". Makes the registered model if it is not there."""
    from mlflow.exceptions import MlflowException

    with mlflow_errors():
        try:
            client.create_registered_model(name)
            return ""
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(tag) == value]
    return str(min(found, key=lambda v: int(v.version)).version) if found else ""


def log_model(
    client: MlflowClient, run_id: str, task: Task, name: str, folder: Path, card: str, config: Mapping[str, Any]
) -> Logged:
    """Logs the model of a plain folder under a run, in the transformers flavour, with its card.

    A policy with a chat template is logged for MLflow's task `llm/v1/chat`: whoever serves it sends messages as to OpenAI's API,
    and the template is applied. Without it a policy would read bare text as it never did in training, and often answer nothing.

    Args:
        name: what a server calls the model, as `models:/name`.
        config: generation parameters that a server uses where a request names none.
    """
    import mlflow
    from huggingface_hub import ModelCard
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    kind = AutoModelForCausalLM if task == "text-generation" else AutoModelForSequenceClassification
    model, tokenizer = kind.from_pretrained(folder, use_safetensors=True), AutoTokenizer.from_pretrained(folder)
    # Instead of a folder that is gone soon; and no name of the Hub, where MLflow would look for a licence.
    model.config._name_or_path = model.name_or_path = f"models:/{name}"
    chat = task == "text-generation" and tokenizer.chat_template is not None
    outputs = [ColSpec(DataType.string)]
    if task == "text-classification":
        outputs = [ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")]
    # Requirements and signature are given, because MLflow would find them out by running the model; that of chat is MLflow's own.
    signature = None if chat else ModelSignature(inputs=Schema([ColSpec(DataType.string)]), outputs=Schema(outputs))
    requirements = [f"{package}=={installed(package).partition('+')[0]}" for package in ("torch", "transformers", "mlflow")]
    with mlflow_errors():
        mlflow.set_tracking_uri(client.tracking_uri)
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.transformers.log_model(
                pipeline(task, model=model, tokenizer=tokenizer),
                name=name,
                task="llm/v1/chat" if chat else task,
                signature=signature,
                pip_requirements=requirements,
                model_card=ModelCard(card),
                model_config=dict(config) or None,
            )
    return Logged(logged.model_uri, logged.model_id)


def served_digests(uri: str, folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a logged model as MLflow's store gives it back: these are the bytes that will be served.

    Args:
        uri: of the logged model, as its version's `source` has it.
        folder: an empty or missing one, on a disk that holds the model; it is removed again.
    """
    import mlflow

    folder.mkdir(parents=True)
    try:
        with mlflow_errors():
            mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
            root = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
        found = {}
        for path in sorted(each for each in root.rglob("*") if each.is_file()):
            with open(path, "rb") as file:
                found[path.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def served_place(uri: str) -> str:
    """Where below the registry's S3 folder the digests of a logged model are kept."""
    return f"served/{uri.removeprefix('models:/')}.json"


def create_version(client: MlflowClient, run_id: str, name: str, logged: Logged, tags: Mapping[str, str], text: str) -> str:
    """Registers a logged model; the version is born with all its tags, so a half-made one is never found."""
    with mlflow_errors():
        created = client.create_model_version(
            name, source=logged.uri, run_id=run_id, tags=dict(tags), description=text, model_id=logged.model_id
        )
    return str(created.version)


def lineage_tags(candidate: Mapping[str, Any], evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Tags of a policy's version: what it was made from, by URI (each ends in a digest), and every row of its gate.

    Args:
        candidate: the policy's `rankloop.json`.
        evaluation: `evaluation.json`.
        rows: of the gate, as `components.rlhf.gate.decide` gives them.
    """
    tags = {
        key: str(evaluation[key])
        for key in ("snapshot_uri", "sft_uri", "reward_model_uri", "judge_model_uri", "champion_version", "champion_uri", "gate")
        if evaluation.get(key) is not None
    }
    tags |= {"policy_uri": str(evaluation["candidate_uri"]), "code": str(candidate["code"]), "stage": str(candidate["stage"])}
    for row in rows:
        tags[f"gate.{row['measure']}"] = gate_text(row)
    return {key: value[:TAG_CHARACTERS] for key, value in tags.items()}


def gate_text(row: Mapping[str, Any]) -> str:
    """A row of the gate in one line: `0.812 [0.765, 0.855], low > 0.5: pass`."""
    number = {key: "?" if row[key] is None else f"{row[key]:.4g}" for key in ("value", "low", "high", "threshold")}
    interval = "" if row["low"] is None and row["high"] is None else f" [{number['low']}, {number['high']}]"
    return f"{number['value']}{interval}, {row['relation']} {number['threshold']}: {row['verdict']}"
