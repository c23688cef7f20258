"""The table of resources: whole, and refused with a sentence where something in it cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from components.services.exits import DoNotRetry
from pipelines import STAGES, WATCH
from pipelines.resources import PROFILES, TABLE, Resources, Row, bytes_of, load


def written(folder: Path, table: dict[str, Any]) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(table), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_has_a_row(profile: str) -> None:
    assert {*STAGES, WATCH, "close_run", "stop_run", "ingest_shard", "merge_shards"} == set(load(profile).stages)


def test_under_gpu_every_stage_has_gpus_and_under_lean_those_that_use_them() -> None:
    assert {stage for stage in load("gpu").stages if not load("gpu").gpus(stage)} == set()
    lean = load("lean")
    assert {stage for stage in lean.stages if lean.gpus(stage)} == {s for s, row in lean.stages.items() if row.uses_gpu}


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "extends": "lean",
            "pools": {"large": {"node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}},
            "defaults": {"retry_wait_seconds": 10},
            "stages": {"ppo_finetune": {"gpus": 8, "memory": "512Gi", "storage_class": "fast"}},
        },
    )
    mine, lean = load(path), load("lean")
    assert mine.profile == "lean"
    assert mine.pools["large"].node_selector == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert mine.pools["large"].resource == "nvidia.com/gpu"
    assert mine.pools["small"] == lean.pools["small"]
    for stage, row in lean.stages.items():
        changes: dict[str, Any] = {"retry_wait_seconds": 10}
        if stage == "ppo_finetune":
            changes |= {"gpus": 8, "memory": "512Gi", "storage_class": "fast"}
        assert mine.row(stage) == row.model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "extends = None is no profile"),
        ({"extends": "fat"}, "extends = 'fat' is no profile"),
        ({"extends": "gpu", "stages": {"train_stf": {"cpu": "2"}}}, "stages.train_stf: there is no such stage; known: "),
        ({"extends": "gpu", "stages": {"train_sft": {"cpus": "2"}}}, "resources.stages.train_sft.cpus: there is no such key"),
        ({"extends": "gpu", "stages": {"train_sft": {"memory": "64GB"}}}, "resources.stages.train_sft.memory = '64GB'"),
        ({"extends": "gpu", "stages": {"train_sft": {"memory": 64}}}, "resources.stages.train_sft.memory = 64"),
        ({"extends": "gpu", "stages": {"train_sft": {"cpu": "0"}}}, "resources.stages.train_sft.cpu = '0'"),
        ({"extends": "gpu", "stages": {"train_sft": {"gpus": 0}}}, "resources.stages.train_sft.gpus = 0"),
        ({"extends": "gpu", "stages": {"train_sft": {"timeout_seconds": 0}}}, "train_sft.timeout_seconds = 0"),
        ({"extends": "gpu", "stages": {"train_sft": {"retry_wait_factor": float("nan")}}}, "train_sft.retry_wait_factor = nan"),
        ({"extends": "gpu", "stages": {"train_sft": {"shared_memory": "64Gi"}}}, "shared_memory 64Gi is part of memory 64Gi"),
        ({"extends": "gpu", "stages": {"train_sft": {"pool": "huge"}}}, "resources.stages.train_sft.pool = 'huge'"),
        ({"extends": "gpu", "stages": {"train_sft": {"labels": {"team": "a b"}}}}, "labels.team = 'a b'"),
        ({"extends": "gpu", "stages": ["train_sft"]}, "is not a table of resources"),
        ({"extends": "gpu", "stages": {"train_sft": 3}}, "a row of stages is not a mapping"),
        ({"extends": "gpu", "pools": {"tiny": {"resource": "nvidia.com/gpu"}}}, "resources.pools.tiny"),
        ({"extends": "gpu", "pools": {"small": {"resource": "gpu"}}}, "resources.pools.small.resource = 'gpu'"),
        ({"extends": "gpu", "user_id": 0}, "resources.user_id = 0"),
        ({"extends": "gpu", "secrets": {"rankloop-judge": {"stages": ["judge"]}}}, "names stages that have no row: judge"),
        ({"extends": "gpu", "secrets": {"rankloop-hub": {"keys": ["hf token"]}}}, "rankloop-hub.keys.0 = 'hf token'"),
        ({"extends": "gpu", "prices": {}}, "resources.prices: there is no such key"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place_and_the_file(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = written(tmp_path, changes)
    with pytest.raises(DoNotRetry) as refused:
        load(path)
    assert told in str(refused.value)
    assert "mine.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [("leen", "did you mean 'lean'?"), ("none.yaml", "unknown resources 'none.yaml'"), ("", "unknown resources ''")],
)
def test_an_unknown_name_is_refused(name: str, told: str) -> None:
    with pytest.raises(DoNotRetry, match="give gpu or lean") as refused:
        load(name)
    assert told in str(refused.value)


@pytest.mark.parametrize("text", ["stages: [", "- gpu", "stages: 2020-99-99", "a: &a [*a]\nb: !!python/object:os.x {}"])
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"mine\.yaml"):
        load(str(path))


def test_a_stage_without_a_row_is_named() -> None:
    with pytest.raises(DoNotRetry, match="no row for the stage 'train_more'"):
        load("gpu").row("train_more")


@given(st.integers(0, 10), st.integers(60, 10**6), st.integers(0, 3600), st.floats(1, 4, allow_nan=False))
def test_the_longest_time_holds_every_attempt_and_the_waits_grow(retries: int, timeout: int, wait: int, factor: float) -> None:
    """A stage's own wait is a part of its attempt, and so of its time."""
    changes = {"retries": retries, "timeout_seconds": timeout, "retry_wait_seconds": wait, "retry_wait_factor": factor}
    row = Row.model_validate({**load_row(), **changes})
    assert row.longest_seconds == (retries + 1) * timeout + 5 * retries
    assert row.retry_waits[:2] == [wait, round(wait * factor)][:retries]
    assert len(row.retry_waits) == retries
    assert row.retry_waits == sorted(row.retry_waits)


def load_row() -> dict[str, Any]:
    return _GPU.row("train_sft").model_dump()


_GPU: Resources = load("gpu")


@pytest.mark.parametrize(("quantity", "expected"), [("1", 1), ("3Ki", 3072), ("2Gi", 2 * 2**30), ("1Ti", 2**40)])
def test_quantities_in_bytes(quantity: str, expected: int) -> None:
    assert bytes_of(quantity) == expected


def test_the_table_names_every_key_that_a_row_has() -> None:
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    assert set(table["defaults"]) == set(Row.model_fields)


def test_the_readme_says_what_each_key_of_a_row_means() -> None:
    text = TABLE.with_name("README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    assert rows == {name: field.description for name, field in Row.model_fields.items()}


def test_the_readmes_own_table_is_one(tmp_path: Path) -> None:
    text = TABLE.with_name("README.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if block.startswith("extends:")]
    (tmp_path / "mine.yaml").write_text(example, encoding="utf-8")
    assert load(str(tmp_path / "mine.yaml")).row("ppo_finetune").gpus == 8
