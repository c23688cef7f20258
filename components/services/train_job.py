"""The processes of several nodes: a Kubeflow TrainJob, made, followed and ended through the `kubeflow` SDK.

The job's pods run this stage's own image under the runtime `RANKLOOP_TRAINING_RUNTIME`, which brings service account, secrets,
volumes and node kind; the SDK's other two backends run the same job in containers or processes of this machine.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from components.images import TRAIN
from components.services.exits import DoNotRetry, Retry
from components.services.job import JOB_VARIABLE, Job
from components.services.storage import Storage, join

if TYPE_CHECKING:
    from kubeflow.trainer import CustomTrainer, Runtime, TrainerClient

RUNTIME_VARIABLE = "RANKLOOP_TRAINING_RUNTIME"
DEFAULT_RUNTIME = "rankloop-torch"
RESOURCES_VARIABLE = "RANKLOOP_NODE_RESOURCES"  # {"cpu": 8, "memory": "64Gi"}: of each node beside its GPUs
LOOK_SECONDS = 2.0
UNREACHABLE_SECONDS = 300.0  # for so long the cluster may not answer; the job runs on meanwhile
STOP_SECONDS = 25.0  # for the processes to save and leave; Kubernetes gives pods 30
PASSED_ON = ("RANKLOOP_", "AWS_", "MLFLOW_", "HF_", "OMP_", "GOMP_", "LRU_", "ONEDNN_", "TORCH", "LD_", "PYTHON", "PATH", "TMPDIR")

_log = logging.getLogger(__name__)


def start_processes() -> None:  # the SDK sends this function's source: nothing outside of it exists there
    from components.services.node import main

    main()


class TrainJob:
    """A job under way from the start. `backend`: "kubernetes", "container" or "local"."""

    def __init__(self, job: Job, backend: str) -> None:
        self._backend, self._outcomes = backend, job.outcomes
        self._client = client_of(backend)
        from kubeflow.trainer.options import Name

        self._seen = time.monotonic()
        self._looked = 0.0
        self._told = 0.0
        self._lines = 0
        self._status = "Created"
        self._name = job.name
        self._remove_earlier()
        try:
            self._client.train(runtime=self._runtime(), trainer=trainer_of(job, backend), options=[Name(job.name)])
        except (RuntimeError, TimeoutError) as error:
            raise Retry(
                f"the TrainJob could not be made: {error}: {error.__cause__}", "check the trainer and its rights"
            ) from error
        except ValueError as error:
            raise DoNotRetry(f"the TrainJob could not be made: {error}", f"check {RUNTIME_VARIABLE}") from error
        _log.info("TrainJob %s of %s nodes", self._name, job.config["nodes"])
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def running(self) -> bool:
        """Whether its pods are still at work.

        Raises:
            Retry: the cluster has not answered for `UNREACHABLE_SECONDS`.
        """
        if self._told:  # what was deleted is known no more; the processes speak last
            told = Storage().exists(join(self._outcomes, "0.json"))
            return not told and time.monotonic() - self._told < STOP_SECONDS
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return True
        self._looked = time.monotonic()
        try:
            found = self._client.get_job(self._name)
        except (RuntimeError, TimeoutError) as error:
            if time.monotonic() - self._seen > UNREACHABLE_SECONDS:
                raise Retry(f"TrainJob {self._name} cannot be looked at: {error}: {error.__cause__}", "run again") from error
            return True
        self._seen = time.monotonic()
        self._status = ", ".join([found.status, *(f"{step.name} {step.status}" for step in found.steps)])
        return found.status not in ("Complete", "Failed")

    def stop(self) -> None:
        self._told = time.monotonic()
        self._delete()

    def said(self) -> str:
        return f"TrainJob {self._name}: {self._status}"

    def close(self) -> None:
        self._follower.join(5 * LOOK_SECONDS)
        if not self._told:
            self._delete()

    def _delete(self) -> None:
        """Deletes the job with its pods; their log has been passed on."""
        try:
            self._client.delete_job(self._name)
        except (RuntimeError, TimeoutError, ValueError) as error:
            _log.warning("TrainJob %s is left behind: %s", self._name, error)

    def _remove_earlier(self) -> None:
        """Removes the job of an attempt that was killed, or two would write the same checkpoints; its pods get time to end."""
        if self._backend != "kubernetes":
            return
        try:
            self._client.get_job(self._name)
        except RuntimeError:  # it is not there; where the cluster cannot be asked, nothing can be made either
            return
        _log.warning("TrainJob %s of an earlier attempt is removed", self._name)
        self._delete()
        time.sleep(STOP_SECONDS)

    def _runtime(self) -> Runtime | str:
        """The runtime's name; of local processes a runtime that starts Python, not the torchrun of an empty environment."""
        if self._backend == "kubernetes":
            return os.environ.get(RUNTIME_VARIABLE, DEFAULT_RUNTIME)
        runtime = self._client.get_runtime("torch-distributed")
        if self._backend == "local":
            runtime.trainer.framework = "python"
        return runtime

    def _follow(self) -> None:
        """Passes the log of the first node on, from the start of its pod to the end."""
        while True:
            ended = self._status.startswith(("Complete", "Failed")) or bool(self._told)
            try:
                # The local backend would follow on its own, onto the standard output, which is the stage's.
                for number, line in enumerate(self._client.get_job_logs(self._name, follow=self._backend != "local")):
                    if number >= self._lines:
                        self._lines = number + 1
                        print(line.rstrip("\n"), file=sys.stderr, flush=True)
            except (RuntimeError, TimeoutError, ValueError) as error:
                _log.debug("log of %s: %s", self._name, error)
            if ended:
                return
            time.sleep(LOOK_SECONDS)


def trainer_of(job: Job, backend: str) -> CustomTrainer:
    """What each node runs."""
    from kubeflow.trainer import CustomTrainer

    variables = {JOB_VARIABLE: job.model_dump_json()}
    if backend != "kubernetes":  # there the runtime brings them, from config maps and secrets
        variables |= {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    if backend == "local":  # its empty environment sees the packages of this one, and these modules wherever they lie
        paths = [str(Path(__file__).parents[2]), *sys.path]
        variables["PYTHONPATH"] = os.pathsep.join(each for each in paths if each and Path(each).is_dir())
    resources = None
    if backend == "kubernetes":
        resources = {"gpu": str(job.config["processes"]), **_node_resources()}
    return CustomTrainer(
        func=start_processes,
        image=TRAIN,
        num_nodes=job.config["nodes"],
        resources_per_node=resources,
        env=variables,
    )


def _node_resources() -> dict[str, str]:
    """CPU and memory of a node, from the environment: naming a GPU replaces all resources of the runtime.

    Raises:
        DoNotRetry: the variable is not a JSON object.
    """
    text = os.environ.get(RESOURCES_VARIABLE) or "{}"
    try:
        return {str(name): str(amount) for name, amount in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise DoNotRetry(f"{RESOURCES_VARIABLE} = {text!r} is not a JSON object", 'such as {"cpu": 8, "memory": "64Gi"}') from error


def client_of(backend: str) -> TrainerClient:
    """The SDK's client.

    Raises:
        DoNotRetry: there is no such backend, or no SDK.
    """
    try:
        from kubeflow import trainer
    except ImportError as error:
        raise DoNotRetry(
            "several nodes need the package kubeflow, which is not installed", "pip install rankloop[nodes]"
        ) from error
    configs = {
        "kubernetes": trainer.KubernetesBackendConfig,
        "container": trainer.ContainerBackendConfig,
        "local": trainer.LocalProcessBackendConfig,
    }
    if backend not in configs:
        raise DoNotRetry(f"RANKLOOP_TRAINER = {backend!r} is no backend", f"use one of {', '.join(configs)}")
    return trainer.TrainerClient(backend_config=configs[backend]())
