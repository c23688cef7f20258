"""`rankloop plan`, from its options to the page and the table of resources."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.services.exits import DoNotRetry
from pipelines.capacity.shapes import Shape, llama_config
from pipelines.cli import app
from pipelines.resources import load

TINY = Shape(64, 128, 2, 4, 2, 512, True, 0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    llama_config(TINY, 512).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_plan_of_a_small_model_is_shown_and_written(model: str, tmp_path: Path) -> None:
    page, table = tmp_path / "plan.html", tmp_path / "resources.yaml"
    options = ["--profile", "tiny", "--gpus", "h100,L4", "--price", "3", "--output", str(page), "--resources", str(table)]
    result = CliRunner().invoke(app, ["plan", "--model", model, *options], terminal_width=200)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    for word in ("train_sft", "train_reward_model", "ppo_finetune", "evaluate", "1 × L4", "AdamW", "nvidia.com", "≈"):
        assert word in text
    assert "<link" not in text
    assert "src=" not in text, "self-contained"
    resources = load(str(table))
    assert resources.gpus("ppo_finetune") == 1
    assert resources.pools["large"].node_selector == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert resources.row("train_sft").timeout_seconds >= 3600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "H1000"], "unknown GPU 'H1000'; did you mean 'H100'"),
        (["--profile", "tiniest"], "unknown profile"),
        (["--prompt-tokens", "5000"], "do not fit the model's context of 512"),
        (["--set", "ppo_finetune.bach=3"], "unknown key of ppo_finetune"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_planned(model: str, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--model", model, "--profile", "tiny", *options])
    assert isinstance(result.exception, DoNotRetry)
    assert message in str(result.exception)


def test_a_model_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["plan", "--model", "Llama-3.1-9B"])
    assert isinstance(result.exception, DoNotRetry)
    assert "did you mean 'Llama-3.1-8B'" in str(result.exception)


def test_a_stage_that_no_gpu_holds_is_an_error_and_writes_no_resources(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.capacity import gpus

    small = {name: each._replace(memory_gb=0) for name, each in gpus.GPUS.items()}
    monkeypatch.setattr("pipelines.capacity.placing.GPUS", small)
    table = tmp_path / "resources.yaml"
    result = CliRunner().invoke(app, ["plan", "--model", model, "--profile", "tiny", "--gpus", "L4", "--resources", str(table)])
    assert isinstance(result.exception, DoNotRetry)
    assert "none of L4 holds" in str(result.exception)
    assert not table.exists()
