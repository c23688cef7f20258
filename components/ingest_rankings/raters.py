"""Raters under pseudonyms, before anything else sees them: the content digest, the search for personal data, the quarantine.

`kept` leaves every id as it is. `hashed` puts `pseudonym(id, salt)` in its place: in `rater_id`; in a `ranking_id` in which the id
stands as a word of its own, as some tools write it; and in rows that go to quarantine, under each field that is known to name a
person. The salt comes from the environment and goes nowhere: a fingerprint of it is kept, by which a changed salt is noticed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jmespath
import orjson

from components.ingest_rankings.rows import Rejected
from components.rlhf.pseudonyms import SALT_CHARACTERS, pseudonym
from components.rlhf.records import UNKNOWN_RATER
from components.services.exits import DoNotRetry

KNOWN = 100_000  # raters whose pseudonym is remembered
# Fields that name a person: the native forms' and the ratings'; Label Studio's; Argilla's; those of Surge AI and other crowds.
PERSONS = frozenset(
    {
        *("rater_id", "rater", "annotator", "annotators", "annotator_id", "reviewer", "reviewer_id", "labeler", "labeler_id"),
        *("completed_by", "updated_by", "last_created_by", "created_username", "created_by", "email", "username"),
        *("user_id", "worker", "worker_id", "workers"),
    }
)
_PERSONS_SUFFIX = ".users"  # Argilla's flat rows: `rank.responses.users`
_PURPOSE = b"rankloop: which salt the raters' pseudonyms were made with"
_SHOWN_WHOLE = 60  # characters of an id that messages do not cut


def salt_of(rater_ids: str, variable: str) -> str:
    """The salt, or "" where ids are kept.

    Raises:
        DoNotRetry: ids are hashed, and the variable is not set or holds what can be guessed.
    """
    if rater_ids == "kept":
        return ""
    salt = os.environ.get(variable, "")
    if len(salt) < SALT_CHARACTERS:
        found = f"has {len(salt)} characters, and {SALT_CHARACTERS} are needed" if salt else "is not set"
        raise DoNotRetry(
            f"rater_ids = 'hashed': the salt of the raters' pseudonyms, {variable}, {found}",
            "put a random text there and keep it, for under another one everybody is a new rater (in a cluster from a secret; "
            f"`rankloop run` keeps its own), such as {variable}=$(openssl rand -hex 32); "
            "or set ingest_rankings.rater_ids to kept if the ids are pseudonyms already",
        )
    return salt


def salt_fingerprint(salt: str) -> str:
    """Another one for every salt, from which the salt cannot be told (HMAC-SHA256); "" where there is none."""
    return hmac.new(salt.encode(), _PURPOSE, hashlib.sha256).hexdigest()[:32] if salt else ""


class Raters:
    """Gives raters their pseudonyms; without a salt everybody keeps their id.

    Args:
        salt: as from `salt_of`.
        columns: the profile's column map; fields that its `rater_id` names are masked in quarantined rows, too.
    """

    def __init__(self, salt: str = "", columns: Mapping[str, str] | None = None) -> None:
        self.salt = salt
        self._known: dict[str, str] = {}
        expression = (columns or {}).get("rater_id")
        self._fields = set(_fields_of(jmespath.compile(expression).parsed)) if expression else set()
        self.fingerprint = salt_fingerprint(salt)

    def named(self, rater_id: str) -> str:
        """What the rater is called in the snapshot."""
        if not self.salt:
            return rater_id
        found = self._known.get(rater_id)
        if found is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            found = self._known[rater_id] = pseudonym(rater_id, self.salt)
        return found

    def in_ranking_id(self, ranking_id: str, rater_id: str) -> str:
        """The id of a ranking with the pseudonym where the rater's own id is a word of it."""
        if not self.salt or rater_id == UNKNOWN_RATER or rater_id not in ranking_id:
            return ranking_id
        return _word(rater_id).sub(self.named(rater_id), ranking_id)

    def redacted(self, problem: Rejected, raw: Any) -> tuple[Rejected, Any]:
        """What may be kept of a row that is no ranking: persons in it by their pseudonyms, and no detail in which one stands.

        What is no JSON object, such as a line that is cut off, has no fields to know a person by: it is kept by file and row alone.
        """
        if not self.salt:
            return problem, raw
        try:
            value = orjson.loads(raw) if isinstance(raw, bytes) else raw
        except orjson.JSONDecodeError:
            return problem, b""
        if not isinstance(value, dict):
            return type(problem)(problem.reason, "not told: a rater's id may be in it"), b""
        ids: set[str] = set()
        try:
            clean = self._masked(value, ids)
        except RecursionError:  # nested as no row is
            return type(problem)(problem.reason), b""
        if any(len(each) > _SHOWN_WHOLE or _word(each).search(problem.detail) for each in ids if each):
            problem = type(problem)(problem.reason, "not told: the rater's id is in it")
        return problem, clean

    def _masked(self, value: Any, ids: set[str], person: bool = False) -> Any:
        """The value with persons masked, whose ids are added to `ids`; of a `person` everything is, also an address."""
        if isinstance(value, dict):
            return {key: self._masked(item, ids, person or self._names_person(key, item)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._masked(item, ids, person) for item in value]
        if not person or value is None or isinstance(value, bool):
            return value
        ids.add(str(value))
        return self.named(str(value))

    def _names_person(self, key: Any, item: Any) -> bool:
        if key in PERSONS or str(key).endswith(_PERSONS_SUFFIX):
            return True
        items = item if isinstance(item, list) else [item]
        return key in self._fields and not any(isinstance(each, dict) for each in items)  # `rows[0].worker` only leads through rows


EVERYBODY_KEPT = Raters()


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])")


def _fields_of(node: Any) -> Iterator[str]:
    """The fields that a parsed JMESPath expression names."""
    if isinstance(node, dict):
        if node["type"] == "field":
            yield node["value"]
        for child in node["children"]:
            yield from _fields_of(child)
