"""Columns of numbers against the rows that they are made of."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.records import SCHEMA, prompt_key, snapshot_batches
from components.validate_data.rows import COLUMNS, ranks_valid, rows_of
from tests.unit.components.validate_data.snapshots import good, ranking, write


def batch_of(*rows: dict[str, Any]) -> pa.RecordBatch:
    records = [{**ranking(number)._asdict(), **row} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(records, schema=SCHEMA).combine_chunks().to_batches()[0]


def is_ranking(ranks: list[int]) -> bool:
    """Whether ranks order completions, one by one: from 1, ties equal, dense or competition style."""
    distinct = sorted(set(ranks))
    dense = list(range(1, len(distinct) + 1))
    competition = [1 + sum(other < rank for other in ranks) for rank in distinct]
    return bool(ranks) and distinct in (dense, competition)


def test_dense_and_competition_ranks_are_rankings() -> None:
    every = [list(ranks) for size in range(5) for ranks in product(range(6), repeat=size)]
    found = ranks_valid(np.array([rank for ranks in every for rank in ranks]), np.array([len(ranks) for ranks in every]))
    assert found.tolist() == [is_ranking(ranks) for ranks in every]
    assert found.sum() > 100


def test_the_numbers_of_a_row_by_hand() -> None:
    rows = rows_of(
        batch_of(
            {},
            {"completions": [" ok ", "ok", "ok"], "ranks": [2, 1, 2], "prompt": [{"role": "system", "content": "be"}] * 2},
            {"completions": [], "ranks": [], "prompt": []},
            {"completions": ["x", None], "ranks": [1, None], "prompt": [{"role": "user", "content": None}]},
        )
    )
    assert list(rows.frame.columns) == list(COLUMNS)
    assert rows.frame.iloc[:, 3:].values.tolist() == [
        [3, 1, 3, 4, 0, 10, 10, 1],
        [3, 1, 2, 2, 1, 2, 4, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [2, 0, 0, 1, 0, 0, 0, 1],
    ]
    assert rows.valid_N.tolist() == [True, True, False, False]
    assert rows.prompts.to_pylist() == ["question 0", "be\nbe", "", ""]


TEXTS = st.text(st.characters(codec="utf-8"), max_size=3)
PROMPTS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXTS}), max_size=3)


@given(st.lists(PROMPTS, min_size=1, max_size=8))
def test_prompts_have_equal_hashes_exactly_where_they_are_equal(prompts: list[Any]) -> None:
    hashes = rows_of(batch_of(*({"prompt": prompt} for prompt in prompts))).prompt_N
    keys = [prompt_key(prompt) for prompt in prompts]
    assert [[a == b for b in hashes] for a in hashes] == [[a == b for b in keys] for a in keys]


def test_a_slice_of_a_batch_is_read_as_itself() -> None:
    batch = batch_of({}, {"completions": ["a", "b"], "ranks": [2, 1]}, {"prompt": []}, {"completions": ["a", "b", "c", "d"]}, {})
    whole, part = rows_of(batch), rows_of(batch.slice(1, 3))
    assert (whole.prompt_N[1:4] == part.prompt_N).all()
    assert whole.frame[1:4].values.tolist() == part.frame.values.tolist()
    assert (whole.text_M[3:12] == part.text_M).all()


def test_times_are_seconds_and_what_is_no_time_is_not_known() -> None:
    times = ["2026-01-31T12:00:00Z", "1970-01-01T00:00:01.5Z", "2026-02-31T12:00:00Z", "yesterday", None, "2026-01-31T12:00:00"]
    found = [rows_of(batch_of({"collected_at": time})).seconds_N[0] for time in times]
    assert found[:2] == [datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp(), 1.5]
    assert all(map(math.isnan, found[2:]))


def test_refusals_are_marked() -> None:
    rows = rows_of(batch_of({"completions": ["I’m sorry, but I can't help.", "Sure.", "i  CANNOT help"]}))
    assert rows.refuses_M.tolist() == [True, False, True]


@pytest.mark.parametrize("wrong", [SCHEMA.remove(3), SCHEMA.set(2, pa.field("completions", pa.string()))])
def test_what_is_no_snapshot_is_refused(wrong: pa.Schema) -> None:
    batch = pa.RecordBatch.from_pylist([], schema=wrong)
    with pytest.raises((KeyError, pa.ArrowException)):
        rows_of(batch)


def test_batches_are_the_snapshot_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rankings = good() + [ranking(i, rater_id=f"rater-{i}") for i in range(6, 17)]
    snapshot = write(tmp_path / "snapshot", rankings, group=2)
    for most in (1, 5, 8192):
        monkeypatch.setattr("components.rlhf.records.BATCH_ROWS", most)
        batches = list(snapshot_batches(snapshot))
        assert [id_ for batch in batches for id_ in batch["ranking_id"].to_pylist()] == [each.ranking_id for each in rankings]
        assert max(batch.num_rows for batch in batches) <= max(most, 2)
    assert next(iter(snapshot_batches(snapshot, ["split"]))).schema.names == ["split"]
