"""The part of the evaluation's page about judges other than the held-out reward model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.evaluate.judges.pairs import win_rate_name
from components.rlhf.plots import intervals
from components.rlhf.report_page import Cell, Section, Table, interval_text

NAMES = {"sft": "SFT", "champion": "champion"}
SAID = {"reward_model": "held-out reward model", "endpoint": "endpoint", "humans": "people"}


def judge_sections(evaluation: Mapping[str, Any]) -> list[Section]:
    """None where the held-out reward model is the only judge."""
    config, measures, facts = evaluation["config"], evaluation["measures"], evaluation["judges"]
    if not facts:
        return []
    rows: list[list[Cell]] = []
    plotted = []
    for over, other in NAMES.items():
        for judge in config["judges"]:
            name = win_rate_name(over, judge, config["gate_judge"])
            if name in measures:
                raw, controlled = measures[name], measures[f"{name}_length_controlled"]
                counts = facts.get(judge, {}).get("over", {}).get(over, {})
                row: list[Cell] = [other, SAID[judge], judge == config["gate_judge"], interval_text(raw), interval_text(controlled)]
                rows.append([*row, counts.get("judged"), counts.get("silent"), raw.get("missing", "")])
                plotted += [(f"{other}, {SAID[judge]}", raw), (f"{other}, {SAID[judge]}, equal length", controlled)]
    columns = ["over", "by", "read by the gate", "win rate", "at equal length", "judged", "no verdict", "missing because"]
    behind: list[list[Cell]] = [
        [SAID[judge], name.replace("_", " "), value]
        for judge, each in facts.items()
        for name, value in each.items()
        if name != "over"
    ]
    behind += [
        [said, name, interval_text(measures[measure])]
        for said, name, measure in (
            ("endpoint", "share of pairs whose verdict changed with the order", "order_changes_verdict_endpoint"),
            ("endpoint", "share of verdicts for the answer shown first", "first_shown_preferred_endpoint"),
            ("people", "agreement of two raters on a pair, ties left out", "rater_agreement_humans"),
            ("people", "Krippendorff's alpha", "rater_alpha_humans"),
        )
        if measure in measures
    ]
    return [
        Section(
            "Judges",
            [
                "Every judge's win rate of the candidate. The endpoint sees each pair in both orders, and a verdict that changes "
                "with the order is a tie. Pairs without a verdict count as lost at the interval's low end and as won at its high "
                "end."
            ],
            [Table("", columns, rows), Table("How they came to it", ["judge", "what", "value"], behind)],
            [intervals("Win rates by judge", "share of prompts won", plotted, reference=0.5)],
        )
    ]
