"""The compiled graph of the watch: what runs on which decision, and that a retrain is the RLHF graph with the same parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from pipelines import STAGES
from pipelines.drift_watch import drift_watch_graph
from tests.golden.write import compiled, shape


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watch.yaml"
        compiler.Compiler().compile(drift_watch_graph(), str(path))
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def body(document: dict[str, Any]) -> dict[str, Any]:
    """The tasks within the exit handler."""
    tasks = shape(document)["tasks"]
    assert set(tasks) == {"close-run", "exit-handler-1"}
    found: dict[str, Any] = tasks["exit-handler-1"]["tasks"]
    return found


def test_it_ingests_looks_and_branches_on_one_word(body: dict[str, Any]) -> None:
    looked = next(task for name, task in body.items() if name.startswith("condition"))
    assert set(body) - {"detect-drift", "ingest-rankings"} == {next(n for n in body if n.startswith("condition"))}
    assert body["detect-drift"]["inputs"]["snapshot_uri"] == "ingest-rankings.snapshot_uri"
    assert body["ingest-rankings"]["cached"]
    assert not body["detect-drift"]["cached"], "it depends on the registry and on what was looked at before"
    (retrain,) = looked["tasks"].values()
    assert retrain["when"].endswith("'pipelinechannel--detect-drift-decision'] == 'retrain'")
    assert set(retrain["tasks"]) == {"rlhf"}


def test_the_condition_reads_an_input_of_its_own_graph(body: dict[str, Any]) -> None:
    """KFP's local runner reads nothing else: with the task beside it, it would skip the retrain and report success."""
    looked = next(task for name, task in body.items() if name.startswith("condition"))
    assert looked["inputs"]["pipelinechannel--detect-drift-decision"] == "detect-drift.decision"
    (retrain,) = looked["tasks"].values()
    assert retrain["inputs"]["pipelinechannel--detect-drift-decision"] == "parent: pipelinechannel--detect-drift-decision"


def test_a_retrain_is_the_rlhf_graph_with_every_parameter_handed_on(document: dict[str, Any], body: dict[str, Any]) -> None:
    parameters = set(document["root"]["inputDefinitions"]["parameters"])
    alone = compiled()
    own = set(alone["root"]["inputDefinitions"]["parameters"])
    assert parameters == own | {"detect_drift_config"}
    assert {f"{stage}_config" for stage in STAGES} <= own
    looked = next(task for name, task in body.items() if name.startswith("condition"))
    (retrain,) = looked["tasks"].values()
    nested = retrain["tasks"]["rlhf"]
    assert nested["inputs"] == {name: f"parent: pipelinechannel--{name}" for name in sorted(own)}
    assert names(nested["tasks"]) == names(shape(alone)["tasks"])


def names(tasks: dict[str, Any]) -> set[str]:
    """Names of the stages below, without the numbers that KFP adds."""
    found = set()
    for name, task in tasks.items():
        found |= names(task["tasks"]) if "tasks" in task else {name.rstrip("-0123456789")}
    return found


def test_no_parameter_defaults_to_none(document: dict[str, Any]) -> None:
    defaults = {key: value.get("defaultValue") for key, value in document["root"]["inputDefinitions"]["parameters"].items()}
    assert [key for key, value in defaults.items() if value is None] == ["rankings"]
