"""A gate on the data: Great Expectations over a snapshot of rankings, before anything learns from it.

Goes in:  a snapshot, and the report of the ingest that made it.
Comes out: the gate ("pass" or "fail") with its reason, and a folder with validation.json and data_docs.html.
Alone:    python -m components.validate_data --snapshot-uri s3://… --ingest-uri s3://… --fail-on-gate true
"""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

import pyarrow as pa
from pydantic import Field

from components.rlhf.records import iterate_snapshot
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings
from components.validate_data.facts import collect
from components.validate_data.suite import Check, validate

_log = logging.getLogger(__name__)


class Config(Settings):
    min_rankings: int = Field(50, ge=1)
    """Rankings at least; fewer teach a reward model nothing that can be measured."""
    min_test_rankings: int = Field(10, ge=1)
    """Held-out rankings at least; an accuracy from fewer has an interval as wide as the scale."""
    min_prompts: int = Field(20, ge=1)
    """Distinct prompts at least; PPO and the evaluation draw from them."""
    min_raters: int = Field(1, ge=1)
    """Distinct raters at least; 1, because public sets often name none."""
    max_quarantined_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the rows read that may be in quarantine; more means that the source or the form is wrong."""
    max_contradiction_fraction: float = Field(0.4, ge=0, le=1)
    """Share of repeated comparisons that may be decided both ways; near 0.5 the raters toss coins."""
    max_tie_fraction: float = Field(0.6, ge=0, le=1)
    """Share of the pairs that may be tied; ties teach nothing."""
    max_prompt_characters: int = Field(200_000, ge=1)
    """Longest prompt, all its messages together, in characters; longer ones are dumps, not prompts."""
    max_completion_characters: int = Field(100_000, ge=1)
    """Longest completion, in characters."""
    fail_on_gate: bool = False
    """Fail with the do-not-retry code if the gate does; the graph has a branch of its own for that."""


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings, as ingest_rankings wrote it."""
    ingest_uri: str
    """Report of that ingest."""


class Outputs(NamedTuple):
    gate: str
    reason: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read the snapshot; 2. check; 3. decide, failing closed; 4. publish."""
    # 1. The snapshot, as numbers.
    snapshot = context.scratch / "snapshot"
    context.storage.fetch_folder(inputs.snapshot_uri, snapshot)
    ingest = context.storage.get_json(inputs.ingest_uri.rstrip("/") + "/rankloop.json")
    try:
        facts = collect(iterate_snapshot(snapshot), ingest)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DoNotRetry(
            f"{inputs.snapshot_uri} cannot be read as rankings: {type(error).__name__}: {error}", "run ingest_rankings again"
        ) from error

    # 2. and 3. The gate passes only if every expectation was computed and holds.
    checks, results = validate(facts, config)
    failed = [check for check in checks if not check.passed]
    gate = "pass" if checks and not failed else "fail"
    reason = one_line(failed)
    for check in failed:
        _log.error("%s: observed %g, expected %s; %s", check.name, check.observed, check.threshold, "; ".join(check.examples))

    # 4. Results, for people and for programs.
    from components.validate_data.page import data_docs

    folder = context.scratch / "validation"
    folder.mkdir()
    page, document = folder / "data_docs.html", folder / "validation.json"
    page.write_text(data_docs(checks, results, gate, inputs.snapshot_uri), encoding="utf-8")
    document.write_text(
        json.dumps(
            {
                "gate": gate,
                "checks": [check._asdict() for check in checks],
                "whole": facts.whole,
                "great_expectations": [result.to_json_dict() for result in results],
            },
            indent=2,
        ),
        encoding="utf-8",
    )
    context.publish_html(page)
    context.tracker.artifact(document)
    context.tracker.tags({"rankloop.gate": gate})
    parents = {"snapshot": inputs.snapshot_uri, "ingest": inputs.ingest_uri}
    context.storage.publish_folder(
        folder, context.uri("validations"), context.marker("validation", gate=gate, reason=reason, parents=parents)
    )
    context.summary.update(gate=gate, failed=len(failed), **facts.whole)
    if gate == "fail" and config.fail_on_gate:
        examples = "\n".join(f"  {example}" for check in failed for example in check.examples)
        raise DoNotRetry(
            f"the gate failed: {reason}\n{examples}", "correct the data, or the threshold if it is wrong for these data"
        )
    return Outputs(gate, reason)


def one_line(failed: list[Check]) -> str:
    """The failed checks for a KFP parameter: no quotes and no line breaks, which KFP's conditions do not survive."""
    parts = []
    for check in failed:
        example = f"; for example {check.examples[0]}" if check.examples else ""
        parts.append(f"{check.name}: observed {check.observed:g}, expected {check.threshold}{example}")
    text = " | ".join(parts)
    return "".join(c if c.isprintable() and c not in "\"'\\`{}" else " " for c in text)[:1000]
