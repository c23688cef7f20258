"""Prompts that are looked at one by one, a bounded sample: held-out prompts that training knows nearly, and languages.

A sample is the prompts with the lowest mixed hashes: as good as drawn, the same for the same snapshot, each distinct prompt once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from components.rlhf.near_duplicates import BANDS, band_keys, mix, shingles, similarity
from components.validate_data.rows import Hashes, prompts_of

HELD_OUT = 10_000  # prompts: a leak of 1 % is then known to 0.2 %
SEARCHED_CHARACTERS = 4000  # of a prompt; what is equal for so long is a near duplicate whatever follows
COMPARISONS = 200_000  # of two prompts shingle by shingle: ten seconds
SPOKEN = 500  # prompts whose language is identified, at a millisecond or two each
SPOKEN_CHARACTERS, SPOKEN_LETTERS = 400, 20  # looked at, and needed: of less no language can be told
SURE = 0.9  # probability from which an identified language counts


class Sample:
    """The `most` prompts with the lowest mixed hashes of all that it sees."""

    def __init__(self, most: int) -> None:
        self.texts: dict[int, str] = {}
        self._most = most
        self._limit = 2**64

    def see(self, hashes: Hashes, texts: pa.Array) -> None:
        mixed = mix(hashes)
        for place in np.flatnonzero(mixed < np.uint64(self._limit - 1)):
            self.texts.setdefault(int(hashes[place]), texts[int(place)].as_py())
        if len(self.texts) > 2 * self._most:
            self.close()

    def close(self) -> None:
        keys = np.array(list(self.texts), dtype=np.uint64)
        kept = keys[np.argsort(mix(keys))][: self._most]
        self.texts = {int(key): self.texts[int(key)] for key in kept}
        if len(kept) == self._most:
            self._limit = int(mix(kept[-1:])[0]) + 2


def held_out_sample(batches: Iterable[pa.RecordBatch]) -> dict[int, str]:
    """Prompts of the test split by their hash, from the columns `prompt` and `split`."""
    sample = Sample(HELD_OUT)
    for batch in batches:
        prompts = prompts_of(batch.filter(pc.equal(batch["split"], "test"))["prompt"])
        sample.see(prompts.hash_N, pc.utf8_slice_codeunits(prompts.texts, 0, SEARCHED_CHARACTERS))
    sample.close()
    return sample.texts


class NearDuplicate(NamedTuple):
    """A held-out prompt, the row of the training prompt that is nearly the same, and how similar they are."""

    text: str
    row: int
    similarity: float


class Leaks:
    """Searches training prompts for near duplicates of held-out ones.

    Attributes:
        found: by the hash of the held-out prompt.
        compared: pairs of prompts that were compared so far; at `COMPARISONS` the search ends, and `found` is a lower bound.
    """

    def __init__(self, held_out: dict[int, str], least: float) -> None:
        self.found: dict[int, NearDuplicate] = {}
        self.compared = 0
        self.held_out = held_out
        self._least = least
        self._index()

    def _index(self) -> None:
        """Only of those that are not found yet: among texts of one pattern everything is a candidate for everything."""
        self._missing = [each for each in self.held_out if each not in self.found]
        keys = band_keys([self.held_out[each] for each in self._missing])
        order = np.argsort(keys.ravel(), kind="stable")
        self._keys, self._owner = keys.ravel()[order], order // BANDS

    def see(self, hashes: Hashes, texts: pa.Array, first_row: int, train: NDArray[np.bool_]) -> None:
        """Looks at a batch, whose first ranking is `first_row` of the snapshot; `train` marks what is learned from."""
        rows = np.flatnonzero(train)
        _, once = np.unique(hashes[rows], return_index=True)
        rows = rows[np.sort(once)]
        if not len(self._keys) or not len(rows) or self.compared >= COMPARISONS:
            return
        keys = band_keys(pc.utf8_slice_codeunits(texts.take(pa.array(rows)), 0, SEARCHED_CHARACTERS)).ravel()
        begin, end = (np.searchsorted(self._keys, keys, side=side) for side in ("left", "right"))
        before = len(self.found)
        seen: set[tuple[int, int]] = set()
        for place in np.flatnonzero(begin < end):
            row = int(rows[place // BANDS])
            for owner in self._owner[begin[place] : end[place]]:
                held_out = self._missing[int(owner)]
                if held_out in self.found or held_out == int(hashes[row]) or (row, held_out) in seen:
                    continue
                if self.compared >= COMPARISONS:
                    break
                seen.add((row, held_out))
                self._compare(held_out, row + first_row, texts[row].as_py()[:SEARCHED_CHARACTERS])
        if len(self.found) > before:
            self._index()

    def _compare(self, held_out: int, row: int, text: str) -> None:
        self.compared += 1
        similar = similarity(shingles(self.held_out[held_out]), shingles(text))
        if similar >= self._least:
            self.found[held_out] = NearDuplicate(self.held_out[held_out], row, similar)


def languages(texts: Iterable[str]) -> Counter[str]:
    """How many texts are in which language (ISO 639, "zxx" for none), of those long enough whose language is sure."""
    found: Counter[str] = Counter()
    for text in texts:
        start = text[:SPOKEN_CHARACTERS]
        if sum(map(str.isalpha, start)) >= SPOKEN_LETTERS:
            language, probability = _identifier().classify(start)
            if probability >= SURE:
                found[language] += 1
    return found


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
