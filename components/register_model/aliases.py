"""The aliases of ours as values, and what may be said about them without asking anybody. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from components.register_model.audit import Record

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous_champion"
OWNED = (CHAMPION, CHALLENGER, PREVIOUS)
STRAY_SECONDS = 86_400  # a late request of a process that was given up is looked for this long

Aliases = dict[str, dict[str, str]]  # {model: {alias: version}}


def companion_of(tags: Mapping[str, str]) -> tuple[str, str] | None:
    """Name and version of the reward model that a policy's version was optimised against, from its tags."""
    name, version = tags.get("reward_model_name", ""), tags.get("reward_model_version", "")
    return (name, version) if name and version else None


def exchange(aliases: Aliases, pair: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Moves that make each (model, version) champion, and what was champion before the previous one.

    The reward model's `previous_champion` is the one of the policy's `previous_champion`, even where both have the same.
    """
    moves = []
    for model, to in pair:
        old = aliases.get(model, {}).get(CHAMPION, "")
        moves += [(model, PREVIOUS, old)] if old else []
        moves += [(model, CHAMPION, to)]
    return moves


def applied(aliases: Aliases, moves: Sequence[tuple[str, str, str]]) -> Aliases:
    """The aliases after the moves."""
    after = {model: dict(each) for model, each in aliases.items()}
    for model, alias, to in moves:
        after.setdefault(model, {})[alias] = to
    return {model: {alias: to for alias, to in each.items() if to} for model, each in after.items()}


def differences(expected: Aliases, found: Aliases) -> list[tuple[str, str, str, str]]:
    """(model, alias, expected version, found version) wherever the two are not the same."""
    return [
        (model, alias, *both)
        for model in sorted({*expected, *found})
        for alias in OWNED
        if len(set(both := (expected.get(model, {}).get(alias, ""), found.get(model, {}).get(alias, "")))) > 1
    ]


def strays(records: Sequence[Record], moved: Sequence[tuple[str, str, str, str]], now: float) -> list[tuple[str, str, str, str]]:
    """Those of `moved` that look like a late request: to where a change had moved them that another process finished.

    Args:
        records: the whole log.
        moved: as `differences` gives them.
        now: seconds since the epoch; a change that was finished longer ago than `STRAY_SECONDS` has no late requests any more.
    """
    begun = {record.number: record.content for record in records if record.content["event"] == "begun"}
    late = set()
    for record in records:
        start = begun.get(record.content.get("of", 0))
        if record.content["event"] != "done" or start is None or start["session"] == record.content["session"]:
            continue
        if now - datetime.fromisoformat(record.content["at"]).timestamp() < STRAY_SECONDS:
            late |= {(move["model"], move["alias"], move["to"]) for move in start["moves"]}
    return [move for move in moved if (move[0], move[1], move[3]) in late]
