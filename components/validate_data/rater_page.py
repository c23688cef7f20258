"""The rater report: who ranked how much, with which leanings, and who agrees with whom; one file, no network. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from components.rlhf.plots import intervals, matrix
from components.rlhf.report_page import Cell, Section, Table, interval_text, render_page
from components.validate_data.facts import Facts
from components.validate_data.raters import Rater
from components.validate_data.suite import Check

RATERS_SHOWN = 200  # rows of the tables; validation.json has all
RATERS_DRAWN = 30  # of the plots: those with most rankings, and every name can still be read
_COLUMNS = ("agreement", "alpha", "human_ceiling", "self_contradiction_fraction", "cycle_fraction", "contradiction_fraction")
_OF_RATERS = ("largest_rater_fraction", "small_rater_fraction", "random_rater_fraction", "copying_fraction")
_BIASES = {"length_bias": "longer", "position_bias": "first_shown", "refusal_bias": "refusal"}
_NAMES = {"longer": "the longer wins", "first_shown": "the first shown wins", "refusal": "the refusal wins"}


def rater_report(facts: Facts, checks: Sequence[Check], snapshot_uri: str) -> str:
    """The page as HTML; names of raters are escaped."""
    raters = facts.pool.raters
    flagged = [rater for rater in raters if rater.flags]
    banners = [("note", f"{len(raters)} known raters; {len(flagged)} with a flag. Names are as the snapshot has them.")]
    if not raters:
        banners = [("note", "No ranking says who made it: of raters nothing is known.")]
    banners += [
        (check.verdict, f"{check.name}: {check.value}, expected {check.threshold}")
        for check in checks
        if check.verdict in ("warn", "fail") and check.column in (*_COLUMNS, *_OF_RATERS, *_BIASES)
    ]
    sections = [_measures(checks)]
    if raters:
        sections += [_flags(flagged), _table(raters), _leanings(raters, checks), _agreement(facts)]
    return render_page("Raters", f"Snapshot {snapshot_uri}. Intervals are at 95 %.", banners, sections)


def _measures(checks: Sequence[Check]) -> Section:
    rows: list[list[Cell]] = [
        [check.name, check.value, check.threshold, check.verdict]
        for check in checks
        if check.column in (*_COLUMNS, *_OF_RATERS, *_BIASES)
    ]
    return Section("The pool", [], [Table("", ["expectation", "observed", "threshold", "verdict"], rows)])


def _flags(flagged: Sequence[Rater]) -> Section:
    if not flagged:
        return Section("Flags", ["Nobody has one."])
    rows: list[list[Cell]] = [[rater.name, rater.rankings, "; ".join(rater.flags)] for rater in flagged[:RATERS_SHOWN]]
    text = (
        "A leaning, a rater at random level or two who copy are flagged on proof only: a pool of good raters gets any flag of "
        "one kind with a chance of 5 %. Two who agree more than with others may also share a taste that others lack."
    )
    return Section("Flags", [text], [Table("", ["rater", "rankings", "flags"], rows)])


def _table(raters: Sequence[Rater]) -> Section:
    rows: list[list[Cell]] = [
        [
            rater.name,
            rater.rankings,
            rater.fraction,
            *(
                interval_text(rater.shares[name]._asdict()) if math.isfinite(rater.shares[name].value) else None
                for name in ("agreement", "longer", "first_shown", "refusal", "self_contradiction", "cycle")
            ),
            rater.seconds,
        ]
        for rater in raters[:RATERS_SHOWN]
    ]
    columns = ["rater", "rankings", "share", "agrees with others", *_NAMES.values(), "contradicts itself", "cycles", "seconds each"]
    more = f" The {RATERS_SHOWN} with most rankings of {len(raters)}." if len(raters) > RATERS_SHOWN else ""
    text = (
        "Seconds each: median time from one ranking to the next, where times are known and no more than an hour apart. A dash: "
        f"nothing tells it.{more}"
    )
    return Section("Each rater", [text], [Table("", columns, rows)])


def _leanings(raters: Sequence[Rater], checks: Sequence[Check]) -> Section:
    names = {check.column: check.value for check in checks if check.verdict == "not known"}
    missing = [f"{_NAMES[kind]}: not known, {names[column]}." for column, kind in _BIASES.items() if column in names]
    drawn = raters[:RATERS_DRAWN]
    figures = [
        intervals(
            title.capitalize(), "share of its comparisons", [(r.name, r.shares[kind]._asdict()) for r in drawn], reference=0.5
        )
        for kind, title in _NAMES.items()
    ]
    agreement = [(rater.name, rater.shares["agreement"]._asdict()) for rater in drawn]
    figures.append(intervals("Agrees with others", "share of shared comparisons", agreement, reference=0.5))
    text = "One half, the dashed line, is a rater whom that does not move; of agreement it is what chance gives."
    return Section("Leanings", [text, *missing], (), figures)


def _agreement(facts: Facts) -> Section:
    pool = facts.pool
    shown = len(pool.compared[:RATERS_DRAWN])
    figure = matrix("Agreement of two raters", pool.compared[:shown], pool.agreement[:shown, :shown].tolist())
    rows: list[list[Cell]] = [
        [one, other, interval_text(own._asdict()), predicted] for one, other, own, predicted in pool.copying_pairs[:RATERS_SHOWN]
    ]
    tables = [Table("Far more agreement than predicted", ["rater", "and", "agreement", "predicted"], rows)] if rows else []
    text = (
        "The share of comparisons, of those that both decided, on which two raters say the same. Empty: none in common."
        if figure
        else "No two raters have a comparison in common."
    )
    return Section("Who agrees with whom", [text], tables, [figure or Markup("")])
