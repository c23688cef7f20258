"""A lock on S3: a lease that its holder renews, and that ends by itself when the holder dies.

A lease is taken, renewed and released by conditional writes, so exactly one of many takers gets it. How old it is, is read from the
object store's own clock or from the waiting process's monotonic one: the clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage

POLL_SECONDS = (0.05, 0.2)  # drawn between these, so that many waiters do not ask in step
LEASES_WAITED = 3

_log = logging.getLogger(__name__)


class LeaseLost(Retry):
    """Another process took the lease over, because this one did not renew it in time."""


class Lease:
    """A lock that is held now.

    Attributes:
        owner: names this very holding of the lock.
    """

    def __init__(self, storage: Storage, uri: str, seconds: float, by: str) -> None:
        self.owner = uuid.uuid4().hex
        self._storage, self._uri, self._seconds, self._by = storage, uri, seconds, by
        self._renewals = 0
        self._etag = ""

    def take(self, etag: str) -> bool:
        """Writes this holder where the object with `etag` is, or where none is ("")."""
        self._etag = self._storage.put_if(self._uri, self._content(), etag)
        return bool(self._etag)

    def renew(self) -> None:
        """Proves by a conditional write that the lock is still held; nobody else can take it for the next `seconds`.

        Raises:
            LeaseLost: it is not.
        """
        self._renewals += 1
        etag = self._storage.put_if(self._uri, self._content(), self._etag)
        if not etag:
            raise LeaseLost(
                f"the lease at {self._uri} ran out and was taken over: this process was paused for more than {self._seconds:g} s",
                "run again; raise register_model.lock_seconds if MLflow takes that long",
            )
        self._etag = etag

    def release(self) -> None:
        """Lets the next one in. The object stays: it is never deleted, so that no two takers can both find none."""
        free = json.dumps({"owner": "", "by": "", "seconds": 0.0}).encode()
        if not self._storage.put_if(self._uri, free, self._etag):
            _log.warning("the lease at %s ran out and was taken over before it was released", self._uri)

    def _content(self) -> bytes:
        content = {"owner": self.owner, "by": self._by, "seconds": self._seconds, "renewals": self._renewals}
        return json.dumps(content).encode()


@contextmanager
def lock(storage: Storage, uri: str, seconds: float, by: str = "") -> Iterator[Lease]:
    """Holds the lock at `uri`; waits while another's lease runs, and takes over one that has run out.

    Args:
        seconds: how long a lease lasts after it was taken or renewed.
        by: who this is, for whoever waits.

    Raises:
        Retry: others held it for three leases.
        DoNotRetry: what is at `uri` is no lock.
    """
    lease = Lease(storage, uri, seconds, by)
    deadline = time.monotonic() + LEASES_WAITED * seconds
    etag, seen_etag, seen_at = "", "", 0.0
    while not lease.take(etag):
        found = storage.get_version(uri)
        held = _parse(found.data, uri)
        now = time.monotonic()
        if found.etag != seen_etag:
            seen_etag, seen_at = found.etag, now
        if not held["owner"]:
            etag = found.etag
        elif found.age_seconds > held["seconds"] + 1 or now - seen_at > held["seconds"]:  # ages are in whole seconds
            _log.warning("taking over the lease of %s, which has run out", held["by"] or held["owner"])
            etag = found.etag
        elif now > deadline:
            raise Retry(f"{uri} is held by {held['by'] or held['owner']}", "another promotion is under way; run again")
        else:
            time.sleep(random.uniform(*POLL_SECONDS))
    try:
        yield lease
    finally:
        lease.release()


def _parse(data: bytes, uri: str) -> dict[str, Any]:
    try:
        held = json.loads(data)
        return {"owner": str(held["owner"]), "by": str(held.get("by", "")), "seconds": float(held["seconds"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DoNotRetry(
            f"{uri} is no lock: {data[:200]!r}", "see who wrote it; with no promotion under way it can be deleted"
        ) from error
