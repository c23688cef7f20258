"""What SFT learns from, and that its loss is that of the completion's tokens alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.rlhf.likelihood import add_nll_gradient
from components.rlhf.models import policy_role
from components.rlhf.records import Message, Ranking
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.exits import DoNotRetry
from components.train_sft.examples import Example, from_rankings, read_demonstrations
from components.train_sft.stage import encode

NO_STORE: Any = None


def ranking(completions: list[str], ranks: list[int]) -> Ranking:
    return Ranking("1", [Message(role="user", content="why ?")], completions, ranks, "r", "s", None, None, None, None, "train")


def test_all_completions_once_or_only_what_was_ranked_first() -> None:
    given = [ranking(["a", "b", "c"], [2, 1, 1]), ranking(["b", "d"], [1, 2])]
    assert [e.completion for e in from_rankings(given, "all")] == ["a", "b", "c", "d"]
    assert [e.completion for e in from_rankings(given, "top")] == ["b", "c"]


def test_the_same_answer_to_another_prompt_is_another_example() -> None:
    given = [ranking(["a", "b"], [1, 2]), ranking(["a", "b"], [1, 2])._replace(prompt=[Message(role="user", content="how ?")])]
    assert [(e.prompt[0]["content"], e.completion) for e in from_rankings(given, "all")] == [
        ("why ?", "a"),
        ("why ?", "b"),
        ("how ?", "a"),
        ("how ?", "b"),
    ]


def test_demonstrations_are_read_plain_and_compressed(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why ?"}]
    data = "".join(
        json.dumps(row) + "\n" for row in ({"prompt": "why ?", "completion": "so"}, {"prompt": chat, "completion": "ok"})
    )
    (tmp_path / "plain").write_text(data, encoding="utf-8")
    (tmp_path / "packed").write_bytes(gzip.compress(data.encode()))
    expected = [Example([Message(role="user", content="why ?")], "so"), Example([Message(**m) for m in chat], "ok")]
    assert read_demonstrations(str(tmp_path / "plain"), NO_STORE) == expected
    assert read_demonstrations(str(tmp_path / "packed"), NO_STORE) == expected


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "completion": "b"',
        '["a", "b"]',
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": "b", "more": 1}',
        '{"prompt": [], "completion": "b"}',
        '{"prompt": "a", "completion": " "}',
        '{"prompt": " ", "completion": "b"}',
        '{"prompt": [{"role": "robot", "content": "a"}], "completion": "b"}',
        '{"prompt": [{"role": "user"}], "completion": "b"}',
        '{"prompt": ["a"], "completion": "b"}',
        '{"prompt": [{"role": "user", "content": 3}], "completion": "b"}',
        '{"prompt": "a", "completion": "half a smile \\ud83d"}',
        '{"prompt": "half a smile \\ud83d", "completion": "b"}',
    ],
)
def test_a_line_that_is_no_demonstration_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "demos.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"demos\.jsonl, line 3: not a demonstration"):
        read_demonstrations(str(path), NO_STORE)


def test_a_missing_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(DoNotRetry, match="are not a file") as failed:
            read_demonstrations(str(path), NO_STORE)
        assert str(path) in failed.value.message
        assert failed.value.remedy == "give a JSONL file or an s3:// URI"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"))
    with pytest.raises(DoNotRetry, match="line 1"):
        read_demonstrations(str(tmp_path / "latin"), NO_STORE)
    (tmp_path / "cut").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 100)[:30])
    with pytest.raises(DoNotRetry, match="cut"):
        read_demonstrations(str(tmp_path / "cut"), NO_STORE)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DoNotRetry, match="no demonstrations"):
        read_demonstrations(str(tmp_path / "empty"), NO_STORE)


def test_the_loss_counts_completion_tokens_and_eos_alone_whatever_the_micro_batches() -> None:
    tokenizer = train_tokenizer(["my printer is slow and my phone is loud"], 300, 64)
    model = new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=64, seed=0)
    prompts = ("my printer", "my phone is slow and loud", "slow")
    examples = [Example([Message(role="user", content=text)], "is " * (i + 1)) for i, text in enumerate(prompts)]
    encoded, left_out = encode(tokenizer, examples, 64)
    assert left_out == 0
    total, count = torch.zeros(()), 0
    for each in encoded:
        assert each.completion_ids[-1] == tokenizer.eos_token_id
        ids = torch.tensor([[*each.prompt_ids, *each.completion_ids]])
        logits = model(ids).logits[0, :-1]
        logits[:, tokenizer.pad_token_id] = -torch.inf  # a policy never says padding
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[len(each.prompt_ids) - 1 :, 0]
        assert len(chosen) == len(each.completion_ids)
        total, count = total - chosen.sum(), count + len(chosen)
    model.zero_grad()
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for micro_batch_tokens in (8, 1000):
        model.zero_grad()
        loss = add_nll_gradient(policy_role(model, trainable=True), encoded, tokenizer.pad_token_id, micro_batch_tokens)
        assert loss == pytest.approx((total / count).item(), abs=1e-5)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_what_does_not_fit_is_counted_and_nothing_that_fits_is_an_error() -> None:
    tokenizer = train_tokenizer(["my printer is slow"], 300, 64)
    examples = [Example([Message(role="user", content="slow")], text) for text in ("is", "is " * 60)]
    assert encode(tokenizer, examples, 32)[1] == 1
    with pytest.raises(DoNotRetry, match="no example fits the context of 8 tokens"):
        encode(tokenizer, examples[1:], 8)
