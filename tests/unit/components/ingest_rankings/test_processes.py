"""Rows sorted out by several processes: the same result as by one, and an end with a clear message when one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from components.ingest_rankings import processes, rows
from components.ingest_rankings.batches import UNLOOKED
from components.ingest_rankings.processes import Sorting, cores
from components.ingest_rankings.rows import Lines
from components.ingest_rankings.sorter import Reading
from components.services.exits import Retry

READING = Reading("auto", {}, "s", 0.1, "a salt of 16 letters", "report", "", UNLOOKED, 10**6)


def line(number: int) -> bytes:
    if number % 50 == 7:
        return b"no JSON\n"
    texts = [f"answer {k} to {number % 150}, write to a{number}@example.org" if k else f"plain {number % 150}" for k in range(3)]
    row = {"prompt": f"question {number % 150}", "completions": texts, "ranks": [1, 2, 3], "rater_id": f"r{number % 9}", "x": 1}
    return orjson.dumps(row) + b"\n"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ALONE_BLOCKS", 1)
    monkeypatch.setattr(rows, "READ_BYTES", 2000)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4000)


def blocks(count: int) -> Iterator[tuple[str, Lines]]:
    for number in range(count):
        yield "a", Lines(1 + 10 * number, 10, b"".join(line(each) for each in range(10 * number, 10 * number + 10)))


def test_the_number_of_processes_changes_nothing(ingest: Callable[..., Any]) -> None:
    files = {name: b"".join(line(first + n) for n in range(300)) for name, first in (("a.jsonl", 0), ("b.jsonl", 200))}
    files["c.tsv"] = b"chosen\trejected\tprompt\n" + b"".join(b"yes %d\tno\twell?\n" % n for n in range(200))
    one, two = (ingest(files, processes=count) for count in (1, 2))
    assert one.read == 800
    assert one.reasons["not JSON"] > 10

    def told(found: Any) -> str:  # each ingest has a folder of its own
        folder = str(Path(found.files[0].file.uri).parent)
        whole = found._replace(files=[file.as_dict() for file in found.files])
        return repr(whole).replace(folder, "")

    assert told(two) == told(one)


def test_a_killed_process_ends_the_ingest() -> None:
    with Sorting(READING, 2) as sorting:
        each = sorting.each(blocks(10_000))
        while not sorting._ready.is_set():
            next(each)
        victim = sorting._processes[0]
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(Retry, match=rf"pid {victim.pid}\) was ended by SIGKILL; nothing is published"):
            list(each)
    assert all(process.poll() is not None for process in sorting._processes), "none outlives the ingest"


def test_processes_end_with_an_ingest_that_is_stopped() -> None:
    class Stopped(Exception):
        pass

    def until_stopped() -> Iterator[tuple[str, Lines]]:
        yield from blocks(20)
        raise Stopped

    with pytest.raises(Stopped), Sorting(READING, 2) as sorting:
        list(sorting.each(until_stopped()))
    assert all(process.poll() is not None for process in sorting._processes)


def test_a_defect_in_a_process_is_told() -> None:
    wrong: Any = ("a", 5)

    def with_a_wrong_one() -> Iterator[tuple[str, Any]]:
        yield from blocks(2)
        assert sorting._ready.wait(60)
        yield wrong

    with pytest.raises(RuntimeError, match=r"a process of the ingest failed:\n(.|\n)*Error"), Sorting(READING, 2) as sorting:
        list(sorting.each(with_a_wrong_one()))


@pytest.mark.parametrize(("limit", "expected"), [("max 100000", 8), ("250000 100000", 2), ("10000 100000", 1), ("?", 8)])
def test_cores_are_those_that_a_container_may_use(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(processes, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores() == expected
