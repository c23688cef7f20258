"""Each expectation holds for good rankings, and fails alone where its own rule is broken, with the row that breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from components.rlhf.records import Message, Ranking
from components.validate_data.facts import collect, is_ranking
from components.validate_data.stage import Config, one_line
from components.validate_data.suite import Check, validate

CONFIG = Config(
    min_rankings=4,
    min_test_rankings=1,
    min_prompts=3,
    min_raters=2,
    max_quarantined_fraction=0.2,
    max_contradiction_fraction=0.3,
    max_tie_fraction=0.3,
    max_prompt_characters=50,
    max_completion_characters=40,
)
INGEST = {"read": 10, "quarantined": 1}


def ranking(number: int, **changes: Any) -> Ranking:
    values = {
        "ranking_id": f"r{number}",
        "prompt": [Message(role="user", content=f"question {number}")],
        "completions": ["good", "fair", "bad"],
        "ranks": [1, 2, 3],
        "rater_id": f"rater-{number % 2}",
        "source": "test",
        "collected_at": None,
        "confidence": None,
        "policies": None,
        "criterion": None,
        "split": "test" if number == 0 else "train",
    }
    return Ranking(**{**values, **changes})


def good() -> list[Ranking]:
    return [ranking(i) for i in range(6)]


def failed(rankings: list[Ranking], ingest: dict[str, int] = INGEST, config: Config = CONFIG) -> dict[str, Check]:
    checks, _ = validate(collect(rankings, ingest), config)
    return {check.name: check for check in checks if not check.passed}


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_good_rankings_pass_every_expectation() -> None:
    checks, results = validate(collect(good(), INGEST), CONFIG)
    assert len(checks) == 19
    assert all(check.passed for check in checks)
    assert all(result.success for result in results)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ids are unique", {"ranking_id": "r1"}),
        ("at least two completions", {"completions": ["good"], "ranks": [1]}),
        ("ranks are a ranking", {"ranks": [1, 3, 4]}),
        ("ranks are a ranking", {"ranks": [1, 2]}),
        ("ranks are a ranking", {"ranks": [0, 1, 2]}),
        ("no empty completion", {"completions": ["good", " ", "bad"]}),
        ("no identical completions", {"completions": ["good", "bad", "bad"]}),
        ("completions not over-long", {"completions": ["good", "fair", "b" * 41]}),
        ("no empty message in a prompt", {"prompt": [Message(role="system", content=""), *user("why")]}),
        ("prompts not over-long", {"prompt": user("q" * 51)}),
        ("prompts are chats that end with the user", {"prompt": [*user("why"), Message(role="assistant", content="so")]}),
        ("prompts are chats that end with the user", {"prompt": [Message(role="robot", content="so"), *user("why")]}),
        ("splits are train or test", {"split": "dev"}),
    ],
)
def test_a_row_that_breaks_a_rule_is_named(name: str, changes: dict[str, Any]) -> None:
    found = failed([*good()[:5], ranking(5, **changes)])
    assert list(found) == [name]
    wrong_id = changes.get("ranking_id", "r5")
    assert found[name].examples[0].startswith(f"{wrong_id} (rater-1)")
    assert found[name].observed >= 1


def test_line_05_a_prompt_in_two_splits_fails() -> None:
    found = failed([*good(), ranking(9, prompt=user("question 0"), split="train")])
    assert list(found) == ["no prompt in two splits"]
    assert {example.split()[0] for example in found["no prompt in two splits"].examples} == {"r0", "r9"}


@pytest.mark.parametrize(
    ("name", "rankings", "ingest", "observed"),
    [
        ("enough rankings", good()[:3], INGEST, 3),
        ("enough held-out rankings", [ranking(i) for i in range(1, 7)], INGEST, 0),
        ("enough prompts", [ranking(0), *(ranking(i, prompt=user("same")) for i in range(1, 6))], INGEST, 2),
        ("enough raters", [ranking(i, rater_id="one") for i in range(6)], INGEST, 1),
        ("few rows in quarantine", good(), {"read": 10, "quarantined": 3}, 0.3),
        ("few ties", [*good()[:2], *(ranking(i, ranks=[1, 1, 2]) for i in range(2, 6)), *()], INGEST, 4 / 18),
    ],
)
def test_the_whole_snapshot_is_measured(name: str, rankings: list[Ranking], ingest: dict[str, int], observed: float) -> None:
    config = CONFIG.model_copy(update={"max_tie_fraction": 0.2})
    found = failed(rankings, ingest, config)
    assert found[name].observed == pytest.approx(observed)
    assert list(found) == [name]


def test_contradictions_are_counted_over_repeated_comparisons() -> None:
    """Of three comparisons made twice (good-fair, good-bad, fair-bad of question 1) two are turned round by another rater."""
    again = ranking(8, prompt=user("question 1"), ranks=[3, 1, 2], rater_id="rater-9")
    facts = collect([*good(), again], INGEST)
    assert facts.whole["repeated_comparisons"] == 3
    assert facts.whole["contradiction_fraction"] == pytest.approx(2 / 3)
    found = failed([*good(), again])
    assert list(found) == ["few contradictions"]
    assert any("r8 by rater-9" in example for example in found["few contradictions"].examples)


def test_the_order_in_which_completions_were_shown_does_not_matter_to_a_contradiction() -> None:
    agreeing = ranking(8, prompt=user("question 1"), completions=["bad", "fair", "good"], ranks=[3, 2, 1])
    assert collect([*good(), agreeing], INGEST).whole["contradiction_fraction"] == 0
    same_rater = ranking(8, prompt=user("question 1"), completions=["bad", "fair", "good"], ranks=[1, 2, 3], rater_id="rater-1")
    assert collect([*good(), same_rater], INGEST).whole["contradiction_fraction"] == 1
    other_criterion = same_rater._replace(criterion="tone")
    assert collect([*good(), other_criterion], INGEST).whole["contradiction_fraction"] == 0


def test_no_rankings_at_all_fail() -> None:
    assert "enough rankings" in failed([], {"read": 0, "quarantined": 0})


def test_a_missing_value_fails() -> None:
    facts = collect(good(), INGEST)
    facts.rankings[2]["completions"] = None
    facts.whole["raters"] = float("nan")
    checks, _ = validate(facts, CONFIG)
    assert {"at least two completions", "enough raters"} <= {check.name for check in checks if not check.passed}


def test_an_expectation_that_cannot_be_computed_fails() -> None:
    facts = collect(good(), INGEST)
    for row in facts.rankings:
        row["prompt_characters"] = "long"
    checks, _ = validate(facts, CONFIG)
    assert "prompts not over-long" in {check.name for check in checks if not check.passed}


@pytest.mark.parametrize(
    ("ranks", "valid"),
    [
        ([1, 2, 3], True),
        ([2, 1], True),
        ([1, 1, 2], True),
        ([1, 1, 3], True),
        ([1, 1], True),
        ([1, 3, 3], False),
        ([2, 3, 4], False),
        ([], False),
    ],
)
def test_dense_and_competition_ranks_are_rankings(ranks: list[int], valid: bool) -> None:
    assert is_ranking(ranks, len(ranks)) is valid


def test_the_reason_survives_kfps_conditions() -> None:
    check = Check("few ties", 0.5, "<= 0.3", False, ['r1 (o\'neil): "a\nb" \\ {x} `y`'])
    line = one_line([check, check])
    assert "few ties: observed 0.5, expected <= 0.3" in line
    assert not set("\"'\\`{}\n") & set(line)
