"""A snapshot of simulated rankings and a policy of a few thousand parameters on a real object store, and stages run on them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.rlhf.models import save_model
from components.rlhf.records import SCHEMA
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.launch import Context, Settings
from components.services.storage import Storage
from components.simulated_world.generate import simulate_rankings


class SmallWorld(NamedTuple):
    """URIs of a snapshot and a policy, and how a stage is run on them, given its module, settings and inputs."""

    snapshot: str
    policy: str
    run: Callable[..., Any]


def publish_small_world(home: Path, count: int, unknown: int = 0) -> SmallWorld:
    """`count` rankings, of which nobody knows who gave the first `unknown`."""
    root = f"s3://rankloop/small/{uuid.uuid4().hex}"
    rankings = list(simulate_rankings(count, seed=0))
    tokenizer = train_tokenizer((text for r in rankings for text in (r["prompt"][0]["content"], *r["completions"])), 400, 128)
    save_model(new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=128, seed=0), tokenizer, home / "policy")
    (home / "snapshot").mkdir()
    rows = [{"confidence": None, **r, "ranking_id": str(i)} for i, r in enumerate(rankings)]
    for row in rows[:unknown]:
        row["rater_id"] = "unknown"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), home / "snapshot" / "part-00000.parquet")
    Storage().publish_folder(home / "policy", f"{root}/policy", {"role": "policy"})
    Storage().publish_folder(home / "snapshot", f"{root}/snapshot", {"role": "rankings"})

    def run(module: Any, config: Settings, inputs: Settings, root: str = "", contexts: list[Context] | None = None) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANKLOOP_STORAGE", root or f"s3://rankloop/small/{uuid.uuid4().hex}")
            scratch = home / uuid.uuid4().hex
            scratch.mkdir()
            context = Context(module.__name__.split(".")[1], config, inputs, scratch)
            if contexts is not None:
                contexts.append(context)
            return module.run(config, inputs, context)

    return SmallWorld(f"{root}/snapshot", f"{root}/policy", run)
