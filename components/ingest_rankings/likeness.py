"""When two rankings are alike, as keys: equal keys for the same ranking, band keys for near duplicates, a prefix for conversations.

The same ranking: conversation, completions, rater, criterion and order of preference are the same, whatever the id, the source, the
time, the order in which the completions stand, how ties are numbered, and white space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from components.ingest_rankings.formats import dense
from components.rlhf.near_duplicates import band_keys, mix, shingles, similarity
from components.rlhf.records import Message, Ranking

_SPACES = bytes(number for number in range(128) if chr(number).isspace())
SEARCHED_CHARACTERS = 256  # at the end of a conversation, whose MinHash finds candidates; 10 microseconds for 200 of them


class Turns(NamedTuple):
    """Keys of all turns of a conversation but the last, and of the last."""

    before: bytes
    last: bytes


def same_key(ranking: Ranking) -> bytes:
    """16 bytes, equal for two rankings that are the same."""
    ranks, completions = ranking.ranks, ranking.completions
    if ties := len(set(ranks)) < len(ranks):  # those that tie are put into order by what is left of them
        ranks, completions = dense(ranks), ["".join(text.split()) for text in completions]
    ranked = sorted(zip(ranks, completions, strict=True))
    roles, texts = [], []
    for message in ranking.prompt:
        roles.append(message["role"])
        texts.append(message["content"])
    texts += [text for _, text in ranked]
    about = orjson.dumps([ranking.rater_id, ranking.criterion or "", roles, [rank for rank, _ in ranked] if ties else None])
    # No byte of UTF-8 is 0xff, so that the texts stay apart; ASCII's white space is then taken away from all of them in one call.
    whole = b"\xff".join([text.encode() if text.isascii() else "".join(text.split()).encode() for text in texts])
    return hashlib.sha256(about + b"\xff" + whole.translate(None, _SPACES)).digest()[:16]


def turns_of(prompt: Sequence[Message]) -> Turns | None:
    """None for a conversation of one turn: a shared system message makes no shared conversation."""
    if not any(message["role"] == "user" for message in prompt[:-1]):
        return None
    parts = [part for message in prompt for part in (message["role"].encode(), _bare(message["content"]))]
    return Turns(_digest(parts[:-2], 8), _digest(parts[-2:], 8))


def near_keys(rankings: Sequence[tuple[str, bytes]]) -> NDArray[np.uint64]:
    """Keys [N, BANDS] of (`near_text`, `near_owner`): in a column they are equal for candidates of one rater and criterion."""
    texts = {text: number for number, text in enumerate(dict.fromkeys(text for text, _ in rankings))}
    keys = band_keys(list(texts))[[texts[text] for text, _ in rankings]]
    owners = np.frombuffer(b"".join(owner for _, owner in rankings), dtype=np.uint64)
    return mix(keys ^ owners[:, None])


def near_text(ranking: Ranking) -> str:
    return "\n".join(message["content"] for message in ranking.prompt)[-SEARCHED_CHARACTERS:]


@lru_cache(maxsize=100_000)
def near_owner(rater_id: str, criterion: str | None) -> bytes:
    """Near duplicates are looked for among the rankings of one rater by one criterion."""
    return _digest([rater_id.encode(), (criterion or "").encode()], 8)


def how_near(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Least similarity (Jaccard of shingles) of two rankings' conversations and of their completions of each rank, in [0, 1].

    0 if they have other numbers of completions at a rank, such as two that tie in one of them. A contradiction is not near.
    """
    parts_one, parts_other = _parts(one), _parts(other)
    if parts_one.keys() != parts_other.keys():
        return 0.0
    return min(similarity(shingles(text), shingles(parts_other[place])) for place, text in parts_one.items())


def _parts(record: dict[str, Any]) -> dict[tuple[int, int], str]:
    parts = {(0, 0): "\n".join(message["content"] for message in record["prompt"])}
    levels: dict[int, list[str]] = {}
    for rank, text in zip(dense(record["ranks"]), record["completions"], strict=True):
        levels.setdefault(rank, []).append(text)
    return parts | {(rank, place): text for rank, texts in levels.items() for place, text in enumerate(sorted(texts))}


def _bare(text: str) -> bytes:
    """The text without white space."""
    return text.encode().translate(None, _SPACES) if text.isascii() else "".join(text.split()).encode()


def _digest(parts: Sequence[bytes], size: int) -> bytes:
    return hashlib.blake2b(b"".join([len(part).to_bytes(4, "big") + part for part in parts]), digest_size=size).digest()
