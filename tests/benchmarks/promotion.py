"""Twenty processes promote different challengers against the same champion, again and again: one wins, whatever the moment.

    python -m tests.benchmarks.promotion --rounds 100 --processes 20

On a real MLflow server with PostgreSQL and a real S3 server, both started here. Of every round exactly one process must win, the
others must say who did, `previous_champion` must be the old champion, and the audit must be whole at the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from components.register_model.audit import faults
from components.register_model.promotion import ANCHOR_TAG
from components.services.tracking import client
from pipelines.local_services import LocalServices, environment_of
from tests.postgres import mlflow_on_postgres
from tests.promotion_processes import new_pair, race


def rounds(count: int, processes: int, folder: Path) -> list[str]:
    """Runs so many rounds on the servers of the environment and gives what went wrong in any."""
    pair = new_pair(processes + 1)
    pair.promote("1", "")
    versions = [str(version) for version in range(1, processes + 2)]
    champion, wrong, seconds, winners = "1", [], [], Counter[str]()
    for number in range(count):
        began = time.monotonic()
        result = race(pair, champion, [version for version in versions if version != champion], folder)
        seconds.append(time.monotonic() - began)
        wrong += [f"round {number}: {fault}" for fault in result.faults(champion)]
        champion = result.champion
        winners[champion] += 1
    records = pair.registry().audit.records()
    wrong += faults(records, client().get_registered_model(pair.policy).tags[ANCHOR_TAG])
    promotions = sum(record.content["event"] == "done" for record in records)
    wrong += [] if promotions == count + 1 else [f"the audit tells {promotions} promotions, not {count + 1}"]
    print(
        f"{count} rounds of {processes} processes: {len(wrong)} faults; {len(winners)} versions have won; "
        f"{statistics.median(seconds):.1f} s a round [{min(seconds):.1f}, {max(seconds):.1f}]; {len(records)} records of the audit"
    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--processes", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        with LocalServices(folder / "home") as services, environment_of(services):
            with mlflow_on_postgres(services, folder) as address:
                os.environ["MLFLOW_TRACKING_URI"] = address
                wrong = rounds(options.rounds, options.processes, folder)
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
