"""A language model of a few thousand parameters, its tokenizer, and prompts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from components.rlhf.scratch_model import new_model, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = ["the cat sat on the mat .", "a dog ran to the red house .", "please restart the router now .", "no , thank you ."]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, vocabulary=320, context_tokens=64)


@pytest.fixture
def model(tokenizer: Any) -> PreTrainedModel:
    return new_model(tokenizer, layers=2, hidden=16, heads=2, context_tokens=64, seed=0)


@pytest.fixture
def prompts() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in TEXTS]
