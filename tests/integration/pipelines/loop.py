"""Runs `rankloop run` as a person does: a process, real servers, the whole graph with a small profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from components.services.tracking import client
from components.simulated_world.generate import simulate_rankings
from pipelines import stages_of
from pipelines.local_services import LocalServices, environment_of

STAGES = stages_of("ppo")
PROFILE = Path(__file__).with_name("small.yaml")


def command(home: Path, *options: str, verb: str = "run") -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", verb, "--profile", str(PROFILE), "--home", str(home), *options]


def environment() -> dict[str, str]:
    """This process's, without the servers of the test session."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RANKLOOP_"))}


def run(home: Path, *options: str, verb: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(home, *options, verb=verb), capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(home, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def wait_for_stage(home: Path, runs_before: int, stage: str, process: subprocess.Popen[str]) -> None:
    """Until the newest run has begun the stage."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        folders = sorted((home / "runs").glob("*")) if (home / "runs").exists() else []
        if len(folders) > runs_before and (folders[-1] / "events.jsonl").exists():
            begun = [json.loads(line) for line in (folders[-1] / "events.jsonl").read_text().splitlines() if line.endswith("}")]
            if any(each["event"] == "start" and each["stage"] == stage for each in begun):
                return
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    raise AssertionError(f"{stage} never began")


def left_behind(home: Path) -> list[str]:
    """Command lines of processes that still work on this home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        text = " ".join(process.info["cmdline"] or ())
        if str(home) in text and process.pid != os.getpid() and "pytest" not in text:
            found.append(text)
    return found


def write_rankings(path: Path, count: int, seed: int) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in simulate_rankings(count, seed)), encoding="utf-8")
    return path


def registry(home: Path) -> tuple[list[Any], dict[str, str]]:
    """Versions of the policy, oldest first, and its aliases."""
    with LocalServices(home) as services, environment_of(services):
        mlflow = client()
        if not mlflow.search_registered_models("name = 'rankloop-policy'"):
            return [], {}
        versions = sorted(mlflow.search_model_versions("name = 'rankloop-policy'"), key=lambda v: int(v.version))
        return versions, {k: str(v) for k, v in mlflow.get_registered_model("rankloop-policy").aliases.items()}
