"""Win rates of judges that may be silent or come to an end early."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.evaluate.judges.pairs import (
    SAME_TEXT,
    Intervals,
    Judgement,
    Pair,
    by_scores,
    conversation,
    named,
    pairs_of,
    rename_reward_model,
    win_rates,
)
from components.evaluate.judges.settings import JudgeSettings
from components.evaluate.measures import Answer
from components.rlhf.gate import decide
from components.rlhf.statistics import Estimate, win_rate
from components.services.exits import DoNotRetry
from components.services.launch import parse_settings

WON, LOST, TIED = (Judgement(outcome, True, {}) for outcome in (1.0, 0.0, 0.5))
SILENT, UNASKED = Judgement(None, True, {}), Judgement(None, False, {})


def rate(judgements: list[Judgement], smallest: float = 0.1, of_gate: bool = False) -> Any:
    pairs = [Pair(i, "sft", "q", "a", "b", i % 5 - 2) for i in range(len(judgements))]
    intervals = Intervals(0, 200, of_gate=lambda outcomes: Estimate(0.5, 0.1, 0.9))
    return win_rates(pairs, judgements, smallest, intervals, of_gate)


def test_without_silence_it_is_the_plain_win_rate() -> None:
    judgements = [WON] * 12 + [LOST] * 6 + [TIED] * 2
    rates, counts = rate(judgements)
    assert rates["sft"][0] == win_rate([1.0] * 12 + [0.0] * 6 + [0.5] * 2, 0, 200)
    assert rates["sft"][0].value == pytest.approx(0.65)
    assert counts == {"sft": {"pairs": 20, "judged": 20, "silent": 0}}
    of_gate, controlled = rate(judgements, of_gate=True)[0]["sft"]
    assert of_gate == (0.5, 0.1, 0.9), "the gate's own interval"
    assert controlled == rates["sft"][1]


def test_silent_pairs_count_as_lost_at_one_end_and_as_won_at_the_other() -> None:
    raw, controlled = rate([WON] * 12 + [LOST] * 4 + [SILENT] * 4)[0]["sft"]
    assert raw.value == 0.75, "of those with a verdict"
    assert raw.low == win_rate([1.0] * 12 + [0.0] * 8, 0, 200).low
    assert raw.high == win_rate([1.0] * 12 + [0.0] * 4 + [1.0] * 4, 0, 200).high
    plain = rate([WON] * 12 + [LOST] * 4)[0]["sft"][1]
    assert controlled.low < plain.low
    assert controlled.high > plain.high


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([WON, LOST, TIED, SILENT]), min_size=8, max_size=24))
def test_a_verdict_less_never_helps_a_candidate(judgements: list[Judgement]) -> None:
    """Whoever takes back verdicts that were against the candidate cannot lift the low end, which the gate reads."""
    quiet = [SILENT if each is LOST else each for each in judgements]
    less, more = (rate(each)[0]["sft"][0].low for each in (quiet, judgements))
    assert not less > more + 1e-12, "NaN, of a missing rate, fails the gate"


def test_a_budget_that_ends_early_widens_the_interval_and_draws_nothing_to_one_half() -> None:
    """Half of the texts are equal: they tie, and they must not outweigh the others because those are no longer asked about."""
    whole = [SAME_TEXT if place % 2 else LOST if place % 5 == 0 else WON for place in range(400)]
    cut = [each if place < 100 or each is SAME_TEXT else UNASKED for place, each in enumerate(whole)]
    (all_of_them, _), (part, _) = rate(whole)[0]["sft"], rate(cut)[0]["sft"]
    assert part.value == all_of_them.value == 0.65
    assert part.high - part.low > 1.5 * (all_of_them.high - all_of_them.low)
    assert rate(cut)[1]["sft"] == {"pairs": 400, "judged": 100, "silent": 0}


def test_where_too_little_is_judged_there_is_no_number_and_the_gate_fails_with_what_to_do() -> None:
    judgements = [WON] * 9 + [UNASKED] * 11
    assert rate(judgements, 0.45)[0]["sft"][0].value == 1.0
    rates, _ = rate(judgements, 0.5)
    measures = named(rates, "endpoint", "endpoint", {"sft": "Spend more."})
    assert measures["win_rate_over_sft"] == {"value": None, "low": None, "high": None, "missing": "Spend more."}
    rows, gate = decide(measures, {"min_win_rate_over_sft": 0.5})
    assert gate == "fail"
    (row,) = (row for row in rows if row["measure"] == "win_rate_over_sft")
    assert row["sentence"].startswith(
        "Lower end of the judge's win rate over SFT: missing or not a finite number; > 0.5 is required. Spend more."
    )
    assert rate([UNASKED] * 3)[0]["sft"][0] == pytest.approx((float("nan"),) * 3, nan_ok=True)


def test_the_gates_judge_has_the_plain_names() -> None:
    measures = {"win_rate_over_sft": 1, "win_rate_over_sft_length_controlled": 2, "kl_reference": 3}
    assert rename_reward_model(measures, ["reward_model", "endpoint"], "reward_model") == measures
    assert rename_reward_model(measures, ["reward_model", "endpoint"], "endpoint") == {
        "win_rate_over_sft_reward_model": 1,
        "win_rate_over_sft_reward_model_length_controlled": 2,
        "kl_reference": 3,
    }
    assert rename_reward_model(measures, ["humans"], "humans") == {"kl_reference": 3}
    rates = rate([WON, LOST])[0]
    assert set(named(rates, "humans", "reward_model", {})) == {
        "win_rate_over_sft_humans",
        "win_rate_over_sft_humans_length_controlled",
    }


def test_scores_judge_pairs_and_one_that_is_not_finite_makes_the_rate_unknown() -> None:
    def answer(text: str, score: float) -> Answer:
        return Answer(text, 5, True, {"judge": score})

    answers = {
        "candidate": [answer("c0", 1.0), answer("c1", 0.0)],
        "sft": [answer("s0", 0.0), answer("c1", 3.0)],
        "champion": [answer("x0", 2.0), answer("x1", math.nan)],
    }
    pairs = pairs_of([[{"role": "user", "content": "One"}], [{"role": "user", "content": "Two"}]], answers)
    scored = by_scores(pairs, answers)
    assert [each.outcome for each in scored[:3]] == [1.0, 0.0, 0.5], "the same text ties whatever its score"
    rates, _ = win_rates(pairs, scored, 0.5, Intervals(0, 200, lambda outcomes: win_rate(outcomes, 0, 200)), of_gate=True)
    assert rates["sft"][0].value == 0.75
    assert all(math.isnan(end) for rate in rates["champion"] for end in rate)


def test_pairs_come_prompt_after_prompt() -> None:
    def answer(text: str, tokens: int) -> Answer:
        return Answer(text, tokens, True, {})

    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    answers = {
        "candidate": [answer("c0", 5), answer("c1", 4)],
        "sft": [answer("s0", 3), answer("s1", 9)],
        "champion": [answer("x0", 5), answer("x1", 1)],
    }
    pairs = pairs_of([[{"role": "user", "content": "One"}], turns], answers)
    assert [(pair.row, pair.over, pair.theirs, pair.longer_tokens) for pair in pairs] == [
        (0, "sft", "s0", 2),
        (0, "champion", "x0", 0),
        (1, "sft", "s1", -5),
        (1, "champion", "x1", 3),
    ]
    assert pairs[0].question == "One"
    assert pairs[2].question == conversation(turns) == "user: Hi\nassistant: Hello\nuser: Bye"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"judges": []}, "at least 1"),
        ({"judges": ["humans", "humans"]}, "twice"),
        ({"gate_judge": "humans"}, "not one of judges"),
        ({"judges": ["endpoint"], "gate_judge": "endpoint"}, "needs endpoint_url and endpoint_model"),
        ({"judges": ["oracle"]}, "reward_model"),
        ({"human_labels": "labels.json"}, "humans is not one of judges"),
        ({"endpoint_url": "judge:8000"}, "pattern"),
        ({"min_judged_fraction": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        JudgeSettings(**values)


@pytest.mark.parametrize(
    ("name", "value"), [("endpoint_key_variable", "sk-secret"), ("endpoint_url", "https://me:sk-secret@judge/v1")]
)
def test_a_secret_in_the_config_is_refused_and_not_shown(name: str, value: str) -> None:
    with pytest.raises(DoNotRetry, match=rf"evaluate\.{name}: ") as caught:
        parse_settings(JudgeSettings, {name: value}, "evaluate")
    assert "sk-secret" not in str(caught.value)
