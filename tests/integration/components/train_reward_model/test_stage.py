"""The stage in this process, against a real object store: ensembles and PPO on them, activations computed again, studies."""

from __future__ import annotations

import json
import signal
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from components.ppo_finetune import stage as ppo
from components.rlhf import reward_training
from components.rlhf.activations import checkpoint_activations
from components.rlhf.models import load_policy, member_folders
from components.rlhf.reward_training import accumulate
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context
from components.services.storage import Storage
from components.train_reward_model import stage
from tests.integration.components.small_world import SmallWorld, publish_small_world
from tests.one_model import expect_one_at_a_time

PPO = {"updates": 1, "batch_prompts": 4, "max_new_tokens": 4, "epochs": 1, "max_kl_reference": 1e3, "max_same_answer_fraction": 1.0}


class Published(NamedTuple):
    """A reward model's URIs, its folder, fetched, and its `rankloop.json` and `accuracy.json`."""

    outputs: stage.Outputs
    folder: Path
    marker: dict[str, Any]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def world(services: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return publish_small_world(tmp_path_factory.mktemp("world"), 60)


def trained(world: SmallWorld, folder: Path, root: str = "", contexts: list[Context] | None = None, **config: Any) -> Published:
    settings = stage.Config(**{"batch_rankings": 8, "threads": 1, **config})
    outputs = world.run(stage, settings, stage.Inputs(snapshot_uri=world.snapshot, policy_uri=world.policy), root, contexts)
    marker = Storage().fetch_folder(outputs.reward_model_uri, folder)
    return Published(outputs, folder, marker, json.loads((folder / "accuracy.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_line_15_members_have_seeds_of_their_own_and_ppo_optimises_what_they_say_together(
    world: SmallWorld, tmp_path: Path, lora_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trained(world, tmp_path / "one", lora_rank=lora_rank)
    with monkeypatch.context() as patched:
        made = expect_one_at_a_time(reward_training, patched, "new_scorer")
        several = trained(world, tmp_path / "several", lora_rank=lora_rank, ensemble_members=3)
    assert len(made) == 4, "the judge, too"
    folders = member_folders(several.folder)
    assert [each.name for each in folders] == ["several", "member-1", "member-2"]
    weights = [load_file(each / "model.safetensors") for each in folders]
    single = load_file(one.folder / "model.safetensors")
    assert all(torch.equal(single[name], weights[0][name]) for name in single), "member 0 is the model that there was before"
    heads = [each["score.weight"] for each in weights]
    assert (heads[0] - heads[1]).abs().max() > 1e-3
    assert (heads[1] - heads[2]).abs().max() > 1e-3
    assert [(each / "adapter").is_dir() for each in folders] == [bool(lora_rank)] * 3
    models = [AutoModelForSequenceClassification.from_pretrained(each) for each in folders]
    centrings = [{"mean": each.config.score_mean, "deviation": each.config.score_deviation} for each in models]
    assert [each["centring"] for each in several.marker["members"]] == centrings
    assert len({each["deviation"] for each in centrings}) == 3
    assert sorted(each["seed"] for each in several.marker["members"]) == [0, 2, 3]  # 1 is the judge's
    assert several.report["overall"]["value"] == several.report["ensemble"]["mean"]["value"] == several.marker["accuracy"]["value"]
    assert several.report["ensemble"]["members"][0]["value"] == one.report["overall"]["value"]
    assert "ensemble" not in one.report
    assert not [p for p in one.folder.rglob("*") if p.name.startswith("member")]

    uris = {"reward_model_uri": several.outputs.reward_model_uri, "judge_model_uri": several.outputs.judge_model_uri}
    inputs = ppo.Inputs(snapshot_uri=world.snapshot, sft_uri=world.policy, **uris)
    done = world.run(ppo, ppo.Config(**PPO, lora_rank=lora_rank, reward_aggregation="worst"), inputs)
    Storage().fetch_folder(done.policy_uri, tmp_path / "policy")
    lines = (tmp_path / "policy" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["reward_disagreement"] > 0 for line in lines)
    load_policy(tmp_path / "policy")

    alone = ppo.Inputs(**{**inputs.model_dump(), "reward_model_uri": one.outputs.reward_model_uri})
    with pytest.raises(DoNotRetry, match="the reward model is no ensemble"):
        world.run(ppo, ppo.Config(**PPO, lora_rank=lora_rank, reward_aggregation="worst"), alone)


def test_activations_computed_again_give_the_same_models(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    def spied(backbone: Any) -> None:
        done.append(backbone)
        checkpoint_activations(backbone)

    for module in (reward_training, ppo):
        monkeypatch.setattr(module, "checkpoint_activations", spied)
    models, policies = [], []
    for number, again in enumerate((False, True)):
        models.append(trained(world, tmp_path / str(number), activation_checkpointing=again))
        uris = {"reward_model_uri": models[0].outputs.reward_model_uri, "judge_model_uri": models[0].outputs.judge_model_uri}
        inputs = ppo.Inputs(snapshot_uri=world.snapshot, sft_uri=world.policy, **uris)
        policy = world.run(ppo, ppo.Config(**PPO, activation_checkpointing=again), inputs).policy_uri
        Storage().fetch_folder(policy, tmp_path / f"policy-{number}")
        policies.append(load_file(tmp_path / f"policy-{number}" / "model.safetensors"))
        assert len(done) == 4 * again  # reward model, judge, policy, value model
    weights = [load_file(each.folder / "model.safetensors") for each in models]
    for one, other in (weights, policies):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_study_changes_no_model_and_a_stopped_one_goes_on_where_it_was(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"curve_points": 2, "checkpoint_seconds": 3600, "batch_rankings": 4}
    root = f"s3://rankloop/rm/{uuid.uuid4().hex}"
    contexts: list[Context] = []
    steps: list[int] = []
    stop_at = 0

    def counted(*arguments: Any) -> tuple[float, float]:
        steps.append(1)
        if len(steps) == stop_at:
            contexts[-1].on_signal(signal.SIGTERM, None)
        return accumulate(*arguments)

    monkeypatch.setattr(reward_training, "accumulate", counted)
    plain = trained(world, tmp_path / "plain", batch_rankings=4)
    mains, steps = len(steps), []
    whole = trained(world, tmp_path / "whole", **config)
    uninterrupted, steps = len(steps), []
    for place in (mains + 2, mains + uninterrupted - 1):  # in the first subset of the curve, and in the last
        stop_at = place
        with pytest.raises(Retry, match="its checkpoint is saved"):
            trained(world, tmp_path / "stopped", root, contexts, **config)
    stop_at = 0
    again = trained(world, tmp_path / "again", root, contexts, **config)
    assert len(steps) == uninterrupted + 2 * mains, "only reward model and judge are trained again: they had no checkpoint yet"
    assert again.report == whole.report
    for name, weights in load_file(plain.folder / "model.safetensors").items():
        assert torch.equal(weights, load_file(again.folder / "model.safetensors")[name])
    assert {key: value for key, value in whole.report.items() if key != "curve"} == plain.report
    assert not list(Storage().list(root + "/checkpoints/"))

    curve = whole.report["curve"]
    assert curve["points"][2]["value"] == plain.report["overall"]["value"]
    assert [each["rankings"] for each in curve["points"]] == [plain.marker["rankings"] // part for part in (4, 2, 1)]


def test_a_study_that_cannot_work_is_refused_before_anything_is_trained(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_training, "accumulate", None)
    with pytest.raises(DoNotRetry, match="fewer than one batch of 8"):
        trained(world, tmp_path, curve_points=4)
