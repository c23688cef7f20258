"""Sampling and log-probabilities, against plain forwards of Hugging Face."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.rlhf import rollout
from components.rlhf.models import policy_role
from components.rlhf.rollout import completion_logprobs, sample, sample_tokens, token_logprobs
from components.rlhf.tokens import Batch, encode_prompt, right_pad


def _draw(model: Any, tokenizer: Any, prompts: list[list[int]], seed: int = 0, tokens: int = 12, temperature: float = 1.0) -> Any:
    return sample_tokens(
        policy_role(model),
        prompts,
        max_new_tokens=tokens,
        temperature=temperature,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.fixture
def encoded(tokenizer: Any, prompts: Any) -> list[list[int]]:
    return [encode_prompt(tokenizer, prompt, 40)[0] for prompt in prompts]


def _make_eos_likely(model: Any, tokenizer: Any) -> None:
    """Every tenth token or so is EOS, so that rows end at different times."""
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    model.lm_head.bias.data[tokenizer.eos_token_id] = 3.5


def test_line_02_sampled_logprobs_are_those_of_a_forward_without_cache_or_padding(model: Any, tokenizer: Any, encoded: Any) -> None:
    """Left padding, positions, the cache and rows that leave the batch must not show."""
    _make_eos_likely(model, tokenizer)
    drawn = _draw(model, tokenizer, encoded, temperature=0.7, tokens=20)
    assert len({len(ids) for ids, _ in drawn}) > 1
    for prompt, (ids, logprobs) in zip(encoded, drawn, strict=True):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / 0.7
        logits[:, tokenizer.pad_token_id] = -torch.inf
        expected = torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
        assert tokenizer.eos_token_id not in ids[:-1]  # nothing after the first EOS
        assert tokenizer.pad_token_id not in ids


def test_token_logprobs_are_invariant_to_padding_and_batch(model: Any, tokenizer: Any, encoded: Any) -> None:
    answers = [ids for ids, _ in _draw(model, tokenizer, encoded)]
    role, pad = policy_role(model), tokenizer.pad_token_id
    together, _ = token_logprobs(role, right_pad(encoded, answers, pad), temperature=1.0, pad_id=pad)
    for row, (prompt, answer) in enumerate(zip(encoded, answers, strict=True)):
        alone, _ = token_logprobs(role, right_pad([prompt], [answer], pad), temperature=1.0, pad_id=pad)
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
        assert (together[row, alone.shape[1] :] == 0).all()


def test_mistake_logits_chunks_change_neither_values_nor_gradients(
    model: Any, tokenizer: Any, encoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rollout logits kept would be [B, T, V]; here one chunk of tokens at a time exists, in the backward pass too."""
    answers = [ids for ids, _ in _draw(model, tokenizer, encoded)]
    batch, pad = right_pad(encoded, answers, tokenizer.pad_token_id), tokenizer.pad_token_id
    results = []
    for size in (2**30, 4 * len(tokenizer) * 3):  # all at once; three tokens at a time
        monkeypatch.setattr(rollout, "LOGIT_BYTES", size)
        model.zero_grad()
        logprobs, entropy = token_logprobs(
            policy_role(model, trainable=True), batch, temperature=0.9, pad_id=pad, with_entropy=True
        )
        logprobs.sum().backward()
        results.append((logprobs.detach(), entropy, model.lm_head.weight.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class _Largest(TorchDispatchMode):
    """Sees every tensor that is made, in forward and backward passes, and keeps the largest size."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor))])
        return made


def test_mistake_logits_no_tensor_is_as_large_as_all_logits(
    model: Any, tokenizer: Any, encoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One library keeps [B, T, V] in float32: 5 GB for 16 answers of 512 tokens from a vocabulary of 152,000."""
    answers = [ids for ids, _ in _draw(model, tokenizer, encoded * 2, tokens=20)]
    batch, pad = right_pad(encoded * 2, answers, tokenizer.pad_token_id), tokenizer.pad_token_id
    tokens, vocabulary = sum(map(len, answers)), len(tokenizer)

    def largest(logit_bytes: int) -> int:
        monkeypatch.setattr(rollout, "LOGIT_BYTES", logit_bytes)
        with _Largest() as seen:
            logprobs, _ = token_logprobs(policy_role(model, trainable=True), batch, temperature=1.0, pad_id=pad, with_entropy=True)
            logprobs.sum().backward()
        return seen.numbers

    assert largest(2**30) >= tokens * vocabulary, "this would see it"
    assert largest(4 * vocabulary * 8) < tokens * vocabulary / 4


def test_entropy_is_that_of_the_distribution(model: Any, tokenizer: Any, encoded: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform over everything but padding
    batch = right_pad(encoded[:1], [[5, 6, tokenizer.eos_token_id]], tokenizer.pad_token_id)
    pad = tokenizer.pad_token_id
    logprobs, entropy = token_logprobs(policy_role(model), batch, temperature=1.0, pad_id=pad, with_entropy=True)
    expected = torch.tensor(float(len(tokenizer) - 1)).log()
    torch.testing.assert_close(entropy[batch.completion_mask_BT], expected.expand(3))
    torch.testing.assert_close(logprobs[batch.completion_mask_BT], -expected.expand(3))


def test_line_16_sampling_follows_the_softmax_at_the_temperature(model: Any, tokenizer: Any, encoded: Any) -> None:
    """Pearson's chi-squared over 4000 first tokens stays below the 0.1 % point of its distribution."""
    prompt, count, temperature = encoded[0], 4000, 0.8
    drawn = _draw(model, tokenizer, [prompt] * count, tokens=1, temperature=temperature)
    logits = model(torch.tensor([prompt])).logits[0, -1].float() / temperature
    logits[tokenizer.pad_token_id] = -torch.inf
    expected = torch.softmax(logits, -1) * count
    seen = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=len(expected)).float()
    keep = expected > 5
    statistic = float(((seen - expected)[keep].square() / expected[keep]).sum())
    freedom = int(keep.sum()) - 1
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 6


def test_line_20_the_same_seed_draws_the_same_and_another_does_not(model: Any, tokenizer: Any, encoded: Any) -> None:
    first, again, other = (_draw(model, tokenizer, encoded, seed)[0][0] for seed in (1, 1, 2))
    assert first == again != other


def test_what_a_row_draws_does_not_depend_on_when_others_end(model: Any, tokenizer: Any, encoded: Any) -> None:
    _make_eos_likely(model, tokenizer)
    both = _draw(model, tokenizer, encoded[:2], tokens=20)
    changed = _draw(model, tokenizer, [encoded[0], encoded[3]], tokens=20)
    assert both[0][0] == changed[0][0]


def test_line_16_sampling_has_no_knob_but_temperature() -> None:
    """top-k, top-p and penalties break the KL estimate."""
    knobs = set(inspect.signature(sample).parameters) | set(inspect.signature(sample_tokens).parameters)
    assert not {name for name in knobs if name.startswith(("top", "repetition", "typical", "min_p", "penalty"))}


def test_line_18_a_sample_is_text_without_eos_and_says_whether_it_came(model: Any, tokenizer: Any, prompts: Any) -> None:
    _make_eos_likely(model, tokenizer)
    done = sample(model, tokenizer, prompts * 4, max_new_tokens=6, temperature=1.0, seed=0, batch_size=3)
    assert len(done) == len(prompts) * 4
    assert {c.ended for c in done} == {True, False}
    for c in done:
        assert c.ended == (c.token_ids[-1] == tokenizer.eos_token_id)
        assert "<|end|>" not in c.text
        assert len(c.token_ids) <= 6
    again = completion_logprobs(model, tokenizer, done, temperature=1.0, max_tokens=100)
    for c, logprobs in zip(done, again, strict=True):
        torch.testing.assert_close(c.logprobs, logprobs, atol=1e-4, rtol=1e-4)


def test_empty_completion_mask_gives_zeros(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool))
    pad = tokenizer.pad_token_id
    logprobs, entropy = token_logprobs(policy_role(model), batch, temperature=1.0, pad_id=pad, with_entropy=True)
    assert logprobs.abs().sum() == 0
    assert entropy.abs().sum() == 0


def test_prompts_that_are_read_in_groups_give_what_they_give_at_once(model: Any, tokenizer: Any, encoded: Any) -> None:
    def drawn(prefill_tokens: int, samples: int) -> Any:
        return sample_tokens(
            policy_role(model),
            encoded,
            max_new_tokens=8,
            temperature=1.0,
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
            generator=torch.Generator().manual_seed(3),
            samples=samples,
            prefill_tokens=prefill_tokens,
        )

    longest = max(map(len, encoded))
    for samples in (1, 2):
        for tokens in (1, 2 * longest):
            for (ids, logprobs), (wanted, expected) in zip(drawn(tokens, samples), drawn(0, samples), strict=True):
                assert ids == wanted
                torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
