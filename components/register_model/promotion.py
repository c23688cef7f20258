"""Promotion as a transaction: the alias `champion` moves only while its holder is the one that the challenger was compared with.

MLflow's alias is last-writer-wins and keeps no history. The lock, `previous_champion` and the audit records here make up for both.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage, join
from components.services.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous_champion"
POLL_SECONDS = 0.2

_log = logging.getLogger(__name__)


@contextmanager
def lock(storage: Storage, uri: str, seconds: float) -> Iterator[None]:
    """Holds the object at `uri`; waits while another holder's lease runs, and takes over one that has run out.

    Args:
        seconds: how long a lease lasts; whoever holds it longer may lose it.

    Raises:
        Retry: others held it for three leases.
    """
    owner = uuid.uuid4().hex
    deadline = time.monotonic() + 3 * seconds
    etag = ""  # of a lease that is free to be taken; "": there is none
    while True:
        mine = storage.put_if(uri, _lease(owner, time.time() + seconds), etag)
        if mine:
            break
        data, etag = storage.get_with_etag(uri)
        held = json.loads(data)
        while held["expires"] > time.time() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            data, etag = storage.get_with_etag(uri)
            held = json.loads(data)
        if held["expires"] > time.time():
            raise Retry(f"{uri} is held by {held['owner']}", "another promotion is under way; run again")
        if held["owner"]:
            _log.warning("taking over the lease of %s, which has run out", held["owner"])
    try:
        yield
    finally:
        if not storage.put_if(uri, _lease("", 0.0), mine):
            _log.warning("the lease at %s ran out and was taken over before it was released", uri)


def _lease(owner: str, expires: float) -> bytes:
    """The lock's content. It is never deleted: a released lease has no owner and has run out."""
    return json.dumps({"owner": owner, "expires": expires}).encode()


def champion_of(client: MlflowClient, name: str) -> str:
    """The version that carries the alias `champion`, or "" if none does."""
    with mlflow_errors():
        return str(client.get_registered_model(name).aliases.get(CHAMPION, ""))


def promote(
    client: MlflowClient,
    storage: Storage,
    registry_uri: str,
    *,
    name: str,
    version: str,
    compared_with: str,
    companion: tuple[str, str],
    evidence: dict[str, Any],
    lock_seconds: float,
) -> None:
    """Moves `champion` to `version`, and `previous_champion` to the old one, if the champion is still `compared_with`.

    The companion's aliases move first: whoever reads the policy's champion then finds its reward model in place.

    Args:
        registry_uri: S3 folder of the lock and the audit.
        compared_with: the champion's version at the time of the evaluation, "" if there was none.
        companion: name and version of the reward model that moves with the policy.
        evidence: what goes into the audit record besides.

    Raises:
        DoNotRetry: the champion has changed since the evaluation; nothing was moved.
    """
    with lock(storage, join(registry_uri, "lock.json"), lock_seconds):
        now = champion_of(client, name)
        if now != compared_with:
            raise DoNotRetry(
                f"the champion of {name} is version {now or 'none'}, but the evaluation compared with {compared_with or 'none'}: "
                f"version {version} stays {CHALLENGER}",
                "run the pipeline again: it compares with the new champion",
            )
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        with mlflow_errors():
            for model, to in (companion, (name, version)):
                old = client.get_registered_model(model).aliases.get(CHAMPION)
                if old is not None and str(old) != to:
                    client.set_registered_model_alias(model, PREVIOUS, str(old))
                client.set_registered_model_alias(model, CHAMPION, to)
            client.set_model_version_tag(name, version, "promoted_at", moment)
            client.set_model_version_tag(name, version, "promoted_over", now)
        record = {"at": moment, "model": name, "alias": CHAMPION, "from": now, "to": version, **evidence}
        storage.put_json(join(registry_uri, "audit", f"{moment}-{uuid.uuid4().hex[:8]}.json"), record)
