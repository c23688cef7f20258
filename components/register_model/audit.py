"""The audit: which alias was moved from where to where, when, by whom and on which evidence. Append-only, on S3.

Records are numbered objects `00000001.json`, … that are only ever written where none is, and each holds the digest of the one
before: a changed, missing or inserted record is noticed. What the log cannot tell of itself is that its end was cut off; for that
the registry keeps the number and digest of a late record as a tag (`anchor_of`).

The log is also the journal of a promotion. A record `begun` is written before the first alias moves and names every move; from then
on the promotion is carried out, by whoever comes next if its process dies. Since a number can be taken once only, of two processes
that both saw the same last record one can begin.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage, join

SERVICE_ACCOUNT_VARIABLE = "RANKLOOP_SERVICE_ACCOUNT"  # a pod's, from Kubernetes' downward API
_NAME = re.compile(r"(\d{8})\.json")


class Overtaken(Retry):
    """Another process has written the record that this one was to write."""


class Record(NamedTuple):
    """One record as it is on S3.

    Fields:
        number: from 1, without gaps.
        digest: SHA-256 of its bytes.
        content: {number, previous, at, event, action, model, session, by, moves: [{model, alias, from, to}], aliases}, and of what
            was begun {reason, evidence, tags}, of its end {of: its number}.
            event: "begun" (the moves will be made), "done" (they are made), "abandoned" (they cannot be), or "observed" (something
            else made them). session: names the process. aliases: {model: {alias: version}} as they are to be after this record.
    """

    number: int
    digest: str
    content: dict[str, Any]


class Audit:
    """The log below an S3 folder."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.uri = uri
        self._storage = storage

    def numbers(self) -> list[int]:
        """Numbers of the records that are there, in order; one listing."""
        prefix = self.uri + "/"
        names = (item.uri.removeprefix(prefix) for item in self._storage.list(prefix))
        return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))

    def head(self) -> Record | None:
        """The last record."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def records(self) -> list[Record]:
        return [self.read(number) for number in self.numbers()]

    def read(self, number: int) -> Record:
        """Raises `DoNotRetry` if the object is no record; `verify` tells more."""
        data = self._storage.get_bytes(self._place(number))
        digest = hashlib.sha256(data).hexdigest()
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("aliases"), dict) or "event" not in content:
            raise DoNotRetry(
                f"{self._place(number)} is no record of a promotion",
                "something else wrote it: put the record back from a backup or an older version of the object",
            )
        return Record(number, digest, content)

    def append(self, after: Record | None, content: Mapping[str, Any]) -> Record:
        """Writes the record that follows `after`.

        Raises:
            Overtaken: another process has written that number.
        """
        number = after.number + 1 if after else 1
        whole = {"number": number, "previous": after.digest if after else "", "at": moment(), **content}
        data = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False).encode()
        if not self._storage.put_if(self._place(number), data):
            raise Overtaken(f"another process wrote record {number} of {self.uri} meanwhile", "run again")
        return Record(number, hashlib.sha256(data).hexdigest(), whole)

    def _place(self, number: int) -> str:
        return join(self.uri, f"{number:08d}.json")


def moment() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def acting(command: str, run_id: str = "") -> dict[str, str]:
    """Who acts: user and host, the pod's service account where there is one, the MLflow run, and what was called."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        user = str(os.getuid())
    by = {"user": user, "host": socket.gethostname(), "command": command}
    if account := os.environ.get(SERVICE_ACCOUNT_VARIABLE, ""):
        by["service_account"] = account
    return by | ({"run": run_id} if run_id else {})


def anchor_of(record: Record) -> str:
    """The tag that remembers a record."""
    return f"{record.number} {record.digest}"


def faults(records: Sequence[Record], anchor: str) -> list[str]:
    """What is wrong with a log, in words; nothing if it is whole.

    Args:
        records: all of them, in order.
        anchor: what `anchor_of` gave for a record of this log; "" if nothing was kept.
    """
    found = []
    previous = ""
    for place, record in enumerate(records, 1):
        if record.number != place and (place == 1 or record.number != records[place - 2].number + 1):
            found.append(f"before record {record.number} records are missing")
        if record.content.get("number") != record.number:
            found.append(f"record {record.number} says that it is record {record.content.get('number')}")
        if record.content.get("previous") != previous:
            found.append(f"record {record.number} does not follow from the one before it: one of the two was changed")
        previous = record.digest
    if anchor:
        number, _, digest = anchor.partition(" ")
        by_number = {str(record.number): record.digest for record in records}
        if number not in by_number:
            found.append(f"record {number} is gone, though the registry remembers it: the end of the log was cut off")
        elif by_number[number] != digest:
            found.append(f"record {number} is not the one that the registry remembers")
    return found
