"""The command line: help, exit codes, and no traceback for a person."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from pipelines.cli import app


def rankloop(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("command", ["run", "plan", "compile", "services", "models", "trigger", "schedule"])
def test_every_command_explains_itself(command: str) -> None:
    done = rankloop(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize("command", ["list", "show", "promote", "rollback", "compare", "verify", "audit"])
def test_every_command_about_models_explains_itself_and_its_options(command: str) -> None:
    result = CliRunner().invoke(app, ["models", command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    (told,) = (each for each in get_command(app).commands["models"].commands.values() if each.name == command)
    assert told.help
    for parameter in told.params:
        assert parameter.help, f"{command} {parameter.name} says nothing of itself"


def test_compile_writes_the_graph_with_the_images_that_the_installation_names(tmp_path: Path) -> None:
    images = {
        name: f"registry.example/{name.lower()}@sha256:{'5e' * 32}" for name in ("RANKLOOP_DATA_IMAGE", "RANKLOOP_TRAIN_IMAGE")
    }
    done = rankloop("compile", "--resources", "lean", cwd=tmp_path, **images)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote rlhf.yaml: 17 tasks, 10 with GPUs, ")
    pipeline, _ = yaml.safe_load_all((tmp_path / "rlhf.yaml").read_text(encoding="utf-8"))
    assert pipeline["pipelineInfo"]["name"] == "rlhf"
    assert {each["container"]["image"] for each in pipeline["deploymentSpec"]["executors"].values()} == set(images.values())


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("run", "--profile", "none"), 65, "unknown profile 'none'"),
        (("run", "--set", "nonsense"), 65, "write --set stage.key=value"),
        (("run", "--method", "grpo"), 65, "unknown method 'grpo'"),
        (("run", "--seed", "one"), 2, "--seed"),
        (("rnu",), 2, "rnu"),
        (("compile",), 65, "RANKLOOP_DATA_IMAGE = 'rankloop/python-data:0.1.0' names no digest"),
        (("compile", "--resources", "leen"), 65, "did you mean 'lean'?"),
    ],
)
def test_a_wrong_command_line_ends_with_its_code_and_no_traceback(arguments: tuple[str, ...], code: int, expected: str) -> None:
    done = rankloop(*arguments)
    assert done.returncode == code
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
