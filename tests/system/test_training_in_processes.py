"""The training stages in several processes, and PPO with another sampler: the same results, and the same ways to end."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from components.services.storage import Storage
from components.services.tracking import client
from pipelines.local_services import LocalServices
from tests import vllm_stand_in
from tests.stage_processes import (
    OPTIONS,
    Ended,
    StageProcess,
    Undisturbed,
    assert_near,
    contents,
    fetched,
    kinds,
    publish_snapshot,
    run,
    train_undisturbed,
)

# Of three processes some have fewer forward passes in scoring and in training.
UNEVEN = {"samples_per_prompt": 2, "minibatches": 3, "micro_batch_tokens": 64}


@pytest.fixture(scope="module")
def undisturbed(services: LocalServices) -> Undisturbed:
    return train_undisturbed("s3://rankloop/undisturbed-in-processes")


def assert_learned_alike(one: Ended, other: dict[str, str], folder: Path) -> None:
    """The same weights and history but for rounding, whatever a stage publishes."""
    for name, uri in one.outputs.items():
        assert_near(fetched(uri, folder / name), fetched(other[name], folder / f"{name}-other"))
        ours, theirs = (contents(each)["training.jsonl"] for each in (uri, other[name]))
        for own, row in zip(ours, theirs, strict=True):
            keys = own.keys() - {"accuracy", "logprob_mismatch"}  # of equal scores rounding decides which is higher
            assert {key: own[key] for key in keys} == pytest.approx({key: row[key] for key in keys}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_line_28_two_processes_end_as_one_but_for_rounding(stage: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """They share the rows of each batch, so numbers are added in another order, and that is all."""
    root = f"s3://rankloop/together-{stage}"
    together = run(stage, root, undisturbed.inputs[stage], processes=2, checkpoint_seconds=3600)
    assert_learned_alike(together, undisturbed.outputs[stage], tmp_path)
    finished = client().get_run(Storage().get_json(together.uri + "/rankloop.json")["mlflow_run_id"])
    assert finished.info.status == "FINISHED", "the stage has one MLflow run, and has closed it"
    assert any(not key.startswith("summary/") for key in finished.data.metrics), "its first process has sent numbers to it"


def test_line_26_rewards_and_advantages_are_whitened_over_all_processes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    options = {"whiten_rewards": True, "cut_completions": "scored", "samples_per_prompt": 2, "minibatches": 2, "kl_target": 0.5}
    options |= {"updates": 6, "checkpoint_seconds": 3600}
    inputs = undisturbed.inputs["ppo_finetune"]
    together, alone = (run("ppo_finetune", f"s3://rankloop/whitened-{n}", inputs, processes=n, **options) for n in (2, 1))
    assert_learned_alike(together, alone.outputs, tmp_path)


@pytest.mark.parametrize(
    ("stage", "options", "then"),
    [
        ("train_sft", {}, {}),
        ("train_reward_model", {"lora_rank": 2}, {"processes": 2, "shard": True}),
        ("dpo_finetune", {}, {"processes": 2, "shard": True}),
        ("ppo_finetune", {}, {}),
        ("ppo_finetune", UNEVEN, {"processes": 3, "shard": True}),
    ],
    ids=["sft-then-whole", "reward-model-with-adapters", "dpo", "ppo-then-whole", "ppo-of-uneven-passes"],
)
def test_layers_divided_over_the_processes_learn_the_same(
    stage: str, options: dict[str, Any], then: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """From a checkpoint that divided layers left, too."""
    root, inputs = f"s3://rankloop/divided-{stage}", undisturbed.inputs[stage]
    stopped = StageProcess(stage, root, inputs, pause_after=5, processes=2, shard=True, checkpoint_seconds=3600, **options)
    stopped.signal(signal.SIGTERM)
    ended = stopped.ended()
    assert ended.returncode == 75, ended.stderr
    done = run(stage, root, inputs, checkpoint_seconds=3600, **options, **then)
    assert "continuing after" in done.stderr
    whole = run(stage, root + "-not", inputs, checkpoint_seconds=3600, **options) if options else None
    assert_learned_alike(done, whole.outputs if whole else undisturbed.outputs[stage], tmp_path)


def test_divided_layers_play_all_roles_on_one_base(services: LocalServices, tmp_path: Path) -> None:
    """PPO with adapters on the last of two layers: the lower one is the trunk, and both are divided.

    One process has two prompts and the other one; in each step one of them has no row; answers end at different lengths.
    """
    root = "s3://rankloop/divided-roles"
    snapshot = publish_snapshot(root)
    sft = run("train_sft", root, snapshot, layers=2, epochs=8).outputs
    adapters = {"lora_rank": 2, "lora_layers": 1}
    scorers = run("train_reward_model", root, {**snapshot, **sft}, ensemble_members=2, **adapters).outputs
    inputs = {**snapshot, "sft_uri": sft["policy_uri"], **scorers}
    options = {**adapters, "updates": 8, "batch_prompts": 3, "minibatches": 3, "max_new_tokens": 32}
    options |= {"activation_checkpointing": True, "checkpoint_seconds": 3600}
    alone = run("ppo_finetune", root, inputs, **options)
    divided = run("ppo_finetune", root + "-2", inputs, **options, processes=2, shard=True)
    assert_learned_alike(divided, alone.outputs, tmp_path)
    ended = [row["eos_fraction"] for row in contents(divided.uri)["training.jsonl"]]
    assert any(0 < each < 1 for each in ended), "or no process ever waited for another one's rollout"


@pytest.mark.parametrize("stage", ["train_reward_model", "ppo_finetune"])
def test_told_to_stop_two_processes_save_once_and_three_go_on(stage: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    root, inputs = f"s3://rankloop/two-then-three-{stage}", undisturbed.inputs[stage]
    process = StageProcess(stage, root, inputs, pause_after=2, processes=2, checkpoint_seconds=3600)
    process.signal(signal.SIGTERM)
    ended = process.ended()
    assert ended.returncode == 75, ended.stderr
    assert "was asked to stop (SIGTERM); its checkpoint is saved" in ended.stderr
    assert [item.uri.rpartition("/")[2] for item in Storage().list(root + "/")] in (["reward.safetensors"], ["ppo.safetensors"])
    done = run(stage, root, inputs, processes=3, checkpoint_seconds=3600)
    assert "continuing after" in done.stderr
    assert_learned_alike(done, undisturbed.outputs[stage], tmp_path)
    assert not list(Storage().list(root + "/checkpoints/"))


def test_what_one_of_two_processes_finds_wrong_is_what_the_stage_says(undisturbed: Undisturbed) -> None:
    """Both diverge at the same step, because the loss is that of the whole batch."""
    inputs = undisturbed.inputs["train_sft"]
    ended = run("train_sft", "s3://rankloop/diverged-together", inputs, processes=2, learning_rate=1e30)
    assert ended.returncode == 65, ended.stderr
    assert "train_sft failed: SFT diverged" in ended.stderr


# -- another engine samples: a stand-in, for vLLM is no package of ours (test_vllm.py has the real one) -----------------


@pytest.fixture
def other_engine(tmp_path: Path) -> dict[str, Any]:
    return {"rollout_engine": "vllm", "vllm_python": vllm_stand_in.interpreter(tmp_path), "max_kl_sampler": 1e9}


def test_line_37_another_engine_has_the_right_weights_after_a_kill(undisturbed: Undisturbed, other_engine: dict[str, Any]) -> None:
    """What the stand-in draws depends on every byte of the weights that it is given, in the first update after a resume too."""
    stage, root, inputs = "ppo_finetune", "s3://rankloop/killed-other-engine", undisturbed.inputs["ppo_finetune"]
    once = run(stage, "s3://rankloop/other-engine", inputs, **other_engine)
    assert "vLLM none: a stand-in of the tests samples, on cpu" in once.stderr
    process = StageProcess(stage, root, inputs, pause_after=3, **other_engine)
    process.signal(signal.SIGKILL)
    assert process.ended().returncode == -signal.SIGKILL
    resumed = run(stage, root, inputs, **other_engine)
    assert "continuing after" in resumed.stderr
    assert contents(resumed.uri) == contents(once.uri)
    assert contents(once.uri)["model.safetensors"] != contents(undisturbed.uri(stage))["model.safetensors"]


def test_another_engine_gets_whole_weights_of_divided_layers(undisturbed: Undisturbed, other_engine: dict[str, Any]) -> None:
    """After the first step rounding makes other bytes of the weights, and so other draws."""
    inputs, options = undisturbed.inputs["ppo_finetune"], {**other_engine, "updates": 1, "processes": 2}
    keys = ("reward", "judge_reward", "completion_tokens", "policy_loss", "value_loss", "gradient_norm")
    rows = []
    for shard in (True, False):
        ended = run("ppo_finetune", f"s3://rankloop/divided-other-engine-{shard}", inputs, shard=shard, **options)
        row = contents(ended.uri)["training.jsonl"][0]
        rows.append({key: row[key] for key in keys})
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("how", "told"),
    [("exit", "ended with code 3"), ("kill", "was killed by signal 9"), ("hang", "gave no answer within 1 seconds")],
)
def test_an_engine_that_fails_ends_the_stage_for_a_retry(
    how: str, told: str, undisturbed: Undisturbed, other_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_ENDS", how)
    options = {**other_engine, "vllm_timeout_seconds": 1 if how == "hang" else 100}
    ended = run("ppo_finetune", f"s3://rankloop/engine-{how}", undisturbed.inputs["ppo_finetune"], **options)
    assert ended.returncode == 75
    assert f"vLLM {told}" in ended.stderr
    assert "| the stand-in was told to end here" in ended.stderr
    assert kinds(f"s3://rankloop/engine-{how}") == {"checkpoints"}, "a retry goes on from there"


def test_rollouts_that_are_not_the_policys_end_the_stage_for_good(undisturbed: Undisturbed, other_engine: dict[str, Any]) -> None:
    options = {**other_engine, "max_kl_sampler": 0.1}
    ended = run("ppo_finetune", "s3://rankloop/other-policy", undisturbed.inputs["ppo_finetune"], **options)
    assert ended.returncode == 65
    assert "rollouts at update 0 are not the policy's" in ended.stderr
