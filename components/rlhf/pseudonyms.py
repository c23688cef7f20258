"""Raters under pseudonyms: the same person has the same one in every snapshot, and nobody without the salt can tell who it is."""

from __future__ import annotations

import hashlib
import hmac

from components.rlhf.records import UNKNOWN_RATER

SALT_CHARACTERS = 16  # at least: with a guessed salt every name on a list of employees can be tried
PREFIX, DIGEST_CHARACTERS = "rater-", 16  # 64 bits: two of a million raters share a pseudonym with a chance of 3 in 100 million


def pseudonym(rater_id: str, salt: str) -> str:
    """A name for a rater that depends on the id and the salt alone: "rater-" and 16 hexadecimal digits of HMAC-SHA256.

    "unknown" stays what it is, for nobody is behind it. The same salt must be kept for all snapshots that are merged or compared:
    under another one everybody is a new rater.

    Raises:
        ValueError: the salt is shorter than 16 characters, and so can be guessed; an empty one would be no secret at all.
    """
    if len(salt) < SALT_CHARACTERS:
        raise ValueError(f"the salt of the raters' pseudonyms has {len(salt)} characters, and {SALT_CHARACTERS} are needed")
    if rater_id == UNKNOWN_RATER:
        return rater_id
    digest = hmac.new(salt.encode(), rater_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
    return PREFIX + digest[:DIGEST_CHARACTERS]
