"""Writes the golden files: `make golden`. A change of a graph, or of its pods, is reviewed as a diff of them.

rlhf.yaml is the shape of the graph as a machine alone runs it; cluster/GRAPH.PROFILE.yaml what each pod gets in a cluster.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from components.images import DATA, TRAIN
from pipelines.local_run import GRAPHS
from pipelines.package import build
from pipelines.package import compiled as compiled_for_cluster
from pipelines.policy import Graph
from pipelines.resources import PROFILES, load
from pipelines.rlhf import rlhf_graph

GOLDEN = Path(__file__).with_name("rlhf.yaml")
CLUSTER = {(graph, profile): GOLDEN.parent / "cluster" / f"{graph}.{profile}.yaml" for graph in GRAPHS for profile in PROFILES}


def compiled() -> dict[str, Any]:
    """The graph as KFP's intermediate representation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rlhf.yaml"
        compiler.Compiler().compile(rlhf_graph(), str(path))
        document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return document


def shape(document: dict[str, Any]) -> dict[str, Any]:
    """What matters of it: who depends on whom, under which condition, with which typed inputs and outputs, cached or not."""
    components = document["components"]

    def of(dag: dict[str, Any]) -> dict[str, Any]:
        tasks = {}
        for name, task in sorted(dag["tasks"].items()):
            component = components[task["componentRef"]["name"]]
            tasks[name] = {
                "after": sorted(task.get("dependentTasks", [])),
                "when": task.get("triggerPolicy", {}).get("condition") or task.get("triggerPolicy", {}).get("strategy", ""),
                "cached": task.get("cachingOptions", {}).get("enableCache", False),
                "inputs": {key: source(value) for key, value in sorted(parameters(task).items())},
            }
            if "dag" in component:
                tasks[name]["tasks"] = of(component["dag"])
        return tasks

    root = document["root"]
    return {
        "parameters": {key: value["parameterType"] for key, value in sorted(root["inputDefinitions"]["parameters"].items())},
        "tasks": of(root["dag"]),
        "outputs": {
            name: {
                kind: {
                    key: value.get("parameterType") or value["artifactType"]["schemaTitle"]
                    for key, value in sorted(each["outputDefinitions"].get(kind, {}).items())
                }
                for kind in ("parameters", "artifacts")
            }
            for name, each in sorted(components.items())
            if "executorLabel" in each and "outputDefinitions" in each
        },
    }


def parameters(task: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = task.get("inputs", {}).get("parameters", {})
    return found


def source(value: dict[str, Any]) -> str:
    """Where an input comes from, in a word."""
    if "componentInputParameter" in value:
        return f"parent: {value['componentInputParameter']}"
    if "taskOutputParameter" in value:
        return "{producerTask}.{outputParameterKey}".format(**value["taskOutputParameter"])
    if "taskFinalStatus" in value:
        return "final status"
    return f"constant: {value['runtimeValue'].get('constant')}"


def text() -> str:
    return yaml.safe_dump(shape(compiled()), sort_keys=False, width=120)


def in_cluster(graph: str, profile: str) -> Graph:
    """A graph as KFP compiles it for a cluster."""
    with tempfile.TemporaryDirectory() as folder:
        return compiled_for_cluster(build(graph, load(profile)), Path(folder) / "graph.yaml")


def pods(graph: Graph) -> dict[str, dict[str, str]]:
    """What each task's pod gets but for its command, as {path: text}; `every` is what all have, and tasks alike share an entry."""
    containers, found = graph.executors(), {}
    for name, label, task, _ in sorted(graph.tasks(), key=lambda each: (each[1], each[0])):
        given, pod = containers[label], dict(graph.pod(label))
        sources = [("config_map", each["configMapName"], each) for each in pod.pop("configMapAsEnv", [])]
        sources += [("secret", each["secretName"], each) for each in pod.pop("secretAsEnv", [])]
        resources = flattened(given["resources"])
        flat = {key.rpartition(".")[2]: text for key, text in resources.items() if "resource" in key}  # not their old twins
        flat |= flattened({"retry": task["retryPolicy"], "pod": pod})
        flat["image"] = {DATA: "data", TRAIN: "train"}[given["image"]]
        flat |= {f"env.{each['name']}": each["value"] for each in given["env"]}
        for kind, source, each in sources:
            named = f"{kind}.{source}" + (" (optional)" if each.get("optional") else "")
            flat[named] = ", ".join(key["envVar"] for key in each["keyToEnv"])
        found[name] = flat
    every = dict(set.intersection(*(set(flat.items()) for flat in found.values())))
    alike: dict[str, list[str]] = {}
    for name, flat in found.items():
        alike.setdefault(str(sorted(flat.items())), []).append(name)
    return {"every": every, **{", ".join(names): dict(found[names[0]].items() - every.items()) for names in alike.values()}}


def flattened(value: Any, where: str = "") -> dict[str, str]:
    """A JSON value as {path: text}."""
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in flattened(each, f"{where}.{key}" if where else key).items()}
    if isinstance(value, list):
        return {k: v for place, each in enumerate(value) for k, v in flattened(each, f"{where}[{place}]").items()}
    return {where: str(value)}


def cluster_text(graph: str, profile: str) -> str:
    return yaml.safe_dump(
        {name: dict(sorted(pod.items())) for name, pod in pods(in_cluster(graph, profile)).items()}, sort_keys=False, width=1000
    )


if __name__ == "__main__":
    GOLDEN.write_text(text(), encoding="utf-8")
    print(f"wrote {GOLDEN}")
    for (graph, profile), path in CLUSTER.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(cluster_text(graph, profile), encoding="utf-8")
        print(f"wrote {path}")
