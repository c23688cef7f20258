"""Argilla: records whose ranking question orders fields of the record. All three shapes that its libraries write.

    {"fields": {"prompt": "…", "reply-1": "…", "reply-2": "…"},
     "responses": {"rank": [{"value": ["reply-2", "reply-1"], "user_id": "…"}]}}
    {"prompt": "…", "reply-1": "…", "reply-2": "…", "rank.responses": [["reply-2", "reply-1"]], "rank.responses.users": ["…"],
     "rank.responses.status": ["submitted"]}
    {"prompt": "…", "reply-1": "…", "reply-2": "…", "rank": [{"user_id": "…", "status": "submitted",
     "value": [{"rank": 1, "value": "reply-2"}, {"rank": 2, "value": "reply-1"}]}]}

The first two come from version 2 (`records.to_json` and `records.to_datasets`), which writes the order alone, so that ties are lost
there; the third is version 1's. Responses that are drafts or discarded were not given by their rater.

https://docs.argilla.io/latest/reference/argilla/records
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.exports.label_studio import PROMPTS
from components.ingest_rankings.rows import DECLINED, Rejected, shown

_SUFFIX = ".responses"


class _Response(NamedTuple):
    question: str
    value: Any
    user: Any
    status: Any


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    nested = row.get("fields")
    return nested if isinstance(nested, dict) else row


def _responses(row: dict[str, Any]) -> Iterator[_Response]:
    """Every response of a row to any question, in whatever shape."""
    nested = row.get("responses")
    columns = nested if isinstance(nested, dict) and isinstance(row.get("fields"), dict) else row
    for question, responses in columns.items():
        if not isinstance(responses, list):
            continue
        if question.endswith(_SUFFIX):
            users, statuses = (_beside(row, f"{question}.{what}", len(responses)) for what in ("users", "status"))
            for value, user, status in zip(responses, users, statuses, strict=True):
                yield _Response(question.removesuffix(_SUFFIX), value, user, status)
        else:
            for each in responses:
                if isinstance(each, dict) and "value" in each and ("user_id" in each or "status" in each):
                    yield _Response(question, each["value"], each.get("user_id"), each.get("status"))


def _beside(row: dict[str, Any], field: str, responses: int) -> list[Any]:
    """What stands beside each of so many responses."""
    column = row.get(field)
    if column is None:
        return [None] * responses
    if not isinstance(column, list) or len(column) != responses:
        raise Rejected("not one user and one status per response", f"{field} is {shown(column)} for {responses} responses")
    return column


def _order(value: Any, fields: dict[str, Any]) -> tuple[list[str], list[Any]] | None:
    """Names of the fields that a response orders, and their ranks; None if it is no ranking."""
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(each, str) and each in fields for each in value):
        return value, list(range(1, len(value) + 1))
    if all(isinstance(each, dict) and isinstance(each.get("value"), str) and each["value"] in fields for each in value):
        return [each["value"] for each in value], [each.get("rank") for each in value]
    return None


def _recognises(row: dict[str, Any]) -> bool:
    return any(_order(each.value, _fields(row)) for each in _responses(row))


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    fields = _fields(row)
    prompt = next((fields[name] for name in PROMPTS if fields.get(name) is not None), None)
    found = [(response, order) for response in _responses(row) if (order := _order(response.value, fields))]
    if not found:
        raise Rejected("no ranking among the responses", shown(sorted({each.question for each in _responses(row)})))
    shown_order = [name for name in fields if any(name in order[0] for _, order in found)]
    for response, (names, ranks) in found:
        if response.status not in (None, "submitted"):
            yield Rejected(DECLINED, f"{response.question}: the response of {response.user} is {shown(response.status)}")
            continue
        rank_of = dict(zip(names, ranks, strict=True))
        if len(rank_of) != len(names):
            yield Rejected("a completion is ranked twice", f"{response.question}: {shown(names)}")
            continue
        asked = [name for name in shown_order if name in rank_of]
        yield {
            "ranking_id": f"{row['id']}-{response.question}-{response.user}" if row.get("id") is not None else None,
            "prompt": prompt,
            "completions": [fields[name] for name in asked],
            "ranks": [rank_of[name] for name in asked],
            "rater_id": response.user,
            "criterion": response.question,
        }


EXPORT = Export(fields=None, recognises=_recognises, rankings=_rankings)
