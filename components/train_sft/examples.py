"""What SFT learns from: demonstrations, or the completions of the rankings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from components.rlhf.records import Message, Ranking, messages_of
from components.services.json_lines import read_json_lines
from components.services.storage import Storage

Which = Literal["all", "top"]


class Example(NamedTuple):
    """A prompt and one answer to it."""

    prompt: list[Message]
    completion: str


def from_rankings(rankings: Iterable[Ranking], which: Which) -> Iterator[Example]:
    """Every completion of the rankings once, or only those that their rater ranked first."""
    seen: set[tuple[str, str]] = set()
    for ranking in rankings:
        prompt_text = json.dumps(ranking.prompt)
        for completion, rank in zip(ranking.completions, ranking.ranks, strict=True):
            if (which == "all" or rank == 1) and (prompt_text, completion) not in seen:
                seen.add((prompt_text, completion))
                yield Example(ranking.prompt, completion)


def read_demonstrations(uri: str, storage: Storage) -> list[Example]:
    """JSON lines `{"prompt": text or messages, "completion": text}` from a file or an S3 object, gzip or not.

    Raises:
        DoNotRetry: the file is missing, or a line is not a demonstration; the message names the line.
    """
    form = '{"prompt": text or messages, "completion": text}'
    return read_json_lines(uri, storage, _example, what="demonstration", form=form)


def _example(row: object) -> Example:
    if not isinstance(row, dict) or set(row) != {"prompt", "completion"}:
        raise ValueError("expected an object with the keys prompt and completion")
    prompt, completion = messages_of(row["prompt"]), row["completion"]
    if not isinstance(completion, str) or not completion.strip():
        raise ValueError("the completion must be a text that is not empty")
    try:
        completion.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character: {error}") from error
    return Example(prompt, completion)
