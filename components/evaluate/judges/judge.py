"""Asks every judge of the config but the held-out reward model, whose scores the stage has already."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluate.judges.endpoint import judge_by_endpoint
from components.evaluate.judges.humans import FOLDER, Labels, judge_by_humans, read_labels, write_tasks
from components.evaluate.judges.pairs import SAME_TEXT, Intervals, Judgement, Pair, named, rename_reward_model, win_rates
from components.evaluate.judges.settings import Judge, JudgeSettings
from components.rlhf.agreement import agreement_by_prompt, alpha_estimate, pairwise_agreement
from components.rlhf.statistics import Estimate, as_json, wilson_interval
from components.services.launch import Context

RECORDS = "judgements.jsonl"

_log = logging.getLogger(__name__)


def find_labels(config: JudgeSettings, context: Context) -> tuple[Labels, str]:
    """People's labels and the digest of their file; none, and "", where there are none yet."""
    return read_labels(config.human_labels, context.storage) if config.human_labels else (Labels({}, 0), "")


def judge_all(
    config: JudgeSettings,
    context: Context,
    folder: Path,
    uri: str,
    pairs: Sequence[Pair],
    scored: list[Judgement],
    labels: Labels,
    measures: Mapping[str, Any],
    intervals: Intervals,
) -> tuple[dict[str, Any], dict[str, Any], list[Judgement]]:
    """The measures with those of every judge, {judge: how it came to them} for evaluation.json, and the gate's judge's judgements.

    Writes judgements.jsonl and, for people, the tasks of Label Studio below `folder`, which will be published as `uri`.

    Args:
        pairs: as `pairs_of` gives them.
        scored: the held-out reward model's judgement of each.
        measures: those of the stage, where the plain names of win rates are the held-out reward model's.
    """
    found = rename_reward_model(measures, config.judges, config.gate_judge)
    facts: dict[str, Any] = {}
    judgements_of_gate = scored
    seed, resamples = intervals.seed, intervals.resamples
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RECORDS, "w", encoding="utf-8") as file:
        for judge in config.judges:
            if judge == "reward_model":
                continue
            if judge == "endpoint":
                judgements, facts[judge] = judge_by_endpoint(pairs, config, context)
                facts[judge] |= {"model": config.endpoint_model, "url": config.endpoint_url}
                found |= {name: as_json(estimate) for name, estimate in position_bias(judgements).items()}
            else:
                tasks = write_tasks(folder, pairs, seed)
                judgements, votes, facts[judge] = judge_by_humans(pairs, labels, seed)
                facts[judge] |= {"tasks": tasks, "tasks_uri": f"{uri}/{FOLDER}", "labels_uri": config.human_labels}
                agreement = agreement_by_prompt(votes)
                found["rater_agreement_humans"] = as_json(pairwise_agreement(agreement, seed, resamples))
                found["rater_alpha_humans"] = as_json(alpha_estimate(agreement, seed, resamples))
            of_gate = judge == config.gate_judge
            if of_gate:
                judgements_of_gate = judgements
            rates, counts = win_rates(pairs, judgements, config.min_judged_fraction, intervals, of_gate)
            facts[judge] |= {"over": counts}
            missing = {over: _missing(judge, each, config, uri) for over, each in counts.items()}
            found |= named(rates, judge, config.gate_judge, {over: why for over, why in missing.items() if why})
            for pair, judgement in zip(pairs, judgements, strict=True):
                file.write(json.dumps(_record(judge, pair, judgement), ensure_ascii=False) + "\n")
            _log.info("judged by %s: %s", judge, facts[judge])
    return found, facts, judgements_of_gate


def position_bias(judgements: Sequence[Judgement]) -> dict[str, Estimate]:
    """How often the order of the answers changed the verdict, and how often a verdict for one answer was for the first shown."""
    both = [each.details for each in judgements if each.outcome is not None and each is not SAME_TEXT]
    changed = sum(each["ours_first"] != each["ours_second"] for each in both)
    first = sum((each["ours_first"] == 1) + (each["ours_second"] == 0) for each in both)
    strict = sum((each["ours_first"] != 0.5) + (each["ours_second"] != 0.5) for each in both)
    return {
        "order_changes_verdict_endpoint": wilson_interval(changed, len(both)),
        "first_shown_preferred_endpoint": wilson_interval(first, strict),
    }


def _record(judge: Judge, pair: Pair, judgement: Judgement) -> dict[str, Any]:
    return {"judge": judge, "prompt": pair.row, "over": pair.over, "outcome": judgement.outcome, **judgement.details}


def _missing(judge: Judge, counts: Mapping[str, int], config: JudgeSettings, uri: str) -> str:
    """Why there is no win rate, and what to do; empty where there is one."""
    judged, pairs, silent = counts["judged"], counts["pairs"], counts["silent"]
    if judged and judged >= config.min_judged_fraction * pairs:
        return ""
    said = (
        f"{judge} judged {judged} of {pairs} pairs and gave no verdict on {silent}; "
        f"min_judged_fraction is {config.min_judged_fraction:g}: "
    )
    if judge == "humans":
        return said + (
            f"have the tasks in {uri}/{FOLDER} labelled in Label Studio, then evaluate again with evaluate.human_labels set to its "
            "JSON export."
        )
    return said + (
        "raise evaluate.endpoint_max_requests or endpoint_max_tokens if the budget was spent (replies are kept); if it does not "
        f"reply with A, B or tie (see {RECORDS}), raise endpoint_reply_tokens or ask another model."
    )
