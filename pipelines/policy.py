"""Rules that a compiled graph must keep before it may run in a cluster. `rankloop compile` refuses to write one that breaks a rule.

A rule takes the compiled graph and the table of resources, and yields a line for each breach.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from components.services.exits import DoNotRetry
from pipelines.placement import environment_of
from pipelines.resources import Resources

SOURCE_BYTES = 2048  # KFP stores a component's source four times a task
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
MOUNTS = {"/tmp", "/scratch", "/dev/shm"}
# Whatever a table says: these go to no other stage.
ONLY = {
    "rankloop-raters": {"ingest_rankings", "ingest_shard", "merge_shards"},
    "rankloop-judge": {"evaluate"},
}
# Names that hold secrets, and values that are some: keys of AWS, Hugging Face and OpenAI, private keys, passwords in addresses.
SECRET_NAME = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|SALT|CREDENTIAL)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^\s/:@]+:[^\s/@]+@"
)


class Graph(NamedTuple):
    """A compiled graph: KFP's pipeline specification, and what it says about Kubernetes."""

    pipeline: Mapping[str, Any]
    platform: Mapping[str, Any]

    def executors(self) -> dict[str, Mapping[str, Any]]:
        """Container of each executor, by its label."""
        return {label: each["container"] for label, each in self.pipeline["deploymentSpec"]["executors"].items()}

    def pod(self, label: str) -> Mapping[str, Any]:
        """What Kubernetes is told about the executor's pod."""
        platforms = self.platform.get("platforms", {}).get("kubernetes", {})
        found: Mapping[str, Any] = platforms.get("deploymentSpec", {}).get("executors", {}).get(label, {})
        return found

    def stage(self, label: str) -> str:
        """The stage that the executor runs: the name of its function."""
        arguments = self.executors()[label]["args"]
        return str(arguments[arguments.index("--function_to_execute") + 1])

    def dags(self) -> Iterator[tuple[str, set[str], Mapping[str, Any]]]:
        """(name, inputs, tasks) of the root and of every nested graph."""
        nested = {name: each for name, each in self.pipeline["components"].items() if "dag" in each}
        for name, each in {"root": self.pipeline["root"], **nested}.items():
            yield name, set(each.get("inputDefinitions", {}).get("parameters", {})), each["dag"]["tasks"]

    def tasks(self) -> Iterator[tuple[str, str, Mapping[str, Any], set[str]]]:
        """(name, executor, task, inputs of the graph around it) of every task that is a container."""
        for _, inputs, tasks in self.dags():
            for name, task in tasks.items():
                component = self.pipeline["components"][task["componentRef"]["name"]]
                if "executorLabel" in component:
                    yield name, component["executorLabel"], task, inputs


Rule = Callable[[Graph, Resources], Iterator[str]]


def limits(graph: Graph, resources: Resources) -> Iterator[str]:
    """Every pod says how much CPU and memory it needs, and takes no more."""
    for label, container in graph.executors().items():
        found = container.get("resources", {})
        for key in ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"):
            if not found.get(key):
                yield f"{label}: no {key}"


def time_outs(graph: Graph, resources: Resources) -> Iterator[str]:
    """No pod runs for ever."""
    for label in graph.executors():
        if int(graph.pod(label).get("activeDeadlineSeconds", 0)) <= 0:
            yield f"{label}: no time-out"


def retries(graph: Graph, resources: Resources) -> Iterator[str]:
    """Every task has a retry policy that lets its last attempt have its whole time."""
    for name, label, task, _ in graph.tasks():
        policy = task.get("retryPolicy")
        if not policy:
            yield f"{name}: no retry policy"
            continue
        longest = float(policy.get("backoffMaxDuration", "0s").rstrip("s"))
        needed = (int(policy.get("maxRetryCount", 0)) + 1) * int(graph.pod(label).get("activeDeadlineSeconds", 0))
        if longest < needed:
            yield f"{name}: its retries end after {longest:.0f} s, and its attempts may take {needed} s"


def images(graph: Graph, resources: Resources) -> Iterator[str]:
    """A tag can be moved to another image; a digest cannot."""
    for label, container in graph.executors().items():
        if not DIGEST.search(container["image"]):
            yield f"{label}: image {container['image']} is not named by its digest"


def no_inline_secrets(graph: Graph, resources: Resources) -> Iterator[str]:
    """Secrets are named, never written down; no variable but our own few has its value in the graph."""
    for label, container in graph.executors().items():
        stage = graph.stage(label)
        own = environment_of(stage, resources.row(stage), container["image"])
        for each in container.get("env", []):
            if own.get(each["name"]) != each.get("value", ""):
                yield f"{label}: the variable {each['name']} has its value in the graph"
        for source in graph.pod(label).get("configMapAsEnv", []):
            for key in source["keyToEnv"]:
                if SECRET_NAME.search(key["envVar"]):
                    yield f"{label}: {key['envVar']} comes from the config map {source['configMapName']}, not from a secret"
    for where, text in _texts({"pipeline": graph.pipeline, "platform": graph.platform}):
        if SECRET_VALUE.search(text):
            yield f"{where}: holds what looks like a secret"


def secrets_reach(graph: Graph, resources: Resources) -> Iterator[str]:
    """The judge's key and the raters' salt go to the stages that use them and to no others; the rest goes where the table says."""
    for label in graph.executors():
        stage = graph.stage(label)
        for kind, declared, where in (
            ("secretAsEnv", resources.secrets, "secretName"),
            ("configMapAsEnv", resources.config_maps, "configMapName"),
        ):
            found = {each[where] for each in graph.pod(label).get(kind, [])}
            for name in sorted(found):
                if stage not in ONLY.get(name, {stage}) or name not in declared or not declared[name].reaches(stage):
                    yield f"{label}: {name} is not for the stage {stage}"
            for name in sorted(set(declared) - found):
                if declared[name].reaches(stage):
                    yield f"{label}: the stage {stage} lacks {name}"


def gpus(graph: Graph, resources: Resources) -> Iterator[str]:
    """The GPUs that the profile promises: every pod some under gpu; under lean those of the stages that use them, and no other."""
    for label, container in graph.executors().items():
        accelerator = container.get("resources", {}).get("accelerator", {})
        found = int(accelerator.get("resourceCount", 0)) if accelerator.get("resourceType") else 0
        promised = resources.gpus(graph.stage(label))
        if found != promised:
            yield f"{label}: {found} GPUs, and the profile {resources.profile} promises {promised}"
        if promised and not graph.pod(label).get("nodeSelector", {}).get("nodeSelectorJson"):
            yield f"{label}: its nodes cannot be chosen by parameter"


def not_root(graph: Graph, resources: Resources) -> Iterator[str]:
    """Every pod runs as a user that is not root."""
    for label in graph.executors():
        context = graph.pod(label).get("securityContext", {})
        if context.get("runAsNonRoot") is not True or min(int(context.get(key, 0)) for key in ("runAsUser", "runAsGroup")) < 1:
            yield f"{label}: may run as root: {dict(context)}"


def mounts(graph: Graph, resources: Resources) -> Iterator[str]:
    """What a stage writes to is mounted, with a size: the root file system may be read-only."""
    for label in graph.executors():
        pod = graph.pod(label)
        found = {each["mountPath"] for each in pod.get("emptyDirMounts", []) if each.get("sizeLimit")}
        found |= {each["mountPath"] for each in pod.get("genericEphemeralVolume", []) if each.get("size")}
        for path in sorted(MOUNTS - found):
            yield f"{label}: {path} is not mounted, or has no size"


def small_sources(graph: Graph, resources: Resources) -> Iterator[str]:
    """A wrapper only calls its stage; nothing is installed when it runs."""
    for label, container in graph.executors().items():
        size = max(len(part.encode()) for part in container["command"])
        if size > SOURCE_BYTES:
            yield f"{label}: its source has {size} bytes, and {SOURCE_BYTES} are allowed"
        if "pip install" in " ".join(container["command"]):
            yield f"{label}: installs packages when it runs"


def wiring(graph: Graph, resources: Resources) -> Iterator[str]:
    """A task only reads parameters that the graph around it has: KFP compiles others, and the pod is then never made."""
    for name, inputs, tasks in graph.dags():
        for task_name, task in tasks.items():
            for each in task.get("inputs", {}).get("parameters", {}).values():
                wanted = each.get("componentInputParameter")
                if wanted is not None and wanted not in inputs:
                    yield f"{name}/{task_name}: reads {wanted}, which {name} does not have"
    for task_name, label, task, inputs in graph.tasks():
        for _, wanted in _texts(graph.pod(label), "componentInputParameter"):
            if wanted not in inputs:
                yield f"{task_name}: its pod needs {wanted}, which the graph around it does not have"
        given = set(task.get("inputs", {}).get("parameters", {}))
        for _, text in _texts(graph.executors()[label].get("resources", {})):
            for wanted in re.findall(r"inputs\.parameters\['(.*?)'\]", text):
                if wanted not in given:
                    yield f"{task_name}: its resources need {wanted}, which the task does not have"


RULES: tuple[Rule, ...] = (
    limits,
    time_outs,
    retries,
    images,
    no_inline_secrets,
    secrets_reach,
    gpus,
    not_root,
    mounts,
    small_sources,
    wiring,
)


def check(graph: Graph, resources: Resources, tags_allowed: bool = False) -> None:
    """Refuses a graph that breaks a rule.

    Raises:
        DoNotRetry: every breach, by its rule.
    """
    found = [
        f"{rule.__name__}: {breach}" for rule in RULES if not (tags_allowed and rule is images) for breach in rule(graph, resources)
    ]
    if found:
        raise DoNotRetry("the compiled graph breaks its policy:\n  " + "\n  ".join(found), "see pipelines/policy.py")


def _texts(value: Any, key: str = "", where: str = "") -> Iterator[tuple[str, str]]:
    """(where, text) of every text within a JSON value, or only of those under a key."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(each, key, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _texts(each, key, f"{where}[{place}]")
    elif isinstance(value, str) and (not key or where.endswith(key)):
        yield where, value
