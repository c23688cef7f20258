"""Each check on answers that keep to it and on answers that do not; the shipped probes are what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.instructions import CHECKS, Instruction, follows, instruction_of, instruction_records
from components.evaluate.measures import Reading
from components.evaluate.probe_sets import FOLDER, NONE, SHIPPED, find_probes, measure_instructions, measure_plain_text
from components.evaluate.refusals import SIMULATED_EACH
from components.rlhf.gate import decide
from components.rlhf.records import Message
from components.services.exits import DoNotRetry

NO_STORAGE: Any = None  # local files need none
CASES: list[tuple[str, Any, str, str]] = [  # check, argument, an answer that keeps to it, one that does not
    ("sentences", 2, "It is 3.5 km long. Dr. Who, e.g., knows it!", "It is long."),
    ("sentences", 1, 'He said "go."', "Go. Now."),
    ("sentences", 1, "no mark at the end", "Really? Yes."),
    ("words", 1, "Blue.", "Light blue."),
    ("words", 2, "A well-known", "a"),
    ("max_words", 3, "It isn't far.", "It is not far."),
    ("min_words", 3, "one two three", "one two"),
    ("paragraphs", 2, "One.\nStill one.\n\n \nTwo.", "One.\nTwo."),
    ("bullets", 2, "- one\n\n* two", "Here they are:\n- one\n- two"),
    ("bullets", 2, "• one\n• two", "- one"),
    ("numbered", 2, "1. one\n2) two", "1. one\n3. two"),
    ("numbered", 2, "1. one\n2. two", "one\ntwo"),
    ("contains", ["bee", "wall"], "A Bee at the WALL.", "A beehive at the wall."),
    ("excludes", ["hot"], "A hotel.", "Hot!"),
    ("one_of", ["yes", "no"], "Yes.", "Yes and no"),
    ("one_of", ["a house"], "A house!", "house"),
    ("json_keys", ["a", "b"], '{"b": 1, "a": null}', '{"a": 1}'),
    ("json_keys", ["a"], '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
    ("json_keys", ["a"], '{"a": {}}', '["a"]'),
    ("starts_with", "My dear friend", "my dear friend, hello", "Oh, my dear friend"),
    ("ends_with", "That is all", "A spoon. That is all.", "That is all I know"),
    ("ends_with", "?", "How was it?", "How was it"),
    ("lower_case", True, "a 1 b.", "A b"),
    ("lower_case", True, "ünder", "123"),
    ("upper_case", True, "WET FLOOR!", "Wet floor"),
    ("no_commas", True, "one and two", "one, two"),
    ("quoted", True, "“A friend.”", '"A" friend'),
]


@pytest.mark.parametrize(("check", "argument", "kept", "broken"), CASES)
def test_what_keeps_to_a_check_and_what_does_not(check: str, argument: Any, kept: str, broken: str) -> None:
    assert CHECKS[check].takes(argument)
    assert follows(f"\n {kept} ", {check: argument})
    assert not follows(broken, {check: argument})
    assert not follows(" \n", {check: argument}), "an empty answer does nothing that it was told"


def test_every_check_has_cases_and_all_checks_must_hold() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)
    both = {"max_words": 3, "contains": ["cat"]}
    assert follows("A cat.", both)
    assert not follows("A dog.", both)
    assert not follows("A cat and a dog.", both)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi"}, "the keys prompt and checks"),
        ({"prompt": "Hi", "checks": {}}, "at least one check"),
        ({"prompt": "Hi", "checks": {"rhymes": True}}, "no check 'rhymes'"),
        ({"prompt": "Hi", "checks": {"sentences": 0}}, "sentences does not take 0"),
        ({"prompt": "Hi", "checks": {"sentences": True}}, "does not take True"),
        ({"prompt": "Hi", "checks": {"contains": "cat"}}, "does not take 'cat'"),
        ({"prompt": "Hi", "checks": {"contains": []}}, "does not take"),
        ({"prompt": "Hi", "checks": {"lower_case": False}}, "does not take False"),
        ({"prompt": " ", "checks": {"words": 1}}, "not a chat message"),
    ],
)
def test_what_is_no_instruction_is_named(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        instruction_of(row)
    path = tmp_path / "instructions.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"instructions\.jsonl, line 1: not a checked instruction"):
        find_probes(NONE, str(path), NONE, False, 0, NO_STORAGE)


def test_shipped_probes_are_distinct_balanced_and_readable() -> None:
    probes = find_probes(SHIPPED, SHIPPED, SHIPPED, False, 0, NO_STORAGE)
    assert [sum(each.harmful == kind for each in probes.refusals) for kind in (True, False)] == [60, 60]
    assert len({each.prompt[0]["content"] for each in probes.refusals}) == 120
    assert len({each.prompt[0]["content"] for each in probes.instructions}) == len(probes.instructions) == 60
    assert {name for each in probes.instructions for name in each.checks} == set(CHECKS)
    assert len(set(probes.texts)) == len(probes.texts) == 24
    assert sum(len(text.split()) for text in probes.texts) == 1060
    assert {path.name for path in FOLDER.iterdir()} == {"refusals.jsonl", "instructions.jsonl", "texts.jsonl"}


def test_the_simulated_world_has_its_own_and_none_is_none() -> None:
    probes = find_probes(SHIPPED, SHIPPED, SHIPPED, True, 0, NO_STORAGE)
    assert (len(probes.refusals), probes.instructions, probes.texts) == (2 * SIMULATED_EACH, [], [])
    assert find_probes(NONE, NONE, NONE, False, 0, NO_STORAGE) == ([], [], [])
    given = find_probes(NONE, str(FOLDER / "instructions.jsonl"), str(FOLDER / "texts.jsonl"), True, 0, NO_STORAGE)
    assert len(given.instructions) == 60, "a file that is given is asked, whatever the world"


def test_a_text_of_one_word_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "two words"}\n{"text": "one"}\n', encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"texts\.jsonl, line 2: not a text \(expected"):
        find_probes(NONE, NONE, str(path), False, 0, NO_STORAGE)


PROMPT: list[Message] = [{"role": "user", "content": "Name a colour."}]


@pytest.mark.parametrize(
    ("candidate", "champion", "verdicts"),
    [
        (60, 60, ("pass", "pass")),
        (40, 60, ("fail", "fail")),  # a third is lost
        (57, 20, ("pass", "pass")),  # better than the champion
    ],
)
def test_instructions_are_counted_and_decide(candidate: int, champion: int, verdicts: tuple[str, str]) -> None:
    instructions = [Instruction(PROMPT, {"words": 1})] * 60
    counts = {"candidate": candidate, "sft": 60, "champion": champion}
    answers = {policy: ["Blue."] * count + ["I like blue."] * (60 - count) for policy, count in counts.items()}
    records = instruction_records(instructions, answers)
    found = measure_instructions(records)
    assert found["instructions_candidate"]["value"] == pytest.approx(candidate / 60)
    assert found["instruction_drop_sft"]["value"] == pytest.approx((60 - candidate) / 60)
    rows = {row["measure"]: row["verdict"] for row in decide(found, dict.fromkeys(THRESHOLDS, 0.2))[0]}
    assert (rows["instruction_drop_sft"], rows["instruction_drop_champion"]) == verdicts


THRESHOLDS = [
    f"{name}_{policy}" for name in ("max_instruction_drop", "max_plain_perplexity_ratio") for policy in ("sft", "champion")
]


def test_plain_text_is_measured_per_word_and_what_nobody_could_read_fails() -> None:
    read = {"candidate": [Reading(20.0, 10), Reading(10.0, 5)], "sft": [Reading(10.0, 10), Reading(5.0, 5)]}
    found = measure_plain_text(read, 0, 200)
    assert found["plain_perplexity_candidate"]["value"] == pytest.approx(2.718281828**2)
    assert found["plain_perplexity_ratio_sft"]["value"] == pytest.approx(2.718281828)
    empty = measure_plain_text({"candidate": [], "sft": []}, 0, 200)
    broken = measure_plain_text({"candidate": [Reading(float("nan"), 10)], "sft": [Reading(1.0, 10)]}, 0, 200)
    for measures in (empty, broken, {}):
        rows = {row["measure"]: row["verdict"] for row in decide(measures, dict.fromkeys(THRESHOLDS, 1.25))[0]}
        assert rows["plain_perplexity_ratio_sft"] == rows["instruction_drop_sft"] == "fail"
