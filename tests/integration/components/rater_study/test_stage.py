"""The study of a real reward model, against a real object store: what it trains, and where it goes on after a stop."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from components.rater_study import stage
from components.rlhf import reward_training
from components.rlhf.reward_training import accumulate
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context
from components.services.storage import Storage, join
from components.train_reward_model import stage as training
from tests.integration.components.small_world import publish_small_world


class World(NamedTuple):
    """A reward model's URI and `rankloop.json`, and how a stage is run, given its module, settings and inputs."""

    reward_model: str
    marker: dict[str, Any]
    run: Callable[..., Any]


@pytest.fixture(scope="module")
def world(services: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    small = publish_small_world(tmp_path_factory.mktemp("study"), 120, unknown=6)
    config = training.Config(batch_rankings=8, threads=1, judge_fraction=0.3)
    outputs = small.run(training, config, training.Inputs(snapshot_uri=small.snapshot, policy_uri=small.policy))
    return World(outputs.reward_model_uri, Storage().get_json(join(outputs.reward_model_uri, "rankloop.json")), small.run)


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
