"""UltraFeedback: completions of several models, each with a rating per criterion (Cui 2023, arXiv:2310.01377).

    {"instruction": "…", "source": "evol_instruct", "completions": [{"model": "…", "response": "…", "overall_score": 7.5,
        "annotations": {"helpfulness": {"Rating": "4", "Rationale": "…"}, "honesty": {"Rating": "5"}, …}}, …]}

Each criterion that has a rating of at least one completion becomes a ranking, with the criterion's name; `overall_score` becomes
the one of criterion "overall". A rating of "N/A" says nothing: that criterion's ranking is rejected with it. The ratings are those
of one model, GPT-4, which is named as the rater.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import Rejected, shown

RATER = "gpt-4"
OVERALL = "overall"


def _recognises(row: dict[str, Any]) -> bool:
    completions = row.get("completions")
    return (
        "instruction" in row
        and isinstance(completions, list)
        and bool(completions)
        and all(isinstance(each, dict) and "response" in each for each in completions)
    )


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    completions = row["completions"]
    rated = [each.get("annotations") or {} for each in completions]
    if not all(isinstance(each, dict) for each in rated):
        raise Rejected("annotations are not an object", shown(rated))
    columns: dict[str, list[Any]] = {
        criterion: [each.get(criterion) for each in rated] for criterion in sorted({name for each in rated for name in each})
    }
    if any(each.get("overall_score") is not None for each in completions):
        columns[OVERALL] = [each.get("overall_score") for each in completions]
    if not columns:
        raise Rejected("no ratings", f"{len(completions)} completions without annotations and overall_score")
    for criterion, ratings in columns.items():
        try:
            scores = [_score(criterion, rating) for rating in ratings]
        except Rejected as problem:
            yield problem
            continue
        yield {
            "prompt": row["instruction"],
            "completions": [each["response"] for each in completions],
            "scores": scores,
            "policies": [each.get("model") for each in completions] if all(each.get("model") for each in completions) else None,
            "rater_id": RATER,
            "source": row.get("source"),
            "criterion": criterion,
        }


def _score(criterion: str, rating: Any) -> float:
    value: Any = rating.get("Rating") if isinstance(rating, dict) else rating
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise Rejected("a rating is not a number", f"{criterion}: {shown(value)}") from error


EXPORT = Export(
    fields=frozenset({"instruction", "source", "completions", "models", "correct_answers", "incorrect_answers"}),
    recognises=_recognises,
    rankings=_rankings,
)
