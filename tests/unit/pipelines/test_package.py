"""A graph as a file for a cluster: its formats, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from kfp.components import load_component_from_text

from components.services.exits import DoNotRetry
from pipelines import package, policy
from pipelines.package import write_package
from pipelines.resources import Resources, load
from tests.cluster_graphs import DIGEST

LEAN: Resources = load("lean")


def test_the_file_is_what_kfp_takes(tmp_path: Path) -> None:
    written = write_package("sharded_ingest", LEAN, tmp_path / "new" / "graph.yaml", tags_allowed=True)
    text = (tmp_path / "new" / "graph.yaml").read_text(encoding="utf-8")
    assert text.startswith("# PIPELINE DEFINITION\n# Name: sharded-ingest\n")
    assert tuple(yaml.safe_load_all(text)) == tuple(written)
    assert load_component_from_text(text).platform_spec.platforms, "KFP reads it, and what it says about Kubernetes"


def test_the_kubernetes_objects_hold_the_same_and_each_content_is_a_version_of_its_own(tmp_path: Path) -> None:
    versions = []
    for name, table in (("a", LEAN), ("b", LEAN), ("c", load("gpu"))):
        path = tmp_path / f"{name}.yaml"
        written = write_package("sharded_ingest", table, path, "kubernetes", True, "team")
        pipeline, version = yaml.safe_load_all(path.read_text(encoding="utf-8"))
        assert {pipeline["apiVersion"], version["apiVersion"]} == {"pipelines.kubeflow.org/v2beta1"}
        assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
        assert pipeline["metadata"] == {"name": "sharded-ingest", "namespace": "team"}
        assert version["metadata"]["namespace"] == "team"
        assert version["spec"]["pipelineName"] == "sharded-ingest"
        assert (version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]) == tuple(written)
        assert len(version["metadata"]["name"]) <= 63, "a DNS label"
        versions.append(version["metadata"]["name"])
    assert versions[0] == versions[1], "applied again, nothing changes"
    assert versions[0] != versions[2], "a version cannot be changed"


def test_a_table_of_ones_own_reaches_the_pods(tmp_path: Path) -> None:
    changes = {"extends": "gpu", "stages": {"merge_shards": {"gpus": 2, "memory": "48Gi", "storage_class": "fast"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")
    graph = write_package("sharded_ingest", load(str(tmp_path / "mine.yaml")), tmp_path / "graph.yaml", tags_allowed=True)
    resources = graph.executors()["exec-merge-shards"]["resources"]
    assert (resources["resourceMemoryLimit"], resources["accelerator"]["resourceCount"]) == ("48Gi", "2")
    (scratch,) = graph.pod("exec-merge-shards")["genericEphemeralVolume"]
    assert (scratch["mountPath"], scratch["size"], scratch["storageClassName"]) == ("/scratch", "50Gi", "fast")
    assert graph.executors()["exec-ingest-shard"]["resources"]["resourceMemoryLimit"] == "16Gi"


def test_the_node_selector_and_tolerations_of_a_pod_without_gpu_are_the_tables(tmp_path: Path) -> None:
    spot = {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    changes = {"extends": "lean", "stages": {"merge_shards": {"node_selector": {"pool": "big"}, "tolerations": [spot]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")
    graph = write_package("sharded_ingest", load(str(tmp_path / "mine.yaml")), tmp_path / "graph.yaml", tags_allowed=True)
    assert graph.pod("exec-merge-shards")["nodeSelector"] == {"labels": {"pool": "big"}}
    assert graph.pod("exec-merge-shards")["tolerations"] == [spot]


def test_an_image_by_tag_is_refused_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "DATA", f"registry.example/data{DIGEST}")
    with pytest.raises(DoNotRetry, match=r"RANKLOOP_TRAIN_IMAGE = .* names no digest.*\n  remedy: set RANKLOOP_TRAIN_IMAGE="):
        write_package("sharded_ingest", LEAN, tmp_path / "graph.yaml")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_breaks_the_policy_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SOURCE_BYTES", 100)
    with pytest.raises(DoNotRetry, match="small_sources: exec-ingest-shard: its source has"):
        write_package("sharded_ingest", LEAN, tmp_path / "graph.yaml", tags_allowed=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("graph", "name", "form", "told"),
    [
        ("rlfh", "graph.yaml", "kfp", "unknown graph 'rlfh'; known: rlhf, drift_watch, sharded_ingest"),
        ("rlhf", "graph.json", "kfp", r"graph\.json: the file's name must end in \.yaml"),
        ("rlhf", "graph.yaml", "helm", "unknown format 'helm'; known: kfp, kubernetes"),
    ],
)
def test_what_cannot_be_written_is_refused(graph: str, name: str, form: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=told):
        write_package(graph, LEAN, tmp_path / name, form, tags_allowed=True)
