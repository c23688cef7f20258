"""Compares rankings that arrived since the champion's snapshot with that snapshot, and decides whether to retrain.

Goes in:  the newest snapshot of rankings. The champion, its snapshot and its models are found through the registry.
Comes out: the decision ("retrain" or "wait"), its reason in one line, and a folder with drift.json and report.html.
Alone:    python -m components.detect_drift --snapshot-uri s3://…

Every new ranking is looked at once, in order of time, and bet on by seven tests in four channels (`channels`): prompts,
completions, preferences, raters. However often the stage runs, the probability that it EVER says "drift" of a champion whose
rankings have not changed is at most `alpha` (`betting`, `ranks`). An alarm stays until there is a new champion, for whom the watch
starts afresh; hygiene decides when an alarm starts a retrain.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from components.detect_drift.champion import Champion, find_champion, tag_version
from components.detect_drift.channels import Known, Watch
from components.detect_drift.page import drift_page, measures_of
from components.detect_drift.reading import Models, check_salts, read_reference, read_since
from components.detect_drift.state import Hygiene, Order, State, order_retrain, read_state, write_folder, write_state
from components.detect_drift.units import Dated
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context, Settings, json_digest, parameter_text
from components.services.tracking import PARENT_VARIABLE, client, mlflow_errors

ATTEMPTS = 5  # at writing the state, while other watches do
Channel = Literal["prompts", "completions", "preferences", "raters"]
ALL: tuple[Channel, ...] = ("prompts", "completions", "preferences", "raters")

_log = logging.getLogger(__name__)


class Config(Settings):
    RUNTIME_ONLY = frozenset({"threads", "batch_tokens"})

    policy_name: str = Field("rankloop-policy", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the policy in the registry, where the champion is looked up."""
    alpha: float = Field(0.05, gt=0, lt=1, allow_inf_nan=False)
    """Probability of ever a false alarm over the whole watch of one champion, all channels together."""
    channels: list[Channel] = Field(default_factory=lambda: list(ALL), min_length=1)
    """What is watched; alpha is shared equally."""
    reference_rankings: int = Field(2000, ge=40)
    """Units of the champion's snapshot to compare with, at most, in each channel."""
    min_new_rankings: int = Field(200, ge=1)
    """New rankings since the champion's snapshot that a retrain takes at least; fewer teach little."""
    cooldown_days: float = Field(7.0, ge=0, allow_inf_nan=False)
    """Days between two retrains at least, whatever the champion."""
    max_retrains_per_month: int = Field(2, ge=0)
    """Retrains within 30 days at most."""
    dry_run: bool = False
    """Watch and report, but never start a retrain."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens that a model reads at once, padding included."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""


class Inputs(Settings):
    snapshot_uri: str
    """Newest snapshot of rankings; those that are also in the champion's snapshot, or were looked at before, are left out."""


class Watched(NamedTuple):
    """A policy's champion, and the state of its watch after this look."""

    policy_name: str
    champion: Champion
    state: State


class Outputs(NamedTuple):
    decision: str
    reason: str
    drift_uri: str


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """1. the champion; 2. the rankings since; 3. look, and keep what was seen; 4. decide; 5. publish, and note the reason."""
    if config.threads:
        torch.set_num_threads(config.threads)

    # 1. Whose rankings are the reference.
    champion = find_champion(config.policy_name)
    if champion is None:
        return _finish(context, inputs, "wait", f"{config.policy_name} has no champion to watch for: run the graph rlhf first")
    uri = context.uri("drift", f"{config.policy_name}/{champion.version}")

    # 2. New is what is not in the champion's snapshot. Both are read as streams; the new ones and the chosen units are kept.
    sources = {"champion": champion.snapshot_uri, "new": inputs.snapshot_uri}
    check_salts({uri: context.storage.fetch_folder(uri, context.scratch / name) for name, uri in sources.items()})
    known, reference = read_reference(context.scratch / "champion", config.reference_rankings)
    since = read_since(context.scratch / "new", known)

    # 3. Bets. If another watch was faster, its looks are read and only what is left is bet on.
    state = look(config, inputs, context, champion, uri, known, reference, since)

    # 4. Decision.
    alarm = state.document["alarm"]
    order = Order("", "")
    owner = run_name(context)
    total = len(since)
    if alarm:
        hygiene = Hygiene(config.min_new_rankings, config.cooldown_days, config.max_retrains_per_month, config.dry_run)
        record = {"champion": champion.version, "snapshot": inputs.snapshot_uri, "run": owner, "reason": alarm["reason"]}
        retrains = context.uri("drift", f"{config.policy_name}/retrains.json")
        order = order_retrain(context.storage, retrains, hygiene, record, total, datetime.now(UTC))
    decision, reason = decide(alarm, order, owner, total, state)

    # 5. What people and programs read.
    return _finish(context, inputs, decision, reason, Watched(config.policy_name, champion, state))


def look(
    config: Config,
    inputs: Inputs,
    context: Context,
    champion: Champion,
    uri: str,
    known: Known,
    reference: Sequence[Dated],
    since: Sequence[Dated],
) -> State:
    """The state after every new ranking was bet on; it is on S3 then. Nothing is written where nothing is new.

    Raises:
        DoNotRetry: alpha or what is watched was changed in the middle of a watch.
        Retry: other watches were faster again and again.
    """
    eyes = Models(context, champion, config.precision, config.batch_tokens).eyes
    settings = {"alpha": config.alpha, "channels": list(config.channels), "reference_rankings": config.reference_rankings}
    for _ in range(ATTEMPTS):
        state = read_state(context.storage, uri)
        if state is None:
            watch = Watch.begin(reference, eyes, config.channels, config.alpha, config.reference_rankings)
            document: dict[str, Any] = {"champion": champion._asdict(), "settings": settings, "looks": [], "alarm": None}
            state = State(watch, document, "")
        if state.document["settings"] != settings:
            raise DoNotRetry(
                f"{uri} watches with {state.document['settings']}, and this run asks for {settings}: a budget that is changed "
                "after looking is none",
                "keep these settings until there is a new champion",
            )
        new = state.watch.look(since, known, eyes)
        if state.etag and not new:
            return state
        note_look(state, inputs.snapshot_uri, new, run_name(context))
        if write_state(context.storage, uri, state):
            return state
        _log.info("another watch was faster: reading its state")
    raise Retry(f"{uri} was changed by other watches {ATTEMPTS} times", "run again")


def note_look(state: State, snapshot_uri: str, new: int, run: str) -> None:
    """Adds a look to the record, and the alarm if this is the look that raised it."""
    document, watch = state.document, state.watch
    rankings = new + (document["looks"][-1]["rankings"] if document["looks"] else 0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    evidence = {name: {"log_evidence": test.log_evidence, "highest": test.highest} for name, test in watch.tests.items()}
    document["looks"].append(
        {"at": now, "run": run, "snapshot_uri": snapshot_uri, "new": new, "rankings": rankings, "evidence": evidence}
    )
    if watch.alarms and document["alarm"] is None:
        parts = [
            f"{name} (evidence {watch.tests[name].highest:.1f} of {watch.tests[name].limit:.1f} nats)" for name in watch.alarms
        ]
        reason = parameter_text(f"drift after {rankings} new rankings in " + ", ".join(parts))
        document["alarm"] = {"at": now, "rankings": rankings, "tests": watch.alarms, "reason": reason}


def decide(alarm: dict[str, Any] | None, order: Order, owner: str, total: int, state: State) -> tuple[str, str]:
    """The decision and its reason: "retrain" only if there is an alarm and this very run holds the order."""
    if alarm is None:
        text = f"no drift in {total} new rankings"
        if tests := state.watch.tests.values():
            nearest = max(tests, key=lambda test: test.log_evidence / test.limit)
            text += f"; most evidence: {nearest.name}, {nearest.log_evidence:.1f} of {nearest.limit:.1f} nats"
        return "wait", parameter_text(text)
    if order.owner and order.owner == owner:
        return "retrain", alarm["reason"]
    if order.owner:
        return "wait", parameter_text(
            f"{alarm['reason']}; run {order.owner} has started the retrain of this champion on this snapshot"
        )
    return "wait", parameter_text(f"{alarm['reason']}; blocked: {order.blocked}")


# -- the end -------------------------------------------------------------------------------------------------------------


def run_name(context: Context) -> str:
    """Who asks: the pipeline's run, so that a retried task is the same asker; alone, this very run."""
    return os.environ.get(PARENT_VARIABLE) or context.tracker.run_id or context.scratch.name


def _finish(context: Context, inputs: Inputs, decision: str, reason: str, watched: Watched | None = None) -> Outputs:
    """Publishes drift.json and the page, and notes the reason on the run, on the pipeline's run and on the champion."""
    document: dict[str, Any] = {
        "decision": decision,
        "reason": reason,
        "snapshot_uri": inputs.snapshot_uri,
        "champion": watched.champion._asdict() if watched else None,
        "config": context.config,
        "alarm": watched.state.document["alarm"] if watched else None,
        "looks": watched.state.document["looks"] if watched else [],
        "tests": measures_of(watched.state.watch) if watched else [],
        "missing": watched.state.watch.missing if watched else {},
    }
    folder = context.scratch / "drift"
    write_folder(folder, document, drift_page(document))
    uri = context.uri("drifts", json_digest(document)[:32])
    if not context.storage.is_published(uri):
        context.storage.publish_folder(folder, uri, context.marker("drift", decision=decision, reason=reason))
    context.tracker.artifact(folder / "drift.json")
    context.publish_html(folder / "report.html")
    context.tracker.tags({"rankloop.decision": decision, "rankloop.reason": reason})
    context.summary.update(decision=decision, reason=reason)
    for row in document["tests"]:
        context.summary[row["test"].replace(": ", "_")] = row["log_evidence"]
    if watched and document["alarm"]:
        tag_version(watched.policy_name, watched.champion.version, "drift", document["alarm"]["reason"])
    parent = os.environ.get(PARENT_VARIABLE, "")
    if parent and decision == "retrain":
        with mlflow_errors():
            client().set_tag(parent, "rankloop.retrain_reason", reason)  # register_model copies it to the new version
    _log.info("%s: %s", decision, json.dumps(reason))
    return Outputs(decision, reason, uri)
