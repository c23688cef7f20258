"""A study of the reward model, on request: does more data help?

It trains further models from scratch, with the reward model's recipe on a part of its rankings. Only what these models score on
held-out rankings is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.rlhf.accuracy_report import ScoredRanking, mean_over_pairs, pair_hits
from components.rlhf.rankings import EncodedRanking
from components.rlhf.statistics import Estimate, as_json
from components.services.exits import DoNotRetry


def plan_subsets(rankings: Sequence[EncodedRanking], points: int, smallest: int) -> dict[str, list[EncodedRanking]]:
    """The first half, quarter, eighth ... of the rankings: each subset lies in the next larger one.

    Raises:
        DoNotRetry: one would have fewer than `smallest` rankings.
    """
    if points and len(rankings) >> points < smallest:
        most = max(0, int(math.log2(len(rankings) / smallest))) if len(rankings) >= smallest else 0
        raise DoNotRetry(
            f"train_reward_model.curve_points = {points} of {len(rankings)} rankings: the smallest subset has "
            f"{len(rankings) >> points}, fewer than one batch of {smallest}",
            f"set curve_points to at most {most}, lower batch_rankings, or bring more rankings",
        )
    return {f"curve-{2**k}": list(rankings[: len(rankings) >> k]) for k in range(1, points + 1)}


def learning_curve(scored: dict[int, Sequence[ScoredRanking]], seed: int) -> dict[str, Any]:
    """Held-out accuracy against the number of rankings that were learned from.

    Keys:
        points: {rankings, value, low, high, pairs}, fewest rankings first.
        doubling: {from, to, value, low, high}: accuracy of the last point minus that of the one before, on the same pairs; the
            interval is the bootstrap's over prompts of the paired difference, and so narrower than those of the points.
        sentence: the doubling in words.
    """
    hits = {count: pair_hits(scored[count]) for count in sorted(scored)}
    points = [
        {"rankings": count, **as_json(mean_over_pairs(*each, seed)), "pairs": len(each.right_P)} for count, each in hits.items()
    ]
    before, last = sorted(scored)[-2:]
    gain = mean_over_pairs(hits[last].right_P - hits[before].right_P, hits[last].prompt_P, seed, share=False)
    doubling = {"from": before, "to": last, **as_json(gain)}
    return {"points": points, "doubling": doubling, "sentence": _gain_sentence(before, last, gain)}


def _gain_sentence(before: int, last: int, gain: Estimate) -> str:
    if not math.isfinite(gain.value):
        return "There is no held-out pair to see a gain on."
    reading = (
        "more rankings still help" if gain.low > 0 else "more rankings make it worse" if gain.high < 0 else "too little to tell"
    )
    return (
        f"The last doubling, from {before} to {last} rankings, changed the accuracy by {gain.value:+.3f} "
        f"({gain.low:+.3f} to {gain.high:+.3f}): {reading}."
    )
