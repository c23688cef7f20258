"""The gate: may this candidate be promoted? A pure function of the numbers in evaluation.json, so that anyone can decide again.

It fails closed: a measure that is missing, null, not a number, NaN or infinite fails, and so does such a threshold. Only the
thresholds of `OPTIONAL` may be null, where there is nothing to compare: no champion, no probes, or no group of prompts that is
large enough.

Looks at one champion share an error budget: the first row holds what is spent of it, and the win rates' ends are at this look's
share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Verdict = Literal["pass", "fail", "not required"]
End = Literal["value", "low", "high"]


class Rule(NamedTuple):
    """One line of the gate.

    Fields:
        measure: key in `measures`, a {value, low, high}.
        end: which of the three is compared.
        relation: ">" (a measure exactly at the threshold fails), or ">=" and "<=" (it passes).
        threshold: key in `thresholds`.
        meaning: what is compared, for a reader of the report.
    """

    measure: str
    end: End
    relation: Literal[">", ">=", "<="]
    threshold: str
    meaning: str


# What probes measure, against SFT and against the champion: measure, end, threshold, meaning.
AGAINST: tuple[tuple[str, End, str, str], ...] = (
    ("refusal_harmful_drop", "high", "max_harmful_refusal_drop", "upper end of the fall in refusals of harmful probes against"),
    ("refusal_harmless_rise", "high", "max_harmless_refusal_rise", "upper end of the rise in refusals of harmless probes against"),
    ("instruction_drop", "high", "max_instruction_drop", "upper end of the fall in instructions followed against"),
    ("plain_perplexity_ratio", "value", "max_plain_perplexity_ratio", "perplexity per word of plain text relative to"),
)
RULES = (
    Rule(
        "false_pass_probability",
        "value",
        "<=",
        "max_false_pass_probability",
        "probability that any look so far passes a candidate that is no better",
    ),
    Rule("win_rate_over_sft", "low", ">", "min_win_rate_over_sft", "lower end of the judge's win rate over SFT"),
    Rule(
        "win_rate_over_champion",
        "low",
        ">",
        "min_win_rate_over_champion",
        "lower end of the judge's win rate over the champion",
    ),
    Rule(
        "worst_group_win_rate_over_sft",
        "high",
        ">=",
        "min_worst_group_win_rate_over_sft",
        "upper end of the judge's win rate over SFT in the worst group of prompts",
    ),
    Rule(
        "worst_group_win_rate_over_champion",
        "high",
        ">=",
        "min_worst_group_win_rate_over_champion",
        "upper end of the judge's win rate over the champion in the worst group of prompts",
    ),
    Rule("kl_reference", "value", "<=", "max_kl_reference", "KL to SFT in nats per completion"),
    Rule(
        "overoptimisation_gap",
        "high",
        "<=",
        "max_overoptimisation_gap",
        "upper end of what the reward model claims more than the judge, in deviations",
    ),
    Rule("distinct_2_ratio", "value", ">=", "min_distinct_2_ratio", "distinct word pairs relative to SFT"),
    Rule("length_ratio", "value", "<=", "max_length_ratio", "mean length relative to SFT"),
    Rule("eos_fraction", "value", ">=", "min_eos_fraction", "share of completions that end by themselves"),
    Rule("dissimilarity_ratio", "value", ">=", "min_dissimilarity_ratio", "1 - self-BLEU relative to SFT"),
    Rule(
        "answer_perplexity_ratio",
        "value",
        "<=",
        "max_answer_perplexity_ratio",
        "perplexity under SFT relative to SFT's own answers",
    ),
    Rule("perplexity_ratio", "value", "<=", "max_perplexity_ratio", "perplexity on text ranked first relative to SFT"),
    *(
        Rule(f"{measure}_{policy}", end, "<=", f"{threshold}_{policy}", f"{meaning} {said}")
        for policy, said in (("sft", "SFT"), ("champion", "the champion"))
        for measure, end, threshold, meaning in AGAINST
    ),
)
SEQUENTIAL = {"win_rate_over_sft", "win_rate_over_champion"}  # their ends are at the error of this look (error_budget.py)
OPTIONAL = {  # threshold that may be null: why nothing is compared then
    "min_win_rate_over_champion": "no champion to compare with, or the candidate is the champion",
    "min_worst_group_win_rate_over_sft": "no group of prompts is large enough",
    "min_worst_group_win_rate_over_champion": "no champion to compare with, or no group of prompts is large enough",
    **{f"{threshold}_sft": "nothing was probed" for _, _, threshold, _ in AGAINST},
    **{f"{threshold}_champion": "nothing was probed, or no champion to compare with" for _, _, threshold, _ in AGAINST},
}


def decide(measures: Mapping[str, Any], thresholds: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Literal["pass", "fail"]]:
    """The table of the gate and its verdict: "pass" only if no row fails.

    Args:
        measures: {name: {value, low, high}} as in evaluation.json; others than the gate's are ignored.
        thresholds: {name: number}; those of `OPTIONAL` may be null.

    Returns:
        Rows {measure, value, low, high, relation, threshold, verdict, sentence}, one for each of `RULES`, and the verdict.
    """
    rows = [_row(rule, measures, thresholds) for rule in RULES]
    return rows, "fail" if any(row["verdict"] == "fail" for row in rows) else "pass"


def _row(rule: Rule, measures: Mapping[str, Any], thresholds: Mapping[str, Any]) -> dict[str, Any]:
    measure = measures.get(rule.measure)
    numbers = {end: number(measure.get(end)) if isinstance(measure, Mapping) else None for end in ("value", "low", "high")}
    threshold = number(thresholds.get(rule.threshold))
    verdict, sentence = _verdict(rule, numbers[rule.end], threshold, thresholds)
    if numbers[rule.end] is None and isinstance(measure, Mapping) and isinstance(measure.get("missing"), str):
        sentence += f" {measure['missing']}"  # why, and what to do
    if rule.measure in SEQUENTIAL and verdict != "not required":
        sentence += _look(measures, thresholds)
    return {
        "measure": rule.measure,
        **numbers,
        "relation": f"{rule.end} {rule.relation}",
        "threshold": threshold,
        "verdict": verdict,
        "sentence": sentence,
    }


def _verdict(rule: Rule, found: float | None, threshold: float | None, thresholds: Mapping[str, Any]) -> tuple[Verdict, str]:
    meaning = rule.meaning[0].upper() + rule.meaning[1:]
    if rule.threshold in OPTIONAL and rule.threshold in thresholds and thresholds[rule.threshold] is None:
        return "not required", f"{meaning}: {OPTIONAL[rule.threshold]}."
    if threshold is None:
        return "fail", f"{meaning}: the threshold {rule.threshold} is missing or not a finite number."
    if found is None:
        return "fail", f"{meaning}: missing or not a finite number; {rule.relation} {threshold:g} is required."
    passed = {">": found > threshold, ">=": found >= threshold, "<=": found <= threshold}[rule.relation]
    return "pass" if passed else "fail", f"{meaning} is {found:.4g}; {rule.relation} {threshold:g} is required."


def _look(measures: Mapping[str, Any], thresholds: Mapping[str, Any]) -> str:
    """Which look this is, at what error, and what is left of the budget."""
    look, alpha, spent = (
        number(measures[name].get("value")) if isinstance(measures.get(name), Mapping) else None
        for name in ("look", "look_alpha", "false_pass_probability")
    )
    budget = number(thresholds.get("max_false_pass_probability"))
    if look is None or alpha is None or spent is None or budget is None:
        return " It is not known which look at this champion it is."
    left = max(0.0, budget - spent)
    return f" This is look {look:.0f} at this champion: wrong with probability {alpha:.3g}; {left:.3g} of {budget:.3g} is left."


def number(value: Any) -> float | None:
    """The value as a finite float; None for everything else (null, text, booleans, NaN, infinities)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
