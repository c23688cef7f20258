"""Scale AI's tasks, as its Generative AI platform delivers them: threads of turns, each with the answers of several models.

    {"task_id": "…", "status": "completed", "completed_at": "…", "threads": [{"id": "…", "turns": [{"id": "…",
        "messages": [{"role": "user", "content": {"text": "…"}},
                     {"role": "assistant", "content": {"text": "…"}, "source_id": "m-a"},
                     {"role": "assistant", "content": {"text": "…"}, "source_id": "m-b"}],
        "annotations": [{"key": "selected_model_id", "value": "m-a"}]}]}]}

Each turn with two answers or more is a ranking. Its order is an annotation of the turn whose value lists the answers' `source_id`,
best first, with groups for ties; else `selected_model_id`, which says the best, so that the others are tied. The next turn goes
on from the selected answer. After one that its rater rewrote it is not known which text was gone on from, and what follows is
rejected. The tasks do not say who worked on them.

https://docs.genai.scale.com/project-archetypes/rlhf, https://docs.genai.scale.com/core-resources/task
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import DECLINED, Rejected, shown

SELECTED, REWRITE = "selected_model_id", "rewrite"
_Message = dict[str, Any]


def _recognises(row: dict[str, Any]) -> bool:
    return "task_id" in row and isinstance(row.get("threads"), list)


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    name = f"task {shown(row['task_id'])}"
    if row.get("status") != "completed":
        raise Rejected(DECLINED, f"{name} is {shown(row.get('status'))}")
    found = 0
    for thread in row["threads"]:
        history: list[_Message] = []
        rewritten = False
        for number, turn in enumerate(_list_of(thread, "turns", name), 1):
            where = f"{name}, thread {thread.get('id')}, turn {number}"
            messages = _list_of(turn, "messages", where)
            answers = [each for each in messages if each.get("role") == "assistant"]
            history += [_plain(each, where) for each in messages if each.get("role") != "assistant"]
            if len(answers) > 1:
                found += 1
                if rewritten:
                    yield Rejected("not clear what the turn goes on from", f"{where}: an answer before it was rewritten")
                    continue
                try:
                    ranks = _ranks(turn, answers, where)
                except Rejected as problem:
                    yield problem
                    rewritten = True  # without the order it is not known either
                    continue
                yield {
                    "ranking_id": f"{row['task_id']}-{turn.get('id') or number}",
                    "prompt": list(history),
                    "completions": [_plain(each, where)["content"] for each in answers],
                    "ranks": ranks,
                    "policies": [each.get("source_id") for each in answers],
                    "collected_at": row.get("completed_at"),
                }
                answers = [answers[ranks.index(1)]]
            rewritten |= any(_annotation(each, REWRITE) is not None for each in answers)
            history += [_plain(each, where) for each in answers]
    if not found:
        raise Rejected("no turn with two answers", f"{name}: {len(row['threads'])} threads")


def _list_of(value: Any, field: str, name: str) -> list[Any]:
    items = value.get(field) if isinstance(value, dict) else None
    if not isinstance(items, list) or not all(isinstance(each, dict) for each in items):
        raise Rejected(f"{field} are not a list of objects", f"{name}: {shown(items)}")
    return items


def _plain(message: _Message, name: str) -> _Message:
    content = message.get("content")
    if not isinstance(content, dict) or not isinstance(content.get("text"), str) or content.get("attachments"):
        raise Rejected("a message is not plain text", f"{name}: {shown(content)}")
    return {"role": message.get("role"), "content": content["text"]}


def _annotation(owner: dict[str, Any], key: str) -> Any:
    annotations = owner.get("annotations")
    items = annotations if isinstance(annotations, list) else []
    return next((each.get("value") for each in items if isinstance(each, dict) and each.get("key") == key), None)


def _ranks(turn: dict[str, Any], answers: list[_Message], name: str) -> list[int]:
    """Dense ranks of the answers, by an annotation that orders them all, or by the one that was selected."""
    sources = [each.get("source_id") for each in answers]
    if len({str(each) for each in sources}) != len(sources) or None in sources:
        raise Rejected("answers without source_ids of their own", f"{name}: {shown(sources)}")
    annotations = turn.get("annotations")
    for annotation in annotations if isinstance(annotations, list) else []:
        value = annotation.get("value") if isinstance(annotation, dict) else None
        if isinstance(value, list):
            groups = [each if isinstance(each, list) else [each] for each in value]
            place_of = {str(source): place for place, group in enumerate(groups, 1) for source in group}
            if sum(map(len, groups)) == len(sources) and place_of.keys() == {str(each) for each in sources}:
                return [place_of[str(each)] for each in sources]
    selected = _annotation(turn, SELECTED)
    if selected not in sources:
        raise Rejected("no order of the answers", f"{name}: {SELECTED} is {shown(selected)}; answers are of {shown(sources)}")
    return [1 if each == selected else 2 for each in sources]


EXPORT = Export(
    fields=frozenset(
        {
            "task_id",
            "project",
            "batch",
            "status",
            "created_at",
            "completed_at",
            "metadata",
            "threads",
            "errors",
            "sensitive_content_reports",
        }
    ),
    recognises=_recognises,
    rankings=_rankings,
)
