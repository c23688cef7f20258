"""The stage against a real object store and a real registry, with models of a few thousand parameters."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.detect_drift import reading, stage
from components.detect_drift.champion import Champion
from components.detect_drift.features import judge
from components.detect_drift.reading import Models
from components.rlhf.models import load_policy, load_scorer, new_scorer, save_model
from components.rlhf.records import SCHEMA, Ranking
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.exits import DoNotRetry
from components.services.launch import Context, parse_settings
from components.services.storage import Storage
from components.services.tracking import PARENT_VARIABLE, client, experiment_id
from components.simulated_world.generate import simulate_rankings
from pipelines.local_services import LocalServices
from tests.one_model import expect_one_at_a_time

FREE = {"min_new_rankings": 1, "cooldown_days": 0, "max_retrains_per_month": 100, "batch_tokens": 16384}


class World(NamedTuple):
    """`champion` registers a version made from a snapshot; `publish` puts rankings on the store."""

    publish: Callable[..., str]
    champion: Callable[[str, str], str]
    home: Path


def rankings(count: int, seed: int, month: int, drifted: bool = False) -> list[Ranking]:
    """Rankings of one month, ten a day; drifted ones are about something else, by other raters."""
    empty = {"confidence": None, "policies": None, "criterion": None}
    found = []
    for number, record in enumerate(simulate_rankings(count, seed)):
        values = {**empty, **record, "ranking_id": f"{seed}-{number}"}
        values["collected_at"] = f"2026-{month:02d}-{number // 10 % 28 + 1:02d}T{number % 10 + 8:02d}:00:00Z"
        if drifted:
            text = f"quel est le prix du billet numero {number} pour paris , monsieur {seed} ?"
            values |= {"prompt": [{"role": "user", "content": text}], "rater_id": "new " + record["rater_id"]}
        found.append(Ranking(**values))
    return found


OLD = rankings(240, 0, 1)
QUIET = rankings(40, 1, 2)
DRIFTED = rankings(60, 2, 3, drifted=True)


@pytest.fixture(scope="module")
def world(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("drift")
    storage = Storage()
    tokenizer = train_tokenizer((r.prompt[0]["content"] for r in OLD), 400, 256)
    save_model(new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=256, seed=0), tokenizer, home / "policy")
    scorer = new_scorer(home / "policy", seed=5)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    save_model(scorer, tokenizer, home / "scorer")

    def put(folder: Path, role: str, **facts: str) -> str:
        uri = f"s3://rankloop/fixtures/{uuid.uuid4().hex}"
        storage.publish_folder(folder, uri, {"role": role, **facts})
        return uri

    policy, reward = put(home / "policy", "policy"), put(home / "scorer", "reward_model")

    def publish(rows: list[Ranking], **facts: str) -> str:
        folder = home / uuid.uuid4().hex
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], SCHEMA), folder / "part-00000.parquet")
        return put(folder, "rankings", **facts)

    def champion(name: str, snapshot: str) -> str:
        mlflow = client()
        if not mlflow.search_registered_models(f"name = '{name}'"):
            mlflow.create_registered_model(name)
        tags = {"policy_uri": policy, "snapshot_uri": snapshot, "reward_model_uri": reward}
        version = str(mlflow.create_model_version(name, source=policy, tags=tags).version)
        mlflow.set_registered_model_alias(name, "champion", version)
        return version

    return World(publish, champion, home)


@pytest.fixture(scope="module")
def old(world: World) -> str:
    return world.publish(OLD)


@pytest.fixture(scope="module")
def quiet(world: World) -> str:
    return world.publish(OLD + QUIET)


@pytest.fixture(scope="module")
def drifted(world: World) -> str:
    return world.publish(OLD + QUIET + DRIFTED)


@pytest.fixture
def name(world: World, old: str) -> str:
    """A policy whose champion learned from `OLD`."""
    name = f"policy-{uuid.uuid4().hex[:8]}"
    world.champion(name, old)
    return name


def watch(world: World, name: str, snapshot: str, **config: Any) -> stage.Outputs:
    scratch = world.home / uuid.uuid4().hex
    scratch.mkdir()
    settings = parse_settings(stage.Config, {**FREE, "policy_name": name, **config}, "detect_drift")
    inputs = stage.Inputs(snapshot_uri=snapshot)
    context = Context("detect_drift", settings, inputs, scratch)
    context.tracker.start(context.config, context.inputs)
    outputs = stage.run(settings, inputs, context)
    context.tracker.finish("FINISHED")
    return outputs


def state(name: str, version: str = "1") -> dict[str, Any]:
    found: dict[str, Any] = Storage().get_json(f"s3://rankloop/drift/{name}/{version}/state.json")
    return found


def orders(name: str) -> list[dict[str, Any]]:
    uri = f"s3://rankloop/drift/{name}/retrains.json"
    return Storage().get_json(uri) if Storage().exists(uri) else []


def test_quiet_rankings_wait_and_the_same_snapshot_twice_changes_nothing(world: World, name: str, quiet: str) -> None:
    said = watch(world, name, quiet)
    assert said.decision == "wait"
    assert said.reason.startswith("no drift in 40 new rankings")
    before = Storage().get_bytes(f"s3://rankloop/drift/{name}/1/state.json")
    assert json.loads(before)["looks"][0]["new"] == 40
    again = watch(world, name, quiet)
    assert again == said, "the same decision, the same report"
    assert Storage().get_bytes(f"s3://rankloop/drift/{name}/1/state.json") == before
    assert orders(name) == []


def test_drift_retrains_once_and_says_why_everywhere(world: World, name: str, quiet: str, drifted: str) -> None:
    watch(world, name, quiet)
    said = watch(world, name, drifted)
    assert said.decision == "retrain"
    assert said.reason.startswith("drift after 100 new rankings in prompts: novelty")
    assert not set("\"'{}\n") & set(said.reason)
    document = Storage().get_json(said.drift_uri + "/drift.json")
    assert [look["new"] for look in document["looks"]] == [40, 60]
    by_test = {row["test"]: row for row in document["tests"]}
    assert by_test["prompts: novelty"]["effect"]["low"] > 0.5
    assert all("billet" in each["prompt"] for each in by_test["prompts: novelty"]["examples"])
    assert all(each["rater"].startswith("new ") for each in by_test["raters: mix"]["examples"])
    assert by_test["preferences: loss"]["preferences"]["new"]["rankings"] == by_test["preferences: loss"]["bets"]
    page = Storage().get_bytes(said.drift_uri + "/report.html").decode()
    assert "Decision: retrain" in page
    assert page.count("<svg") == 5
    assert client().get_model_version(name, "1").tags["drift"] == said.reason

    other = watch(world, name, drifted)
    assert other.decision == "wait"
    assert "has started the retrain of this champion on this snapshot" in other.reason
    assert len(orders(name)) == 1


def test_a_retried_task_of_the_same_pipeline_run_is_told_the_same(
    world: World, name: str, drifted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = client()
    parent = mlflow.create_run(experiment_id(mlflow)).info.run_id
    monkeypatch.setenv(PARENT_VARIABLE, parent)
    first = watch(world, name, drifted)
    assert (first.decision, watch(world, name, drifted)) == ("retrain", first)
    assert mlflow.get_run(parent).data.tags["rankloop.retrain_reason"] == first.reason
    assert len(orders(name)) == 1


def test_hygiene_blocks_an_alarm_and_says_so_until_it_may_be_heard(world: World, name: str, drifted: str) -> None:
    said = watch(world, name, drifted, min_new_rankings=1000)
    assert said.decision == "wait"
    assert said.reason.startswith("drift after 100 new rankings")
    assert "blocked: only 100 rankings are new since the champion, and min_new_rankings is 1000" in said.reason
    assert "blocked: this is a dry run" in watch(world, name, drifted, dry_run=True).reason
    assert orders(name) == []
    assert watch(world, name, drifted).decision == "retrain", "the alarm stays"


def test_a_new_champion_starts_afresh_but_the_cooldown_does_not(world: World, name: str, drifted: str) -> None:
    assert watch(world, name, drifted).decision == "retrain"
    assert world.champion(name, drifted) == "2"
    more = OLD + QUIET + DRIFTED + rankings(20, 5, 4)
    said = watch(world, name, world.publish(more))
    assert said.decision == "wait"
    assert said.reason.startswith("no drift in 20 new rankings"), "what the new champion learned from is not new to it"
    assert state(name, "2")["looks"][0]["rankings"] == 20
    other = rankings(60, 6, 5)
    strange = [
        r._replace(rater_id="later", prompt=[{"role": "user", "content": f"zzz {i} qqq {i} xxx"}]) for i, r in enumerate(other)
    ]
    blocked = watch(world, name, world.publish(more + strange), cooldown_days=7)
    assert blocked.decision == "wait"
    assert "cooldown_days is 7" in blocked.reason


def test_watches_at_the_same_time_count_each_ranking_once_and_one_retrains(
    world: World, name: str, drifted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time, load = threading.Lock(), Models._load

    def locked(models: Models, *arguments: Any) -> Any:
        with one_at_a_time:  # watches are processes of their own, and transformers cannot load two models in two threads at once
            return load(models, *arguments)

    monkeypatch.setattr(Models, "_load", locked)
    said: list[stage.Outputs] = []
    threads = [threading.Thread(target=lambda: said.append(watch(world, name, drifted))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.decision for each in said) == ["retrain", "wait", "wait"]
    kept = state(name)
    assert [look["new"] for look in kept["looks"]] == [100]
    assert kept["watch"]["tests"]["preferences: loss"]["evidence"]["bets"] <= 100
    assert len(orders(name)) == 1


def test_without_a_champion_it_waits(world: World, drifted: str) -> None:
    said = watch(world, f"nobody-{uuid.uuid4().hex[:6]}", drifted)
    assert said.decision == "wait"
    assert "has no champion" in said.reason


def test_a_champion_that_does_not_say_what_it_was_made_from_is_named(world: World, drifted: str) -> None:
    name, mlflow = f"policy-{uuid.uuid4().hex[:8]}", client()
    mlflow.create_registered_model(name)
    mlflow.create_model_version(name, source="s3://rankloop/x", tags={"policy_uri": "s3://rankloop/x"})
    mlflow.set_registered_model_alias(name, "champion", "1")
    with pytest.raises(DoNotRetry, match="has no tag snapshot_uri, reward_model_uri"):
        watch(world, name, drifted)


def test_the_budget_of_a_watch_cannot_be_changed_after_looking(world: World, name: str, quiet: str, drifted: str) -> None:
    watch(world, name, quiet)
    with pytest.raises(DoNotRetry, match="a budget that is changed after looking is none"):
        watch(world, name, drifted, alpha=0.1)
    assert len(state(name)["looks"]) == 1


def test_every_member_of_an_ensemble_is_asked(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scorer(seed: int, folder: Path) -> None:
        model, tokenizer = new_scorer(world.home / "policy", seed), load_policy(world.home / "policy")[1]
        model.config.pad_token_id = tokenizer.pad_token_id
        save_model(model, tokenizer, folder)

    first, second = tmp_path / "first", tmp_path / "second"
    scorer(1, first)
    scorer(2, second)
    alone = [judge(*load_scorer(folder), QUIET, 4096) for folder in (first, second)]
    scorer(2, first / "member-1")
    uri = f"s3://rankloop/fixtures/{uuid.uuid4().hex}"
    Storage().publish_folder(first, uri, {"role": "reward_model"})

    (tmp_path / "scratch").mkdir()
    settings = parse_settings(stage.Config, {}, "detect_drift")
    context = Context("detect_drift", settings, stage.Inputs(snapshot_uri="s3://none"), tmp_path / "scratch")
    loaded = expect_one_at_a_time(reading, monkeypatch, "load_scorer")
    found = Models(context, Champion("1", "", "", uri), "float32", 4096).eyes.judge(QUIET)
    assert len(loaded) == 2
    pairs = [list(ranking.pairs()) for ranking in QUIET]
    assert [len(each.margins) for each in found] == [len(each) for each in pairs]
    assert any(pairs)
    for both, one, other in zip(found, *alone, strict=True):
        assert both.margins == [(a + b) / 2 for a, b in zip(one.margins, other.margins, strict=True)]
        assert not both.margins or both.margins != one.margins


def test_snapshots_of_different_salts_are_not_compared(world: World) -> None:
    one, other, same, kept = (
        world.publish(rows, rater_salt_fingerprint=salt)
        for rows, salt in ((OLD, "5a17"), (OLD + QUIET, "07e4"), (OLD + QUIET, "5a17"), (OLD + QUIET, ""))
    )
    name = f"policy-{uuid.uuid4().hex[:8]}"
    world.champion(name, one)
    for snapshot in (other, kept):
        with pytest.raises(DoNotRetry, match=rf"different salts(.|\n)*{one} \(5a17\) and {snapshot}"):
            watch(world, name, snapshot)
    assert not Storage().exists(f"s3://rankloop/drift/{name}/1/state.json"), "nothing was looked at"
    assert watch(world, name, same).decision == "wait"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
