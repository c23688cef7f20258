"""The stage in this process, against a real object store: what it learns from, where it starts, and what it publishes."""

from __future__ import annotations

import gzip
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

from components.rlhf.activations import checkpoint_activations
from components.rlhf.models import load_policy, save_model
from components.rlhf.records import SCHEMA, Ranking
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.tokens import encode_completion, encode_prompt
from components.services.exits import DoNotRetry
from components.services.launch import Context, parse_settings
from components.services.storage import Storage
from components.services.tracking import client
from components.simulated_world.generate import simulate_rankings
from components.train_sft import stage
from components.train_sft.examples import from_rankings

TINY = {
    "vocabulary": 320,
    "layers": 1,
    "hidden": 16,
    "heads": 2,
    "context_tokens": 256,
    "epochs": 1,
    "batch_size": 8,
    "threads": 1,
    "test_examples": 12,
}


class Trained(NamedTuple):
    """A finished run: the policy's folder, fetched, and what was said of it."""

    uri: str
    folder: Path
    marker: dict[str, Any]
    context: Context


Train = Callable[..., Trained]


def simulated(count: int, seed: int = 0, **changes: Any) -> list[Ranking]:
    empty = {"collected_at": None, "confidence": None, "policies": None, "criterion": None}
    return [
        Ranking(**{**empty, **record, "ranking_id": f"{seed}-{i}", **changes})
        for i, record in enumerate(simulate_rankings(count, seed))
    ]


TRAIN = simulated(16, seed=1, split="train")
TEST = simulated(6, seed=2, split="test")


@pytest.fixture
def snapshot(services: Any, tmp_path: Path) -> Callable[[list[Ranking]], str]:
    """Publishes rankings and gives their URI."""

    def publish(rankings: list[Ranking]) -> str:
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([r._asdict() for r in rankings], SCHEMA), folder / "part-00000.parquet")
        uri = f"s3://rankloop/sft/{folder.name}"
        Storage().publish_folder(folder, uri, {"role": "rankings"})
        return uri

    return publish


@pytest.fixture
def train(services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def run(snapshot_uri: str, root: str = "", demonstrations: str = "", **config: Any) -> Trained:
        monkeypatch.setenv("RANKLOOP_STORAGE", root or f"s3://rankloop/sft/{uuid.uuid4().hex}")
        scratch = tmp_path / uuid.uuid4().hex
        scratch.mkdir()
        settings = parse_settings(stage.Config, {**TINY, **config}, "train_sft")
        inputs = stage.Inputs(snapshot_uri=snapshot_uri, demonstrations=demonstrations)
        context = Context("train_sft", settings, inputs, scratch)
        context.tracker.start(context.config, context.inputs)
        try:
            uri = stage.run(settings, inputs, context).policy_uri
        except BaseException:
            context.tracker.finish("FAILED")
            raise
        context.tracker.finish("FINISHED")
        folder = tmp_path / uuid.uuid4().hex
        return Trained(uri, folder, context.storage.fetch_folder(uri, folder), context)

    return run


def weights(trained: Trained) -> bytes:
    return (trained.folder / "model.safetensors").read_bytes()


def test_from_scratch_it_publishes_a_plain_folder_with_its_measures(snapshot: Any, train: Train) -> None:
    done = train(snapshot(TRAIN + TEST), epochs=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(done.folder), AutoTokenizer.from_pretrained(done.folder)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    assert len(tokenizer) <= 320
    held_out = list(from_rankings(TEST, "all"))[:12]
    total, tokens = 0.0, 0
    for example in held_out:
        completion = encode_completion(tokenizer, example.completion)
        ids = torch.tensor([[*encode_prompt(tokenizer, example.prompt, 256 - len(completion))[0], *completion]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        told = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[-len(completion) :]
        total, tokens = total + told.sum().item(), tokens + len(completion)
    assert done.marker["test_loss"] == pytest.approx(total / tokens, abs=1e-4)
    examples = len(list(from_rankings(TRAIN, "all")))
    assert (done.marker["role"], done.marker["examples"], done.marker["left_out"]) == ("policy", examples, 0)
    assert done.marker["steps"] == -(-3 * examples // 8)
    assert done.context.summary["parameters"] == sum(p.numel() for p in model.parameters())
    losses = [m.value for m in client().get_metric_history(done.context.tracker.run_id, "loss")]
    assert len(losses) == done.marker["steps"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not list(done.context.storage.list(done.context.root + "/checkpoints/"))


def test_only_the_train_split_is_learned(snapshot: Any, train: Train) -> None:
    one, other = (train(snapshot(TRAIN + test)) for test in (TEST, simulated(9, seed=5, split="test")))
    assert weights(one) == weights(other)
    assert (one.folder / "tokenizer.json").read_bytes() == (other.folder / "tokenizer.json").read_bytes()
    assert one.marker["test_loss"] != other.marker["test_loss"]
    with pytest.raises(DoNotRetry, match="no rankings in the train split"):
        train(snapshot(TEST))


def test_only_what_was_ranked_first_is_learned_if_asked(snapshot: Any, train: Train) -> None:
    done = train(snapshot(TRAIN), completions="top")
    best = {(r.prompt[0]["content"], c) for r in TRAIN for c, rank in zip(r.completions, r.ranks, strict=True) if rank == 1}
    assert done.marker["examples"] == len(best) < len(list(from_rankings(TRAIN, "all")))
    assert done.marker["test_loss"] is None  # nothing was held out


def test_micro_batches_change_nothing_but_rounding(snapshot: Any, train: Train) -> None:
    uri = snapshot(TRAIN)
    small, large = (AutoModelForCausalLM.from_pretrained(train(uri, micro_batch_tokens=n).folder) for n in (64, 8192))
    for name, weight in small.named_parameters():
        torch.testing.assert_close(weight, large.get_parameter(name), atol=5e-4, rtol=1e-3)


def test_a_completion_that_is_too_long_is_left_out_and_counted(snapshot: Any, train: Train) -> None:
    long = TRAIN[0]._replace(completions=["printer " * 400, *TRAIN[0].completions[1:]])
    done = train(snapshot([long, *TRAIN[1:]]))
    assert (done.marker["left_out"], done.context.summary["left_out"]) == (1, 1)
    assert done.marker["examples"] == len(list(from_rankings(TRAIN, "all"))) - 1


def test_demonstrations_on_s3_replace_the_completions_compressed_or_not(snapshot: Any, train: Train) -> None:
    lines = "".join(json.dumps({"prompt": f"is lamp {n} on ?", "completion": "yes , it is ."}) + "\n" for n in range(9))
    uri, storage = snapshot(TRAIN + TEST), Storage()
    root = uri + "-demonstrations"
    storage.put_bytes(root + "/plain.jsonl", lines.encode())
    storage.put_bytes(root + "/packed.jsonl.gz", gzip.compress(lines.encode()))
    plain, packed = (train(uri, demonstrations=f"{root}/{name}") for name in ("plain.jsonl", "packed.jsonl.gz"))
    assert (plain.marker["examples"], packed.marker["examples"]) == (9, 9)
    assert weights(plain) == weights(packed)
    storage.put_bytes(root + "/bad.jsonl", lines.encode() + b'{"prompt": "x"}\n')
    with pytest.raises(DoNotRetry, match=r"s3://rankloop/\S+/bad\.jsonl, line 10: not a demonstration"):
        train(uri, demonstrations=f"{root}/bad.jsonl")
    with pytest.raises(DoNotRetry, match=r"missing\.jsonl does not exist"):
        train(uri, demonstrations=f"{root}/missing.jsonl")


def test_it_starts_from_a_folder_on_s3_with_that_folders_tokenizer(snapshot: Any, train: Train, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["other words : printer lamp oven phone"], 300, 120)
    save_model(new_model(tokenizer, layers=2, hidden=8, heads=1, context_tokens=120, seed=9), tokenizer, tmp_path / "base")
    uri = snapshot(TRAIN)
    Storage().publish_folder(tmp_path / "base", uri + "-base", {"role": "policy"})
    base = load_policy(tmp_path / "base")[0]
    as_it_is = load_policy(train(uri, base_model=uri + "-base", epochs=0).folder)
    assert as_it_is[1].get_vocab() == tokenizer.get_vocab()
    for name, weight in as_it_is[0].named_parameters():
        assert torch.equal(weight, base.get_parameter(name)), name
    taught = load_policy(train(uri, base_model=uri + "-base", learning_rate=1e-4).folder)[0]
    gaps = [(weight - base.get_parameter(name)).abs().max().item() for name, weight in taught.named_parameters()]
    assert 0 < max(gaps) < 0.01, "it started from those weights"
    with pytest.raises(DoNotRetry, match=r"nowhere/rankloop\.json does not exist"):
        train(uri, base_model="s3://rankloop/nowhere")


def test_changed_weights_of_a_local_folder_are_another_policy(snapshot: Any, train: Train, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["printer lamp"], 300, 160)
    uri, uris = snapshot(TRAIN[:4]), []
    for seed in (0, 1, 1):
        save_model(new_model(tokenizer, layers=1, hidden=8, heads=1, context_tokens=160, seed=seed), tokenizer, tmp_path / "base")
        uris.append(train(uri, root=uri + "-root", base_model=str(tmp_path / "base"), epochs=0).uri)
    assert uris[0] != uris[1] == uris[2]


def test_a_random_policy_is_refused(snapshot: Any, train: Train) -> None:
    with pytest.raises(DoNotRetry, match="a random model is not a policy"):
        train(snapshot(TRAIN), epochs=0)


@pytest.mark.parametrize(
    ("steps", "test_examples"), [(3, 12), (2, 12), (2, 0)], ids=["on-the-way", "in-the-last-step", "and-nothing-is-held-out"]
)
def test_divergence_is_not_retried_and_publishes_nothing(steps: int, test_examples: int, snapshot: Any, train: Train) -> None:
    """At this rate the loss is finite twice, and the weights after the second step are not numbers."""
    uri = snapshot([r._replace(completions=r.completions[:2], ranks=[1, 2]) for r in TRAIN[: 4 * steps]] + TEST)
    with pytest.raises(DoNotRetry, match=r"SFT diverged: .*\n +remedy: lower train_sft\.learning_rate"):
        train(uri, root=uri + "-root", learning_rate=1e30, test_examples=test_examples)
    assert not [item.uri for item in Storage().list(uri + "-root/policies/")]


def test_activations_computed_again_give_the_same_policy(snapshot: Any, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def spied(backbone: Any) -> None:
        done.append(backbone)
        checkpoint_activations(backbone)

    monkeypatch.setattr(stage, "checkpoint_activations", spied)
    uri = snapshot(TRAIN + TEST)
    assert weights(train(uri, activation_checkpointing=True)) == weights(train(uri))
    assert len(done) == 1
