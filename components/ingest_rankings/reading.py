"""Rows of a source sorted out: rankings to the sort, what is none to quarantine, and what waits for other rows to its group."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.ingest_rankings.exports.columns import column_map
from components.ingest_rankings.exports.export import Export
from components.ingest_rankings.formats import Parsed, parse
from components.ingest_rankings.groups import Grouping
from components.ingest_rankings.personal_data.policy import PersonalData
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.raters import Raters
from components.ingest_rankings.rows import Rejected, Row, shown
from components.ingest_rankings.snapshot import SnapshotWriter
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


def all_rows(source: Source) -> Iterator[tuple[SourceFile, Row]]:
    for file in source.files:
        for row in file.rows():
            yield file, row


def sort_out(
    source: Source,
    rows: Iterator[tuple[SourceFile, Row]],
    config: Config,
    writer: SnapshotWriter,
    quarantine: Quarantine,
    personal: PersonalData,
    raters: Raters,
    ignored: Counter[str],
    groups: Path,
) -> list[FileReport]:
    """Gives each ranking to `writer`, what is none to `quarantine`, and returns the files' counts.

    A row of an export that holds the judgements of several raters counts as so many, and so does a group of rows. `ignored` counts
    the fields that no form has. `groups` is a folder for rows that wait for others.
    """
    columns = column_map(config.columns) if config.columns else None
    read: Counter[str] = Counter()
    forms: dict[str, Counter[str]] = {file.uri: Counter() for file in source.files}

    def sort_one(file: str, row: Row) -> None:
        for parsed in _rankings(row, config, columns, raters):
            read[file] += 1
            parsed = personal.applied(file, row.number, parsed)
            if isinstance(parsed, Rejected):
                quarantine.add(file, row.number, parsed, row.raw)
                continue
            writer.add(parsed.ranking, file, row.number)
            forms[file][parsed.form] += 1
            for name in parsed.ignored:
                if name in ignored or len(ignored) < NAMES_KEPT:
                    ignored[name] += 1

    with Grouping(config.group, groups) if config.group else nullcontext() as grouping:
        for file, row in rows:
            if grouping is None or row.problem is not None or not isinstance(row.value, dict):
                sort_one(file.uri, row)
                continue
            try:
                grouping.add(file.uri, row.number, row.value)
            except Rejected as problem:
                read[file.uri] += 1
                quarantine.add(file.uri, row.number, problem, row.raw)
        for group in grouping.groups() if grouping is not None else ():
            sort_one(group.file, group.row)
    for name, count in ignored.most_common(10):
        _log.warning("field %s of %d rows is not part of a ranking and is left out", name, count)
    return [FileReport(file, read[file.uri], dict(forms[file.uri])) for file in source.files]


def _rankings(row: Row, config: Config, columns: Export | None, raters: Raters) -> Iterable[Parsed | Rejected]:
    if row.problem is not None:
        return [row.problem]
    if not isinstance(row.value, dict):
        return [Rejected("not an object", shown(row.value))]
    return parse(row.value, config.format, config.source, config.test_fraction, columns, raters)
