"""The training stages as processes on a real store: alone, killed, resumed, and told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from components.rlhf.models import load_policy
from components.rlhf.records import SCHEMA
from components.services.storage import Storage
from components.simulated_world.generate import simulate_rankings
from pipelines.local_services import LocalServices

OPTIONS = {
    "train_sft": {"layers": 1, "hidden": 32, "heads": 2, "vocabulary": 400, "epochs": 2, "test_examples": 16},
    "train_reward_model": {"batch_rankings": 4},
    "ppo_finetune": {"updates": 16, "batch_prompts": 8, "max_new_tokens": 8, "epochs": 2, "max_kl_reference": 1000},
    "dpo_finetune": {"batch_rankings": 4},
}


class Fixed(NamedTuple):
    """Inputs of each stage, made once without interruption, and what each stage then published."""

    inputs: dict[str, dict[str, str]]
    published: dict[str, str]


def command(stage: str, inputs: dict[str, str], **options: Any) -> list[str]:
    values = {"threads": 1, "checkpoint_seconds": 0, **OPTIONS[stage], **options, **inputs}
    return [sys.executable, "-m", f"components.{stage}", *(f"--{k.replace('_', '-')}={v}" for k, v in values.items())]


def environment(root: str, events: Path | None = None) -> dict[str, str]:
    return {**os.environ, "RANKLOOP_STORAGE": root, **({"RANKLOOP_EVENTS": str(events)} if events else {})}


def run(stage: str, root: str, inputs: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(stage, inputs, **options), capture_output=True, text=True, env=environment(root), timeout=120, check=False
    )


def outputs(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


@pytest.fixture(scope="module")
def fixed(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> Fixed:
    folder = tmp_path_factory.mktemp("snapshot")
    empty = {"confidence": None}
    rows = [{**empty, **record, "ranking_id": str(i)} for i, record in enumerate(simulate_rankings(120, seed=0))]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "part-00000.parquet")
    root = "s3://rankloop/uninterrupted"
    snapshot = {"snapshot_uri": root + "/snapshot"}
    Storage().publish_folder(folder, snapshot["snapshot_uri"], {"role": "rankings"})
    sft = outputs(run("train_sft", root, snapshot))
    scorers = outputs(run("train_reward_model", root, {**snapshot, **sft}))
    ppo = {**snapshot, "sft_uri": sft["policy_uri"], **scorers}
    policy = outputs(run("ppo_finetune", root, ppo))
    dpo = {key: value for key, value in ppo.items() if key != "reward_model_uri"}
    learned = outputs(run("dpo_finetune", root, dpo))
    return Fixed(
        {"train_sft": snapshot, "train_reward_model": {**snapshot, **sft}, "ppo_finetune": ppo, "dpo_finetune": dpo},
        {
            "train_sft": sft["policy_uri"],
            "train_reward_model": scorers["reward_model_uri"],
            "ppo_finetune": policy["policy_uri"],
            "dpo_finetune": learned["policy_uri"],
        },
    )


def fetched(uri: str, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    Storage().fetch_folder(uri, folder)
    return load_file(folder / "model.safetensors"), folder


def signal_at(process: subprocess.Popen[str], events: Path, done: int, number: int) -> None:
    """Sends a signal as soon as the stage has shown that many steps."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
        shown = [json.loads(line) for line in lines if line.endswith("}")]
        if any(each["event"] == "progress" and each["done"] >= done for each in shown):
            process.send_signal(number)
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError("it never came so far")


def start(stage: str, root: str, inputs: dict[str, str], events: Path, **options: Any) -> subprocess.Popen[str]:
    events.unlink(missing_ok=True)
    return subprocess.Popen(
        command(stage, inputs, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(root, events),
    )


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_killed_and_resumed_it_ends_with_the_same_bits(stage: str, fixed: Fixed, tmp_path: Path) -> None:
    root, events = f"s3://rankloop/killed-{stage}", tmp_path / "events.jsonl"
    for _ in range(2):
        process = start(stage, root, fixed.inputs[stage], events)
        signal_at(process, events, 1, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    kinds = {item.uri.split("/")[4] for item in Storage().list(root + "/")}
    assert kinds == {"checkpoints"}, "nothing is published before it is done"
    done = run(stage, root, fixed.inputs[stage])
    assert "continuing after" in done.stderr
    uri = next(iter(outputs(done).values()))
    again, folder = fetched(uri, tmp_path / "again")
    once, other = fetched(fixed.published[stage], tmp_path / "once")
    assert again.keys() == once.keys()
    for name, weights in once.items():
        assert torch.equal(weights, again[name]), name
    if stage in ("ppo_finetune", "dpo_finetune"):
        timeless = [
            [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in (each / "training.jsonl").open()]
            for each in (folder, other)
        ]
        assert timeless[0] == timeless[1]
    assert not list(Storage().list(root + "/checkpoints/"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", list(OPTIONS))
def test_told_to_stop_it_saves_and_leaves(stage: str, number: int, code: int, fixed: Fixed, tmp_path: Path) -> None:
    root, events = f"s3://rankloop/stopped-{stage}-{code}", tmp_path / "events.jsonl"
    process = start(stage, root, fixed.inputs[stage], events, checkpoint_seconds=3600)
    signal_at(process, events, 1, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert {item.uri.split("/")[4] for item in Storage().list(root + "/")} == {"checkpoints"}


def test_micro_batches_change_nothing_but_rounding(fixed: Fixed, tmp_path: Path) -> None:
    for stage in ("train_sft", "train_reward_model", "dpo_finetune"):  # PPO samples other tokens once a rounding has changed one
        root = f"s3://rankloop/micro-{stage}"
        uri = next(iter(outputs(run(stage, root, fixed.inputs[stage], micro_batch_tokens=256)).values()))
        small, _ = fetched(uri, tmp_path / f"small-{stage}")
        large, _ = fetched(fixed.published[stage], tmp_path / f"large-{stage}")
        for name, weights in large.items():
            torch.testing.assert_close(small[name], weights, atol=2e-3, rtol=2e-3)


def test_the_same_work_is_not_done_twice(fixed: Fixed) -> None:
    for stage, uri in fixed.published.items():
        done = run(stage, "s3://rankloop/uninterrupted", fixed.inputs[stage])
        assert next(iter(outputs(done).values())) == uri
        assert "published already" in done.stderr


def test_the_reward_model_is_a_plain_folder_and_centred(fixed: Fixed, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from components.rlhf.models import scorer_role
    from components.rlhf.rankings import encode_rankings
    from components.rlhf.records import iterate_snapshot
    from components.train_reward_model.stage import scores_of

    _, folder = fetched(fixed.published["train_reward_model"], tmp_path / "reward")
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    Storage().fetch_folder(fixed.inputs["train_reward_model"]["snapshot_uri"], tmp_path / "snapshot")
    some = encode_rankings(tokenizer, iterate_snapshot(tmp_path / "snapshot", "test"), 256).rankings[:5]
    ours = [s for each in scores_of(scorer_role(plain), some, tokenizer.pad_token_id, 512) for s in each]
    theirs = []
    for each in some:
        for prompt, completion in zip(each.prompts, each.completions, strict=True):
            padded = torch.tensor([[*prompt, *completion, *[tokenizer.pad_token_id] * len(theirs)]])
            with torch.no_grad():
                logits = plain(padded, attention_mask=(padded != tokenizer.pad_token_id).long()).logits
            theirs.append(logits.item())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)
    assert plain.config.score_deviation > 0
    marker = json.loads((folder / "rankloop.json").read_text(encoding="utf-8"))
    assert marker["centring"] == {"mean": plain.config.score_mean, "deviation": plain.config.score_deviation}


def test_sft_starts_from_a_local_folder_and_takes_it_as_it_is_without_epochs(fixed: Fixed, tmp_path: Path) -> None:
    before, folder = fetched(fixed.published["train_sft"], tmp_path / "base")
    done = run("train_sft", "s3://rankloop/pretrained", fixed.inputs["train_sft"], base_model=folder, epochs=0)
    after, copy = fetched(outputs(done)["policy_uri"], tmp_path / "copy")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_policy(copy)[1].get_vocab() == load_policy(folder)[1].get_vocab()


def test_sft_learns_demonstrations_from_s3_and_a_changed_file_is_other_work(fixed: Fixed) -> None:
    uri, found = "s3://rankloop/demonstrations.jsonl", []
    for answer in ("yes .", "no ."):
        line = json.dumps({"prompt": "hello , is my printer here ?", "completion": answer})
        Storage().put_bytes(uri, (line + "\n").encode() * 2)
        found.append(outputs(run("train_sft", "s3://rankloop/demos", fixed.inputs["train_sft"], demonstrations=uri))["policy_uri"])
    assert found[0] != found[1]
    assert Storage().get_json(found[1] + "/rankloop.json")["examples"] == 2


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("train_sft", {"learning_rate": "1e30"}, "SFT diverged"),
        ("train_sft", {"epochs": 0}, "a random model is not a policy"),
        ("train_sft", {"base_model": "gguf:no_such_package"}, "is not installed"),
        ("train_sft", {"base_model": "./nowhere"}, "has no config.json"),
        ("train_sft", {"demonstrations": "{folder}/bad.jsonl"}, "bad.jsonl, line 2: not a demonstration"),
        ("train_reward_model", {"precision": "bfloat16"}, "set lora_rank, or float32"),
        ("train_reward_model", {"max_tokens": 12}, "no held-out ranking"),
        ("train_reward_model", {"policy_uri": "s3://rankloop/nowhere"}, "s3://rankloop/nowhere/rankloop.json does not exist"),
        ("ppo_finetune", {"batch_prompts": 500}, "one update takes 500"),
        ("ppo_finetune", {"max_kl_reference": 1e-9, "learning_rate": 0.05}, "KL blow-up"),
        ("ppo_finetune", {"minibatches": 9}, "9 minibatches of 8 completions"),
        ("dpo_finetune", {"learning_rate": "1e30"}, "DPO diverged"),
        ("dpo_finetune", {"loss": "plackett_luce", "ties": "half"}, "are of pairs"),
        ("dpo_finetune", {"judge_model_uri": "{sft}"}, "not a judge that train_reward_model made"),
        ("dpo_finetune", {"max_tokens": 12}, "no ranking to learn from"),
    ],
)
def test_what_cannot_work_is_said_and_not_retried(
    stage: str, options: dict[str, Any], said: str, fixed: Fixed, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    options = {
        k: v.format(folder=tmp_path, sft=fixed.published["train_sft"]) if isinstance(v, str) else v for k, v in options.items()
    }
    root = f"s3://rankloop/wrong-{tmp_path.name}"
    done = run(stage, root, {**fixed.inputs[stage], **{k: v for k, v in options.items() if k.endswith("_uri")}}, **options)
    assert done.returncode == 65, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not [item.uri for item in Storage().list(root + "/") if "checkpoints" not in item.uri], "nothing is half-written"
