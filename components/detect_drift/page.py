"""What a watch measured, as numbers for drift.json, and its page. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.detect_drift.channels import CHANNELS, Watch
from components.rlhf.plots import intervals, lines
from components.rlhf.report_page import Cell, Samples, Section, Table, interval_text, render_page
from components.rlhf.statistics import Estimate, as_json, cluster_share, expected_calibration_error, finite, mean, reliability

RESAMPLES = 400
MEANINGS = {
    "prompts: novelty": "prompts unlike any reference prompt",
    "prompts: classifier": "new prompts can be told from old ones",
    "completions: novelty": "completions unlike any reference completion",
    "completions: classifier": "new completions can be told from old ones",
    "preferences: loss": "the reward model predicts new rankings worse",
    "raters: mix": "raters whom the reference hardly knows",
    "raters: agreement": "second opinions turn the first one round more often",
}


def measures_of(watch: Watch) -> list[dict[str, Any]]:
    """One row a test: evidence in nats, its limit, effect size with interval, and the units that added most."""
    rows = []
    for name, test in watch.tests.items():
        rows.append(
            {
                "test": name,
                "meaning": MEANINGS[name],
                "alarm": test.alarmed,
                "log_evidence": test.log_evidence,
                "highest": test.highest,
                "limit": test.limit,
                "reference_units": test.reference,
                "bets": test.evidence.bets,
                "effect": as_json(Estimate(*test.effect())),
                "examples": watch.examples.get(name, []),
                **(preferences_of(watch.margins) if name == "preferences: loss" else {}),
            }
        )
    return rows


def preferences_of(margins: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """How right and how calibrated the reward model is on pairs of reference and of new rankings; a ranking is a cluster."""
    found: dict[str, Any] = {}
    for side, each in margins.items():
        flat = np.array([margin for one in each for margin in one])
        hits = [sum(margin > 0 for margin in one) for one in each]
        losses = [float(np.logaddexp(0, -np.array(one)).mean()) for one in each]
        confidence = 1 / (1 + np.exp(-np.minimum(np.abs(flat), 700)))
        found[side] = {
            "rankings": len(each),
            "accuracy": as_json(cluster_share(hits, [len(one) for one in each], 0, RESAMPLES)),
            "loss": as_json(mean(losses, 0, RESAMPLES)),
            "calibration_error": finite(expected_calibration_error(reliability(confidence, flat > 0))),
        }
    return {"preferences": found}


def drift_page(document: Mapping[str, Any]) -> str:
    """One HTML page from the content of drift.json."""
    kind = "fail" if document["alarm"] else "pass"
    champion = document["champion"]
    subject = f"Champion: version {champion['version']}, snapshot {champion['snapshot_uri']}. " if champion else ""
    sections = [_summary(document), *(_channel(name, document) for name in CHANNELS), _looks(document)] if champion else []
    return render_page(
        "Drift watch",
        f"{subject}New rankings: {document['snapshot_uri']}",
        [(kind, f"Decision: {document['decision']}. {document['reason']}")],
        sections,
        _examples(document),
    )


def _summary(document: Mapping[str, Any]) -> Section:
    alpha = document["config"]["alpha"]
    columns = ["test", "asks whether there are", "evidence, nats", "highest", "limit", "alarm", "new units", "reference", "effect"]
    rows: list[list[Cell]] = [
        [
            row["test"],
            row["meaning"],
            row["log_evidence"],
            row["highest"],
            row["limit"],
            row["alarm"],
            row["bets"],
            row["reference_units"],
            interval_text(row["effect"]),
        ]
        for row in document["tests"]
    ]
    missing: list[list[Cell]] = [[name, why] for name, why in document["missing"].items()]
    plotted = [(row["test"], row["effect"]) for row in document["tests"]]
    return Section(
        "All tests",
        [
            f"Evidence is the logarithm of a betting game's wealth that began with 1. If nothing changes, the probability that any "
            f"of these tests ever reaches its limit is at most {alpha:g} in all, however often they are looked at.",
            "Effect: the probability that a new unit scores higher than a reference unit, with a 95 % interval; 0.5 is no effect. "
            "Evidence says whether there is a drift, the effect how large it is.",
        ],
        [Table("", columns, rows), *([Table("Not watched", ["test", "why"], missing)] if missing else [])],
        [intervals("Effect of each test", "probability that a new unit scores higher", plotted, reference=0.5)],
    )


def _channel(channel: str, document: Mapping[str, Any]) -> Section:
    rows = [row for row in document["tests"] if row["test"].startswith(channel + ":")]
    looks = document["looks"]
    x = [0, *(look["rankings"] for look in looks)]
    curves = {row["test"]: (x, [0.0, *(_evidence(look, row["test"]) for look in looks)]) for row in rows}
    if curves:
        curves["limit"] = ([0, x[-1]], [rows[0]["limit"]] * 2)
    tables = []
    paragraphs = [] if rows else ["Not watched."]
    for row in rows:
        if sides := row.get("preferences"):
            cells: list[list[Cell]] = [
                [side, each["rankings"], interval_text(each["accuracy"]), interval_text(each["loss"]), each["calibration_error"]]
                for side, each in sides.items()
            ]
            tables.append(
                Table("The champion's reward model", ["", "rankings", "accuracy", "loss, nats", "calibration error"], cells)
            )
            paragraphs.append(
                "Reference: rankings of the test split, from which the reward model did not learn. A ranking is a cluster."
            )
    return Section(
        channel.capitalize(),
        paragraphs,
        tables,
        [lines(f"Evidence: {channel}", "new rankings since the champion", "log evidence, nats", curves)] if curves else (),
    )


def _evidence(look: Mapping[str, Any], test: str) -> float:
    return float(look["evidence"].get(test, {}).get("log_evidence", math.nan))


def _looks(document: Mapping[str, Any]) -> Section:
    rows: list[list[Cell]] = [[look["at"], look["new"], look["rankings"], look["snapshot_uri"]] for look in document["looks"]]
    settings: list[list[Cell]] = [[key, str(value)] for key, value in document["config"].items()]
    return Section(
        "Looks",
        [],
        [Table("", ["at", "new", "in all", "snapshot"], rows), Table("Configuration", ["key", "value"], settings)],
    )


def _examples(document: Mapping[str, Any]) -> Samples | None:
    rows: list[list[Cell]] = [
        [row["test"], each["gain"], each["p"], each["prompt"], each["ranked_first"], each["rater"], each["collected_at"]]
        for row in document["tests"]
        for each in row["examples"]
    ]
    if not rows:
        return None
    return Samples(
        "Examples that add most to the evidence",
        ["Gain: what a unit added to log evidence, in nats. Where there is no alarm, these are the strangest of ordinary units."],
        ["test", "gain", "p", "prompt", "ranked first", "rater", "collected at"],
        rows,
        "test",
    )
