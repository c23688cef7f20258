"""`rankloop run` that is interrupted, in each of its stages, or loses a server; and what is published then."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from components.services.exits import EXIT_INTERRUPTED, EXIT_RETRY
from components.services.storage import Storage
from pipelines.local_services import LocalServices, environment_of
from tests.integration.pipelines.loop import STAGES, left_behind, registry, run, start, wait_for_stage, write_rankings


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_end_in_any_stage_stops_everything_and_the_next_run_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    home = tmp_path / "loop"
    rankings = write_rankings(tmp_path / "rankings.jsonl", 200, seed=0)
    for runs_before, stage in enumerate(STAGES):
        process = start(home, "--rankings", str(rankings))
        wait_for_stage(home, runs_before, stage, process)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == (EXIT_INTERRUPTED if number == signal.SIGINT else -number), output
        assert ("interrupted" in output) == (number == signal.SIGINT)
        assert "Traceback" not in output
        wait_until_nothing_is_left(home)
    versions, aliases = registry(home)
    assert len(versions) <= 1
    assert "champion" not in aliases

    done = run(home, "--rankings", str(rankings))
    assert done.returncode == 0, done.stdout + done.stderr
    versions, aliases = registry(home)
    assert len(versions) == 1, "a retry registers nothing twice"
    assert aliases["champion"] == "1"
    assert "200 read, 200 kept, 0 duplicates, 0 quarantined" in done.stdout
    check_what_is_published(home)


def wait_until_nothing_is_left(home: Path) -> None:
    """A run that was killed takes nothing along itself; its watchdog does, within seconds."""
    deadline = time.monotonic() + 20
    while left := left_behind(home):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_two_runs_that_begin_together_make_one_champion(tmp_path: Path) -> None:
    """As when a schedule and a trigger fire at once."""
    home = tmp_path / "loop"
    rankings = write_rankings(tmp_path / "rankings.jsonl", 200, seed=4)
    both = [start(home, "--rankings", str(rankings)) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=300)
        print(process.returncode, output)
    assert [process.returncode for process in both] == [0, 0]
    versions, aliases = registry(home)
    assert len(versions) == 1
    assert aliases["champion"] == "1"
    check_what_is_published(home)


def check_what_is_published(home: Path) -> None:
    """Whatever was interrupted: a folder of artifacts has its marker, or it is not counted."""
    with LocalServices(home) as services, environment_of(services):
        storage = Storage()
        for kind in ("policies", "reward_models", "evaluations"):
            uris = [item.uri for item in storage.list(f"{services.storage_root}/{kind}/")]
            markers = {uri.rpartition("/")[0] for uri in uris if uri.endswith("/rankloop.json")}
            assert markers, kind
            for uri in uris:
                assert any(uri.startswith(folder + "/") for folder in markers), f"{uri} belongs to no published folder"
        assert not list(storage.list(f"{services.storage_root}/checkpoints/")), "finished work leaves no checkpoint"


def test_mlflow_killed_in_the_middle_is_a_failure_to_retry_and_the_retry_succeeds(tmp_path: Path) -> None:
    home = tmp_path / "loop"
    rankings = write_rankings(tmp_path / "rankings.jsonl", 220, seed=3)
    process = start(home, "--rankings", str(rankings))
    wait_for_stage(home, 0, "train_reward_model", process)
    servers = json.loads((home / "services.json").read_text(encoding="utf-8"))
    os.killpg(servers["processes"][1], signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == EXIT_RETRY, output
    assert "MLflow" in output
    assert "Traceback" not in output
    assert not left_behind(home)

    done = run(home, "--rankings", str(rankings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^= (\w+) +reused", done.stdout, re.M)[:3] == list(STAGES[:3])
