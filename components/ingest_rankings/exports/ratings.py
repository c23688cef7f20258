"""Scores that each of several raters gave each completion: a ranking for every rater and criterion.

    {"prompt": "…", "completions": [
        {"text": "…", "policy": "M11", "ratings": [{"rater_id": "w3", "coherence": 4, "fluency": 5}, {"rater_id": "w7", …}]}, …]}

As in SummEval (Fabbri 2021, arXiv:2007.12626), where each system's summary of an article is rated by several people. What else than
`rater_id` and `collected_at` stands in a rating is a criterion. A rater is asked of the completions that they rated; of fewer than
two there is no ranking.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import Rejected, shown

ABOUT = ("rater_id", "collected_at")


def _recognises(row: dict[str, Any]) -> bool:
    completions = row.get("completions")
    return (
        isinstance(completions, list)
        and bool(completions)
        and all(isinstance(each, dict) and isinstance(each.get("ratings"), list) for each in completions)
    )


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    completions = row["completions"]
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for place, completion in enumerate(completions):
        for rating in completion["ratings"]:
            if not isinstance(rating, dict) or rating.get("rater_id") is None:
                raise Rejected("a rating without its rater", f"completion {place + 1}: {shown(rating)}")
            for criterion in rating.keys() - ABOUT:
                places = found.setdefault((str(rating["rater_id"]), criterion), {})
                if place in places:
                    raise Rejected(
                        "a completion is rated twice by one rater",
                        f"completion {place + 1}, rater {rating['rater_id']}, {criterion}",
                    )
                places[place] = rating
    if not found:
        raise Rejected("no ratings", f"{len(completions)} completions")
    for (rater, criterion), places in sorted(found.items()):
        asked = [completions[place] for place in places]
        policies = [each.get("policy") for each in asked]
        times = [rating["collected_at"] for rating in places.values() if rating.get("collected_at") is not None]
        yield {
            **{name: row.get(name) for name in ("prompt", "source", "split")},
            "completions": [each.get("text") for each in asked],
            "scores": [rating[criterion] for rating in places.values()],
            "policies": policies if all(policies) else None,
            "rater_id": rater,
            "criterion": criterion,
            "collected_at": max(times, key=str) if times else row.get("collected_at"),
        }


EXPORT = Export(
    fields=frozenset({"prompt", "completions", "source", "split", "collected_at"}), recognises=_recognises, rankings=_rankings
)
