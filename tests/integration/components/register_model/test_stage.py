"""Registration and promotion against a real registry and a real store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from components.register_model import stage
from components.register_model.audit import Audit
from components.register_model.card import escape
from components.register_model.lease import lock
from components.rlhf.gate import AGAINST, RULES, decide
from components.rlhf.models import new_scorer, save_model
from components.rlhf.records import Message
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.tokens import encode_prompt
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context
from components.services.storage import Storage, join
from components.services.tracking import client
from pipelines.local_services import LocalServices, free_ports
from tests.promotion_processes import killed

CREATE = "POST .*/model-versions/create"
GOOD = {
    "false_pass_probability": {"value": 0.025, "low": None, "high": None},
    "win_rate_over_sft": {"value": 0.8, "low": 0.7, "high": 0.9},
    "win_rate_over_champion": {"value": 0.7, "low": 0.6, "high": 0.8},
    "kl_reference": {"value": 3.0, "low": 2.0, "high": 4.0},
    "overoptimisation_gap": {"value": 0.3, "low": 0.1, "high": 0.5},
    "distinct_2_ratio": {"value": 0.9, "low": None, "high": None},
    "length_ratio": {"value": 1.1, "low": None, "high": None},
    "eos_fraction": {"value": 1.0, "low": None, "high": None},
    "dissimilarity_ratio": {"value": 0.7, "low": None, "high": None},
    "answer_perplexity_ratio": {"value": 1.1, "low": 1.0, "high": 1.2},
    "perplexity_ratio": {"value": 1.2, "low": 1.1, "high": 1.3},
    "refusal_harmful_drop_sft": {"value": -0.1, "low": -0.2, "high": 0.01},
}
THRESHOLDS = {
    "max_false_pass_probability": 0.05,
    "min_win_rate_over_sft": 0.5,
    "min_win_rate_over_champion": None,
    "min_worst_group_win_rate_over_sft": None,
    "min_worst_group_win_rate_over_champion": None,
    "max_kl_reference": 25.0,
    "max_overoptimisation_gap": 1.0,
    "min_distinct_2_ratio": 0.5,
    "max_length_ratio": 2.0,
    "min_eos_fraction": 0.8,
    "min_dissimilarity_ratio": 0.25,
    "max_answer_perplexity_ratio": 1.5,
    "max_perplexity_ratio": 1.5,
    **{f"{threshold}_{policy}": None for _, _, threshold, _ in AGAINST for policy in ("sft", "champion")},
    "max_harmful_refusal_drop_sft": 0.1,
}


class World(NamedTuple):
    """`policies` are three different ones; `evaluation` publishes an evaluation.json and gives its URI."""

    policies: list[str]
    reward: str
    folder: Path
    evaluation: Callable[..., str]
    home: Path


@pytest.fixture(scope="module")
def world(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> World:
    return new_world(tmp_path_factory.mktemp("registry"))


def new_world(home: Path) -> World:
    storage = Storage()
    tokenizer = train_tokenizer(["please help my printer and my phone"], 300, 64)

    def publish(folder: Path, role: str) -> str:
        uri = join("s3://rankloop/fixtures", uuid.uuid4().hex)
        storage.publish_folder(folder, uri, {"role": role, "stage": "ppo_finetune", "code": "c0de"})
        return uri

    policies = []
    for seed in range(3):
        model = new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=64, seed=seed)
        model.generation_config.suppress_tokens = tokenizer.all_special_ids  # a random policy says nothing else
        save_model(model, tokenizer, home / str(seed))
        policies.append(publish(home / str(seed), "policy"))
    scorer = new_scorer(home / "0", seed=5)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    scorer.config.problem_type = "regression"
    save_model(scorer, tokenizer, home / "scorer")
    reward = publish(home / "scorer", "reward_model")

    def evaluation(candidate: str, champion: str = "", gate: str = "pass", reward: str = reward, **measures: Any) -> str:
        uri = join("s3://rankloop/evaluations", uuid.uuid4().hex)
        document = {
            "snapshot_uri": "s3://rankloop/rankings/5a",
            "candidate_uri": candidate,
            "sft_uri": "s3://rankloop/policies/5f",
            "reward_model_uri": reward,
            "judge_model_uri": "s3://rankloop/reward_models/1d/judge",
            "champion_version": champion,
            "champion_uri": "",
            "measures": GOOD | measures,
            "thresholds": THRESHOLDS | ({"min_win_rate_over_champion": 0.5} if champion else {}),
            "gate": gate,
            "config": {"max_new_tokens": 12, "temperature": 1.0},
        }
        storage.put_bytes(join(uri, "evaluation.json"), json.dumps(document).encode())
        return uri

    return World(policies, reward, home / "scorer", evaluation, home)


@pytest.fixture
def name() -> str:
    return f"policy-{uuid.uuid4().hex[:8]}"


def register(
    world: World, name: str, candidate: str, evaluation: str, gate: str = "pass", lock_seconds: float = 5
) -> stage.Outputs:
    scratch = world.home / uuid.uuid4().hex
    scratch.mkdir()
    config = stage.Config(policy_name=name, reward_model_name=name + "-reward", lock_seconds=lock_seconds)
    inputs = stage.Inputs(candidate_uri=candidate, reward_model_uri=world.reward, evaluation_uri=evaluation, gate=gate)
    context = Context("register_model", config, inputs, scratch)
    context.tracker.start(context.config, context.inputs)
    outputs = stage.run(config, inputs, context)
    context.tracker.finish("FINISHED")
    return outputs


def aliases(name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client().get_registered_model(name).aliases.items()}


def test_champions_follow_each_other_and_the_old_one_is_kept(world: World, name: str) -> None:
    first, second, third = world.policies
    assert register(world, name, first, world.evaluation(first)) == ("1", "champion")
    assert aliases(name) == {"champion": "1", "challenger": "1"}
    assert register(world, name, second, world.evaluation(second, champion="1")) == ("2", "champion")
    assert aliases(name) == {"champion": "2", "previous_champion": "1", "challenger": "2"}
    failing = world.evaluation(third, champion="2", gate="fail", kl_reference={"value": 99.0, "low": 98, "high": 100})
    assert register(world, name, third, failing, gate="fail") == ("3", "challenger")
    assert aliases(name) == {"champion": "2", "previous_champion": "1", "challenger": "3"}
    assert aliases(name + "-reward") == dict.fromkeys(("champion", "previous_champion", "challenger"), "1"), "registered once"

    tags = client().get_model_version(name, "2").tags
    assert tags["policy_uri"] == second
    assert tags["reward_model_uri"] == world.reward
    assert tags["snapshot_uri"] == "s3://rankloop/rankings/5a"
    assert tags["champion_version"] == "1"
    assert tags["code"] == "c0de"
    assert tags["gate.win_rate_over_sft"] == "0.8 [0.7, 0.9], low > 0.5: pass"
    assert tags["gate.refusal_harmful_drop_sft"] == "-0.1 [-0.2, 0.01], high <= 0.1: pass"
    assert tags["gate.refusal_harmless_rise_sft"] == "?, high <= ?: not required"
    assert client().get_model_version(name, "3").tags["gate"] == "fail"
    begun = [each.content for each in Audit(Storage(), f"s3://rankloop/registry/{name}/audit").records()]
    champions = [
        (move["from"], move["to"])
        for each in begun
        for move in each["moves"]
        if (move["model"], move["alias"]) == (name, "champion")
    ]
    assert champions == [("", "1"), ("1", "2")]


@pytest.mark.parametrize(
    ("gate", "said", "measures"),
    [
        ("fail", "pass", {}),
        ("pass", "fail", {}),
        ("PASS", "pass", {}),
        ("", "pass", {}),
        ("pass", "pass", {"win_rate_over_sft": {"value": 0.8, "low": 0.5, "high": 0.9}}),
        ("pass", "pass", {"win_rate_over_sft": {"value": float("nan"), "low": float("nan"), "high": float("nan")}}),
        ("pass", "pass", {"kl_reference": {"value": float("inf")}}),
        ("pass", "pass", {"eos_fraction": None}),
    ],
)
def test_mistake_deployment_only_a_gate_that_all_three_pass_promotes(
    world: World, name: str, gate: str, said: str, measures: dict[str, Any]
) -> None:
    candidate = world.policies[0]
    assert register(world, name, candidate, world.evaluation(candidate, gate=said, **measures), gate=gate).alias == "challenger"
    assert "champion" not in aliases(name)


def test_line_41_every_number_of_the_gate_is_on_the_registered_version(world: World, name: str) -> None:
    first, second, _ = world.policies
    register(world, name, first, world.evaluation(first))
    odd = {
        "kl_reference": {"value": 3.25, "low": 2.5, "high": float("nan")},
        "length_ratio": {"value": 1.5, "low": 1.25, "high": 1.75},
    }
    register(world, name, second, world.evaluation(second, champion="1", **odd))
    version = client().get_model_version(name, "2")
    rows, _ = decide(GOOD | odd, THRESHOLDS | {"min_win_rate_over_champion": 0.5})
    assert len(rows) == len(RULES)
    for row in rows:
        said = version.tags[f"gate.{row['measure']}"]
        for number in (row["value"], row["low"], row["high"], row["threshold"]):
            assert number is None or f"{number:.4g}" in said
        assert said.endswith(f": {row['verdict']}")
        shown = "– " if row["threshold"] is None else escape(f"{row['relation']} {row['threshold']:g}")
        assert f"| {shown.strip()} | {row['verdict']} |" in version.description, "the card has it, too"
    assert version.tags["gate.length_ratio"] == "1.5 [1.25, 1.75], value <= 2: pass"


def test_a_champion_that_moved_since_the_evaluation_stays(world: World, name: str) -> None:
    first, second, third = world.policies
    stale = world.evaluation(third, champion="1")
    register(world, name, first, world.evaluation(first))
    register(world, name, second, world.evaluation(second, champion="1"))
    with pytest.raises(DoNotRetry, match=r"champion of .* is version 2, but the evaluation compared with 1"):
        register(world, name, third, stale)
    assert aliases(name) == {"champion": "2", "previous_champion": "1", "challenger": "3"}


def test_a_retry_registers_nothing_twice(world: World, name: str) -> None:
    candidate = world.policies[0]
    evaluation = world.evaluation(candidate)
    assert register(world, name, candidate, evaluation) == ("1", "champion")
    assert register(world, name, candidate, evaluation) == ("1", "unchanged")
    assert len(client().search_model_versions(f"name = '{name}'")) == 1


@pytest.mark.parametrize("request_number", range(2))
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_a_registration_the_retry_registers_nothing_twice(
    world: World, name: str, request_number: int, when: str
) -> None:
    """Of the reward model's version or the policy's: before MLflow makes it, or before anything is done with it."""
    candidate = world.policies[0]
    evaluation = world.evaluation(candidate)
    assert killed(partial(register, world, name, candidate, evaluation), request_number, CREATE, after=when == "after")
    there = len(client().search_model_versions(f"name = '{name}-reward'")) + len(client().search_model_versions(f"name = '{name}'"))
    assert there == request_number + (when == "after")
    assert register(world, name, candidate, evaluation) == ("1", "champion")
    for model in (name, f"{name}-reward"):
        assert len(client().search_model_versions(f"name = '{model}'")) == 1
        assert aliases(model) == {"champion": "1", "challenger": "1"}


def test_an_evaluation_of_another_policy_registers_nothing(world: World, name: str) -> None:
    first, second, _ = world.policies
    with pytest.raises(DoNotRetry, match="is of another candidate_uri"):
        register(world, name, first, world.evaluation(second))
    assert not client().search_registered_models(f"name = '{name}'")


def test_the_champion_loads_and_serves_by_its_alias_and_the_reward_model_scores_the_same(world: World, name: str) -> None:
    import mlflow

    candidate = world.policies[0]
    register(world, name, candidate, world.evaluation(candidate))
    mlflow.set_tracking_uri(client().tracking_uri)
    asked = [{"role": "user", "content": "please help my printer"}]
    expected = greedy(world.home / "0", asked, 12)
    answer = mlflow.transformers.load_model(f"models:/{name}@champion")(asked, max_new_tokens=12, do_sample=False)
    assert answer[0]["generated_text"][-1]["content"] == expected != "", "it reads the prompt as in training"

    with served(f"models:/{name}@champion", world.home) as address:
        reply = ask(address, {"messages": asked, "temperature": 1e-4})
        assert "".join(reply["choices"][0]["message"]["content"].split()) == "".join(expected.split())
        assert reply["model"] == f"models:/{name}"
        assert reply["usage"]["completion_tokens"] == 12, "max_new_tokens of its evaluation, where a request names none"
        assert ask(address, {"messages": asked, "max_tokens": 3})["usage"]["completion_tokens"] == 3
        drawn = {ask(address, {"messages": asked})["choices"][0]["message"]["content"] for _ in range(4)}
        assert len(drawn) > 1, "it samples, as in its evaluation, where a request names no temperature"

    scorer = mlflow.transformers.load_model(f"models:/{name}-reward@champion")
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(world.folder), AutoTokenizer.from_pretrained(world.folder)
    for said in ("please help my printer", "my phone"):
        with torch.no_grad():
            expected = plain(**tokenizer(said, return_tensors="pt")).logits.item()
        assert scorer(said)[0]["score"] == pytest.approx(expected, abs=1e-4)


def greedy(folder: Path, messages: list[Message], tokens: int) -> str:
    """The likeliest answer of the policy in a folder, read as in training."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt, _ = encode_prompt(tokenizer, messages, 64)
    drawn = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(drawn[0, len(prompt) :], skip_special_tokens=True))


@contextmanager
def served(uri: str, folder: Path) -> Iterator[str]:
    """MLflow's own server of a registered model; its address."""
    (port,) = free_ports(1)
    command = [*(sys.executable, "-m", "mlflow", "models", "serve", "-m", uri), *("--env-manager", "local", "--workers", "1")]
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # it calls uvicorn by its name
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "serve.log").read_text()
                assert time.monotonic() < deadline, (folder / "serve.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, request: dict[str, Any]) -> dict[str, Any]:
    sent = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)[0]
    return found


def test_mlflow_that_is_down_is_a_failure_to_retry(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = world.policies[0]
    evaluation = world.evaluation(candidate)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(Retry, match="MLflow at"):
        register(world, name, candidate, evaluation)


# -- the lock ------------------------------------------------------------------------------------------------------------


def lock_uri() -> str:
    return f"s3://rankloop/locks/{uuid.uuid4().hex}.json"


def test_only_one_at_a_time_is_inside(services: LocalServices) -> None:
    uri, inside, most, entered = lock_uri(), 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, entered
        with lock(Storage(), uri, 20):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1
            entered += 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 6)


def test_a_lease_that_ran_out_is_taken_over_and_its_old_owner_does_not_free_the_new_one(services: LocalServices) -> None:
    uri = lock_uri()
    with lock(Storage(), uri, 0.3):
        time.sleep(0.4)
        with lock(Storage(), uri, 20):
            owner = Storage().get_json(uri)["owner"]
            late = lock(Storage(), uri, 0.1)
            with pytest.raises(Retry, match=f"is held by {owner}"):
                late.__enter__()
    assert Storage().get_json(uri)["owner"] == "", "free again"
