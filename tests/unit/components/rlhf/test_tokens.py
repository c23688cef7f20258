"""Prompts, padding and batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.tokens import (
    PromptTooLong,
    encode_completion,
    encode_prompt,
    left_pad,
    length_batches,
    right_pad,
    tight_batches,
)


def test_prompt_ends_where_the_answer_begins(tokenizer: Any) -> None:
    ids, cut = encode_prompt(tokenizer, [{"role": "user", "content": "the cat"}], 20)
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "<|assistant|>"
    assert not cut


def test_line_03_every_completion_ends_with_eos(tokenizer: Any) -> None:
    assert encode_completion(tokenizer, "no")[-1] == tokenizer.eos_token_id
    assert encode_completion(tokenizer, "") == [tokenizer.eos_token_id]


def test_line_04_an_over_long_prompt_is_cut_at_the_front_on_a_message_boundary(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "the cat sat on the mat . " * 4},
        {"role": "assistant", "content": "please restart the router now ."},
        {"role": "user", "content": "a dog"},
    ]
    ids, cut = encode_prompt(tokenizer, turns, 40)
    expected, _ = encode_prompt(tokenizer, [turns[0], turns[3]], 40)
    assert cut
    assert ids == expected  # the system message stays, and the answer to a lost question goes with it


def test_line_04_an_over_long_message_is_cut_on_a_line_boundary(tokenizer: Any) -> None:
    text = "the cat sat on the mat .\n" * 5 + "a dog ran"
    ids, cut = encode_prompt(tokenizer, [{"role": "user", "content": text}], 30)
    decoded = tokenizer.decode(ids)
    assert cut
    assert "a dog ran" in decoded
    assert decoded.startswith("<|user|>the cat sat")


def test_a_line_that_does_not_fit_is_an_error_with_the_numbers(tokenizer: Any) -> None:
    with pytest.raises(PromptTooLong, match="the limit is 5"):
        encode_prompt(tokenizer, [{"role": "user", "content": "the cat sat on the mat ."}], 5)


def test_line_02_right_padding_and_masks() -> None:
    batch = right_pad([[5, 6], [7]], [[8, 1], [1]], pad_id=0)
    assert batch.ids_BT.tolist() == [[5, 6, 8, 1], [7, 1, 0, 0]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.completion_mask_BT.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_line_02_left_padding_for_generation() -> None:
    ids, attention = left_pad([[5, 6], [7]], pad_id=0)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert attention.tolist() == [[1, 1], [0, 1]]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_tight_batches_hold_everything_once_at_the_least_cost(lengths: list[int], budget: int) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(budget + len(group) * max(lengths[i] for i in group) for group in groups)

    found = tight_batches(lengths, budget)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for cuts in itertools.product([False, True], repeat=max(0, min(len(lengths), 9) - 1)):
        groups: list[list[int]] = []
        for place, index in enumerate(order):
            if place == 0 or (place - 1 < len(cuts) and cuts[place - 1]):
                groups.append([])
            groups[-1].append(index)
        assert cost(found) <= cost(groups)


def test_tight_batches_by_hand() -> None:
    """At 5 a pass the two short rows and the long one cost (5 + 24) + (5 + 100) = 134, all apart 137, all together 305."""
    assert tight_batches([10, 100, 12], 5) == [[0, 2], [1]]
    assert tight_batches([10, 100, 12], 500) == [[0, 2, 1]]
    assert tight_batches([], 5) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_length_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
