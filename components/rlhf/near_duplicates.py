"""Texts that are nearly the same: MinHash band keys that find candidates without comparing all with all, and the similarity itself.

A text is the set of its shingles: every run of 5 bytes of its UTF-8, in lower case and with white space made one space (Leskovec,
Mining of Massive Datasets, section 3.2: 5 for short texts). Two texts are as similar as their shingle sets by Jaccard. A MinHash
signature (rensa's) is cut into 16 bands of 5 values; two texts are candidates if they share a band. With similarity s that happens
with probability 1 - (1 - s^5)^16: 99.8 % at 0.8, 95 % at 0.7, 40 % at 0.5. So look at `similarity` of a candidate before you
believe it. (20 bands of 6, which were here before, find 99.8, 92 and 27 % and take half as long again.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SHINGLE_BYTES = 5
BANDS, BAND_VALUES = 16, 5
LONGEST_BYTES = 1 << 14  # of a text that is looked at; what is equal for so long is a near duplicate whatever follows
CHUNK_BYTES = 1 << 15  # of texts whose shingles are made at a time: their arrays fit into a cache
_SEED = 1
_ODD = np.uint64(0x9E3779B97F4A7C15)


def band_keys(texts: Sequence[str] | pa.Array) -> NDArray[np.uint64]:
    """Band keys [N, BANDS]: texts with an equal key in the same column are candidates. Equal texts have equal keys.

    The key of a column never equals that of another but by chance, so all keys may go into one table.
    """
    plain = _plain(texts)
    if not len(plain):
        return np.empty((0, BANDS), dtype=np.uint64)
    offsets = np.frombuffer(plain.buffers()[1], dtype=np.int32, count=len(plain) + 1, offset=4 * plain.offset).astype(np.int64)
    parts, first = [], 0
    while first < len(plain):
        after = max(first + 1, int(np.searchsorted(offsets, offsets[first] + CHUNK_BYTES, side="right")) - 1)
        parts.append(_signatures(plain.buffers()[2], offsets[first : after + 1]))
        first = after
    signatures = np.concatenate(parts).astype(np.uint64).reshape(-1, BANDS, BAND_VALUES)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), signatures.shape[:2]).copy()
    for value in range(BAND_VALUES):
        keys = mix(keys * _ODD + signatures[:, :, value])
    return keys


def shingles(text: str) -> frozenset[bytes]:
    """The shingles of a text; a shorter one is its own only shingle."""
    data = _plain([text])[0].as_py().encode()
    return frozenset(data[i : i + SHINGLE_BYTES] for i in range(max(1, len(data) - SHINGLE_BYTES + 1)))


def similarity(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    """Jaccard similarity of two shingle sets, in [0, 1]."""
    return len(one & other) / len(one | other)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers whose every bit depends on every bit of the value (the finaliser of SplitMix64); a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _plain(texts: Sequence[str] | pa.Array) -> pa.Array:
    """Lower case, one space for white space, none around, valid UTF-8 and no longer than `LONGEST_BYTES`."""
    if not isinstance(texts, pa.Array):
        texts = pa.array([text.encode("utf-8", "replace").decode() for text in texts], pa.string())
    lower = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts.fill_null("")), r"\s\s+|[\t\r\n\f\v]", " "))
    return pc.utf8_slice_codeunits(lower, 0, LONGEST_BYTES // 4)


def _signatures(data: pa.Buffer, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """MinHash signatures [N * BANDS * BAND_VALUES] of the texts between the offsets."""
    from rensa import RMinHash

    first, last = offsets[0], offsets[-1]
    text = np.zeros(last - first + SHINGLE_BYTES - 1, dtype=np.uint64)
    text[: last - first] = np.frombuffer(data, dtype=np.uint8, count=last - first, offset=first)
    windows = np.zeros(last - first, dtype=np.uint64)
    for place in range(SHINGLE_BYTES):
        windows |= text[place : place + last - first] << np.uint64(8 * place)
    # A shingle that begins near the end of its text would reach into the next one: only those of short texts stay, cut.
    starts, sizes = offsets[:-1] - first, np.diff(offsets)
    counts = np.where(sizes > 0, np.maximum(1, sizes - SHINGLE_BYTES + 1), 0)
    for short in np.flatnonzero((sizes > 0) & (sizes < SHINGLE_BYTES)):
        windows[starts[short]] &= np.uint64((1 << (8 * int(sizes[short]))) - 1)
    inside = np.arange(last - first) - np.repeat(starts, sizes) < np.repeat(counts, sizes)
    limits = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(mix(windows[inside]), limits, BANDS * BAND_VALUES, _SEED)
    return np.frombuffer(b"".join([array("I", row).tobytes() for row in matrix.to_rows()]), dtype=np.uintc)
