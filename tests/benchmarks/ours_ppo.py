"""Seconds and memory of our PPO updates, as one JSON line; `compare.py` runs it in turn with TRL's.

The same work as TRL's: as many prompts of at most as many tokens, as many new tokens, epochs and optimiser steps. Reward model and
judge have random heads: what they say changes no time.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from components.ppo_finetune.memory import plan
from components.ppo_finetune.progress import Progress
from components.ppo_finetune.roles import load_roles
from components.ppo_finetune.stage import Config, one_update
from components.rlhf.adapters import add_adapter, save_adapter
from components.rlhf.memory import GIB, peak_bytes, table
from components.rlhf.models import load_policy, new_scorer, save_model
from tests.benchmarks.work import arguments, prompts_of

SCORERS = ("reward", "judge")


def scorer_folder(policy: Path, folder: Path, rank: int, layers: int, seed: int) -> Path:
    """A reward model with a random head, and with an adapter that changes nothing if the policy is to have one."""
    tokenizer = load_policy(policy)[1]
    model = new_scorer(policy, seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, folder)
    if rank:
        add_adapter(model, "reward", rank, 2 * rank, seed, layers)
        save_adapter(model, "reward", folder / "adapter", rank, 2 * rank, layers)
    return folder


def make_folders(policy: Path, folder: Path, rank: int, layers: int) -> None:
    save_model(*load_policy(policy), folder / "sft")  # gives it a pad token of its own
    for seed, name in enumerate(SCORERS):
        scorer_folder(folder / "sft", folder / name, rank, layers, seed)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--lora-layers", type=int, default=0, help="of all adapters")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--value-epochs", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    config = Config(
        updates=a.updates,
        batch_prompts=a.batch,
        max_new_tokens=a.new_tokens,
        temperature=a.temperature,
        epochs=a.epochs,
        value_epochs=a.value_epochs,
        micro_batch_tokens=a.micro_batch_tokens,
        learning_rate=1e-6,
        value_learning_rate=1e-6,
        lora_rank=a.lora_rank,
        lora_alpha=2 * max(1, a.lora_rank),
        lora_layers=a.lora_layers,
        precision=a.precision,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: what it takes is not the training's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_folders, args=(a.model, folder, a.lora_rank, a.lora_layers)
        )
        maker.start()
        maker.join()
        sft, scorers = folder / "sft", [folder / each for each in SCORERS]
        tokenizer = AutoTokenizer.from_pretrained(sft)
        prompts = prompts_of(a.prompts, tokenizer, a.prompt_tokens)
        shares = plan(config, sft, scorers, [len(prompt) for prompt in prompts])
        print(table(shares), file=sys.stderr)
        roles = load_roles(
            sft,
            *scorers,
            precision=a.precision,
            lora_rank=a.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_layers=a.lora_layers,
            seed=0,
        )
    progress = Progress(config, roles)
    for update in range(a.updates):
        one_update(config, progress, [prompts[(update * a.batch + i) % len(prompts)] for i in range(a.batch)], last=False)
    counted = progress.history[1:] or progress.history
    keys = ("rollout_seconds", "score_seconds", "optimise_seconds", "tokens_per_second", "completion_tokens")
    seconds = [sum(row[key] for key in keys[:3]) for row in counted]
    print(
        json.dumps(
            {
                "seconds": [round(each, 2) for each in seconds],
                "samples_per_second": round(a.batch / statistics.median(seconds), 3),
                **{key: round(statistics.median(row[key] for row in counted), 2) for key in keys},
                "planned_gib": round(sum(share.bytes for share in shares) / GIB, 2),
                "peak_gib": round(peak_bytes() / GIB, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
