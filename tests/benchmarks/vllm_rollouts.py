"""vLLM as PPO's sampler beside ours in torch: the same result within noise? how far apart are their log-probabilities? how fast?

    python -m tests.benchmarks.vllm_rollouts learn --vllm-python PYTHON --home FOLDER --seeds 0 1 2
    python -m tests.benchmarks.vllm_rollouts speed --vllm-python PYTHON --model FOLDER --prompts FILE --batch 16 64

`learn` runs the stages of the profile `tiny` with each engine, from the same SFT policy, reward model and judge of each seed, and
lets each final policy answer the same held-out prompts. What a run differs by from another that only draws other random numbers is
measured beside it. vLLM's attention on a CPU knows no heads of width 40, so that the model has
5 of 32 here instead of 4: as many weights. A run that was stopped goes on. `speed` lets both sample the same prompts in turn, in
one run; every completion has all its tokens. PYTHON is an interpreter that has vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.adapters import adapter_role, add_adapter
from components.rlhf.memory import cache_bytes
from components.rlhf.models import load_policy, policy_role
from components.rlhf.rollout import completion_logprobs, sample, sample_tokens
from components.rlhf.vllm_sampler import SEEDS, VllmSampler, save_untied, start_request, worker_command, worker_environment
from components.services.line_process import LineProcess
from components.simulated_world import truth
from pipelines.local_services import LocalServices, environment_of
from pipelines.profile import load
from tests.benchmarks.methods import Row, World, fetched, rewards, run_stage, spread, world_of
from tests.benchmarks.work import prompts_of

NOISE = "torch, another seed"
ENGINES = ("torch", NOISE, "vllm")
HEADS = "train_sft.heads=5"
BLOCK_TOKENS = 128


def learned(world: World, stage: dict[str, Any], engine: dict[str, Any]) -> Row:
    """What PPO with an engine reached: on the held-out prompts, and on its way."""
    inputs = {
        "snapshot_uri": world.snapshot,
        "sft_uri": world.sft,
        "reward_model_uri": world.reward,
        "judge_model_uri": world.judge,
    }
    uri = run_stage("ppo_finetune", {**stage, **engine}, inputs).policy_uri
    with tempfile.TemporaryDirectory() as name:
        policy, tokenizer = fetched(uri, Path(name) / "policy", "policy")
        lines = (Path(name) / "policy" / "training.jsonl").read_text(encoding="utf-8").splitlines()
        sft, _ = fetched(world.sft, Path(name) / "sft", "policy")
    budget = stage["max_new_tokens"]
    answers = sample(policy, tokenizer, world.prompts, max_new_tokens=budget, temperature=1.0, seed=1, batch_size=128)
    longest = max(len(each.prompt_ids) + len(each.token_ids) for each in answers)
    reference = completion_logprobs(sft, tokenizer, answers, temperature=1.0, max_tokens=128 * longest)
    history = [json.loads(line) for line in lines]
    return {
        "truth": statistics.fmean(truth.score(p, a.text) for p, a in zip(world.prompts, answers, strict=True)),
        "reward": statistics.fmean(rewards(world, answers, 1)),
        "kl": statistics.fmean(float((a.logprobs - b).double().sum()) for a, b in zip(answers, reference, strict=True)),
        "updates": len(history) - 1,
        "rollout_seconds": statistics.median(row["rollout_seconds"] for row in history),
        "largest_mismatch": max(row["logprob_mismatch"] for row in history),
        "mean_mismatch": statistics.fmean(row["logprob_mismatch_mean"] for row in history),
        "kl_sampler": statistics.fmean(row["kl_sampler"] for row in history),
        "kl_sampler_most": max(row["kl_sampler"] for row in history),
    }


def learn(a: argparse.Namespace) -> None:
    a.home.mkdir(parents=True, exist_ok=True)
    results = a.home / "results.jsonl"
    rows: list[Row] = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    with LocalServices(a.home) as services, environment_of(services):
        for seed in a.seeds:
            profile = load("tiny", [HEADS, *a.set], seed)
            world = world_of(profile, a.held_out)
            for engine in ENGINES:
                if any(row["seed"] == seed and row["engine"] == engine for row in rows):
                    continue
                given = {"rollout_engine": "vllm" if engine == "vllm" else "torch", "vllm_python": a.vllm_python}
                given["seed"] = seed + 1000 * (engine == NOISE)
                row = {"seed": seed, "engine": engine, **learned(world, profile.stages["ppo_finetune"], given)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    keys = ("truth", "reward", "kl", "rollout_seconds", "largest_mismatch", "mean_mismatch", "kl_sampler")
    print("| engine | " + " | ".join(keys) + " |\n|---|" + "---|" * len(keys))
    for engine in ENGINES:
        mine = [row for row in rows if row["engine"] == engine and row["seed"] in a.seeds]
        cells = (
            f"{statistics.fmean(values):.2g}" if max(map(abs, values)) < 0.01 else spread(values) for values in _columns(mine, keys)
        )
        print(f"| {engine} | {' | '.join(cells)} |")
    for key in ("truth", "reward"):
        by = {(row["seed"], row["engine"]): row[key] for row in rows}
        for engine in ENGINES[1:]:
            print(f"{key}, {engine} less torch, seed by seed: {spread([by[seed, engine] - by[seed, 'torch'] for seed in a.seeds])}")


def _columns(rows: list[Row], keys: tuple[str, ...]) -> list[list[float]]:
    return [[row[key] for row in rows] for key in keys]


def speed(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    model, tokenizer = load_policy(a.model, a.precision)
    role = policy_role(model)
    if a.lora_rank:
        add_adapter(model, "policy", a.lora_rank, 2 * a.lora_rank, 0)
        role = adapter_role(model, "policy", model.get_output_embeddings(), trainable=True, head_trainable=False)
        with torch.no_grad():
            for parameter in role.trainable:
                parameter.add_(0.01 * torch.randn(parameter.shape))
    never = tokenizer.pad_token_id  # as the end: it is never drawn, so that all completions are as long
    prompts = prompts_of(a.prompts, tokenizer, a.prompt_tokens)
    tokens, most = a.prompt_tokens + a.new_tokens, max(a.batch)

    def by_torch(batch: list[list[int]], generator: torch.Generator) -> list[tuple[list[int], Tensor]]:
        return sample_tokens(
            role, batch, max_new_tokens=a.new_tokens, temperature=1.0, pad_id=never, eos_id=never, generator=generator
        )

    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), a.model
        if not a.lora_rank:
            base = folder / "base"
            save_untied(model, base)
        request = start_request(
            base,
            model.config,
            precision=a.precision,
            lora_rank=a.lora_rank,
            memory_fraction=a.memory_fraction,
            sleeps=False,
            cpu_cache_bytes=cache_bytes(model.config, a.precision, most, tokens + BLOCK_TOKENS),
            max_tokens=tokens,
            rows=most,
        )
        command, environment = worker_command(a.vllm_python, os.getpid()), worker_environment(a.threads)
        with LineProcess(command, "vLLM", a.log or folder / "log", environment) as line:
            started = time.perf_counter()
            line.ask(request, 900)
            print(json.dumps({"start_seconds": round(time.perf_counter() - started, 1)}), flush=True)
            tokenizer.eos_token_id = never
            shape = (a.lora_rank, 2 * a.lora_rank, 0)
            vllm = VllmSampler(line, 900, model, tokenizer, "policy" if a.lora_rank else "", shape, folder / "weights")

            def by_vllm(batch: list[list[int]], generator: torch.Generator) -> list[tuple[list[int], Tensor]]:
                seeds = torch.randint(SEEDS, (len(batch),), generator=generator).tolist()
                return vllm(batch, seeds, max_new_tokens=a.new_tokens, temperature=1.0)

            samplers: dict[str, Callable[..., Any]] = {"torch": by_torch, "vllm": by_vllm}
            for batch in a.batch:
                rates: dict[str, list[float]] = {engine: [] for engine in samplers}
                for number in range(a.rounds + 1):
                    asked = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
                    for engine, draw in samplers.items():
                        started = time.perf_counter()
                        drawn = draw(asked, torch.Generator().manual_seed(number))
                        if number:  # the first one warms up
                            rates[engine].append(sum(len(ids) for ids, _ in drawn) / (time.perf_counter() - started))
                ratios = sorted(v / t for v, t in zip(rates["vllm"], rates["torch"], strict=True))
                found = {engine: [round(x) for x in (statistics.median(r), min(r), max(r))] for engine, r in rates.items()}
                ratio = [round(x, 2) for x in (statistics.median(ratios), ratios[0], ratios[-1])]
                print(json.dumps({"batch": batch, "tokens_per_second": found, "vllm_over_torch": ratio}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("learn")
    one.set_defaults(run=learn)
    one.add_argument("--vllm-python", required=True)
    one.add_argument("--home", type=Path, required=True)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--held-out", type=int, default=400, help="prompts that the policies answer at the end")
    one.add_argument("--set", nargs="*", default=[], help="stage.key=value on top of the profile")
    two = commands.add_parser("speed")
    two.set_defaults(run=speed)
    two.add_argument("--vllm-python", required=True)
    two.add_argument("--model", type=Path, required=True)
    two.add_argument("--prompts", type=Path, required=True, help='JSON lines {"prompt": messages}, or {"input_ids": tokens}')
    two.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    two.add_argument("--prompt-tokens", type=int, default=64, help="longer prompts are left out")
    two.add_argument("--new-tokens", type=int, default=48)
    two.add_argument("--lora-rank", type=int, default=0)
    two.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    two.add_argument("--memory-fraction", type=float, default=0.3, help="of a GPU")
    two.add_argument("--rounds", type=int, default=3)
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--log", type=Path, help="keeps what vLLM prints")
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
