"""Whether a policy still does what it is told: prompts whose answer a rule can check, as in IFEval (Zhou 2023, arXiv 2311.07911).

An answer follows a prompt if all of its checks hold (their strict accuracy by prompt). Deviation: the prompts are our own and
short, so that answers of a few dozen tokens can follow them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from components.rlhf.records import Message, messages_of

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_BULLET = re.compile(r"^\s*[-*•]\s+\S")
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|e\.g|i\.e|etc|vs)\.", re.IGNORECASE)


class Instruction(NamedTuple):
    """A prompt, and what an answer must keep to: {check: its argument}."""

    prompt: list[Message]
    checks: dict[str, Any]


def follows(text: str, checks: Mapping[str, Any]) -> bool:
    """Whether an answer keeps to every check; an empty one to none."""
    return bool(text.strip()) and all(CHECKS[name].holds(text.strip(), argument) for name, argument in checks.items())


def instruction_of(row: object) -> Instruction:
    """A line of a file of instructions.

    Raises:
        ValueError: it is no object of a prompt and checks, or a check or its argument is unknown.
    """
    if not isinstance(row, dict) or set(row) != {"prompt", "checks"} or not isinstance(row["checks"], dict) or not row["checks"]:
        raise ValueError("expected an object with the keys prompt and checks, and at least one check")
    for name, argument in row["checks"].items():
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r}; known: {', '.join(CHECKS)}")
        if not CHECKS[name].takes(argument):
            raise ValueError(f"the check {name} does not take {argument!r}")
    return Instruction(messages_of(row["prompt"]), row["checks"])


def instruction_records(instructions: Sequence[Instruction], answers: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The lines of instructions.jsonl: each prompt with its checks, every policy's answer, and whether it follows.

    Args:
        answers: {policy: its answer to each instruction}.
    """
    return [
        {
            "prompt": each.prompt,
            "checks": each.checks,
            "answers": {
                policy: {"text": given[row], "follows": follows(given[row], each.checks)} for policy, given in answers.items()
            },
        }
        for row, each in enumerate(instructions)
    ]


class Check(NamedTuple):
    """Which arguments a check takes, and whether a text (without white space around it) keeps to it."""

    takes: Callable[[Any], bool]
    holds: Callable[[str, Any], bool]


def words(text: str) -> list[str]:
    """Words in lower case; a hyphen or an apostrophe does not part one."""
    return [word.casefold() for word in _WORD.findall(text)]


def sentences(text: str) -> int:
    """Number of sentences: runs of words that end with a full stop, question or exclamation mark, or with the text."""
    plain = _ABBREVIATION.sub("x", text)
    return sum(bool(_WORD.search(part)) for part in re.split(r"[.!?]+(?=[\s\"'”’)]|$)", plain))


def _lines(text: str, pattern: re.Pattern[str]) -> list[str] | None:
    """The lines that are not empty, if all of them are of that form."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines if all(pattern.match(line) for line in lines) else None


def _bullets(text: str, count: int) -> bool:
    return len(_lines(text, _BULLET) or []) == count


def _numbered(text: str, count: int) -> bool:
    numbers = [int(match[1]) for line in _lines(text, _NUMBERED) or [] if (match := _NUMBERED.match(line))]
    return numbers == list(range(1, count + 1))


def _json_keys(text: str, keys: Sequence[str]) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def _contains(text: str, wanted: Sequence[str]) -> bool:
    return {each.casefold() for each in wanted} <= set(words(text))


def _ends_with(text: str, wanted: str) -> bool:
    if not words(wanted):  # a mark
        return text.endswith(wanted)
    return words(text)[-len(words(wanted)) :] == words(wanted)


def _paragraphs(text: str, count: int) -> bool:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == count


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each.strip() for each in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_true(value: Any) -> bool:
    return value is True


CHECKS = {
    "sentences": Check(_is_count, lambda text, count: sentences(text) == count),
    "words": Check(_is_count, lambda text, count: len(words(text)) == count),
    "max_words": Check(_is_count, lambda text, count: 0 < len(words(text)) <= count),
    "min_words": Check(_is_count, lambda text, count: len(words(text)) >= count),
    "paragraphs": Check(_is_count, _paragraphs),
    "bullets": Check(_is_count, _bullets),
    "numbered": Check(_is_count, _numbered),
    "contains": Check(_is_words, _contains),
    "excludes": Check(_is_words, lambda text, unwanted: not {each.casefold() for each in unwanted} & set(words(text))),
    "one_of": Check(_is_words, lambda text, allowed: words(text) in [words(each) for each in allowed]),
    "json_keys": Check(_is_words, _json_keys),
    "starts_with": Check(_is_text, lambda text, wanted: words(text)[: len(words(wanted))] == words(wanted)),
    "ends_with": Check(_is_text, _ends_with),
    "lower_case": Check(_is_true, lambda text, _: text == text.lower() and text != text.upper()),
    "upper_case": Check(_is_true, lambda text, _: text == text.upper() and text != text.lower()),
    "no_commas": Check(_is_true, lambda text, _: "," not in text),
    "quoted": Check(_is_true, lambda text, _: len(text) > 2 and text[0] in '"“' and text[-1] in '"”'),
}
