"""WebGPT's comparisons: two answers to a question, and one rater's score of each (Nakano 2021, arXiv:2112.09332).

{"question": {"full_text": "…", "dataset": "eli5", "id": "…"}, "answer_0": "…", "answer_1": "…", "score_0": 0.5, "score_1": -0.5}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import Rejected

FIELDS = ("question", "answer_0", "answer_1", "score_0", "score_1")


def _recognises(row: dict[str, Any]) -> bool:
    return all(row.get(field) is not None for field in FIELDS)


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    question = row["question"]
    yield {
        "prompt": question.get("full_text") if isinstance(question, dict) else question,
        "completions": [row["answer_0"], row["answer_1"]],
        "scores": [row["score_0"], row["score_1"]],
        "source": question.get("dataset") if isinstance(question, dict) else None,
        "rater_id": row.get("rater_id"),
    }


EXPORT = Export(
    fields=frozenset({*FIELDS, "rater_id", "quotes_0", "quotes_1", "tokens_0", "tokens_1", "metadata"}),
    recognises=_recognises,
    rankings=_rankings,
)
