"""The pretraining mix of PPO: what is read, how it is cut, and what its gradient is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from components.ppo_finetune.engine import roll_out
from components.ppo_finetune.pretraining import examples_of_update, read_texts, windows
from components.ppo_finetune.progress import Progress
from components.ppo_finetune.roles import load_roles
from components.ppo_finetune.stage import Config
from components.ppo_finetune.update import look_at, optimise
from components.rlhf.likelihood import add_nll_gradient, mean_nll
from components.rlhf.models import load_policy, policy_role
from components.rlhf.tokens import Encoded, encode_prompt
from components.services.exits import DoNotRetry

TEXTS = ["the cat sat on the mat .", "a dog ran to the red house ."]


class Letters:
    """A tokenizer of which every letter is a token."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_line_32_texts_are_cut_into_windows_and_end_with_eos() -> None:
    a, b, c = (ord(letter) for letter in "abc")
    found = windows(Letters(), ["abc", "ab", "abcab"], max_tokens=3)  # type: ignore[arg-type]
    assert found == [  # of "abc" EOS stands alone and has nothing to learn
        Encoded([a], [b, c]),
        Encoded([a], [b, 0]),
        Encoded([a], [b, c]),
        Encoded([a], [b, 0]),
    ]


def test_line_32_the_gradient_is_that_of_the_weighted_mean_loss_per_token(folders: dict[str, Any]) -> None:
    """Oracle: cross-entropy of a plain forward pass, text by text."""
    model, tokenizer = load_policy(folders["sft"])
    examples = windows(tokenizer, TEXTS, max_tokens=40)
    plain, _ = load_policy(folders["sft"])
    losses = []
    for prompt, completion in examples:
        ids = torch.tensor([[*prompt, *completion]])
        logits = plain(ids).logits[0, :-1]
        logits[:, tokenizer.pad_token_id] = -1e30
        losses.append(functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean()
    (0.7 * expected).backward()
    for tokens in (30, 10_000):
        model.zero_grad()
        role = policy_role(model, trainable=True)
        loss = add_nll_gradient(role, examples, tokenizer.pad_token_id, tokens, weight=0.7)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_line_32_ppo_forgets_less_with_the_mix(folders: dict[str, Any]) -> None:
    """After the same update the text is likelier where it was mixed in; without the mix its loss is not even computed."""
    after = {}
    for coefficient in (0.0, 2.0):
        roles = load_roles(folders["sft"], folders["reward"], folders["judge"], precision="float32", seed=0, **folders["adapter"])
        texts = windows(roles.tokenizer, TEXTS, max_tokens=40)
        pad = roles.tokenizer.pad_token_id
        config = Config(
            updates=4, batch_prompts=2, max_new_tokens=8, epochs=2, learning_rate=5e-3, pretraining_coefficient=coefficient
        )
        before = mean_nll(roles.policy, texts, pad, 10_000)
        progress = Progress(config, roles)
        prompts = [encode_prompt(roles.tokenizer, [{"role": "user", "content": text}], 40)[0] for text in ("the cat", "a dog")]
        experience = look_at(config, roles, roll_out(config, roles, prompts, torch.Generator().manual_seed(0)))
        row = optimise(
            config,
            roles,
            progress.optimisers,
            experience,
            0.1,
            torch.Generator(),
            critic_only=False,
            pretraining=texts * 2 if coefficient else [],
        )
        after[coefficient] = mean_nll(roles.policy, texts, pad, 10_000)
        if coefficient:
            assert row["pretraining_loss"] < before + 1e-3  # a mean over two steps, of which the second has learned
        else:
            assert "pretraining_loss" not in row
    assert after[2.0] < after[0.0] - 1e-3


def test_a_resumed_run_draws_the_same_examples() -> None:
    every = [Encoded([number], [1]) for number in range(50)]
    drawn = [examples_of_update(every, update, 8, seed=3) for update in range(4)]
    assert drawn == [examples_of_update(every, update, 8, seed=3) for update in range(4)]
    assert len({tuple(e.prompt_ids[0] for e in each) for each in drawn}) == 4
    assert examples_of_update([], 0, 8, seed=3) == []


@pytest.mark.parametrize("line", ["[1]", '{"text": ""}', '{"text": 3}', '{"text": "a", "b": 1}', '{"text": "\\ud800"}', "{"])
def test_a_line_that_is_no_text_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"texts.jsonl, line 2: not a pretraining text"):
        read_texts(str(file), None)  # type: ignore[arg-type]
