"""The plan of memory beside the tensors that there were, for each training and the evaluation at three small sizes.

    python -m tests.benchmarks.memory_plan
    python -m tests.benchmarks.memory_plan --shapes 1m --items sft reward

The steps are those of tests/benchmarks/gpu.py: the stages' own code on weights that are drawn. Every tensor is counted from the
operation that makes it until it is freed, so that plan and tensors are compared, and not malloc's habits; the share of a CPU's plan
that stands for these is left out. Prompts of PPO have many lengths, as its plan expects; the other rows are equal. On a CPU; writes
JSON lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from components.rlhf import memory
from components.rlhf.live_bytes import LiveBytes
from components.rlhf.scratch_model import train_tokenizer
from pipelines.capacity.shapes import SHAPES, Shape, llama_config
from tests.benchmarks import gpu
from tests.benchmarks.drawn_models import CONTEXT_TOKENS, Case

CASES = {
    "1m": Shape(128, 384, 4, 4, 2, 2048, True, 1_049_728),
    "20m": Shape(384, 1024, 8, 6, 2, 16384, True, 18_880_896),
    "135m": SHAPES["SmolLM2-135M"],
}
WAYS = {
    "full": {"lora_rank": 0, "lora_layers": 0},
    "lora": {"lora_rank": 16, "lora_layers": 0},
    "top": {"lora_rank": 16, "lora_layers": 3},
}
TOLERANCE = 0.15


def settings_of(way: str, max_tokens: int) -> dict[str, dict[str, Any]]:
    """Small batches with several micro-batches each."""
    common = {**WAYS[way], "lora_alpha": 32, "precision": "bfloat16"}
    preferences = {**common, "max_tokens": max_tokens, "batch_rankings": 3, "micro_batch_tokens": 4 * max_tokens}
    return {
        "train_sft": {"batch_size": 8, "micro_batch_tokens": 4 * max_tokens, "precision": "bfloat16"},
        "train_reward_model": preferences,
        "dpo_finetune": preferences,
        "evaluate": {"batch_size": 16, "precision": "bfloat16"},
        "ppo_finetune": {
            **common,
            "batch_prompts": 16,
            "max_prompt_tokens": max_tokens // 2,
            "micro_batch_tokens": 4 * max_tokens,
        },
    }


def make_case(name: str, way: str, max_tokens: int, folder: Path) -> Case:
    tokenizer = train_tokenizer(["some words for a tokenizer"], 300, CONTEXT_TOKENS)
    config = llama_config(CASES[name], CONTEXT_TOKENS)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Case(f"{name}-{way}", config, settings_of(way, max_tokens), folder, tokenizer, 1.0)


def measured(case: Case, item: str, options: argparse.Namespace) -> dict[str, Any]:
    """The line of one training that has both, plan and peak."""
    live = LiveBytes()

    def forget() -> None:
        gc.collect()  # shapes of the plan are counted, too, as long as they are there
        live.forget()

    with (
        mock.patch.object(memory, "UNUSABLE", 0.0),
        mock.patch("components.ppo_finetune.memory.held_bytes", side_effect=lambda: live.now),
        mock.patch.object(gpu, "forget_peak", forget),
        mock.patch.object(gpu, "peak_bytes", side_effect=lambda: live.peak),
        mock.patch.object(gpu, "held_bytes", side_effect=lambda: live.now),
        live,
    ):
        return [line for line in dict(gpu.items(case, options))[item]() if "planned_of_peak" in line][-1]


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in options.shapes:
        for way in options.ways:
            with tempfile.TemporaryDirectory() as folder:
                case = make_case(shape, way, options.max_tokens, Path(folder))
                for item in options.items:
                    if item in ("sft", "evaluate") and way != "full":  # they have no adapters
                        continue
                    yield {"shape": shape, "way": way, "item": item, **measured(case, item, options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    names = ["sft", "reward", "ppo", "dpo", "evaluate"]
    parser.add_argument("--items", nargs="+", choices=names, default=names, help="PPO needs the reward model before it")
    parser.add_argument("--max-tokens", type=int, default=128, help="of prompt and completion together")
    parser.add_argument("--new-tokens", type=int, default=16, help="of a completion of PPO")
    parser.add_argument("--rows", type=int, default=16, help="completions that are scored and optimised")
    options = parser.parse_args()
    torch.manual_seed(0)
    outside = 0
    for line in lines(options):
        wrong = abs(line["planned_of_peak"] - 1) > TOLERANCE
        outside += wrong
        keys = ("shape", "way", "item", "planned_gib", "peak_gib", "planned_of_peak", "joined", "shares")
        print(json.dumps({**{key: line[key] for key in keys if key in line}, "outside": wrong}), flush=True)
    raise SystemExit(1 if outside else 0)


if __name__ == "__main__":
    main()
