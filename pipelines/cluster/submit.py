"""Starts a run in a cluster: the graph's version, the profile's values as parameters, a name, an experiment."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any, NamedTuple

from components.services.exits import DoNotRetry
from components.services.launch import STORAGE_VARIABLE
from components.services.storage import Storage
from pipelines.arguments import Fingerprints, Sources, arguments_of, fingerprints_of, upload_simulated
from pipelines.cluster.connection import Connection
from pipelines.cluster.versions import Version, upload
from pipelines.profile import Profile
from pipelines.resources import Resources

GRAPHS = ("rlhf", "drift_watch")
EXPERIMENT = "rankloop"
SERVICE_ACCOUNT = "rankloop-stage"


class Order(NamedTuple):
    """What is to run.

    Fields:
        graph: "rlhf" or "drift_watch".
        sources: URIs that the cluster can read; rankings "" for the profile's simulated ones.
        service_account: of the stages' pods; "" leaves KFP's own.
    """

    graph: str
    profile: Profile
    sources: Sources
    resources: Resources
    tags_allowed: bool = False
    experiment: str = EXPERIMENT
    service_account: str = SERVICE_ACCOUNT


class Started(NamedTuple):
    """A run in KFP. `version` is the graph's, or None where the run was there before."""

    run_id: str
    name: str
    page: str
    version: Version | None


def start(kfp: Connection, order: Order, name: str = "") -> Started:
    """Starts one run.

    Raises:
        DoNotRetry: the cluster could not read a source, the graph is unknown or breaks the policy, or KFP refuses.
        Retry: S3 or KFP cannot be reached. Whether the run was created is then not known.
    """
    arguments = parameters_of(order)
    version = upload(kfp, order.graph, order.resources, order.tags_allowed)
    name = name or f"{order.graph}-{order.profile.name.rpartition('/')[2]}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    run = create_run(kfp, order, version, arguments, name)
    return Started(str(run.run_id), name, kfp.page_of(str(run.run_id)), version)


def create_run(kfp: Connection, order: Order, version: Version, arguments: dict[str, Any], name: str) -> Any:
    """The run as KFP created it. It is asked once: a second request could make a second run."""
    import kfp_server_api

    body = kfp_server_api.V2beta1Run(
        display_name=name,
        experiment_id=experiment_of(kfp, order.experiment),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=arguments),
        service_account=order.service_account or None,
    )
    return kfp.ask(f"run {name}", kfp.client.runs.run_service_create_run, body, again=False)


def experiment_of(kfp: Connection, name: str) -> str:
    """The id of the experiment, which is created if it is not there."""
    import kfp_server_api

    body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=kfp.namespace or None)
    create = kfp.client.experiments.experiment_service_create_experiment
    return kfp.made_once(f"experiment {name}", lambda: experiment_named(kfp, name), create, body, "experiment_id")


def experiment_named(kfp: Connection, name: str) -> str:
    """The id of the experiment, or ""."""
    call = kfp.client.experiments.experiment_service_list_experiments
    for each in kfp.pages("experiments", call, "experiments", namespace=kfp.namespace):
        if each.display_name == name:
            return str(each.experiment_id)
    return ""


def parameters_of(order: Order, scheduled: bool = False) -> dict[str, Any]:
    """The run's parameters, with fingerprints of what its sources hold now; simulated rankings are put on S3 first.

    Args:
        scheduled: leave the rankings' fingerprint empty: each of the schedule's runs reads them anew (`read_anew`).
    """
    if order.graph not in GRAPHS:
        raise DoNotRetry(f"unknown graph {order.graph!r}; known: {', '.join(GRAPHS)}")
    profile, sources = order.profile, order.sources
    _refuse_local(profile, sources)
    storage = Storage()
    if not sources.rankings:
        sources = sources._replace(rankings=_simulated(profile, storage))
    reading = profile.stages["ingest_rankings"]
    # The salt is a secret of the cluster's. Without it here, a changed salt is not seen by KFP's cache, but it is by the stage.
    salt = os.environ.get(reading["rater_salt_variable"], "") if reading["rater_ids"] == "hashed" else ""
    found = fingerprints_of(profile, sources, storage, salt)
    if scheduled:
        found = Fingerprints("", found.sft, found.pretraining)
    return arguments_of(profile, sources, found, order.graph)


def _simulated(profile: Profile, storage: Storage) -> str:
    if profile.simulated is None:
        raise DoNotRetry(f"profile {profile.name} brings no rankings", "give them with --rankings s3://… or hf://…")
    root = os.environ.get(STORAGE_VARIABLE, "")
    if not root.startswith("s3://"):
        raise DoNotRetry(
            f"simulated rankings go to S3, and {STORAGE_VARIABLE} = {root!r} names no place there",
            f"set {STORAGE_VARIABLE}=s3://bucket and the AWS_* variables, or give --rankings s3://… or hf://…",
        )
    return upload_simulated(storage, root, profile.simulated.rankings, profile.simulated.seed)


def _refuse_local(profile: Profile, sources: Sources) -> None:
    for name, value in sources._asdict().items():
        if value and not value.startswith(("s3://", "hf://") if name == "rankings" else "s3://"):
            raise DoNotRetry(f"{name} = {value!r} is a path of this machine, which no pod can read", "put it on S3 and give s3://…")
    base = profile.stages["train_sft"]["base_model"]
    if base.removeprefix("gguf:").startswith((".", "/", "~")):
        raise DoNotRetry(
            f"train_sft.base_model = {base!r} is a path of this machine, which no pod can read",
            "give an s3:// folder of rankloop's, or a name on the Hugging Face Hub",
        )
