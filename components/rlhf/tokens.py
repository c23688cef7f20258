"""Conversations as token ids: prompts, completions, padding.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from components.rlhf.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Batch(NamedTuple):
    """Prompts with their completions, right-padded.

    Fields:
        ids_BT: token ids, int64; padding holds the pad id.
        attention_BT: 1 on real tokens, int64.
        completion_mask_BT: True on completion tokens, EOS included; False on prompt and padding.
        trunk_BTD: hidden states below the first layer that carries an adapter, where they are known (`rlhf.trunk`).
    """

    ids_BT: Tensor
    attention_BT: Tensor
    completion_mask_BT: Tensor
    trunk_BTD: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if each is None else each.to(device) for each in self))

    def rows(self, index_B: Tensor, length: int) -> Batch:
        """Some of the rows, cut to a length."""
        return Batch(*(None if each is None else each[index_B, :length] for each in self))


class PromptTooLong(ValueError):
    """Not even the end of the prompt's last message fits."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], max_tokens: int) -> tuple[list[int], bool]:
    """Token ids of a prompt up to where the assistant's answer begins, and whether something was cut.

    A prompt over `max_tokens` is cut at the front: the oldest messages go first (a system message stays), then the first lines of
    the last message.

    Raises:
        PromptTooLong: the last line alone is over the limit.
    """
    system = [m for m in prompt[:1] if m["role"] == "system"]
    turns = list(prompt[len(system) :])
    ids = _render(tokenizer, [*system, *turns])
    if len(ids) <= max_tokens:
        return ids, False
    while len(turns) > 1:
        turns = turns[1:]
        if turns[0]["role"] == "assistant" and len(turns) > 1:
            continue  # a conversation begins with the user
        ids = _render(tokenizer, [*system, *turns])
        if len(ids) <= max_tokens:
            return ids, True
    lines = turns[-1]["content"].splitlines()
    for first in range(1, len(lines)):
        ids = _render(tokenizer, [*system, {"role": turns[-1]["role"], "content": "\n".join(lines[first:])}])
        if len(ids) <= max_tokens:
            return ids, True
    raise PromptTooLong(f"the last line of the prompt has {len(ids)} tokens with its frame, and the limit is {max_tokens}")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a completion, ended by EOS: what models are trained and scored on."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def right_pad(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Joins each prompt with its completion and pads on the right, so that positions are plain 0, 1, 2, ..."""
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids_BT = torch.full((len(prompts), length), pad_id)
    attention_BT = torch.zeros((len(prompts), length), dtype=torch.long)
    completion_mask_BT = torch.zeros((len(prompts), length), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids_BT[row, :end] = torch.tensor([*prompt, *completion])
        attention_BT[row, :end] = 1
        completion_mask_BT[row, len(prompt) : end] = True
    return Batch(ids_BT, attention_BT, completion_mask_BT)


class Joined(NamedTuple):
    """Prompts, each followed by all its completions: what they share stands there once.

    Fields:
        ids_BT: token ids, right-padded; a row is one prompt and its completions.
        attention_BTT: True where token t may look at token s: at the prompt and at its own completion, not ahead.
        positions_BT: each completion's positions follow on the prompt's, as if it stood there alone.
        row_N, last_N: where each completion's last token is, completion by completion.
    """

    ids_BT: Tensor
    attention_BTT: Tensor
    positions_BT: Tensor
    row_N: Tensor
    last_N: Tensor


def join(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], pad_id: int) -> Joined:
    """Puts the completions of each prompt behind it, in one row."""
    length = max(len(p) + sum(map(len, each)) for p, each in zip(prompts, completions, strict=True))
    ids_BT = torch.full((len(prompts), length), pad_id)
    segment_BT = torch.full((len(prompts), length), -1)  # 0 prompt, 1... completions, -1 padding
    positions_BT = torch.zeros((len(prompts), length), dtype=torch.long)
    row, last = [], []
    for b, (prompt, each) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt)
        ids_BT[b, :end] = torch.tensor(prompt)
        segment_BT[b, :end] = 0
        positions_BT[b, :end] = torch.arange(end)
        for number, completion in enumerate(each, 1):
            start, end = end, end + len(completion)
            ids_BT[b, start:end] = torch.tensor(completion)
            segment_BT[b, start:end] = number
            positions_BT[b, start:end] = len(prompt) + torch.arange(len(completion))
            row.append(b)
            last.append(end - 1)
    seen_B1T = segment_BT[:, None]
    same_BTT = segment_BT[:, :, None] == seen_B1T
    ahead_TT = torch.ones((length, length), dtype=torch.bool).triu(1)
    return Joined(ids_BT, (same_BTT | (seen_B1T == 0)) & ~ahead_TT, positions_BT, torch.tensor(row), torch.tensor(last))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left for generation, as (ids_BT, attention_BT)."""
    length = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), length), pad_id)
    attention_BT = torch.zeros((len(prompts), length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_BT[row, length - len(prompt) :] = 1
    return ids_BT, attention_BT


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length so that rows x longest row stays within `max_tokens` (one row at least)."""
    batches: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[index] > max_tokens:
            batches.append(current)
            current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches


def tight_batches(lengths: Sequence[int], pass_tokens: int = 256) -> list[list[int]]:
    """Indices grouped by similar length so that all forward passes together, one a group, cost least.

    A pass of n rows costs n x its longest row in tokens, and `pass_tokens` besides: what its calls take whatever their size, in the
    time of so many tokens. 256 is a guess between large models on a CPU (fewer) and small ones on a GPU (more); it is not tuned.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    least: list[tuple[int, int]] = [(0, 0)]  # of the first rows: the cost, and where the last group begins
    for end, index in enumerate(order, 1):
        least.append(min((least[first][0] + pass_tokens + (end - first) * lengths[index], first) for first in range(end)))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        first = least[end][1]
        groups.append(order[first:end])
        end = first
    return groups[::-1]


class Encoded(NamedTuple):
    """An example as token ids; the completion ends with EOS."""

    prompt_ids: list[int]
    completion_ids: list[int]


def show(tokenizer: PreTrainedTokenizerBase, example: Encoded) -> str:
    """One tokenised example, readable, with a bar where the completion begins."""
    prompt, completion = (tokenizer.convert_ids_to_tokens(ids) for ids in example)
    return " ".join([*prompt, "|", *completion])


def micro_batches(examples: Sequence[Encoded], pad_id: int, max_tokens: int, device: torch.device) -> list[Batch]:
    """The examples in length-sorted batches on a device."""
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in examples]
    return [
        right_pad([examples[i][0] for i in rows], [examples[i][1] for i in rows], pad_id).to(device)
        for rows in length_batches(lengths, max_tokens)
    ]
