"""SummEval: summaries of an article by several systems, each rated by experts and by crowd workers (Fabbri 2021, arXiv:2007.12626).

    {"id": "dm-test-…", "model_id": "M11", "decoded": "…", "text": "…",
     "expert_annotations": [{"coherence": 2, "consistency": 1, "fluency": 4, "relevance": 2}, …], "turker_annotations": […]}

A row is one summary, so the rows of an article have to be brought together first: `group: id`. The prompt is the article, in
`text`, where the authors' script for pairing the articles puts it. The raters have no names but their place in the lists:
`expert-1` and so on. Whether a place is the same person in all rows the data do not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.ingest_rankings.exports import ratings
from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import Rejected, shown

RATERS = {"expert": "expert_annotations", "turker": "turker_annotations"}


def _is_summary(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and "decoded" in row
        and isinstance(row.get("expert_annotations"), list)
        and isinstance(row.get("turker_annotations") or [], list)
    )


def _recognises(row: dict[str, Any]) -> bool:
    rows = row.get("rows")
    return _is_summary(row) or (isinstance(rows, list) and bool(rows) and all(map(_is_summary, rows)))


def _rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
    if not isinstance(row.get("rows"), list):
        raise Rejected("one summary of an article alone", f"article {shown(row.get('id'))}; set the option group to id")
    completions = []
    for summary in row["rows"]:
        given = []
        for kind, field in RATERS.items():
            for place, rating in enumerate(summary.get(field) or [], 1):
                if not isinstance(rating, dict):
                    raise Rejected("a rating is not an object", f"article {shown(summary.get('id'))}, {field}: {shown(rating)}")
                given.append({**rating, "rater_id": f"{kind}-{place}"})
        completions.append({"text": summary["decoded"], "policy": summary.get("model_id"), "ratings": given})
    yield from ratings.EXPORT.rankings({"prompt": row["rows"][0].get("text"), "completions": completions})


EXPORT = Export(fields=None, recognises=_recognises, rankings=_rankings)
