"""Comparisons of two completions, counted part by part: bias, contradictions, cycles and agreement, of the whole and of each rater.

What is kept between parts are sums per rater and per pair of raters (`cluster_sums`, a prompt being a cluster), a bounded sample of
prompts for the bootstraps, and a few examples: nothing grows with the number of rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from components.rlhf.agreement import PromptAgreement, Votes, agreement_by_prompt, pairs_of_votes
from components.rlhf.cluster_sums import add_trials, empty_sums
from components.rlhf.near_duplicates import mix
from components.validate_data.pairs import Decisions, Pairs, pairs_of, repeated_decisions, repeated_orderings
from components.validate_data.rows import Ints
from components.validate_data.spill import FILES, NOBODY, Part

EXAMPLES = 5
RATERS_COMPARED = 256  # with each other, those with most rankings: sums of each two of them are kept
SAMPLED_PROMPTS = 10_000  # of those that several raters judged, for the bootstraps: an agreement then has an error below 0.01
BIASES = ("longer", "first_shown", "refusal")


class Example(NamedTuple):
    """Rankings, by their row, and the hashes of the two completions that it is about, if any."""

    rows: list[int]
    texts: list[int]


class Comparisons:
    """Sums over all parts of a snapshot.

    Attributes:
        prompts, pairs, ties: how many.
        split_rows: rankings whose prompt is in both splits.
        repeated, contradicted: comparisons that were decided at least twice, and those of them that were decided both ways.
        whole: sums [1, 6] of each of `BIASES`, of "self_contradiction" and of "cycle".
        by_rater: the same, and "agreement" with any other rater, [raters, 6].
        compared: raters with most rankings.
        between: agreement of each two of those [T, T, 6], the one that stands before the other in `compared` first.
        examples: of "split", "contradiction", "self_contradiction" and "cycle".
    """

    def __init__(self, rankings: Sequence[int], unordered_sources: Sequence[int], unordered_pairs: bool) -> None:
        """Nothing is counted yet.

        Args:
            rankings: of each rater.
            unordered_sources: whose order of completions is not the order in which they were shown.
            unordered_pairs: the same of all rankings of two completions.
        """
        raters = len(rankings)
        self.prompts = self.pairs = self.ties = self.split_rows = self.repeated = self.contradicted = 0
        self.whole = {name: empty_sums(1) for name in (*BIASES, "self_contradiction", "cycle")}
        self.by_rater = {name: empty_sums(raters) for name in (*self.whole, "agreement")}
        self.compared = sorted(range(raters), key=lambda rater: -rankings[rater])[:RATERS_COMPARED]
        self.between = empty_sums(len(self.compared), len(self.compared))
        self.examples: dict[str, list[Example]] = {name: [] for name in ("split", "contradiction", "self_contradiction", "cycle")}
        self._place = np.full(raters, -1)
        self._place[self.compared] = np.arange(len(self.compared))
        self._unordered_sources, self._unordered_pairs = np.array(unordered_sources), unordered_pairs
        self._agreements: list[PromptAgreement] = []

    @property
    def agreement(self) -> PromptAgreement:
        """Of the sampled prompts."""
        return PromptAgreement.join(self._agreements)

    def add(self, part: Part) -> None:
        self._splits(part)
        pairs = pairs_of(part.valid())
        self.pairs += len(pairs.row_P)
        strict = pairs.of(pairs.margin_P != 0)
        self.ties += len(pairs.row_P) - len(strict.row_P)
        self._biases(strict)
        self._contradictions(strict, strict.votes())
        self._cycles(pairs)
        self._agreement(pairs.votes())

    def _splits(self, part: Part) -> None:
        _, prompt = np.unique(part.rows_N["prompt"], return_inverse=True)
        self.prompts += int(prompt.max()) + 1
        both = np.logical_and(*(np.bincount(prompt, weights=part.rows_N[split]) > 0 for split in ("test", "train")))
        rows = np.sort(part.rows_N["row"][both[prompt]])
        self.split_rows += len(rows)
        self._keep("split", [Example([int(row)], []) for row in rows[:EXAMPLES]])

    def _biases(self, strict: Pairs) -> None:
        """Which side wins, of pairs whose sides differ in length, in being shown first, or in being a refusal."""
        shown = strict.shown_first_P & ~np.isin(strict.source_P, self._unordered_sources)
        shown &= ~(self._unordered_pairs & (strict.size_P == 2))
        sides = {
            "longer": strict.lengths_P2[:, 0] - strict.lengths_P2[:, 1],
            "first_shown": shown.astype(int),
            "refusal": strict.refuses_P2[:, 0].astype(int) - strict.refuses_P2[:, 1],
        }
        for name, side in sides.items():
            chosen = side != 0
            self._count(name, strict.rater_P[chosen], strict.prompt_P[chosen], side[chosen] * strict.margin_P[chosen] > 0)

    def _count(self, name: str, rater: Ints, prompt: Ints, hit: NDArray[Any]) -> None:
        add_trials(self.whole[name], np.zeros_like(rater), prompt, hit)
        known = rater != NOBODY
        add_trials(self.by_rater[name], rater[known], prompt[known], hit[known])

    def _contradictions(self, strict: Pairs, votes: Votes) -> None:
        """Comparisons decided both ways: by anybody, and by one rater."""
        anybody = repeated_decisions(votes.item_N, votes.verdict_N)
        self.repeated += len(anybody.first_D)
        self.contradicted += int(anybody.both_ways_D.sum())
        self._keep("contradiction", _examples(anybody, strict))
        own = strict.of(strict.rater_P != NOBODY)
        votes = own.votes()
        alone = repeated_decisions(mix(votes.item_N ^ mix(votes.rater_N.astype(np.uint64))), votes.verdict_N)
        self._count("self_contradiction", own.rater_P[alone.first_D], own.prompt_P[alone.first_D], alone.both_ways_D)
        self._keep("self_contradiction", _examples(alone, own))

    def _cycles(self, pairs: Pairs) -> None:
        found = repeated_orderings(pairs)
        self._count("cycle", pairs.rater_P[found.place_G], pairs.prompt_P[found.place_G], found.circular_G)
        self._keep("cycle", [Example(rows.tolist(), []) for rows in found.rows_G2[found.circular_G][:EXAMPLES]])

    def _agreement(self, votes: Votes) -> None:
        chunks = [np.stack(chunk) for chunk in pairs_of_votes(votes)]
        if not chunks:
            return
        a, b = np.concatenate(chunks, axis=1)
        strict = (votes.verdict_N[a] != 0) & (votes.verdict_N[b] != 0)
        a, b = a[strict], b[strict]
        same, prompt = votes.verdict_N[a] == votes.verdict_N[b], votes.prompt_N[a]
        both = np.concatenate([votes.rater_N[a], votes.rater_N[b]])
        add_trials(self.by_rater["agreement"], both, np.tile(prompt, 2), np.tile(same, 2))
        one, other = self._place[votes.rater_N[a]], self._place[votes.rater_N[b]]
        chosen = (one >= 0) & (other >= 0)
        cell = np.minimum(one, other) * len(self.compared) + np.maximum(one, other)
        add_trials(self.between.reshape(-1, 6), cell[chosen], prompt[chosen], same[chosen])
        # Prompts are in the order of their hashes, so the first ones are as good as drawn.
        self._agreements.append(PromptAgreement(*(each[: SAMPLED_PROMPTS // FILES] for each in agreement_by_prompt(votes))))

    def _keep(self, name: str, found: list[Example]) -> None:
        self.examples[name] = (self.examples[name] + found)[:EXAMPLES]


def _examples(decisions: Decisions, pairs: Pairs) -> list[Example]:
    return [Example(pairs.row_P[two].tolist(), pairs.texts_P2[two[0]].tolist()) for two in decisions.against[:EXAMPLES]]
