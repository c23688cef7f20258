"""Six rankings by three raters, encoded, and scores that are given to them by hand."""

from __future__ import annotations

from collections.abc import Sequence

from components.rlhf.accuracy_report import ScoredRanking
from components.rlhf.rankings import EncodedRanking
from components.rlhf.records import Message, Ranking


def ranking(number: int, rater: str, ranks: list[int] | None = None) -> EncodedRanking:
    prompt = [Message(role="user", content=f"p{number}")]
    ranks = ranks or [1, 2]
    record = Ranking(f"r{number}", prompt, ["a"] * len(ranks), ranks, rater, "desk", None, None, None, None, "test")
    return EncodedRanking(record, [[3]] * len(ranks), [[4, 1]] * len(ranks))


def scored(rankings: Sequence[EncodedRanking], margins: Sequence[float]) -> list[ScoredRanking]:
    """Pairs whose better one leads by these margins."""
    return [ScoredRanking(each.ranking, [margin, 0.0], [2, 2]) for each, margin in zip(rankings, margins, strict=True)]


SIX = [ranking(i, rater) for i, rater in enumerate(("ann", "bob", "cem", "ann", "bob", "cem"))]
