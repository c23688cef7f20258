"""The training stages as processes on a real store: alone, killed, resumed, and told to stop."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from components.rlhf.models import load_policy
from components.rlhf.rankings import EncodedRanking, encode_rankings, split_for_judge
from components.rlhf.records import iterate_snapshot
from components.rlhf.reward import score
from components.rlhf.reward_training import scores_of
from components.services.storage import Storage
from components.services.tracking import client
from pipelines.local_services import LocalServices
from tests.stage_processes import OPTIONS, StageProcess, Undisturbed, contents, fetched, kinds, run, train_undisturbed

UNDISTURBED = "s3://rankloop/undisturbed"


@pytest.fixture(scope="module")
def undisturbed(services: LocalServices) -> Undisturbed:
    return train_undisturbed(UNDISTURBED)


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_line_37_killed_and_resumed_it_ends_with_the_same_bits(stage: str, undisturbed: Undisturbed) -> None:
    root = f"s3://rankloop/killed-{stage}"
    for steps in (1, 3):
        process = StageProcess(stage, root, undisturbed.inputs[stage], pause_after=steps)
        process.signal(signal.SIGKILL)
        assert process.ended().returncode == -signal.SIGKILL
    assert kinds(root) == {"checkpoints"}, "nothing is published before it is done"
    done = run(stage, root, undisturbed.inputs[stage])
    assert "continuing after" in done.stderr
    for name, uri in done.outputs.items():
        assert contents(uri) == contents(undisturbed.outputs[stage][name])
    assert not list(Storage().list(root + "/checkpoints/"))


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_all_weights_in_bfloat16_learn_resume_and_are_saved_so(stage: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A checkpoint holds the float32 copies, or small steps before the kill would be lost."""
    options: dict[str, Any] = {"precision": "bfloat16", "learning_rate": 1e-4}
    if stage == "train_sft":
        options["base_model"] = undisturbed.uri("train_sft")
    inputs = undisturbed.inputs[stage]
    once = run(stage, f"s3://rankloop/once-{stage}", inputs, **options)
    process = StageProcess(stage, f"s3://rankloop/killed-bfloat16-{stage}", inputs, pause_after=3, **options)
    process.signal(signal.SIGKILL)
    assert process.ended().returncode == -signal.SIGKILL
    resumed = run(stage, f"s3://rankloop/killed-bfloat16-{stage}", inputs, **options)
    assert "continuing after" in resumed.stderr
    weights, again = fetched(once.uri, tmp_path / "once"), fetched(resumed.uri, tmp_path / "again")
    assert {str(each.dtype) for name, each in weights.items() if name != "score.weight"} == {"torch.bfloat16"}
    assert all(torch.equal(each, again[name]) for name, each in weights.items())
    start = fetched(undisturbed.uri("train_sft"), tmp_path / "start")
    moved = [name for name in start if name in weights and not torch.equal(start[name].bfloat16(), weights[name])]
    assert len(moved) > len(start) // 2, "learned"


def test_what_only_changes_speed_and_memory_finds_the_published_result(undisturbed: Undisturbed) -> None:
    for stage in OPTIONS:
        again = run(stage, UNDISTURBED, undisturbed.inputs[stage], micro_batch_tokens=256, checkpoint_seconds=9, threads=2)
        assert again.outputs == undisturbed.outputs[stage]


@pytest.mark.parametrize("stage", ["train_sft", "train_reward_model", "dpo_finetune"])
def test_resumed_under_other_micro_batches_it_ends_with_the_same_weights_but_for_rounding(
    stage: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root = f"s3://rankloop/other-micro-batches-{stage}"
    process = StageProcess(stage, root, undisturbed.inputs[stage], pause_after=4)
    process.signal(signal.SIGKILL)
    process.ended()
    done = run(stage, root, undisturbed.inputs[stage], micro_batch_tokens=256)
    assert "continuing after" in done.stderr
    small, large = fetched(done.uri, tmp_path / "small"), fetched(undisturbed.uri(stage), tmp_path / "large")
    assert json.loads((tmp_path / "small" / "rankloop.json").read_text())["config"]["micro_batch_tokens"] == 256
    for name, weights in large.items():
        torch.testing.assert_close(small[name], weights, atol=2e-3, rtol=2e-3)


def test_ppo_resumed_under_other_micro_batches_makes_the_next_update_the_same_but_for_rounding(
    undisturbed: Undisturbed,
) -> None:
    """Updates before the kill are those of the run that nothing disturbed, bit by bit. The next one starts from the same weights
    and random numbers, so it samples the same completions, and all that it measures and learns is the same within rounding. The
    updates after it are not compared: a weight that differs in its last digit lets another token be sampled now and then.
    """
    stage, root = "ppo_finetune", "s3://rankloop/other-micro-batches-ppo"
    process = StageProcess(stage, root, undisturbed.inputs[stage], pause_after=6)
    process.signal(signal.SIGKILL)
    process.ended()
    done = run(stage, root, undisturbed.inputs[stage], micro_batch_tokens=64)
    histories = [contents(uri)["training.jsonl"] for uri in (done.uri, undisturbed.uri(stage))]
    resumed, once = ([{k: v for k, v in row.items() if k != "chosen"} for row in rows] for rows in histories)
    continued = re.search(r"continuing after update (\d+)", done.stderr)
    assert continued
    update = int(continued[1])
    assert 5 <= update < 16
    assert resumed[:update] == once[:update]
    assert resumed[update] != once[update], "no rounding differs: were there other micro-batches at all?"
    for key in ("completion_tokens", "eos_fraction", "same_answer_fraction", "learning_rate", "beta", "policy_steps"):
        assert resumed[update][key] == once[update][key]
    assert resumed[update] == pytest.approx(once[update], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", list(OPTIONS))
def test_told_to_stop_it_saves_and_leaves(stage: str, number: int, code: int, undisturbed: Undisturbed) -> None:
    root = f"s3://rankloop/stopped-{stage}-{code}"
    process = StageProcess(stage, root, undisturbed.inputs[stage], pause_after=1, checkpoint_seconds=3600)
    process.signal(number)
    ended = process.ended()
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert kinds(root) == {"checkpoints"}


def test_the_same_work_is_not_done_twice(undisturbed: Undisturbed) -> None:
    for stage in OPTIONS:
        done = run(stage, UNDISTURBED, undisturbed.inputs[stage])
        assert done.outputs == undisturbed.outputs[stage]
        assert "published already" in done.stderr


def test_line_08_the_saved_reward_model_scores_the_same_in_plain_transformers(undisturbed: Undisturbed, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from components.rlhf.models import scorer_role

    folder = tmp_path / "reward"
    fetched(undisturbed.uri("train_reward_model"), folder)
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    some = rankings_of(undisturbed, "test", tokenizer, tmp_path / "snapshot")[:5]
    ours = [s for each in scores_of(scorer_role(plain), some, tokenizer.pad_token_id, 512) for s in each]
    theirs = []
    for each in some:
        for prompt, completion in zip(each.prompts, each.completions, strict=True):
            padded = torch.tensor([[*prompt, *completion, *[tokenizer.pad_token_id] * len(theirs)]])
            with torch.no_grad():
                logits = plain(padded, attention_mask=(padded != tokenizer.pad_token_id).long()).logits
            theirs.append(logits.item())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)


def test_line_12_what_raters_put_first_scores_zero_in_the_mean_by_constants_in_the_saved_model(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    from components.rlhf.models import load_scorer

    folder = tmp_path / "reward"
    fetched(undisturbed.uri("train_reward_model"), folder)
    model, tokenizer = load_scorer(folder)
    learned, _ = split_for_judge(rankings_of(undisturbed, "train", tokenizer, tmp_path / "snapshot"), 0.5)
    assert len(learned) < 512, "the constants come from all that it learned from"
    texts = [
        (r.ranking.prompt, text, rank) for r in learned for text, rank in zip(r.ranking.completions, r.ranking.ranks, strict=True)
    ]
    prompts, completions, ranks = zip(*texts, strict=True)
    centred = score(model, tokenizer, prompts, completions, batch_size=16)
    first = centred[torch.tensor(ranks) == 1]
    assert first.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert centred.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    marker = json.loads((folder / "rankloop.json").read_text(encoding="utf-8"))
    assert marker["centring"] == {"mean": model.config.score_mean, "deviation": model.config.score_deviation}


def rankings_of(undisturbed: Undisturbed, split: Any, tokenizer: Any, folder: Path) -> list[EncodedRanking]:
    Storage().fetch_folder(undisturbed.inputs["train_reward_model"]["snapshot_uri"], folder)
    return encode_rankings(tokenizer, iterate_snapshot(folder, split), 256).rankings


@pytest.mark.parametrize(
    ("stage", "shown"),
    [
        ("train_sft", r"one of them: <\|user\|> .+ <\|end\|> <\|assistant\|> \| .+ <\|end\|>\n"),
        ("train_reward_model", r"one ranking's best: <\|user\|> .+ <\|end\|> <\|assistant\|> \| .+ <\|end\|>\n"),
        ("ppo_finetune", r"one of them: <\|user\|> .+ <\|end\|> <\|assistant\|>\n"),
    ],
)
def test_line_06_an_example_in_tokens_is_in_the_log_before_the_first_step(stage: str, shown: str, undisturbed: Undisturbed) -> None:
    process = StageProcess(stage, f"s3://rankloop/shown-{stage}", undisturbed.inputs[stage], pause_after=1)
    process.signal(signal.SIGKILL)
    assert re.search(shown, process.ended().stderr)


def test_line_34_mlflow_has_every_number_of_every_update(undisturbed: Undisturbed) -> None:
    marker = contents(undisturbed.uri("ppo_finetune"))["rankloop.json"][0]
    assert marker["updates"] == 16
    run_id = Storage().get_json(undisturbed.uri("ppo_finetune") + "/rankloop.json")["mlflow_run_id"]
    measured = {"reward", "judge_reward", "kl_reference", "sqrt_kl_reference", "entropy", "completion_tokens", "eos_fraction"}
    measured |= {"beta", "rollout_seconds", "score_seconds", "tokens_per_second"}
    learned = {"kl_old", "clip_fraction", "explained_variance", "policy_loss", "value_loss", "gradient_norm", "optimise_seconds"}
    for names, steps in ((measured, 17), (learned, 16)):  # the last rollouts measure the last policy; nothing learns from them
        for name in names:
            assert [each.step for each in client().get_metric_history(run_id, name)] == list(range(steps)), name


def test_sft_starts_from_a_local_folder_and_takes_it_as_it_is_without_epochs(undisturbed: Undisturbed, tmp_path: Path) -> None:
    base, copy = tmp_path / "base", tmp_path / "copy"
    before = fetched(undisturbed.uri("train_sft"), base)
    done = run("train_sft", "s3://rankloop/pretrained", undisturbed.inputs["train_sft"], base_model=base, epochs=0)
    after = fetched(done.uri, copy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_policy(copy)[1].get_vocab() == load_policy(base)[1].get_vocab()


def test_sft_learns_demonstrations_from_s3_and_a_changed_file_is_other_work(undisturbed: Undisturbed) -> None:
    uri, found = "s3://rankloop/demonstrations.jsonl", []
    for answer in ("yes .", "no ."):
        line = json.dumps({"prompt": "hello , is my printer here ?", "completion": answer})
        Storage().put_bytes(uri, (line + "\n").encode() * 2)
        found.append(run("train_sft", "s3://rankloop/demos", undisturbed.inputs["train_sft"], demonstrations=uri).uri)
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
    stage: str, options: dict[str, Any], said: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    options = {
        k: v.format(folder=tmp_path, sft=undisturbed.uri("train_sft")) if isinstance(v, str) else v for k, v in options.items()
    }
    root = f"s3://rankloop/wrong-{tmp_path.name}"
    done = run(stage, root, {**undisturbed.inputs[stage], **{k: v for k, v in options.items() if k.endswith("_uri")}}, **options)
    assert done.returncode == 65, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not [item.uri for item in Storage().list(root + "/") if "checkpoints" not in item.uri], "nothing is half-written"
