"""Folds of raters, and what models that never saw them get right. Pure."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from components.rlhf.accuracy_report import ScoredRanking, mean_over_pairs, pair_hits
from components.rlhf.rankings import EncodedRanking
from components.rlhf.statistics import as_json
from components.services.exits import DoNotRetry


class Fold(NamedTuple):
    """Raters that a model does not see.

    Fields:
        raters: who is left out.
        train: the rankings of everybody else.
        usual: as many rankings, drawn from those of all raters: the training that this one is compared with.
        held_out, own: places of test rankings: by the raters left out, and by those whom the model learned from.
    """

    raters: list[str]
    train: list[EncodedRanking]
    usual: list[EncodedRanking]
    held_out: list[int]
    own: list[int]


class Scored(NamedTuple):
    """All test rankings, by the model that learned a fold's `train`, and by the one that learned its `usual`."""

    without: Sequence[ScoredRanking]
    usual: Sequence[ScoredRanking]


def divide_raters(raters: Iterable[str], folds: int, seed: int) -> list[list[str]]:
    """Every rater in one fold: sorted by a seeded hash they are dealt out in turn, so that folds differ by one rater at most."""
    ordered = sorted(set(raters), key=lambda rater: hashlib.sha256(f"{seed}:{rater}".encode("utf-8", "surrogatepass")).digest())
    return [sorted(ordered[first::folds]) for first in range(folds)]


def plan_folds(rankings: Sequence[EncodedRanking], test: Sequence[EncodedRanking], folds: int, seed: int) -> list[Fold]:
    """A fold for each group of raters.

    Raises:
        DoNotRetry: there are fewer raters than folds, or a fold would have nothing to learn from or to be measured on.
    """
    raters = {each.ranking.rater_id for each in (*rankings, *test)}
    if len(raters) < folds:
        raise DoNotRetry(
            f"rater_study.folds = {folds}, but the rankings are by {len(raters)} known rater(s)",
            f"set folds to {f'at most {len(raters)}' if len(raters) > 1 else '0'}, or bring rankings of more raters",
        )
    found = []
    for number, left_out in enumerate(divide_raters(raters, folds, seed), 1):
        train = [each for each in rankings if each.ranking.rater_id not in left_out]
        usual = random.Random(f"{seed}-{number}").sample(list(rankings), len(train))
        known = {each.ranking.rater_id for each in train}
        held_out = [i for i, each in enumerate(test) if each.ranking.rater_id in left_out]
        own = [i for i, each in enumerate(test) if each.ranking.rater_id in known]
        if not all(any(any(test[i].ranking.pairs()) for i in places) for places in (held_out, own)):
            raise DoNotRetry(
                f"fold {number} of {folds} (raters {', '.join(left_out[:5])}) has no held-out preference of "
                "the raters left out, or none of the others",
                "lower rater_study.folds, or raise ingest_rankings.test_fraction",
            )
        found.append(Fold(left_out, train, usual, held_out, own))
    return found


def across_raters(scored: Sequence[tuple[Fold, Scored]], seed: int, resamples: int = 2000) -> dict[str, Any]:
    """Accuracy on raters never seen, against two others. Neither's prompts were learned from.

    Keys:
        folds: {raters, rankings, held_out, own, usual}, the rankings being those learned from, and the accuracies {value, pairs}:
            of the fold's model on the raters left out and on those whom it learned from, and of the usual model on those left out.
        never_seen, usual, difference: {value, low, high, pairs} on the same preferences, those of all folds' left-out raters: of
            models that never saw the rater, of models that learned as many rankings of all raters, and the second less the first;
            intervals are the bootstrap's over prompts.
        over_folds: {held_out, own, difference}: {mean, standard_error} over folds, the difference being own - held_out within each
            fold; what Ouyang 2022, section 5.1, reports as 69.6 +- 0.9 % and 72.4 +- 0.4 %.
        sentences: both comparisons in words.
    """
    folds = [_fold_report(*each) for each in scored]
    places = sorted((i, number) for number, (fold, _) in enumerate(scored) for i in fold.held_out)
    never, usual = (pair_hits([getattr(scored[number][1], side)[i] for i, number in places]) for side in ("without", "usual"))
    estimates = {
        "never_seen": mean_over_pairs(*never, seed, resamples),
        "usual": mean_over_pairs(*usual, seed, resamples),
        "difference": mean_over_pairs(usual.right_P - never.right_P, never.prompt_P, seed, resamples, share=False),
    }
    values = {side: [each[side]["value"] for each in folds] for side in ("held_out", "own")}
    values["difference"] = [own - held_out for held_out, own in zip(values["held_out"], values["own"], strict=True)]
    over_folds = {name: {"mean": mean(each), "standard_error": stdev(each) / math.sqrt(len(each))} for name, each in values.items()}
    text = {name: f"{each['mean']:.3f} ± {each['standard_error']:.3f}" for name, each in over_folds.items()}
    gain = estimates["difference"]
    reading = (
        "knowing the raters helps" if gain.low > 0 else "knowing them makes it worse" if gain.high < 0 else "too little to tell"
    )
    return {
        "folds": folds,
        **{name: {**as_json(each), "pairs": len(never.right_P)} for name, each in estimates.items()},
        "over_folds": over_folds,
        "sentences": [
            f"On raters never seen the accuracy is {estimates['never_seen'].value:.3f}; models that learned as many rankings, of "
            f"these raters too, reach {estimates['usual'].value:.3f} on the same preferences: a difference of {gain.value:+.3f} "
            f"({gain.low:+.3f} to {gain.high:+.3f}), {reading}.",
            f"Within the folds: {text['held_out']} on raters never seen, {text['own']} on raters learned from, difference "
            f"{text['difference']} (mean ± standard error over {len(folds)} folds).",
        ],
    }


def _fold_report(fold: Fold, scored: Scored) -> dict[str, Any]:
    def accuracy(rankings: Sequence[ScoredRanking], places: Sequence[int]) -> Mapping[str, float]:
        right_P = pair_hits([rankings[i] for i in places]).right_P
        return {"value": float(right_P.mean()), "pairs": len(right_P)}

    return {
        "raters": fold.raters,
        "rankings": len(fold.train),
        "held_out": accuracy(scored.without, fold.held_out),
        "own": accuracy(scored.without, fold.own),
        "usual": accuracy(scored.usual, fold.held_out),
    }
