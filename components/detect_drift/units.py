"""What is counted once: units of the tests, out of rankings. Pure.

Rankings of one prompt are not independent, nor are those that one rater makes in a row, and a test that takes them for independent
sees drift where a person had a long day. So a unit is

    a prompt, with the first of its rankings      prompts, completions, preferences
    a prompt, with its first two rankings         raters: agreement
    a rater on one day, with the first ranking    raters: mix

and comes once: a prompt of the champion's snapshot, or of an earlier look, is no new unit. First is by time, then by digest. What
remains is an assumption: prompts come by chance. A campaign on one topic is drift, and is meant to be seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from components.detect_drift.watch import chance
from components.rlhf.records import Ranking, prompt_key
from components.services.launch import json_digest

Unit = TypeVar("Unit", bound=tuple[Any, ...])
RATER_SMOOTHING = 0.5  # of a ranking: a rater whom nobody knows is less common than one who was seen once


class Dated(NamedTuple):
    """A ranking and the digest of its content."""

    digest: str
    ranking: Ranking

    @property
    def order(self) -> tuple[str, str]:
        """By time of collection, then by digest; rankings without a time come first."""
        return self.ranking.collected_at or "", self.digest


def digest_of(ranking: Ranking) -> str:
    """SHA-256 of a ranking's content. The split is no part of it: the same ranking may be split anew in another snapshot."""
    return json_digest({name: value for name, value in ranking._asdict().items() if name != "split"})


class TextUnit(NamedTuple):
    """A prompt with its first ranking."""

    key: str
    dated: Dated


class AgreementUnit(NamedTuple):
    """A prompt with its first two rankings: the later one, and the share of comparable pairs that it turns round."""

    key: str
    dated: Dated
    disagreement: float


class RaterUnit(NamedTuple):
    """A rater on one day."""

    key: str
    dated: Dated


def text_units(rankings: Iterable[Dated], known: frozenset[str] | set[str] = frozenset()) -> list[TextUnit]:
    """The first ranking of every prompt whose key is not `known`, in order."""
    first: dict[str, Dated] = {}
    for each in rankings:
        key = prompt_key(each.ranking.prompt)
        if key not in known and (key not in first or each.order < first[key].order):
            first[key] = each
    return sorted((TextUnit(key, each) for key, each in first.items()), key=lambda unit: unit.dated.order)


def agreement_units(rankings: Iterable[Dated], known: frozenset[str] | set[str] = frozenset()) -> list[AgreementUnit]:
    """The first two rankings, by different raters, of every prompt that has them and is not `known`, in order of the second."""
    by_prompt: dict[str, list[Dated]] = {}
    for each in rankings:
        by_prompt.setdefault(prompt_key(each.ranking.prompt), []).append(each)
    found = []
    for key, several in by_prompt.items():
        if key in known or len(several) < 2:
            continue
        several.sort(key=lambda each: each.order)
        one = several[0]
        other = next((each for each in several if each.ranking.rater_id != one.ranking.rater_id), None)
        if other is not None and not math.isnan(share := disagreement(one.ranking, other.ranking)):
            found.append(AgreementUnit(key, other, share))
    return sorted(found, key=lambda unit: unit.dated.order)


def disagreement(one: Ranking, other: Ranking) -> float:
    """Share of pairs of common completions that both order strictly and oppositely; NaN if both order none strictly."""
    ranks = dict(zip(one.completions, one.ranks, strict=True))
    common = [(ranks[text], rank) for text, rank in zip(other.completions, other.ranks, strict=True) if text in ranks]
    signs = [(a - c) * (b - d) for i, (a, b) in enumerate(common) for c, d in common[:i]]
    strict = [sign for sign in signs if sign]
    return sum(sign < 0 for sign in strict) / len(strict) if strict else math.nan


def rater_day(ranking: Ranking, digest: str) -> str:
    """Key of a rater on the day (UTC) of a ranking; one without a time has a key of its own."""
    return json_digest([ranking.rater_id, ranking.collected_at[:10] if ranking.collected_at else digest])


def rater_units(rankings: Iterable[Dated], known: frozenset[str] | set[str] = frozenset()) -> list[RaterUnit]:
    """The first ranking of every rater on every day; a ranking without a time is a unit of its own."""
    first: dict[str, Dated] = {}
    for each in rankings:
        key = rater_day(each.ranking, each.digest)
        if key not in known and (key not in first or each.order < first[key].order):
            first[key] = each
    return sorted((RaterUnit(key, each) for key, each in first.items()), key=lambda unit: unit.dated.order)


def rater_counts(units: Iterable[RaterUnit]) -> dict[str, int]:
    """Days of each rater."""
    return dict(Counter(unit.dated.ranking.rater_id for unit in units))


def rarity(rater_id: str, counts: Mapping[str, int]) -> float:
    """-log of the share of days that are this rater's: largest for one who is not in `counts`."""
    total = sum(counts.values()) + RATER_SMOOTHING
    return -math.log((counts.get(rater_id, 0) + RATER_SMOOTHING) / total)


def halves(keys: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of reference units that teach, and of those that go into the bag: by a hash of the key."""
    sides: tuple[list[int], list[int]] = ([], [])
    for index, key in enumerate(keys):
        sides[chance("half", key) > 0.5].append(index)
    return sides


def sample(units: Sequence[Unit], most: int) -> list[Unit]:
    """At most so many units, chosen by a hash of their key, which is their first field."""
    return sorted(units, key=lambda unit: chance("sample", str(unit[0])))[:most]
