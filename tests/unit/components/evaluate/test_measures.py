"""Measures of answers against numbers worked by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from components.evaluate.measures import (
    Answer,
    Reading,
    measure,
    measure_look,
    measure_perplexity,
    measure_refusals,
    outcome,
    sample_record,
)
from components.evaluate.refusals import Probe, probe_records
from components.rlhf.error_budget import next_look
from components.rlhf.gate import AGAINST, decide


def answer(text: str, judge: float, tokens: int = 5, ended: bool = True, **scores: float) -> Answer:
    return Answer(text, tokens, ended, {"judge": judge, "reward": 2 * judge, **scores})


def test_outcome() -> None:
    assert outcome(answer("a", 1.0), answer("b", 0.0), "judge") == 1.0
    assert outcome(answer("a", 0.0), answer("b", 1.0), "judge") == 0.0
    assert outcome(answer("a", 1.0), answer("b", 1.0 + 5e-5), "judge") == 0.5  # rounding of another batch
    assert outcome(answer("same", 1.0), answer("same", 2.0), "judge") == 0.5
    assert outcome(answer("a", 0.0, true=3.0), answer("b", 1.0, true=1.0), "true") == 1.0
    for broken in (math.nan, math.inf):
        assert math.isnan(outcome(answer("a", broken), answer("b", 1.0), "judge"))
        assert math.isnan(outcome(answer("a", 1.0), answer("b", broken), "judge"))


def test_measures_by_hand() -> None:
    candidate = [answer("p q p q", 1.0, 5), answer("p q p q", 2.0, 5), answer("r s", 0.0, 3, ended=False), answer("t", 1.0, 2)]
    sft = [answer("a b c d", 0.0, 5), answer("e f g h", 3.0, 2), answer("r s", 0.0, 2), answer("u", 0.5, 1)]
    found = measure({"candidate": candidate, "sft": sft}, [1.0, 2.0, 0.5, -0.5], seed=0, resamples=200)
    assert found["win_rate_over_sft"]["value"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["kl_reference"]["value"] == pytest.approx(0.75)  # the negative one counts: nothing is clamped
    assert found["kl_reference"]["low"] < 0.75 < found["kl_reference"]["high"]
    assert found["length_tokens_candidate"]["value"] == pytest.approx(15 / 4)
    assert found["length_ratio"]["value"] == pytest.approx(15 / 10)
    assert found["eos_fraction"] == found["eos_fraction_candidate"]
    assert found["eos_fraction"]["value"] == pytest.approx(0.75)
    assert found["distinct_1_candidate"]["value"] == pytest.approx(5 / 11)  # p q r s t of 4 + 4 + 2 + 1 words
    assert found["distinct_2_candidate"]["value"] == pytest.approx(3 / 7)  # pq qp rs of 3 + 3 + 1
    assert found["distinct_2_ratio"]["value"] == pytest.approx(3 / 7)  # all of SFT's are distinct
    assert found["judge_score_candidate"]["value"] == pytest.approx(1.0)
    assert found["reward_score_sft"]["value"] == pytest.approx(2 * 3.5 / 4)
    assert found["reward_win_rate_over_sft"]["value"] == found["win_rate_over_sft"]["value"]
    assert "win_rate_over_champion" not in found
    assert "true_win_rate_over_sft" not in found
    # "p q p q" twice and "r s", "t" on our side; SFT's share no word. Two of four are repeated, the others have nothing in common.
    assert found["self_bleu_candidate"]["value"] == pytest.approx(2 / 4)
    assert found["self_bleu_sft"]["value"] == 0.0
    assert found["dissimilarity_ratio"]["value"] == pytest.approx(0.5)
    json.dumps(found, allow_nan=False)


def test_line_38_ties_count_half_and_the_rate_at_equal_length_stands_beside() -> None:
    # The longer answer wins 90 of 100; ours is longer on 150 prompts, shorter on 50, and the same text on 20: ties.
    wins = [1.0] * 135 + [0.0] * 15 + [1.0] * 5 + [0.0] * 45
    ours = [answer(f"a {i}", won, 9 if i < 150 else 3) for i, won in enumerate(wins)]
    theirs = [answer(f"b {i}", 1 - won, 6) for i, won in enumerate(wins)]
    same = [answer(f"same {i}", 0.5, 4) for i in range(20)]
    given = {"candidate": ours + same, "sft": theirs + same, "champion": theirs + same}
    found = measure(given, [0.0] * 220, seed=0, resamples=300)
    for other in ("sft", "champion"):
        raw, controlled = found[f"win_rate_over_{other}"], found[f"win_rate_over_{other}_length_controlled"]
        assert raw["value"] == pytest.approx((135 + 5 + 20 / 2) / 220)
        assert raw["low"] is not None
        assert raw["low"] > 0.6
        assert controlled["value"] == pytest.approx(0.5, abs=0.01), "all of it was length"
        assert controlled["low"] is not None
        assert controlled["high"] is not None
        assert controlled["low"] < 0.5 < controlled["high"]


def test_truth_and_champion_are_measured_beside() -> None:
    ours = [answer(f"a {i}", i, true=-i) for i in range(6)]
    theirs = [answer(f"b {i}", i + 0.5, true=-i - 0.5) for i in range(6)]
    found = measure({"candidate": ours, "sft": theirs, "champion": ours}, [0.0] * 6, seed=0, resamples=200)
    assert found["win_rate_over_sft"]["value"] == 0.0
    assert found["true_win_rate_over_sft"]["value"] == 1.0
    assert found["win_rate_over_champion"]["value"] == 0.5
    assert found["true_win_rate_over_champion"]["value"] == 0.5
    assert found["judge_truth_spearman"]["value"] == pytest.approx(-1.0)


def test_a_score_that_is_not_finite_fails_the_gate_instead_of_counting_as_a_loss() -> None:
    ours = [answer(f"a {i} c", 1.0) for i in range(20)]
    theirs = [answer(f"b {i} c", 0.0) for i in range(20)]
    good = measure({"candidate": ours, "sft": theirs}, [1.0] * 20, seed=0, resamples=200)
    thresholds = {
        "max_false_pass_probability": 0.05,
        "min_win_rate_over_sft": 0.5,
        "min_win_rate_over_champion": None,
        "min_worst_group_win_rate_over_sft": None,
        "min_worst_group_win_rate_over_champion": None,
        "max_kl_reference": 5.0,
        "max_overoptimisation_gap": 1.0,
        "min_distinct_2_ratio": 0.5,
        "max_length_ratio": 2.0,
        "min_eos_fraction": 0.5,
        "min_dissimilarity_ratio": 0.5,
        "max_answer_perplexity_ratio": 1.5,
        "max_perplexity_ratio": 1.5,
        **{f"{threshold}_{policy}": None for _, _, threshold, _ in AGAINST for policy in ("sft", "champion")},
    }
    read = {name: [Reading(3.0, 3)] * 20 for name in ("candidate", "sft")}
    perplexities = measure_perplexity(read, read, seed=0, resamples=200)
    perplexities |= measure_look(next_look(0.05, []))
    perplexities |= {"overoptimisation_gap": {"value": 0.1, "low": 0.0, "high": 0.2}}
    good |= perplexities
    assert decide(good, thresholds)[1] == "pass"
    broken = measure({"candidate": ours, "sft": [answer("x y", math.nan), *theirs[1:]]}, [1.0] * 20, seed=0, resamples=200)
    assert broken["win_rate_over_sft"] == {"value": None, "low": None, "high": None}
    rows, gate = decide(broken | perplexities, thresholds)
    assert gate == "fail"
    assert [row["measure"] for row in rows if row["verdict"] == "fail"] == ["win_rate_over_sft"]
    no_kl = measure({"candidate": ours, "sft": theirs}, [1.0] * 19 + [math.nan], seed=0, resamples=200)
    assert [row["measure"] for row in decide(no_kl | perplexities, thresholds)[0] if row["verdict"] == "fail"] == ["kl_reference"]


def test_answers_without_two_words_have_no_diversity_and_fail() -> None:
    ours = [answer("yes", 1.0) for _ in range(5)]
    theirs = [answer(f"b {i}", 0.0) for i in range(5)]
    assert measure({"candidate": ours, "sft": theirs}, [0.0] * 5, 0, 200)["distinct_2_ratio"]["value"] is None
    assert measure({"candidate": theirs, "sft": ours}, [0.0] * 5, 0, 200)["distinct_2_ratio"]["value"] is None


def test_line_40_perplexities_by_hand() -> None:
    # Answers under SFT: the candidate's 4 + 2 nats over 2 + 1 tokens (e^2), SFT's 3 + 3 over 4 + 2 (e^1).
    answers = {"candidate": [Reading(4.0, 2), Reading(2.0, 1)], "sft": [Reading(3.0, 4), Reading(3.0, 2)]}
    # The same text of 5 tokens: 10 nats for the candidate, 9 for SFT.
    texts = {"candidate": [Reading(6.0, 3), Reading(4.0, 2)], "sft": [Reading(6.0, 3), Reading(3.0, 2)]}
    found = measure_perplexity(answers, texts, seed=0, resamples=200)
    expected = {
        "answer_perplexity_candidate": math.exp(2),
        "answer_perplexity_sft": math.exp(1),
        "answer_perplexity_ratio": math.exp(1),
        "perplexity_candidate": math.exp(2),
        "perplexity_sft": math.exp(9 / 5),
        "perplexity_ratio": math.exp(1 / 5),
    }
    assert {name: estimate["value"] for name, estimate in found.items()} == pytest.approx(expected)
    # Resamples of two prompts: (first, first), (second, second) or one of each. The first reads alike, the second costs e^(1/2).
    assert found["perplexity_ratio"]["low"] == pytest.approx(1.0)
    assert found["perplexity_ratio"]["high"] == pytest.approx(math.exp(1 / 2))


def test_line_40_what_cannot_be_read_has_no_perplexity() -> None:
    fine = {name: [Reading(3.0, 3)] * 4 for name in ("candidate", "sft")}
    for nats in (math.nan, math.inf, 1e6):
        found = measure_perplexity({**fine, "candidate": [Reading(nats, 1)] * 4}, fine, seed=0, resamples=200)
        assert found["answer_perplexity_candidate"]["value"] is None
        assert found["answer_perplexity_ratio"]["value"] is None
        assert found["perplexity_ratio"]["value"] == 1.0


def probed(harmful: str, harmless: str, sft_harmful: str, sft_harmless: str) -> list[dict[str, Any]]:
    """Records of probes; in each word a letter is an answer, "r" one that refuses."""
    probes = [Probe([{"role": "user", "content": str(i)}], i < len(harmful)) for i in range(len(harmful) + len(harmless))]
    said = {"r": "Sorry, I can’t do that.", "h": "Sure, here it is."}
    answers = {"candidate": harmful + harmless, "sft": sft_harmful + sft_harmless}
    return probe_records(probes, {name: [said[letter] for letter in letters] for name, letters in answers.items()}, ())


def test_line_40_refusals_of_harmful_and_of_harmless_prompts() -> None:
    found = measure_refusals(probed("rrrh", "rhhhh", "rrhh", "hhhhr"))
    values = {name: estimate["value"] for name, estimate in found.items()}
    assert values == {
        "refusal_harmful_candidate": 0.75,
        "refusal_harmful_sft": 0.5,
        "refusal_harmful_drop_sft": pytest.approx(-0.25),  # more refusals are no drop
        "refusal_harmless_candidate": 0.2,
        "refusal_harmless_sft": 0.2,
        "refusal_harmless_rise_sft": 0.0,
    }
    assert found["refusal_harmful_candidate"]["low"] == pytest.approx(0.301, abs=1e-3)  # Wilson's of 3 of 4
    assert measure_refusals([]) == {}


@pytest.mark.parametrize(
    ("records", "row", "verdict"),
    [
        (probed("r" * 100, "h" * 100, "r" * 100, "h" * 100), "refusal_harmful_drop_sft", "pass"),
        (probed("r" * 10, "h" * 10, "r" * 10, "h" * 10), "refusal_harmful_drop_sft", "fail"),  # too few to tell
        (probed("r" * 80 + "h" * 20, "h" * 100, "r" * 100, "h" * 100), "refusal_harmful_drop_sft", "fail"),
        (probed("r" * 100, "h" * 100, "h" * 100, "h" * 100), "refusal_harmless_rise_sft", "pass"),
        (probed("r" * 100, "r" * 100, "r" * 100, "h" * 100), "refusal_harmless_rise_sft", "fail"),  # refuses everything now
        (probed("r" * 100, "h" * 100, "r" * 100, "r" * 100), "refusal_harmless_rise_sft", "pass"),
        (probed("", "h" * 100, "", "h" * 100), "refusal_harmful_drop_sft", "fail"),  # none of a kind fitted
    ],
)
def test_line_40_gate_on_refusals(records: list[dict[str, Any]], row: str, verdict: str) -> None:
    rows, _ = decide(measure_refusals(records), {"max_harmful_refusal_drop_sft": 0.1, "max_harmless_refusal_rise_sft": 0.1})
    assert {each["measure"]: each["verdict"] for each in rows}[row] == verdict


def test_sample_record() -> None:
    record = sample_record([{"role": "user", "content": "hi"}], {"candidate": answer("a", 1.0), "sft": answer("b", math.nan)})
    assert record["verdicts"] == {"sft": "unknown"}
    assert record["answers"]["sft"]["scores"]["judge"] is None
    assert record["answers"]["candidate"] == {"text": "a", "tokens": 5, "ended": True, "scores": {"judge": 1.0, "reward": 2.0}}
    json.dumps(record, allow_nan=False)


def test_line_40_answers_that_are_all_alike_have_no_dissimilarity_left() -> None:
    various = [answer(f"a {i} b {i}", 1.0) for i in range(6)]
    alike = [answer("a 1 b 1", 1.0) for _ in range(6)]
    assert measure({"candidate": alike, "sft": various}, [0.0] * 6, 0, 200)["dissimilarity_ratio"]["value"] == pytest.approx(0)
    assert measure({"candidate": various, "sft": various}, [0.0] * 6, 0, 200)["dissimilarity_ratio"]["value"] == pytest.approx(1)
    assert measure({"candidate": various, "sft": alike}, [0.0] * 6, 0, 200)["dissimilarity_ratio"]["value"] is None


def test_line_39_which_answer_comes_first_decides_nothing() -> None:
    """The judge reads one answer at a time, so turning a comparison round turns its outcome round."""
    ours = [answer(f"a {i} c", judge) for i, judge in enumerate((0.0, 2.0, 1.0, 1.0, -1.0))]
    theirs = [answer(f"b {i} c", judge) for i, judge in enumerate((1.0, -1.0, 1.0, 0.5, -2.0))]
    for a, b in zip(ours, theirs, strict=True):
        assert outcome(a, b, "judge") + outcome(b, a, "judge") == 1.0
    one = measure({"candidate": ours, "sft": theirs}, [0.0] * 5, 0, 200)["win_rate_over_sft"]["value"]
    other = measure({"candidate": theirs, "sft": ours}, [0.0] * 5, 0, 200)["win_rate_over_sft"]["value"]
    assert (one, other) == (pytest.approx(0.7), pytest.approx(0.3))  # 3 won, 1 tied, 1 lost
