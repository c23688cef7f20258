"""Pseudonyms are stable, secret without the salt, and never made without a real one."""

from __future__ import annotations

import hashlib
import hmac
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.pseudonyms import pseudonym

SALT = "sixteen characters"


def test_it_is_the_hmac_of_the_id() -> None:
    digest = hmac.new(SALT.encode(), b"ann@example.org", hashlib.sha256).hexdigest()
    assert pseudonym("ann@example.org", SALT) == f"rater-{digest[:16]}"
    assert pseudonym("ann@example.org", SALT) != pseudonym("ann@example.org", SALT + "!")


@given(st.lists(st.text(st.characters(), min_size=1), unique=True))
def test_different_raters_stay_different_and_say_nothing_of_themselves(names: list[str]) -> None:
    made = [pseudonym(name, SALT) for name in names]
    assert len(set(made)) == len(names)
    assert all(name == "unknown" or re.fullmatch("rater-[0-9a-f]{16}", each) for name, each in zip(names, made, strict=True))


def test_nobody_stays_nobody() -> None:
    assert pseudonym("unknown", SALT) == "unknown"


@pytest.mark.parametrize("salt", ["", "short", "x" * 15])
def test_a_salt_that_can_be_guessed_is_refused(salt: str) -> None:
    with pytest.raises(ValueError, match=rf"has {len(salt)} characters, and 16 are needed"):
        pseudonym("ann", salt)
    with pytest.raises(ValueError, match="16 are needed"):
        pseudonym("unknown", salt)
