"""One source read by several ingests, and their snapshots made one: what a single ingest would have made, by digest and by counts.

Files are dealt by the SHA-256 of their names below the source, so that a file stays with its shard when others arrive. A shard only
reads, checks and sorts; rankings that are alike may lie in two shards, so they are looked for where all are merged.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.ingest_rankings.personal_data.find import KINDS
from components.ingest_rankings.personal_data.policy import PLACES
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.snapshot import SnapshotWriter
from components.ingest_rankings.sources import Source
from components.rlhf.records import iterate_snapshot
from components.services.exits import DoNotRetry
from components.services.launch import Context, code_digest
from components.services.storage import MARKER, join

if TYPE_CHECKING:
    from components.ingest_rankings.stage import Config

WHOLE = "1/1"
_REMEDY = "give the ingest reports of all shards of one source, read with the same settings, salt and release"


class Shard(NamedTuple):
    """Number `number` of `of`, from 1."""

    number: int
    of: int


def shard_of(text: str) -> Shard:
    """`2/8` as numbers.

    Raises:
        ValueError: it is not i/n with 1 <= i <= n.
    """
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ValueError(f"not a shard: {text!r}; expected i/n with i from 1 to n, such as 2/8")
    return Shard(int(number), int(of))


def files_of(source: Source, rankings: str, shard: Shard) -> Source:
    """The shard's part of a source; it may be empty."""
    return source._replace(files=[file for file in source.files if _dealt(file.uri, rankings, shard.of) == shard.number])


def _dealt(uri: str, rankings: str, shards: int) -> int:
    name = uri.removeprefix(rankings.rstrip("/"))
    return 1 + int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") % shards


def reports_of(uris: Sequence[str], config: Config, rankings: str, salt: str, context: Context) -> dict[str, dict[str, Any]]:
    """The reports of all shards in their order, by URI.

    Raises:
        DoNotRetry: one is missing or comes twice, or was made from another source, or with other settings, salt or code.
    """
    reports = [context.storage.get_json(join(uri, MARKER)) for uri in uris]
    expected = config.model_dump(mode="json")
    for uri, report in zip(uris, reports, strict=True):
        if report.get("role") != "ingest":
            raise DoNotRetry(f"{uri} is no report of an ingest but of role {report.get('role')!r}", _REMEDY)
        found = {**report["config"], "rankings": report["inputs"]["rankings"], "code": report["code"]}
        found |= {"rater_salt_fingerprint": report["rater_salt_fingerprint"]}
        wanted = {**expected, "rankings": rankings, "code": code_digest(), "rater_salt_fingerprint": salt}
        for name in sorted(wanted.keys() - {"shard"} - config.RUNTIME_ONLY):
            if found.get(name) != wanted[name]:
                raise DoNotRetry(f"shard {uri} has {name} = {found.get(name)!r}, and here it is {wanted[name]!r}", _REMEDY)
    shards = sorted(report["config"]["shard"] for report in reports)
    if shards != sorted(f"{number}/{len(reports)}" for number in range(1, len(reports) + 1)):
        raise DoNotRetry(f"shard_reports are of {', '.join(shards)}: not each shard once", _REMEDY)
    return dict(sorted(zip(uris, reports, strict=True), key=lambda item: shard_of(item[1]["config"]["shard"])))


def take_over(reports: Mapping[str, dict[str, Any]], writer: SnapshotWriter, quarantine: Quarantine, context: Context) -> None:
    """Gives the shards' rankings to `writer`, and what they quarantined to `quarantine`."""
    for uri, report in reports.items():
        with tempfile.TemporaryDirectory(dir=context.scratch) as folder:
            context.storage.fetch_folder(uri, Path(folder) / "report")
            quarantine.take_over(Path(folder) / "report" / "quarantine.jsonl", report["reasons"])
            context.storage.fetch_folder(report["snapshot_uri"], Path(folder) / "snapshot")
            for row, ranking in enumerate(iterate_snapshot(Path(folder) / "snapshot"), 1):
                writer.add(ranking, report["snapshot_uri"], row)


def together(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the report of the whole holds of the shards' own."""
    reports = list(reports)
    personal = [report["personal_data"] for report in reports]
    places: Counter[str] = Counter()
    first_places = []
    for place in (place for each in personal for place in each["places"]):
        places[place["kind"]] += 1
        if places[place["kind"]] <= PLACES:
            first_places.append(place)
    found = dict(_sum(each["found"] for each in personal))
    return {
        "files": sorted((file for report in reports for file in report["files"]), key=lambda file: file["uri"]),
        "skipped": reports[0]["skipped"],
        "skipped_files": reports[0]["skipped_files"],
        "ignored_fields": dict(_sum(report["ignored_fields"] for report in reports).most_common()),
        "personal_data": {
            "policy": personal[0]["policy"],
            "rankings": sum(each["rankings"] for each in personal),
            "found": {kind: found[kind] for kind in KINDS if kind in found},
            "places": first_places,
        },
        "new": dict(_sum(report["new"] for report in reports)),
    }


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
