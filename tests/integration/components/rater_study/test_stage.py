"""The study of a real reward model, against a real object store: what it trains, and where it goes on after a stop."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.rater_study import stage
from components.rlhf import reward_training
from components.rlhf.models import save_model
from components.rlhf.records import SCHEMA
from components.rlhf.reward_training import accumulate
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context, Settings
from components.services.storage import Storage, join
from components.simulated_world.generate import simulate_rankings
from components.train_reward_model import stage as training


class World(NamedTuple):
    """A reward model's URI and `rankloop.json`, and how a stage is run, given its module, settings and inputs."""

    reward_model: str
    marker: dict[str, Any]
    run: Callable[..., Any]


@pytest.fixture(scope="module")
def world(services: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("study")
    rankings = list(simulate_rankings(120, seed=0))
    tokenizer = train_tokenizer((text for r in rankings for text in (r["prompt"][0]["content"], *r["completions"])), 400, 128)
    policy, snapshot = f"s3://rankloop/study/{uuid.uuid4().hex}", f"s3://rankloop/study/{uuid.uuid4().hex}"
    save_model(new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=128, seed=0), tokenizer, home / "policy")
    (home / "snapshot").mkdir()
    rows = [{"confidence": None, **r, "ranking_id": str(i)} for i, r in enumerate(rankings)]
    for row in rows[:6]:
        row["rater_id"] = "unknown"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), home / "snapshot" / "part-00000.parquet")
    Storage().publish_folder(home / "policy", policy, {"role": "policy"})
    Storage().publish_folder(home / "snapshot", snapshot, {"role": "rankings"})

    def run(module: Any, config: Settings, inputs: Settings, root: str = "", contexts: list[Context] | None = None) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANKLOOP_STORAGE", root or f"s3://rankloop/study/{uuid.uuid4().hex}")
            scratch = home / uuid.uuid4().hex
            scratch.mkdir()
            context = Context(module.__name__.split(".")[1], config, inputs, scratch)
            if contexts is not None:
                contexts.append(context)
            return module.run(config, inputs, context)

    config = training.Config(batch_rankings=8, threads=1, judge_fraction=0.3)
    outputs = run(training, config, training.Inputs(snapshot_uri=snapshot, policy_uri=policy))
    return World(outputs.reward_model_uri, Storage().get_json(join(outputs.reward_model_uri, "rankloop.json")), run)


def study(world: World, root: str = "", contexts: list[Context] | None = None, uri: str = "", **values: Any) -> dict[str, Any]:
    config = stage.Config(**{"folds": 2, "threads": 1, "checkpoint_seconds": 3600, **values})
    inputs = stage.Inputs(reward_model_uri=uri or world.reward_model)
    outputs = world.run(stage, config, inputs, root, contexts)
    found: dict[str, Any] = json.loads(Storage().get_bytes(join(outputs.study_uri, "rater_study.json")))
    return found


def test_line_14_each_fold_learns_what_the_reward_model_did_without_its_raters_and_a_stopped_study_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[set[str]] = []
    contexts: list[Context] = []
    stop_at = 0

    def counted(recipe: Any, role: Any, rankings: Any, pad_id: int) -> tuple[float, float]:
        learned.append({each.ranking.rater_id for each in rankings})
        if len(learned) == stop_at:
            contexts[-1].on_signal(signal.SIGTERM, None)
        return accumulate(recipe, role, rankings, pad_id)

    monkeypatch.setattr(reward_training, "accumulate", counted)
    whole = study(world)
    steps, learned = len(learned), []
    root = f"s3://rankloop/study/{uuid.uuid4().hex}"
    stop_at = steps - 1  # in the last training
    with pytest.raises(Retry, match="its checkpoint is saved"):
        study(world, root, contexts)
    stop_at = 0
    again = study(world, root, contexts)
    assert again == whole
    assert len(learned) == steps, "no step is made twice"
    assert not list(Storage().list(root + "/checkpoints/"))
    assert study(world, root, contexts) == whole
    assert len(learned) == steps, "published before"

    first, second = whole["folds"]
    assert len(first["raters"]) == len(second["raters"]) == 6
    assert "unknown" not in first["raters"] + second["raters"]
    # Of two folds each ranking is learned in one; the reward model also learned those of unknown raters.
    assert world.marker["rankings"] - 6 <= first["rankings"] + second["rankings"] < world.marker["rankings"]
    batches = -(-first["rankings"] // 8)
    assert not set().union(*learned[:batches]) & set(first["raters"])
    assert set().union(*learned[batches : 2 * batches]) & set(first["raters"]), "the usual model learns of them"
    assert whole["difference"]["value"] == pytest.approx(whole["usual"]["value"] - whole["never_seen"]["value"])
    page = Storage().get_bytes(join(contexts[-1].uri("rater_studies"), "rater_study.html")).decode()
    assert whole["sentences"][0] in page


def test_line_14_a_study_that_cannot_work_is_refused_before_anything_is_trained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_training, "accumulate", None)
    with pytest.raises(DoNotRetry, match=r"folds = 13, but the rankings are by 12 known rater"):
        study(world, folds=13)
    with pytest.raises(DoNotRetry, match="there is nothing to study"):
        study(world, folds=0)
    with pytest.raises(DoNotRetry, match="is no reward model of train_reward_model, but 'policy'"):
        study(world, uri=world.marker["parents"]["policy"])
