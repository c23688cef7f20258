"""An ensemble of reward models as roles, and its score as the reward."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from components.ppo_finetune.engine import roll_out
from components.ppo_finetune.roles import Roles, load_roles
from components.ppo_finetune.stage import Config
from components.ppo_finetune.update import look_at, statistics
from components.rlhf.models import load_scorer, member_folders
from components.rlhf.reward import Centring
from components.rlhf.tokens import encode_prompt

PROMPTS = ["the cat", "a dog ran", "restart the router", "no"]
LAMBDA = 0.7


@pytest.fixture(scope="module")
def ensemble(folders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward model, and the judge's weights as two further members of other scale."""
    root: Path = tmp_path_factory.mktemp("ensemble") / "reward"
    shutil.copytree(folders["reward"], root)
    for number, deviation in ((1, 2.0), (2, 0.1)):
        shutil.copytree(folders["judge"], root / f"member-{number}")
        config = root / f"member-{number}" / "config.json"
        text = config.read_text(encoding="utf-8")
        assert '"score_deviation": 0.5' in text
        config.write_text(text.replace('"score_deviation": 0.5', f'"score_deviation": {deviation}'), encoding="utf-8")
    return root


def _roles(folders: dict[str, Any], reward: Path) -> Roles:
    return load_roles(folders["sft"], reward, folders["judge"], precision="float32", seed=0, **folders["adapter"])


def test_members_are_found_in_order(ensemble: Path, folders: dict[str, Any]) -> None:
    assert [each.name for each in member_folders(ensemble)] == ["reward", "member-1", "member-2"]
    assert member_folders(folders["reward"]) == [folders["reward"]]


def test_line_15_the_reward_is_what_the_members_folders_say_in_plain_transformers(folders: dict[str, Any], ensemble: Path) -> None:
    roles = _roles(folders, ensemble)
    config = Config(batch_prompts=4, max_new_tokens=6, cut_completions="scored", variance_weight=LAMBDA)
    prompts = [encode_prompt(roles.tokenizer, [{"role": "user", "content": text}], 40)[0] for text in PROMPTS]
    completions = roll_out(config, roles, prompts, torch.Generator().manual_seed(0))
    said = []
    for folder in member_folders(ensemble):
        model, _ = load_scorer(folder)
        centring = Centring.of(model.config)
        ends = [[] if c.ended else [roles.tokenizer.eos_token_id] for c in completions]
        rows = [torch.tensor([[*c.prompt_ids, *c.token_ids, *end]]) for c, end in zip(completions, ends, strict=True)]
        said.append([(model(row).logits.item() - centring.mean) / centring.deviation for row in rows])
    columns = list(zip(*said, strict=True))
    means = [sum(each) / 3 for each in columns]
    variances = [sum((x - mean) ** 2 for x in each) / 3 for each, mean in zip(columns, means, strict=True)]
    expected = {
        "mean": means,
        "worst": [min(each) for each in columns],
        "mean_minus_variance": [mean - LAMBDA * variance for mean, variance in zip(means, variances, strict=True)],
    }
    for how, scores in expected.items():
        experience = look_at(config.model_copy(update={"reward_aggregation": how}), roles, completions)
        assert experience.scores_B.tolist() == pytest.approx(scores, abs=2e-3)
        disagreement = statistics(experience)["reward_disagreement"]
        assert disagreement == pytest.approx(sum(v**0.5 for v in variances) / len(variances), abs=1e-3)
    assert min(variances) > 0.01


def test_line_15_a_missing_eos_replaces_the_ensembles_score_too(folders: dict[str, Any], ensemble: Path) -> None:
    roles, config = _roles(folders, ensemble), Config(max_new_tokens=3, reward_aggregation="worst", no_eos_score=-7.5)
    prompts = [encode_prompt(roles.tokenizer, [{"role": "user", "content": text}], 40)[0] for text in PROMPTS]
    experience = look_at(config, roles, roll_out(config, roles, prompts, torch.Generator().manual_seed(0)))
    ended = torch.tensor([c.ended for c in experience.completions])
    assert not ended.all()
    assert (experience.scores_B[~ended] == -7.5).all()


def test_the_value_model_starts_from_the_first_member_and_a_single_model_has_no_disagreement(
    folders: dict[str, Any], ensemble: Path
) -> None:
    ids = torch.tensor([[5, 9, 12, 7, 30]])
    several, one = _roles(folders, ensemble), _roles(folders, folders["reward"])
    torch.testing.assert_close(several.value.head(several.value.hidden(ids)), one.value.head(one.value.hidden(ids)))
    assert len(several.members) == 3
    assert several.policy.trainable
    assert not [p for member in several.members for p in member.role.trainable]
    prompts = [encode_prompt(one.tokenizer, [{"role": "user", "content": "no"}], 40)[0]]
    config = Config(max_new_tokens=3)
    experience = look_at(config, one, roll_out(config, one, prompts, torch.Generator().manual_seed(0)))
    assert "reward_disagreement" not in statistics(experience)
