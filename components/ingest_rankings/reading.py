"""Rows of a source sorted out: rankings to the sort, what is none to quarantine, and what waits for other rows to its group."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.ingest_rankings.groups import Grouping
from components.ingest_rankings.personal_data.policy import PersonalData
from components.ingest_rankings.processes import Sorting, processes_of
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.raters import Raters
from components.ingest_rankings.rows import Block, Rejected, batched, rows_of
from components.ingest_rankings.snapshot import SnapshotWriter
from components.ingest_rankings.sorter import Reading, Sorted
from components.ingest_rankings.sources import Source, SourceFile

if TYPE_CHECKING:
    from components.ingest_rankings.stage import Config

NAMES_KEPT = 100  # of ignored fields, and of skipped files, in the report

_log = logging.getLogger(__name__)


class FileReport(NamedTuple):
    """Rows of one file; `formats` counts those that are rankings by their form."""

    file: SourceFile
    rows: int
    formats: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """What the report and the watermark hold of it."""
        stored = self.file.stored
        of_object = {} if stored is None else stored._asdict() | {"sha256": self.file.sha256.hexdigest()}
        return {"uri": self.file.uri, "rows": self.rows, "formats": self.formats, **of_object}


def all_blocks(source: Source) -> Iterator[tuple[str, Block]]:
    """The rows of all files, with the file's name."""
    for file in source.files:
        for block in file.blocks():
            yield file.uri, block


def sort_out(
    source: Source,
    blocks: Iterable[tuple[str, Block]],
    config: Config,
    writer: SnapshotWriter,
    quarantine: Quarantine,
    personal: PersonalData,
    raters: Raters,
    ignored: Counter[str],
    groups: Path,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[FileReport]:
    """Gives each ranking to `writer`, what is none to `quarantine`, and returns the files' counts.

    A row of an export that holds the judgements of several raters counts as so many, and so does a group of rows. `ignored` counts
    the fields that no form has. `groups` is a folder for rows that wait for others. `track` sees an item for each row.
    """
    read: Counter[str] = Counter()
    forms: dict[str, Counter[str]] = {file.uri: Counter() for file in source.files}

    def counted(found: Iterable[tuple[str, Sorted]]) -> Iterator[int]:
        for file, each in found:
            read[file] += each.read
            forms[file].update(each.forms)
            writer.take(each.batch, file)
            for row, problem, raw in each.rejected:
                quarantine.add(file, row, problem, raw)
            for row, hits in each.personal:
                personal.count(file, row, hits)
            for name, count in each.ignored.items():
                if name in ignored or len(ignored) < NAMES_KEPT:
                    ignored[name] += count
            yield from range(each.read)

    reading = Reading(
        config.format,
        config.columns,
        config.source,
        config.test_fraction,
        raters.salt,
        config.personal_data,
        config.phone_region,
        config.policies(),
        config.max_row_bytes,
    )
    with (
        Sorting(reading, processes_of(config.processes)) as sorting,
        Grouping(config.group, groups) if config.group else nullcontext() as grouping,
    ):
        if grouping is not None:
            blocks = _grouped(blocks, grouping, config.max_row_bytes)
        for _ in track(counted(sorting.each(blocks))):
            pass
    for name, count in ignored.most_common(10):
        _log.warning("field %s of %d rows is not part of a ranking and is left out", name, count)
    return [FileReport(file, read[file.uri], dict(forms[file.uri])) for file in source.files]


def _grouped(blocks: Iterable[tuple[str, Block]], grouping: Grouping, max_row_bytes: int) -> Iterator[tuple[str, Block]]:
    """First what belongs to no group, then the groups, each as one row."""
    for file, block in blocks:
        alone = []
        for row in rows_of(block, max_row_bytes):
            if row.problem is not None or not isinstance(row.value, dict):
                alone.append(row)
                continue
            try:
                grouping.add(file, row.number, row.value)
            except Rejected as problem:
                alone.append(row._replace(problem=problem))
        if alone:
            yield file, alone
    for file, groups in groupby(grouping.groups(), key=lambda group: group.file):
        for rows in batched(group.row for group in groups):
            yield file, rows
