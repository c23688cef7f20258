"""Band keys find what is similar as often as the theory says, and the similarity is Jaccard's."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf import near_duplicates
from components.rlhf.near_duplicates import BANDS, band_keys, mix, shingles, similarity

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 6)) for i in range(500)]


def sentence(rng: random.Random) -> list[str]:
    return rng.choices(WORDS, k=40)


def test_similarity_by_hand() -> None:
    assert shingles("abcdefg") == {b"abcde", b"bcdef", b"cdefg"}
    assert similarity(shingles("abcdefg"), shingles("abcdefgh")) == pytest.approx(3 / 4)
    assert similarity(shingles("ABC  defg "), shingles("abc defg")) == 1
    assert shingles("ab") == {b"ab"}
    assert shingles("") == {b""}
    assert similarity(shingles("ab"), shingles("cd")) == 0


def test_equal_texts_have_equal_keys_whatever_their_case_and_spaces() -> None:
    keys = band_keys(["How do I\nreset it?", " how do i reset IT? ", "something else entirely", "", "a", "A"])
    assert keys.shape == (6, BANDS)
    assert (keys[0] == keys[1]).all()
    assert (keys[4] == keys[5]).all()
    assert len(np.unique(keys)) == 4 * BANDS, "no key of one column is one of another"
    assert band_keys([]).shape == (0, BANDS)


def test_keys_do_not_depend_on_the_texts_around() -> None:
    rng = random.Random(1)
    texts = ["", "x", "日本語のテキスト", *(" ".join(sentence(rng)) for _ in range(30)), "abcd"]
    alone = np.concatenate([band_keys([text]) for text in texts])
    assert (band_keys(texts) == alone).all()
    assert (band_keys(pa.array(texts)[3:]) == alone[3:]).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    texts = [" ".join(sentence(rng)) for _ in range(20)]
    whole = band_keys(texts)
    monkeypatch.setattr(near_duplicates, "CHUNK_BYTES", 300)
    assert (band_keys(texts) == whole).all()


@pytest.mark.parametrize("changed", [2, 8])
def test_candidates_are_found_as_often_as_their_similarity_says(changed: int) -> None:
    rng, hits, expected = random.Random(changed), 0, 0.0
    for _ in range(300):
        words = sentence(rng)
        other = list(words)
        for place in rng.sample(range(len(words)), changed):
            other[place] = rng.choice(WORDS)
        one, two = band_keys([" ".join(words), " ".join(other)])
        hits += bool((one == two).any())
        expected += 1 - (1 - similarity(shingles(" ".join(words)), shingles(" ".join(other))) ** 5) ** 16
    assert abs(hits - expected) < 4 * (expected * (1 - expected / 300)) ** 0.5 + 1


@given(st.lists(st.integers(0, 2**64 - 1), unique=True))
def test_mixing_keeps_different_numbers_different(numbers: list[int]) -> None:
    assert len(np.unique(mix(np.array(numbers, dtype=np.uint64)))) == len(numbers)
