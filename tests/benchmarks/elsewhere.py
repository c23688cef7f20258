"""Do saved policies and reward models mean the same in TRL and in vLLM? Each runs in an environment of its own.

    python -m tests.benchmarks.elsewhere write --policy FOLDER --reward FOLDER --pairs FILE --to FILE
    TRL/bin/python tests/benchmarks/elsewhere.py trl --to FILE
    VLLM/bin/python tests/benchmarks/elsewhere.py vllm --to FILE

`write` notes what plain transformers make of the two folders: the likeliest continuations of some prompts, and the scores of some
pairs. The others load the same folders and print, as one JSON line, how far they are from that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

PAIRS, NEW_TOKENS = 16, 24


def write(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from components.rlhf.models import context_tokens
    from components.rlhf.tokens import encode_completion, encode_prompt

    sides = ("chosen", "rejected")
    rows = [json.loads(line) for line in a.pairs.read_text(encoding="utf-8").splitlines()]
    rows = sorted(rows, key=lambda row: sum(len(row[side][-1]["content"]) for side in sides))[100 : 100 + PAIRS]
    tokenizer = AutoTokenizer.from_pretrained(a.policy)
    policy = AutoModelForCausalLM.from_pretrained(a.policy, dtype=torch.float32).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(a.reward, dtype=torch.float32).eval()
    prompts = [encode_prompt(tokenizer, row["prompt"][-1:], context_tokens(policy.config))[0] for row in rows]
    scored = [
        [[*ids, *encode_completion(tokenizer, row[side][-1]["content"])] for side in sides]
        for ids, row in zip(prompts, rows, strict=True)
    ]
    with torch.no_grad():
        greedy = [
            policy.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :].tolist()
            for ids in prompts
        ]
        scores = [[reward(torch.tensor([ids])).logits.item() for ids in pair] for pair in scored]
    return {
        "policy": str(a.policy),
        "reward": str(a.reward),
        "prompts": prompts,
        "greedy": greedy,
        "scored": scored,
        "scores": scores,
    }


def trl(known: dict[str, Any]) -> dict[str, Any]:
    """TRL's RewardTrainer evaluates the reward model on the pairs: its margin is the mean difference of scores."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch
    import transformers
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(known["reward"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(known["reward"], dtype=torch.float32)
    tokens = [{"chosen_ids": better, "rejected_ids": worse} for better, worse in known["scored"]]
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, per_device_eval_batch_size=PAIRS, disable_tqdm=True
        )
        data = Dataset.from_list(tokens)
        trainer = RewardTrainer(model=model, args=config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
        found = trainer.evaluate()
    margins = [better - worse for better, worse in known["scores"]]
    return {
        "trl_margin": found["eval_margin"],
        "margin": sum(margins) / len(margins),
        "trl_accuracy": found["eval_accuracy"],
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
    }


def vllm(known: dict[str, Any]) -> dict[str, Any]:
    """vLLM continues the prompts and scores the pairs."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams, TokensPrompt

    policy = LLM(model=known["policy"], dtype="float32", max_model_len=512, enforce_eager=True)
    outputs = policy.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in known["prompts"]], SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    )
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    same = sum(_common(mine, theirs) for mine, theirs in zip(known["greedy"], texts, strict=True))
    del policy
    reward = LLM(
        model=known["reward"], runner="pooling", convert="classify", dtype="float32", max_model_len=512, enforce_eager=True
    )
    flat = [ids for pair in known["scored"] for ids in pair]
    found = [output.outputs.probs[0] for output in reward.classify([TokensPrompt(prompt_token_ids=ids) for ids in flat])]
    expected = [score for pair in known["scores"] for score in pair]
    furthest = max(abs(x - y) for x, y in zip(found, expected, strict=True))
    return {"tokens": sum(map(len, known["greedy"])), "same": same, "score_difference": furthest}


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=["write", "trl", "vllm"])
    parser.add_argument("--to", type=Path, required=True, help="the file that `write` writes and the others read")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--reward", type=Path)
    parser.add_argument("--pairs", type=Path, help='JSON lines {"prompt", "chosen", "rejected"}, each messages')
    a = parser.parse_args()
    if a.where == "write":
        a.to.write_text(json.dumps(write(a)), encoding="utf-8")
    else:
        print(json.dumps({"trl": trl, "vllm": vllm}[a.where](json.loads(a.to.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
