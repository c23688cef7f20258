"""Measures of answers against numbers worked by hand."""

from __future__ import annotations

import json
import math

import pytest

from components.evaluate.measures import Answer, measure, outcome, sample_record
from components.rlhf.gate import decide


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
    json.dumps(found, allow_nan=False)


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
        "min_win_rate_over_sft": 0.5,
        "min_win_rate_over_champion": None,
        "max_kl_reference": 5.0,
        "min_distinct_2_ratio": 0.5,
        "max_length_ratio": 2.0,
        "min_eos_fraction": 0.5,
    }
    assert decide(good, thresholds)[1] == "pass"
    broken = measure({"candidate": ours, "sft": [answer("x y", math.nan), *theirs[1:]]}, [1.0] * 20, seed=0, resamples=200)
    assert broken["win_rate_over_sft"] == {"value": None, "low": None, "high": None}
    rows, gate = decide(broken, thresholds)
    assert gate == "fail"
    assert [row["measure"] for row in rows if row["verdict"] == "fail"] == ["win_rate_over_sft"]
    no_kl = measure({"candidate": ours, "sft": theirs}, [1.0] * 19 + [math.nan], seed=0, resamples=200)
    assert [row["measure"] for row in decide(no_kl, thresholds)[0] if row["verdict"] == "fail"] == ["kl_reference"]


def test_answers_without_two_words_have_no_diversity_and_fail() -> None:
    ours = [answer("yes", 1.0) for _ in range(5)]
    theirs = [answer(f"b {i}", 0.0) for i in range(5)]
    assert measure({"candidate": ours, "sft": theirs}, [0.0] * 5, 0, 200)["distinct_2_ratio"]["value"] is None
    assert measure({"candidate": theirs, "sft": ours}, [0.0] * 5, 0, 200)["distinct_2_ratio"]["value"] is None


def test_sample_record() -> None:
    record = sample_record([{"role": "user", "content": "hi"}], {"candidate": answer("a", 1.0), "sft": answer("b", math.nan)})
    assert record["verdicts"] == {"sft": "unknown"}
    assert record["answers"]["sft"]["scores"]["judge"] is None
    assert record["answers"]["candidate"] == {"text": "a", "tokens": 5, "ended": True, "scores": {"judge": 1.0, "reward": 2.0}}
    json.dumps(record, allow_nan=False)
