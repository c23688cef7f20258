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

With `shard` 1 and 2 are done for a part of the files; with `shard_reports` what the shards made is taken over in place of 1 and 2.

Alone: `python -m components.ingest_rankings --rankings data/`

Papers: InstructGPT ranks K = 4 to 9 completions of a prompt (Ouyang et al. 2022, arXiv:2203.02155, section 3.4); HH compares two
(Bai et al. 2022, arXiv:2204.05862).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from components.ingest_rankings.batches import UNLOOKED, Near, Policies, SameRanking
from components.ingest_rankings.exports.columns import column_map
from components.ingest_rankings.formats import FORMS
from components.ingest_rankings.groups import Grouping
from components.ingest_rankings.personal_data.find import check_region
from components.ingest_rankings.personal_data.policy import PersonalData, Policy
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.raters import Raters, salt_of
from components.ingest_rankings.reading import NAMES_KEPT, all_blocks, sort_out
from components.ingest_rankings.rows import DECLINED
from components.ingest_rankings.shards import WHOLE, files_of, reports_of, shard_of, take_over, together
from components.ingest_rankings.snapshot import SnapshotWriter
from components.ingest_rankings.sources import find_source
from components.ingest_rankings.watermark import Watermark, before_this, save
from components.rlhf.records import iterate_snapshot
from components.services.exits import DoNotRetry
from components.services.launch import Context, Settings, json_digest
from components.services.storage import MARKER, StoredObject, join

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
    """One rater's same ranking under another id or source, not at another time: drop all but one, report, or keep unlooked for."""
    near_duplicates: Near = "report"
    """One rater's nearly the same rankings: report them, quarantine all but one, or keep unlooked for."""
    last_turn: Near = "report"
    """Conversations that differ in the last turn only: report them, quarantine all but one, or keep unlooked for."""
    shard: str = WHOLE
    """The part of the files that this ingest reads, i/n from 1/n to n/n; the reports of all n are then merged into one."""
    known_files: Literal["skip", "verify", "reread"] = "skip"
    """Files of an S3 prefix that an earlier ingest read: skip by ETag and size; verify their SHA-256, too; reread as if new."""
    changed_files: Literal["fail", "reread"] = "fail"
    """When such a file is not what it was: fail, or reread everything, which drops the rankings that the file held before."""
    max_row_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of a JSON line; a longer one is quarantined."""
    max_quarantined: int = Field(10_000, ge=0)
    """Rows kept in quarantine.jsonl; further ones are counted with their reasons but not kept."""
    processes: int = Field(0, ge=0, le=64)
    """Processes that read rows; 1 for none but the stage's own, 0 for one for each core, 8 at most. They change no result."""
    RUNTIME_ONLY = frozenset({"processes"})

    def policies(self) -> Policies:
        """A shard looks for nothing that is alike: it may lie in another one."""
        return UNLOOKED if self.shard != WHOLE else Policies(self.same_ranking, self.near_duplicates, self.last_turn)

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FORMS:
            raise ValueError(f"no form {name!r}; there are {', '.join(FORMS)}")
        return name

    @field_validator("shard")
    @classmethod
    def _shard(cls, shard: str) -> str:
        shard_of(shard)
        return shard

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Config:
        if self.group and self.shard != WHOLE:
            raise ValueError(f"shard {self.shard} with group: rows of a group may lie in files of other shards; read all in one")
        return self

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
    shard_reports: tuple[str, ...] = ()
    """Ingest reports of all shards of the source, each i/n once: their snapshots are merged, and no file is read."""
    fingerprint: str = ""
    """Digest of the source (`sources.source_fingerprint`); unused here, it makes an orchestrator's cache key follow the content."""


class Outputs(NamedTuple):
    """URIs of the snapshot and of the ingest report."""

    snapshot_uri: str
    ingest_uri: str


class Gathered(NamedTuple):
    """What was read, now and before.

    Fields:
        read, duplicates, reasons: rows, and what became of those that did not come to the sort this time.
        report: what the ingest report says of files and fields.
        content: the objects of an S3 prefix, so that the report of another content has another name.
        parents: for the report: snapshot and report of the ingestion before, or the shards' reports.
        snapshots: for the snapshot, by name: those whose rankings it took over.
        mark_uri, known: where the watermark goes ("" for none), and the files of the one before.
    """

    read: int
    duplicates: int
    reasons: Mapping[str, int]
    report: dict[str, Any]
    content: Sequence[StoredObject]
    parents: dict[str, Any]
    snapshots: dict[str, str]
    mark_uri: str = ""
    known: Mapping[str, dict[str, Any]] = MappingProxyType({})


def run(config: Config, inputs: Inputs, context: Context) -> Outputs:
    """Ingests `inputs.rankings`.

    Raises:
        DoNotRetry: no salt, nothing to read, a damaged file, no access, or not one ranking among the rows.
        Retry: the object store or the hub cannot be reached.
    """
    raters = Raters(salt_of(config.rater_ids, config.rater_salt_variable), config.columns)
    quarantine_path = context.scratch / "report" / "quarantine.jsonl"
    quarantine_path.parent.mkdir()
    personal = PersonalData(config.personal_data, config.phone_region, config.test_fraction)
    with (
        Quarantine(quarantine_path, config.max_quarantined, personal, raters) as quarantine,
        SnapshotWriter(context.scratch / "sort", config.policies()) as writer,
    ):
        # 1. find, 2. read
        if inputs.shard_reports:
            gathered = _merged(config, inputs, raters, writer, quarantine, context)
        else:
            gathered = _read(config, inputs, raters, personal, writer, quarantine, context)
        # 3. sort
        records = context.progress.track(writer.kept_records(quarantine), None, "rankings written")
        snapshot = writer.write(records, context.scratch / "snapshot")
    if quarantine.rows:
        context.tracker.artifact(quarantine_path)
    # 4. count
    reasons = quarantine.reasons + Counter(gathered.reasons)
    duplicates = writer.added - writer.alike.quarantined - snapshot.rankings + gathered.duplicates
    check_counts(gathered.read, snapshot.rankings, duplicates, reasons.total())
    if not snapshot.rankings and config.shard == WHOLE:
        raise DoNotRetry(
            f"rankings = {inputs.rankings!r}: no ranking in {gathered.read} rows of {len(gathered.report['files'])} files"
            + "".join(f"\n  {example}" for example in quarantine.examples),
            "correct the rows, or name their form with the option format; components/ingest_rankings/README.md shows each",
        )
    # 5. publish
    snapshot_uri = context.uri("rankings", snapshot.digest)
    ingest_uri = context.uri("ingests", json_digest([context.key, raters.fingerprint, *gathered.content])[:32])
    parents = {name: uri for name, uri in gathered.snapshots.items() if uri != snapshot_uri}
    if context.storage.is_published(snapshot_uri):
        _log.info("the snapshot is there already: %s", snapshot_uri)
    else:
        marker = {**snapshot.marker, "rater_salt_fingerprint": raters.fingerprint, "parents": parents}
        context.storage.publish_folder(context.scratch / "snapshot", snapshot_uri, marker)
    counts = {"read": gathered.read, "accepted": snapshot.rankings, "duplicates": duplicates, "quarantined": reasons.total()}
    report = context.marker(
        "ingest",
        **counts,
        declined=reasons[DECLINED],
        quarantine_kept=quarantine.kept,
        reasons=dict(reasons.most_common()),
        **gathered.report,
        alike=writer.alike.report(),
        rater_salt_fingerprint=raters.fingerprint,
        snapshot_uri=snapshot_uri,
        parents=gathered.parents,
    )
    context.storage.delete(join(ingest_uri, MARKER))  # of an earlier attempt: its report must not stand for this one
    context.storage.publish_folder(quarantine_path.parent, ingest_uri, report)
    if gathered.mark_uri:
        files = {**gathered.known, **{file["uri"]: file for file in gathered.report["files"]}}
        mark = Watermark(
            snapshot_uri, ingest_uri, gathered.read, duplicates, reasons.total(), dict(reasons), files, raters.fingerprint
        )
        save(context.storage, gathered.mark_uri, mark)
    context.summary.update(counts, rankings=snapshot.rankings)
    return Outputs(snapshot_uri, ingest_uri)


def _read(
    config: Config,
    inputs: Inputs,
    raters: Raters,
    personal: PersonalData,
    writer: SnapshotWriter,
    quarantine: Quarantine,
    context: Context,
) -> Gathered:
    """Reads the files of the source that were not read before, and the parent's rankings."""
    source = find_source(inputs.rankings, context.storage, context.scratch, config.max_row_bytes)
    for name in source.skipped[:NAMES_KEPT]:
        _log.info("skipped, not a data file: %s", name)
    source = files_of(source, inputs.rankings, shard_of(config.shard))
    mark_uri, before = before_this(config, inputs.rankings, source, raters.fingerprint, context)
    known = before.files if before else {}
    new = source._replace(files=[file for file in source.files if file.uri not in known])
    ignored: Counter[str] = Counter()
    track = partial(context.progress.track, total=None, what="rows read")
    groups = context.scratch / "groups"
    files = sort_out(new, all_blocks(new), config, writer, quarantine, personal, raters, ignored, groups, track)
    if before:
        context.storage.fetch_folder(before.snapshot_uri, context.scratch / "parent")
        for row, ranking in enumerate(iterate_snapshot(context.scratch / "parent"), 1):
            writer.add(ranking, before.snapshot_uri, row)
    read = sum(file.rows for file in files)
    described = [known[file.uri] for file in source.files if file.uri in known] + [file.as_dict() for file in files]
    return Gathered(
        read=read + (before.read if before else 0),
        duplicates=before.duplicates if before else 0,
        reasons=before.reasons if before else {},
        report={
            "new": {"files": len(files), "read": read, "quarantined": quarantine.rows},
            "files": sorted(described, key=lambda file: file["uri"]),
            "skipped": source.skipped[:NAMES_KEPT],
            "skipped_files": len(source.skipped),
            "ignored_fields": dict(ignored.most_common()),
            "personal_data": personal.report(),
        },
        content=[file.stored for file in source.files if file.stored],
        parents={"snapshot": before.snapshot_uri, "ingest": before.ingest_uri} if before else {},
        snapshots={"snapshot": before.snapshot_uri} if before else {},
        mark_uri=mark_uri,
        known=known,
    )


def _merged(
    config: Config, inputs: Inputs, raters: Raters, writer: SnapshotWriter, quarantine: Quarantine, context: Context
) -> Gathered:
    """Takes over what the shards read."""
    reports = reports_of(inputs.shard_reports, config, inputs.rankings, raters.fingerprint, context)
    take_over(reports, writer, quarantine, context)
    return Gathered(
        read=sum(report["read"] for report in reports.values()),
        duplicates=sum(report["duplicates"] for report in reports.values()),
        reasons={},  # the quarantine has them
        report=together(reports.values()),
        content=[],
        parents={"shards": list(reports)},
        snapshots={f"shard {report['config']['shard']}": report["snapshot_uri"] for report in reports.values()},
    )


def check_counts(read: int, accepted: int, duplicates: int, quarantined: int) -> None:
    """Every row that was read is in exactly one of the three.

    Raises:
        RuntimeError: it is not; a defect of this stage, never of the data.
    """
    if accepted + duplicates + quarantined != read or min(accepted, duplicates, quarantined) < 0:
        raise RuntimeError(
            f"rows are lost: {accepted} accepted + {duplicates} duplicates + {quarantined} quarantined != {read} read"
        )
