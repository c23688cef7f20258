"""Puts a graph's tasks on a cluster: each gets what its stage's row of the table of resources says.

A graph is built by a function that takes a table, or None for a machine without Kubernetes; there every task stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kfp.dsl import PipelineTask

from components.images import TRAIN
from components.services.attempts import NODE_VARIABLE, RUN_VARIABLE, WAITS_VARIABLE
from components.services.stop import PID_VARIABLE
from components.services.train_job import RESOURCES_VARIABLE
from pipelines.resources import KFP_WAIT_SECONDS, Resources, Row, Source

TMP_SIZE = "1Gi"
PID_FILE = "/tmp/rankloop-stage.pid"
STAGE_LABEL, PRIORITY_LABEL = "rankloop.dev/stage", "rankloop.dev/priority-class"
TRAINED_ON_NODES = ("train_sft", "train_reward_model", "ppo_finetune", "dpo_finetune")  # have the setting `nodes`
# The root file system is read-only where the cluster says so (KFP cannot): all that a stage writes goes to the three mounts.
ENVIRONMENT = {"TMPDIR": "/scratch", "HOME": "/scratch", PID_VARIABLE: PID_FILE}


class Gpus(NamedTuple):
    """A run's choice of GPUs: pipeline parameters, or their defaults.

    Fields:
        small_gpu, large_gpu: the resource's name, such as "nvidia.com/gpu".
        small_gpu_nodes, large_gpu_nodes: node selectors, {label: value}.
        gpu_tolerations: list of Kubernetes' tolerations.
    """

    small_gpu: Any
    small_gpu_nodes: Any
    large_gpu: Any
    large_gpu_nodes: Any
    gpu_tolerations: Any


def default_gpus(resources: Resources | None) -> Gpus:
    """Defaults of the pipeline parameters, from the table."""
    if resources is None:
        return Gpus("nvidia.com/gpu", {}, "nvidia.com/gpu", {}, [])
    small, large = resources.pools["small"], resources.pools["large"]
    tolerations = [{key: value for key, value in each.model_dump().items() if value} for each in resources.tolerations]
    return Gpus(small.resource, small.node_selector, large.resource, large.node_selector, tolerations)


def placed_by(resources: Resources | None, gpus: Gpus) -> Callable[[PipelineTask], PipelineTask]:
    """What places a task; without a table it leaves the task alone."""
    if resources is None:
        return lambda task: task
    return lambda task: _place(task, resources, gpus)


def _place(task: PipelineTask, resources: Resources, gpus: Gpus) -> PipelineTask:
    from kfp import kubernetes

    stage = str(task.component_spec.name).replace("-", "_")
    row = resources.row(stage)
    task.set_cpu_request(row.cpu).set_cpu_limit(row.cpu)
    task.set_memory_request(row.memory).set_memory_limit(row.memory)
    # Argo ends the retries, and the attempt under way, when this longest time since the first attempt's start is over. KFP's
    # default is an hour: a stage that was pre-empted in its second hour would not be tried again.
    task.set_retry(row.retries, f"{KFP_WAIT_SECONDS}s", 1.0, f"{row.longest_seconds}s")
    kubernetes.set_timeout(task, row.timeout_seconds)
    _place_on_nodes(task, stage, row, resources, gpus)
    _mount(task, row)
    for name, value in environment_of(stage, row).items():
        task.set_env_variable(name, value)
    kubernetes.use_field_path_as_env(task, RUN_VARIABLE, "metadata.labels['pipeline/runid']")
    kubernetes.use_field_path_as_env(task, NODE_VARIABLE, "metadata.annotations['workflows.argoproj.io/node-name']")
    _take_variables(task, stage, resources.config_maps, kubernetes.use_config_map_as_env)
    _take_variables(task, stage, resources.secrets, kubernetes.use_secret_as_env)
    kubernetes.set_security_context(task, resources.user_id, resources.group_id, True)
    for key, value in {**row.labels, STAGE_LABEL: stage, PRIORITY_LABEL: row.priority_class}.items():
        kubernetes.add_pod_label(task, key, value)
    return task


def environment_of(stage: str, row: Row, image: str = TRAIN) -> dict[str, str]:
    """The variables that have their values in the graph."""
    found = dict(ENVIRONMENT)
    if row.retries:
        found[WAITS_VARIABLE] = " ".join(map(str, row.retry_waits))
    if stage not in TRAINED_ON_NODES:
        return found
    node = json.dumps({"cpu": row.cpu, "memory": row.memory})  # the pods of its TrainJob are like its own
    return {**found, "RANKLOOP_TRAIN_IMAGE": image, RESOURCES_VARIABLE: node}


def _place_on_nodes(task: PipelineTask, stage: str, row: Row, resources: Resources, gpus: Gpus) -> None:
    from kfp import kubernetes

    count = resources.gpus(stage)
    if count:
        kind, nodes = (gpus.small_gpu, gpus.small_gpu_nodes) if row.pool == "small" else (gpus.large_gpu, gpus.large_gpu_nodes)
        # KFP 2.17 does not hand a parameter that only names the accelerator to the conditions around the task: the pod would never
        # be made ("parent DAG does not have input parameter"). Registered as an input it is.
        task.register_pipeline_channels([kind])
        task.set_accelerator_type(kind).set_accelerator_limit(count)
        kubernetes.add_node_selector_json(task, nodes)
        kubernetes.add_toleration_json(task, gpus.gpu_tolerations)
        return
    for key, value in row.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for each in row.tolerations:
        kubernetes.add_toleration(task, each.key or None, each.operator, each.value or None, each.effect or None)


def _mount(task: PipelineTask, row: Row) -> None:
    """/tmp and /scratch to write to, and /dev/shm, which is 64 MB without it."""
    from kfp import kubernetes

    kubernetes.empty_dir_mount(task, "rankloop-tmp", "/tmp", size_limit=TMP_SIZE)
    kubernetes.empty_dir_mount(task, "rankloop-shm", "/dev/shm", "Memory", row.shared_memory)
    if row.storage_class:
        storage_class = None if row.storage_class == "default" else row.storage_class
        kubernetes.add_ephemeral_volume(task, "rankloop-scratch", "/scratch", ["ReadWriteOnce"], row.scratch, storage_class)
    else:
        kubernetes.empty_dir_mount(task, "rankloop-scratch", "/scratch", size_limit=row.scratch)


def _take_variables(task: PipelineTask, stage: str, sources: Mapping[str, Source], take: Callable[..., Any]) -> None:
    for name, source in sources.items():
        if not source.reaches(stage):
            continue
        if source.keys:
            take(task, name, {key: key for key in source.keys})
        if source.optional_keys:
            take(task, name, {key: key for key in source.optional_keys}, optional=True)
