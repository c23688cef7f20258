"""What a watch keeps on S3 between runs: the state of one champion's watch, and the list of retrains of its policy.

    <root>/drift/<policy>/<version>/state.json          for people: evidence, examples, every look; replaced as a whole
    <root>/drift/<policy>/<version>/arrays-<digest>…    for programs: scores, features, digests of what was counted
    <root>/drift/<policy>/retrains.json                 every retrain that was started, over all champions

Both JSON files are written only if they still are what was read (`Storage.put_if`). Of two watches that look at the same time one
writes; the other reads again, finds the rankings counted, and bets on none of them a second time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load, save

from components.detect_drift.channels import Watch
from components.services.exits import DoNotRetry
from components.services.storage import Storage, join

MONTH = timedelta(days=30)


class State(NamedTuple):
    """One champion's watch as it was read.

    Fields:
        etag: of state.json; "" if there is none yet.
        document: the content of state.json but for what `Watch` keeps in it.
    """

    watch: Watch
    document: dict[str, Any]
    etag: str


def read_state(storage: Storage, uri: str) -> State | None:
    """The state of a watch, or None if it has not begun.

    Raises:
        DoNotRetry: it was written by code that bets otherwise.
    """
    place = join(uri, "state.json")
    if not storage.exists(place):
        return None
    data, etag, _ = storage.get_version(place)
    document = json.loads(data)
    arrays = load(storage.get_bytes(document["arrays"]))
    try:
        return State(Watch.restore(document["watch"], arrays), document, etag)
    except (ValueError, KeyError) as error:
        raise DoNotRetry(
            f"{place} cannot be continued: {error}",
            "go on with the version that wrote it until there is a new champion; deleting it forgets what it spent of alpha",
        ) from error


def write_state(storage: Storage, uri: str, state: State) -> bool:
    """Writes the state if it still is the one that was read; False if another watch was faster.

    The arrays go first, under a name of their own. Those that no state in use names any more are removed.
    """
    data = save(state.watch.arrays())
    arrays = join(uri, f"arrays-{hashlib.sha256(data).hexdigest()[:32]}.safetensors")
    before = state.document.get("arrays", "")
    document = {**state.document, "watch": state.watch.facts(), "arrays": arrays, "arrays_before": before}
    if not storage.exists(arrays):
        storage.put_bytes(arrays, data)
    if not storage.put_if(join(uri, "state.json"), json.dumps(document, indent=2, allow_nan=False).encode(), state.etag):
        return False
    stale = state.document.get("arrays_before", "")
    if stale and stale not in (arrays, before):
        storage.delete(stale)
    return True


# -- retrains ------------------------------------------------------------------------------------------------------------


class Hygiene(NamedTuple):
    """When an alarm may start a retrain: as in the config of the stage."""

    min_new_rankings: int
    cooldown_days: float
    max_retrains_per_month: int
    dry_run: bool


def blocked(hygiene: Hygiene, retrains: Sequence[Mapping[str, Any]], new_rankings: int, now: datetime) -> str:
    """Why an alarm must not start a retrain now, or "" if it may. The first reason that holds is given."""
    if new_rankings < hygiene.min_new_rankings:
        return f"only {new_rankings} rankings are new since the champion, and min_new_rankings is {hygiene.min_new_rankings}"
    times = [datetime.fromisoformat(each["at"]) for each in retrains]
    if times and now - max(times) < timedelta(days=hygiene.cooldown_days):
        days = (now - max(times)) / timedelta(days=1)
        return f"the last retrain began {days:.1f} days ago, and cooldown_days is {hygiene.cooldown_days:g}"
    month = sum(now - each < MONTH for each in times)
    if month >= hygiene.max_retrains_per_month:
        return f"{month} retrains began in the last 30 days, and max_retrains_per_month is {hygiene.max_retrains_per_month}"
    if hygiene.dry_run:
        return "this is a dry run"
    return ""


class Order(NamedTuple):
    """What came of asking: the run that has the retrain of this champion and snapshot, "" if none has; and what blocked it."""

    owner: str
    blocked: str


def order_retrain(
    storage: Storage, uri: str, hygiene: Hygiene, record: Mapping[str, Any], new_rankings: int, now: datetime
) -> Order:
    """Puts a retrain on the list, once for each champion and snapshot; of many callers one gets it.

    Args:
        uri: of the list.
        record: champion, snapshot, run (who asks) and reason. The same run that asks again is told that it has it: that is a retry
            of a pod, not a second retrain.
    """
    while True:
        exists = storage.exists(uri)
        data, etag = storage.get_version(uri)[:2] if exists else (b"[]", "")
        retrains: list[dict[str, Any]] = json.loads(data)
        for each in retrains:
            if all(each[key] == record[key] for key in ("champion", "snapshot")):
                return Order(each["run"], "")
        if why := blocked(hygiene, retrains, new_rankings, now):
            return Order("", why)
        entry = {"at": now.astimezone(UTC).isoformat(), **record}
        if storage.put_if(uri, json.dumps([*retrains, entry], indent=2).encode(), etag):
            return Order(record["run"], "")


def write_folder(folder: Path, document: Mapping[str, Any], page: str) -> None:
    """drift.json and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "drift.json").write_text(json.dumps(document, indent=2, allow_nan=False), encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")
