"""A gate on the data: Great Expectations over a snapshot of rankings, before anything learns from it.

Goes in:  a snapshot, and the report of the ingest that made it.
Comes out: the gate ("pass" or "fail") with its reason, and a folder with validation.json and data_docs.html.
Alone:    python -m components.validate_data --snapshot-uri s3://… --ingest-uri s3://… --fail-on-gate true
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from components.rlhf.statistics import as_json, finite
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings
from components.validate_data.facts import Facts, collect
from components.validate_data.suite import Check, Suite, gate_of, rules

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
    """Share of the rows read, without those that their rater declined, that may be in quarantine; else source or form is wrong."""
    max_contradiction_fraction: float = Field(0.4, ge=0, le=1)
    """Share of repeated comparisons that may be decided both ways; near 0.5 the raters toss coins."""
    max_tie_fraction: float = Field(0.6, ge=0, le=1)
    """Share of the pairs that may be tied; ties teach nothing."""
    max_prompt_characters: int = Field(200_000, ge=1)
    """Longest prompt, all its messages together, in characters; longer ones are dumps, not prompts."""
    max_completion_characters: int = Field(100_000, ge=1)
    """Longest completion, in characters."""
    max_near_duplicate_fraction: float = Field(0.01, ge=0, le=1)
    """Share of held-out prompts with a near duplicate in training; 0.01 of them lift the held-out accuracy by a point at most."""
    near_duplicate_similarity: float = Field(0.8, gt=0.5, le=1)
    """Jaccard similarity of 5-byte shingles from which prompts are near duplicates; one word in thirteen changed is about 0.8."""
    max_length_bias: float = Field(0.15, ge=0, le=0.5)
    """How far from 0.5 the longer one may win; at 0.65 length alone predicts about as well as many reward models."""
    max_position_bias: float = Field(0.1, ge=0, le=0.5)
    """How far from 0.5 what was shown first may win; it has no reason to, and 0.1 turns one comparison in five."""
    max_refusal_bias: float = Field(0.4, ge=0, le=0.5)
    """How far from 0.5 refusals may win against answers; at 0.9 the reward model learns to refuse, at 0.1 never to."""
    max_refusal_fraction: float = Field(0.3, ge=0, le=1)
    """Share of completions that refuse; more, and the policy learns little but refusing from them."""
    max_self_contradiction_fraction: float = Field(0.25, ge=0, le=1)
    """Share of a rater's repeated comparisons decided both ways; 0.25 is a rater who errs in one of seven."""
    max_cycle_fraction: float = Field(0.1, ge=0, le=1)
    """Share of prompts ordered again by the same rater whose orderings go in a circle; no score fits those."""
    min_agreement: float = Field(0.6, ge=0, le=1)
    """Share of comparisons on which two raters agree; InstructGPT's reached 0.73, tosses of a coin reach 0.5."""
    min_alpha: float = Field(0.2, ge=-1, le=1)
    """Krippendorff's alpha of comparisons; without ties it is about twice the agreement less one, so 0.2 goes with 0.6."""
    min_human_ceiling: float = Field(0.7, ge=0.5, le=1)
    """Accuracy that a perfect reward model could reach by the raters' agreement; at 0.6 of that it is 0.72."""
    max_rater_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the rankings by one known rater; beyond one half the reward model learns one person's taste."""
    min_rankings_of_rater: int = Field(20, ge=1)
    """Rankings of a rater from which anything can be said of them."""
    max_small_rater_fraction: float = Field(0.2, ge=0, le=1)
    """Share of the rankings by raters with fewer; of those nobody can tell whether they are any good."""
    max_random_rater_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the rankings by raters proven to agree with the others no more than chance does; leaving them out is free."""
    max_copying_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the rankings by raters proven to agree with each other far more than with everybody else."""
    languages: list[str] = Field([])
    """Languages that prompts should be in, as ISO 639 codes such as en; empty: the most frequent one."""
    max_other_language_fraction: float = Field(0.1, ge=0, le=1)
    """Share of prompts in other languages; a few are normal, many need raters and held-out prompts of their own."""
    warning: list[str] = Field([])
    """Checks that only warn where they would fail, by the names in validation.json, such as tie_fraction."""
    failing: list[str] = Field([])
    """Checks that fail where they would only warn, such as near_duplicate_fraction."""
    fail_on_gate: bool = False
    """Fail with the do-not-retry code if the gate does; the graph has a branch of its own for that."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        rules(self)  # knows the names of the checks
        return self


class Inputs(Settings):
    snapshot_uri: str
    """Snapshot of rankings, as ingest_rankings wrote it."""
    ingest_uri: str
    """Report of that ingest."""


class Outputs(NamedTuple):
    gate: str
    reason: str
    warnings: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. read the snapshot; 2. check; 3. decide, failing closed; 4. publish."""
    # 1. and 2. The snapshot, as numbers; its rows are checked as they come.
    snapshot = context.scratch / "snapshot"
    context.storage.fetch_folder(inputs.snapshot_uri, snapshot)
    ingest = context.storage.get_json(inputs.ingest_uri.rstrip("/") + "/rankloop.json")
    suite = Suite(config)
    try:
        facts = collect(snapshot, ingest, context.scratch, config, suite.look)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DoNotRetry(
            f"{inputs.snapshot_uri} cannot be read as rankings: {type(error).__name__}: {error}", "run ingest_rankings again"
        ) from error
    checks = suite.checks(facts)

    # 3. The gate passes only if every expectation was computed, and none fails that does not merely warn.
    gate = gate_of(checks)
    failed, warned = ([check for check in checks if check.verdict == verdict] for verdict in ("fail", "warn"))
    reason, warnings = one_line(failed), one_line(warned)
    for check in failed + warned:
        level = logging.ERROR if check.verdict == "fail" else logging.WARNING
        _log.log(level, "%s: observed %s, expected %s; %s", check.name, check.value, check.threshold, "; ".join(check.examples))

    # 4. Results, for people and for programs.
    from components.validate_data.page import data_docs
    from components.validate_data.rater_page import rater_report

    folder = context.scratch / "validation"
    folder.mkdir()
    page, raters, document = folder / "data_docs.html", folder / "rater_report.html", folder / "validation.json"
    page.write_text(data_docs(checks, suite.results, gate, inputs.snapshot_uri), encoding="utf-8")
    raters.write_text(rater_report(facts, checks, inputs.snapshot_uri), encoding="utf-8")
    document.write_text(json.dumps(as_document(gate, checks, facts, suite), indent=2, allow_nan=False), encoding="utf-8")
    for each in (page, raters):
        context.publish_html(each)
    context.tracker.artifact(document)
    context.tracker.tags({"rankloop.gate": gate} | ({"rankloop.warnings": warnings} if warned else {}))
    parents = {"snapshot": inputs.snapshot_uri, "ingest": inputs.ingest_uri}
    marker = context.marker("validation", gate=gate, reason=reason, warnings=warnings, parents=parents)
    context.storage.publish_folder(folder, context.uri("validations"), marker)
    numbers = {name: value for name, value in facts.whole.items() if math.isfinite(value)}
    context.summary.update(gate=gate, failed=len(failed), warned=len(warned), **numbers)
    if gate == "fail" and config.fail_on_gate:
        examples = "\n".join(f"  {example}" for check in failed for example in check.examples)
        raise DoNotRetry(
            f"the gate failed: {reason}\n{examples}", "correct the data, or the threshold if it is wrong for these data"
        )
    return Outputs(gate, reason, warnings)


def as_document(gate: str, checks: list[Check], facts: Facts, suite: Suite) -> dict[str, Any]:
    """The content of validation.json; null for what is not finite."""
    return {
        "gate": gate,
        "checks": [{**check._asdict(), "observed": finite(check.observed)} for check in checks],
        "whole": {name: finite(value) for name, value in facts.whole.items()},
        "not_known": facts.unknown,
        "estimates": {name: as_json(estimate) for name, estimate in facts.estimates.items()},
        "languages": dict(facts.languages),
        "raters": [
            {
                **rater._asdict(),
                "shares": {name: as_json(estimate) for name, estimate in rater.shares.items()},
                "seconds": finite(rater.seconds),
            }
            for rater in facts.pool.raters
        ],
        "great_expectations": [
            json.loads(json.dumps(result.to_json_dict()), parse_constant=lambda name: None) for result in suite.results
        ],
    }


def one_line(failed: list[Check]) -> str:
    """Checks for a KFP parameter: no quotes and no line breaks, which KFP's conditions do not survive."""
    parts = []
    for check in failed:
        example = f"; for example {check.examples[0]}" if check.examples else ""
        parts.append(f"{check.name}: observed {check.value}, expected {check.threshold}{example}")
    text = " | ".join(parts)
    return "".join(c if c.isprintable() and c not in "\"'\\`{}" else " " for c in text)[:1000]
