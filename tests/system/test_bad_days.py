"""Services that fail while a stage works: what the person sees, and that nothing is lost.

The stages run as processes against the real servers; a small proxy between them misbehaves.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.services.exits import EXIT_RETRY
from components.services.tracking import PATIENCE_VARIABLE
from pipelines.local_services import LocalServices
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.postgres import mlflow_on_postgres, restart_postgres
from tests.stage_processes import OPTIONS, StageProcess, Undisturbed, contents, logged, run, train_undisturbed

OUTAGE_SECONDS = 60.0


@pytest.fixture(scope="module")
def undisturbed(services: LocalServices) -> Undisturbed:
    return train_undisturbed("s3://rankloop/undisturbed-bad-days")


@pytest.fixture
def store(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What the stages take for the object store."""
    with faulty_proxy(services.environment["AWS_ENDPOINT_URL_S3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.address)
        yield proxy


@pytest.fixture
def mlflow(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What the stages take for the MLflow server."""
    with faulty_proxy(services.environment["MLFLOW_TRACKING_URI"]) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        monkeypatch.setenv(PATIENCE_VARIABLE, "300")
        yield proxy


@pytest.mark.parametrize(("fault", "stage"), zip(("503", "down", "cut", "slow"), OPTIONS, strict=True))
def test_a_store_that_fails_for_a_moment_changes_nothing(
    fault: str, stage: str, store: FaultyProxy, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"s3://rankloop/bad-days/{fault}-{stage}"
    process = StageProcess(stage, root, undisturbed.inputs[stage], pause_after=2)
    store.cut_bytes = 100
    process.wait_for()
    store.misbehave(fault, times=2)
    process.go_on()
    ended = process.ended()
    assert store.met > 0
    assert ended.returncode == 0, ended.stderr
    for name, uri in ended.outputs.items():
        assert contents(uri) == contents(undisturbed.outputs[stage][name])


def test_a_store_that_stays_away_is_a_failure_to_retry_that_goes_on_from_the_checkpoint(
    store: FaultyProxy, undisturbed: Undisturbed
) -> None:
    root = "s3://rankloop/bad-days/away"
    process = StageProcess("ppo_finetune", root, undisturbed.inputs["ppo_finetune"], pause_after=6)
    process.wait_for()
    store.misbehave("down")
    process.go_on()
    ended = process.ended()
    assert ended.returncode == EXIT_RETRY, ended.stderr
    assert "the object store cannot be reached for s3://rankloop/bad-days/away/" in ended.stderr
    assert "Traceback" not in ended.stderr

    store.misbehave("")
    done = run("ppo_finetune", root, undisturbed.inputs["ppo_finetune"])
    assert "continuing after update" in done.stderr
    assert contents(done.uri) == contents(undisturbed.uri("ppo_finetune"))


def test_mlflow_away_for_a_minute_stops_no_training_and_loses_no_metric(mlflow: FaultyProxy, undisturbed: Undisturbed) -> None:
    process = StageProcess("ppo_finetune", "s3://rankloop/bad-days/mlflow", undisturbed.inputs["ppo_finetune"], pause_after=3)
    process.wait_for()
    mlflow.misbehave("down")
    process.go_on()
    away = time.monotonic()
    process.wait_for(OPTIONS["ppo_finetune"]["updates"])
    trained_for = time.monotonic() - away
    assert trained_for < OUTAGE_SECONDS / 2, "the training waits for MLflow"
    time.sleep(OUTAGE_SECONDS - trained_for)
    assert mlflow.met > 0
    mlflow.misbehave("")
    ended = process.ended()
    assert ended.returncode == 0, ended.stderr
    assert "the work goes on, and its metrics are kept" in ended.stderr
    assert contents(ended.uri) == contents(undisturbed.uri("ppo_finetune"))
    assert logged(ended.uri) == logged(undisturbed.uri("ppo_finetune"))


def test_mlflow_that_stays_away_is_a_failure_to_retry_and_the_result_is_kept(
    mlflow: FaultyProxy, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "3")
    root = "s3://rankloop/bad-days/mlflow-gone"
    process = StageProcess("train_sft", root, undisturbed.inputs["train_sft"], pause_after=3)
    process.wait_for()
    mlflow.misbehave("down")
    process.go_on()
    ended = process.ended()
    assert ended.returncode == EXIT_RETRY, ended.stderr
    assert "train_sft failed: MLflow at http://127.0.0.1:" in ended.stderr
    assert "check that the server is up, then run again" in ended.stderr
    mlflow.misbehave("")
    assert contents(run("train_sft", root, undisturbed.inputs["train_sft"]).uri) == contents(undisturbed.uri("train_sft"))


def test_a_database_that_crashes_and_comes_back_loses_no_metric(
    services: LocalServices, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("database")
    for each in (folder, *folder.parents[:3]):
        each.chmod(0o755)  # PostgreSQL runs as a user of its own
    reference = logged(undisturbed.uri("ppo_finetune"))
    with mlflow_on_postgres(services, folder) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        process = StageProcess("ppo_finetune", "s3://rankloop/bad-days/postgres", undisturbed.inputs["ppo_finetune"])
        process.wait_for(4)
        restart_postgres(folder / "postgres")
        ended = process.ended()
        assert ended.returncode == 0, ended.stderr
        assert logged(ended.uri) == reference


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_a_full_disk_is_a_failure_to_retry(
    stage: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"s3://rankloop/bad-days/disk-{stage}"
    with small_disk(tmp_path / "disk") as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        ended = run(stage, root, undisturbed.inputs[stage])
        assert ended.returncode == EXIT_RETRY, ended.stderr
        assert "no space left on device" in ended.stderr
        assert "free disk space (TMPDIR moves the scratch folder), then run again" in ended.stderr
    monkeypatch.delenv("TMPDIR")
    assert contents(run(stage, root, undisturbed.inputs[stage]).uri) == contents(undisturbed.uri(stage))


def test_two_that_do_the_same_work_at_once_both_end_with_it(undisturbed: Undisturbed) -> None:
    """As when a schedule and a trigger fire together."""
    root, inputs = "s3://rankloop/bad-days/two", undisturbed.inputs["ppo_finetune"]
    for ended in [each.ended() for each in [StageProcess("ppo_finetune", root, inputs) for _ in range(2)]]:
        assert ended.returncode == 0, ended.stderr
        assert contents(ended.uri) == contents(undisturbed.uri("ppo_finetune"))


def test_a_clock_an_hour_off_is_named(services: LocalServices) -> None:
    code = "from components.services.storage import Storage; Storage().put_bytes('s3://rankloop/bad-days/clock', b'')"
    assert run_with_clock("+0", code).returncode == 0
    ended = run_with_clock("-1h", code)
    assert "this machine's clock and the store's are too far apart (RequestTimeTooSkewed)" in ended.stderr, ended.stderr


def run_with_clock(offset: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["faketime", "-f", offset, sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
