"""What becomes of a ranking in whose texts there is personal data, by the profile's policy.

    off         nothing is looked for
    report      the ranking stays as it is; the ingest report counts what was found, by kind, with the first places
    mask        each value becomes a placeholder, and the ranking is checked again
    quarantine  the ranking is rejected

The split of a ranking goes by what the user says first with the personal data in it masked, whatever the policy, so that another
policy moves no prompt from one side to the other, and prompts that are the same once they are masked are on one side.

Under `mask` and `quarantine` nothing that is found is copied out in clear: rows in quarantine.jsonl are masked too, whatever they
were rejected for, and one that is rejected for its personal data is kept by its file and number only.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, Literal

import orjson

from components.ingest_rankings.fields import check_completions
from components.ingest_rankings.formats import Parsed, content_digest, opening, split_of
from components.ingest_rankings.personal_data.find import KINDS, find, may_hold, may_hold_each, plain
from components.ingest_rankings.personal_data.mask import masked, masked_value
from components.ingest_rankings.rows import Rejected
from components.rlhf.records import Message, Ranking

Policy = Literal["off", "report", "mask", "quarantine"]
PLACES = 5  # of each kind, in the report
RATER = "rater_id"
_log = logging.getLogger(__name__)
_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|[nrtbf])")


class _Withheld(Rejected):
    """Rejected for personal data: its detail names kinds and places, and the row is not copied."""


class PersonalData:
    """Looks at each ranking that is accepted, and at each row that is not.

    Args:
        policy: as above.
        region: as in `find`.
        test_fraction: as in `formats.parse`, for the split.

    Attributes:
        found: how often each kind was found in rankings, before duplicates are dropped.
    """

    def __init__(self, policy: Policy, region: str, test_fraction: float) -> None:
        self.found: Counter[str] = Counter()
        self._policy = policy
        self._region = region
        self._test_fraction = test_fraction
        self._rankings = 0
        self._places: list[dict[str, Any]] = []

    def applied(self, file: str, row: int, parsed: Parsed | Rejected) -> Parsed | Rejected:
        """The ranking as the policy leaves it: the same object if nothing is found in it."""
        if self._policy == "off" or isinstance(parsed, Rejected):
            return parsed
        ranking = parsed.ranking
        texts = [*(message["content"] for message in ranking.prompt), *ranking.completions]
        if not may_hold(plain("\n".join(texts)), self._region) and "@" not in ranking.rater_id:
            return parsed
        hits = [(place, hit.kind) for place, text in enumerate(texts) for hit in find(text, self._region)]
        names = _names(ranking)
        found = [(names[place], kind) for place, kind in hits]
        if "@" in ranking.rater_id:
            found += [(RATER, hit.kind) for hit in find(ranking.rater_id)]
        if not found:
            return parsed
        self.count(file, row, found)
        if self._policy == "quarantine":
            return _Withheld("personal data", _described(found))
        if self._policy == "mask" and found[-1][0] == RATER:
            return _Withheld("personal data in rater_id", f"{_described(found)}; give pseudonyms: raters are not masked into one")
        if not parsed.split_given:
            said = masked([opening(ranking.prompt)], self._region)[0]
            ranking = ranking._replace(split=split_of(said, self._test_fraction))
        if self._policy == "mask":
            try:
                ranking = _masked(ranking, masked(texts, self._region))
            except Rejected:
                return _Withheld("completions are the same once personal data is masked", _described(found))
        return parsed._replace(ranking=ranking)

    def worth_a_look(self, rankings: Sequence[Ranking]) -> Iterator[bool]:
        """For each ranking false if `applied` would find nothing."""
        if self._policy == "off":
            return repeat(False, len(rankings))
        texts = ["\n".join([*(message["content"] for message in each.prompt), *each.completions]) for each in rankings]
        held = may_hold_each(texts, self._region)
        return iter([may or "@" in each.rater_id for may, each in zip(held, rankings, strict=True)])

    def redacted(self, problem: Rejected, raw: Any) -> tuple[Rejected, Any]:
        """What may be kept of a row that is no ranking."""
        if isinstance(problem, _Withheld):
            return problem, b""
        if self._policy in ("off", "report"):
            return problem, raw
        try:
            value = orjson.loads(raw) if isinstance(raw, bytes) else raw
        except orjson.JSONDecodeError:
            value = _unescaped(raw.decode("utf-8", "backslashreplace"))
        try:
            clean = masked_value(value, self._region)
        except RecursionError:  # nested as no row is; what cannot be looked at is not copied
            clean = b""
        if clean is not value:
            return Rejected(problem.reason, "not told: there is personal data in the row"), clean
        return problem, raw

    def report(self) -> dict[str, Any]:
        """Counts by kind and the first places of each, for the ingest report, with a warning in the log; no value."""
        found = {kind: self.found[kind] for kind in KINDS if self.found[kind]}
        if found:
            counts = ", ".join(f"{count} of kind {kind}" for kind, count in found.items())
            _log.warning("personal data in %d rankings (policy %s): %s", self._rankings, self._policy, counts)
        return {"policy": self._policy, "rankings": self._rankings, "found": found, "places": self._places}

    def count(self, file: str, row: int, found: list[tuple[str, str]]) -> None:
        """Counts what was found in a ranking, as (field, kind)."""
        self._rankings += 1
        for field, kind in found:
            self.found[kind] += 1
            if self.found[kind] <= PLACES:
                self._places.append({"file": file, "row": row, "field": field, "kind": kind})


def _names(ranking: Ranking) -> list[str]:
    """Where each text of a ranking stands, counted from 0."""
    turns = [f"prompt[{turn}].content" for turn in range(len(ranking.prompt))]
    return turns + [f"completions[{number}]" for number in range(len(ranking.completions))]


def _described(found: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{kind} in {field}" for field, kind in dict.fromkeys(found[:PLACES]))
    return shown if len(found) <= PLACES else f"{shown}, ..."


def _masked(ranking: Ranking, texts: list[str]) -> Ranking:
    """The ranking with these texts; an id that was the digest of its content is that of its new content.

    Raises:
        Rejected: two completions have become the same.
    """
    turns = len(ranking.prompt)
    prompt = [Message(role=message["role"], content=text) for message, text in zip(ranking.prompt, texts[:turns], strict=True)]
    check_completions(texts[turns:])
    changed = ranking._replace(prompt=prompt, completions=texts[turns:])
    if ranking.ranking_id == content_digest(ranking):
        changed = changed._replace(ranking_id=content_digest(changed))
    return changed


def _unescaped(text: str) -> str:
    """A broken line with the characters that JSON's escapes stand for, since a number after \\n looks like a part of a word."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else " ", text)
