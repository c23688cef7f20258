"""DPO in this process, against a real object store: what it learns, from whom, and what it publishes."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.dpo_finetune import stage
from components.rlhf.rankings import teaches_judge
from components.rlhf.records import SCHEMA, iterate_snapshot
from components.services.launch import Context, parse_settings
from components.services.storage import Storage
from components.simulated_world.generate import simulate_rankings


class World(NamedTuple):
    """URIs, and the folder of the SFT policy."""

    snapshot: Path
    inputs: dict[str, str]
    sft: Path


class Trained(NamedTuple):
    folder: Path
    marker: dict[str, Any]
    context: Context
    history: list[dict[str, float]]


def run_stage(name: str, config: dict[str, Any], inputs: dict[str, str], scratch: Path) -> tuple[Any, Context]:
    module = importlib.import_module(f"components.{name}.stage")
    settings, given = parse_settings(module.Config, {"threads": 1, **config}, name), parse_settings(module.Inputs, inputs, name)
    scratch.mkdir(parents=True)
    context = Context(name, settings, given, scratch)
    return module.run(settings, given, context), context


@pytest.fixture(scope="module")
def world(services: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("dpo")
    snapshot = home / "snapshot"
    snapshot.mkdir()
    rows = [{"confidence": None, **record, "ranking_id": str(i)} for i, record in enumerate(simulate_rankings(250, seed=0))]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), snapshot / "part-00000.parquet")
    storage, root = Storage(), f"s3://rankloop/dpo-{uuid.uuid4().hex}"
    storage.publish_folder(snapshot, f"{root}/snapshot", {"role": "rankings"})
    storage.put_json(f"{root}/judge/rankloop.json", {"role": "judge_model", "config": {"judge_fraction": 0.3}})
    tiny = {"layers": 1, "hidden": 32, "heads": 2, "vocabulary": 400, "epochs": 1, "test_examples": 0}
    outputs, _ = run_stage("train_sft", tiny, {"snapshot_uri": f"{root}/snapshot"}, home / "scratch")
    storage.fetch_folder(outputs.policy_uri, home / "sft")
    inputs = {"snapshot_uri": f"{root}/snapshot", "sft_uri": outputs.policy_uri, "judge_model_uri": f"{root}/judge"}
    return World(snapshot, inputs, home / "sft")


@pytest.fixture
def train(world: World, tmp_path: Path) -> Callable[..., Trained]:
    def once(**config: Any) -> Trained:
        name = uuid.uuid4().hex
        outputs, context = run_stage("dpo_finetune", config, world.inputs, tmp_path / name)
        folder = tmp_path / f"{name}-policy"
        marker = Storage().fetch_folder(outputs.policy_uri, folder)
        lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
        return Trained(folder, marker, context, [json.loads(line) for line in lines])

    return once


def plain_rewards(policy: Path, reference: Path, snapshot: Path, beta: float) -> list[tuple[list[float], Any]]:
    """Implicit rewards of the test rankings by plain Hugging Face models, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, reference)]

    @torch.no_grad()
    def logprob(model: Any, prompt: list[int], completion: list[int]) -> float:
        logits = model(torch.tensor([prompt + completion])).logits[0].float()
        logits[:, tokenizer.pad_token_id] = -torch.inf
        logprobs = torch.log_softmax(logits, -1)
        return sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))

    found = []
    for ranking in iterate_snapshot(snapshot, "test"):
        prompt = list(tokenizer.apply_chat_template(ranking.prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        answers = [[*tokenizer(c, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for c in ranking.completions]
        found.append(([beta * (logprob(models[0], prompt, c) - logprob(models[1], prompt, c)) for c in answers], ranking))
    return found


def test_it_learns_and_says_so_as_plain_models_would(world: World, train: Callable[..., Trained]) -> None:
    """The published folder is a plain causal model, and the accuracy that was published is that of its log-ratios to SFT."""
    done = train(beta=0.2, batch_rankings=8, epochs=3)
    found = plain_rewards(done.folder, world.sft, world.snapshot, 0.2)
    pairs = [rewards[better] - rewards[worse] for rewards, ranking in found for better, worse in ranking.pairs()]
    right = sum(1.0 if lead > 0 else 0.0 for lead in pairs) / len(pairs)
    assert done.context.summary["accuracy"] == pytest.approx(right, abs=2 / len(pairs))
    assert done.context.summary["margin"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-3)
    assert right > 0.6
    assert done.marker["accuracy"]["low"] < done.context.summary["accuracy"] < done.marker["accuracy"]["high"]
    assert done.history[0]["margin"] == pytest.approx(0.0, abs=1e-4), "all implicit rewards are 0 at first"
    assert done.history[-1]["margin"] > 0.1
    assert done.marker["role"] == "policy"


def test_it_leaves_the_judges_prompts_to_the_judge(world: World, train: Callable[..., Trained]) -> None:
    ours = [r for r in iterate_snapshot(world.snapshot, "train") if not teaches_judge(r.prompt, 0.3)]
    everything = list(iterate_snapshot(world.snapshot, "train"))
    done = train()
    assert done.context.summary["rankings"] == len(ours) == pytest.approx(0.7 * len(everything), rel=0.15)
    assert (done.marker["judge_fraction"], done.context.summary["left_out"]) == (0.3, 0)


def test_an_adapter_is_merged_into_a_float32_copy_of_its_base(world: World, train: Callable[..., Trained]) -> None:
    done = train(
        lora_rank=4, learning_rate=5e-3, precision="bfloat16", loss="plackett_luce", max_rankings=40, batch_rankings=40, epochs=6
    )
    merged, base = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (done.folder, world.sft))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert merged.keys() == base.keys()
    assert all(weights.dtype == torch.float32 for weights in merged.values())
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed), "embeddings, norms and head are the base's"
    assert done.context.summary["rankings"] == 40
    assert done.history[-1]["loss"] < done.history[0]["loss"]


def test_rows_of_one_ranking_may_be_joined_or_not(train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is computed once for its completions here; a model that does not allow it learns the same."""
    together = train(max_rankings=48)
    monkeypatch.setattr(stage, "join_where_it_pays", lambda role, rankings, pad_id: list(rankings))
    monkeypatch.setenv("RANKLOOP_STORAGE", "s3://rankloop/dpo-separate")  # where it is not done yet
    alone = train(max_rankings=48)
    assert together.history != alone.history, "no rounding differs: were there other rows at all?"
    for key in ("loss", "margin", "gradient_norm"):
        assert [row[key] for row in together.history] == pytest.approx([row[key] for row in alone.history], rel=1e-3, abs=1e-4)
