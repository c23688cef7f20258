"""Ingests human rankings: reads them from where they are, checks each, and writes one immutable, content-addressed snapshot.

In: a local file or folder, an S3 object or prefix, a dataset of the Hugging Face hub or a folder saved by `datasets`; JSON lines or
arrays, CSV, Parquet or Arrow, plain or packed; rankloop's own record, K-way rows with ranks or scores, pairs, the exports of
labelling tools (`exports/`), or any rows with a column map.

Out: `<root>/rankings/<sha256>/` with Parquet files in `records.SCHEMA`, sorted by record digest, and `rankloop.json`. The same
rankings in another order or in other files give the same digest, and a snapshot that is there already is not written again.
`<root>/ingests/<key>/` with `quarantine.jsonl` (every row that is no ranking, with its reason) and the counts:
accepted + duplicates + quarantined = read, always.

    1  find the files of the source
    2  read each row: a ranking goes to the sort, anything else to quarantine
    3  sort by digest, drop duplicates, write Parquet
    4  check that the counts add up
    5  publish the snapshot, then the report

Alone: `python -m components.ingest_rankings --rankings data/`

Papers: InstructGPT ranks K = 4 to 9 completions of a prompt (Ouyang et al. 2022, arXiv:2203.02155, section 3.4); HH compares two
(Bai et al. 2022, arXiv:2204.05862).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from components.ingest_rankings.exports.columns import column_map
from components.ingest_rankings.exports.export import Export
from components.ingest_rankings.formats import FORMS, Parsed, parse
from components.ingest_rankings.groups import Grouping
from components.ingest_rankings.personal_data.find import check_region
from components.ingest_rankings.personal_data.policy import PersonalData, Policy
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.rows import DECLINED, Rejected, Row, shown
from components.ingest_rankings.snapshot import SnapshotWriter
from components.ingest_rankings.sources import Source, SourceFile, find_source
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings
from components.services.storage import MARKER, join

NAMES_KEPT = 100  # of ignored fields, and of skipped files, in the report

_log = logging.getLogger(__name__)


class Config(Settings):
    """How rankings are read."""

    format: str = "auto"
    """Form of the rows: rankloop, kway, hh, pairs or an export's; auto recognises each row by its own fields."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column map: for each field of a ranking a JMESPath expression over the row. Read by it, a row may have any form."""
    group: str = ""
    """JMESPath expression; rows of the source for which it has the same value become one, `{"rows": […]}`. Empty: each is alone."""
    source: str = Field("unspecified", min_length=1)
    """Source of a ranking whose row names none, such as the labelling project."""
    test_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the prompts held out; rankings whose conversations open alike fall on one side. A row's own split wins."""
    personal_data: Policy = "report"
    """What to do with e-mail addresses, phone, card and account numbers and keys in texts: report, mask, quarantine or off."""
    phone_region: str = ""
    """Country (ISO 3166, two letters) whose phone numbers are found as written there. Empty: only those with + and code."""
    max_row_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of a JSON line; a longer one is quarantined."""
    max_quarantined: int = Field(10_000, ge=0)
    """Rows kept in quarantine.jsonl; further ones are counted with their reasons but not kept."""

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FORMS:
            raise ValueError(f"no form {name!r}; there are {', '.join(FORMS)}")
        return name

    @field_validator("columns")
    @classmethod
    def _expressions(cls, columns: dict[str, str]) -> dict[str, str]:
        column_map(columns)
        return columns

    @field_validator("group")
    @classmethod
    def _expression(cls, group: str) -> str:
        if group:
            Grouping(group, Path())
        return group

    @field_validator("phone_region")
    @classmethod
    def _region(cls, region: str) -> str:
        check_region(region)
        return region


class Inputs(Settings):
    """What is read."""

    rankings: str
    """Local file or folder, s3://bucket/prefix, or hf://name[@revision][:split]."""
    fingerprint: str = ""
    """Digest of the source (`sources.source_fingerprint`); unused here, it makes an orchestrator's cache key follow the content."""


class Outputs(NamedTuple):
    """URIs of the snapshot and of the ingest report."""

    snapshot_uri: str
    ingest_uri: str


class FileReport(NamedTuple):
    """Rows of one file; `formats` counts those that are rankings by their form."""

    uri: str
    rows: int
    formats: dict[str, int]


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """Ingests `inputs.rankings`.

    Raises:
        DoNotRetry: nothing to read, a damaged file, no access, or not one ranking among the rows.
        Retry: the object store or the hub cannot be reached.
    """
    # 1. find
    source = find_source(inputs.rankings, context.storage, context.scratch, config.max_row_bytes)
    for name in source.skipped[:NAMES_KEPT]:
        _log.info("skipped, not a data file: %s", name)
    quarantine_path = context.scratch / "report" / "quarantine.jsonl"
    quarantine_path.parent.mkdir()
    ignored: Counter[str] = Counter()
    personal = PersonalData(config.personal_data, config.phone_region, config.test_fraction)
    with (
        Quarantine(quarantine_path, config.max_quarantined, personal) as quarantine,
        SnapshotWriter(context.scratch / "sort") as writer,
    ):
        # 2. read
        rows = context.progress.track(_all_rows(source), None, "rows read")
        files = sort_out(source, rows, config, writer, quarantine, personal, ignored, context.scratch / "groups")
        # 3. sort
        records = context.progress.track(writer.sorted_records(), None, "rankings written")
        snapshot = writer.write(records, context.scratch / "snapshot")
    if quarantine.rows:
        context.tracker.artifact(quarantine_path)
    # 4. count
    read = sum(file.rows for file in files)
    duplicates = writer.added - snapshot.rankings
    check_counts(read, snapshot.rankings, duplicates, quarantine.rows)
    if not snapshot.rankings:
        raise DoNotRetry(
            f"rankings = {inputs.rankings!r}: no ranking in {read} rows of {len(files)} files"
            + "".join(f"\n  {example}" for example in quarantine.examples),
            "correct the rows, or name their form with the option format; components/ingest_rankings/README.md shows each",
        )
    # 5. publish
    snapshot_uri, ingest_uri = context.uri("rankings", snapshot.digest), context.uri("ingests")
    if context.storage.is_published(snapshot_uri):
        _log.info("the snapshot is there already: %s", snapshot_uri)
    else:
        context.storage.publish_folder(context.scratch / "snapshot", snapshot_uri, snapshot.marker)
    counts = {"read": read, "accepted": snapshot.rankings, "duplicates": duplicates, "quarantined": quarantine.rows}
    report = context.marker(
        "ingest",
        **counts,
        declined=quarantine.reasons[DECLINED],
        quarantine_kept=quarantine.kept,
        reasons=dict(quarantine.reasons.most_common()),
        files=[{"uri": f.uri, "rows": f.rows, "format": "+".join(sorted(f.formats)), "formats": f.formats} for f in files],
        skipped=source.skipped[:NAMES_KEPT],
        skipped_files=len(source.skipped),
        ignored_fields=dict(ignored.most_common()),
        personal_data=personal.report(),
        snapshot_uri=snapshot_uri,
    )
    context.storage.delete(join(ingest_uri, MARKER))  # of an earlier attempt: its report must not stand for this one
    context.storage.publish_folder(quarantine_path.parent, ingest_uri, report)
    context.summary.update(counts, rankings=snapshot.rankings)
    return Outputs(snapshot_uri, ingest_uri)


def _all_rows(source: Source) -> Iterator[tuple[SourceFile, Row]]:
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
        for parsed in _rankings(row, config, columns):
            read[file] += 1
            parsed = personal.applied(file, row.number, parsed)
            if isinstance(parsed, Rejected):
                quarantine.add(file, row.number, parsed, row.raw)
                continue
            writer.add(parsed.ranking)
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
    return [FileReport(file.uri, read[file.uri], dict(forms[file.uri])) for file in source.files]


def _rankings(row: Row, config: Config, columns: Export | None) -> Iterable[Parsed | Rejected]:
    if row.problem is not None:
        return [row.problem]
    if not isinstance(row.value, dict):
        return [Rejected("not an object", shown(row.value))]
    return parse(row.value, config.format, config.source, config.test_fraction, columns)


def check_counts(read: int, accepted: int, duplicates: int, quarantined: int) -> None:
    """Every row that was read is in exactly one of the three.

    Raises:
        RuntimeError: it is not; a defect of this stage, never of the data.
    """
    if accepted + duplicates + quarantined != read or min(accepted, duplicates, quarantined) < 0:
        raise RuntimeError(
            f"rows are lost: {accepted} accepted + {duplicates} duplicates + {quarantined} quarantined != {read} read"
        )
