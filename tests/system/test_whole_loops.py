"""The whole loop in its other forms: both methods with the study of raters, the drift watch that retrains, and the same again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.local_services import LocalServices
from tests.integration.pipelines.loop import STAGES, registry, run, write_rankings


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rankings(tmp_path_factory.mktemp("labels") / "rankings.jsonl", 210, seed=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, rankings: Path) -> Iterator[Path]:
    """With a champion, and servers that are kept up: they take six seconds to start."""
    home = tmp_path_factory.mktemp("loop")
    with LocalServices(home):
        done = run(home, "--rankings", str(rankings))
        assert done.returncode == 0, done.stdout + done.stderr
        yield home


def test_a_changed_setting_repeats_its_stage_and_those_after_it(home: Path, rankings: Path) -> None:
    done = run(home, "--rankings", str(rankings), "--set", "ppo_finetune.beta=0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^= (\w+) +reused", done.stdout, re.M) == list(STAGES[:4])


def test_both_methods_are_trained_and_the_evaluation_chooses_one(home: Path, rankings: Path) -> None:
    study = ("--set", "rater_study.folds=2", "--set", "rater_study.threads=1")
    done = run(home, "--rankings", str(rankings), "--method", "both", *study)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^= (\w+) +reused", done.stdout, re.M) == list(STAGES[:4])
    assert sorted(re.findall(r"^✓ (\w+)", done.stdout, re.M)) == [
        "dpo_finetune",
        "evaluate",
        "ppo_finetune",
        "rater_study",
        "register_model",
    ]
    chosen, other = re.findall(r"method +│ (ppo|dpo): judge score .* of (ppo|dpo), on \d+ other prompts", done.stdout)[0]
    assert {chosen, other} == {"ppo", "dpo"}
    assert made_by(home, done.stdout) == f"{chosen}_finetune"

    alone = run(home, "--rankings", str(rankings), "--method", other)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert re.search(rf"method +│ {other} ", alone.stdout)
    assert made_by(home, alone.stdout) == f"{other}_finetune"
    assert f"{chosen}_finetune" not in alone.stdout


def test_the_watch_waits_while_nothing_drifts_and_retrains_when_it_does(home: Path, rankings: Path, tmp_path: Path) -> None:
    options = ("--set", "detect_drift.min_new_rankings=10")
    before, _ = registry(home)
    quiet = run(home, "--rankings", str(rankings), *options, verb="watch")
    assert quiet.returncode == 0, quiet.stdout + quiet.stderr
    assert re.search(r"decision +│ wait ", quiet.stdout)
    assert "train_sft" not in quiet.stdout
    assert len(registry(home)[0]) == len(before)

    rows = [json.loads(line) for line in rankings.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows[:80]):
        text = f"quel est le prix du billet numero {number} pour paris , monsieur ?"
        rows.append({**row, "prompt": [{"role": "user", "content": text}], "rater_id": "new " + row["rater_id"]})
    drifted = tmp_path / "drifted.jsonl"
    drifted.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run(home, "--rankings", str(drifted), *options, verb="watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"decision +│ retrain ", done.stdout)
    assert [stage for stage in re.findall(r"^✓ (\w+)", done.stdout, re.M) if stage in STAGES[1:]] == list(STAGES[1:])
    versions, _ = registry(home)
    assert len(versions) == len(before) + 1
    assert versions[-1].tags["retrain_reason"].startswith("drift after 80 new rankings in prompts")


def made_by(home: Path, output: str) -> str:
    """The stage that made the registered version that a run shows."""
    shown = re.findall(r"rankloop-policy version (\d+)", output)
    return next(str(version.tags["stage"]) for version in registry(home)[0] if [str(version.version)] == shown)


def test_unchanged_work_is_reused_and_changed_content_at_the_same_path_is_not(tmp_path: Path) -> None:
    home, rankings = tmp_path / "home", write_rankings(tmp_path / "rankings.jsonl", 200, seed=0)
    with LocalServices(home):
        first, again = (run(home, "--rankings", str(rankings)) for _ in range(2))
        assert (first.returncode, again.returncode) == (0, 0), first.stdout + again.stdout + again.stderr
        assert re.findall(r"^= (\w+) +reused", again.stdout, re.M) == list(STAGES[:5])
        assert len(registry(home)[0]) == 1

        write_rankings(rankings, 210, seed=1)
        other = run(home, "--rankings", str(rankings))
        assert other.returncode == 0, other.stdout + other.stderr
        assert not re.findall(r"^= (\w+) +reused", other.stdout, re.M)
        assert "210 read, 210 kept" in other.stdout
        assert "over version 1" in other.stdout, "the challenger is compared with the champion"
        assert len(registry(home)[0]) == 2
