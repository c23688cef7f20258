"""Placeholders for personal data, in all texts that belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from components.ingest_rankings.personal_data.find import Hit, find


def masked(texts: Sequence[str], region: str = "") -> list[str]:
    """The texts with `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]` and `[KEY]` for what is found in them; others are the same objects.

    A value that is found in one text is replaced in each, also where `find` would not know it: a key that a question assigns to
    `api_key` stands alone in the answer. Nothing is found in what is returned, so masking twice is masking once.
    """
    result = list(texts)
    while any(found := [find(text, region) for text in result]):
        values: dict[str, str] = {}
        for text, hits in zip(result, found, strict=True):
            values |= {text[hit.start : hit.end]: placeholder(hit.kind) for hit in hits}
        longest_first = sorted(values, key=len, reverse=True)
        for number, hits in enumerate(found):
            text = _cut(result[number], hits)
            for value in longest_first:
                if value in text:
                    text = text.replace(value, values[value])
            result[number] = text
    return result


def placeholder(kind: str) -> str:
    return f"[{kind.upper()}]"


def _cut(text: str, hits: Sequence[Hit]) -> str:
    parts, last = [], 0
    for hit in hits:
        parts += [text[last : hit.start], placeholder(hit.kind)]
        last = hit.end
    return "".join([*parts, text[last:]]) if hits else text


def masked_value(value: Any, region: str) -> Any:
    """A JSON value with every text in it masked, names of fields included; the same object where there is nothing to mask."""
    texts = list(dict.fromkeys(_texts(value)))
    changed = {old: new for old, new in zip(texts, masked(texts, region), strict=True) if old is not new}
    return _replaced(value, changed) if changed else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, changed: dict[str, str]) -> Any:
    if isinstance(value, str):
        return changed.get(value, value)
    if isinstance(value, dict):
        return {_replaced(key, changed): _replaced(item, changed) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, changed) for item in value]
    return value
