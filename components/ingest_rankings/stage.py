"""Ingests human rankings: reads them from where they are, checks each, and writes one immutable, content-addressed snapshot.

In: a local file or folder, an S3 object or prefix, a dataset of the Hugging Face hub or a folder saved by `datasets`; JSON lines or
arrays, CSV, Parquet or Arrow, plain or packed; rankloop's own record, K-way rows with ranks or scores, pairs, the exports of
labelling tools (`exports/`), or any rows with a column map.

Out: `<root>/rankings/<sha256>/` with Parquet files in `records.SCHEMA`, sorted by record digest, and `rankloop.json`. The same
rankings in another order or in other files give the same digest, and a snapshot that is there already is not written again.
`<root>/ingests/<key>/` with `quarantine.jsonl` (every row that is no ranking, with its reason) and the counts:
accepted + duplicates + quarantined = read, always.

    1  find the files of the source, and of an S3 prefix those that were not read before
    2  read each row: a ranking goes to the sort, anything else to quarantine; the parent's rankings go to the sort, too
    3  find rankings that are alike, sort by digest, drop duplicates, write Parquet
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
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from components.ingest_rankings.alike import Near, Policies, SameRanking
from components.ingest_rankings.exports.columns import column_map
from components.ingest_rankings.exports.export import Export
from components.ingest_rankings.formats import FORMS, Parsed, parse
from components.ingest_rankings.groups import Grouping
from components.ingest_rankings.personal_data.find import check_region
from components.ingest_rankings.personal_data.policy import PersonalData, Policy
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.raters import Raters, salt_of
from components.ingest_rankings.rows import DECLINED, Rejected, Row, shown
from components.ingest_rankings.snapshot import SnapshotWriter
from components.ingest_rankings.sources import Source, SourceFile, find_source
from components.ingest_rankings.watermark import Watermark, changed, check_salt, load, refuse, save, verify, watermark_uri
from components.rlhf.records import iterate_snapshot
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings, json_digest
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
    rater_ids: Literal["hashed", "kept"] = "hashed"
    """Raters' ids: hashed with a salt, or kept, for ids that are pseudonyms already."""
    rater_salt_variable: str = Field("RANKLOOP_RATER_SALT", min_length=1)
    """Environment variable that holds the salt, a secret of 16 characters or more."""
    personal_data: Policy = "report"
    """What to do with e-mail addresses, phone, card and account numbers and keys in texts: report, mask, quarantine or off."""
    phone_region: str = ""
    """Country (ISO 3166, two letters) whose phone numbers are found as written there. Empty: only those with + and code."""
    same_ranking: SameRanking = "drop"
    """One rater's same ranking under another id, source or time: drop all but one, report them, or keep unlooked for."""
    near_duplicates: Near = "report"
    """One rater's nearly the same rankings: report them, quarantine all but one, or keep unlooked for."""
    last_turn: Near = "report"
    """Conversations that differ in the last turn only: report them, quarantine all but one, or keep unlooked for."""
    known_files: Literal["skip", "verify", "reread"] = "skip"
    """Files of an S3 prefix that an earlier ingest read: skip by ETag and size; verify their SHA-256, too; reread as if new."""
    changed_files: Literal["fail", "reread"] = "fail"
    """When such a file is not what it was: fail, or reread everything, which drops the rankings that the file held before."""
    max_row_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of a JSON line; a longer one is quarantined."""
    max_quarantined: int = Field(10_000, ge=0)
    """Rows kept in quarantine.jsonl; further ones are counted with their reasons but not kept."""

    def policies(self) -> Policies:
        return Policies(self.same_ranking, self.near_duplicates, self.last_turn)

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

    file: SourceFile
    rows: int
    formats: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """What the report and the watermark hold of it."""
        stored = self.file.stored
        of_object = {} if stored is None else stored._asdict() | {"sha256": self.file.sha256.hexdigest()}
        return {"uri": self.file.uri, "rows": self.rows, "formats": self.formats, **of_object}


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """Ingests `inputs.rankings`.

    Raises:
        DoNotRetry: no salt, nothing to read, a damaged file, no access, or not one ranking among the rows.
        Retry: the object store or the hub cannot be reached.
    """
    raters = Raters(salt_of(config.rater_ids, config.rater_salt_variable), config.columns)
    # 1. find
    source = find_source(inputs.rankings, context.storage, context.scratch, config.max_row_bytes)
    for name in source.skipped[:NAMES_KEPT]:
        _log.info("skipped, not a data file: %s", name)
    mark_uri, before = _before(config, inputs, source, raters, context)
    known = before.files if before else {}
    new = source._replace(files=[file for file in source.files if file.uri not in known])
    quarantine_path = context.scratch / "report" / "quarantine.jsonl"
    quarantine_path.parent.mkdir()
    ignored: Counter[str] = Counter()
    personal = PersonalData(config.personal_data, config.phone_region, config.test_fraction)
    with (
        Quarantine(quarantine_path, config.max_quarantined, personal, raters) as quarantine,
        SnapshotWriter(context.scratch / "sort", config.policies()) as writer,
    ):
        # 2. read
        rows = context.progress.track(_all_rows(new), None, "rows read")
        files = sort_out(new, rows, config, writer, quarantine, personal, raters, ignored, context.scratch / "groups")
        if before:
            context.storage.fetch_folder(before.snapshot_uri, context.scratch / "parent")
            for row, ranking in enumerate(iterate_snapshot(context.scratch / "parent"), 1):
                writer.add(ranking, before.snapshot_uri, row)
        # 3. sort
        records = context.progress.track(writer.kept_records(quarantine), None, "rankings written")
        snapshot = writer.write(records, context.scratch / "snapshot")
    if quarantine.rows:
        context.tracker.artifact(quarantine_path)
    # 4. count
    reasons = quarantine.reasons + Counter(before.reasons if before else {})
    read = sum(file.rows for file in files) + (before.read if before else 0)
    duplicates = writer.added - writer.alike.quarantined - snapshot.rankings + (before.duplicates if before else 0)
    check_counts(read, snapshot.rankings, duplicates, reasons.total())
    if not snapshot.rankings:
        raise DoNotRetry(
            f"rankings = {inputs.rankings!r}: no ranking in {read} rows of {len(files)} files"
            + "".join(f"\n  {example}" for example in quarantine.examples),
            "correct the rows, or name their form with the option format; components/ingest_rankings/README.md shows each",
        )
    # 5. publish
    described = [known[file.uri] for file in source.files if file.uri in known] + [file.as_dict() for file in files]
    snapshot_uri, ingest_uri = context.uri("rankings", snapshot.digest), _ingest_uri(source, raters, context)
    parents = {"snapshot": before.snapshot_uri} if before and before.snapshot_uri != snapshot_uri else {}
    if context.storage.is_published(snapshot_uri):
        _log.info("the snapshot is there already: %s", snapshot_uri)
    else:
        context.storage.publish_folder(context.scratch / "snapshot", snapshot_uri, {**snapshot.marker, "parents": parents})
    counts = {"read": read, "accepted": snapshot.rankings, "duplicates": duplicates, "quarantined": reasons.total()}
    report = context.marker(
        "ingest",
        **counts,
        declined=reasons[DECLINED],
        quarantine_kept=quarantine.kept,
        reasons=dict(reasons.most_common()),
        new={"files": len(files), "read": sum(file.rows for file in files), "quarantined": quarantine.rows},
        files=sorted(described, key=lambda file: file["uri"]),
        skipped=source.skipped[:NAMES_KEPT],
        skipped_files=len(source.skipped),
        ignored_fields=dict(ignored.most_common()),
        personal_data=personal.report(),
        alike=writer.alike.report(),
        rater_salt_fingerprint=raters.fingerprint,
        snapshot_uri=snapshot_uri,
        parents={"snapshot": before.snapshot_uri, "ingest": before.ingest_uri} if before else {},
    )
    context.storage.delete(join(ingest_uri, MARKER))  # of an earlier attempt: its report must not stand for this one
    context.storage.publish_folder(quarantine_path.parent, ingest_uri, report)
    if mark_uri:
        by_name = known | {file["uri"]: file for file in described}
        mark = Watermark(snapshot_uri, ingest_uri, read, duplicates, reasons.total(), dict(reasons), by_name, raters.fingerprint)
        save(context.storage, mark_uri, mark)
    context.summary.update(counts, rankings=snapshot.rankings)
    return Outputs(snapshot_uri, ingest_uri)


def _before(config: Config, inputs: Inputs, source: Source, raters: Raters, context: Context) -> tuple[str, Watermark | None]:
    """Where the watermark is kept, and the ingestion before, if its files are what they were.

    Rows in groups may be in any file, and what is nearly the same as a quarantined ranking is not known from a snapshot without it.

    Raises:
        DoNotRetry: a known file has changed, or the raters' salt.
    """
    if config.group or config.near_duplicates == "quarantine" or not any(file.stored for file in source.files):
        return "", None
    uri = watermark_uri(context, config, inputs.rankings)
    before = load(context.storage, uri) if config.known_files != "reread" else None
    if before is None:
        return uri, None
    check_salt(before, raters.fingerprint, config.rater_salt_variable)
    lines = changed(source.files, before)
    if not lines and config.known_files == "verify":
        there = {file.uri for file in source.files}
        lines = [line for name, known in before.files.items() if name in there and (line := verify(context.storage, known))]
    if lines and config.changed_files == "reread":
        _log.warning("every file is read again, for some changed: %s", "; ".join(lines[:NAMES_KEPT]))
        return uri, None
    refuse(lines, inputs.rankings)
    if gone := before.files.keys() - {file.uri for file in source.files}:
        _log.warning("%d files are gone whose rankings stay: %s", len(gone), ", ".join(sorted(gone)[:NAMES_KEPT]))
    return uri, before


def _ingest_uri(source: Source, raters: Raters, context: Context) -> str:
    """Of the report: by what was asked for, the salt, and an S3 prefix's content, so that no later report replaces this one."""
    stored = [file.stored for file in source.files if file.stored]
    return context.uri("ingests", json_digest([context.key, raters.fingerprint, *stored])[:32])


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


def check_counts(read: int, accepted: int, duplicates: int, quarantined: int) -> None:
    """Every row that was read is in exactly one of the three.

    Raises:
        RuntimeError: it is not; a defect of this stage, never of the data.
    """
    if accepted + duplicates + quarantined != read or min(accepted, duplicates, quarantined) < 0:
        raise RuntimeError(
            f"rows are lost: {accepted} accepted + {duplicates} duplicates + {quarantined} quarantined != {read} read"
        )
