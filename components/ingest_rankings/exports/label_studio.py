"""Label Studio's JSON export: a task with the annotations of its raters; Pairwise, and List with Ranker.

    {"id": 7, "data": {"prompt": "…", "answer1": "…", "answer2": "…"}, "annotations": [
        {"id": 31, "completed_by": 4, "was_cancelled": false, "created_at": "…", "result": [
            {"type": "pairwise", "value": {"selected": "left"}, "from_name": "pw", "to_name": "answer1,answer2"}]}]}

The export does not hold the labelling configuration, which says what was shown where. What stood left and right is taken from
`to_name` if it names two fields of the data, else from the one pair of fields whose names differ in 1 and 2, a and b, or left and
right. What a Ranker ordered is the list in the data that holds its items' ids. The prompt is the field `prompt`, or `question`,
`instruction`, `input` or `context`. Where that does not find them, give the project's data these names.

https://labelstud.io/guide/export, https://labelstud.io/tags/pairwise, https://labelstud.io/tags/ranker
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import DECLINED, Rejected, shown
from components.rlhf.label_studio import rater_of, results_of, side_of

PROMPTS = ("prompt", "question", "instruction", "input", "context")
ITEM_TEXTS = ("body", "text", "html", "title")  # of an item of a List, the longest kind first
_SIDE = re.compile(r"(.*?)[-_ ]?(1|2|a|b|left|right)", re.IGNORECASE)
_SIDES = {"1": "left", "a": "left", "left": "left", "2": "right", "b": "right", "right": "right"}


def _recognises(row: dict[str, Any]) -> bool:
    return isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    if not row["annotations"]:
        raise Rejected("task without annotations", f"task {shown(row.get('id'))}; export annotated tasks only")
    for annotation in row["annotations"]:
        try:
            yield _ranking(row, annotation)
        except Rejected as problem:
            yield problem


def _ranking(task: dict[str, Any], annotation: Any) -> Native:
    if not isinstance(annotation, dict):
        raise Rejected("annotation is not an object", shown(annotation))
    name = f"annotation {annotation.get('id')} of task {task.get('id')}"
    if annotation.get("was_cancelled"):
        raise Rejected(DECLINED, name)
    found = results_of(annotation, "pairwise", "ranker")
    if found is None:
        raise Rejected("annotation's result is not a list of objects", f"{name}: {shown(annotation.get('result'))}")
    if len(found) != 1:
        kinds = sorted({str(each.get("type")) for each in annotation["result"]})
        raise Rejected(
            "annotation without one comparison", f"{name}: {len(found)} of type pairwise or ranker; types {shown(kinds)}"
        )
    value = found[0].get("value")
    if not isinstance(value, dict):
        raise Rejected("annotation's value is not an object", f"{name}: {shown(value)}")
    read = _pair if found[0]["type"] == "pairwise" else _order
    completions, ranks = read(task["data"], found[0], value, name)
    return {
        "ranking_id": f"{task.get('id')}-{annotation['id']}" if annotation.get("id") is not None else None,
        "prompt": _prompt(task["data"], name),
        "completions": completions,
        "ranks": ranks,
        "rater_id": rater_of(annotation.get("completed_by")),
        "collected_at": annotation.get("created_at"),
    }


def _prompt(data: dict[str, Any], name: str) -> Any:
    for field in PROMPTS:
        if data.get(field) is not None:
            return data[field]
    raise Rejected("no prompt in the task's data", f"{name}: fields {shown(sorted(data))}; expected one of {', '.join(PROMPTS)}")


def _pair(data: dict[str, Any], result: dict[str, Any], value: dict[str, Any], name: str) -> tuple[list[Any], list[int]]:
    selected = side_of(result)
    if selected is None:
        raise Rejected("selected is neither left nor right", f"{name}: {shown(value.get('selected'))}")
    left, right = _sides(data, result.get("to_name"), name)
    return [data[left], data[right]], [1, 2] if selected == "left" else [2, 1]


def _sides(data: dict[str, Any], to_name: Any, name: str) -> tuple[str, str]:
    """The two fields of the data that were shown, left first."""
    named = [part.strip() for part in str(to_name).split(",")]
    if len(named) == 2 and all(part in data for part in named):
        return named[0], named[1]
    stems: dict[str, dict[str, str]] = {}
    for field in data:
        if (found := _SIDE.fullmatch(field)) and isinstance(data[field], str):
            stems.setdefault(found[1].lower(), {}).setdefault(_SIDES[found[2].lower()], field)
    pairs = [sides for sides in stems.values() if len(sides) == 2]
    if len(pairs) != 1:
        raise Rejected(
            "not clear what was left and right",
            f"{name}: fields {shown(sorted(data))} and to_name {shown(to_name)}; expected two such as answer1 and answer2",
        )
    return pairs[0]["left"], pairs[0]["right"]


def _order(data: dict[str, Any], result: dict[str, Any], value: dict[str, Any], name: str) -> tuple[list[Any], list[int]]:
    lists = value.get("ranker")
    if not isinstance(lists, dict) or len(lists) != 1:
        raise Rejected(
            "not one ranked list", f"{name}: {shown(lists)}; a Ranker with buckets sorts into classes, and is no ranking"
        )
    order = next(iter(lists.values()))
    if not isinstance(order, list) or not all(isinstance(each, (str, int)) for each in order):
        raise Rejected("ranked items are not a list of ids", f"{name}: {shown(order)}")
    places = {str(item): place for place, item in enumerate(order, 1)}
    for items in data.values():
        if isinstance(items, list) and items and all(isinstance(each, dict) and each.get("id") is not None for each in items):
            ids = [str(each["id"]) for each in items]
            if set(places) <= set(ids):
                if len(set(ids)) != len(ids) or len(places) != len(order) or len(order) != len(ids):
                    raise Rejected("not every item is ranked once", f"{name}: ranked {shown(order)} of {shown(ids)}")
                return [_text(each) for each in items], [places[each] for each in ids]
    raise Rejected("ranked items are not in the task's data", f"{name}: {shown(order)}; fields {shown(sorted(data))}")


def _text(item: dict[str, Any]) -> Any:
    return next((item[field] for field in ITEM_TEXTS if item.get(field)), None)


EXPORT = Export(
    fields=frozenset(
        {
            *("id", "data", "annotations", "predictions", "drafts", "meta", "project", "file_upload", "inner_id", "allow_skip"),
            *("created_at", "updated_at", "updated_by", "total_annotations", "cancelled_annotations", "total_predictions"),
            *("comment_count", "unresolved_comment_count", "last_comment_updated_at", "comment_authors"),
        }
    ),
    recognises=_recognises,
    rankings=_rankings,
)
