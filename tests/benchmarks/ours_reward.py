"""Rankings per second and memory of our reward-model training, as one JSON line; `compare.py` runs it in turn with TRL's."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from components.rlhf.models import load_policy
from components.rlhf.optimisation import Optimiser
from components.rlhf.rankings import encode_rankings, join_where_it_pays
from components.rlhf.records import Message, Ranking
from components.rlhf.reward_training import accumulate, new_role
from components.train_reward_model.stage import Config
from tests.benchmarks.work import rankings_of, reward_arguments


def as_rankings(found: Sequence[tuple[list[dict[str, str]], list[str]]]) -> list[Ranking]:
    """Rankings as our reader makes them, of prompts with completions, best first."""
    empty: dict[str, Any] = dict.fromkeys(("rater_id", "source", "collected_at", "confidence", "policies", "criterion"))
    return [
        Ranking(
            ranking_id=str(number),
            prompt=[Message(role=m["role"], content=m["content"]) for m in prompt],  # type: ignore[typeddict-item]
            completions=completions,
            ranks=list(range(1, len(completions) + 1)),
            split="train",
            **empty,
        )
        for number, (prompt, completions) in enumerate(found)
    ]


def main() -> None:
    parser = reward_arguments(__doc__)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--lora-layers", type=int, default=0)
    parser.add_argument("--separate", action="store_true", help="a row for each completion, though they share their prompt")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    _, tokenizer = load_policy(a.model)
    found = rankings_of(a.pairs, a.k, a.rankings, tokenizer, a.max_tokens)
    config = Config(
        batch_rankings=a.batch_rankings,
        micro_batch_tokens=a.micro_batch_tokens,
        lora_rank=a.lora_rank,
        lora_alpha=2 * max(1, a.lora_rank),
        lora_layers=a.lora_layers,
        precision=a.precision,
    )
    _, role = new_role(config, 0, a.model, tokenizer)
    encoded = encode_rankings(tokenizer, as_rankings(found), a.max_tokens).rankings
    if not a.separate:
        encoded = join_where_it_pays(role, encoded, tokenizer.pad_token_id)
    batches = [encoded[i : i + a.batch_rankings] for i in range(0, len(encoded), a.batch_rankings)]
    optimiser = Optimiser(role.trainable, learning_rate=1e-5, steps=len(batches))
    accumulate(config, role, batches[0], tokenizer.pad_token_id)
    optimiser.discard()
    started = time.perf_counter()
    for batch in batches:
        accumulate(config, role, batch, tokenizer.pad_token_id)
        optimiser.step()
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "rankings": len(encoded),
                "joined": sum(each.joined for each in encoded),
                "rankings_per_second": round(len(encoded) / seconds, 3),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
