"""Each export's rows as rankings, by hand; and what is none, by its reason."""

from __future__ import annotations

from typing import Any

import pytest

from components.ingest_rankings.formats import parse
from components.ingest_rankings.rows import DECLINED, Rejected
from tests.unit.components.ingest_rankings.exports.samples import (
    ARGILLA,
    ARGILLA_1,
    ARGILLA_FLAT,
    ITEMS,
    LABEL_STUDIO,
    LABEL_STUDIO_RANKER,
    PAIR,
    RATINGS,
    SAMPLES,
    SCALE_AI,
    SUMMEVAL,
    SUMMEVAL_ROW,
    SURGE_AI,
    ULTRAFEEDBACK,
    WEBGPT,
    annotation,
    pairwise,
    ranker,
    rankings,
    read,
    reasons,
    task,
    turn,
)

PROMPT = [{"role": "user", "content": "My parcel is late."}]


@pytest.mark.parametrize("name", list(SAMPLES))
def test_each_is_recognised_by_its_fields_and_nothing_of_it_is_left_out(name: str) -> None:
    for parsed in parse(SAMPLES[name], "auto", "desk", 0.1):
        if not isinstance(parsed, Rejected):
            assert parsed.form == name.split()[0]
            assert parsed.ignored == []


# -- Label Studio ----------------------------------------------------------------------------------------------------------


def test_label_studio_each_annotation_is_a_ranking_of_its_rater() -> None:
    first, second = rankings(LABEL_STUDIO)
    assert first.prompt == PROMPT
    assert first.completions == second.completions == ["I am sorry.", "Wait."], "left first, as they were shown"
    assert (first.ranks, second.ranks) == ([1, 2], [2, 1])
    assert (first.rater_id, second.rater_id) == ("4", "9")
    assert (first.ranking_id, second.ranking_id) == ("7-31", "7-32")
    assert first.collected_at == "2026-01-31T12:00:00.250000Z"


def test_label_studio_a_ranker_orders_the_items_of_a_list() -> None:
    (found,) = rankings(LABEL_STUDIO_RANKER)
    assert found.completions == ["Wait.", "I am sorry.", "Parcels are slow."]
    assert found.ranks == [2, 1, 3]


@pytest.mark.parametrize(
    ("data", "to_name", "left"),
    [
        ({"prompt": "Hi", "text_a": "A", "text_b": "B"}, "pw", "A"),
        ({"prompt": "Hi", "right": "B", "left": "A"}, "pw", "A"),
        ({"question": "Hi", "Response 2": "B", "Response 1": "A"}, "pw", "A"),
        ({"prompt": "Hi", "x": "A", "y": "B", "text1": "C", "text2": "D"}, "y,x", "B"),
    ],
)
def test_label_studio_what_was_left_and_right(data: dict[str, Any], to_name: str, left: str) -> None:
    (found,) = rankings(task(data, annotation(pairwise("left", to_name))))
    assert found.completions[found.ranks.index(1)] == left


def test_label_studio_a_user_object_is_its_number_and_the_address_is_left_out() -> None:
    (found,) = rankings(task(PAIR, annotation(pairwise("left"), completed_by={"id": 4, "email": "a@example.org"})))
    assert found.rater_id == "4"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (task(PAIR), "task without annotations"),
        (task(PAIR, annotation(pairwise("left"), was_cancelled=True)), DECLINED),
        (task(PAIR, annotation([])), "annotation without one comparison"),
        (task(PAIR, annotation(pairwise("left") * 2)), "annotation without one comparison"),
        (task(PAIR, annotation(pairwise("both"))), "selected is neither left nor right"),
        (task({"prompt": "Hi", "x": "A", "y": "B"}, annotation(pairwise("left"))), "not clear what was left and right"),
        (task({"a1": "A", "a2": "B"}, annotation(pairwise("left"))), "no prompt in the task's data"),
        (task(ITEMS, annotation(ranker(["x1", "x2"]))), "not every item is ranked once"),
        (task(ITEMS, annotation(ranker(["x1", "x2", "x2"]))), "not every item is ranked once"),
        (task(ITEMS, annotation(ranker(["x1", "x2", "y"]))), "ranked items are not in the task's data"),
        (
            task(ITEMS, annotation([{"type": "ranker", "value": {"ranker": {"good": ["x1"], "bad": ["x2", "x3"]}}}])),
            "not one ranked list",
        ),
        (task(PAIR, annotation("left")), "annotation's result is not a list of objects"),  # type: ignore[arg-type]
    ],
)
def test_label_studio_what_is_no_ranking(row: dict[str, Any], reason: str) -> None:
    assert reasons(row) == [reason]


def test_label_studio_one_bad_annotation_does_not_hide_the_others() -> None:
    row = task(PAIR, annotation(pairwise("left")), annotation([], was_cancelled=True, id=32), annotation(pairwise("right"), id=33))
    found = read(row)
    assert [isinstance(each, Rejected) for each in found] == [False, True, False]
    assert "annotation 32 of task 7" in str(found[1])


# -- Argilla ---------------------------------------------------------------------------------------------------------------


def test_argilla_a_response_is_a_ranking_of_its_user() -> None:
    first, second = rankings(ARGILLA)
    assert first.prompt == PROMPT
    assert first.completions == second.completions == ["Wait.", "I am sorry."], "in the order of the record's fields"
    assert (first.ranks, second.ranks) == ([2, 1], [1, 2])
    assert (first.rater_id, first.criterion, first.ranking_id) == ("u1", "rank", "r1-rank-u1")


def test_argilla_flat_records_have_the_status_too() -> None:
    first, second = read(ARGILLA_FLAT)
    assert first == rankings(ARGILLA)[0]
    assert isinstance(second, Rejected)
    assert second.reason == DECLINED


def test_argilla_1_knows_ties() -> None:
    first, second = rankings(ARGILLA_1)
    assert (first.ranks, second.ranks) == ([1, 1], [1, 2])


def test_argilla_the_same_field_twice_is_no_order() -> None:
    row = {**ARGILLA, "responses": {"rank": [{"value": ["reply-2", "reply-2"], "user_id": "u1"}]}}
    assert reasons(row) == ["a completion is ranked twice"]


# -- UltraFeedback, WebGPT, ratings ----------------------------------------------------------------------------------------


def test_ultrafeedback_each_criterion_is_a_ranking() -> None:
    found = {each.criterion: each for each in rankings(ULTRAFEEDBACK)}
    assert {name: each.ranks for name, each in found.items()} == {"helpfulness": [2, 1], "honesty": [1, 1], "overall": [2, 1]}
    assert found["overall"].policies == ["m-a", "m-b"]
    assert found["overall"].rater_id == "gpt-4"
    assert found["overall"].source == "evol_instruct"


def test_ultrafeedback_a_criterion_without_a_number_is_rejected_alone() -> None:
    first, second = ULTRAFEEDBACK["completions"]  # type: ignore[misc]
    rated = {**second, "annotations": {**second["annotations"], "honesty": {"Rating": "N/A"}}}  # type: ignore[index]
    row = {**ULTRAFEEDBACK, "completions": [first, rated]}
    assert reasons(row) == ["a rating is not a number"]
    assert len(read(row)) == 3


def test_webgpt_scores_become_ranks_and_equal_ones_tie() -> None:
    (found,) = rankings(WEBGPT)
    assert found.ranks == [2, 1]
    assert found.prompt == [{"role": "user", "content": "Why are parcels late?"}]
    assert found.source == "eli5"
    assert rankings({**WEBGPT, "score_0": 0, "score_1": 0.0})[0].ranks == [1, 1]


def test_ratings_are_a_ranking_for_every_rater_and_criterion() -> None:
    found = {(each.rater_id, each.criterion): each for each in rankings(RATINGS)}
    assert {key: each.ranks for key, each in found.items()} == {
        ("w1", "coherence"): [2, 1, 3],
        ("w1", "fluency"): [1, 3, 1],
        ("w2", "coherence"): [1, 1],
    }
    assert found["w2", "coherence"].completions == ["Long.", "Short."], "w2 rated these two"
    assert found["w2", "coherence"].policies == ["M1", "M2"]


def test_ratings_without_a_rater_or_given_twice_are_rejected() -> None:
    def row(*ratings: Any) -> dict[str, Any]:
        return {"prompt": "Hi", "completions": [{"text": "a", "ratings": list(ratings)}, {"text": "b", "ratings": []}]}

    assert reasons(row({"score": 1})) == ["a rating without its rater"]
    assert reasons(row({"rater_id": "w", "score": 1}, {"rater_id": "w", "score": 2})) == [
        "a completion is rated twice by one rater"
    ]
    assert reasons(row({"rater_id": "w", "score": 1})) == ["fewer than two completions"]
    assert reasons(row()) == ["no ratings"]


# -- Scale AI, Surge AI, SummEval ------------------------------------------------------------------------------------------


def test_scale_ai_each_turn_with_several_answers_is_a_ranking_after_the_selected_one() -> None:
    first, second = rankings(SCALE_AI)
    assert (first.prompt, first.completions, first.ranks) == (PROMPT, ["Wait.", "I am sorry."], [2, 1])
    assert second.prompt == [
        *PROMPT,
        {"role": "assistant", "content": "I am sorry."},
        {"role": "user", "content": "Where is it?"},
    ]
    assert second.ranks == [2, 2, 1], "an annotation that orders all answers, with groups as ties"
    assert second.policies == ["m-a", "m-b", "m-c"]
    assert (second.ranking_id, second.collected_at) == ("task_1-turn_2", "2026-01-31T12:00:00Z")


def scale_task(*turns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**SCALE_AI, "threads": [{"id": "thread_1", "turns": list(turns)}], **changes}


PICK_A = [{"key": "selected_model_id", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**SCALE_AI, "status": "pending"}, [DECLINED]),
        (scale_task(turn(1, "Hi", PICK_A, ("a", "x"))), ["no turn with two answers"]),
        (scale_task(turn(1, "Hi", [], ("a", "x"), ("b", "y"))), ["no order of the answers"]),
        (scale_task(turn(1, "Hi", PICK_A, ("a", "x"), ("a", "y"))), ["answers without source_ids of their own"]),
        (
            scale_task(turn(1, "Hi", [], ("a", "x"), ("b", "y")), turn(2, "Ho", PICK_A, ("a", "x"), ("b", "y"))),
            ["no order of the answers", "not clear what the turn goes on from"],
        ),
    ],
)
def test_scale_ai_what_is_no_ranking(row: dict[str, Any], expected: list[str]) -> None:
    assert reasons(row) == expected


def test_scale_ai_after_a_rewritten_answer_the_next_prompt_is_not_known() -> None:
    first = turn(1, "Hi", PICK_A, ("a", "x"), ("b", "y"))
    first["messages"][1]["annotations"] = [{"key": "rewrite", "value": "z"}]
    found = read(scale_task(first, turn(2, "Ho", PICK_A, ("a", "x"), ("b", "y"))))
    assert [isinstance(each, Rejected) for each in found] == [False, True]


def test_surge_ai_each_response_is_a_ranking_of_its_worker() -> None:
    first, second = rankings(SURGE_AI)
    assert (first.prompt, first.completions, first.ranks, first.rater_id) == (PROMPT, ["Wait.", "I am sorry."], [2, 1], "w1")
    assert (second.ranks, second.rater_id, second.ranking_id) == ([1, 1], "w2", "s2")
    skipped = {**SURGE_AI, "responses": [{"id": "s3", "worker_id": "w3", "data": {"preference": None}}]}
    assert reasons(skipped) == ["neither ranks nor scores"]


def test_summeval_rows_of_an_article_are_a_ranking_for_every_rater_and_criterion() -> None:
    found = {(each.rater_id, each.criterion): each.ranks for each in rankings(SUMMEVAL)}
    assert found == {
        ("expert-1", "coherence"): [2, 1],
        ("expert-1", "fluency"): [1, 1],
        ("expert-2", "coherence"): [1, 1],
        ("expert-2", "fluency"): [2, 1],
        ("turker-1", "coherence"): [1, 1],
        ("turker-1", "fluency"): [2, 1],
    }
    assert reasons(SUMMEVAL_ROW) == ["one summary of an article alone"]
