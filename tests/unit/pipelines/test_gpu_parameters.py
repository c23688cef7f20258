"""Other GPUs for a run without compiling anew: what a run's parameters become in each pod, through conditions and nested graphs.

The parameters are resolved as KFP's driver does it: a task's inputs from those of the graph around it, a pod's node selector and
tolerations from that graph's, and the resource's name from the task's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from pipelines.policy import Graph
from pipelines.resources import load
from tests.cluster_graphs import compiled

RUN = {
    "small_gpu": "nvidia.com/mig-1g.10gb",
    "small_gpu_nodes": {"nvidia.com/gpu.product": "NVIDIA-L4"},
    "large_gpu": "nvidia.com/gpu",
    "large_gpu_nodes": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "zone": "a"},
    "gpu_tolerations": [{"key": "spot", "operator": "Exists"}],
}


class Nodes(NamedTuple):
    resource: str
    selector: dict[str, str]
    tolerations: list[dict[str, str]]


def pods(graph: Graph, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Nodes]]:
    """(stage, where its pod goes) of every task with a GPU, for a run with these arguments."""
    defaults = graph.pipeline["root"]["inputDefinitions"]["parameters"]
    given = {name: arguments.get(name, each.get("defaultValue")) for name, each in defaults.items()}
    yield from _below(graph, graph.pipeline["root"]["dag"]["tasks"], given)


def _below(graph: Graph, tasks: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, Nodes]]:
    for task in tasks.values():
        component = graph.pipeline["components"][task["componentRef"]["name"]]
        wanted = task.get("inputs", {}).get("parameters", {})
        inputs = {
            name: given[each["componentInputParameter"]] for name, each in wanted.items() if "componentInputParameter" in each
        }
        if "dag" in component:
            # What comes from tasks before it is not known here, and no pod's place depends on it.
            unknown = dict.fromkeys(component["inputDefinitions"]["parameters"])
            yield from _below(graph, component["dag"]["tasks"], unknown | inputs)
            continue
        label = component["executorLabel"]
        accelerator = graph.executors()[label]["resources"].get("accelerator")
        if accelerator:
            (name,) = re.findall(r"^\{\{\$\.inputs\.parameters\['(.*)'\]\}\}$", accelerator["resourceType"])
            pod = graph.pod(label)
            selector = given[pod["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]]
            (toleration,) = pod["tolerations"]
            tolerations = given[toleration["tolerationJson"]["componentInputParameter"]]
            yield graph.stage(label), Nodes(inputs[name], selector, tolerations)


@pytest.mark.parametrize("graph", ["rlhf", "drift_watch", "sharded_ingest"])
@pytest.mark.parametrize("profile", ["gpu", "lean"])
def test_a_runs_choice_reaches_each_pod_of_its_kind(graph: str, profile: str) -> None:
    table, found = load(profile), list(pods(compiled(graph, profile), RUN))
    kinds = {"small": Nodes(RUN["small_gpu"], RUN["small_gpu_nodes"], RUN["gpu_tolerations"])}
    kinds["large"] = Nodes(RUN["large_gpu"], RUN["large_gpu_nodes"], RUN["gpu_tolerations"])
    for stage, nodes in found:
        assert nodes == kinds[table.row(stage).pool], stage
    with_gpus = {compiled(graph, profile).stage(label) for label in compiled(graph, profile).executors()}
    assert {stage for stage, _ in found} == {stage for stage in with_gpus if table.gpus(stage)}


def test_a_run_that_chooses_nothing_gets_what_the_table_says() -> None:
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    for stage, nodes in pods(compiled("drift_watch", "gpu"), {}):
        assert nodes == Nodes("nvidia.com/gpu", {}, tolerations), stage
