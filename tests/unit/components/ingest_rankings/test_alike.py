"""Rankings that are alike: what counts as the same, what stays whatever the order, and that nothing goes silently."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ingest_rankings import alike
from components.ingest_rankings.formats import parse
from components.ingest_rankings.likeness import how_near, same_key
from components.rlhf.records import Ranking

LONG = "My parcel was sent on Monday by express mail and it has not come yet. Where is it now, and what can I do about it?"
ROW: dict[str, Any] = {
    "prompt": [{"role": "user", "content": LONG}],
    "completions": ["I am sorry to hear that. What is the number?", "Please wait some more days.", "Parcels are slow."],
    "ranks": [1, 2, 3],
    "rater_id": "r1",
}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def ranking(row: dict[str, Any]) -> Ranking:
    (parsed,) = parse(row, "auto", "s", 0.1)
    return parsed.ranking


def shuffled(row: dict[str, Any], order: list[int]) -> dict[str, Any]:
    return {**row, "completions": [row["completions"][i] for i in order], "ranks": [row["ranks"][i] for i in order]}


SAME = [
    shuffled(ROW, [2, 0, 1]),
    {
        **ROW,
        "ranking_id": "x",
        "source": "other",
        "collected_at": "2026-01-31T12:00:00Z",
        "confidence": 0.5,
        "policies": ["a", "b", "c"],
    },
    {**ROW, "prompt": f"  {LONG.replace(' ', '  ', 3)}\n", "completions": [f"{text}\u00a0\n" for text in ROW["completions"]]},
]
OTHER = [
    {**ROW, "rater_id": "r2"},
    {**ROW, "ranks": [1, 3, 2]},
    {**ROW, "ranks": [1, 2, 2]},
    {**ROW, "criterion": "honesty"},
    {**ROW, "prompt": [{"role": "system", "content": "x"}, *ROW["prompt"]]},
    {**ROW, "completions": [*ROW["completions"][:2], "Parcels are fast."]},
]


def test_what_the_same_ranking_is() -> None:
    key = same_key(ranking(ROW))
    assert {same_key(ranking(row)) for row in SAME} == {key}
    assert len({key, *(same_key(ranking(row)) for row in OTHER)}) == 1 + len(OTHER)
    tied = {**ROW, "ranks": [1, 1, 2]}
    assert same_key(ranking(tied)) == same_key(ranking({**ROW, "ranks": [1, 1, 3]})) == same_key(ranking(shuffled(tied, [1, 0, 2])))


def test_the_same_ranking_from_two_exports_is_dropped_and_both_origins_are_told(ingest: Callable[..., Any]) -> None:
    found = ingest({"a.jsonl": lines(ROW, OTHER[0], {}), "b.jsonl": lines(SAME[0], ROW)})
    told = found.alike["same_ranking"]
    assert (found.read, found.snapshot.rankings, found.duplicates, len(found.quarantined)) == (5, 2, 2, 1)
    assert (told["policy"], told["found"], told["rater_unknown"]) == ("drop", 1, 0)
    (example,) = told["examples"]
    places = {(Path(each["file"]).name, each["row"]) for each in (example["one"], example["other"])}
    assert ("b.jsonl", 1) in places
    assert len(places) == 2
    (stays,) = [each.ranking_id for each in found.rankings if each.rater_id == "r1"]
    assert example["one"]["ranking_id"] == stays


def at(time: str | None, source: str) -> dict[str, Any]:
    return {**ROW, "source": source} | ({"collected_at": time} if time else {})


@pytest.mark.parametrize("order", list(permutations(range(5)))[::7])
def test_a_rater_who_was_asked_again_at_another_time_gave_two_rankings(ingest: Callable[..., Any], order: tuple[int, ...]) -> None:
    rows = [
        at("2026-01-31T12:00:00Z", "a"),
        at("2026-01-31T13:00:00.25+01:00", "b"),  # the first one, as another export writes its time
        at("2026-02-01T12:00:00Z", "a"),
        at(None, "a"),
        at(None, "b"),
    ]
    found = ingest({"a.jsonl": lines(*(rows[i] for i in order))})
    assert sorted(each.collected_at[:19] for each in found.rankings) == ["2026-01-31T12:00:00", "2026-02-01T12:00:00"]
    assert (found.duplicates, found.alike["same_ranking"]["found"]) == (3, 3)
    untimed = ingest({"b.jsonl": lines(*(rows[i] for i in order if i > 2))})
    assert (untimed.snapshot.rankings, untimed.duplicates) == (1, 1)


@pytest.mark.parametrize(("policy", "count"), [("report", 1), ("keep", 0)])
def test_the_same_ranking_stays_where_the_profile_says_so(ingest: Callable[..., Any], policy: str, count: int) -> None:
    found = ingest({"a.jsonl": lines(ROW, SAME[0])}, same_ranking=policy)
    assert (found.snapshot.rankings, found.alike["same_ranking"]["found"]) == (2, count)


def test_nothing_of_an_unknown_rater_is_dropped(ingest: Callable[..., Any]) -> None:
    rows = [{**row, "rater_id": None} for row in (ROW, SAME[0], SAME[2])]
    found = ingest({"a.jsonl": lines(*rows)}, near_duplicates="quarantine")
    assert found.snapshot.rankings == 3
    assert (found.alike["same_ranking"]["found"], found.alike["same_ranking"]["rater_unknown"]) == (2, 2)


ANY = st.builds(
    lambda prompt, texts, order, rater, number, space: {
        "prompt": f"{prompt}{space}",
        "completions": [texts[i] for i in order],
        "ranks": [1 + i for i in order],
        "rater_id": rater,
        "ranking_id": f"id-{number}",
    },
    st.sampled_from(["Hi", "Why?"]),
    st.sampled_from([["a", "b", "c"], ["b", "a", "c"]]),
    st.permutations([0, 1, 2]),
    st.sampled_from(["r1", "r2", None]),
    st.integers(0, 3),
    st.sampled_from(["", "\n"]),
)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(ANY, max_size=14), order=st.randoms(use_true_random=False))
def test_what_stays_does_not_depend_on_the_order(ingest: Callable[..., Any], rows: list[dict[str, Any]], order: Any) -> None:
    first = ingest({"a.jsonl": lines(*rows)})
    moved = list(rows)
    order.shuffle(moved)
    half = len(moved) // 2
    second = ingest({"a.jsonl": lines(*moved[:half]), "b.jsonl": lines(*moved[half:])})
    assert second.snapshot == first.snapshot
    assert first.read == len(rows) == first.snapshot.rankings + first.duplicates
    known = [each for each in map(ranking, rows) if each.rater_id != "unknown"]
    assert sum(each.rater_id != "unknown" for each in first.rankings) == len({same_key(each) for each in known})


def nearly(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, "prompt": LONG.replace("Monday", f"Monday {number}"), "ranking_id": f"near-{number}"}


def test_near_duplicates_are_told_or_quarantined(ingest: Callable[..., Any]) -> None:
    rows = [ROW, nearly(ROW, 1), nearly(ROW, 2), {**nearly(ROW, 3), "rater_id": "r2"}, {**nearly(ROW, 4), "ranks": [3, 2, 1]}]
    told = ingest({"a.jsonl": lines(*rows)})
    near = told.alike["near_duplicates"]
    assert (told.snapshot.rankings, near["policy"], near["found"], near["all_compared"]) == (5, "report", 2, True)
    assert all(0.8 <= each["similarity"] < 1 and each["one"] != each["other"] for each in near["examples"])
    without = ingest({"a.jsonl": lines(*rows)}, near_duplicates="quarantine")
    assert (without.read, without.snapshot.rankings, without.duplicates) == (5, 3, 0)
    assert [each["reason"] for each in without.quarantined] == ["nearly the same as another ranking"] * 2
    assert all("a.jsonl, row" in each["detail"] and each["row"] in (1, 2, 3) for each in without.quarantined)
    assert ingest({"a.jsonl": lines(*reversed(rows))}, near_duplicates="quarantine").snapshot == without.snapshot
    assert ingest({"a.jsonl": lines(*rows)}, near_duplicates="keep").alike["near_duplicates"]["found"] == 0


def test_a_contradiction_is_not_near(ingest: Callable[..., Any]) -> None:
    one = ranking(ROW)._asdict()
    assert how_near(one, ranking(nearly(ROW, 1))._asdict()) > 0.8
    assert how_near(one, {**one, "ranks": [3, 2, 1]}) < 0.2
    assert how_near(one, {**one, "ranks": [1, 1, 2]}) == 0


def turn(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def test_conversations_that_differ_in_their_last_turn_only(ingest: Callable[..., Any]) -> None:
    shared = [turn("Hi"), turn("Hello, how can I help?", "assistant")]
    rows = [
        *({**ROW, "prompt": [*shared, turn(last)]} for last in ("Late!", "Lost!", "Lost!\n")),
        {**ROW, "prompt": [turn("system", "system"), turn("Late!")]},
        {**ROW, "prompt": [turn("system", "system"), turn("Lost!")]},
        {**ROW, "prompt": [*shared, turn("Late!")], "rater_id": "r2"},
    ]
    told = ingest({"a.jsonl": lines(*rows)})
    assert (told.snapshot.rankings, told.duplicates) == (5, 1)
    assert told.alike["last_turn"]["found"] in (1, 2), "of one last turn there is one ranking, of the other two"
    without = ingest({"a.jsonl": lines(*rows)}, last_turn="quarantine")
    assert len(without.quarantined) == told.alike["last_turn"]["found"]
    assert {each["reason"] for each in without.quarantined} == {"differs from another conversation in the last turn only"}
    assert without.snapshot.rankings + len(without.quarantined) == 5
    assert len({each.prompt[-1]["content"].strip() for each in without.rankings if len(each.prompt) == 3}) == 1


def test_comparisons_are_bounded_and_the_report_says_so(ingest: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "COMPARISONS", 3)
    rows = [nearly(ROW, number) for number in range(8)]
    near = ingest({"a.jsonl": lines(*rows)}).alike["near_duplicates"]
    assert (near["found"], near["comparisons"], near["all_compared"]) == (3, 3, False)


def test_many_groups_lie_in_many_files(ingest: Callable[..., Any]) -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklm", k=6)) for _ in range(400)]
    rows = []
    for number in range(600):
        row = {**ROW, "prompt": " ".join(chance.choices(words, k=20)), "ranking_id": str(number)}
        rows += [row, {**shuffled(row, [1, 2, 0]), "ranking_id": f"again-{number}"}] if number % 3 == 0 else [row]
    found = ingest({"a.jsonl": lines(*rows)})
    assert (found.snapshot.rankings, found.duplicates, found.alike["same_ranking"]["found"]) == (600, 200, 200)
    assert found.alike["near_duplicates"]["found"] == 0
