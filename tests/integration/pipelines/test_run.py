"""`rankloop run` from its first run to its last wrong input, in one home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.services.exits import EXIT_DO_NOT_RETRY
from components.services.tracking import client
from pipelines.local_services import LocalServices, environment_of
from tests.integration.pipelines.loop import STAGES, registry, run, write_rankings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rankings(tmp_path_factory.mktemp("labels") / "rankings.jsonl", 200, seed=0)


def test_a_run_makes_a_champion_and_says_where_everything_is(home: Path, rankings: Path) -> None:
    done = run(home, "--rankings", str(rankings))
    assert done.returncode == 0, done.stdout + done.stderr
    versions, aliases = registry(home)
    assert len(versions) == 1
    assert aliases["champion"] == "1"
    assert "200 read, 200 kept, 0 duplicates, 0 quarantined" in done.stdout
    report = next(line for line in done.stdout.splitlines() if "report.html" in line)
    assert "<html" in Path(report.split("│")[2].strip()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kept_up(home: Path) -> Iterator[None]:
    """The home's servers, which a run then uses and leaves alone: they take six seconds to start."""
    with LocalServices(home):
        yield


@pytest.mark.usefixtures("kept_up")
def test_every_stage_is_a_child_run_with_config_metrics_and_artifacts(home: Path) -> None:
    with LocalServices(home) as services, environment_of(services):
        mlflow = client()
        experiment = mlflow.get_experiment_by_name("rankloop").experiment_id
        parents = mlflow.search_runs([experiment], "tags.mlflow.runName LIKE 'rlhf-%' and attributes.status = 'FINISHED'")
        whole = []
        for parent in parents:
            children = mlflow.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
            if set(STAGES) <= {child.data.tags["rankloop.stage"] for child in children}:
                whole = children
        assert whole, "no run of the whole graph has all its children"
        for child in whole:
            assert child.info.status == "FINISHED"
            names = {item.path for item in mlflow.list_artifacts(child.info.run_id)}
            assert "config.json" in names
        by_stage = {child.data.tags["rankloop.stage"]: child for child in whole}
        assert len(mlflow.get_metric_history(by_stage["ppo_finetune"].info.run_id, "reward")) == 3
        for stage, file in (
            ("validate_data", "data_docs.html"),
            ("validate_data", "rater_report.html"),
            ("evaluate", "report.html"),
        ):
            assert file in {item.path for item in mlflow.list_artifacts(by_stage[stage].info.run_id)}


@pytest.mark.usefixtures("kept_up")
def test_failed_data_end_the_run_with_the_expectation_and_move_nothing(home: Path, tmp_path: Path) -> None:
    before = registry(home)
    few = write_rankings(tmp_path / "few.jsonl", 20, seed=2)
    done = run(home, "--rankings", str(few))
    assert done.returncode == EXIT_DO_NOT_RETRY
    assert "enough rankings: observed" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    after = registry(home)
    assert after[1] == before[1]
    assert len(after[0]) == len(before[0])


@pytest.mark.usefixtures("kept_up")
@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--rankings", "/no/such/file.jsonl"], EXIT_DO_NOT_RETRY, "no such file or folder"),
        (["--rankings", "s3://no-such-bucket/data"], EXIT_DO_NOT_RETRY, "bucket 'no-such-bucket'"),
        (["--rankings", "ftp://somewhere/data"], EXIT_DO_NOT_RETRY, "unknown scheme"),
        ([], EXIT_DO_NOT_RETRY, "give them with --rankings"),
        (["--rankings", "{rankings}", "--demonstrations", "/no/such/demos.jsonl"], EXIT_DO_NOT_RETRY, "are not a file"),
        (["--rankings", "{rankings}", "--set", "train_sft.base_model=./no-model"], EXIT_DO_NOT_RETRY, "has no config.json"),
        (["--rankings", "{rankings}", "--set", "train_sft.context_tokens=16"], EXIT_DO_NOT_RETRY, "fits the context of 16 tokens"),
    ],
)
def test_wrong_input_is_named_with_its_remedy(home: Path, rankings: Path, options: list[str], code: int, expected: str) -> None:
    done = run(home, *(option.format(rankings=rankings) for option in options))
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert expected in text
    assert "Traceback" not in text
