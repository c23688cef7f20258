"""Examples in words: rankings are kept as numbers only, so the few that are shown are read from the snapshot again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.validate_data.comparisons import Example
from components.validate_data.rows import text_hashes

SHOWN_CHARACTERS = 60


class Examples:
    """Reads single rankings of a snapshot by their row, counted from 0 over its files in order of their names."""

    def __init__(self, snapshot: Path) -> None:
        self._groups: list[tuple[Path, int, int]] = []  # (file, row group, first row)
        first = 0
        for path in sorted(snapshot.glob("*.parquet")):
            metadata = pq.read_metadata(path)
            for number in range(metadata.num_row_groups):
                self._groups.append((path, number, first))
                first += metadata.row_group(number).num_rows

    def ranking(self, row: int) -> dict[str, Any]:
        path, number, first = next(group for group in reversed(self._groups) if group[2] <= row)
        found: dict[str, Any] = pq.ParquetFile(path).read_row_group(number).slice(row - first, 1).to_pylist()[0]
        return found

    def rows(self, rows: Iterable[int]) -> list[str]:
        """Each as "id (rater)"."""
        return [f"{ranking['ranking_id']} ({ranking['rater_id']})" for ranking in map(self.ranking, rows)]

    def comparisons(self, examples: Sequence[Example]) -> list[str]:
        """Each as "id by rater and id by rater: one completion against the other"."""
        return [self._comparison(example) for example in examples]

    def _comparison(self, example: Example) -> str:
        rankings = [self.ranking(row) for row in example.rows]
        who = " and ".join(f"{ranking['ranking_id']} by {ranking['rater_id']}" for ranking in rankings)
        texts = dict(zip(text_hashes(pa.array(rankings[0]["completions"])).tolist(), rankings[0]["completions"], strict=True))
        what = " against ".join(short(texts[each]) for each in example.texts)
        return f"{who}: {what}" if what else f"{who}: {short(rankings[0]['prompt'][-1]['content'])}"


def short(text: str) -> str:
    """A text that fits on a line."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")
