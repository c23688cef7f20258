"""Raters are pseudonyms in whatever an ingest writes, and nobody is hashed with a salt that is none."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from components.ingest_rankings.formats import content_digest
from components.ingest_rankings.raters import Raters, salt_fingerprint, salt_of
from components.ingest_rankings.rows import Rejected
from components.rlhf.pseudonyms import pseudonym
from components.services.exits import DoNotRetry
from tests.unit.components.ingest_rankings.exports.samples import ARGILLA, LABEL_STUDIO, RATINGS, SURGE_AI

SALT = "a salt for tests, long enough"
VARIABLE = "RANKLOOP_RATER_SALT"
SECRET = "ann.smith@example.org"
ROW = {"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, 2], "rater_id": SECRET}


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, SALT)


def lines(*rows: Any) -> dict[str, bytes]:
    return {"a.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows)}


def test_ids_are_hashed_before_the_digest_and_before_personal_data_is_searched(ingest: Callable[..., Any]) -> None:
    found = ingest(lines(ROW, {**ROW, "rater_id": 7}, {**ROW, "rater_id": None}), rater_ids="hashed", personal_data="quarantine")
    assert {each.rater_id for each in found.rankings} == {pseudonym(SECRET, SALT), pseudonym("7", SALT), "unknown"}
    assert all(each.ranking_id == content_digest(each) for each in found.rankings)
    assert (found.quarantined, found.personal_data["found"]) == ([], {})
    kept = ingest(lines(ROW))
    assert [each.rater_id for each in kept.rankings] == [SECRET]


def test_an_id_in_the_id_of_a_ranking_is_hashed_too(ingest: Callable[..., Any]) -> None:
    found = ingest(lines({**ROW, "ranking_id": f"12-{SECRET}-3"}, {**ROW, "ranking_id": "123", "rater_id": 12}), rater_ids="hashed")
    assert {each.ranking_id for each in found.rankings} == {f"12-{pseudonym(SECRET, SALT)}-3", "123"}


@pytest.mark.parametrize(
    "sample", [LABEL_STUDIO, ARGILLA, RATINGS, SURGE_AI], ids=["label_studio", "argilla", "ratings", "surge_ai"]
)
def test_no_id_of_a_rejected_row_is_written(ingest: Callable[..., Any], sample: dict[str, Any]) -> None:
    def with_secret(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: with_secret(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [with_secret(item, key) for item in value]
        return SECRET if key in ("completed_by", "user_id", "rater_id", "worker_id") else value

    chance, row = random.Random(0), with_secret(sample)
    assert SECRET in json.dumps(row)
    broken = []
    for _ in range(40):
        wrong = copy.deepcopy(row)
        place: Any = wrong
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys)
            if not isinstance(place[key], (dict, list)) or chance.random() < 0.3:
                place[key] = chance.choice((None, -1, [], {}, ["x"], ""))
                break
            place = place[key]
        broken.append(wrong)
    found = ingest(lines(row, *broken), rater_ids="hashed")
    assert found.quarantined
    assert any(each["raw"] for each in found.quarantined)
    assert SECRET not in json.dumps([found.quarantined, [each._asdict() for each in found.rankings]])


def test_a_rejected_row_stays_readable_but_for_its_rater(ingest: Callable[..., Any]) -> None:
    cut = json.dumps(ROW).encode()[:-4]
    wrong = {**ROW, "ranks": [1, 3]}
    found = ingest({"a.jsonl": json.dumps(wrong).encode() + b"\n" + cut + b'\n["' + SECRET.encode() + b'"]'}, rater_ids="hashed")
    first, second, third = found.quarantined
    assert json.loads(first["raw"]) == {**wrong, "rater_id": pseudonym(SECRET, SALT)}
    assert "[1, 3]" in first["detail"]
    assert (second["reason"], second["raw"]) == ("not JSON", "")
    assert (third["reason"], third["raw"], third["detail"]) == ("not a JSON object", "", "not told: a rater's id may be in it")


def test_fields_of_a_column_map_name_persons_too(ingest: Callable[..., Any]) -> None:
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "rater_id": "join('-', [team, people.who])"}
    row = {"q": "Hi", "good": "a", "bad": "", "team": "Red", "people": {"who": SECRET, "seen": "x"}}
    found = ingest(lines(row, {**row, "bad": "b"}), rater_ids="hashed", columns=columns)
    (ranking,), (rejected,) = found.rankings, found.quarantined
    assert ranking.rater_id == pseudonym(f"Red-{SECRET}", SALT)
    assert json.loads(rejected["raw"]) == {
        **row,
        "team": pseudonym("Red", SALT),
        "people": {"who": pseudonym(SECRET, SALT), "seen": "x"},
    }


def test_a_detail_in_which_the_id_stands_is_not_told() -> None:
    problem, raw = Raters(SALT).redacted(Rejected("declined", "the response of w1 is draft"), {"user_id": "w1"})
    assert (str(problem), raw) == ("declined: not told: the rater's id is in it", {"user_id": pseudonym("w1", SALT)})
    told, _ = Raters(SALT).redacted(Rejected("declined", "w12"), {"user_id": "w1"})
    assert told.detail == "w12"


@pytest.mark.parametrize(
    ("value", "said"), [(None, "is not set"), ("", "is not set"), ("short", "has 5 characters, and 16 are needed")]
)
def test_without_a_real_salt_nothing_is_hashed(value: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE) if value is None else monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(DoNotRetry, match=rf"{VARIABLE}, {said}\n.*or set ingest_rankings.rater_ids to kept"):
        salt_of("hashed", VARIABLE)
    assert salt_of("kept", VARIABLE) == ""


def test_a_fingerprint_tells_salts_apart_and_nothing_else() -> None:
    assert salt_fingerprint(SALT) == salt_fingerprint(SALT) != salt_fingerprint(SALT + "!")
    assert SALT not in salt_fingerprint(SALT)
    assert salt_fingerprint("") == ""
