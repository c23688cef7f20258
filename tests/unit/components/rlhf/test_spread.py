"""A model's layers on several devices of one process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from components.rlhf import spread
from components.rlhf.models import device, load_policy, load_scorer, new_scorer, save_model
from components.rlhf.records import Message
from components.rlhf.reward import score
from components.rlhf.rollout import completion_logprobs, sample
from components.rlhf.scratch_model import new_model, train_tokenizer

TEXTS = ("please help", "my lamp", "a printer and an oven", "please")
PROMPTS: list[list[Message]] = [[{"role": "user", "content": text}] for _ in range(16) for text in TEXTS]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A policy and a reward model."""
    tokenizer = train_tokenizer(["please help", "my lamp and my oven", "printer"], 300, 64)
    policy, scorer = tmp_path / "policy", tmp_path / "scorer"
    save_model(new_model(tokenizer, layers=3, hidden=16, heads=2, context_tokens=64, seed=0), tokenizer, policy)
    model = new_scorer(policy, seed=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, scorer)
    return policy, scorer


def test_on_two_devices_no_operation_gets_tensors_of_both() -> None:
    """Devices that torch simulates: there are not two of any kind in every machine."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.components.rlhf.two_devices"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = "imaginary:0", "imaginary:1"
    halves = [first, first, second, second]
    assert found["devices"] == [first, second]
    assert found["policy"] == {"layers": halves, "rest": [first], "tied": True}
    assert found["cache"] == halves
    assert found["logits"] == [first, first, [2, 2, 2, 2]], "results come out where input is expected"
    assert found["scorer"] == {"layers": halves, "rest": [first], "scores": first}
    assert second in found["unmoved"], "or the simulation refuses nothing"


def test_spread_over_places_of_one_device_it_answers_reads_and_scores_the_same(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tokenizer = load_policy(folders[0])
    judge = load_scorer(folders[1])[0]
    monkeypatch.setattr(spread, "devices", lambda: [device()] * 2)
    parts, _ = spread.load_spread(lambda place: load_policy(folders[0], "float32", place))
    judging, _ = spread.load_spread(lambda place: load_scorer(folders[1], "float32", place))
    for model in (parts, judging):
        assert all(layer._forward_pre_hooks for layer in model.base_model.layers)
    how: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3, "batch_size": 32}
    answers = sample(whole, tokenizer, PROMPTS, **how)
    again = sample(parts, tokenizer, PROMPTS, **how)
    assert [each.token_ids for each in again] == [each.token_ids for each in answers]
    assert len({len(each.token_ids) for each in answers}) > 1, "or no row ever left the batch"
    read = [completion_logprobs(model, tokenizer, answers, temperature=1.0, max_tokens=1000) for model in (whole, parts)]
    assert all(torch.equal(*each) for each in zip(*read, strict=True))
    scores = [score(model, tokenizer, PROMPTS, [a.text for a in answers], batch_size=4) for model in (judge, judging)]
    assert torch.equal(*scores)
    save_model(parts, tokenizer, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


def test_a_spread_model_is_gone_as_soon_as_nobody_holds_it(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "devices", lambda: [device()] * 2)
    model, _ = spread.load_spread(lambda place: load_policy(folders[0], "float32", place))
    gone = weakref.ref(next(model.parameters()))
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
