"""What is measured about a candidate, from its answers and the others' to the same prompts. Pure.

Policies are called "candidate", "sft" and "champion"; scorers "judge" (the reward model that PPO never saw, which alone enters the
gate), "reward" (the one that PPO optimised: shown beside it, since the gap between both is the over-optimisation) and "true" (the
true preference of simulated data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from components.rlhf.error_budget import Look, win_rate_interval
from components.rlhf.statistics import (
    UNKNOWN,
    Estimate,
    as_json,
    cluster_share,
    distinct_n,
    length_controlled_win_rate,
    mean,
    paired_difference,
    perplexity,
    perplexity_ratio,
    self_bleu,
    spearman,
    wilson_interval,
    win_rate,
)

TIE_WIDTH = 1e-4  # scores nearer than this are a tie: rounding differs with the padding of a batch

Measures = dict[str, dict[str, float | None]]


class Answer(NamedTuple):
    """One policy's answer to one prompt.

    Fields:
        text: without EOS.
        tokens: length of the completion in the policy's own tokens, EOS included.
        ended: whether EOS came within the budget.
        scores: {scorer: score}.
    """

    text: str
    tokens: int
    ended: bool
    scores: dict[str, float]


class Reading(NamedTuple):
    """A text as a policy reads it: its negative log-likelihood in nats, summed over its tokens, and their number."""

    nats: float
    tokens: int


def outcome(ours: Answer, theirs: Answer, scorer: str) -> float:
    """1 if our answer scores higher, 0 if lower, 0.5 if the texts are equal or the scores are; NaN if a score is not finite."""
    a, b = ours.scores[scorer], theirs.scores[scorer]
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.nan
    if ours.text == theirs.text or abs(a - b) <= TIE_WIDTH:
        return 0.5
    return 1.0 if a > b else 0.0


def measure(
    answers: Mapping[str, Sequence[Answer]], log_ratios: Sequence[float], seed: int, resamples: int, alpha: float = 0.025
) -> Measures:
    """Every measure as {value, low, high}; null where it cannot be computed, which the gate takes for a failure.

    Args:
        answers: {policy: answers}, in the order of the prompts, the same prompts for each.
        log_ratios: of each of the candidate's completions, log p(candidate) - log p(SFT), summed over its tokens, in nats.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        alpha: error of either end of the judge's win rates, on which the gate decides.
    """
    found: dict[str, Estimate] = {"kl_reference": mean(log_ratios, seed, resamples)}
    for policy, given in answers.items():
        found |= _of_policy(policy, given, seed, resamples)
    candidate, sft = answers["candidate"], answers["sft"]
    for other in answers:
        if other != "candidate":
            found |= _against(other, candidate, answers[other], seed, resamples, alpha)
    tokens, sft_tokens = ([answer.tokens for answer in each] for each in (candidate, sft))
    found["length_ratio"] = cluster_share(tokens, sft_tokens, seed, resamples, share=False)
    for n in (1, 2):
        of_sft = found[f"distinct_{n}_sft"].value
        ratio = found[f"distinct_{n}_candidate"].value / of_sft if of_sft > 0 else math.nan
        found[f"distinct_{n}_ratio"] = _point(ratio)
    apart, sft_apart = (1 - found[f"self_bleu_{policy}"].value for policy in ("candidate", "sft"))
    found["dissimilarity_ratio"] = _point(apart / sft_apart if sft_apart > 0 else math.nan)
    found["eos_fraction"] = found["eos_fraction_candidate"]
    if "true" in candidate[0].scores:
        everything = [answer for given in answers.values() for answer in given]
        for scorer in ("judge", "reward"):
            pairs = [(a.scores[scorer], a.scores["true"]) for a in everything]
            found[f"{scorer}_truth_spearman"] = _point(spearman(*zip(*pairs, strict=True)))
    return {name: as_json(estimate) for name, estimate in found.items()}


def measure_perplexity(
    answers_read: Mapping[str, Sequence[Reading]], texts_read: Mapping[str, Sequence[Reading]], seed: int, resamples: int
) -> Measures:
    """Perplexity of each one's own answers under SFT, and of people's text under each one; and the candidate's relative to SFT's.

    Args:
        answers_read: {policy: its own answer to each prompt, as SFT reads it}, for candidate and SFT.
        texts_read: {policy: the text of each prompt that people liked, as this policy reads it}, for candidate and SFT.
        seed: of the bootstrap over prompts.
        resamples: of the bootstrap.
    """
    found = {}
    for name, read in (("answer_perplexity", answers_read), ("perplexity", texts_read)):
        ours, theirs = (([each.nats for each in read[of]], [each.tokens for each in read[of]]) for of in ("candidate", "sft"))
        found[f"{name}_candidate"] = perplexity(*ours, seed, resamples)
        found[f"{name}_sft"] = perplexity(*theirs, seed, resamples)
        found[f"{name}_ratio"] = perplexity_ratio(*ours, *theirs, seed, resamples)
    return {name: as_json(estimate) for name, estimate in found.items()}


def measure_refusals(probes: Sequence[Mapping[str, Any]]) -> Measures:
    """Shares of harmful and of harmless probes that each policy refuses, and how the candidate's are worse than others'.

    Args:
        probes: as `probe_records` gives them; of none, nothing is measured.
    """
    found: dict[str, Estimate] = {}
    policies = list(probes[0]["answers"]) if probes else []
    for kind, harmful in (("harmful", True), ("harmless", False)):
        asked = [each["answers"] for each in probes if each["harmful"] == harmful]
        refused = {policy: [answers[policy]["refuses"] for answers in asked] for policy in policies}
        found |= {f"refusal_{kind}_{policy}": wilson_interval(sum(each), len(each)) for policy, each in refused.items()}
        for other in (policy for policy in policies if policy != "candidate"):
            if harmful:
                found[f"refusal_harmful_drop_{other}"] = paired_difference(refused[other], refused["candidate"])
            else:
                found[f"refusal_harmless_rise_{other}"] = paired_difference(refused["candidate"], refused[other])
    return {name: as_json(estimate) for name, estimate in found.items()}


def measure_look(look: Look) -> Measures:
    """The look's number, the error that it may spend, and what all looks so far may have spent."""
    found = {"look": float(look.number), "look_alpha": look.alpha, "false_pass_probability": look.spent}
    return {name: as_json(_point(value)) for name, value in found.items()}


def _of_policy(policy: str, given: Sequence[Answer], seed: int, resamples: int) -> dict[str, Estimate]:
    texts = [answer.text for answer in given]
    return {
        f"length_tokens_{policy}": mean([answer.tokens for answer in given], seed, resamples),
        f"eos_fraction_{policy}": wilson_interval(sum(answer.ended for answer in given), len(given)),
        f"distinct_1_{policy}": _point(distinct_n(texts, 1)),
        f"distinct_2_{policy}": _point(distinct_n(texts, 2)),
        f"self_bleu_{policy}": _point(self_bleu(texts)),
        **{
            f"{scorer}_score_{policy}": mean([answer.scores[scorer] for answer in given], seed, resamples)
            for scorer in given[0].scores
        },
    }


def _against(
    other: str, ours: Sequence[Answer], theirs: Sequence[Answer], seed: int, resamples: int, alpha: float
) -> dict[str, Estimate]:
    found = {}
    longer = [a.tokens - b.tokens for a, b in zip(ours, theirs, strict=True)]
    for scorer in ours[0].scores:
        wins = [outcome(a, b, scorer) for a, b in zip(ours, theirs, strict=True)]
        prefix = "" if scorer == "judge" else f"{scorer}_"
        name = f"{prefix}win_rate_over_{other}"
        known = all(math.isfinite(each) for each in wins)
        if scorer == "judge":
            found[name] = win_rate_interval(wins, alpha)
        else:
            found[name] = win_rate(wins, seed, resamples) if known else UNKNOWN
        controlled = length_controlled_win_rate(wins, longer, seed, resamples) if known else UNKNOWN
        found[f"{name}_length_controlled"] = controlled
    return found


def _point(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)


def sample_record(prompt: Any, given: Mapping[str, Answer]) -> dict[str, Any]:
    """One line of samples.jsonl: the prompt, each policy's answer with its scores, and the judge's verdict on each comparison."""
    verdicts = {1.0: "won", 0.5: "tied", 0.0: "lost"}
    return {
        "prompt": prompt,
        "answers": {
            policy: {
                "text": answer.text,
                "tokens": answer.tokens,
                "ended": answer.ended,
                "scores": {name: value if math.isfinite(value) else None for name, value in answer.scores.items()},
            }
            for policy, answer in given.items()
        },
        "verdicts": {
            policy: verdicts.get(outcome(given["candidate"], answer, "judge"), "unknown")
            for policy, answer in given.items()
            if policy != "candidate"
        },
    }
