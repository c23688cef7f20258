"""The stage with a real store and tracking server: what it publishes when it passes, warns and fails."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from components.ingest_rankings import stage as ingest_stage
from components.services.exits import DoNotRetry
from components.services.launch import Context
from components.services.storage import MARKER, Storage, join
from components.services.tracking import client
from components.simulated_world.generate import simulate_rankings
from components.validate_data.stage import Config, Inputs, Outputs, run
from pipelines.local_services import LocalServices


@pytest.fixture(scope="module")
def inputs(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """400 simulated rankings, as an ingest published them."""
    folder = tmp_path_factory.mktemp("validate")
    source = folder / "rankings.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in simulate_rankings(400, seed=0)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKLOOP_STORAGE", join(services.storage_root, f"validate-{uuid.uuid4().hex}"))
        config, given = ingest_stage.Config(), ingest_stage.Inputs(rankings=str(source))
        (folder / "scratch").mkdir()
        found = ingest_stage.run(config, given, Context("ingest_rankings", config, given, folder / "scratch"))
    return Inputs(**found._asdict())


def validate(inputs: Inputs, services: LocalServices, scratch: Path, **values: Any) -> tuple[Outputs, Context]:
    scratch.mkdir()
    config = Config(**values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKLOOP_STORAGE", join(services.storage_root, "validated"))
        context = Context("validate_data", config, inputs, scratch)
        context.tracker.start(context.config, context.inputs)
        return run(config, inputs, context), context


def test_good_rankings_pass_with_a_warning_that_is_shown(inputs: Inputs, services: LocalServices, tmp_path: Path) -> None:
    outputs, context = validate(inputs, services, tmp_path / "scratch", max_length_bias=0.01)
    assert (outputs.gate, outputs.reason) == ("pass", "")
    assert "length does not decide: observed 0.5" in outputs.warnings
    uri = context.uri("validations")
    marker = Storage().get_json(join(uri, MARKER))
    assert marker["config"]["max_length_bias"] == 0.01, "a changed threshold is seen in the lineage"
    assert (marker["gate"], marker["warnings"]) == ("pass", outputs.warnings)
    document = Storage().get_json(join(uri, "validation.json"))
    assert {check["column"]: check["verdict"] for check in document["checks"]}["length_bias"] == "warn"
    assert document["estimates"]["length_bias"]["low"] > 0.51
    assert len(document["raters"]) == 12
    run_ = client().get_run(context.tracker.run_id)
    assert run_.data.tags["rankloop.gate"] == "pass"
    assert "length does not decide" in run_.data.tags["rankloop.warnings"]
    assert run_.data.params["max_length_bias"] == "0.01"
    files = {item.path for item in client().list_artifacts(context.tracker.run_id)}
    assert {"data_docs.html", "rater_report.html", "validation.json"} <= files
    assert [page.name for page in context.pages] == ["data_docs.html", "rater_report.html"]
    assert context.summary["warned"] >= 1


def test_the_same_check_fails_where_the_profile_says_so(inputs: Inputs, services: LocalServices, tmp_path: Path) -> None:
    outputs, context = validate(inputs, services, tmp_path / "a", max_length_bias=0.01, failing=["length_bias"])
    assert outputs.gate == "fail"
    assert "length does not decide" in outputs.reason
    assert Storage().get_json(join(context.uri("validations"), MARKER))["gate"] == "fail"
    with pytest.raises(DoNotRetry, match="the gate failed: length does not decide"):
        validate(inputs, services, tmp_path / "b", max_length_bias=0.01, failing=["length_bias"], fail_on_gate=True)


def test_a_snapshot_that_is_none_is_refused(inputs: Inputs, services: LocalServices, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "part-00000.parquet").write_bytes(b"PAR1 and no more")
    uri = join(services.storage_root, "wrong", uuid.uuid4().hex)
    Storage().publish_folder(wrong, uri, {"role": "rankings"})
    with pytest.raises(DoNotRetry, match=r"cannot be read as rankings.*\n?.*run ingest_rankings again"):
        validate(inputs.model_copy(update={"snapshot_uri": uri}), services, tmp_path / "scratch")
