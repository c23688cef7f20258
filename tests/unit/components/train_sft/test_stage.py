"""Examples as token ids, and the loss that they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.rlhf.likelihood import add_nll_gradient, mean_nll
from components.rlhf.models import policy_role
from components.rlhf.records import Message
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.tokens import Encoded
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings
from components.train_sft.examples import Example
from components.train_sft.stage import Config, Inputs, encode, run

CONTEXT_TOKENS = 64
NO_CONTEXT: Any = None
EXAMPLES = [
    Encoded([3, 40, 41, 4], [50, 51, 52, 1]),
    Encoded([3, 42, 4], [1]),
    Encoded([3, 43, 44, 45, 46, 4], [53, 54, 1]),
    Encoded([3, 40, 4], [55] * 12 + [1]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["my printer is slow and my phone is loud"], 300, CONTEXT_TOKENS)


@pytest.fixture
def model(tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    made = new_model(tokenizer, layers=2, hidden=16, heads=2, context_tokens=CONTEXT_TOKENS, seed=0)
    with torch.no_grad():
        for parameter in made.parameters():  # so that the distributions are not uniform
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return made


def said(text: str, *before: str) -> list[Message]:
    turns = [Message(role="user" if i % 2 == 0 else "assistant", content=each) for i, each in enumerate(before)]
    return [*turns, Message(role="user", content=text)]


def plain_loss(model: Any, examples: list[Encoded], pad_id: int) -> torch.Tensor:
    """Mean negative log-likelihood of the completions' tokens, one sequence and one token at a time."""
    losses = []
    for prompt, completion in examples:
        logits = model(torch.tensor([prompt + completion])).logits[0]
        for place, token in enumerate(completion):
            row = logits[len(prompt) - 1 + place]
            others = torch.cat([row[:pad_id], row[pad_id + 1 :]])  # a policy never says padding
            losses.append(others.logsumexp(0) - row[token])
    assert len(losses) == sum(len(e.completion_ids) for e in examples)
    return torch.stack(losses).mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 35, 10_000])
def test_line_28_loss_and_gradient_are_those_of_the_completion_tokens_in_plain_torch(
    micro_batch_tokens: int, model: Any, tokenizer: Any
) -> None:
    expected = plain_loss(model, EXAMPLES, tokenizer.pad_token_id)
    expected.backward()
    by_hand = gradients(model)
    loss = add_nll_gradient(policy_role(model, trainable=True), EXAMPLES, tokenizer.pad_token_id, micro_batch_tokens)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, by_hand[name], atol=1e-5, rtol=1e-5)


def test_line_03_the_end_of_an_answer_is_learned(model: Any, tokenizer: Any) -> None:
    prompt, eos = [3, 42, 4], tokenizer.eos_token_id
    role = policy_role(model, trainable=True)
    optimiser = torch.optim.Adam(role.trainable, 0.01)
    for _ in range(30):
        optimiser.zero_grad()
        add_nll_gradient(role, [Encoded(prompt, [50, eos])], tokenizer.pad_token_id, 100)
        optimiser.step()
    assert model(torch.tensor([[*prompt, 50]])).logits[0, -1].softmax(-1)[eos] > 0.9


def test_what_a_prompt_says_is_not_learned(model: Any, tokenizer: Any) -> None:
    """A prompt's tokens get no gradient at the output: with the last token alone as completion, only that place counts."""
    seen: list[torch.Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        output.last_hidden_state.register_hook(seen.append)

    hook = model.model.register_forward_hook(watch)
    add_nll_gradient(policy_role(model, trainable=True), [Encoded([3, 40, 41, 4], [50, 1])], tokenizer.pad_token_id, 100)
    hook.remove()
    touched = seen[0][0].abs().sum(-1) > 0
    assert touched.tolist() == [False, False, False, True, True, False]


def test_the_held_out_loss_is_that_of_plain_torch_and_leaves_no_gradient(model: Any, tokenizer: Any) -> None:
    expected = plain_loss(model, EXAMPLES, tokenizer.pad_token_id).item()
    for micro_batch_tokens in (1, 35, 10_000):
        found = mean_nll(policy_role(model, trainable=True), EXAMPLES, tokenizer.pad_token_id, micro_batch_tokens)
        assert found == pytest.approx(expected, abs=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_line_03_an_example_is_its_chat_up_to_the_answer_then_the_answer_then_eos(tokenizer: Any) -> None:
    encoded, left_out = encode(tokenizer, [Example(said("is it slow", "my phone", "loud"), "my printer is slow")], CONTEXT_TOKENS)
    assert left_out == 0
    prompt, completion = (tokenizer.decode(ids) for ids in encoded[0])
    assert prompt == "<|user|>my phone<|end|><|assistant|>loud<|end|><|user|>is it slow<|end|><|assistant|>"
    assert completion == "my printer is slow<|end|>"


def test_line_04_a_prompt_is_cut_at_the_front_and_its_completion_never(tokenizer: Any) -> None:
    long = said("is it slow", "my printer " * 6, "my phone " * 6)
    answer = "my phone is loud"
    (whole,), _ = encode(tokenizer, [Example(said("is it slow"), answer)], CONTEXT_TOKENS)
    limit = len(whole.prompt_ids) + len(whole.completion_ids)
    (cut,), left_out = encode(tokenizer, [Example(long, answer)], limit)
    assert (cut, left_out) == (whole, 0)
    assert encode(tokenizer, [Example(long, answer)], limit - 1, required=False) == ([], 1)


def test_line_04_examples_that_do_not_fit_are_counted_and_the_others_keep_their_order(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["my phone", "my " * 70, "slow", "loud " * 70, "is"]
    examples = [Example(said("slow"), text) for text in texts]
    examples[2] = Example(said("slow", "loud " * 70, "my phone"), "slow")
    encoded, left_out = encode(tokenizer, examples, CONTEXT_TOKENS)
    assert left_out == 2
    assert [tokenizer.decode(e.completion_ids[:-1]) for e in encoded] == ["my phone", "slow", "is"]
    assert "2 of 5 examples do not fit the context of 64 tokens and are left out; 1 lost the front" in caplog.text


def test_examples_of_which_none_fits_are_an_error_only_where_some_are_needed(tokenizer: Any) -> None:
    long = [Example(said("slow"), "my " * 70)]
    with pytest.raises(DoNotRetry, match="no example fits the context of 64 tokens") as failed:
        encode(tokenizer, long, CONTEXT_TOKENS)
    assert failed.value.remedy == "use a model with a longer context"
    assert encode(tokenizer, long, CONTEXT_TOKENS, required=False) == ([], 1)


def test_a_random_policy_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(DoNotRetry, match="a random model is not a policy"):
        run(Config(epochs=0), Inputs(snapshot_uri="s3://bucket/none"), NO_CONTEXT)


@pytest.mark.parametrize("key", ["learning_rate", "epochs", "batch_size", "layers", "micro_batch_tokens", "temperature"])
def test_a_value_out_of_bounds_and_an_unknown_key_are_named(key: str) -> None:
    with pytest.raises(DoNotRetry, match=rf"train_sft\.{key}"):
        parse_settings(Config, {key: -1}, "train_sft")
