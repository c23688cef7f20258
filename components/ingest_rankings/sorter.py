"""A block of rows sorted out: rankings made ready for the sort, what is none with its reason, and what is to be counted.

It depends on the block and on `Reading` alone, so that it may be done in any process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from components.ingest_rankings.batches import Batch, Policies, prepare
from components.ingest_rankings.exports.columns import column_map
from components.ingest_rankings.formats import Parsed, parse
from components.ingest_rankings.personal_data.policy import PersonalData, Policy
from components.ingest_rankings.raters import Raters
from components.ingest_rankings.rows import Block, Rejected, Row, rows_of, shown

Found = list[tuple[str, str]]  # field and kind of what is personal in a ranking


class Reading(NamedTuple):
    """What decides how rows are read: the stage's settings of these names, and the salt of the raters' pseudonyms."""

    format: str
    columns: dict[str, str]
    source: str
    test_fraction: float
    salt: str
    personal_data: Policy
    phone_region: str
    policies: Policies
    max_row_bytes: int


class Sorted(NamedTuple):
    """What became of the rows of a block.

    Fields:
        read: how many there were; a row of several judgements counts as so many.
        batch: the rankings.
        forms, ignored: how many rankings had each form, and each field that no form has.
        rejected: row, reason and raw row of what is no ranking.
        personal: row and what was found in its ranking.
    """

    read: int
    batch: Batch
    forms: Counter[str]
    ignored: Counter[str]
    rejected: list[tuple[int, Rejected, Any]]
    personal: list[tuple[int, Found]]


class _Noting(PersonalData):
    """Leaves the counting to others."""

    def __init__(self, policy: Policy, region: str, test_fraction: float) -> None:
        super().__init__(policy, region, test_fraction)
        self.noted: list[tuple[int, Found]] = []

    def count(self, file: str, row: int, found: Found) -> None:
        self.noted.append((row, found))


class Sorter:
    """Sorts out block after block."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._columns = column_map(reading.columns) if reading.columns else None
        self._raters = Raters(reading.salt, reading.columns)
        self._personal = _Noting(reading.personal_data, reading.phone_region, reading.test_fraction)

    def sort(self, block: Block) -> Sorted:
        parsed = [(row, each) for row in rows_of(block, self._reading.max_row_bytes) for each in self._rankings(row)]
        look = self._personal.worth_a_look([each.ranking for _, each in parsed if isinstance(each, Parsed)])
        rankings, rows = [], []
        forms, ignored = Counter[str](), Counter[str]()
        rejected: list[tuple[int, Rejected, Any]] = []
        self._personal.noted = []
        for row, each in parsed:
            if isinstance(each, Parsed) and next(look):
                each = self._personal.applied("", row.number, each)
            if isinstance(each, Rejected):
                rejected.append((row.number, each, row.raw))
                continue
            rankings.append(each.ranking)
            rows.append(row.number)
            forms[each.form] += 1
            if each.ignored:
                ignored.update(each.ignored)
        batch = prepare(rankings, rows, self._reading.policies)
        return Sorted(len(parsed), batch, forms, ignored, rejected, self._personal.noted)

    def _rankings(self, row: Row) -> Iterable[Parsed | Rejected]:
        if row.problem is not None:
            return [row.problem]
        if not isinstance(row.value, dict):
            return [Rejected("not an object", shown(row.value))]
        reading = self._reading
        return parse(row.value, reading.format, reading.source, reading.test_fraction, self._columns, self._raters)
