"""The page of a rater study, from its report. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.rlhf.plots import intervals
from components.rlhf.report_page import Cell, Section, Table, interval_text, render_page

RATERS_SHOWN = 12  # names of a fold; the JSON beside the page has all


def study_page(report: Mapping[str, Any], reward_model_uri: str) -> str:
    """The page as HTML; names of raters are escaped."""
    measured = [("raters never seen", "never_seen"), ("as many rankings of all raters", "usual")]
    rows: list[list[Cell]] = [[name, interval_text(report[key]), report[key]["pairs"]] for name, key in measured]
    rows.append(["difference", interval_text(report["difference"]), report["difference"]["pairs"]])
    figure = intervals("Accuracy", "pair accuracy", [(name, report[key]) for name, key in measured], reference=0.5)
    text = (
        "For each fold of raters one model learned from all others' rankings, and one from as many of all raters'. Both are "
        "measured on held-out preferences of the fold's raters. Intervals are at 95 %, over prompts; how much two trainings differ "
        "by their order is not in them."
    )
    return render_page(
        "Raters never seen",
        f"Trained as {reward_model_uri}",
        [("note", report["sentences"][0])],
        [
            Section(
                "In short", [text, report["sentences"][1]], [Table("", ["models of", "pair accuracy", "pairs"], rows)], [figure]
            ),
            Section("Folds", [], [_folds(report)]),
        ],
    )


def _folds(report: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for fold in report["folds"]:
        raters, shown = fold["raters"], fold["raters"][:RATERS_SHOWN]
        more = f" and {len(raters) - len(shown)} more" if len(raters) > len(shown) else ""
        sides = (fold[side][key] for side in ("held_out", "usual", "own") for key in ("value", "pairs"))
        rows.append([", ".join(shown) + more, fold["rankings"], *sides])
    columns = [
        "raters left out",
        "rankings learned",
        "on them",
        "pairs",
        "usual model on them",
        "pairs",
        "on its own raters",
        "pairs",
    ]
    return Table("", columns, rows)
