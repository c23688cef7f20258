"""Checks a cron expression as KFP reads it: six fields, the first for seconds (robfig/cron, `Parse`)."""

from __future__ import annotations

import re

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# name, smallest, largest, names; no field counts Sunday as 7.
FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)


def check(expression: str) -> str:
    """The expression with single spaces.

    Raises:
        ValueError: it has not six fields, or one of them is none; the message names it.
    """
    fields = expression.split()
    if len(fields) != len(FIELDS):
        hint = "; a crontab's five fields need the second in front, such as 0" if len(fields) == 5 else ""
        raise ValueError(f"cron {expression!r} has {len(fields)} fields, not six{hint}")
    for text, (name, low, high, names) in zip(fields, FIELDS, strict=True):
        for part in text.split(","):
            _check_part(part, name, low, high, names)
    return " ".join(fields)


def _check_part(part: str, name: str, low: int, high: int, names: tuple[str, ...]) -> None:
    found = re.fullmatch(r"(\*|\?|[0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?(?:/(\d+))?", part)
    if not found:
        raise ValueError(f"{name} = {part!r} is no value, range or step")
    first, last, step = found.groups()
    if first in "*?":
        if last:
            raise ValueError(f"{name} = {part!r} is no range")
        start, end = low, high
    else:
        start = _number(first, part, name, low, high, names)
        end = _number(last, part, name, low, high, names) if last else start
    if end < start:
        raise ValueError(f"{name} = {part!r} ends before it begins")
    if step is not None and int(step) == 0:
        raise ValueError(f"{name} = {part!r} has a step of 0")


def _number(text: str, part: str, name: str, low: int, high: int, names: tuple[str, ...]) -> int:
    lowered = text.lower()
    if lowered in names:
        return names.index(lowered) + low
    if not text.isdigit() or not low <= int(text) <= high:
        raise ValueError(f"{name} = {part!r}: {text} is not between {low} and {high}")
    return int(text)
