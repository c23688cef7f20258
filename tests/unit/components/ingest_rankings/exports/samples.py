"""One row of each export as its tool writes it, with two raters where it can hold several; and how one is read."""

from __future__ import annotations

from typing import Any

from components.ingest_rankings.formats import parse
from components.ingest_rankings.rows import Rejected
from components.rlhf.records import Ranking


def read(row: dict[str, Any], form: str = "auto") -> list[Ranking | Rejected]:
    return [each if isinstance(each, Rejected) else each.ranking for each in parse(row, form, "unspecified", 0.1)]


def rankings(row: dict[str, Any], form: str = "auto") -> list[Ranking]:
    found = read(row, form)
    assert not [each for each in found if isinstance(each, Rejected)], found
    return [each for each in found if isinstance(each, Ranking)]


def reasons(row: dict[str, Any], form: str = "auto") -> list[str]:
    return [each.reason for each in read(row, form) if isinstance(each, Rejected)]


def annotation(result: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """One rater's annotation of a Label Studio task."""
    return {
        "id": 31,
        "completed_by": 4,
        "result": result,
        "was_cancelled": False,
        "ground_truth": False,
        "lead_time": 8.4,
        "created_at": "2026-01-31T12:00:00.250000Z",
        "updated_at": "2026-01-31T12:05:00Z",
        "task": 7,
        "project": 2,
        **changes,
    }


def pairwise(selected: str, to_name: str = "pw") -> list[dict[str, Any]]:
    return [
        {"type": "pairwise", "value": {"selected": selected}, "from_name": "pw", "to_name": to_name, "id": "x", "origin": "manual"}
    ]


def ranker(order: list[Any], name: str = "rank") -> list[dict[str, Any]]:
    return [{"type": "ranker", "value": {"ranker": {name: order}}, "from_name": name, "to_name": "cands"}]


def task(data: dict[str, Any], *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": 7, "data": data, "annotations": list(annotations), "predictions": [], "meta": {}, "project": 2, "inner_id": 1}


PAIR = {"prompt": "My parcel is late.", "answer1": "I am sorry.", "answer2": "Wait."}
ITEMS = {
    "prompt": "My parcel is late.",
    "items": [{"id": "x1", "body": "Wait."}, {"id": "x2", "body": "I am sorry."}, {"id": "x3", "body": "Parcels are slow."}],
}

LABEL_STUDIO = task(PAIR, annotation(pairwise("left")), annotation(pairwise("right"), id=32, completed_by=9))
LABEL_STUDIO_RANKER = task(ITEMS, annotation(ranker(["x2", "x1", "x3"])))
ARGILLA = {
    "id": "r1",
    "fields": {"prompt": "My parcel is late.", "reply-1": "Wait.", "reply-2": "I am sorry."},
    "metadata": {},
    "suggestions": {},
    "responses": {"rank": [{"value": ["reply-2", "reply-1"], "user_id": "u1"}, {"value": ["reply-1", "reply-2"], "user_id": "u2"}]},
    "vectors": {},
    "status": "completed",
    "_server_id": "s1",
}
ARGILLA_FLAT = {
    "id": "r1",
    "status": "completed",
    "_server_id": "s1",
    **ARGILLA["fields"],  # type: ignore[dict-item]
    "rank.responses": [["reply-2", "reply-1"], ["reply-1", "reply-2"]],
    "rank.responses.users": ["u1", "u2"],
    "rank.responses.status": ["submitted", "discarded"],
}
ARGILLA_1 = {
    **ARGILLA["fields"],  # type: ignore[dict-item]
    "rank": [
        {"user_id": "u1", "status": "submitted", "value": [{"rank": 1, "value": "reply-2"}, {"rank": 1, "value": "reply-1"}]},
        {"user_id": "u2", "status": "submitted", "value": [{"rank": 2, "value": "reply-2"}, {"rank": 1, "value": "reply-1"}]},
    ],
    "rank-suggestion": None,
    "metadata": "{}",
}
ULTRAFEEDBACK = {
    "instruction": "My parcel is late.",
    "source": "evol_instruct",
    "models": ["m-a", "m-b"],
    "completions": [
        {
            "model": "m-a",
            "response": "Wait.",
            "overall_score": 3.0,
            "annotations": {
                "helpfulness": {"Rating": "2", "Rationale": "Short."},
                "honesty": {"Rating": "5", "Rationale": "True."},
            },
        },
        {
            "model": "m-b",
            "response": "I am sorry.",
            "overall_score": 7.5,
            "annotations": {"helpfulness": {"Rating": "4", "Rationale": "Kind."}, "honesty": {"Rating": "5", "Rationale": "True."}},
        },
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "q1", "full_text": "Why are parcels late?"},
    "quotes_0": {"title": ["Post"], "extract": ["Snow."]},
    "answer_0": "Snow.",
    "tokens_0": {},
    "score_0": -0.5,
    "quotes_1": {"title": [], "extract": []},
    "answer_1": "Snow and strikes.",
    "tokens_1": {},
    "score_1": 0.5,
}
RATINGS = {
    "prompt": "Sum this up: …",
    "completions": [
        {
            "text": "Long.",
            "policy": "M1",
            "ratings": [{"rater_id": "w1", "coherence": 2, "fluency": 5}, {"rater_id": "w2", "coherence": 4}],
        },
        {
            "text": "Short.",
            "policy": "M2",
            "ratings": [{"rater_id": "w1", "coherence": 3, "fluency": 4}, {"rater_id": "w2", "coherence": 4}],
        },
        {"text": "None.", "policy": "M3", "ratings": [{"rater_id": "w1", "coherence": 1, "fluency": 5}]},
    ],
}


def turn(number: int, text: str, annotations: list[dict[str, Any]], *answers: tuple[str, str]) -> dict[str, Any]:
    """One turn of a Scale AI thread: what the user says, and the answers by source_id."""
    said = [{"role": "user", "content": {"text": text}, "source_id": "user", "annotations": []}]
    answered = [{"role": "assistant", "content": {"text": answer}, "source_id": who, "annotations": []} for who, answer in answers]
    return {"id": f"turn_{number}", "messages": said + answered, "annotations": annotations}


SCALE_AI = {
    "task_id": "task_1",
    "project": "project_1",
    "batch": "batch_1",
    "status": "completed",
    "created_at": "2026-01-31T11:00:00Z",
    "completed_at": "2026-01-31T12:00:00Z",
    "metadata": {},
    "threads": [
        {
            "id": "thread_1",
            "turns": [
                turn(
                    1,
                    "My parcel is late.",
                    [{"key": "selected_model_id", "value": "m-b"}, {"key": "likert_value", "value": 6}],
                    ("m-a", "Wait."),
                    ("m-b", "I am sorry."),
                ),
                turn(
                    2,
                    "Where is it?",
                    [{"key": "order", "value": [["m-c"], ["m-a", "m-b"]]}],
                    ("m-a", "No idea."),
                    ("m-b", "Somewhere."),
                    ("m-c", "In Kiel."),
                ),
            ],
            "annotations": [],
        }
    ],
}
SURGE_AI = {
    "id": "t1",
    "project_id": "p1",
    "status": "completed",
    "created_at": "2026-01-31T11:00:00.000Z",
    "fields": {"prompt": "My parcel is late.", "response_a": "Wait.", "response_b": "I am sorry."},
    "gold_standards": None,
    "responses": [
        {"id": "s1", "worker_id": "w1", "completed_at": "2026-01-31T12:00:00.000Z", "data": {"preference": "B"}},
        {"id": "s2", "worker_id": "w2", "completed_at": "2026-01-31T12:01:00.000Z", "data": {"preference": "Tie"}},
    ],
}
SUMMEVAL_ROW = {
    "id": "dm-test-1",
    "model_id": "M11",
    "decoded": "Long.",
    "text": "A long article.",
    "expert_annotations": [{"coherence": 2, "fluency": 4}, {"coherence": 3, "fluency": 4}],
    "turker_annotations": [{"coherence": 1, "fluency": 1}],
    "references": ["Short."],
    "filepath": "dm/1.story",
}
SUMMEVAL = {
    "rows": [
        SUMMEVAL_ROW,
        {
            **SUMMEVAL_ROW,
            "model_id": "M12",
            "decoded": "Short.",
            "expert_annotations": [{"coherence": 5, "fluency": 4}, {"coherence": 3, "fluency": 5}],
            "turker_annotations": [{"coherence": 1, "fluency": 2}],
        },
    ]
}
SAMPLES: dict[str, dict[str, Any]] = {
    "label_studio": LABEL_STUDIO,
    "label_studio ranker": LABEL_STUDIO_RANKER,
    "argilla": ARGILLA,
    "argilla flat": ARGILLA_FLAT,
    "argilla 1": ARGILLA_1,
    "ultrafeedback": ULTRAFEEDBACK,
    "webgpt": WEBGPT,
    "ratings": RATINGS,
    "scale_ai": SCALE_AI,
    "surge_ai": SURGE_AI,
    "summeval": SUMMEVAL,
}
