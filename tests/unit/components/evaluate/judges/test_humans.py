"""Tasks for people go out blind, and Label Studio's export of them comes back as verdicts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.judges.humans import (
    CONFIG_XML,
    FOLDER,
    KEY,
    TIE,
    Labels,
    judge_by_humans,
    read_labels,
    task_of,
    write_tasks,
)
from components.evaluate.judges.pairs import SAME_TEXT, Pair
from components.rlhf.agreement import agreement_by_prompt, alpha_estimate, pairwise_agreement
from components.services.exits import DoNotRetry
from components.services.storage import Storage

PAIRS = [Pair(i, "sft", f"What is {i} and {i}?", f"It is {2 * i}.", "I do not know.", 0) for i in range(40)]


def exported(pair: Pair, *annotations: dict[str, Any]) -> dict[str, Any]:
    shown, _ = task_of(pair, 0)
    return {"id": 7, "data": {"task": "x", **shown}, "annotations": list(annotations), "predictions": [], "project": 2}


def annotation(rater: Any, *result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    when = "2026-01-31T12:00:00.250000Z"
    return {"id": 1, "completed_by": rater, "result": list(result), "was_cancelled": False, "created_at": when, **changes}


def better(pair: Pair, ours: bool) -> dict[str, Any]:
    _, ours_left = task_of(pair, 0)
    return {
        "type": "pairwise",
        "value": {"selected": "left" if ours == ours_left else "right"},
        "from_name": "better",
        "to_name": "answer1,answer2",
    }


def tie(word: str = TIE) -> dict[str, Any]:
    return {"type": "choices", "value": {"choices": [word]}, "from_name": "tie", "to_name": "prompt"}


def read(folder: Path, tasks: Any) -> Labels:
    path = folder / "export.json"
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return read_labels(str(path), Storage.__new__(Storage))[0]


def test_tasks_are_blind_and_the_key_lies_outside_their_folder(tmp_path: Path) -> None:
    same = Pair(40, "sft", "q", "one", "one", 0)
    twice = PAIRS[0]._replace(over="champion")
    assert write_tasks(tmp_path, [*PAIRS, same, twice], seed=0) == 40
    text = (tmp_path / FOLDER / "tasks.json").read_text(encoding="utf-8")
    tasks = [task["data"] for task in json.loads(text)]
    assert not [name for name in ("candidate", "sft", "champion", "policy") if name in text]
    assert all(set(task) == {"task", "prompt", "answer1", "answer2"} for task in tasks)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"tasks.json", "config.xml"}
    key = json.loads((tmp_path / KEY).read_text(encoding="utf-8"))
    left = [key[task["task"]][0]["candidate"] == "left" for task in tasks]
    assert left == [task["answer1"].startswith("It is") for task in tasks]
    assert 8 <= sum(left) <= 32, "a coin"
    assert [each["over"] for each in key[tasks[0]["task"]]] == ["sft", "champion"]
    assert [task_of(pair, 1)[1] for pair in PAIRS] != [task_of(pair, 0)[1] for pair in PAIRS]


def test_the_configuration_shows_what_the_tasks_hold() -> None:
    root = ElementTree.fromstring(CONFIG_XML)
    assert {each.get("value") for each in root.iter("Text")} == {"$prompt", "$answer1", "$answer2"}
    assert [each.get("toName") for each in root.iter("Pairwise")] == ["answer1,answer2"]


def test_verdicts_come_back_whichever_side_the_candidate_stood(tmp_path: Path) -> None:
    tasks = [exported(pair, annotation(4, better(pair, pair.row % 3 > 0))) for pair in PAIRS]
    judgements, votes, counts = judge_by_humans(PAIRS, read(tmp_path, tasks), 0)
    assert [each.outcome for each in judgements] == [float(pair.row % 3 > 0) for pair in PAIRS]
    assert counts == {"raters": 1, "labels": 40, "foreign_tasks": 0, "unreadable_annotations": 0}
    assert len(votes.item_N) == 40


# As Label Studio 1.23.2 exported them (fields that nobody reads left out), after tasks and configuration were imported and labelled
# through its API.
REAL = [
    {
        "id": 1,
        "annotations": [
            {
                "id": 1,
                "completed_by": 1,
                "result": [
                    {
                        "type": "pairwise",
                        "value": {"selected": "right"},
                        "from_name": "better",
                        "to_name": "answer1,answer2",
                    }
                ],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2026-11-25T22:31:33.430373Z",
                "updated_at": "2026-11-25T22:31:33.430407Z",
                "draft_created_at": None,
                "lead_time": None,
                "prediction": {},
                "result_count": 1,
                "unique_id": "9202c225-14da-4f17-987a-1017fa86cebf",
                "task": 1,
                "project": 1,
                "updated_by": 1,
            }
        ],
        "drafts": [],
        "predictions": [],
        "data": {
            "task": "233e4001820286f3a1c3324bb07781dc",
            "prompt": "What is 0 and <b>0</b>?",
            "answer1": "I do not know.",
            "answer2": "It is 0.",
        },
        "meta": {},
        "total_annotations": 1,
        "cancelled_annotations": 0,
        "project": 1,
    },
    {
        "id": 3,
        "annotations": [
            {
                "id": 3,
                "completed_by": 1,
                "result": [
                    {
                        "type": "choices",
                        "value": {"choices": ["equally good"]},
                        "from_name": "tie",
                        "to_name": "prompt",
                    }
                ],
                "was_cancelled": False,
                "created_at": "2026-11-25T22:31:34.035786Z",
            }
        ],
        "data": {"prompt": "What is 2 and <b>2</b>?", "answer1": "I do not know.", "answer2": "It is 4."},
    },
    {
        "id": 4,
        "annotations": [
            {"id": 4, "completed_by": 1, "result": [], "was_cancelled": True, "created_at": "2026-11-25T22:31:34.349063Z"}
        ],
        "data": {"prompt": "What is 3 and <b>3</b>?", "answer1": "It is 6.", "answer2": "I do not know."},
    },
    {
        "id": 5,
        "annotations": [],
        "data": {"prompt": "What is 4 and <b>4</b>?", "answer1": "It is 8.", "answer2": "I do not know."},
    },
]


def test_a_real_export_is_read(tmp_path: Path) -> None:
    pairs = [Pair(i, "sft", f"What is {i} and <b>{i}</b>?", f"It is {2 * i}.", "I do not know.", 0) for i in (0, 2, 3, 4)]
    assert [task_of(pair, 0)[0]["answer1"] for pair in pairs] == [task["data"]["answer1"] for task in REAL]
    judgements, _, counts = judge_by_humans(pairs, read(tmp_path, REAL), 0)
    assert [(each.outcome, each.asked) for each in judgements] == [(1.0, True), (0.5, True), (None, True), (None, False)]
    assert judgements[0].details["task"] == REAL[0]["data"]["task"]
    assert counts == {"raters": 1, "labels": 2, "foreign_tasks": 0, "unreadable_annotations": 0}


def test_several_raters_ties_cancelled_and_unreadable_annotations(tmp_path: Path) -> None:
    one, two, three, four, five = PAIRS[:5]
    tasks = [
        exported(one, annotation(4, better(one, True)), annotation({"id": 5, "email": "x@y.z"}, better(one, False))),
        exported(two, annotation(4, better(two, True)), annotation(5, tie())),
        exported(three, annotation(4, better(three, True), was_cancelled=True)),
        exported(
            four,
            annotation(4, better(four, True), created_at="2026-01-31T12:00:00Z"),
            annotation(4, better(four, False), created_at="2026-01-31T13:00:00Z"),
            annotation(5, better(four, True), tie()),  # says two things
            annotation(5),  # says nothing
            annotation(5, tie("hardly")),
            "no annotation",
        ),
        {"id": 9, "data": {"prompt": "another", "answer1": "x", "answer2": "y"}, "annotations": [annotation(4, tie())]},
    ]
    asked = [one, two, three, four, five, five._replace(theirs=five.ours)]
    judgements, votes, counts = judge_by_humans(asked, read(tmp_path, tasks), 0)
    assert [(each.outcome, each.asked) for each in judgements[:5]] == [
        (0.5, True),
        (1.0, True),
        (None, True),
        (0.0, True),
        (None, False),
    ]
    assert judgements[5] is SAME_TEXT
    assert counts == {"raters": 2, "labels": 5, "foreign_tasks": 1, "unreadable_annotations": 4}
    assert "x@y.z" not in str((judgements, votes))


def test_agreement_of_raters(tmp_path: Path) -> None:
    """Raters 4 and 5 agree on 30 of 40 pairs; a task that stands twice in the project counts a rater once."""
    tasks = [
        exported(
            pair, annotation(4, better(pair, pair.row % 2 == 0)), annotation(5, better(pair, pair.row % 2 == (pair.row % 4 == 3)))
        )
        for pair in PAIRS
    ]
    expected = [(pair.row % 2 == 0) == (pair.row % 2 == (pair.row % 4 == 3)) for pair in PAIRS]
    judgements, votes, counts = judge_by_humans(PAIRS, read(tmp_path, [*tasks, *tasks]), 0)
    assert counts["labels"] == 80
    agreement = agreement_by_prompt(votes)
    assert pairwise_agreement(agreement, 0, 200).value == sum(expected) / 40
    assert alpha_estimate(agreement, 0, 100).value < 1
    assert [each.outcome == 0.5 for each in judgements] == [not same for same in expected]


def test_labels_of_other_answers_are_refused(tmp_path: Path) -> None:
    others = [pair._replace(ours=f"{pair.ours} Really.") for pair in PAIRS]
    labels = read(tmp_path, [exported(pair, annotation(4, better(pair, True))) for pair in others])
    with pytest.raises(DoNotRetry, match="none of the 40 labelled tasks shows answers of this evaluation"):
        judge_by_humans(PAIRS, labels, 0)
    judgements, _, counts = judge_by_humans(PAIRS, Labels({}, 0), 0)
    assert not any(each.asked for each in judgements), "nobody has labelled anything yet"
    assert counts["labels"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a list of tasks"),
        ('{"id": 1}', "is not a list of tasks"),
        ('[{"id": 1, "prompt": "q"}]', "task 1: expected an object with data and annotations"),
        ('[{"data": {}, "annotations": []}, 3]', "task 2"),
        ('[{"data": {"prompt": "\\ud800"}, "annotations": []}]', "task 1: its text is not Unicode"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_export_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DoNotRetry, match=said):
        read_labels(str(path), Storage.__new__(Storage))
    with pytest.raises(DoNotRetry, match="cannot be read"):
        read_labels(str(tmp_path / "none.json"), Storage.__new__(Storage))
