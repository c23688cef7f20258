"""Share of the machine's peak that a gradient of the policy reaches: counted products per second, over those of `torch.mm`.

    python -m tests.benchmarks.share_of_peak --model FOLDER [--lora-rank 16 --precision bfloat16]

One micro-batch as in PPO's optimisation: log-probabilities of the completions, and their backward pass. torch's own counter counts
the matrix products that are run, so what is computed a second time counts too; products that are added in place, such as LoRA's
second one, it leaves out. Peak and gradient are timed in turn, on the same threads. With `--compile` the backbone goes through
torch.compile first; what that takes is told, and not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.models import dtype_of, load_policy, policy_role
from components.rlhf.rollout import token_logprobs
from components.rlhf.tokens import right_pad

SIZE = 2048  # of the square matrices of the peak


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler on a CPU")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=53)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model, tokenizer = load_policy(a.model, a.precision)
    if a.lora_rank:
        model.requires_grad_(False)
        add_adapter(model, "policy", a.lora_rank, 2 * a.lora_rank, 0)
        role = adapter_role(model, "policy", model.get_output_embeddings(), trainable=True, head_trainable=False)
    else:
        role = policy_role(model, trainable=True)
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (
        torch.randint(10, len(tokenizer) - 10, (a.rows, tokens), generator=generator).tolist()
        for tokens in (a.prompt_tokens, a.new_tokens)
    )
    batch = right_pad(prompts, completions, tokenizer.pad_token_id)
    square = torch.randn(SIZE, SIZE, dtype=dtype_of(a.precision))

    def gradient() -> None:
        logprobs_BT, _ = token_logprobs(role, batch, temperature=0.7, pad_id=tokenizer.pad_token_id)
        logprobs_BT.sum().backward()
        for parameter in role.trainable:
            parameter.grad = None

    with FlopCounterMode(display=False) as counter:
        gradient()
    compiling = 0.0
    if a.compile:
        role.backbone.compile()
        compiling = seconds(gradient)
    gradient()
    torch.mm(square, square)
    peaks, reached = [], []
    for _ in range(a.rounds):
        peaks.append(2 * SIZE**3 / seconds(lambda: torch.mm(square, square)) / 1e9)
        reached.append(counter.get_total_flops() / seconds(gradient) / 1e9)
    shares = sorted(mine / peak for mine, peak in zip(reached, peaks, strict=True))
    print(
        json.dumps(
            {
                "gflop": round(counter.get_total_flops() / 1e9, 1),
                "gflop_per_second": round(statistics.median(reached)),
                "peak_gflop_per_second": round(statistics.median(peaks)),
                "seconds": round(counter.get_total_flops() / 1e9 / statistics.median(reached), 3),
                "compile_seconds": round(compiling, 1),
                "share": round(statistics.median(shares), 3),
                "share_min_max": [round(shares[0], 3), round(shares[-1], 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
