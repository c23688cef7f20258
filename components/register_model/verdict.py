"""May a version be promoted? Decided again from the numbers of its evaluation; and what speaks against a promotion by hand."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from components.rlhf.gate import decide
from components.services.exits import DoNotRetry
from components.services.storage import Storage, join

_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """An evaluation and what follows from its numbers.

    Fields:
        evaluation: the content of evaluation.json.
        digest: SHA-256 of that file.
        rows: of the gate, as `components.rlhf.gate.decide` gives them.
        decided: "pass" or "fail", from the numbers alone.
    """

    evaluation: dict[str, Any]
    digest: str
    rows: list[dict[str, Any]]
    decided: str


def read_verdict(storage: Storage, evaluation_uri: str) -> Verdict:
    """Raises `DoNotRetry` if there is no evaluation there."""
    data = storage.get_bytes(join(evaluation_uri, "evaluation.json"))
    try:
        evaluation = json.loads(data)
    except ValueError as error:
        raise DoNotRetry(f"{evaluation_uri}/evaluation.json is damaged: {error}", "evaluate the policy again") from error
    rows, decided = decide(evaluation.get("measures", {}), evaluation.get("thresholds", {}))
    return Verdict(evaluation, hashlib.sha256(data).hexdigest(), rows, decided)


def final_gate(passed_in: str, verdict: Verdict) -> str:
    """ "pass" only if the graph, the evaluation and the numbers themselves all say so; says who did not."""
    voices = {"the graph": passed_in, "the evaluation": verdict.evaluation.get("gate"), "its numbers": verdict.decided}
    against = [f"{who} ({said})" for who, said in voices.items() if said != "pass"]
    if against:
        _log.warning("not promoted: the gate is not passed by %s", ", ".join(against))
    return "fail" if against else "pass"


def objections(storage: Storage, tags: Mapping[str, str], champion: str) -> list[str]:
    """What speaks against making a version champion now, in sentences; nothing if its gate passed against this very champion.

    Args:
        tags: of the version.
        champion: the version that is champion now, or "".
    """
    if not tags.get("evaluation_uri"):
        return ["it has no evaluation (tag evaluation_uri)"]
    try:
        verdict = read_verdict(storage, tags["evaluation_uri"])
    except DoNotRetry as error:
        return [f"its evaluation cannot be read: {error.message}"]
    evaluation = verdict.evaluation
    found = [row["sentence"] for row in verdict.rows if row["verdict"] == "fail"]
    if evaluation.get("candidate_uri") != tags.get("policy_uri"):
        found.append(f"{tags['evaluation_uri']} is of another policy, {evaluation.get('candidate_uri')}")
    if not found and "fail" in (tags.get("gate", "fail"), evaluation.get("gate", "fail")):
        found.append("its gate was said to have failed")
    compared = str(evaluation.get("champion_version", ""))
    if compared != champion:
        found.append(f"it was compared with version {compared or 'none'}, but the champion is version {champion or 'none'}")
    if tags.get("rolled_back_at"):
        found.append(f"it was rolled back at {tags['rolled_back_at']}")
    return found
