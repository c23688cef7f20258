"""Several processes as they are really started: by torchrun, and by the Kubeflow SDK's local backend."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from components.services import train_job
from components.services.job import Job
from components.services.storage import Storage
from pipelines.local_services import LocalServices
from tests.stage_processes import (
    OPTIONS,
    StageProcess,
    Undisturbed,
    assert_near,
    fetched,
    publish_snapshot,
    run,
    train_undisturbed,
)
from tests.trainer_stand_in import cluster

SECONDS_TO_NOTICE = 60


@pytest.fixture(scope="module")
def snapshot(services: LocalServices) -> dict[str, str]:
    return publish_snapshot("s3://rankloop/processes")


@pytest.fixture(scope="module")
def undisturbed(services: LocalServices) -> Undisturbed:
    return train_undisturbed("s3://rankloop/undisturbed-train-jobs")


def rank_process(number: int) -> psutil.Process:
    """The process that torchrun has started as this one."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "components.services.rank" in process.cmdline() and process.environ().get("RANK") == str(number):
                return process
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"there is no process {number}")


def test_a_killed_process_ends_the_stage_at_once_and_one_goes_on_from_its_checkpoint(
    snapshot: dict[str, str], tmp_path: Path
) -> None:
    root = "s3://rankloop/one-of-two-killed"
    stage = StageProcess("train_sft", root, snapshot, forked=False, processes=2, epochs=6)
    while len(stage.steps()) < 3:
        time.sleep(0.05)
    os.kill(rank_process(1).pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = stage.ended()
    seconds = time.monotonic() - killed
    assert ended.returncode == 75, ended.stderr
    assert "train_sft failed: process 1 of 2 was killed by SIGKILL" in ended.stderr
    assert seconds < SECONDS_TO_NOTICE
    print(f"noticed after {seconds:.1f} seconds")
    assert {item.uri.split("/")[4] for item in Storage().list(root + "/")} == {"checkpoints"}
    resumed, whole = (run("train_sft", each, snapshot, epochs=6) for each in (root, root + "-not"))
    assert "continuing after" in resumed.stderr
    ours, theirs = (fetched(each.uri, tmp_path / str(number)) for number, each in enumerate((resumed, whole)))
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_line_28_a_train_job_of_the_local_backend_learns_what_one_process_does(
    stage: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKLOOP_TRAINER", "local")
    job = run(stage, f"s3://rankloop/train-job-{stage}", undisturbed.inputs[stage], forked=False, processes=2)
    assert "one of them:" in job.stderr or "best: " in job.stderr, "the job's log is passed on"
    for name, uri in undisturbed.outputs[stage].items():
        assert_near(fetched(job.outputs[name], tmp_path / name), fetched(uri, tmp_path / f"{name}-alone"))


def test_a_train_job_of_two_nodes_is_made_followed_and_removed_and_its_exit_is_the_stages(
    snapshot: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK's Kubernetes backend against a stand-in for the cluster; the two nodes' torchrun meet as they would there."""
    with cluster() as (found, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("RANKLOOP_TRAIN_IMAGE", "registry.example/train@sha256:1")
        monkeypatch.setenv("RANKLOOP_NODE_RESOURCES", '{"cpu": 8, "memory": "64Gi"}')
        done = run("train_sft", "s3://rankloop/two-nodes", snapshot, nodes=2)
        (job,) = found.made
        assert not found.jobs, "nothing is left"
        failed = run("train_sft", "s3://rankloop/two-nodes-diverge", snapshot, nodes=2, learning_rate=1e30)
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["image"]) == (2, "registry.example/train@sha256:1")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "1", "cpu": "8", "memory": "64Gi"}
    assert job["spec"]["runtimeRef"]["name"] == "rankloop-torch"
    assert [each["name"] for each in trainer["env"]] == ["RANKLOOP_JOB"], "secrets come from the runtime, not from the stage"
    assert "examples; one of them:" in done.stderr, "the first node's log is passed on"
    alone = run("train_sft", "s3://rankloop/one-node", snapshot)
    ours, theirs = (fetched(each.uri, tmp_path / str(number)) for number, each in enumerate((done, alone)))
    for weight, values in theirs.items():
        torch.testing.assert_close(ours[weight], values, atol=2e-5, rtol=2e-5)
    assert failed.returncode == 65, failed.stderr
    assert "train_sft failed: SFT diverged" in failed.stderr


def test_the_train_job_of_a_killed_attempt_is_removed_before_another_is_made(
    services: LocalServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_job, "STOP_SECONDS", 0.1)
    where = services.storage_root + "/killed-attempt"
    job = Job(
        name="rankloop-1",
        stage="train_sft",
        config={"nodes": 1, "processes": 1},
        inputs={},
        root=where,
        outcomes=where + "/outcomes",
        run_id="",
    )
    with cluster() as (found, kubeconfig):
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
        train_job.TrainJob(job, "kubernetes")  # whoever made it was killed
        second = train_job.TrainJob(job, "kubernetes")
        assert len(found.made) == 2
        assert list(found.jobs) == ["rankloop-1"]
        second.stop()
        second.close()
        assert not found.jobs
