"""The four policies for personal data, from a source to a snapshot, its report and its quarantine."""

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.ingest_rankings.formats import Parsed, content_digest, parse
from components.ingest_rankings.personal_data.policy import PLACES, PersonalData, Policy
from components.ingest_rankings.rows import Rejected


def row(prompt: str = "Hi", first: str = "a", second: str = "b", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completions": [first, second], "ranks": [1, 2], **more}


def lines(*rows: dict[str, Any]) -> dict[str, bytes]:
    return {"a.jsonl": b"\n".join(map(orjson.dumps, rows))}


ROWS = (
    row(),
    row("Mail jane@example.org", "Done.", "Call +1 202 555 0143, or +1 202 555 0144."),
    row("Who?", "4111 1111 1111 1111", "No."),
)
SECRETS = ("jane@", "555", "4111")


def test_report_changes_nothing_and_names_no_value(ingest: Callable[..., Any]) -> None:
    found, off = ingest(lines(*ROWS)), ingest(lines(*ROWS), personal_data="off")
    assert off.personal_data == {"policy": "off", "rankings": 0, "found": {}, "places": []}
    assert sorted(r.completions for r in found.rankings) == sorted(r.completions for r in off.rankings)
    report = found.personal_data
    assert (report["policy"], report["rankings"], report["found"]) == ("report", 2, {"email": 1, "phone": 2, "card": 1})
    places = [(each["row"], each["field"], each["kind"]) for each in report["places"]]
    assert places == [
        (2, "prompt[0].content", "email"),
        (2, "completions[1]", "phone"),
        (2, "completions[1]", "phone"),
        (3, "completions[0]", "card"),
    ]
    assert not any(secret in json.dumps(report["places"]).replace(report["places"][0]["file"], "") for secret in SECRETS)


def test_places_are_the_first_of_each_kind(ingest: Callable[..., Any]) -> None:
    rows = [row(f"{n} +1 202 555 0143") for n in range(PLACES + 3)] + [row("jane@example.org")]
    report = ingest(lines(*rows)).personal_data
    assert report["found"] == {"email": 1, "phone": PLACES + 3}
    assert [each["kind"] for each in report["places"]] == ["phone"] * PLACES + ["email"]


def test_mask(ingest: Callable[..., Any]) -> None:
    found = ingest(lines(*ROWS), personal_data="mask")
    texts = {r.prompt[0]["content"]: r.completions for r in found.rankings}
    assert texts == {
        "Hi": ["a", "b"],
        "Mail [EMAIL]": ["Done.", "Call [PHONE], or [PHONE]."],
        "Who?": ["[CARD]", "No."],
    }
    assert all(r.ranking_id == content_digest(r) for r in found.rankings)
    assert found.personal_data["found"] == {"email": 1, "phone": 2, "card": 1}


def test_an_id_of_the_source_stays_and_masked_duplicates_are_one(ingest: Callable[..., Any]) -> None:
    named = ingest(lines(row("jane@example.org", ranking_id="7")), personal_data="mask")
    assert [r.ranking_id for r in named.rankings] == ["7"]
    twice = ingest(lines(row("jane@example.org"), row("bob@example.org")), personal_data="mask")
    assert (twice.snapshot.rankings, twice.duplicates) == (1, 1)


def test_completions_that_become_the_same_are_quarantined(ingest: Callable[..., Any]) -> None:
    found = ingest(lines(row("Who?", "jane@example.org", "bob@example.org")), personal_data="mask")
    (entry,) = found.quarantined
    assert entry["reason"] == "completions are the same once personal data is masked"
    assert (entry["row"], entry["detail"], entry["raw"]) == (1, "email in completions[0], email in completions[1]", "")


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_split_does_not_depend_on_the_policy_nor_on_the_value(one: int, other: int) -> None:
    def split(policy: Policy, number: int) -> str:
        (parsed,) = parse(row(f"Mail u{number}@example.org"), "auto", "s", 0.5)
        kept = PersonalData(policy, "", 0.5).applied("f", 1, parsed)
        assert isinstance(kept, Parsed)
        return kept.ranking.split

    assert split("report", one) == split("mask", one) == split("mask", other)


@pytest.mark.parametrize("policy", ["report", "mask"])
@pytest.mark.parametrize("given_split", ["train", "test"])
def test_a_split_of_the_row_wins(ingest: Callable[..., Any], policy: str, given_split: str) -> None:
    found = ingest(lines(row("jane@example.org", split=given_split)), personal_data=policy)
    assert [r.split for r in found.rankings] == [given_split]


def test_quarantine_keeps_the_place_and_not_the_row(ingest: Callable[..., Any]) -> None:
    found = ingest(lines(*ROWS), personal_data="quarantine")
    assert found.snapshot.rankings == 1
    assert found.reasons == {"personal data": 2}
    assert [(each["row"], each["detail"], each["raw"]) for each in found.quarantined] == [
        (2, "email in prompt[0].content, phone in completions[1]", ""),
        (3, "card in completions[0]", ""),
    ]
    assert found.read == found.snapshot.rankings + found.duplicates + len(found.quarantined)


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
def test_a_row_rejected_for_another_reason_is_masked_too(ingest: Callable[..., Any], policy: str) -> None:
    bad = orjson.dumps(row("Call\n+1 202 555 0143", "jane@example.org", "No.")).replace(b"[1,2]", b"[1,3]")
    escaped = bad.replace(b"@", b"\\u0040")
    source = {"a.jsonl": b"\n".join([bad, escaped, bad[:-3], b"\xff" + bad, b'{"prompt": "Hi"}', b'"bob@example.org"'])}
    found = ingest(source, personal_data=policy)
    assert len(found.quarantined) == 6
    kept = json.dumps(found.quarantined)
    assert not any(secret in kept for secret in ("jane", "bob", "555 0143"))
    assert "[PHONE]" in found.quarantined[0]["raw"]
    assert found.quarantined[0]["reason"] == "ranks are not a ranking"
    assert found.quarantined[4]["raw"] == '{"prompt": "Hi"}'
    assert "completions" in found.quarantined[4]["detail"] or "fields" in found.quarantined[4]["detail"]
    assert "jane" in json.dumps(ingest(source, personal_data="report").quarantined)


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
def test_a_rater_named_by_an_address_is_refused(ingest: Callable[..., Any], policy: str) -> None:
    one = row(rater_id="jane@example.org")
    found = ingest(lines(one), personal_data="report")
    assert found.personal_data["places"][0]["field"] == "rater_id"
    assert [r.rater_id for r in found.rankings] == ["jane@example.org"]
    refused = ingest(lines(one, row()), personal_data=policy)
    assert (refused.snapshot.rankings, len(refused.quarantined)) == (1, 1)
    assert refused.quarantined[0]["reason"].startswith("personal data")
    assert "jane" not in json.dumps(refused.quarantined)


def test_what_is_nested_too_deeply_to_be_looked_at_is_not_copied() -> None:
    deep: Any = "jane@example.org"
    for _ in range(100_000):
        deep = [deep]
    problem, raw = PersonalData("mask", "", 0.1).redacted(Rejected("unknown form"), deep)
    assert (problem.reason, raw) == ("unknown form", b"")
