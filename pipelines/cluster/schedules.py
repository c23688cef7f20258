"""Recurring runs as a file says them: the difference is shown, then made, and again there is none.

schedules:
  drift-watch:
    cron: "0 0 3 * * *"
    graph: drift_watch
    rankings: s3://labels/support

KFP cannot change a recurring run, so a schedule that differs is deleted and created anew. In that order: with both there at once,
two runs would start. A crash between the two leaves none, and the next `apply` creates it. `apply` counts the recurring runs of a
name: of two that are alike one goes. Each carries the digest of all that it does in its description, since KFP returns defaults and
numbers otherwise than they were sent. Only recurring runs with that mark are touched. Two who apply at the same time are kept apart
by a lock on S3.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from components.services.exits import DoNotRetry, Retry
from components.services.launch import Settings, json_digest, parse_settings
from components.services.storage import Storage, join
from pipelines import profile as profiles
from pipelines import resources as tables
from pipelines.arguments import Sources
from pipelines.cluster.connection import Connection, Refused
from pipelines.cluster.cron import check
from pipelines.cluster.submit import EXPERIMENT, SERVICE_ACCOUNT, Order, experiment_named, experiment_of, parameters_of
from pipelines.cluster.versions import find, upload
from pipelines.yaml_file import read_yaml

MARK = re.compile(r"rankloop-schedule ([0-9a-f]{16})")
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
LOCK_SECONDS = 300.0  # a lock that is older was left by a crash


class Schedule(Settings):
    """One recurring run. At most one of its runs is under way, and what was missed is not made up for."""

    cron: str
    """Six fields: second, minute, hour, day of month, month, day of week. In UTC, unless KFP's server has another time zone."""
    graph: str = "drift_watch"
    """drift_watch or rlhf."""
    rankings: str
    """s3:// prefix or object, or hf:// name; every run reads it anew."""
    demonstrations: str = ""
    """JSONL for SFT, s3://."""
    pretraining: str = ""
    """JSONL of plain text for PPO, s3://."""
    profile: str = "tiny"
    """Profile: a name, or a YAML file beside this one."""
    set: list[str] = Field(default_factory=list)
    """A stage's settings, as stage.key=value."""
    method: str = ""
    """ppo, dpo or both; empty: the profile's."""
    resources: str = "gpu"
    """gpu, lean, or a YAML file beside this one."""
    experiment: str = EXPERIMENT
    """KFP's experiment."""
    service_account: str = SERVICE_ACCOUNT
    """Of the stages' pods."""
    enabled: bool = True
    """Whether it runs."""

    @field_validator("cron")
    @classmethod
    def _cron(cls, value: str) -> str:
        return check(value)


class File(Settings):
    schedules: dict[Name, Schedule]
    """By name; one that is missing here, and was applied before, is deleted by `--prune`."""


class Wanted(NamedTuple):
    """A schedule as it is to be in KFP. `digest` of all of it; `shown` is what a difference is told by."""

    name: str
    digest: str
    body: dict[str, Any]
    shown: dict[str, Any]


class Step(NamedTuple):
    """What is to be done about one schedule: recurring runs to delete, and what to create after it; and why, line by line."""

    name: str
    delete: list[str]
    create: Wanted | None
    reasons: list[str]


def read_file(path: Path) -> File:
    """The schedules of a file.

    Raises:
        DoNotRetry: no file, no YAML, an unknown key, a wrong value; the message names each.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise DoNotRetry(f"{path} holds no schedules", "see pipelines/cluster/schedules.yaml")
    try:
        return parse_settings(File, values, "schedules")
    except DoNotRetry as error:
        raise DoNotRetry(f"{path}: {error.message}", "pipelines/cluster/schedules.py says what each key means") from error


def wanted(kfp: Connection, name: str, schedule: Schedule, folder: Path, tags_allowed: bool, dry_run: bool = False) -> Wanted:
    """What the schedule is in KFP; its graph is uploaded and its experiment made where they are not there.

    Args:
        dry_run: make neither; the wish has no id of them then, so that it is like no schedule that is there.
    """
    profile = profiles.load(_beside(schedule.profile, folder), schedule.set, None, schedule.method, own_rankings=True)
    table = tables.load(_beside(schedule.resources, folder))
    sources = Sources(schedule.rankings, schedule.demonstrations, schedule.pretraining)
    order = Order(schedule.graph, profile, sources, table, tags_allowed, schedule.experiment, schedule.service_account)
    parameters = parameters_of(order, scheduled=True)
    version = (find if dry_run else upload)(kfp, schedule.graph, table, tags_allowed, fresh_ingest=True)
    body = {
        "display_name": name,
        "experiment_id": (experiment_named if dry_run else experiment_of)(kfp, schedule.experiment),
        "pipeline_version_reference": {"pipeline_id": version.pipeline_id, "pipeline_version_id": version.version_id},
        "runtime_config": {"parameters": parameters},
        "trigger": {"cron_schedule": {"cron": schedule.cron}},
        "mode": "ENABLE" if schedule.enabled else "DISABLE",
        "max_concurrency": "1",
        "no_catchup": True,
        "service_account": schedule.service_account,
    }
    shown = {"cron": schedule.cron, "enabled": schedule.enabled, "version": version.name, **parameters}
    return Wanted(name, json_digest(body)[:16], body, shown)


def plan(kfp: Connection, wishes: list[Wanted], prune: bool) -> list[Step]:
    """What differs between KFP and the wishes; [] if nothing does."""
    found = ours(kfp)
    steps = []
    for wish in wishes:
        same_name = found.pop(wish.name, [])
        alike = [each for each in same_name if _holds(each, wish)]
        keep = alike[0].recurring_run_id if alike else None
        gone = [each for each in same_name if each.recurring_run_id != keep]
        if alike and not gone:
            continue
        reasons = [f"~ {line}" for each in gone[:1] for line in differences(each, wish)] if not alike else []
        reasons += [f"- recurring run {each.recurring_run_id}" for each in gone]
        reasons += [] if alike else [f"+ {wish.body['trigger']['cron_schedule']['cron']}, version {wish.shown['version']}"]
        steps.append(Step(wish.name, [str(each.recurring_run_id) for each in gone], None if alike else wish, reasons))
    if prune:
        for name, left in sorted(found.items()):
            ids = [str(each.recurring_run_id) for each in left]
            steps.append(Step(name, ids, None, [f"- recurring run {each}" for each in ids]))
    return steps


def make(kfp: Connection, steps: list[Step]) -> None:
    """Does what was planned; what is deleted by somebody else meanwhile is deleted."""
    for step in steps:
        for recurring_run_id in step.delete:
            remove(kfp, recurring_run_id)
        if step.create is not None:
            create(kfp, step.create)


def remove(kfp: Connection, recurring_run_id: str) -> None:
    """Deletes a recurring run; runs of its own that are under way go on."""
    try:
        call = kfp.client.recurring_runs.recurring_run_service_delete_recurring_run
        kfp.ask(f"recurring run {recurring_run_id}", call, recurring_run_id)
    except Refused as error:
        if error.status != 404:
            raise


def create(kfp: Connection, wish: Wanted) -> None:
    """Creates it. If the reply is lost, what is there tells whether it was created."""
    call = kfp.client.recurring_runs.recurring_run_service_create_recurring_run
    body = {**wish.body, "description": f"rankloop-schedule {wish.digest}"}
    try:
        kfp.ask(f"schedule {wish.name}", call, body, again=False)
    except Retry:
        if not any(_holds(each, wish) for each in ours(kfp).get(wish.name, [])):
            raise


def ours(kfp: Connection) -> dict[str, list[Any]]:
    """KFP's recurring runs that `apply` made, by name, the oldest first."""
    call = kfp.client.recurring_runs.recurring_run_service_list_recurring_runs
    found: dict[str, list[Any]] = {}
    for each in kfp.pages("recurring runs", call, "recurring_runs", namespace=kfp.namespace, sort_by="created_at asc"):
        if MARK.search(each.description or ""):
            found.setdefault(str(each.display_name), []).append(each)
    return found


def differences(found: Any, wish: Wanted) -> list[str]:
    """What a recurring run has otherwise than wished, one line each."""
    schedule = found.trigger.cron_schedule if found.trigger else None
    reference = found.pipeline_version_reference
    has: dict[str, Any] = {"cron": schedule.cron if schedule else None, "enabled": is_enabled(found)}
    wants = dict(wish.shown)
    name = wants.pop("version")
    lines = []
    if reference is None or reference.pipeline_version_id != wish.body["pipeline_version_reference"]["pipeline_version_id"]:
        lines.append(f"version: another → {name}")
    has.update((found.runtime_config.parameters if found.runtime_config else None) or {})
    for key in sorted(has.keys() | wants.keys()):
        lines += _different(key, has.get(key), wants.get(key))
    if str(found.max_concurrency) != "1":
        lines.append(f"max_concurrency: {found.max_concurrency} → 1")
    if found.no_catchup is not True:
        lines.append(f"no_catchup: {found.no_catchup} → True")
    return lines or ["experiment, service account or something else"]


def _different(key: str, has: Any, wants: Any) -> Iterator[str]:
    if isinstance(has, Mapping) and isinstance(wants, Mapping):
        for inner in sorted(has.keys() | wants.keys()):
            yield from _different(f"{key}.{inner}", has.get(inner), wants.get(inner))
    elif has != wants:
        yield f"{key}: {has!r} → {wants!r}"


def _holds(found: Any, wish: Wanted) -> bool:
    """Whether it is as wished, and nobody has changed since what KFP's pages can change: whether it is enabled."""
    mark = MARK.search(found.description or "")
    return mark is not None and mark[1] == wish.digest and bool(is_enabled(found) == wish.shown["enabled"])


def is_enabled(found: Any) -> bool:
    """Whether a recurring run of KFP's runs."""
    return str(found.status or "") == "ENABLED" if found.status else str(found.mode or "") == "ENABLE"


def _beside(name: str, folder: Path) -> str:
    return str(folder / name) if name.endswith((".yaml", ".yml")) else name


@contextmanager
def lock(storage: Storage, root: str) -> Iterator[None]:
    """Keeps two from applying at once; that of a crash is taken over after five minutes.

    Raises:
        Retry: somebody else holds it.
    """
    uri = join(root, "schedules", "lock.json")
    me = uuid.uuid4().hex.encode()
    held = storage.put_if(uri, me)
    if not held:
        try:
            version = storage.get_version(uri)
        except DoNotRetry as error:  # it has just been given back
            raise Retry("somebody else has just applied schedules", "run again") from error
        if version.age_seconds > LOCK_SECONDS:
            held = storage.put_if(uri, me, version.etag)
        if not held:
            raise Retry(
                f"somebody else has been applying schedules for {version.age_seconds:.0f} s",
                f"run again; the lock of a crash ends after {LOCK_SECONDS:.0f} s",
            )
    until = time.monotonic() + LOCK_SECONDS
    try:
        yield
    finally:
        if time.monotonic() < until:
            storage.delete(uri)
