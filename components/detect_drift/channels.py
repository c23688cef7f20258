"""The four channels of a watch and the seven tests in them: what each calls strange, and what it keeps between looks.

    prompts, completions   novelty: distance to the nearest reference texts; classifier: what tells new texts from old
    preferences            loss of the champion's reward model, against its loss on rankings that it was not trained on
    raters                 mix: raters whom the reference hardly knows; agreement: second opinions that turn the first one round

Correction over channels: the probability that ANY test EVER raises a false alarm is at most the sum of their shares of alpha. Each
channel has an equal share, and so has each test in it. The mean of e-processes, which costs no more, would be allowed if all were
martingales in one filtration (Vovk and Wang 2021, arXiv 1912.06116; Choe and Ramdas 2024, arXiv 2402.09698). These are not: the
places of a unit under several scores tell together more about the bag than each alone, so a rank is uniform given the earlier
ranks of its own test, and need not be given those of the others.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from components.detect_drift.betting import Floats
from components.detect_drift.features import Judgement, TextFeatures
from components.detect_drift.scores import Standard, novelty, standardise
from components.detect_drift.units import (
    AgreementUnit,
    Dated,
    RaterUnit,
    TextUnit,
    agreement_units,
    halves,
    rarity,
    rater_counts,
    rater_units,
    sample,
    text_units,
)
from components.detect_drift.watch import Arrays, Bet, Learned, Ranked
from components.rlhf.records import Ranking, prompt_key

CHANNELS: dict[str, tuple[str, ...]] = {
    "prompts": ("novelty", "classifier"),
    "completions": ("novelty", "classifier"),
    "preferences": ("loss",),
    "raters": ("mix", "agreement"),
}
LEAST_UNITS = 20  # of reference in a bag, or to learn from: with fewer no p-value is below 0.05
EXAMPLES = 5  # kept of each test
EXCERPT = 400  # characters of a text

_log = logging.getLogger(__name__)

AnyUnit = TextUnit | AgreementUnit | RaterUnit
Read = Callable[[Sequence[Ranking]], TextFeatures]
Judge = Callable[[Sequence[Ranking]], list[Judgement]]


class Eyes(NamedTuple):
    """How texts are read and preferences judged: the champion's models in production."""

    read: Read
    judge: Judge


class Known(NamedTuple):
    """Keys of units that were counted: those of the champion's snapshot, or those of earlier looks. Each comes once."""

    rankings: set[str]
    prompts: set[str]
    rater_days: set[str]


class Watch:
    """The state of all tests against one champion.

    Attributes:
        tests: by "channel: test", those that can be made.
        missing: why the others cannot.
        examples: of each test, the units that added most to its evidence.
        margins: of the preferences channel, (sizes, margins) of the reference and of the new units.
    """

    def __init__(self) -> None:
        self.tests: dict[str, Ranked | Learned] = {}
        self.missing: dict[str, str] = {}
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.maps: dict[str, tuple[Standard, Floats]] = {}  # channel -> features to points, and the points that taught novelty
        self.raters: dict[str, int] = {}
        self.margins: dict[str, list[list[float]]] = {"reference": [], "new": []}
        self.seen = Known(set(), set(), set())
        self.agreements: set[str] = set()  # prompts whose second opinion was counted

    # -- the reference ---------------------------------------------------------------------------------------------------

    @classmethod
    def begin(cls, reference: Sequence[Dated], eyes: Eyes, channels: Sequence[str], alpha: float, most: int) -> Watch:
        """A watch before its first look.

        Args:
            reference: rankings of the champion's snapshot, at least all those of the units that are chosen.
            channels: some of `CHANNELS`.
            alpha: probability of ever a false alarm, over all channels.
            most: reference units of a channel, chosen by hash.
        """
        watch = cls()
        share = {f"{name}: {test}": alpha / len(channels) / len(CHANNELS[name]) for name in channels for test in CHANNELS[name]}
        texts = text_units(reference)
        if {"prompts", "completions"} & set(channels):
            watch._begin_texts(sample(texts, most), eyes.read, share)
        if "preferences" in channels:
            held_out = [unit for unit in texts if unit.dated.ranking.split == "test"]
            watch._begin_preferences(sample(held_out, most), eyes.judge, share)
        if "raters" in channels:
            watch._begin_raters(reference, share, most)
        return watch

    def _enough(self, name: str, units: int) -> bool:
        """Whether a test can be made; if not, why is kept."""
        if units < LEAST_UNITS:
            self.missing[name] = f"{units} reference units, and it takes {LEAST_UNITS}"
            _log.warning("%s is not watched: %s", name, self.missing[name])
        return units >= LEAST_UNITS

    def _begin_texts(self, units: Sequence[TextUnit], read: Read, share: Mapping[str, float]) -> None:
        features = read([unit.dated.ranking for unit in units])
        fits = np.flatnonzero(np.isfinite(features.prompts_ND).all(axis=1)).tolist()
        units = [units[i] for i in fits]
        teaching, bagged = halves([unit.key for unit in units])
        kinds = [units[i].dated.ranking.split for i in bagged]
        for channel, features_ND in (("prompts", features.prompts_ND[fits]), ("completions", features.completions_ND[fits])):
            strange, learned = f"{channel}: novelty", f"{channel}: classifier"
            smaller = min(len(teaching), len(bagged))
            if strange in share and self._enough(strange, smaller) and self._enough(learned, smaller):
                standard = standardise(features_ND[teaching])
                points = standard(features_ND)
                taught, ranked = points[teaching], points[bagged]
                self.maps[channel] = standard, taught
                self.tests[strange] = Ranked(strange, share[strange], kinds, novelty(ranked, taught))
                self.tests[learned] = Learned(learned, share[learned], taught, kinds, ranked)

    def _begin_preferences(self, units: Sequence[TextUnit], judge: Judge, share: Mapping[str, float]) -> None:
        name = "preferences: loss"
        judged = [each for each in judge([unit.dated.ranking for unit in units]) if each.margins]
        self.margins["reference"] = [each.margins for each in judged]
        if self._enough(name, len(judged)):
            self.tests[name] = Ranked(name, share[name], [""] * len(judged), np.array([each.loss for each in judged]))

    def _begin_raters(self, reference: Sequence[Dated], share: Mapping[str, float], most: int) -> None:
        mix, agreement = "raters: mix", "raters: agreement"
        days = sample(rater_units(reference), most)
        teaching, bagged = halves([unit.key for unit in days])
        self.raters = rater_counts([days[i] for i in teaching])
        if self._enough(mix, min(len(teaching), len(bagged))):
            scores = np.array([rarity(days[i].dated.ranking.rater_id, self.raters) for i in bagged])
            self.tests[mix] = Ranked(mix, share[mix], [""] * len(scores), scores)
        agreed = sample(agreement_units(reference), most)
        if self._enough(agreement, len(agreed)):
            shares = np.array([unit.disagreement for unit in agreed])
            self.tests[agreement] = Ranked(agreement, share[agreement], [""] * len(shares), shares)

    # -- a look ----------------------------------------------------------------------------------------------------------

    def look(self, since: Sequence[Dated], known: Known, eyes: Eyes) -> int:
        """Bets on every new unit among these rankings, once; gives the number of rankings that no look had seen.

        Args:
            since: rankings that are not in the champion's snapshot, looked at or not.
            known: what is in the champion's snapshot.
        """
        new = [each for each in since if each.digest not in self.seen.rankings]
        texts = text_units(new, known.prompts | self.seen.prompts)
        named = [test for test in self.tests if test.startswith(("prompts", "completions"))]
        if texts and named:
            self._look_at_texts(texts, eyes.read)
        if texts and "preferences: loss" in self.tests:
            judged = eyes.judge([unit.dated.ranking for unit in texts])
            pairs = [(unit, each) for unit, each in zip(texts, judged, strict=True) if each.margins]
            self.margins["new"] += [each.margins for _, each in pairs]
            self._bet("preferences: loss", [unit for unit, _ in pairs], [each.loss for _, each in pairs])
        if "raters: mix" in self.tests:
            days = rater_units(new, known.rater_days | self.seen.rater_days)
            self._bet("raters: mix", days, [rarity(unit.dated.ranking.rater_id, self.raters) for unit in days])
            self.seen.rater_days.update(unit.key for unit in days)
        if "raters: agreement" in self.tests:
            # A second opinion may come in a later look than the first.
            prompts = {prompt_key(each.ranking.prompt) for each in new}
            several = [each for each in since if prompt_key(each.ranking.prompt) in prompts]
            agreed = agreement_units(several, known.prompts | self.agreements)
            self._bet("raters: agreement", agreed, [unit.disagreement for unit in agreed])
            self.agreements.update(unit.key for unit in agreed)
        self.seen.prompts.update(unit.key for unit in texts)
        self.seen.rankings.update(each.digest for each in new)
        return len(new)

    def _look_at_texts(self, units: Sequence[TextUnit], read: Read) -> None:
        features = read([unit.dated.ranking for unit in units])
        fits = np.flatnonzero(np.isfinite(features.prompts_ND).all(axis=1)).tolist()
        units = [units[i] for i in fits]
        for channel, features_ND in (("prompts", features.prompts_ND[fits]), ("completions", features.completions_ND[fits])):
            if channel in self.maps and units:
                standard, taught = self.maps[channel]
                points = standard(features_ND)
                self._bet(f"{channel}: novelty", units, novelty(points, taught))
                self._bet(f"{channel}: classifier", units, points)

    def _bet(self, name: str, units: Sequence[AnyUnit], scores: Sequence[float] | Floats) -> None:
        by_split = name.startswith(("prompts", "completions"))
        kinds = [unit.dated.ranking.split if by_split else "" for unit in units]
        bets = self.tests[name].look([unit.key for unit in units], kinds, np.asarray(scores, dtype=np.float64))
        found = {unit.key: unit.dated for unit in units}
        new = [example(bet, found[bet.key]) for bet in heapq.nlargest(EXAMPLES, bets, key=lambda bet: bet.gain)]
        kept = self.examples.get(name, []) + new
        self.examples[name] = sorted(kept, key=lambda each: -each["gain"])[:EXAMPLES]

    @property
    def alarms(self) -> list[str]:
        """Names of the tests whose evidence has ever reached its limit."""
        return [name for name, test in self.tests.items() if test.alarmed]

    # -- between looks ---------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What a person reads in the state."""
        return {
            "tests": {name: {"kind": type(test).__name__, **test.facts()} for name, test in self.tests.items()},
            "missing": self.missing,
            "examples": self.examples,
            "raters": self.raters,
        }

    def arrays(self) -> Arrays:
        """What only a program reads: scores, features, and the keys of what was counted."""
        found: Arrays = {}
        for name, test in self.tests.items():
            found |= {f"{name}/{key}": value for key, value in test.arrays().items()}
        for channel, (standard, taught) in self.maps.items():
            found |= {f"{channel}/mean": standard.mean_D, f"{channel}/map": standard.map_DC, f"{channel}/taught": taught}
        for side, margins in self.margins.items():
            found[f"margins/{side}"] = np.array([each for one in margins for each in one], dtype=np.float64)
            found[f"margins/{side}/sizes"] = np.array([len(one) for one in margins], dtype=np.int64)
        keys = {**self.seen._asdict(), "agreements": self.agreements}
        for kind, values in keys.items():
            found[f"seen/{kind}"] = np.frombuffer(bytes.fromhex("".join(sorted(values))), dtype=np.uint8).copy()
        return found

    @classmethod
    def restore(cls, facts: Mapping[str, Any], arrays: Arrays) -> Watch:
        """Raises ValueError if this code bets otherwise than the code that wrote it."""
        watch = cls()
        watch.missing, watch.raters = dict(facts["missing"]), dict(facts["raters"])
        watch.examples = {name: list(each) for name, each in facts["examples"].items()}
        for name, each in facts["tests"].items():
            kind = Ranked if each["kind"] == "Ranked" else Learned
            own = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
            watch.tests[name] = kind.restore(name, each, own)
        for channel in ("prompts", "completions"):
            if f"{channel}/mean" in arrays:
                standard = Standard(arrays[f"{channel}/mean"], arrays[f"{channel}/map"])
                watch.maps[channel] = standard, arrays[f"{channel}/taught"]
        for side in watch.margins:
            ends = np.cumsum(arrays[f"margins/{side}/sizes"])[:-1]
            parts = np.split(arrays[f"margins/{side}"], ends) if len(arrays[f"margins/{side}/sizes"]) else []
            watch.margins[side] = [each.tolist() for each in parts]
        keys = {kind: set(_hexes(arrays[f"seen/{kind}"])) for kind in (*Known._fields, "agreements")}
        watch.agreements = keys.pop("agreements")
        watch.seen = Known(**keys)
        return watch


def example(bet: Bet, dated: Dated) -> dict[str, Any]:
    """A unit's part in the evidence with its texts, for people."""
    ranking = dated.ranking
    best = ranking.completions[ranking.ranks.index(min(ranking.ranks))]
    return {
        "gain": bet.gain,
        "p": bet.p,
        "score": bet.score,
        "digest": dated.digest,
        "rater": ranking.rater_id,
        "collected_at": ranking.collected_at,
        "prompt": ranking.prompt[-1]["content"][:EXCERPT],
        "ranked_first": best[:EXCERPT],
    }


def _hexes(array: np.ndarray) -> list[str]:
    text = array.tobytes().hex()
    return [text[i : i + 64] for i in range(0, len(text), 64)]
