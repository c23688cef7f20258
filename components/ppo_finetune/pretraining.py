"""Plain text for PPO's pretraining mix: what the policy must not forget while it is optimised (Ouyang 2022, "PPO-ptx")."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.rlhf.tokens import Encoded
from components.services.json_lines import read_json_lines
from components.services.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_texts(uri: str, storage: Storage) -> list[str]:
    """JSON lines `{"text": …}` from a file or an S3 object, gzip or not.

    Raises:
        DoNotRetry: the file is missing, or a line is not a text; the message names the line.
    """
    return read_json_lines(uri, storage, _text, what="pretraining text", form='{"text": …}')


def _text(row: Any) -> str:
    if not isinstance(row, dict) or set(row) != {"text"}:
        raise ValueError("expected an object with the key text")
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("text must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character: {error}") from error
    return text


def windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[Encoded]:
    """The texts, each ended by EOS, in windows of at most `max_tokens` tokens: the first token is given, the rest is learned.

    A window of one token has nothing to learn and is left out.
    """
    found = []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for first in range(0, len(ids), max_tokens):
            window = ids[first : first + max_tokens]
            if len(window) > 1:
                found.append(Encoded(window[:1], window[1:]))
    return found


def examples_of_update(windows: Sequence[Encoded], update: int, count: int, seed: int) -> list[Encoded]:
    """The windows that update number `update` learns from: drawn by seed and number, so that a resumed run draws the same."""
    return random.Random(f"pretraining-{seed}-{update}").choices(windows, k=count) if windows else []
