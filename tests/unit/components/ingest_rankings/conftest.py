from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import orjson
import pytest

from components.ingest_rankings.personal_data.policy import PersonalData
from components.ingest_rankings.quarantine import Quarantine
from components.ingest_rankings.raters import Raters, salt_of
from components.ingest_rankings.reading import all_blocks, sort_out
from components.ingest_rankings.snapshot import Snapshot, SnapshotWriter
from components.ingest_rankings.sources import find_source
from components.ingest_rankings.stage import Config
from components.rlhf.records import Ranking, iterate_snapshot
from components.services.storage import Storage


class Ingested(NamedTuple):
    snapshot: Snapshot
    rankings: list[Ranking]
    quarantined: list[dict[str, Any]]
    reasons: Counter[str]
    read: int
    duplicates: int
    ignored: Counter[str]
    files: list[Any]
    personal_data: dict[str, Any]
    alike: dict[str, Any]


@cache
def store() -> Storage:
    """Made once: a client of boto3 takes longer than what is tested here, and local files need none."""
    return Storage()


def ingest_source(uri: str, scratch: Path, config: Config) -> Ingested:
    source = find_source(uri, store(), scratch, config.max_row_bytes)
    ignored: Counter[str] = Counter()
    raters = Raters(salt_of(config.rater_ids, config.rater_salt_variable), config.columns)
    personal = PersonalData(config.personal_data, config.phone_region, config.test_fraction)
    with (
        Quarantine(scratch / "q.jsonl", config.max_quarantined, personal, raters) as quarantine,
        SnapshotWriter(scratch / "sort", config.policies()) as writer,
    ):
        files = sort_out(source, all_blocks(source), config, writer, quarantine, personal, raters, ignored, scratch / "groups")
        snapshot = writer.write(writer.kept_records(quarantine), scratch / "snapshot")
    return Ingested(
        snapshot,
        list(iterate_snapshot(scratch / "snapshot")),
        [orjson.loads(line) for line in (scratch / "q.jsonl").read_bytes().splitlines()],
        quarantine.reasons,
        sum(file.rows for file in files),
        writer.added - writer.alike.quarantined - snapshot.rankings,
        ignored,
        files,
        personal.report(),
        writer.alike.report(),
    )


@pytest.fixture(scope="session")
def ingest() -> Callable[..., Ingested]:
    """Everything between a source and S3: `ingest({"a.jsonl": bytes}, **config)` or `ingest(path, **config)`."""

    def run(source: Mapping[str, bytes] | Path | str, **config: Any) -> Ingested:
        with TemporaryDirectory() as folder:
            scratch = Path(folder) / "scratch"
            scratch.mkdir()
            if isinstance(source, Mapping):
                for name, data in source.items():
                    path = Path(folder) / "data" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                source = Path(folder) / "data"
            return ingest_source(str(source), scratch, Config(**{"rater_ids": "kept"} | config))

    return run
