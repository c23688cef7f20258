"""Studies of the reward model, on request: does more data help, and does it hold for raters whom it never saw?

Both train further models from scratch, with the reward model's recipe on a part of its rankings. Only what these models score on
held-out rankings is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from components.rlhf.accuracy_report import ScoredRanking, mean_over_pairs, pair_hits
from components.rlhf.rankings import EncodedRanking
from components.rlhf.statistics import Estimate, as_json
from components.services.exits import DoNotRetry

# (name of the training, its rankings) -> all test rankings with the scores of the model that learned those alone
TrainAndScore = Callable[[str, Sequence[EncodedRanking]], list[ScoredRanking]]


class Fold(NamedTuple):
    """Raters that a model does not see.

    Fields:
        raters: who is left out.
        train: the rankings of everybody else.
        held_out, own: places of test rankings: by the raters left out, and by those whom the model learned from.
    """

    raters: list[str]
    train: list[EncodedRanking]
    held_out: list[int]
    own: list[int]


class Plan(NamedTuple):
    """What is to be trained, by the name of the training."""

    subsets: dict[str, list[EncodedRanking]]
    folds: dict[str, Fold]

    def names(self) -> list[str]:
        return [*self.subsets, *self.folds]


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


def divide_raters(raters: Iterable[str], folds: int, seed: int) -> list[list[str]]:
    """Every rater in one fold: sorted by a seeded hash they are dealt out in turn, so that folds differ by one rater at most."""
    ordered = sorted(set(raters), key=lambda rater: hashlib.sha256(f"{seed}:{rater}".encode("utf-8", "surrogatepass")).digest())
    return [sorted(ordered[first::folds]) for first in range(folds)]


def plan_folds(rankings: Sequence[EncodedRanking], test: Sequence[EncodedRanking], folds: int, seed: int) -> dict[str, Fold]:
    """A fold for each group of raters; none for 0 folds.

    Raises:
        DoNotRetry: there are fewer raters than folds, or a fold would have nothing to learn from or to be measured on.
    """
    raters = {each.ranking.rater_id for each in (*rankings, *test)}
    if len(raters) < folds:
        raise DoNotRetry(
            f"train_reward_model.rater_folds = {folds}, but the rankings are by {len(raters)} rater(s)",
            f"set rater_folds to {f'at most {len(raters)}' if len(raters) > 1 else '0'}, or bring rankings of more raters",
        )
    found = {}
    for number, left_out in enumerate(divide_raters(raters, folds, seed) if folds else [], 1):
        train = [each for each in rankings if each.ranking.rater_id not in left_out]
        known = {each.ranking.rater_id for each in train}
        held_out = [i for i, each in enumerate(test) if each.ranking.rater_id in left_out]
        own = [i for i, each in enumerate(test) if each.ranking.rater_id in known]
        if not all(any(any(test[i].ranking.pairs()) for i in places) for places in (held_out, own)):
            raise DoNotRetry(
                f"fold {number} of {folds} (raters {', '.join(left_out[:5])}) has no held-out preference of "
                "the raters left out, or none of the others",
                "lower train_reward_model.rater_folds, or raise ingest_rankings.test_fraction",
            )
        found[f"fold-{number}"] = Fold(left_out, train, held_out, own)
    return found


def study(
    plan: Plan, train_and_score: TrainAndScore, whole: Sequence[ScoredRanking], rankings: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The studies that were asked for, as plain JSON: `curve` and `rater_folds`.

    Args:
        whole: the test rankings with the scores of the model that learned all `rankings`.
        seed: of the bootstrap.
    """
    found = {}
    if plan.subsets:
        scored = {len(subset): train_and_score(name, subset) for name, subset in plan.subsets.items()}
        found["curve"] = learning_curve({**scored, rankings: whole}, seed)
    if plan.folds:
        found["rater_folds"] = across_raters([(fold, train_and_score(name, fold.train)) for name, fold in plan.folds.items()])
    return found


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


def across_raters(scored: Sequence[tuple[Fold, Sequence[ScoredRanking]]]) -> dict[str, Any]:
    """Accuracy on raters never seen against accuracy on raters that were learned from (Ouyang 2022, section 5.1: 69.6 +- 0.9 % and
    72.4 +- 0.4 %). Neither side's prompts were learned from.

    Keys:
        folds: {raters, rankings, held_out, own}, the rankings being those learned from, and the accuracies {value, pairs}.
        held_out, own, difference: {mean, standard_error} over folds; the difference is own - held_out within each fold.
        sentence: the three in words.
    """
    folds: list[dict[str, Any]] = []
    for fold, test in scored:
        places = {"held_out": fold.held_out, "own": fold.own}
        hits = {side: pair_hits([test[i] for i in each]).right_P for side, each in places.items()}
        measured = {side: {"value": float(each.mean()), "pairs": len(each)} for side, each in hits.items()}
        folds.append({"raters": fold.raters, "rankings": len(fold.train), **measured})
    values = {side: [each[side]["value"] for each in folds] for side in ("held_out", "own")}
    values["difference"] = [own - held_out for held_out, own in zip(values["held_out"], values["own"], strict=True)]
    over_folds = {name: {"mean": mean(each), "standard_error": stdev(each) / math.sqrt(len(each))} for name, each in values.items()}
    text = {name: f"{each['mean']:.3f} ± {each['standard_error']:.3f}" for name, each in over_folds.items()}
    return {
        "folds": folds,
        **over_folds,
        "sentence": f"Accuracy on raters never seen: {text['held_out']}; on raters it learned from: {text['own']}; difference "
        f"{text['difference']} (mean ± standard error over {len(folds)} folds).",
    }
