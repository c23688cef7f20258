"""Each form of a row, by hand-written rows; and each way in which a row is not a ranking, by the reason it gets."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.ingest_rankings.formats import Parsed, parse
from components.ingest_rankings.rows import Rejected
from components.rlhf.records import Ranking

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
RECORD: dict[str, Any] = {
    "ranking_id": "a-1",
    "prompt": [{"role": "system", "content": "Be brief."}, USER],
    "completions": ["one", "two", "three"],
    "ranks": [2, 1, 2],
    "rater_id": "r07",
    "source": "desk",
    "collected_at": "2026-01-31T13:00:00+01:00",
    "confidence": 0.5,
    "policies": ["a", "b", "b"],
    "criterion": "overall",
    "split": "test",
}


def parse_one(row: dict[str, Any], form: str, source: str, test_fraction: float) -> Parsed:
    (found,) = parse(row, form, source, test_fraction)
    if isinstance(found, Rejected):
        raise found
    return found


def ranking(row: dict[str, Any], form: Any = "auto") -> Ranking:
    return parse_one(row, form, "unspecified", 0.1).ranking


def reason(row: dict[str, Any], form: Any = "auto") -> str:
    with pytest.raises(Rejected) as caught:
        parse_one(row, form, "unspecified", 0.1)
    return caught.value.reason


def test_full_record_is_kept_with_its_time_in_utc() -> None:
    assert ranking(RECORD) == Ranking(**{**RECORD, "collected_at": "2026-01-31T12:00:00Z"})


def test_short_record_gets_defaults_and_its_digest_as_id() -> None:
    found = ranking({"prompt": "Hi", "completions": ["b", "a"], "ranks": [2, 1]})
    content = {
        "prompt": [USER],
        "completions": ["b", "a"],
        "ranks": [2, 1],
        "rater_id": "unknown",
        "source": "unspecified",
        "collected_at": None,
        "confidence": None,
        "policies": None,
        "criterion": None,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert found.ranking_id == hashlib.sha256(text.encode()).hexdigest()
    assert {name: getattr(found, name) for name in content} == content


def test_id_does_not_depend_on_the_split() -> None:
    row = {"prompt": "Hi", "completions": ["b", "a"], "ranks": [2, 1]}
    assert ranking({**row, "split": "test"}).ranking_id == ranking({**row, "split": "train"}).ranking_id


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([9, 7, 7, 1], [1, 2, 2, 4]),
        ([0.1, 0.9, 0.5, -3.0], [3, 1, 2, 4]),
        ([1, 1.0, 1, 1], [1, 1, 1, 1]),
        ([0, 5, 5, 5], [4, 1, 1, 1]),
    ],
)
def test_scores_become_competition_ranks(scores: list[float], ranks: list[int]) -> None:
    row = {"prompt": "Hi", "completions": list("abcd"), "scores": scores}
    parsed = parse_one(row, "auto", "s", 0.1)
    assert parsed.form == "kway"
    assert parsed.ranking.ranks == ranks


def test_completions_as_objects() -> None:
    row = {
        "prompt": [USER],
        "completions": [{"text": "a", "score": 1, "policy": "p", "note": 3}, {"text": "b", "score": 4, "policy": "q"}],
    }
    parsed = parse_one(row, "auto", "s", 0.1)
    assert parsed.ranking.completions == ["a", "b"]
    assert parsed.ranking.ranks == [2, 1]
    assert parsed.ranking.policies == ["p", "q"]
    assert parsed.ignored == ["completions[].note"]
    assert ranking({"prompt": "Hi", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]}).ranks == [1, 1]


def test_hh_pair() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Late: \n\nwhy?\n\nAssistant:"
    parsed = parse_one({"chosen": start + " Sorry.", "rejected": start + " Wait.\n"}, "auto", "hh-data", 0.1)
    assert parsed.form == "hh"
    assert parsed.ranking.prompt == [USER, ASSISTANT, {"role": "user", "content": "Late: \n\nwhy?"}]
    assert (parsed.ranking.completions, parsed.ranking.ranks, parsed.ranking.source) == (["Sorry.", "Wait."], [1, 2], "hh-data")


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": reply("a"), "rejected": reply("b")},
        {"prompt": "Hi", "chosen": [USER, *reply("a")], "rejected": [USER, *reply("b")]},
        {"chosen": [USER, *reply("a")], "rejected": [USER, *reply("b")]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "a", "rejected": "b"},
        {"prompt": None, "chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
    ],
)
def test_the_same_pair_in_every_form(row: dict[str, Any]) -> None:
    found = ranking(row)
    assert (found.prompt, found.completions, found.ranks) == ([USER], ["a", "b"], [1, 2])


def test_conversation_goes_on_after_the_prompt() -> None:
    more = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, {"role": "user", "content": "Why?"}]
    assert ranking({"prompt": "Hi", "chosen": more + reply("a"), "rejected": more + reply("b")}).prompt == more


PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
KWAY = {"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
HH = "\n\nHuman: Hi\n\nAssistant: "
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "unknown form"),
    ({"text": "a"}, "unknown form"),
    ({"chosen": "a", "rejected": None, "prompt": "Hi"}, "unknown form"),
    ({**KWAY, "prompt": None}, "no prompt"),
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({**KWAY, "prompt": ""}, "empty prompt"),
    ({**KWAY, "prompt": " \n"}, "empty prompt"),
    ({**KWAY, "prompt": []}, "empty prompt"),
    ({**KWAY, "prompt": 7}, "prompt is neither a text nor a list of messages"),
    ({**KWAY, "prompt": [USER, {"role": "assistant", "content": " "}, USER]}, "empty turn in the prompt"),
    ({**KWAY, "prompt": [USER, ASSISTANT]}, "prompt does not end with the user"),
    (
        {**KWAY, "prompt": [{"role": "robot", "content": "x"}]},
        "a message of prompt is not a role (system, user, assistant) with a text as content",
    ),
    (
        {**KWAY, "prompt": [{**USER, "tool_calls": [1]}]},
        "a message of prompt is not a role (system, user, assistant) with a text as content",
    ),
    ({**KWAY, "completions": ["a"], "ranks": [1]}, "fewer than two completions"),
    ({**KWAY, "completions": [], "ranks": []}, "fewer than two completions"),
    ({**KWAY, "completions": "a"}, "completions are not a list"),
    ({**KWAY, "completions": ["a", "", "c"]}, "empty completion"),
    ({**KWAY, "completions": ["a", " \t", "c"]}, "empty completion"),
    ({**KWAY, "completions": ["a", "b", "a "]}, "identical completions"),
    ({**KWAY, "completions": ["a", "b", 3]}, "a completion is not a text"),
    ({**KWAY, "completions": ["a", "b", None]}, "a completion is not a text"),
    ({**KWAY, "ranks": None}, "no ranks"),
    ({**KWAY, "ranks": [1, 2]}, "not one rank per completion"),
    ({**KWAY, "ranks": [0, 1, 2]}, "ranks are not a ranking"),
    ({**KWAY, "ranks": [2, 3, 4]}, "ranks are not a ranking"),
    ({**KWAY, "ranks": [1, 2, 4]}, "ranks are not a ranking"),
    ({**KWAY, "completions": list("abcde"), "ranks": [1, 1, 2, 2, 5]}, "ranks are not a ranking"),
    ({**KWAY, "ranks": [1, 2, 2.5]}, "a rank is not an integer"),
    ({**KWAY, "ranks": [1, 2, float("nan")]}, "a rank is not an integer"),
    ({**KWAY, "ranks": [1, 2, "3"]}, "a rank is not an integer"),
    ({**KWAY, "ranks": [True, 2, 3]}, "a rank is not an integer"),
    ({**KWAY, "ranks": "123"}, "ranks are not a list"),
    ({**KWAY, "scores": [3, 2, 2]}, "ranks and scores disagree"),
    ({**KWAY, "ranks": None, "scores": [3, 2]}, "not one rank per completion"),
    ({**KWAY, "ranks": None, "scores": [3, 2, float("nan")]}, "a score is not a finite number"),
    ({**KWAY, "ranks": None, "scores": [3, 2, float("inf")]}, "a score is not a finite number"),
    ({**KWAY, "ranks": None, "scores": [3, 2, None]}, "a score is not a finite number"),
    ({**KWAY, "ranks": None, "scores": [3, 2, True]}, "a score is not a finite number"),
    ({"prompt": "Hi", "completions": [{"text": "a"}, {"text": "b"}]}, "neither ranks nor scores"),
    ({"prompt": "Hi", "completions": [{"text": "a", "rank": 1}, {"text": "b"}]}, "a rank is not an integer"),
    ({"prompt": "Hi", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}], "ranks": [1, 2]}, "rank given twice"),
    ({**PAIR, "rejected": "a"}, "identical completions"),
    ({**PAIR, "rejected": ""}, "empty completion"),
    ({**PAIR, "chosen": [USER]}, "conversation does not end with the assistant"),
    ({**PAIR, "chosen": []}, "conversation does not end with the assistant"),
    (
        {**PAIR, "chosen": [ASSISTANT, USER, *reply("a")], "rejected": [ASSISTANT, USER, *reply("b")]},
        "chosen does not continue the prompt",
    ),
    ({"chosen": HH + "a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "conversations differ before the last turn"),
    ({"chosen": HH + "a", "rejected": HH + "b\n\nHuman: Why?\n\nAssistant: c"}, "conversations differ before the last turn"),
    ({"chosen": HH + "a", "rejected": HH}, "empty completion"),
    ({"chosen": HH + "a", "rejected": HH + "b\n\nHuman: Why?"}, "conversation does not end with the assistant"),
    ({"chosen": HH + "a", "rejected": "b"}, "rejected is not a transcript that begins with a Human turn"),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "chosen is not a transcript that begins with a Human turn"),
    ({"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"}, "empty prompt"),
    ({**KWAY, "collected_at": "2026-01-31T12:00:00"}, "collected_at is not a time with a zone"),
    ({**KWAY, "collected_at": "yesterday"}, "collected_at is not a time with a zone"),
    ({**KWAY, "collected_at": 1769860800}, "collected_at is not a time with a zone"),
    ({**KWAY, "collected_at": "0001-01-01T00:00:00+09:00"}, "collected_at is not a time with a zone"),
    ({**KWAY, "confidence": 0}, "confidence is not in (0, 1]"),
    ({**KWAY, "confidence": 1.5}, "confidence is not in (0, 1]"),
    ({**KWAY, "confidence": float("nan")}, "confidence is not in (0, 1]"),
    ({**KWAY, "policies": ["a"]}, "not one policy name per completion"),
    ({**KWAY, "rater_id": " "}, "rater_id is not a text"),
    ({**KWAY, "rater_id": ["r"]}, "rater_id is not a text"),
    ({**KWAY, "split": "validation"}, "split is neither train nor test"),
    ({**KWAY, "completions": ["a", "b", "\ud800"]}, "a text is not valid Unicode"),
    ({**KWAY, "prompt": "\ud800"}, "a text is not valid Unicode"),
    ({**KWAY, "ranking_id": "\ud800"}, "a text is not valid Unicode"),
    ({**KWAY, "criterion": "\ud800"}, "a text is not valid Unicode"),
]


@pytest.mark.parametrize(("row", "expected"), WRONG)
def test_wrong_row_gets_its_reason(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


def test_detail_names_the_value() -> None:
    with pytest.raises(Rejected, match=r"\[1, 2, 4\]") as caught:
        ranking({**KWAY, "ranks": [1, 2, 4]})
    assert caught.value.detail.startswith("[1, 2, 4]")
    with pytest.raises(Rejected, match="turn 1: 'Hi' and 'Ho'; 2 and 2 turns"):
        ranking({"chosen": HH + "a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"})


def test_forced_form_is_not_guessed() -> None:
    assert reason({"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 2]}, "rankloop") == "no ranks"
    assert reason(KWAY, "hh") == "no chosen"
    assert reason(PAIR, "kway") == "no completions"
    assert reason(PAIR, "hh") == "chosen is not a transcript that begins with a Human turn"


def test_other_fields_are_reported() -> None:
    assert parse_one({**PAIR, "margin": 2, "note": None, "ranks": [1]}, "auto", "s", 0.1).ignored == ["margin", "ranks"]


@pytest.mark.parametrize("ranks", [[1, 2, 3], [3, 1, 2], [1, 1, 1], [1, 1, 2], [1, 1, 3], [2, 2, 1], [1.0, 2.0, 3.0]])
def test_dense_and_competition_ranks_are_kept(ranks: list[int]) -> None:
    assert ranking({**KWAY, "ranks": ranks}).ranks == ranks


@pytest.mark.parametrize(
    ("given_time", "stored"),
    [
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
        ("2026-01-31T23:30:00-05:00", "2026-02-01T04:30:00Z"),
        ("2026-01-31T12:00:00.25+00:00", "2026-01-31T12:00:00.250000Z"),
        (datetime(2026, 1, 31, 12, tzinfo=UTC), "2026-01-31T12:00:00Z"),
    ],
)
def test_times_are_stored_in_utc(given_time: Any, stored: str) -> None:
    assert ranking({**KWAY, "collected_at": given_time}).collected_at == stored


def test_whole_numbers_name_raters() -> None:
    assert ranking({**KWAY, "rater_id": 7}).rater_id == "7"


@given(st.text(min_size=1).filter(str.strip), st.lists(st.text(min_size=1).filter(str.strip), max_size=4))
def test_line_05_conversations_with_the_same_opening_are_on_one_side(opening: str, later: list[str]) -> None:
    turns = [{"role": "user", "content": opening}]
    for text in later:
        turns += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": text}]
    long = {"prompt": [{"role": "system", "content": "s"}, *turns], "completions": ["a", "b"], "ranks": [1, 2]}
    short = {"prompt": f" {opening}\n", "chosen": "x", "rejected": "y"}
    sides = {parse_one(row, "pairs" if "chosen" in row else "auto", "s", 0.5).ranking.split for row in (long, short)}
    assert len(sides) == 1


def test_share_of_the_test_split() -> None:
    rows = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(4000)]
    for fraction, low, high in ((0.0, 0, 0), (0.1, 330, 470), (0.5, 1870, 2130)):  # three and a half standard deviations
        held_out = sum(parse_one(row, "auto", "s", fraction).ranking.split == "test" for row in rows)
        assert low <= held_out <= high
    assert parse_one({**rows[0], "split": "test"}, "auto", "s", 0.0).ranking.split == "test"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELD_NAMES = st.sampled_from([*RECORD, "scores", "chosen", "rejected", "role", "text"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": JSON}), max_size=3)
ANY_ROW = st.dictionaries(FIELD_NAMES, JSON | MESSAGES | st.just(HH + "x"), max_size=12)


@given(ANY_ROW, st.sampled_from(["auto", "rankloop", "kway", "hh", "pairs"]))
def test_any_row_is_a_valid_ranking_or_rejected(row: dict[str, Any], form: Any) -> None:
    try:
        found = ranking(row, form)
    except Rejected:
        return
    assert len(found.completions) == len(found.ranks) >= 2
    assert min(found.ranks) == 1
    assert found.prompt[-1]["role"] == "user"
    assert all(text.strip() for text in found.completions)
