"""Chooses between two candidates, such as PPO's and DPO's policy from the same SFT.

The choice is made on held-out prompts that the verdict does not ask: the better of two on the same prompts is better there by luck,
too, and its win rate would be too high.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate.answers import Sampling, draw, score_all
from components.evaluate.measures import measure
from components.rlhf.gate import decide, number
from components.rlhf.records import Message
from components.services.exits import DoNotRetry
from components.services.launch import Context
from components.services.storage import MARKER, join

BOUNDS = ("kl_reference", "distinct_2_ratio", "length_ratio", "eos_fraction", "dissimilarity_ratio")

_log = logging.getLogger(__name__)


def divide(prompts: Sequence[list[Message]]) -> tuple[list[list[Message]], list[list[Message]]]:
    """Prompts for the verdict, and as many others for the choice before it.

    Raises:
        DoNotRetry: there is only one prompt.
    """
    half = (len(prompts) + 1) // 2
    if half == len(prompts):
        raise DoNotRetry(
            f"{len(prompts)} held-out prompt does not suffice for a choice between two candidates and a verdict on one",
            "raise ingest_rankings.test_fraction, or give one candidate",
        )
    return list(prompts[:half]), list(prompts[half:])


def choose(
    context: Context,
    candidate_uris: Sequence[str],
    sft_uri: str,
    judge_model_uri: str,
    prompts: Sequence[list[Message]],
    sampling: Sampling,
    thresholds: Mapping[str, float | None],
) -> dict[str, Any]:
    """The choice, with what it rests on, as plain JSON.

    Returns:
        {prompts, candidates: [{uri, stage, judge_score, kl_reference, broken}]}: how many prompts were asked, and of each candidate
        what `in_order` looks at; the chosen one is the first.
    """
    found: list[dict[str, Any]] = []
    for uri in candidate_uris:
        drawn = draw(context, {"candidate": uri, "sft": sft_uri}, prompts, sampling)
        answers = score_all(context, {"judge": judge_model_uri}, prompts, drawn, sampling)
        measures = measure(answers, list(drawn.log_ratios.values()), sampling.seed, resamples=1000)
        table, _ = decide(measures, thresholds)
        found.append(
            {
                "uri": uri,
                "stage": context.storage.get_json(join(uri, MARKER)).get("stage", ""),
                "judge_score": measures["judge_score_candidate"],
                "kl_reference": measures["kl_reference"],
                "broken": [row["measure"] for row in table if row["measure"] in BOUNDS and row["verdict"] == "fail"],
            }
        )
    candidates = in_order(found)
    _log.info("of two candidates the first was chosen, on %d other prompts: %s", len(prompts), candidates)
    return {"prompts": len(prompts), "candidates": candidates}


def in_order(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The candidates, the best first: fewest broken bounds of the gate, then the higher mean score by the judge.

    The bounds come first, because the judge does not see what they guard, and a candidate beyond them would fail the gate where the
    other may pass. A score that is not finite is the lowest; equal candidates keep their order.
    """

    def key(each: Mapping[str, Any]) -> tuple[int, float]:
        score = number(each["judge_score"]["value"])
        return len(each["broken"]), math.inf if score is None else -score

    return sorted(found, key=key)
