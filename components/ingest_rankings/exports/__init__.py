"""Exports of labelling tools and public datasets. Each turns one of its rows into rows of the native forms (`formats`).

A new one is a module here with an `EXPORT`, and its line in `EXPORTS`. What it gives is checked as every other row is: an export
only says where things are. One row may hold the judgements of several raters, and each becomes a ranking of its own.
"""

from __future__ import annotations

from components.ingest_rankings.exports import argilla, label_studio, ratings, scale_ai, summeval, surge_ai, ultrafeedback, webgpt
from components.ingest_rankings.exports.export import Export

EXPORTS: dict[str, Export] = {
    "label_studio": label_studio.EXPORT,
    "scale_ai": scale_ai.EXPORT,
    "surge_ai": surge_ai.EXPORT,
    "argilla": argilla.EXPORT,
    "ultrafeedback": ultrafeedback.EXPORT,
    "webgpt": webgpt.EXPORT,
    "ratings": ratings.EXPORT,
    "summeval": summeval.EXPORT,
}
