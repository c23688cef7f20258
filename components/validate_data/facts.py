"""Numbers about a snapshot, for the expectations and the reports, in memory that does not grow with it.

1  a sample of the held-out prompts
2  every batch once: numbers per row for the expectations on rows, near duplicates of held-out prompts, and a spill to disk
3  the spill prompt by prompt: bias, contradictions, cycles, agreement
4  shares and counts of the whole, and of each rater
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from components.rlhf.agreement import alpha_estimate, pairwise_agreement
from components.rlhf.cluster_sums import share
from components.rlhf.records import snapshot_batches
from components.rlhf.statistics import Estimate, accuracy_ceiling, wilson_interval
from components.validate_data.comparisons import EXAMPLES, Comparisons
from components.validate_data.examples import Examples, short
from components.validate_data.raters import FLAGS, RANDOM, SHARED_PROMPTS, Pool, median_gaps, pool_of
from components.validate_data.rows import rows_of
from components.validate_data.samples import SPOKEN, Leaks, Sample, held_out_sample, languages
from components.validate_data.spill import NOBODY, Spill

if TYPE_CHECKING:
    from components.validate_data.stage import Config

BETTER_FIRST_FORMS = ("hh", "pairs")  # of an ingest: their rows name the chosen completion, not which one was shown first
ALWAYS_ORDERED = 10  # rankings of a source that all list the better completions first: by chance once in 2^10 at most
SEED, RESAMPLES = 0, 1000  # of the bootstraps


class Facts:
    """What is known of a snapshot.

    Attributes:
        whole: shares and counts, by the names of the checks; NaN where one should be known and is not.
        unknown: why a number is not known, where there is nothing to know it from; by the same names.
        estimates: shares with their intervals, by the same names.
        examples: what is wrong, in words, by the same names.
        pool: the known raters.
        languages: of the sampled prompts, how many are in which.
    """

    def __init__(self, pool: Pool, spoken: Mapping[str, int]) -> None:
        self.whole: dict[str, float] = {}
        self.unknown: dict[str, str] = {}
        self.estimates: dict[str, Estimate] = {}
        self.examples: dict[str, list[str]] = {}
        self.pool = pool
        self.languages = spoken

    def at_least(self, name: str, estimate: Estimate, unknown: str) -> None:
        """A share that should be small: what counts is the lower end of its interval, so that no check fires by chance."""
        self._estimate(name, estimate, estimate.low, unknown)

    def at_most(self, name: str, estimate: Estimate, unknown: str) -> None:
        """A share that should be large: what counts is the upper end."""
        self._estimate(name, estimate, estimate.high, unknown)

    def bias(self, name: str, estimate: Estimate, unknown: str) -> None:
        """A share that should be one half: what counts is how far all of its interval is away from there."""
        self._estimate(name, estimate, max(0.0, estimate.low - 0.5, 0.5 - estimate.high), unknown)

    def _estimate(self, name: str, estimate: Estimate, value: float, unknown: str) -> None:
        self.estimates[name] = estimate
        if unknown:
            self.unknown[name] = unknown
        else:
            self.whole[name] = value if all(map(math.isfinite, estimate)) else math.nan


def collect(
    snapshot: Path, ingest: Mapping[str, Any], scratch: Path, config: Config, look: Callable[[pd.DataFrame], None]
) -> Facts:
    """Reads a snapshot.

    Args:
        snapshot: folder of its Parquet files.
        ingest: the ingest report, for the share of rows in quarantine and the forms of the rows.
        scratch: folder on a disk that holds some 200 bytes for each ranking.
        look: takes the rows of each batch, with `rows.COLUMNS`.
    """
    # 1. and 2.
    leaks = Leaks(held_out_sample(snapshot_batches(snapshot, ["prompt", "split"])), config.near_duplicate_similarity)
    spill, sample, tests = Spill(scratch / "spill"), Sample(SPOKEN), 0
    for batch in snapshot_batches(snapshot):
        rows = rows_of(batch)
        look(rows.frame)
        leaks.see(rows.prompt_N, rows.prompts, spill.rows, rows.train_N)
        sample.see(rows.prompt_N, rows.prompts)
        tests += int(rows.test_N.sum())
        spill.add(rows)
    sample.close()
    # 3.
    rankings = [spill.rankings[number] for number in range(len(spill.raters))]
    unordered = [number for number, count in spill.ordered.items() if count >= ALWAYS_ORDERED and spill.best_first[number] == count]
    pairs_unordered = any(file.get("formats", {}).get(form) for file in ingest.get("files", []) for form in BETTER_FIRST_FORMS)
    sums = Comparisons(rankings, unordered, pairs_unordered)
    for part in spill.parts():
        sums.add(part)
    # 4.
    pool = pool_of(
        list(spill.raters),
        rankings,
        max(1, spill.rows),
        sums,
        median_gaps(spill.times(), len(rankings)),
        config.min_rankings_of_rater,
        {"longer": config.max_length_bias, "first_shown": config.max_position_bias, "refusal": config.max_refusal_bias},
    )
    facts = Facts(pool, languages(sample.texts.values()))
    examples = Examples(snapshot)
    _counts(facts, spill, sums, tests, ingest, examples)
    _comparisons(facts, sums, bool(unordered) or pairs_unordered, examples)
    _agreement(facts, sums)
    _raters(facts, spill)
    _samples(facts, leaks, config.languages, examples)
    return facts


def _counts(facts: Facts, spill: Spill, sums: Comparisons, tests: int, ingest: Mapping[str, Any], examples: Examples) -> None:
    declined = int(ingest.get("declined", 0))  # the rater gave no answer, which says nothing about the data
    read, quarantined = int(ingest["read"]) - declined, int(ingest["quarantined"]) - declined
    repeated, rows = spill.repeated_ids(EXAMPLES)
    facts.whole |= {
        "repeated_ids": float(repeated),
        "leaked_rankings": float(sums.split_rows),
        "rankings": float(spill.rows),
        "test_rankings": float(tests),
        "prompts": float(sums.prompts),
        "raters": float(len(spill.raters) + bool(spill.rankings[NOBODY])),
        "quarantined_fraction": quarantined / read if read else 1.0,
        "tie_fraction": sums.ties / sums.pairs if sums.pairs else 0.0,
        "refusal_fraction": spill.refusals / spill.completions if spill.completions else 0.0,
    }
    facts.examples["repeated_ids"] = examples.rows(rows)
    facts.examples["leaked_rankings"] = examples.rows(row for example in sums.examples["split"] for row in example.rows)


def _comparisons(facts: Facts, sums: Comparisons, some_unordered: bool, examples: Examples) -> None:
    """Contradictions, cycles and biases; of what raters do, only where it is known who they are."""
    if sums.repeated:
        facts.whole["contradiction_fraction"] = sums.contradicted / sums.repeated
    else:
        facts.unknown["contradiction_fraction"] = "no comparison was made twice"
    facts.examples["contradiction_fraction"] = examples.comparisons(sums.examples["contradiction"])
    for name, kind in (("self_contradiction_fraction", "self_contradiction"), ("cycle_fraction", "cycle")):
        again = (
            "compared the same two completions twice" if kind == "self_contradiction" else "ordered a prompt's completions twice"
        )
        estimate = share(sums.whole[kind][0])
        facts.at_least(name, estimate, "" if sums.whole[kind].any() else f"no known rater {again}")
        facts.examples[name] = examples.comparisons(sums.examples[kind])
    nothing = {
        "longer": "no ranking prefers one of two completions that differ in length",
        "first_shown": "the rows name the better completion first, not which one was shown first"
        if some_unordered
        else "no ranking prefers anything",
        "refusal": "no ranking prefers one of two completions of which one refuses",
    }
    for name, kind in (("length_bias", "longer"), ("position_bias", "first_shown"), ("refusal_bias", "refusal")):
        facts.bias(name, share(sums.whole[kind][0]), "" if sums.whole[kind].any() else nothing[kind])
        raters = [rater for rater in facts.pool.raters if any(flag in FLAGS[kind] for flag in rater.flags)]
        facts.examples[name] = [
            f"{rater.name}: {rater.shares[kind].value:.2f} ({rater.shares[kind].low:.2f} to {rater.shares[kind].high:.2f})"
            for rater in raters[:EXAMPLES]
        ]


def _agreement(facts: Facts, sums: Comparisons) -> None:
    sampled = sums.agreement
    unknown = "" if sampled.compared_P.sum() else "no two known raters compared the same completions of a prompt"
    facts.at_most("agreement", pairwise_agreement(sampled, SEED, RESAMPLES), unknown)
    alike = (sampled.coincidences_PVV.sum(axis=(0, 1)) > 0).sum() < 2 or len(sampled.agreed_P) < 2
    facts.at_most(
        "alpha", alpha_estimate(sampled, SEED, RESAMPLES), unknown or ("what raters judged is all alike" if alike else "")
    )
    ends = [accuracy_ceiling(end)[1] for end in facts.estimates["agreement"]]
    facts.at_most("human_ceiling", Estimate(*ends), unknown)


def _raters(facts: Facts, spill: Spill) -> None:
    pool = facts.pool
    nobody = "" if pool.raters else "no ranking says who made it"
    few = f"no two raters have {SHARED_PROMPTS} prompts in common" if pool.raters else nobody
    for name, value, unknown in (
        ("largest_rater_fraction", max((rater.fraction for rater in pool.raters), default=0.0), nobody),
        ("small_rater_fraction", pool.small, nobody),
        ("random_rater_fraction", pool.random, few if not pool.tested else ""),
        ("copying_fraction", pool.copying, few if not pool.tested_pairs else ""),
    ):
        if unknown:
            facts.unknown[name] = unknown
        else:
            facts.whole[name] = value
    facts.examples |= {
        "largest_rater_fraction": [f"{rater.name}: {rater.rankings} rankings" for rater in pool.raters[:1]],
        "small_rater_fraction": [f"{rater.name}: {rater.rankings} rankings" for rater in pool.raters[::-1][:EXAMPLES]],
        "random_rater_fraction": [
            f"{rater.name}: agreement {rater.shares['agreement'].value:.2f}" for rater in pool.raters if RANDOM in rater.flags
        ][:EXAMPLES],
        "copying_fraction": [
            f"{one} and {other}: agreement {own.value:.2f}, predicted {predicted:.2f}"
            for one, other, own, predicted in pool.copying_pairs[:EXAMPLES]
        ],
    }


def _samples(facts: Facts, leaks: Leaks, expected: Sequence[str], examples: Examples) -> None:
    """Near duplicates of held-out prompts, and languages."""
    estimate = wilson_interval(len(leaks.found), len(leaks.held_out))
    facts.at_least("near_duplicate_fraction", estimate, "" if leaks.held_out else "there is no held-out prompt")
    facts.examples["near_duplicate_fraction"] = [
        f"{short(each.text)} and, in training, {short(examples.ranking(each.row)['prompt'][-1]['content'])}: {each.similarity:.2f}"
        for each in list(leaks.found.values())[:EXAMPLES]
    ]
    spoken = Counter(facts.languages)
    others = [language for language, _ in spoken.most_common() if language not in (expected or [spoken.most_common(1)[0][0]])]
    estimate = wilson_interval(sum(spoken[language] for language in others), spoken.total())
    facts.at_least("other_language_fraction", estimate, "" if spoken else "of no prompt the language can be told")
    facts.examples["other_language_fraction"] = [f"{language}: {spoken[language]} of {spoken.total()}" for language in others][
        :EXAMPLES
    ]
