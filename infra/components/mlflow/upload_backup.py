"""Uploads a folder of PostgreSQL dumps to `<storage>/backups/postgres/<time>/`. Runs in the cron job `rankloop-postgres-backup`.

    python upload_backup.py FOLDER

The marker `rankloop.json`, with the SHA-256 of each dump, is written last: a folder without it is no back-up. RANKLOOP_STORAGE and
boto3's variables say where to. Exit codes are those of a stage: 65 nothing to upload or no right to, 75 the store does not answer.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from components.services.exits import DoNotRetry, StageFailure
from components.services.storage import Storage, join

MAGIC = b"PGDMP"  # how a dump of pg_dump's custom format begins


def upload(folder: Path) -> str:
    """Publishes the dumps; returns where."""
    dumps = sorted(folder.glob("*.dump"))
    for dump in dumps:
        with open(dump, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DoNotRetry(f"{dump} is no dump of pg_dump's custom format", "see the log of the container `dump`")
    if not dumps:
        raise DoNotRetry(f"no *.dump in {folder}", "see the log of the container `dump`")
    uri = join(os.environ["RANKLOOP_STORAGE"], "backups", "postgres", datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ"))
    sizes = {dump.name: dump.stat().st_size for dump in dumps}
    Storage().publish_folder(folder, uri, {"role": "backup", "databases": [dump.stem for dump in dumps], "size_bytes": sizes})
    return uri


if __name__ == "__main__":
    try:
        print(upload(Path(sys.argv[1])))
    except StageFailure as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)
