"""Surge AI's tasks as JSON: a task's own fields, and the responses of its workers. A column map, for projects name their columns.

    {"id": "…", "project_id": "…", "fields": {"prompt": "…", "response_a": "…", "response_b": "…"},
     "responses": [{"id": "…", "worker_id": "…", "completed_at": "…", "data": {"preference": "A"}}]}

This map fits a project with the fields `prompt`, `response_a` and `response_b` and a question whose label is `preference`, with the
options A, B and Tie. For other names or questions copy `COLUMNS` into the profile's `ingest_rankings.columns` and change it.

https://github.com/surge-ai/surge-python (tasks, responses)
"""

from __future__ import annotations

from components.ingest_rankings.exports.columns import column_map

COLUMNS = {
    "each": "responses",
    "prompt": "fields.prompt",
    "completions": "[fields.response_a, fields.response_b]",
    "ranks": """(each.data.preference == 'A' && [`1`, `2`]) || (each.data.preference == 'B' && [`2`, `1`])
        || (each.data.preference == 'Tie' && [`1`, `1`]) || `null`""",
    "rater_id": "each.worker_id",
    "collected_at": "each.completed_at",
    "ranking_id": "each.id",
}

EXPORT = column_map(COLUMNS)._replace(
    recognises=lambda row: isinstance(row.get("responses"), list) and isinstance(row.get("fields"), dict) and "project_id" in row
)
