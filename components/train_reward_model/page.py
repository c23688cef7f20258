"""The page of a trained reward model, from the reports of `accuracy.json` and the record of its training. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from components.rlhf.plots import intervals, reliability_plot, scaling_curve
from components.rlhf.report_page import (
    SIMULATED,
    SIMULATED_BANNER,
    Cell,
    Section,
    Table,
    interval_text,
    learning_curves,
    render_page,
)

GROUPS_SHOWN = 40  # rows of one table of groups; the JSON beside the page has all


def reward_model_page(
    report: Mapping[str, Any],
    judge_report: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """The page of a trained reward model and its judge.

    Args:
        report: of `accuracy_report`, for the reward model that PPO optimises.
        judge_report: the same for the judge, which was trained on other rankings.
        history: records of training, in order; every numeric key becomes a curve over `step` (or over `update`).
    """
    human = report["human"]
    banners = [("fail" if human["above_ceiling"] else "note", human["sentence"])]
    if any(group["group"] == SIMULATED for group in report["by"]["source"]):
        banners.insert(0, SIMULATED_BANNER)
    return render_page(
        "Reward model",
        f"Pair accuracy on {report['overall']['pairs']} held-out pairs of {report['prompts']} prompts. Intervals are at 95 %.",
        banners,
        [
            _summary(report, judge_report),
            *([_ensemble(report["ensemble"])] if "ensemble" in report else []),
            *([_curve(report["curve"])] if "curve" in report else []),
            _calibration(report, judge_report),
            Section(
                "Accuracy by group",
                ["Groups with few pairs have wide intervals; look at those before at the value."],
                _group_tables(report),
                [_rater_plot(report)],
            ),
            Section(
                "Training",
                ["What was logged while the models learned."] if history else ["Nothing was logged."],
                (),
                learning_curves(history),
            ),
        ],
    )


def _summary(report: Mapping[str, Any], judge_report: Mapping[str, Any]) -> Section:
    def row(name: str, key: str, of: Any) -> list[Cell]:
        return [name, *(interval_text(of(each)) for each in (report, judge_report)), key]

    def plain(each: Mapping[str, Any], *path: str) -> dict[str, Any]:
        for part in path:
            each = each[part]
        return {"value": each}

    rows = [
        row("Pair accuracy", "strict preferences ordered the same way", lambda r: r["overall"]),
        row("Always the longer", "what the length alone would reach", lambda r: r["length"]["always_longer"]),
        row("Agreement of raters", "pairs that two raters both ordered", lambda r: r["human"]["agreement"]),
        row("Human ceiling, low end", "a perfect model, if raters err together", lambda r: plain(r, "human", "ceiling_low")),
        row("Human ceiling, high end", "a perfect model, if each errs alone", lambda r: plain(r, "human", "ceiling_high")),
        row("Calibration error", "mean gap of confidence and accuracy", lambda r: plain(r, "calibration", "ece")),
        row("Score and length, Spearman", "over all completions", lambda r: plain(r, "length", "spearman")),
        row("Score and length, within rankings", "Pearson, of deviations", lambda r: plain(r, "length", "within_rankings")),
    ]
    return Section("In short", [], [Table("", ["measure", "reward model", "judge", "meaning"], rows)])


def _ensemble(report: Mapping[str, Any]) -> Section:
    rows: list[list[Cell]] = [[f"member {number}", interval_text(each)] for number, each in enumerate(report["members"])]
    rows += [["mean of the members", interval_text(report["mean"])], ["worst of the members", interval_text(report["worst"])]]
    return Section(
        "Ensemble",
        [f"{report['sentence']} Everything else on this page is of the members' mean score."],
        [Table("", ["score", "pair accuracy"], rows)],
    )


def _curve(report: Mapping[str, Any]) -> Section:
    points = report["points"]
    rows: list[list[Cell]] = [[each["rankings"], interval_text(each), each["pairs"]] for each in points]
    drawn = [(each["rankings"], each) for each in points]
    return Section(
        "Does more data help?",
        [
            report["sentence"],
            "Each point is a model of its own that learned so many of the rankings; all are measured on the same held-out pairs.",
        ],
        [Table("", ["rankings", "pair accuracy", "pairs"], rows)],
        [scaling_curve("Accuracy against rankings", "rankings learned from", "pair accuracy", drawn)],
    )


def _calibration(report: Mapping[str, Any], judge_report: Mapping[str, Any]) -> Section:
    return Section(
        "Calibration",
        ["On the dotted line a pair that the model prefers with confidence c is preferred by raters in a share c of cases."],
        (),
        [
            reliability_plot("Reward model", report["calibration"]["bins"]),
            reliability_plot("Judge", judge_report["calibration"]["bins"]),
        ],
    )


def _group_tables(report: Mapping[str, Any]) -> list[Table]:
    tables = []
    for name, groups in report["by"].items():
        if groups:
            more = f", the {GROUPS_SHOWN} largest of {len(groups)}" if len(groups) > GROUPS_SHOWN else ""
            rows = [[g["group"], g["value"], g["low"], g["high"], g["pairs"]] for g in groups[:GROUPS_SHOWN]]
            caption = f"By {name.replace('_', ' ')}{more}"
            tables.append(Table(caption, [name.replace("_", " "), "accuracy", "low", "high", "pairs"], rows))
    return tables


def _rater_plot(report: Mapping[str, Any]) -> Markup:
    raters = sorted(report["by"]["rater"][:GROUPS_SHOWN], key=lambda group: group["group"])
    overall = report["overall"]["value"]
    if overall is None:
        return Markup("")
    return intervals("Accuracy by rater", "pair accuracy", [(r["group"], r) for r in raters], reference=overall)
