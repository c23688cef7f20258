"""Writes the shape of the compiled graph to rlhf.yaml: `make golden`. A change of the graph is reviewed as a diff of that file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines.rlhf import rlhf

GOLDEN = Path(__file__).with_name("rlhf.yaml")


def compiled() -> dict[str, Any]:
    """The graph as KFP's intermediate representation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rlhf.yaml"
        compiler.Compiler().compile(rlhf, str(path))
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


if __name__ == "__main__":
    GOLDEN.write_text(text(), encoding="utf-8")
    print(f"wrote {GOLDEN}")
