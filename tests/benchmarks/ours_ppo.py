"""Seconds and memory of our PPO updates, as one JSON line; `compare.py` runs it in turn with TRL's.

The same work as TRL's: as many prompts of at most as many tokens, as many new tokens, epochs and optimiser steps. Reward model and
judge have random heads: what they say changes no time.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
from pathlib import Path

import torch

from components.ppo_finetune.roles import load_roles
from components.ppo_finetune.stage import Config, Progress
from components.ppo_finetune.update import Stopwatch, look_at, optimise, roll_out
from components.rlhf.models import add_adapter, load_policy, new_scorer, save_adapter, save_model
from tests.benchmarks.work import arguments, prompts_of


def scorer_folder(policy: Path, folder: Path, rank: int, seed: int) -> Path:
    """A reward model with a random head, and with an adapter that changes nothing if the policy is to have one."""
    tokenizer = load_policy(policy)[1]
    model = new_scorer(policy, seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, folder)
    if rank:
        add_adapter(model, "reward", rank, 2 * rank, seed)
        save_adapter(model, "reward", folder / "adapter", rank, 2 * rank)
    return folder


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    config = Config(
        updates=a.updates,
        batch_prompts=a.batch,
        max_new_tokens=a.new_tokens,
        temperature=a.temperature,
        epochs=a.epochs,
        micro_batch_tokens=a.micro_batch_tokens,
        learning_rate=1e-6,
        value_learning_rate=1e-6,
        lora_rank=a.lora_rank,
        lora_alpha=2 * max(1, a.lora_rank),
        precision=a.precision,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(*load_policy(a.model), folder / "sft")  # gives it a pad token of its own
        reward, judge = (
            scorer_folder(folder / "sft", folder / each, a.lora_rank, seed) for seed, each in enumerate(("reward", "judge"))
        )
        roles = load_roles(
            folder / "sft", reward, judge, precision=a.precision, lora_rank=a.lora_rank, lora_alpha=config.lora_alpha, seed=0
        )
    progress = Progress(config, roles)
    prompts = prompts_of(a.prompts, roles.tokenizer, a.prompt_tokens)
    rows = []
    for update in range(a.updates):
        batch = [prompts[(update * a.batch + i) % len(prompts)] for i in range(a.batch)]
        watch = Stopwatch()
        completions = roll_out(config, roles, batch, progress.sampling)
        watch.lap("rollout")
        experience = look_at(config, roles, completions)
        watch.lap("score")
        optimise(config, roles, progress.optimisers, experience, 0.05, progress.order, critic_only=False)
        watch.lap("optimise")
        rows.append({**watch.seconds, "seconds": sum(watch.seconds.values()), "tokens": int(experience.batch.attention_BT.sum())})
    counted = rows[1:] or rows
    print(
        json.dumps(
            {
                "seconds": [round(row["seconds"], 2) for row in counted],
                "samples_per_second": round(a.batch / statistics.median(row["seconds"] for row in counted), 3),
                **{key: round(statistics.median(row[key] for row in counted), 2) for key in rows[0]},
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
