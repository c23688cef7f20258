"""A pod's preStop hook: the stage saves its checkpoint and leaves before the container is ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from components.services.stop import PID_VARIABLE, stop
from components.services.storage import Storage
from pipelines.local_services import LocalServices
from tests.stage_processes import StageProcess, publish_snapshot, run

# Leaves on SIGTERM as a stage does, but takes its time; or not at all.
SLOW = (
    "import signal,sys,time; signal.signal(15, lambda *_: (time.sleep(0.5), sys.exit(75))); print('up', flush=True); time.sleep(60)"
)
DEAF = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def started(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    return process


def test_it_waits_until_the_stage_has_left(tmp_path: Path) -> None:
    process = started(SLOW)
    (tmp_path / "pid").write_text(str(process.pid), encoding="ascii")
    began = time.monotonic()
    assert stop(tmp_path / "pid", 30)
    assert time.monotonic() - began >= 0.5
    assert process.wait(1) == 75


def test_a_stage_that_does_not_leave_is_not_waited_for_beyond_the_time(tmp_path: Path) -> None:
    process = started(DEAF)
    (tmp_path / "pid").write_text(str(process.pid), encoding="ascii")
    assert not stop(tmp_path / "pid", 0.3)
    process.kill()
    process.wait()


@pytest.mark.parametrize("content", [None, "", "nobody"])
def test_without_a_stage_there_is_nothing_to_stop(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "pid").write_text(content, encoding="ascii")
    assert not stop(tmp_path / "pid")


def test_a_stage_that_ended_is_not_stopped(tmp_path: Path) -> None:
    process = started("print('up', flush=True)")
    process.wait()
    (tmp_path / "pid").write_text(str(process.pid), encoding="ascii")
    assert not stop(tmp_path / "pid")


def test_the_hook_saves_what_a_training_has_done_and_a_retry_goes_on(
    services: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PID_VARIABLE, str(tmp_path / "pid"))
    root = f"s3://rankloop/stopped-{uuid.uuid4().hex}"
    inputs = publish_snapshot(root)
    # Far apart, so that the checkpoint below is the hook's.
    process = StageProcess("train_sft", root, inputs, pause_after=3, checkpoint_seconds=3600)
    process.wait_for()
    done = subprocess.run([sys.executable, "-m", "components.services.stop"], env={**os.environ}, check=False)
    ended = process.ended()
    assert done.returncode == 0
    assert ended.returncode == 75, ended.stderr
    assert "asked to stop (SIGTERM); its checkpoint is saved" in ended.stderr
    assert not (tmp_path / "pid").exists()
    assert len(list(Storage().list(root + "/checkpoints/"))) == 1
    assert "continuing after" in run("train_sft", root, inputs).stderr


def test_outside_of_a_pod_the_hook_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PID_VARIABLE, raising=False)
    done = subprocess.run([sys.executable, "-m", "components.services.stop"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{PID_VARIABLE} is not set" in done.stderr
