"""Each expectation holds for good rankings, and fails alone where its own rule is broken, with the row that breaks it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components.rlhf.records import Message, Ranking
from components.services.exits import DoNotRetry
from components.services.launch import key_of, parse_settings
from components.validate_data.stage import Config, Inputs, one_line
from components.validate_data.suite import Check, Suite, gate_of, rules
from tests.unit.components.validate_data.snapshots import CONFIG, INGEST, checks_of, facts_of, good, ranking, user


def broken(rankings: list[Ranking], ingest: dict[str, Any] = INGEST, config: Config = CONFIG) -> dict[str, Check]:
    return {name: check for name, check in checks_of(rankings, ingest, config).items() if check.verdict in ("warn", "fail")}


def test_good_rankings_pass_every_expectation() -> None:
    suite = Suite(CONFIG)
    checks = suite.checks(facts_of(good(), look=suite.look))
    assert len(checks) == 35
    assert gate_of(checks) == "pass"
    verdicts = {check.column: check.verdict for check in checks}
    # Nobody compared anything twice, so there is nothing to contradict or to agree on.
    nothing = {"contradiction_fraction", "self_contradiction_fraction", "cycle_fraction", "agreement", "alpha", "human_ceiling"}
    nothing |= {"random_rater_fraction", "copying_fraction", "other_language_fraction", "refusal_bias"}
    assert {name for name, verdict in verdicts.items() if verdict != "pass"} == nothing
    assert {verdicts[name] for name in nothing} == {"not known"}
    assert all(math.isnan(check.observed) for check in checks if check.verdict == "not known")
    assert all(result.success for result in suite.results)


BREAKING: list[tuple[str, dict[str, Any]]] = [
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
]


def test_each_row_that_breaks_a_rule_breaks_that_one_alone_and_is_named() -> None:
    rankings = [*good(), *(ranking(10 + place, **changes) for place, (_, changes) in enumerate(BREAKING))]
    found = broken(rankings)
    expected: dict[str, list[str]] = {}
    for place, (name, _) in enumerate(BREAKING):
        expected.setdefault(name, []).append(f"r{10 + place} (rater-{place % 2})")
    assert {name: [each.rpartition(":")[0] for each in check.examples] for name, check in found.items()} == expected
    assert {name: check.observed for name, check in found.items()} == {name: len(rows) for name, rows in expected.items()}


def test_an_id_that_comes_again_is_named() -> None:
    found = broken([*good(), ranking(6, ranking_id="r1")])
    assert list(found) == ["ids are unique"]
    assert (found["ids are unique"].observed, found["ids are unique"].examples) == (1, ["r1 (rater-0)"])


def test_line_05_a_prompt_in_two_splits_fails() -> None:
    found = broken([*good(), ranking(9, prompt=user("question 0"), split="train")])
    assert list(found) == ["no prompt in two splits"]
    assert {example.split()[0] for example in found["no prompt in two splits"].examples} == {"r0", "r9"}


@pytest.mark.parametrize(
    ("name", "rankings", "ingest", "observed"),
    [
        ("enough rankings", good()[:3], INGEST, 3),
        ("enough held-out rankings", [ranking(i) for i in range(1, 7)], INGEST, 0),
        ("enough prompts", [ranking(0), *(ranking(i, prompt=user("same")) for i in range(1, 6))], INGEST, 2),
        ("enough raters", [ranking(i, rater_id="unknown") for i in range(6)], INGEST, 1),
        ("few rows in quarantine", good(), {"read": 10, "quarantined": 3}, 0.3),
        ("few rows in quarantine", good(), {"read": 14, "quarantined": 7, "declined": 4}, 0.3),
        ("few ties", [*good()[:2], *(ranking(i, ranks=[1, 1, 2]) for i in range(2, 6))], INGEST, 4 / 18),
    ],
)
def test_the_whole_snapshot_is_measured(name: str, rankings: list[Ranking], ingest: dict[str, int], observed: float) -> None:
    found = broken(rankings, ingest, CONFIG.model_copy(update={"max_tie_fraction": 0.2}))
    assert found[name].observed == pytest.approx(observed)
    assert list(found) == [name]


def test_rows_are_looked_at_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.validate_data.suite.CHUNK_ROWS", 2)
    suite = Suite(CONFIG)
    rows = [ranking(i, completions=["good", "", "bad"]) if i in (1, 7, 8) else ranking(i) for i in range(9)]
    checks = {check.name: check for check in suite.checks(facts_of(rows, look=suite.look))}
    found = checks["no empty completion"]
    assert (found.observed, found.verdict) == (3, "fail")
    assert [example.split()[0] for example in found.examples] == ["r1", "r7", "r8"]
    assert [result.success for result in suite.results[:2]] == [False, False], "failed chunks are kept before good ones"


def test_answers_that_raters_declined_are_not_held_against_the_data() -> None:
    assert broken(good(), {"read": 20, "quarantined": 10, "declined": 10}) == {}


def test_no_rankings_at_all_fail() -> None:
    assert "enough rankings" in broken([], {"read": 0, "quarantined": 0})


def test_a_missing_value_fails() -> None:
    suite = Suite(CONFIG)

    def spoil(frame: Any) -> None:
        frame["completions"] = frame["completions"].astype(float)
        frame.loc[0, "completions"] = math.nan
        suite.look(frame)

    facts = facts_of(good(), look=spoil)
    facts.whole["raters"] = math.nan
    facts.whole["length_bias"] = math.nan  # which only warns where it is too large
    checks = suite.checks(facts)
    failed = {check.name for check in checks if check.verdict == "fail"}
    assert failed == {"at least two completions", "enough raters", "length does not decide"}
    assert gate_of(checks) == "fail"


def test_every_number_of_the_whole_fails_where_it_is_not_finite_or_missing() -> None:
    suite, facts = Suite(CONFIG), facts_of(good())
    facts.unknown.clear()
    columns = [rule.column for rule in rules(CONFIG) if rule.frame == "whole"]
    for place, name in enumerate(columns):
        facts.whole[name] = (math.nan, math.inf, -math.inf)[place % 3]
    assert {check.column for check in suite.checks(facts) if check.verdict == "fail"} == set(columns)


def test_an_expectation_that_cannot_be_computed_fails() -> None:
    suite = Suite(CONFIG)
    facts = facts_of(good(), look=lambda frame: suite.look(frame.assign(prompt_characters="long")))
    failed = {check.name for check in suite.checks(facts) if check.verdict == "fail"}
    assert failed == {"prompts not over-long"}


def test_what_should_be_known_and_is_not_fails_even_where_it_would_only_warn() -> None:
    facts = facts_of(good())
    nowhere = facts.estimates["length_bias"]._replace(low=math.nan)
    facts.bias("length_bias", nowhere, "")
    facts.at_least("cycle_fraction", nowhere, "")
    facts.at_most("agreement", nowhere._replace(high=math.nan), "")
    assert all(math.isnan(facts.whole[name]) for name in ("length_bias", "cycle_fraction", "agreement"))


def longer_wins() -> list[Ranking]:
    return [ranking(i, completions=["short", "a longer one"], ranks=[2, 1]) for i in range(40)]


def test_a_warning_goes_on_and_a_profile_may_make_it_fail_or_not() -> None:
    config = CONFIG.model_copy(update={"max_length_bias": 0.1})
    checks = checks_of(longer_wins(), config=config)
    assert checks["length does not decide"].verdict == "warn"
    assert gate_of(list(checks.values())) == "pass"
    checks = checks_of(longer_wins(), config=config.model_copy(update={"failing": ["length_bias"]}))
    assert checks["length does not decide"].verdict == "fail"
    assert gate_of(list(checks.values())) == "fail"
    few = config.model_copy(update={"warning": ["rankings", "repeated_ids"], "min_rankings": 50})
    checks = checks_of(longer_wins(), config=few)
    assert checks["enough rankings"].verdict == "warn"
    assert gate_of(list(checks.values())) == "pass"
    assert gate_of([]) == "fail"


def test_a_check_that_does_not_exist_is_refused_before_anything_runs() -> None:
    with pytest.raises(DoNotRetry, match=r"has no check length;.*length_bias"):
        parse_settings(Config, {"failing": ["length"]}, "validate_data")


def test_a_changed_threshold_is_another_config_and_another_result() -> None:
    inputs = Inputs(snapshot_uri="s3://a", ingest_uri="s3://b")
    keys = {key_of("validate_data", Config(max_length_bias=each), inputs) for each in (0.15, 0.2)}
    assert len(keys) == 2
    assert Config(max_length_bias=0.2).model_dump()["max_length_bias"] == 0.2


def test_the_reason_survives_kfps_conditions() -> None:
    check = Check("few ties", "tie_fraction", 0.5, "<= 0.3", "fail", ['r1 (o\'neil): "a\nb" \\ {x} `y`'], "0.5")
    line = one_line([check, check])
    assert "few ties: observed 0.5, expected <= 0.3" in line
    assert not set("\"'\\`{}\n") & set(line)
