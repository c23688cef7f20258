"""Rankings per second and memory of our reward-model training, as one JSON line; `compare.py` runs it in turn with TRL's."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import torch

from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.models import load_policy, new_scorer, scorer_role
from components.rlhf.optimisation import Optimiser
from components.rlhf.rankings import encode_rankings, join_where_it_pays
from components.rlhf.records import Message, Ranking
from components.train_reward_model.stage import Config
from components.train_reward_model.training import accumulate
from tests.benchmarks.work import rankings_of, reward_arguments


def main() -> None:
    parser = reward_arguments(__doc__)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--lora-layers", type=int, default=0)
    parser.add_argument("--separate", action="store_true", help="a row for each completion, though they share their prompt")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    _, tokenizer = load_policy(a.model)
    empty: dict[str, Any] = dict.fromkeys(("rater_id", "source", "collected_at", "confidence", "policies", "criterion"))
    rankings = [
        Ranking(
            ranking_id=str(number),
            prompt=[Message(role=m["role"], content=m["content"]) for m in prompt],  # type: ignore[typeddict-item]
            completions=completions,
            ranks=list(range(1, a.k + 1)),
            split="train",
            **empty,
        )
        for number, (prompt, completions) in enumerate(rankings_of(a.pairs, a.k, a.rankings, tokenizer, a.max_tokens))
    ]
    model = new_scorer(a.model, 0, a.precision)
    model.score.float()
    if a.lora_rank:
        add_adapter(model, "reward", a.lora_rank, 2 * a.lora_rank, 0, a.lora_layers)
        model.requires_grad_(False)
        role = adapter_role(model, "reward", model.score, trainable=True, head_trainable=True)
        role.activate()
    else:
        role = scorer_role(model, trainable=True)
    encoded = encode_rankings(tokenizer, rankings, a.max_tokens).rankings
    if not a.separate:
        encoded = join_where_it_pays(role, encoded, tokenizer.pad_token_id)
    config = Config(batch_rankings=a.batch_rankings, micro_batch_tokens=a.micro_batch_tokens)
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
