"""What the table of the stages' resources names is what infra/ makes, and each pod fits into the limits of its namespace."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.resources import Resources, bytes_of, load
from tests.cluster_tools import INFRA, only, rendered, run_secrets_script, secrets_in

KIND = INFRA / "overlays" / "kind" / "resources.yaml"
PERSONS_OWN = {"rankloop-hub", "rankloop-judge"}  # infra/README.md says how each is made
TABLES = {"base": ("gpu", "lean"), "overlays/kind": (str(KIND),)}


def cores(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1)


@pytest.fixture(scope="module")
def table() -> Resources:
    return load("gpu")


def test_the_config_map_has_the_keys_that_pods_read(table: Resources) -> None:
    for name, source in table.config_maps.items():
        for overlay in ("kind", "on-prem", "aws"):
            data = only(rendered(f"overlays/{overlay}"), "ConfigMap", name)["data"]
            assert set(source.keys) <= set(data) <= {*source.keys, *source.optional_keys}


def test_the_secrets_have_the_keys_that_pods_read(table: Resources, tmp_path: Path) -> None:
    assert run_secrets_script(tmp_path).returncode == 0
    made = secrets_in(tmp_path)
    for name, source in table.secrets.items():
        if name in PERSONS_OWN:
            assert not source.keys  # a pod starts without it
            readme = (INFRA / "README.md").read_text(encoding="utf-8")
            assert all(f"| `{name}` (optional) | {key} |" in readme for key in source.optional_keys)
        else:
            assert {*source.keys, *source.optional_keys} == set(made[name])


def test_the_priority_class_is_there(table: Resources) -> None:
    named = {row.priority_class for row in table.stages.values() if row.priority_class}
    assert named == {each["metadata"]["name"] for each in rendered("base") if each["kind"] == "PriorityClass"}


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in TABLES.items() for name in names])
def test_every_stage_fits(place: str, name: str) -> None:
    objects = rendered(place)
    most = next(each["max"] for each in only(objects, "LimitRange", "rankloop")["spec"]["limits"] if each["type"] == "Container")
    hard = only(objects, "ResourceQuota", "rankloop")["spec"]["hard"]
    resources = load(name)
    for stage, row in resources.stages.items():
        assert cores(row.cpu) <= min(cores(most["cpu"]), cores(hard["requests.cpu"])), stage
        assert bytes_of(row.memory) <= min(bytes_of(most["memory"]), bytes_of(hard["requests.memory"])), stage
        assert resources.gpus(stage) <= int(hard["requests.nvidia.com/gpu"]), stage


def test_on_kind_no_stage_asks_for_a_gpu() -> None:
    resources = load(str(KIND))
    assert {resources.gpus(stage) for stage in resources.stages} == {0}
