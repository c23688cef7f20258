"""The parts of a ranking, checked: prompt, completions, ranks, and who ranked when. A wrong value is `Rejected`, never repaired."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from components.ingest_rankings.rows import Rejected, shown
from components.rlhf.records import Message


def check_prompt(prompt: list[Message]) -> None:
    """At least one message, none blank, the last one the user's."""
    said = [message["content"].strip() for message in prompt]
    if not any(said):
        raise Rejected("empty prompt", shown(prompt))
    if not all(said):
        number = next(number for number, text in enumerate(said) if not text)
        raise Rejected("empty turn in the prompt", f"turn {number + 1}, {prompt[number]['role']}")
    if prompt[-1]["role"] != "user":
        raise Rejected("prompt does not end with the user", f"last role {prompt[-1]['role']}")


def check_completions(completions: list[Any]) -> None:
    """K >= 2 texts, none blank, no two the same but for white space around them."""
    if len(completions) < 2:
        raise Rejected("fewer than two completions", shown(completions))
    said = set()
    for number, text in enumerate(completions):
        if not isinstance(text, str):
            raise Rejected("a completion is not a text", f"completion {number + 1}: {shown(text)}")
        bare = text.strip()
        if not bare:
            raise Rejected("empty completion", f"completion {number + 1}: {shown(text)}")
        said.add(bare)
    if len(said) == len(completions):
        return
    seen: dict[str, int] = {}
    for number, text in enumerate(completions):
        if (first := seen.setdefault(text.strip(), number)) != number:
            raise Rejected("identical completions", f"completions {first + 1} and {number + 1}: {shown(text)}")


def check_ranks(ranks: list[int], completions: int) -> None:
    """1 is the best; after a tie the next rank is one more (dense: 1, 1, 2) or counts the tied (competition: 1, 1, 3)."""
    if len(ranks) != completions:
        raise Rejected("not one rank per completion", f"{len(ranks)} ranks {shown(ranks)} for {completions} completions")
    dense = competition = True
    distinct, last = 0, None
    for place, rank in enumerate(sorted(ranks), 1):
        if rank != last:
            distinct, last = distinct + 1, rank
            dense, competition = dense and rank == distinct, competition and rank == place
    if not (dense or competition):
        raise Rejected("ranks are not a ranking", f"{shown(ranks)}; expected 1 = best without gaps, but after ties")


# -- who ranked, and when --------------------------------------------------------------------------------------------------


def optional_text(row: dict[str, Any], field: str) -> str | None:
    """A text that is not blank; a whole number, as many tools number raters and rows, is its decimal text."""
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, str) and value.isascii() and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise Rejected(f"{field} is not a text", shown(value))
    value.encode()  # a lone surrogate is no text: UnicodeEncodeError
    return value


def utc_time(value: Any) -> str | None:
    """ISO 8601 in UTC. A time without its zone is refused: it could be any of 26 hours."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(moment, datetime) or moment.tzinfo is None:
            raise ValueError
        if moment.tzinfo is UTC:  # as most are: no arithmetic
            return moment.isoformat().removesuffix("+00:00") + "Z"
        return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
    except (ValueError, OverflowError) as error:
        raise Rejected("collected_at is not a time with a zone", f"{shown(value)}; expected like 2026-01-31T12:00:00Z") from error


def confidence_of(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise Rejected("confidence is not in (0, 1]", shown(value))
    return float(value)


def policies_of(value: Any, completions: int) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != completions or not all(isinstance(p, str) and p.strip() for p in value):
        raise Rejected("not one policy name per completion", f"{shown(value)} for {completions} completions")
    return list(value)
