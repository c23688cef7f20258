"""`rankloop run` while a server that it needs goes away."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from components.services.exits import EXIT_RETRY
from tests.integration.pipelines.loop import STAGES, left_behind, run, start, wait_for_stage, write_rankings


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
