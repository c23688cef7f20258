"""Numbers of each ranking of a batch, by whole columns: what the expectations on rows look at, and what comparisons are made of.

N rankings of a batch, with M completions in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from components.rlhf.near_duplicates import mix
from components.rlhf.records import ROLES, SCHEMA
from components.rlhf.refusals import refusal_pattern

COLUMNS = (
    "ranking_id",
    "rater_id",
    "split",
    "completions",
    "ranks_valid",
    "shortest_completion_characters",
    "longest_completion_characters",
    "identical_completions",
    "shortest_message_characters",
    "prompt_characters",
    "prompt_is_chat",
)
_REFUSAL = refusal_pattern()

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


class Rows(NamedTuple):
    """A batch of rankings as numbers; equal hashes mean equal contents but for one chance in 2^64 a pair.

    Fields:
        frame: a row per ranking with `COLUMNS`.
        id_N, prompt_N: hashes of the ranking's id, and of its prompt's messages.
        task_N: hash of prompt and criterion: rankings of one task can be compared.
        raters, sources: their names, N each.
        test_N, train_N: whether the ranking is in that split.
        seconds_N: when it was collected, in seconds since 1970; NaN where that is not known.
        sizes_N: completions of each.
        valid_N: whether its ranks are a ranking of two completions or more.
        text_M, rank_M, length_M, refuses_M: of each completion its hash, rank, length in characters, and whether it refuses.
        prompts: the prompts' texts, messages joined, N.
    """

    frame: pd.DataFrame
    id_N: Hashes
    prompt_N: Hashes
    task_N: Hashes
    raters: pa.Array
    sources: pa.Array
    test_N: NDArray[np.bool_]
    train_N: NDArray[np.bool_]
    seconds_N: NDArray[np.float64]
    sizes_N: Ints
    valid_N: NDArray[np.bool_]
    text_M: Hashes
    rank_M: Ints
    length_M: Ints
    refuses_M: NDArray[np.bool_]
    prompts: pa.Array


def rows_of(batch: pa.RecordBatch) -> Rows:
    """The numbers of a batch of a snapshot.

    Raises:
        KeyError, pa.ArrowException: a column is missing or of another type; the batch is of no snapshot.
    """
    batch = batch.select(SCHEMA.names).cast(SCHEMA)
    raters, split = batch["rater_id"].fill_null("None"), batch["split"].fill_null("None")
    completions, sizes = batch["completions"].flatten().fill_null(""), _sizes(batch["completions"])
    lengths = _characters(completions)
    ranks, rank_sizes = batch["ranks"].flatten(), _sizes(batch["ranks"])
    valid = ranks_valid(ranks.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), rank_sizes) & (rank_sizes == sizes)
    text = text_hashes(completions)
    prompt, prompts, roles, contents, turns = prompts_of(batch["prompt"])
    content_lengths = _characters(contents)
    frame = pd.DataFrame(
        {
            "ranking_id": batch["ranking_id"].to_numpy(zero_copy_only=False),
            "rater_id": raters.to_numpy(zero_copy_only=False),
            "split": split.to_numpy(zero_copy_only=False),
            "completions": sizes,
            "ranks_valid": valid.astype(np.int64),
            "shortest_completion_characters": _per_row(np.minimum, lengths, sizes),
            "longest_completion_characters": _per_row(np.maximum, lengths, sizes),
            "identical_completions": _repeated(text, sizes),
            "shortest_message_characters": _per_row(np.minimum, content_lengths, turns),
            "prompt_characters": _per_row(np.add, content_lengths, turns),
            "prompt_is_chat": _is_chat(roles, turns).astype(np.int64),
        }
    )
    # Completions of a ranking whose ranks are none take no part in comparisons; their ranks may not even be as many.
    rank = np.zeros(len(text), dtype=np.int64)
    rank[np.repeat(valid, sizes)] = ranks.fill_null(0).to_numpy(zero_copy_only=False)[np.repeat(valid, rank_sizes)]
    criterion = batch["criterion"].fill_null("")
    return Rows(
        frame=frame,
        id_N=text_hashes(batch["ranking_id"]),
        prompt_N=prompt,
        task_N=mix(prompt ^ mix(text_hashes(criterion))),
        raters=raters,
        sources=batch["source"].fill_null("None"),
        test_N=pc.equal(split, "test").to_numpy(zero_copy_only=False),
        train_N=pc.equal(split, "train").to_numpy(zero_copy_only=False),
        seconds_N=_seconds(batch["collected_at"]),
        sizes_N=sizes,
        valid_N=valid & (sizes > 1),
        text_M=text,
        rank_M=rank,
        length_M=lengths,
        refuses_M=pc.match_substring_regex(completions, _REFUSAL).to_numpy(zero_copy_only=False),
        prompts=prompts,
    )


class Prompts(NamedTuple):
    """Prompts as hashes and texts [N]; the roles and contents of their messages, and how many messages each has [N]."""

    hash_N: Hashes
    texts: pa.Array
    roles: pa.Array
    contents: pa.Array
    turns_N: Ints


def prompts_of(column: pa.Array) -> Prompts:
    """The prompts of a batch's column `prompt`."""
    messages, turns = column.flatten(), _sizes(column)
    roles, contents = messages.field("role").fill_null("None"), messages.field("content").fill_null("")
    starts = np.concatenate(([0], np.cumsum(turns))).astype(np.int32)
    texts = pc.binary_join(pa.ListArray.from_arrays(starts, contents), "\n")
    return Prompts(_sequence_hashes(text_hashes(contents) ^ mix(text_hashes(roles)), turns), texts, roles, contents, turns)


def ranks_valid(ranks_M: Ints, sizes_N: Ints) -> NDArray[np.bool_]:
    """Which rows [N] hold a ranking: integers from 1, ties equal, dense ("1, 1, 2") or competition style ("1, 1, 3")."""
    row = np.repeat(np.arange(len(sizes_N)), sizes_N)
    order = np.lexsort((ranks_M, row))
    rank, starts = ranks_M[order], np.cumsum(sizes_N) - sizes_N
    new = np.ones(len(rank), dtype=bool)
    new[1:] = (rank[1:] != rank[:-1]) | (row[1:] != row[:-1])
    competition = np.maximum.accumulate(np.where(new, np.arange(len(rank)), 0)) - starts[row] + 1
    dense = np.cumsum(new)
    dense = dense - np.repeat(np.concatenate(([0], dense))[starts], sizes_N)
    wrong = [np.bincount(row, weights=rank != style, minlength=len(sizes_N)) for style in (dense, competition)]
    return (sizes_N > 0) & ((wrong[0] == 0) | (wrong[1] == 0))


def _sizes(lists: pa.Array) -> Ints:
    return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _characters(texts: pa.Array) -> Ints:
    """Without white space around."""
    return pc.utf8_length(pc.utf8_trim_whitespace(texts)).to_numpy(zero_copy_only=False).astype(np.int64)


def text_hashes(texts: pa.Array) -> Hashes:
    """64 bits of each text."""
    return pd.util.hash_array(texts.to_numpy(zero_copy_only=False), categorize=False)


def _sequence_hashes(hashes_M: Hashes, sizes_N: Ints) -> Hashes:
    """One hash per row of the hashes in it, in their order."""
    place = np.arange(len(hashes_M)) - np.repeat(np.cumsum(sizes_N) - sizes_N, sizes_N)
    mixed = mix(hashes_M + mix(place.astype(np.uint64) + np.uint64(1)))
    return mix(_per_row(np.add, mixed, sizes_N) + sizes_N.astype(np.uint64))


def _per_row(function: np.ufunc, values_M: NDArray[Any], sizes_N: Ints) -> NDArray[Any]:
    """The function over the values of each row, 0 for a row without any."""
    result = np.zeros(len(sizes_N), dtype=values_M.dtype)
    filled = sizes_N > 0
    if filled.any():
        result[filled] = function.reduceat(values_M, (np.cumsum(sizes_N) - sizes_N)[filled])
    return result


def _repeated(hashes_M: Hashes, sizes_N: Ints) -> Ints:
    """How many values of each row are the same as another one of it."""
    row = np.repeat(np.arange(len(sizes_N)), sizes_N)
    order = np.lexsort((hashes_M, row))
    hashes = hashes_M[order]
    same = (hashes[1:] == hashes[:-1]) & (row[1:] == row[:-1])
    return np.bincount(row[1:][same], minlength=len(sizes_N)).astype(np.int64)


def _is_chat(roles: pa.Array, turns_N: Ints) -> NDArray[np.bool_]:
    known = pc.is_in(roles, value_set=pa.array(ROLES)).to_numpy(zero_copy_only=False)
    strangers = _per_row(np.add, (~known).astype(np.int64), turns_N)
    last = np.zeros(len(turns_N), dtype=bool)
    filled = turns_N > 0
    last[filled] = pc.equal(roles, "user").to_numpy(zero_copy_only=False)[(np.cumsum(turns_N) - 1)[filled]]
    return last & (strangers == 0)


def _seconds(times: pa.Array) -> NDArray[np.float64]:
    """ISO 8601 in UTC as seconds; what is no such time is not known."""
    looks_right = pc.match_substring_regex(times, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$").fill_null(False)
    kept = pc.if_else(looks_right, pc.utf8_slice_codeunits(times, 0, -1), None)
    try:
        stamps = pc.cast(kept, pa.timestamp("us"))
    except pa.ArrowInvalid:  # the 31st of February
        return np.full(len(times), np.nan)
    found = pc.cast(stamps, pa.int64()).to_numpy(zero_copy_only=False).astype(np.float64)
    return found / 1e6
