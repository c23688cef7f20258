"""What of an S3 prefix has been read before: its files with ETag, size and SHA-256, and the snapshot that holds their rankings.

Files keep arriving below a prefix. An ingestion reads the new ones and takes the others' rankings from its parent, the snapshot of
the ingestion before, so that the result is the one of reading everything, digest and counts included. A file that changed behind
its key cannot be treated so, for its old rankings cannot be told from the others in the parent; it ends the stage, unless the
profile says to read everything anew.

The watermark belongs to a place, to how its rows are read, and to the code: another form or release reads everything once more.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from components.ingest_rankings.rows import READ_BYTES
from components.ingest_rankings.sources import Source, SourceFile
from components.services.exits import DoNotRetry
from components.services.launch import Context, code_digest, json_digest
from components.services.storage import Storage

if TYPE_CHECKING:
    from components.ingest_rankings.stage import Config

NOT_READING = {"known_files", "changed_files", "max_quarantined"}  # settings that change no ranking
SHOWN = 5  # files named in a message

_log = logging.getLogger(__name__)


class Watermark(NamedTuple):
    """The ingestion before.

    Fields:
        snapshot_uri, ingest_uri: what it made.
        read, duplicates, quarantined, reasons: its counts, of all files up to then.
        files: name to `uri, size_bytes, etag, sha256, rows, formats` of every file whose rankings are in the snapshot.
        rater_salt: fingerprint of the salt of its raters' pseudonyms, "" for raters whose ids were kept.
    """

    snapshot_uri: str
    ingest_uri: str
    read: int
    duplicates: int
    quarantined: int
    reasons: dict[str, int]
    files: dict[str, dict[str, Any]]
    rater_salt: str


def watermark_uri(context: Context, config: Config, rankings: str) -> str:
    reading = config.model_dump(mode="json", exclude=NOT_READING)
    return context.uri("watermarks", json_digest([rankings, reading, code_digest()])[:32] + ".json")


def before_this(config: Config, rankings: str, source: Source, rater_salt: str, context: Context) -> tuple[str, Watermark | None]:
    """Where the watermark is kept, and the ingestion before, if its files are what they were.

    Rows in groups may be in any file, and what is nearly the same as a quarantined ranking is not known from a snapshot without it.

    Raises:
        DoNotRetry: a known file has changed, or the raters' salt.
    """
    if config.group or config.near_duplicates == "quarantine" or not any(file.stored for file in source.files):
        return "", None
    uri = watermark_uri(context, config, rankings)
    before = load(context.storage, uri) if config.known_files != "reread" else None
    if before is None:
        return uri, None
    check_salt(before, rater_salt, config.rater_salt_variable)
    lines = changed(source.files, before)
    if not lines and config.known_files == "verify":
        there = {file.uri for file in source.files}
        lines = [line for name, known in before.files.items() if name in there and (line := verify(context.storage, known))]
    if lines and config.changed_files == "reread":
        _log.warning("every file is read again, for some changed: %s", "; ".join(lines[:SHOWN]))
        return uri, None
    refuse(lines, rankings)
    if gone := before.files.keys() - {file.uri for file in source.files}:
        _log.warning("%d files are gone whose rankings stay: %s", len(gone), ", ".join(sorted(gone)[:SHOWN]))
    return uri, before


def load(storage: Storage, uri: str) -> Watermark | None:
    """The watermark, if there is one and its snapshot still is there."""
    if not storage.exists(uri):
        return None
    mark = Watermark(**storage.get_json(uri))
    if not storage.is_published(mark.snapshot_uri):
        _log.warning("%s is gone: every file is read again", mark.snapshot_uri)
        return None
    return mark


def save(storage: Storage, uri: str, mark: Watermark) -> None:
    storage.put_json(uri, mark._asdict())


def changed(files: Sequence[SourceFile], mark: Watermark) -> list[str]:
    """A line for each known file that is not what it was."""
    result = []
    for file in files:
        known = mark.files.get(file.uri)
        if known and file.stored and (file.stored.size_bytes, file.stored.etag) != (known["size_bytes"], known["etag"]):
            result.append(
                f"{file.uri}: {known['size_bytes']} bytes with ETag {known['etag']} when it was read, "
                f"now {file.stored.size_bytes} with {file.stored.etag}"
            )
    return result


def check_salt(mark: Watermark, fingerprint: str, variable: str) -> None:
    """Sees to it that new rankings come under the same pseudonyms: a rater under two salts would be two raters.

    Raises:
        DoNotRetry: the salt is another one.
    """
    if mark.rater_salt != fingerprint:
        raise DoNotRetry(
            f"the salt of the raters' pseudonyms in {variable} is not the one of {mark.snapshot_uri}: its raters would not be "
            "recognised in new rankings",
            f"set {variable} to the salt of before; if the change is meant, set known_files to reread once, which gives everybody "
            "a pseudonym under the new one",
        )


def refuse(lines: Sequence[str], rankings: str) -> None:
    """Ends the stage if there is a line for a file that changed.

    Raises:
        DoNotRetry: there is.
    """
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise DoNotRetry(
            f"rankings = {rankings!r}: {len(lines)} files that were read before have changed\n  "
            + "\n  ".join(lines[:SHOWN])
            + more,
            "give new rankings a new name; if the change is meant, set changed_files to reread, which reads everything anew",
        )


def verify(storage: Storage, known: Mapping[str, Any]) -> str:
    """A line that says so if a known file's content has not the SHA-256 that it had, else ""; reads the whole file."""
    digest = hashlib.sha256()
    with storage.open_read(known["uri"], known["etag"]) as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
    if digest.hexdigest() == known["sha256"]:
        return ""
    return f"{known['uri']}: SHA-256 {known['sha256']} when it was read, now {digest.hexdigest()}, under the same ETag"
