"""Snapshots of a few rankings, and what the stage makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.rlhf.records import SCHEMA, Message, Ranking
from components.validate_data.facts import Facts, collect
from components.validate_data.stage import Config
from components.validate_data.suite import Check, Suite

CONFIG = Config(
    min_rankings=4,
    min_test_rankings=1,
    min_prompts=3,
    min_raters=2,
    max_quarantined_fraction=0.2,
    max_contradiction_fraction=0.3,
    max_tie_fraction=0.3,
    max_prompt_characters=50,
    max_completion_characters=40,
    min_rankings_of_rater=1,
    max_rater_fraction=1,
    max_length_bias=0.5,
    max_position_bias=0.5,
)
INGEST = {"read": 10, "quarantined": 1}


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def ranking(number: int, **changes: Any) -> Ranking:
    values = {
        "ranking_id": f"r{number}",
        "prompt": user(f"question {number}"),
        "completions": ["good", "fair", "bad"],
        "ranks": [1, 2, 3],
        "rater_id": f"rater-{number % 2}",
        "source": "test",
        "collected_at": None,
        "confidence": None,
        "policies": None,
        "criterion": None,
        "split": "test" if number == 0 else "train",
    }
    return Ranking(**{**values, **changes})


def good() -> list[Ranking]:
    return [ranking(i) for i in range(6)]


def write(folder: Path, rankings: Sequence[Ranking], group: int = 3) -> Path:
    """A snapshot of two files of small row groups."""
    folder.mkdir(exist_ok=True)
    half = (len(rankings) + 1) // 2
    for number, part in enumerate((rankings[:half], rankings[half:])):
        table = pa.Table.from_pylist([each._asdict() for each in part], schema=SCHEMA)
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=group)
    return folder


def facts_of(rankings: Sequence[Ranking], ingest: dict[str, Any] = INGEST, config: Config = CONFIG, look: Any = None) -> Facts:
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = write(Path(scratch) / "snapshot", rankings)
        return collect(snapshot, ingest, Path(scratch), config, look or (lambda frame: None))


def checks_of(rankings: Sequence[Ranking], ingest: dict[str, Any] = INGEST, config: Config = CONFIG) -> dict[str, Check]:
    """Every check, by its name."""
    suite = Suite(config)
    return {check.name: check for check in suite.checks(facts_of(rankings, ingest, config, suite.look))}
