"""Starts a run once for an event, however often and by however many the event is delivered.

A delivery claims the event: it writes `<storage>/triggers/<digest of the key>.json`, of which S3 lets exactly one be written
(If-None-Match). Who has the claim starts the run and notes its id in the claim; everybody else reads the id there. Whoever finds a
claim without an id that is older than `LEASE_SECONDS` takes it over: its owner died. The run's name carries the key's digest, and
whoever takes over asks KFP for a run of that name first, so a crash between KFP's reply and the note starts no second run.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from components.services.exits import DoNotRetry, Retry, StageFailure
from components.services.storage import Storage, join
from pipelines.cluster.connection import Connection
from pipelines.cluster.submit import Order, start

FOLDER = "triggers"
LEASE_SECONDS = 900.0  # longer than compiling, uploading and creating take with every wait in between
PATIENCE_SECONDS = 20.0  # for the id of a run that somebody else is starting
_DIGITS = 16


class Triggered(NamedTuple):
    """The run of an event. `new` if this delivery started it."""

    run_id: str
    page: str
    new: bool


class Claims:
    """The claims of events below a place on S3.

    Args:
        root: the `s3://` URI below which every artifact lies.
        lease_seconds: after which the owner of a claim without a run counts as dead.
        patience_seconds: how long to wait for another's run.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        lease_seconds: float = LEASE_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._storage = storage
        self._root = root
        self._lease = lease_seconds
        self._patience = patience_seconds

    def once(self, key: str, begin: Callable[[str, bool], str]) -> tuple[str, bool]:
        """The id of the event's run, and whether this call started it.

        Args:
            key: names the event.
            begin: starts the run, given the digest that its name has to carry, and whether one may be there already; gives its id.

        Raises:
            Retry: somebody else is starting it, or S3 or KFP fails.
            DoNotRetry: the run cannot be started. After both, the next delivery tries again at once.
        """
        digest = hashlib.sha256(key.encode()).hexdigest()
        uri, mark = join(self._root, FOLDER, f"{digest}.json"), digest[:_DIGITS]
        claim = _claim(key)
        etag, taken_over = self._storage.put_if(uri, claim), False
        until = time.monotonic() + self._patience
        while not etag:
            found = self._read(uri)
            if found is None:  # just given back
                etag = self._storage.put_if(uri, claim)
                continue
            content, found_etag, age = found
            if content.get("run_id"):
                return str(content["run_id"]), False
            if content.get("failed") or age > self._lease:
                etag, taken_over = self._storage.put_if(uri, claim, found_etag), True
                continue
            if time.monotonic() > until:
                raise Retry(f"another delivery of this event has been starting its run for {age:.0f} s", "deliver it again later")
            time.sleep(0.5)
        try:
            run_id = begin(mark, taken_over)
        except StageFailure as error:  # who delivers it again looks first whether the run was created after all
            self._storage.put_if(uri, _claim(key, failed=error.message), etag)
            raise
        if not self._storage.put_if(uri, _claim(key, run_id=run_id), etag):
            content = json.loads(self._storage.get_version(uri).data)
            if content.get("run_id") not in ("", None, run_id):
                raise DoNotRetry(f"the event has two runs, {content['run_id']} and {run_id}", "end one of them in KFP")
        return run_id, True

    def _read(self, uri: str) -> tuple[dict[str, Any], str, float] | None:
        try:
            version = self._storage.get_version(uri)
        except DoNotRetry:
            if self._storage.exists(uri):
                raise
            return None
        return json.loads(version.data), version.etag, version.age_seconds


def _claim(key: str, **facts: str) -> bytes:
    """`writer` because a write whose reply was lost is told by what is there: it must be nobody else's."""
    return json.dumps({"key": key, "writer": uuid.uuid4().hex, **facts}).encode()


def trigger(kfp: Connection, claims: Claims, order: Order, key: str) -> Triggered:
    """The run of the event named `key`; it is started if no delivery did before.

    Raises:
        DoNotRetry, Retry: as `Claims.once` and `start`.
    """

    def begin(mark: str, may_be_there: bool) -> str:
        name = f"{order.graph}-event-{mark}"
        there = run_named(kfp, name) if may_be_there else ""
        if there:
            return there
        try:
            return start(kfp, order, name).run_id
        except Retry:
            there = _created_after_all(kfp, name)
            if there:
                return there
            raise

    run_id, new = claims.once(key, begin)
    return Triggered(run_id, kfp.page_of(run_id), new)


def run_named(kfp: Connection, name: str) -> str:
    """The id of the run with this name, or ""."""
    wanted = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})
    for each in kfp.pages("runs", kfp.client.runs.run_service_list_runs, "runs", namespace=kfp.namespace, filter=wanted):
        if each.display_name == name:
            return str(each.run_id)
    return ""


def _created_after_all(kfp: Connection, name: str) -> str:
    """The id of a run whose creation got no reply; "" if there is none, or KFP does not answer."""
    try:
        return run_named(kfp, name)
    except StageFailure:
        return ""
