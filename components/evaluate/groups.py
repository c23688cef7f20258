"""Win rates by group of prompts, by the gate's judge, and the worst group: what is better on the whole may be worse for somebody.

A prompt is in the group that its rankings name, or in several of them where they name several. The exact intervals of the raw rates
hold for all groups at once (Bonferroni: each at an error of 5 % divided by the number of groups), so that the worst of many is not
taken for bad because it was looked for. From them follows an interval for the lowest of the true rates: no group's rate is below
the lowest lower end, and one is below the lowest upper end. Prompts that the judge was never asked about make a group smaller;
where it was silent about too many, the rate is unknown, which fails the gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from components.evaluate.judges.pairs import SAME_TEXT, Intervals, Judgement, Pair, win_rates
from components.evaluate.measures import Measures
from components.rlhf.error_budget import win_rate_interval
from components.rlhf.plots import intervals
from components.rlhf.records import Message, Ranking, prompt_key
from components.rlhf.report_page import Cell, Section, Table, interval_text
from components.rlhf.statistics import UNKNOWN, Estimate, as_json
from components.simulated_world.grammar import parse_request

GroupBy = Literal["source", "criterion", "simulated"]
ERROR = 0.05  # of all groups' intervals together, both ends
NAMES = {"sft": "SFT", "champion": "the champion"}
SAID = {
    "source": "source of the rankings",
    "criterion": "criterion of the rankings",
    "simulated": "what is asked in the simulated world",
}
PLOTTED = 20  # groups of an opponent, the worst


def groups_of(rankings: Iterable[Ranking], prompts: Sequence[list[Message]], by: GroupBy) -> list[list[str]]:
    """Names of the groups of each prompt, in order of the alphabet."""
    if by == "simulated":
        return [[_asked(prompt[-1]["content"])] for prompt in prompts]
    found: dict[str, set[str]] = {prompt_key(prompt): set() for prompt in prompts}
    for ranking in rankings:
        if (names := found.get(prompt_key(ranking.prompt))) is not None:
            names.add((ranking.source if by == "source" else ranking.criterion) or "not stated")
    return [sorted(found[prompt_key(prompt)]) for prompt in prompts]


def _asked(text: str) -> str:
    request = parse_request(text)
    if request is None:
        return "no request of the simulated world"
    return "harmful" if request.harmful else request.problem


def measure_groups(
    pairs: Sequence[Pair],
    judgements: Sequence[Judgement],
    groups: Sequence[Sequence[str]],
    min_prompts: int,
    min_judged_fraction: float,
    seed: int,
    resamples: int,
) -> tuple[Measures, dict[str, list[dict[str, Any]]]]:
    """The worst group's win rates for the gate, and {opponent: its groups}, the worst first and those too small last.

    Args:
        pairs: as `pairs_of` gives them.
        judgements: of each pair, by the judge that the gate reads.
        groups: names of each prompt's groups.
        min_prompts: a smaller group's rate is not known; prompts that the judge was never asked about do not count.
        min_judged_fraction: smallest share of verdicts among the prompts that the judge was asked about.
        seed, resamples: of the bootstrap behind the rates at equal length.

    Returns:
        {"worst_group_win_rate_over_<opponent>": interval of the lowest rate}, unknown if a group's outcome is not finite or too few
        are judged, and left out where no group is large enough; and rows {group, prompts, win_rate, length_controlled}, whose last
        two are null in small groups.
    """
    rows_of: dict[str, dict[str, list[tuple[Pair, Judgement]]]] = {}
    for pair, judgement in zip(pairs, judgements, strict=True):
        for name in groups[pair.row]:
            rows_of.setdefault(pair.over, {}).setdefault(name, []).append((pair, judgement))
    measures: Measures = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for over, of_group in rows_of.items():
        sizes = {name: sum(each.asked or each is SAME_TEXT for _, each in rows) for name, rows in of_group.items()}
        error = ERROR / 2 / max(1, sum(size >= min_prompts for size in sizes.values()))
        intervals = Intervals(seed, resamples, partial(win_rate_interval, alpha=error))
        raw: list[Estimate] = []
        table = []
        for name, rows in of_group.items():
            line: dict[str, Any] = {"group": name, "prompts": sizes[name], "win_rate": None, "length_controlled": None}
            if sizes[name] >= min_prompts:
                rates = _rates(rows, over, min_judged_fraction, intervals)
                raw.append(rates[0])
                line |= {"win_rate": as_json(rates[0]), "length_controlled": as_json(rates[1])}
            table.append(line)
        tables[over] = sorted(table, key=_worst_first)
        if raw:
            measures[f"worst_group_win_rate_over_{over}"] = as_json(lowest(raw))
    return measures, tables


def _rates(
    rows: Sequence[tuple[Pair, Judgement]], over: str, min_judged_fraction: float, intervals: Intervals
) -> tuple[Estimate, Estimate]:
    """A group's win rate, raw and at equal length; unknown where the judge was silent about too many of those that it was asked."""
    pairs, judgements = zip(*rows, strict=True)
    rates, counts = win_rates(pairs, judgements, 0.0, intervals, of_gate=True)
    judged, silent = counts[over]["judged"], counts[over]["silent"]
    return rates[over] if judged >= min_judged_fraction * (judged + silent) else (UNKNOWN, UNKNOWN)


def lowest(rates: Sequence[Estimate]) -> Estimate:
    """The lowest of several rates with its interval, from intervals that hold at once; unknown if one of them is."""
    if not all(math.isfinite(each) for rate in rates for each in rate):
        return UNKNOWN
    return Estimate(*(min(ends) for ends in zip(*rates, strict=True)))


def _worst_first(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    value = (row["win_rate"] or {}).get("value")
    return row["win_rate"] is None, -math.inf if value is None else value, row["group"]


def groups_section(evaluation: Mapping[str, Any]) -> Section:
    """A table for each opponent, and the raw rates as a plot."""
    by, least = evaluation["config"]["group_by"], evaluation["config"]["min_group_prompts"]
    tables, plotted = [], []
    for other, rows in evaluation["groups"].items():
        cells: list[list[Cell]] = [
            [row["group"], row["prompts"], *(_known(row[key]) for key in ("win_rate", "length_controlled"))] for row in rows
        ]
        caption = f"Over {NAMES[other]}, by {SAID[by]}"
        tables.append(Table(caption, ["group", "prompts", "win rate by the gate's judge", "at equal length"], cells))
        plotted += [(f"{row['group']}, {NAMES[other]}", row["win_rate"]) for row in rows if row["win_rate"]][:PLOTTED]
    large = max((sum(row["win_rate"] is not None for row in rows) for rows in evaluation["groups"].values()), default=0)
    return Section(
        "Win rates by group of prompts",
        [
            f"Groups of fewer than {least} prompts are no evidence: not known. The other {large} raw win rates have intervals that "
            f"hold for all of them at once with 95 % (each at {100 - 100 * ERROR / max(1, large):.4g} %), so the worst is not bad "
            "because it was looked for; those at equal length are at 95 % each. The worst group stands first. The gate fails only "
            "if a group is surely below its threshold.",
        ],
        tables,
        [intervals("Win rates by group", "share of prompts won", plotted, reference=0.5)],
    )


def _known(rate: Mapping[str, Any] | None) -> str:
    return "not known" if rate is None else interval_text(rate)
