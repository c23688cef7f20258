"""The table of what each stage's pod gets in a cluster, read from `resources.yaml` or a file that changes it, and checked.

resources = load("gpu")            # or "lean", or a path
resources.row("train_sft").memory  # "64Gi"
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from components.services.exits import DoNotRetry
from components.services.launch import Settings, parse_settings
from pipelines.yaml_file import read_yaml

TABLE = Path(__file__).with_name("resources.yaml")
PROFILES = ("gpu", "lean")
KFP_WAIT_SECONDS = 5  # before each retry, whatever the failure: the rest of the wait is the stage's (`services.attempts`)
Pool = Literal["small", "large"]

_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
Bytes = Annotated[str, Field(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi|Ti)?$")]
Cpu = Annotated[str, Field(pattern=r"^([1-9][0-9]*m?|[0-9]+\.[0-9]+)$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]


def bytes_of(quantity: str) -> int:
    """A quantity of Kubernetes in bytes: `bytes_of("2Gi")` is 2147483648."""
    number = quantity.rstrip("KMGTi")
    return int(number) * _UNITS[quantity.removeprefix(number)]


class Toleration(Settings):
    key: str = ""
    """The taint's key; empty, with operator Exists: every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class GpuPool(Settings):
    resource: ResourceName
    """Name by which the nodes offer the GPU, such as nvidia.com/gpu or nvidia.com/mig-1g.10gb."""
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels of the nodes, such as nvidia.com/gpu.product: NVIDIA-L4; empty: any node that offers the resource."""


class Row(Settings):
    pool: Pool
    """Which of the two kinds of GPUs."""
    gpus: int = Field(ge=1, le=16)
    """How many GPUs, in a pod that has any."""
    uses_gpu: bool
    """Whether the stage computes on a GPU; in the profile lean only such a stage's pod has one."""
    cpu: Cpu
    """Cores, requested and at most."""
    memory: Bytes
    """Memory, requested and at most; what lies in shared memory counts."""
    shared_memory: Bytes
    """Size of /dev/shm, in memory: processes of one stage exchange batches there."""
    scratch: Bytes
    """Size of /scratch, where models and snapshots lie while a stage works on them."""
    storage_class: str
    """Empty: /scratch is on the node's own disk. A class, or `default`: a volume of its own; the pod then needs an fsGroup."""
    timeout_seconds: int = Field(ge=60)
    """Longest time of one attempt, in seconds."""
    retries: int = Field(ge=0, le=10)
    """Attempts after the first one."""
    retry_wait_seconds: int = Field(ge=0)
    """Wait before the first retry, in seconds; not after what no retry can help, and not after a pre-emption."""
    retry_wait_factor: float = Field(ge=1, le=4, allow_inf_nan=False)
    """Each further wait is this many times as long."""
    priority_class: Name
    """PriorityClass of the pod. KFP cannot set it; it is the pod's label rankloop.dev/priority-class, for a policy to read."""
    node_selector: dict[LabelKey, LabelValue]
    """Labels of the nodes of a pod without GPU."""
    tolerations: list[Toleration]
    """Tolerations of a pod without GPU."""
    labels: dict[LabelKey, LabelValue]
    """Further labels of the pod."""

    @model_validator(mode="after")
    def _fits(self) -> Row:
        if bytes_of(self.shared_memory) >= bytes_of(self.memory):
            raise ValueError(f"shared_memory {self.shared_memory} is part of memory {self.memory} and must be smaller")
        return self

    @property
    def retry_waits(self) -> list[int]:
        """The wait before each retry, in seconds: the last part of the attempt before it."""
        return [round(self.retry_wait_seconds * self.retry_wait_factor**i) for i in range(self.retries)]

    @property
    def longest_seconds(self) -> int:
        """All attempts and KFP's waits between them. Argo counts a stage's own work into the longest time of its retries, too."""
        return (self.retries + 1) * self.timeout_seconds + self.retries * KFP_WAIT_SECONDS


class Source(Settings):
    keys: list[Variable] = Field(default_factory=list)
    """Keys that must be there; each becomes the variable of the same name."""
    optional_keys: list[Variable] = Field(default_factory=list)
    """Keys that may be missing, or the whole object."""
    stages: list[str]
    """The stages whose pods get them; none: all."""

    def reaches(self, stage: str) -> bool:
        return not self.stages or stage in self.stages


class Resources(Settings):
    profile: Literal["gpu", "lean"]
    """gpu: every pod has GPUs. lean: only those of the stages that use them."""
    pools: dict[Pool, GpuPool]
    """The two kinds of GPUs."""
    tolerations: list[Toleration]
    """Tolerations of pods with GPUs."""
    user_id: int = Field(ge=1)
    """User that the pods run as; not root."""
    group_id: int = Field(ge=1)
    """Group that they run as."""
    stages: dict[str, Row]
    """One row a stage."""
    config_maps: dict[Name, Source]
    """Config maps whose keys become variables."""
    secrets: dict[Name, Source]
    """Secrets whose keys become variables."""

    @model_validator(mode="after")
    def _complete(self) -> Resources:
        missing = {"small", "large"} - set(self.pools)
        if missing:
            raise ValueError(f"pools has no {', '.join(sorted(missing))}")
        for name, source in {**self.config_maps, **self.secrets}.items():
            unknown = set(source.stages) - set(self.stages)
            if unknown:
                raise ValueError(f"{name} names stages that have no row: {', '.join(sorted(unknown))}")
        return self

    def row(self, stage: str) -> Row:
        """The row of a stage.

        Raises:
            DoNotRetry: it has none.
        """
        if stage not in self.stages:
            raise DoNotRetry(f"the table of resources has no row for the stage {stage!r}", "add it to pipelines/resources.yaml")
        return self.stages[stage]

    def gpus(self, stage: str) -> int:
        """How many GPUs its pod has."""
        row = self.row(stage)
        return row.gpus if self.profile == "gpu" or row.uses_gpu else 0


def load(name: str) -> Resources:
    """The table under a profile, or with the changes of a file.

    Args:
        name: "gpu", "lean", or the path of a YAML file that says `extends: gpu` or `extends: lean` and what it changes.

    Raises:
        DoNotRetry: no such profile or file, an unknown key or stage, or a wrong value; the message names each.
    """
    table = _read(TABLE)
    if name in PROFILES:
        return _parse({**table, "profile": name}, name)
    path = Path(name)
    if not name.endswith((".yaml", ".yml")) or not os.path.isfile(path):
        near = difflib.get_close_matches(name, PROFILES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DoNotRetry(f"unknown resources {name!r}{hint}", f"give {' or '.join(PROFILES)}, or the path of a YAML file")
    changes = _read(path)
    extends = changes.pop("extends", None)
    if extends not in PROFILES:
        raise DoNotRetry(f"{path}: extends = {extends!r} is no profile", f"write extends: {' or extends: '.join(PROFILES)}")
    for stage in changes.get("stages") or {}:
        if stage not in table["stages"]:
            known = ", ".join(table["stages"])
            raise DoNotRetry(f"{path}: stages.{stage}: there is no such stage; known: {known}")
    return _parse(_merged({**table, "profile": extends}, changes), str(path))


def _parse(table: dict[str, Any], where: str) -> Resources:
    defaults = table.pop("defaults")
    rows = {stage: _merged(defaults, row) for stage, row in table["stages"].items()}
    try:
        return parse_settings(Resources, {**table, "stages": rows}, "resources")
    except DoNotRetry as error:
        raise DoNotRetry(f"{where}: {error.message}", "pipelines/resources.py says what each key means") from error


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, key by key; a list replaces a list, and so does the node_selector and the labels of a row."""
    found = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(found.get(key), dict) and key not in ("node_selector", "labels")
        found[key] = _merged(found[key], value) if nested else value
    return found


def _read(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    sections = ("stages", "pools", "defaults", "config_maps", "secrets")
    if not isinstance(values, dict) or not all(isinstance(values.get(key, {}), dict) for key in sections):
        raise DoNotRetry(f"{path} is not a table of resources", "see pipelines/resources.yaml")
    if not all(isinstance(row, dict) for row in values.get("stages", {}).values()):
        raise DoNotRetry(f"{path}: a row of stages is not a mapping", "see pipelines/resources.yaml")
    return values
