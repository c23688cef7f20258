"""The tests of one watch: each ranks new units against its bag and bets; none of them learns from what it ranks.

`Ranked` has a score that is fixed from the start. `Learned` learns all the time what tells new from old: of the new units, half
(drawn by a hash of their key) teach the classifier and never enter the bag, the other half are ranked by it. So its p-values are as
valid as with a fixed score, at the price of half of the units.

What a test says does not depend on how its units were cut into looks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from components.detect_drift.betting import Evidence, Floats, no_evidence
from components.detect_drift.ranks import Bag, auc
from components.detect_drift.scores import classifier, classify

FIRST_LESSON = 20  # new units before the classifier is trained at all
LESSON_GROWTH = 1.5  # it is trained again whenever it could learn from half as many more

Arrays = dict[str, np.ndarray]


class Bet(NamedTuple):
    """One unit's part in the evidence: its key, its p-value, its score, and what it added to log E, in nats."""

    key: str
    p: float
    score: float
    gain: float


def chance(purpose: str, key: str) -> float:
    """A number in (0, 1] that looks uniform and belongs to this key: the same in every run, whoever watches."""
    return (int.from_bytes(hashlib.sha256(f"{purpose}:{key}".encode()).digest()[:7], "big") + 1) / 2**56


class Test:
    """Evidence of one test, and the largest that it ever was: an alarm stays an alarm.

    Attributes:
        limit: log E at which it raises the alarm, log(1 / its share of alpha), in nats.
    """

    name = ""

    def __init__(self, name: str, alpha: float) -> None:
        self.name = name
        self.limit = -math.log(alpha)
        self.evidence = no_evidence()
        self.highest = 0.0

    @property
    def log_evidence(self) -> float:
        return float(self.evidence.log_value_R[0])

    @property
    def alarmed(self) -> bool:
        return not self.highest < self.limit

    def _bet(self, ranked: Sequence[tuple[str, float, float]]) -> list[Bet]:
        """Bets on (key, p-value, score) of each unit in order."""
        before = self.log_evidence
        self.evidence, values_N1 = self.evidence.bets_on(np.array([[p] for _, p, _ in ranked]).reshape(-1, 1))
        values = values_N1[:, 0]
        self.highest = max(self.highest, values.max(initial=0.0))
        gains = np.diff(values, prepend=before)
        return [Bet(key, p, score, float(gain)) for (key, p, score), gain in zip(ranked, gains, strict=True)]

    def facts(self) -> dict[str, Any]:
        """What goes into the state's JSON."""
        return {"limit": self.limit, "highest": self.highest, "evidence": self.evidence.to_json()}

    def _restore(self, facts: dict[str, Any]) -> None:
        self.limit, self.highest = float(facts["limit"]), float(facts["highest"])
        self.evidence = Evidence.from_json(facts["evidence"])


class Ranked(Test):
    """Ranks by a score that was fixed from the start; small p-values for high scores.

    Args:
        categories, scores: of the reference units [M].
    """

    def __init__(self, name: str, alpha: float, categories: Sequence[str], scores: Floats) -> None:
        super().__init__(name, alpha)
        self.reference = len(scores)
        self._categories, self._scores = list(categories), [float(each) for each in scores]
        self._bag = Bag(self._categories, self._scores)

    def look(self, keys: Sequence[str], categories: Sequence[str], scores: Floats) -> list[Bet]:
        """Ranks new units in order and bets on each."""
        values = [float(each) for each in scores]
        ranked = [
            (key, self._bag.test(category, score, chance(f"tie of {self.name}", key)), score)
            for key, category, score in zip(keys, categories, values, strict=True)
        ]
        self._categories += categories
        self._scores += values
        return self._bet(ranked)

    def effect(self) -> tuple[float, float, float]:
        """Probability that a new unit scores higher than a reference unit, with its interval."""
        return auc(np.array(self._scores[self.reference :]), np.array(self._scores[: self.reference]))

    def arrays(self) -> Arrays:
        return {"scores": np.array(self._scores), "categories": _texts(self._categories)}

    @classmethod
    def restore(cls, name: str, facts: dict[str, Any], arrays: Arrays) -> Ranked:
        test = cls(name, 1.0, _from_texts(arrays["categories"]), arrays["scores"])
        test._restore(facts)
        test.reference = int(facts["reference"])
        return test

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "reference": self.reference}


class Learned(Test):
    """Ranks by a classifier of new against old that is trained on other units.

    Args:
        old_MC: features of the reference units that teach it.
        categories, points_NC: of the reference units in the bag.
    """

    def __init__(self, name: str, alpha: float, old_MC: Floats, categories: Sequence[str], points_NC: Floats) -> None:
        super().__init__(name, alpha)
        self.reference = len(points_NC)
        self._old_MC = old_MC
        self._new: list[Floats] = []  # teach it
        self._categories, self._points = list(categories), list(points_NC)
        self._taught = 0  # by how many new units
        self._beta: Floats | None = None
        self._bag = Bag([], [])

    def look(self, keys: Sequence[str], categories: Sequence[str], points_NC: Floats) -> list[Bet]:
        """Learns from half of the units, and ranks the others in order; before the first lesson they only join the bag."""
        ranked = []
        for key, category, point in zip(keys, categories, points_NC, strict=True):
            if chance(f"side of {self.name}", key) <= 0.5:
                self._new.append(point)
                if len(self._new) >= max(FIRST_LESSON, LESSON_GROWTH * self._taught):
                    self._learn(len(self._new))
                continue
            if self._beta is not None:
                score = float(classify(point[None], self._beta)[0])
                p = self._bag.test(category, score, chance(f"tie of {self.name}", key))
                ranked.append((key, p, score))
            self._categories.append(category)
            self._points.append(point)
        return self._bet(ranked)

    def _learn(self, units: int) -> None:
        """Trains on the first so many new units, and scores the bag anew."""
        self._taught = units
        self._beta = classifier(self._old_MC, np.array(self._new[:units]))
        self._bag = Bag(self._categories, classify(np.array(self._points), self._beta))

    def effect(self) -> tuple[float, float, float]:
        """The classifier's AUC on units that did not teach it, with its interval; NaN before its first lesson."""
        if self._beta is None:
            return (math.nan,) * 3
        scores = classify(np.array(self._points), self._beta)
        return auc(scores[self.reference :], scores[: self.reference])

    def arrays(self) -> Arrays:
        width = self._old_MC.shape[1]
        return {
            "old": self._old_MC,
            "new": np.array(self._new).reshape(-1, width),
            "points": np.array(self._points).reshape(-1, width),
            "categories": _texts(self._categories),
        }

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "reference": self.reference, "taught": self._taught}

    @classmethod
    def restore(cls, name: str, facts: dict[str, Any], arrays: Arrays) -> Learned:
        test = cls(name, 1.0, arrays["old"], _from_texts(arrays["categories"]), arrays["points"])
        test._restore(facts)
        test.reference, test._new = int(facts["reference"]), list(arrays["new"])
        if facts["taught"]:
            test._learn(int(facts["taught"]))
        return test


def _texts(values: Sequence[str]) -> np.ndarray:
    """Short texts as bytes, one a line: what a file of arrays can hold."""
    return np.frombuffer("\n".join(values).encode(), dtype=np.uint8).copy()


def _from_texts(array: np.ndarray) -> list[str]:
    return array.tobytes().decode().split("\n") if len(array) else []
