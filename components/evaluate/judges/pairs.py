"""Pairs of answers to judge, and win rates from what a judge said about them. Pure.

A judge that answers by words can fail to answer. Pairs that it was never asked about (its budget was spent, or nobody has labelled
them yet) are left out: prompts come in the order of a seeded hash, so the others are a random part of them, and the interval
over fewer is wider. Pairs that it was asked about without a verdict are not a random part; at the interval's low end each counts as
lost, at its high end as won (the bounds of Manski 2003), so that no silence of a judge can carry a candidate through the gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from components.evaluate.judges.settings import Judge
from components.evaluate.measures import Answer, outcome
from components.rlhf.records import Message
from components.rlhf.statistics import UNKNOWN, Estimate, as_json, length_controlled_win_rate, win_rate


class Pair(NamedTuple):
    """The candidate's answer and another policy's to the same prompt.

    Fields:
        row: number of the prompt among those that were answered.
        over: the other policy, "sft" or "champion".
        question: the prompt as text.
        ours, theirs: text of the candidate's answer and of the other's.
        longer_tokens: how much longer ours is.
    """

    row: int
    over: str
    question: str
    ours: str
    theirs: str
    longer_tokens: int


class Judgement(NamedTuple):
    """What a judge made of a pair.

    Fields:
        outcome: 1 our answer is better, 0.5 a tie, 0 the other's is better; None: no verdict; NaN makes every rate unknown.
        asked: whether the judge was asked, and so is silent if there is no outcome.
        details: for judgements.jsonl.
    """

    outcome: float | None
    asked: bool
    details: dict[str, Any]


class Intervals(NamedTuple):
    """How intervals are found: by the bootstrap, and for the win rate that the gate reads by `of_gate`."""

    seed: int
    resamples: int
    of_gate: Callable[[Sequence[float]], Estimate]

    def win_rate(self, outcomes: Sequence[float]) -> Estimate:
        return win_rate(outcomes, self.seed, self.resamples)


SAME_TEXT = Judgement(0.5, False, {"same_text": True})  # a tie that no judge has to be asked about


def pairs_of(prompts: Sequence[Sequence[Message]], answers: Mapping[str, Sequence[Answer]]) -> list[Pair]:
    """Every pair, prompt after prompt, so that a judge that comes to an end early has judged the same prompts for every policy."""
    others = [policy for policy in answers if policy != "candidate"]
    return [
        Pair(row, over, conversation(prompt), ours.text, answers[over][row].text, ours.tokens - answers[over][row].tokens)
        for row, (prompt, ours) in enumerate(zip(prompts, answers["candidate"], strict=True))
        for over in others
    ]


def by_scores(pairs: Sequence[Pair], answers: Mapping[str, Sequence[Answer]]) -> list[Judgement]:
    """What the held-out reward model makes of each pair; an outcome of NaN where a score is not finite."""
    return [Judgement(outcome(answers["candidate"][pair.row], answers[pair.over][pair.row], "judge"), True, {}) for pair in pairs]


def conversation(prompt: Sequence[Message]) -> str:
    """A prompt as a person reads it: the text of its only message, else each message behind its role."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def win_rate_name(over: str, judge: Judge, gate_judge: Judge) -> str:
    """The measure of a judge's win rate: the gate's judge has the plain name, which the gate reads."""
    return f"win_rate_over_{over}" + ("" if judge == gate_judge else f"_{judge}")


def win_rates(
    pairs: Sequence[Pair], judgements: Sequence[Judgement], min_judged_fraction: float, intervals: Intervals, of_gate: bool
) -> tuple[dict[str, tuple[Estimate, Estimate]], dict[str, dict[str, int]]]:
    """Of each policy that the candidate was compared with: its win rate, raw and at equal length, and the counts behind it.

    Returns:
        {over: (raw, controlled)}, `UNKNOWN` where less than `min_judged_fraction` was judged; and {over: {pairs, judged, silent}}.
    """
    rates, counts = {}, {}
    for over in dict.fromkeys(pair.over for pair in pairs):
        rows = [(pair, judgement) for pair, judgement in zip(pairs, judgements, strict=True) if pair.over == over]
        # Equal texts tie without a judge. Where it was asked about a part of the others, as large a part of these counts: all of
        # them would draw the rate towards one half.
        same = [row for row in rows if row[1] is SAME_TEXT]
        others = [row for row in rows if row[1] is not SAME_TEXT]
        asked = sum(judgement.asked for _, judgement in others) / len(others) if others else 1.0
        counted = [*others, *same[: round(asked * len(same))]]
        longer = [pair.longer_tokens for pair, judgement in counted if judgement.outcome is not None or judgement.asked]
        outcomes = [judgement.outcome for _, judgement in counted if judgement.outcome is not None or judgement.asked]
        silent = outcomes.count(None)
        judged = len(outcomes) - silent
        counts[over] = {"pairs": len(rows), "judged": judged, "silent": silent}
        if not judged or judged < min_judged_fraction * len(rows):
            rates[over] = (UNKNOWN, UNKNOWN)
            continue
        known = [(verdict, length) for verdict, length in zip(outcomes, longer, strict=True) if verdict is not None]
        rates[over] = alone = _rates([verdict for verdict, _ in known], [length for _, length in known], intervals, of_gate)
        if not silent:
            continue
        lost, won = (
            _rates([filled if verdict is None else verdict for verdict in outcomes], longer, intervals, of_gate)
            for filled in (0.0, 1.0)
        )
        raw, controlled = (
            Estimate(middle.value, min(low.low, middle.value), max(high.high, middle.value))
            for low, middle, high in zip(lost, alone, won, strict=True)
        )
        rates[over] = (raw, controlled)
    return rates, counts


def _rates(outcomes: Sequence[float], longer: Sequence[int], intervals: Intervals, of_gate: bool) -> tuple[Estimate, Estimate]:
    if not all(map(math.isfinite, outcomes)):
        return UNKNOWN, UNKNOWN
    raw = intervals.of_gate(outcomes) if of_gate else intervals.win_rate(outcomes)
    return raw, length_controlled_win_rate(outcomes, longer, intervals.seed, intervals.resamples)


def named(
    rates: Mapping[str, tuple[Estimate, Estimate]], judge: Judge, gate_judge: Judge, missing: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The measures of a judge's win rates; one without a value says in `missing` why, and what to do."""
    found: dict[str, dict[str, Any]] = {}
    for over, estimates in rates.items():
        name = win_rate_name(over, judge, gate_judge)
        for each, estimate in zip((name, f"{name}_length_controlled"), estimates, strict=True):
            found[each] = as_json(estimate) | ({"missing": missing[over]} if over in missing else {})
    return found


def rename_reward_model(measures: Mapping[str, Any], judges: Sequence[Judge], gate_judge: Judge) -> dict[str, Any]:
    """The measures with the held-out reward model's win rates under its own name, or without them where it is no judge."""
    found = dict(measures)
    if gate_judge == "reward_model":
        return found
    for over in ("sft", "champion"):
        for suffix in ("", "_length_controlled"):
            rate = found.pop(f"win_rate_over_{over}{suffix}", None)
            if rate is not None and "reward_model" in judges:
                found[win_rate_name(over, "reward_model", gate_judge) + suffix] = rate
    return found
