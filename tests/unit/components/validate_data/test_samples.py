"""Near duplicates of held-out prompts are found in training, and languages told apart."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.validate_data import samples
from components.validate_data.samples import Leaks, Sample, languages
from components.validate_data.stage import Config
from tests.unit.components.validate_data.snapshots import facts_of, ranking, user

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 6)) for i in range(500)]


def sentences(seed: int, count: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.choices(WORDS, k=30) for _ in range(count)]


def leaky(held_out: int, leaks: int) -> list[Any]:
    """Held-out prompts, the first of which are in training with one word changed, among other prompts."""
    texts = sentences(1, held_out)
    changed = [[*words[:15], "different", *words[16:]] for words in texts[:leaks]]
    rows = [(" ".join(words), "test") for words in texts]
    rows += [(" ".join(words), "train") for words in [*changed, *sentences(2, 100)]]
    return [ranking(number, prompt=user(text), split=split) for number, (text, split) in enumerate(rows)]


def test_a_held_out_prompt_with_one_word_changed_in_training_is_found() -> None:
    facts = facts_of(leaky(held_out=50, leaks=4), config=Config())
    assert facts.estimates["near_duplicate_fraction"].value == pytest.approx(4 / 50)
    assert facts.whole["near_duplicate_fraction"] == facts.estimates["near_duplicate_fraction"].low > 0.01
    assert len(facts.examples["near_duplicate_fraction"]) == 4
    assert all(float(example.rpartition(" ")[2]) >= 0.8 for example in facts.examples["near_duplicate_fraction"])
    strict = facts_of(leaky(50, 4), config=Config(near_duplicate_similarity=0.99))
    assert strict.estimates["near_duplicate_fraction"].value == 0


def test_without_leaks_there_are_none_and_an_equal_prompt_is_not_near() -> None:
    assert facts_of(leaky(held_out=50, leaks=0), config=Config()).estimates["near_duplicate_fraction"].value == 0
    same = facts_of([ranking(0), ranking(1, prompt=user("question 0"), split="train")])
    assert same.estimates["near_duplicate_fraction"].value == 0
    assert same.whole["leaked_rankings"] == 2
    assert "no held-out prompt" in facts_of([ranking(1)]).unknown["near_duplicate_fraction"]


def test_texts_of_one_pattern_cost_a_bounded_number_of_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is a candidate for everything: 60 x 200 pairs, of which few are near."""
    base = " ".join(sentences(3, 1)[0])
    rng = random.Random(4)
    texts = [f"{base} {' '.join(rng.choices(WORDS, k=9))}" for _ in range(260)]
    monkeypatch.setattr(samples, "COMPARISONS", 500)
    leaks = Leaks(dict(enumerate(texts[:60])), 0.95)
    hashes = np.arange(100, 300, dtype=np.uint64)
    for first in range(0, 200, 50):
        leaks.see(hashes[first : first + 50], pa.array(texts[60 + first : 110 + first]), first, np.ones(50, dtype=bool))
    assert leaks.compared == 500


def test_the_sample_is_the_same_in_whatever_order_the_prompts_come() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 3000, dtype=np.uint64)
    found = []
    for order in (np.arange(3000), np.random.default_rng(1).permutation(3000)):
        sample = Sample(50)
        for part in np.split(order, 30):
            sample.see(hashes[part], pa.array([f"text {number}" for number in part]))
        sample.close()
        found.append(sample.texts)
    assert found[0] == found[1]
    assert len(found[0]) == 50
    few = Sample(50)
    few.see(hashes[:3], pa.array(["a", "b", "c"]))
    few.see(hashes[:3], pa.array(["a", "b", "c"]))
    few.close()
    assert sorted(few.texts.values()) == ["a", "b", "c"]


ENGLISH = "My order has not arrived yet, can you tell me where it is and when I will get it?"
GERMAN = "Meine Bestellung ist noch nicht angekommen, können Sie mir bitte sagen, wo sie gerade ist?"
FRENCH = "Ma commande n'est pas encore arrivée, pouvez-vous me dire où elle se trouve en ce moment ?"


def test_languages_are_told_apart_and_too_short_texts_left_out() -> None:
    assert languages([ENGLISH, ENGLISH, GERMAN, FRENCH, "ok", "12345 67890 12345 67890 12345"]) == {"en": 2, "de": 1, "fr": 1}


def test_prompts_in_other_languages_are_counted() -> None:
    texts = [ENGLISH] * 6 + [GERMAN] * 3 + [FRENCH]
    rows = [ranking(number, prompt=user(f"{text} {number}")) for number, text in enumerate(texts)]
    facts = facts_of(rows, config=Config())
    assert facts.estimates["other_language_fraction"].value == pytest.approx(4 / 10)
    assert facts.examples["other_language_fraction"] == ["de: 3 of 10", "fr: 1 of 10"]
    both = facts_of(rows, config=Config(languages=["en", "de"]))
    assert both.estimates["other_language_fraction"].value == pytest.approx(1 / 10)
    wrong = facts_of(rows, config=Config(languages=["it"]))
    assert wrong.estimates["other_language_fraction"].value == 1
