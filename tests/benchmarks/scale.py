"""How long the data stages take at 100,000 and at 1,000,000 rankings, and how much memory at most.

    python -m tests.benchmarks.scale --rankings 100000 1000000

A ranking has a prompt and four completions, about 1 KB in all; every fifth prompt is ordered by a second one of 200 raters, and one
in ten is held out. The validation is measured without its servers: from the Parquet files of a snapshot on disk to the checks and
both pages. Each size runs in a process of its own, whose peak of resident memory the kernel keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.rlhf.records import SCHEMA

COMPLETIONS, RATERS, GROUP = 4, 200, 1000
SECOND_OPINION, HELD_OUT = 0.2, 0.1
PHRASES_EACH = 6  # of about 33 characters: five texts of them are 1 KB


def rankings(count: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Row groups of made-up rankings; raters see a quality of each completion through noise."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(3, 10))) for _ in range(20_000)]
    phrases = [" ".join(words[i] for i in rng.integers(0, len(words), 5)) for _ in range(200_000)]

    def texts(number: int) -> list[str]:
        chosen = rng.integers(0, len(phrases), (number, PHRASES_EACH)).tolist()
        return [" ".join(phrases[i] for i in each) for each in chosen]

    made = 0
    while made < count:
        number = min(GROUP, count - made)
        prompts = int(np.ceil(number / (1 + SECOND_OPINION)))
        prompt, completions = texts(prompts), texts(COMPLETIONS * prompts)
        quality, held_out = rng.normal(size=(prompts, COMPLETIONS)), rng.random(prompts) < HELD_OUT
        rows = []
        for place in range(number):
            of = place % prompts
            ranks = np.argsort(np.argsort(-quality[of] - rng.normal(size=COMPLETIONS))) + 1
            rows.append(
                {
                    "ranking_id": f"r{made + place}",
                    "prompt": [{"role": "user", "content": prompt[of]}],
                    "completions": completions[COMPLETIONS * of : COMPLETIONS * (of + 1)],
                    "ranks": ranks.tolist(),
                    "rater_id": f"rater-{rng.integers(RATERS)}",
                    "source": "made up",
                    "collected_at": f"2026-01-{1 + place % 28:02}T{place % 24:02}:{made // GROUP % 60:02}:00Z",
                    "split": "test" if held_out[of] else "train",
                }
            )
        yield rows
        made += number


def write_snapshot(folder: Path, count: int, seed: int = 0) -> int:
    """Parquet files as an ingest writes them; gives the bytes of text in them."""
    folder.mkdir()
    size = 0
    writer: pq.ParquetWriter | None = None
    for number, rows in enumerate(rankings(count, seed)):
        if number % 200 == 0:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(folder / f"part-{number // 200:05}.parquet", SCHEMA, compression="zstd")
        size += sum(len(row["prompt"][0]["content"]) + sum(map(len, row["completions"])) for row in rows)
        assert writer is not None
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    if writer is not None:
        writer.close()
    return size


def validate(snapshot: Path, scratch: Path) -> dict[str, Any]:
    """Measures one validation in this process."""
    from components.validate_data.facts import collect
    from components.validate_data.page import data_docs
    from components.validate_data.rater_page import rater_report
    from components.validate_data.stage import Config
    from components.validate_data.suite import Suite, gate_of

    config = Config()
    suite = Suite(config)
    started, worked = time.perf_counter(), time.process_time()
    facts = collect(snapshot, {"read": 1, "quarantined": 0}, scratch, config, suite.look)
    checks = suite.checks(facts)
    pages = data_docs(checks, suite.results, gate_of(checks), "") + rater_report(facts, checks, "")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "gate": gate_of(checks),
        "warnings": [check.name for check in checks if check.verdict == "warn"],
        "pages_bytes": len(pages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="of snapshots to keep and to use again")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(validate(arguments.measure, Path(scratch))))
        return
    print(f"{'rankings':>10} {'text MB':>8} {'seconds':>8} {'of CPU':>8} {'rankings/s':>11} {'peak MiB':>9}  gate")
    with tempfile.TemporaryDirectory() as scratch:
        for count in arguments.rankings:
            snapshot = (arguments.folder or Path(scratch)) / f"snapshot-{count}"
            size = 0 if snapshot.exists() else write_snapshot(snapshot, count)
            command = [sys.executable, "-m", "tests.benchmarks.scale", "--measure", str(snapshot)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{count:>10} {size / 1e6:>8.0f} {found['seconds']:>8.1f} {found['cpu_seconds']:>8.1f} "
                f"{count / found['seconds']:>11.0f} {found['peak_bytes'] / 2**20:>9.0f}  {found['gate']} {found['warnings']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
