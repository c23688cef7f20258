"""How fast an ingest is at 100,000 and at 1,000,000 rankings, and how much memory it takes at most.

    python -m tests.benchmarks.scale_ingest --rankings 100000 1000000

The rankings of `scale` (a prompt and four completions, about 1 KB), as one gzip JSONL file on a real S3 server, SeaweedFS, started
here. The whole stage is measured with its defaults, from the object as it is streamed to the published snapshot and report: raters
are hashed, personal data is searched, rankings that are alike are looked for. Beside it, in the same run, what pyarrow takes to
stream the same object through `open_json` and to write it as Parquet, which checks nothing, sorts nothing and drops nothing.

Each measurement is a process of its own, whose peak of resident memory the kernel keeps; to it comes as often the peak of the
largest of the stage's own processes as there are of them. Seconds of CPU are those of all of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from components.ingest_rankings.processes import processes_of
from components.services.storage import Storage, join
from pipelines.local_services import LocalServices, environment_of
from tests.benchmarks.scale import rankings

MEASURES = ("ingest", "pyarrow")


def write_lines(path: Path, count: int) -> int:
    """A gzip JSONL of made-up rankings; gives the bytes of its unpacked lines."""
    size = 0
    with gzip.open(path, "wb", compresslevel=6) as file:
        for rows in rankings(count, 0):
            data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
            file.write(data)
            size += len(data)
    return size


def ingest(uri: str, scratch: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The stage, but for its MLflow run."""
    from components.ingest_rankings.stage import Config, Inputs, run
    from components.services.launch import Context

    config, inputs = Config(**settings), Inputs(rankings=uri)
    context = Context("ingest_rankings", config, inputs, scratch)
    run(config, inputs, context)
    return context.summary


def rewrite(uri: str, scratch: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """pyarrow's own streaming reader and writer."""
    from pyarrow.json import open_json

    written = 0
    with Storage().open_read(uri) as body:
        reader = open_json(pa.CompressedInputStream(pa.PythonFile(body, mode="r"), "gzip"))
        with pq.ParquetWriter(scratch / "part.parquet", reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
                written += batch.num_rows
    return {"read": written}


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measured(what: str, uri: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures one of `MEASURES` in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        started, worked = time.perf_counter(), _cpu_seconds()
        summary = (ingest if what == "ingest" else rewrite)(uri, Path(scratch), settings)
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        processes = processes_of(settings.get("processes", 0))
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": _cpu_seconds() - worked,
            "peak_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + processes * largest),
            **summary,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turn")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the ingest, as JSON")
    parser.add_argument("--folder", type=Path, help="of files to keep and to use again")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "URI"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(*arguments.measure, arguments.settings)))
        return
    print(
        f"{'rankings':>10} {'MB':>6} {'what':>8} {'seconds':>8} {'of CPU':>8} {'rankings/s':>11} {'/s of CPU':>10} {'peak MiB':>9}"
    )
    with tempfile.TemporaryDirectory() as scratch, LocalServices(Path(scratch) / "home") as services, environment_of(services):
        for count in arguments.rankings:
            path = (arguments.folder or Path(scratch)) / f"rankings-{count}.jsonl.gz"
            size = 0 if path.exists() else write_lines(path, count)
            for number in range(arguments.rounds):
                uri = join(services.storage_root, f"scale-{count}-{number}", path.name)
                Storage().upload_file(path, uri)
                for what in MEASURES:
                    options = ["--measure", what, uri, "--settings", json.dumps(arguments.settings)]
                    command = [sys.executable, "-m", "tests.benchmarks.scale_ingest", *options]
                    # A place of its own for each, so that no ingest finds the snapshot of the one before.
                    place = {"RANKLOOP_STORAGE": join(services.storage_root, f"out-{count}-{number}")}
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **place})
                    found = json.loads(done.stdout.splitlines()[-1])
                    assert found["read"] == count, found
                    seconds, worked, peak = found["seconds"], found["cpu_seconds"], found["peak_bytes"] / 2**20
                    print(
                        f"{count:>10} {size / 1e6:>6.0f} {what:>8} {seconds:>8.1f} {worked:>8.1f} "
                        f"{count / seconds:>11.0f} {count / worked:>10.0f} {peak:>9.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
