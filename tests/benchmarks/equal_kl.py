"""Reward and truth at equal KL after as many samples: our PPO beside TRL's, on the simulated world.

    python -m tests.benchmarks.equal_kl --home FOLDER --trl-python TRL/bin/python --trl FOLDER --seeds 0 1 2

For each seed the stages of the profile `tiny` make prompts, SFT policy, reward model and judge. Ours is the stage `ppo_finetune` of
that profile with a fixed beta; TRL's (`trl_ppo.py`) gets the same policy, reward model, prompts, number of samples, passes,
optimiser steps and KL coefficient, and a learning rate that was chosen for it. Its reward model's head is divided by the deviation
of its scores, so that a KL coefficient means the same. Both policies then answer the same held-out prompts. Between the settings,
reward and truth are interpolated as in `methods.py`. A run that was stopped goes on: FOLDER keeps a line for each policy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from components.ppo_finetune.prompts import read_prompts
from components.ppo_finetune.stage import Config
from components.rlhf.models import load_policy
from components.rlhf.reward import Centring
from components.services.storage import Storage
from pipelines.local_services import LocalServices, environment_of
from pipelines.profile import Profile, load
from tests.benchmarks.methods import Row, World, at_equal_kl, fetched, measured, spread, trained, world_of

BETAS = (0.2, 0.1, 0.05)
GRID = (0.5, 1.0, 2.0, 3.0, 4.0)  # nats
SIDES = ("ours", "TRL")
PROMPTS, SAMPLES = 256, 4


def trl_policy(a: argparse.Namespace, config: Config, world: World, rate: float, folder: Path) -> Path:
    """Folder of the policy that TRL makes with the stage's settings and a learning rate of its own."""
    Storage().fetch_folder(world.snapshot, folder / "snapshot")
    sft, tokenizer = fetched(world.sft, folder / "sft", "policy")
    reward, _ = fetched(world.reward, folder / "reward", "scorer")
    reward.score.weight.data /= Centring.of(reward.config).deviation
    reward.save_pretrained(folder / "scaled")
    prompts, _ = read_prompts(config, tokenizer, sft.config, folder / "snapshot")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts), encoding="utf-8")
    options = {
        "trl": a.trl,
        "model": folder / "sft",
        "reward": folder / "scaled",
        "prompts": folder / "prompts.jsonl",
        "prompt-tokens": max(map(len, prompts)),
        "updates": config.updates,
        "batch": config.batch_prompts,
        "new-tokens": config.max_new_tokens,
        "epochs": config.epochs,
        "temperature": config.temperature,
        "kl-coefficient": config.beta,
        "learning-rate": rate,
        "missing-eos-penalty": -config.no_eos_score,
        "threads": a.threads,
        "save": folder / "policy",
    }
    command = [a.trl_python, "tests/benchmarks/trl_ppo.py", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return folder / "policy"


def of_side(a: argparse.Namespace, side: str, profile: Profile, world: World, setting: Row) -> Row:
    """What the policy of one side and setting reaches."""
    fixed = {"kl_target": 0.0, "beta": setting["beta"]}
    with tempfile.TemporaryDirectory() as name:
        if side == "ours":
            uri = trained("ppo", profile, world, fixed)
            policy, tokenizer = fetched(uri, Path(name) / "policy", "policy")
        else:
            config = Config(**{**profile.stages["ppo_finetune"], **fixed})
            folder = trl_policy(a, config, world, setting["learning_rate"], Path(name))
            policy, tokenizer = load_policy(folder)
    return measured(policy, tokenizer, world, SAMPLES, profile.stages["evaluate"]["max_new_tokens"])


def table(rows: list[Row], seeds: list[int]) -> str:
    """Markdown: reward and truth at equal KL, means over seeds with their standard errors; - where a seed did not go so far."""
    lines = [
        "| KL, nats | " + " | ".join(f"{key}, {side}" for key in ("reward", "truth") for side in SIDES) + " |",
        "|---" * 5 + "|",
    ]
    for kl in GRID:
        cells = []
        for key in ("reward", "truth"):
            for side in SIDES:
                found = []
                for seed in seeds:
                    own = [row for row in rows if row["seed"] == seed]
                    start = next(row[key] for row in own if row["side"] == "SFT")
                    found.append(at_equal_kl([row for row in own if row["side"] == side], kl, start, key))
                known = [value for value in found if value is not None]
                cells.append(spread(known) if len(known) == len(seeds) else "-")
        lines.append(f"| {kl:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="folder of the local store and of equal_kl.jsonl")
    parser.add_argument("--trl-python", required=True, help="Python of TRL's environment")
    parser.add_argument("--trl", required=True, help="folder that holds trl 1.12.0")
    parser.add_argument("--trl-learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    a.home.mkdir(parents=True, exist_ok=True)
    results = a.home / "equal_kl.jsonl"
    rows: list[Row] = [json.loads(line) for line in results.open(encoding="utf-8")] if results.exists() else []
    threads = [f"{stage}.threads={a.threads}" for stage in ("train_sft", "train_reward_model", "ppo_finetune")]
    todo: list[tuple[str, Row]] = [("SFT", {}), *(("ours", {"beta": beta}) for beta in a.betas)]
    todo += [("TRL", {"beta": beta, "learning_rate": rate}) for beta in a.betas for rate in a.trl_learning_rates]
    with LocalServices(a.home) as services, environment_of(services):
        for seed in a.seeds:
            profile = load("tiny", threads, seed)
            world = world_of(profile, PROMPTS)
            for side, setting in todo:
                key = {"seed": seed, "side": side, "setting": setting}
                if any(key.items() <= row.items() for row in rows):
                    continue
                if side == "SFT":
                    with tempfile.TemporaryDirectory() as name:
                        policy, tokenizer = fetched(world.sft, Path(name) / "sft", "policy")
                    found = measured(policy, tokenizer, world, SAMPLES, profile.stages["evaluate"]["max_new_tokens"])
                else:
                    found = of_side(a, side, profile, world, setting)
                rows.append({**key, **found})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table([row for row in rows if (row["side"], row["setting"]) in todo], a.seeds))


if __name__ == "__main__":
    main()
