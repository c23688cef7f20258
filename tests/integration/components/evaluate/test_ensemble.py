"""Answers scored by an ensemble of reward models, as PPO scored them."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from components.close_run.stage import Config, Inputs
from components.evaluate import answers
from components.evaluate.answers import Drawn, Sampling, aggregated_by, score_all
from components.rlhf.models import load_scorer, new_scorer, save_model
from components.rlhf.records import Message
from components.rlhf.reward import score
from components.rlhf.rollout import Completion
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.launch import Context
from tests.one_model import expect_one_at_a_time

TEXTS = ["please help", "my lamp and my oven", "printer"]
PROMPTS: list[list[Message]] = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]


@pytest.fixture
def context(services: Any, tmp_path: Path) -> Context:
    return Context("close_run", Config(), Inputs(state="SUCCEEDED"), tmp_path)


def test_every_member_scores_and_the_candidates_aggregation_makes_one_of_them(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    save_model(new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=64, seed=0), tokenizer, tmp_path / "base")
    members = [tmp_path / "reward", tmp_path / "reward" / "member-1"]
    for seed, folder in enumerate(members):
        model = new_scorer(tmp_path / "base", seed)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.score_mean, model.config.score_deviation = 0.1 * seed, 1.0 + seed
        save_model(model, tokenizer, folder)
    uri = context.uri("fixtures", uuid.uuid4().hex)
    context.storage.publish_folder(members[0], uri, {"role": "reward_model"})
    by_member = torch.stack([score(*load_scorer(each), PROMPTS, TEXTS, batch_size=4) for each in members])
    assert (by_member[0] - by_member[1]).abs().min() > 1e-3

    said = {row: Completion([1], [1], text, True, torch.zeros(1)) for row, text in enumerate(TEXTS)}
    drawn = Drawn({"candidate": said}, dict.fromkeys(said, 0.0), set(), {}, {}, [], {}, {})
    sampling = Sampling(8, 0, 1.0, 4, 0, "float32")

    def scored(candidate: dict[str, Any]) -> list[float]:
        found = score_all(context, {"reward": uri}, PROMPTS, drawn, sampling, aggregated_by(candidate))
        return [answer.scores["reward"] for answer in found["candidate"]]

    loaded = expect_one_at_a_time(answers, monkeypatch, "load_scorer")
    ppo = {"reward_aggregation": "mean_minus_variance", "variance_weight": 0.5}
    assert scored({}) == pytest.approx(by_member.mean(0).tolist(), abs=1e-5), "a candidate of DPO's"
    assert scored({"config": {"reward_aggregation": "worst"}}) == pytest.approx(by_member.amin(0).tolist(), abs=1e-5)
    assert scored({"config": ppo}) == pytest.approx((by_member.mean(0) - 0.5 * by_member.var(0, correction=0)).tolist(), abs=1e-5)
    assert len(loaded) == 6
