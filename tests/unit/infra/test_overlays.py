"""Every overlay builds, and every object is one that Kubernetes, the Prometheus operator or Kubeflow would accept."""

from __future__ import annotations

import copy
import difflib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

from tests.cluster_tools import INFRA, OVERLAYS, objects_of, pod_spec, pod_template, rendered

ALONE = "components/gpu-time-slicing"  # applied on its own
NAMES = (*(f"overlays/{name}" for name in OVERLAYS), ALONE)
VERSIONS = ("1.30", kubernetes_validate.latest_version())
COMPILED = (INFRA / "overlays" / "kind" / "resources.yaml",)  # read by `rankloop compile`, not by kubectl
SCHEMAS = Path(__file__).with_name("schemas")
CUSTOM = ("ServiceMonitor", "PrometheusRule")
POD_DEFAULT_KEYS = {  # PodDefaultSpec of Kubeflow 1.10's admission webhook
    *("selector", "desc", "serviceAccountName", "automountServiceAccountToken", "env", "envFrom", "volumes", "volumeMounts"),
    *("annotations", "labels", "tolerations", "imagePullSecrets", "initContainers", "sidecars", "command", "args"),
}


def check(thing: dict[str, Any], version: str) -> None:
    """Raises `ValidationError` if the object is not one of its kind, by the schema of this version of Kubernetes."""
    if thing["kind"] in CUSTOM:
        schema = json.loads((SCHEMAS / f"{thing['kind']}.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(schema).validate(thing)
    elif thing["kind"] == "PodDefault":
        check_pod_default(thing, version)
    elif thing["kind"] == "TrainingRuntime":
        check_training_runtime(thing, version)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


def check_training_runtime(thing: dict[str, Any], version: str) -> None:
    """By the models of Kubeflow Trainer 2.3, which drop what they do not know."""
    try:
        known = TrainerV1alpha1TrainingRuntime.from_dict(copy.deepcopy(thing))
    except ValueError as error:
        raise jsonschema.ValidationError(str(error)) from error
    lines = [json.dumps(each, indent=1, sort_keys=True).splitlines() for each in (thing, known.to_dict() if known else {})]
    if lost := [line for line in difflib.unified_diff(*lines, n=0) if line[0] == "-"]:  # type: ignore[misc, arg-type]
        raise jsonschema.ValidationError(f"the model has no such key: {lost}")
    workload = {"apiVersion": "batch/v1", "kind": "Job", "metadata": thing["metadata"], "spec": {"template": pod_template(thing)}}
    kubernetes_validate.validate(workload, version, strict=True)


def check_pod_default(thing: dict[str, Any], version: str) -> None:
    spec = thing["spec"]
    if thing["apiVersion"] != "kubeflow.org/v1alpha1" or (unknown := set(spec) - POD_DEFAULT_KEYS):
        raise jsonschema.ValidationError(f"{thing['apiVersion']}: PodDefault has no {sorted(unknown)}")
    container = {"name": "any", "env": spec.get("env", []), "volumeMounts": spec.get("volumeMounts", [])}
    account = {key: spec[key] for key in ("serviceAccountName", "automountServiceAccountToken") if key in spec}
    pod = {"containers": [container], "volumes": spec.get("volumes", []), **account}
    workload = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": thing["metadata"],
        "spec": {"selector": spec["selector"], "template": {"metadata": {}, "spec": pod}},
    }
    kubernetes_validate.validate(workload, version, strict=True)


@pytest.fixture(autouse=True, scope="module")
def _read_schemas_once() -> Iterator[None]:
    """The library reads 1 MB of definitions anew for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", functools.cache(kubernetes_validate.utils.schema_contents))
        yield


@functools.cache
def _check_once(text: str, version: str) -> None:
    """Most objects are the same in each overlay."""
    check(json.loads(text), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_object_passes_the_schema_of_its_kind(name: str, version: str) -> None:
    for thing in rendered(name):
        _check_once(json.dumps(thing, sort_keys=True), version)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("StatefulSet", ("spec", "replica"), 1),
        ("NetworkPolicy", ("spec", "policyTypes"), "Egress"),
        ("ServiceMonitor", ("spec", "endpoints"), [{"port": "http", "intervall": "30s"}]),
        ("PrometheusRule", ("spec", "groups"), [{"name": "x", "rules": [{"alert": "Y", "for": "5m"}]}]),
        ("TrainingRuntime", ("spec", "mlpolicy"), {}),
        ("TrainingRuntime", ("spec", "template"), {"spec": {"replicatedJobs": [{"name": "node", "templates": {}}]}}),
        ("PodDefault", ("spec", "volume"), []),
        ("PodDefault", ("spec", "env"), [{"name": "X", "vaule": "y"}]),
        ("PodDefault", ("spec", "selector"), {"matchLabel": {}}),
    ],
)
def test_a_misspelt_key_does_not_pass(kind: str, path: tuple[str, ...], value: Any) -> None:
    thing = next(each for each in rendered("overlays/on-prem") if each["kind"] == kind)
    check(thing, VERSIONS[-1])
    place = thing
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(thing, VERSIONS[-1])


@pytest.mark.parametrize("name", NAMES)
def test_no_object_is_there_twice_and_all_lie_in_one_namespace(name: str) -> None:
    objects = rendered(name)
    keys = [(each["kind"], each["metadata"]["name"], each["metadata"].get("namespace")) for each in objects]
    assert len(keys) == len(set(keys))
    cluster_wide = {"Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass"}
    namespaces = {each["metadata"].get("namespace") for each in objects if each["kind"] not in cluster_wide}
    assert namespaces == {"gpu-operator" if name == ALONE else "rankloop"}


def test_another_namespace_needs_one_line(tmp_path: Path) -> None:
    """An overlay of the overlay: all objects move, and so do the subjects of the bindings."""
    relative = os.path.relpath(INFRA / "overlays" / "on-prem", tmp_path.resolve())
    mine = {"kind": "Kustomization", "namespace": "team-a", "resources": [relative]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    objects = objects_of(tmp_path)
    assert {each["metadata"]["namespace"] for each in objects if "namespace" in each["metadata"]} == {"team-a"}
    bound = {each["metadata"]["name"]: subject for each in objects for subject in each.get("subjects", [])}
    assert bound
    assert {name: subject["namespace"] for name, subject in bound.items()} == dict.fromkeys(bound, "team-a")


def test_one_object_a_file() -> None:
    for path in INFRA.rglob("*.yaml"):
        documents = [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]
        assert len(documents) == 1, f"{path} holds {len(documents)} documents"


def test_every_file_is_used() -> None:
    """A manifest that no kustomization names is not applied, and nobody would notice."""
    named: set[Path] = set()
    for path in INFRA.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = [*content.get("resources", []), *content.get("components", [])]
        entries += [patch["path"] for patch in content.get("patches", [])]
        entries += [file for generator in content.get("configMapGenerator", []) for file in generator["files"]]
        named |= {(path.parent / entry).resolve() for entry in entries}
    for path in INFRA.rglob("*"):
        if (
            path.suffix in (".yaml", ".ini", ".sql", ".py")
            and path.name != "kustomization.yaml"
            and "__pycache__" not in path.parts
        ):
            assert path.resolve() in named or path in COMPILED, f"{path} is in no kustomization"
    for folder in (INFRA / "components").iterdir():
        assert folder.resolve() in named or f"components/{folder.name}" == ALONE, f"{folder} is in no overlay"


def test_the_pods_were_looked_at() -> None:
    kinds = {each["kind"] for name in NAMES for each in rendered(name) if pod_spec(each)}
    assert kinds == {"Deployment", "StatefulSet", "Job", "CronJob", "TrainingRuntime"}
