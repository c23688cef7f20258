"""10,000 mutated rows of each form: none crashes the reader, none is lost, and none comes out with a text that it does not hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from components.ingest_rankings.formats import COLUMNS, Parsed, parse
from components.ingest_rankings.rows import Rejected, parse_line
from tests.unit.components.ingest_rankings.exports.samples import SAMPLES

MUTATED = 10_000
NATIVE: dict[str, dict[str, Any]] = {
    "rankloop": {
        "prompt": [{"role": "user", "content": "My parcel is late."}],
        "completions": ["Sorry.", "Wait.", "Slow."],
        "ranks": [1, 2, 2],
        "rater_id": "r7",
        "collected_at": "2026-01-31T13:00:00+01:00",
        "confidence": 0.8,
        "policies": ["a", "b", "c"],
        "split": "train",
    },
    "kway": {
        "prompt": "Late.",
        "completions": [{"text": "Sorry.", "score": 2.5}, {"text": "Wait.", "score": -1}],
        "source": "desk",
    },
    "hh": {"chosen": "\n\nHuman: Late.\n\nAssistant: Sorry.", "rejected": "\n\nHuman: Late.\n\nAssistant: Wait."},
    "pairs": {"prompt": "Late.", "chosen": "Sorry.", "rejected": [{"role": "user", "content": "Late."}]},
}
JUNK: list[Any] = [
    *(None, True, 0, -1, 2, 1.5, float("nan"), float("inf"), 10**40, "", " ", "1", "Wait.", "left", "\ud800", "\n\nHuman: x"),
    *([], [[]], {}, {"": None}, [1, 2], ["a", "a"], [None], {"role": "user"}, b"\xff"),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a row, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def mutate(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    row = copy.deepcopy(row)
    for _ in range(chance.choice((1, 1, 2, 4))):
        spots = list(places(row))
        if not spots:
            break
        container, key = chance.choice(spots)
        other_container, other_key = chance.choice(spots)
        match chance.randrange(6):
            case 0:
                del container[key]
            case 1:
                container[key] = copy.deepcopy(other_container[other_key])
            case 2 if isinstance(container, dict):
                container[chance.choice(("prompt", "ranks", "rows", "data", "value", str(key) + "x"))] = container.pop(key)
            case 3 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case 4 if isinstance(container[key], str):
                container[key] = container[key][: chance.randrange(len(container[key]) + 1)]
            case _:
                container[key] = copy.deepcopy(chance.choice(JUNK))
    return row


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


@pytest.mark.parametrize("name", [*NATIVE, *SAMPLES])
def test_mutated_rows_are_rankings_or_have_a_reason(name: str) -> None:
    chance = random.Random(name)
    rankings = 0
    for _ in range(MUTATED):
        row = mutate({**NATIVE, **SAMPLES}[name], chance)
        form = chance.choice(("auto", name.split()[0]))
        found = list(parse(row, form, "unspecified", 0.1))
        assert found, row
        held = list(texts(row))
        for each in found:
            if isinstance(each, Rejected):
                assert each.reason
                continue
            assert isinstance(each, Parsed)
            rankings += 1
            ranking = each.ranking
            for text in [*ranking.completions, *(message["content"] for message in ranking.prompt)]:
                assert any(text in given for given in held), (row, text)
            assert len(ranking.ranks) == len(ranking.completions) >= 2
            assert min(ranking.ranks) == 1
    assert rankings > MUTATED // 50, "most mutations are harmless"


def test_mutated_lines_are_one_row_each() -> None:
    chance = random.Random(0)
    line = bytearray(b'{"prompt": "Late \xc3\xa4", "completions": ["Sorry.", "Wait."], "ranks": [1, 2]}')
    for number in range(MUTATED):
        mutated = bytearray(line)
        for _ in range(chance.choice((1, 1, 2, 8))):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        row = parse_line(number, bytes(mutated))
        assert (row.value is None) == (row.problem is not None)
        assert row.raw == bytes(mutated)
        if row.value is not None:
            assert list(parse(row.value, "auto", "s", 0.1))


def test_the_form_of_a_column_map_has_a_name_of_its_own() -> None:
    assert COLUMNS not in {**NATIVE, **SAMPLES}
