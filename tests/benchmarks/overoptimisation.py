"""Over-optimisation on the simulated world, as in Gao 2022: truth, reward model and judge against the square root of KL.

    python -m tests.benchmarks.overoptimisation --home FOLDER --study sweep --seeds 0 1 2 3 4
    python -m tests.benchmarks.overoptimisation --home FOLDER --study ensemble --seeds 0 1 2 3 4

`sweep` varies beta and the number of rankings that reward model and judge learn from. `ensemble` turns a quarter of all rankings
round and lets PPO optimise one reward model, or the mean or the worst of four (Coste 2023). PPO runs to its last update, whatever
the judge says, so that the whole curve is seen; what the judge's choice and stop would have kept is then read off it, with several
penalties for KL. Truth is the mean over the update's own answers. The stages are those of the profile `tiny`, with its settings but
for those above. A run that was stopped goes on: FOLDER keeps every artifact, and a line for each curve.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from components.ppo_finetune.progress import Progress
from components.ppo_finetune.prompts import read_prompts
from components.ppo_finetune.roles import load_roles
from components.ppo_finetune.stage import Config, one_update
from components.ppo_finetune.watch import keep_best, over_optimised
from components.rlhf.optimisation import data_order
from components.rlhf.records import iterate_snapshot, prompt_key
from components.services.launch import json_digest
from components.services.storage import Storage
from components.simulated_world import truth
from components.simulated_world.generate import write_rankings
from pipelines.local_services import LocalServices, environment_of
from pipelines.profile import Profile, load
from tests.benchmarks.methods import Row, run_stage, spread

FLIPPED = 0.25
SMOOTH = 5  # updates
KL_PENALTIES = (0.0, 0.02, 0.05, 0.1)  # in the rule that keeps a policy


class Variant(NamedTuple):
    """One curve: its name, what differs in the reward model's and in PPO's settings, and whether rankings are turned round."""

    name: str
    reward_model: dict[str, Any]
    ppo: dict[str, Any]
    flipped: bool = False


FREE: dict[str, Any] = {"kl_target": 0.0, "judge_tolerance": 1e9, "max_kl_reference": 1e9, "max_same_answer_fraction": 1.0}
STUDIES = {
    "sweep": [
        Variant("as in the profile", {}, {**FREE, "kl_target": load("tiny", [], 0).stages["ppo_finetune"]["kl_target"]}),
        *(
            Variant(f"beta {beta:g}, {rankings or 'all'} rankings", {"max_rankings": rankings}, {**FREE, "beta": beta})
            for rankings in (0, 300)
            for beta in (0.0, 0.1)
        ),
    ],
    "ensemble": [
        Variant("one", {}, {**FREE, "beta": 0.0}, True),
        *(
            Variant(how, {"ensemble_members": 4}, {**FREE, "beta": 0.0, "reward_aggregation": how}, True)
            for how in ("mean", "worst")
        ),
    ],
}


def turned_round(path: Path, seed: int) -> None:
    """Reverses the order of a quarter of the rankings in a file, drawn by the seed."""
    rng = random.Random(f"flip-{seed}")
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    for row in rows:
        if rng.random() < FLIPPED:
            row["ranks"] = [max(row["ranks"]) + 1 - rank for rank in row["ranks"]]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def curve(profile: Profile, variant: Variant, updates: int) -> list[Row]:
    """What each update measured: kl_reference in nats, reward, judge_reward and judge_error in deviations, truth."""
    assert profile.simulated is not None
    stages, seed = profile.stages, profile.simulated.seed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "rankings.jsonl.gz"
        write_rankings(file, profile.simulated.rankings, seed)
        clean = run_stage("ingest_rankings", stages["ingest_rankings"], {"rankings": str(file)}).snapshot_uri
        sft = run_stage("train_sft", stages["train_sft"], {"snapshot_uri": clean}).policy_uri
        snapshot = clean
        if variant.flipped:
            turned_round(file, seed)
            snapshot = run_stage("ingest_rankings", stages["ingest_rankings"], {"rankings": str(file)}).snapshot_uri
        settings = {**stages["train_reward_model"], **variant.reward_model}
        scorers = run_stage("train_reward_model", settings, {"snapshot_uri": snapshot, "policy_uri": sft})
        uris = {"snapshot": snapshot, "sft": sft, "reward": scorers.reward_model_uri, "judge": scorers.judge_model_uri}
        for kind, uri in uris.items():
            Storage().fetch_folder(uri, folder / kind)
        config = Config(**{**stages["ppo_finetune"], **variant.ppo, "updates": updates})
        roles = load_roles(
            *(folder / kind for kind in ("sft", "reward", "judge")), precision="float32", lora_rank=0, lora_alpha=32, seed=seed
        )
        prompts, _ = read_prompts(config, roles.tokenizer, roles.model.config, folder / "snapshot")
        asked = {prompt_key(r.prompt): r.prompt for r in iterate_snapshot(folder / "snapshot", "train")}
        messages = [asked[key] for key in sorted(asked)]
        assert len(messages) == len(prompts), "a prompt was left out"
    progress = Progress(config, roles)
    order = data_order(len(prompts), (updates + 1) * config.batch_prompts, config.seed)
    rows: list[Row] = []
    for update in range(updates + 1):
        chosen = order[update * config.batch_prompts : (update + 1) * config.batch_prompts]
        completions = one_update(config, progress, [prompts[i] for i in chosen], last=update == updates)
        true = [truth.score(messages[i], completion.text) for i, completion in zip(chosen, completions, strict=True)]
        row = progress.history[-1]
        rows.append({key: row[key] for key in ("update", "kl_reference", "reward", "judge_reward", "judge_error")})
        rows[-1]["truth"] = statistics.fmean(true)
    return rows


def smoothed(rows: list[Row], update: int) -> float:
    """Truth, averaged over the updates around one."""
    return statistics.fmean(row["truth"] for row in rows[max(0, update - SMOOTH // 2) : update + SMOOTH // 2 + 1])


def kept_update(rows: list[Row], penalty: float) -> int:
    """The update whose policy PPO would have kept, by the stage's own rule with that penalty: its choice, until its stop."""
    config = Config(**{**load("tiny", [], 0).stages["ppo_finetune"], "judge_kl_penalty": penalty})
    roles = SimpleNamespace(policy=SimpleNamespace(trainable=[]))
    progress: Any = SimpleNamespace(history=[], roles=roles, best=[], best_update=0)
    for row in rows:
        progress.history.append(dict(row))
        keep_best(config, progress)
        if over_optimised(config, progress):
            break
    return int(progress.best_update)


def summary(rows: list[Row]) -> dict[str, float]:
    """Truth at the start, at its best and at the end; how far from SFT its best is; what share of it the judge's rule keeps."""
    best = max(range(len(rows)), key=lambda update: smoothed(rows, update))
    found = {name: smoothed(rows, update) for name, update in (("start", 0), ("best", best), ("end", len(rows) - 1))}
    kept = {f"kept at {each:g}": smoothed(rows, kept_update(rows, each)) / found["best"] for each in KL_PENALTIES}
    return {**found, "best_kl": rows[best]["kl_reference"], **kept}


def table(curves: dict[tuple[str, int], list[Row]], seeds: list[int], names: list[str]) -> str:
    kept = [f"kept at {each:g}" for each in KL_PENALTIES]
    keys = ("start", "best", "best_kl", "end")
    lines = ["| variant | " + " | ".join((*keys, *kept)) + " |", "|---|" + "---|" * (len(keys) + len(kept))]
    for name in names:
        found = [summary(curves[name, seed]) for seed in seeds]
        cells = [spread([each[key] for each in found]) for key in keys]
        cells += [f"{spread([each[key] for each in found])}, least {min(each[key] for each in found):.2f}" for key in kept]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(curves: dict[tuple[str, int], list[Row]], seeds: list[int], names: list[str], path: Path) -> None:
    """A panel for each variant: the means over seeds of truth, reward and judge, update by update, at their mean root of KL."""
    figure = Figure(figsize=(4 * min(3, len(names)), 3 * -(-len(names) // 3)), layout="constrained")
    axes = list(figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False, sharex=True).flat)
    for unused in axes[len(names) :]:
        unused.remove()
    for name, axis in zip(names, axes, strict=False):
        means = [
            {key: statistics.fmean(row[key] for row in each) for key in ("kl_reference", "truth", "reward", "judge_reward")}
            for each in zip(*(curves[name, seed] for seed in seeds), strict=True)
        ]
        root = [max(0.0, row["kl_reference"]) ** 0.5 for row in means]
        for key, label in (("truth", "truth"), ("reward", "reward model"), ("judge_reward", "judge")):
            axis.plot(root, [row[key] for row in means], label=label)
        axis.set(title=name, xlabel="√KL to SFT, √nats")
    figure.axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="folder of the local store and of the curves")
    parser.add_argument("--study", choices=list(STUDIES), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    a.home.mkdir(parents=True, exist_ok=True)
    results = a.home / "curves.jsonl"
    done = {row["work"]: row["curve"] for row in map(json.loads, results.open())} if results.exists() else {}
    torch.set_num_threads(a.threads)
    threads = [f"{stage}.threads={a.threads}" for stage in ("train_sft", "train_reward_model", "ppo_finetune")]
    curves: dict[tuple[str, int], list[Row]] = {}
    with LocalServices(a.home) as services, environment_of(services):
        for seed in a.seeds:
            profile = load("tiny", threads, seed)
            for variant in STUDIES[a.study]:
                work = json_digest([profile.model_dump(mode="json"), variant, a.updates])[:16]
                if work not in done:
                    done[work] = curve(profile, variant, a.updates)
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"work": work, "name": variant.name, "seed": seed, "curve": done[work]}) + "\n")
                curves[variant.name, seed] = done[work]
    names = [variant.name for variant in STUDIES[a.study]]
    picture(curves, a.seeds, names, a.home / f"{a.study}.svg")
    print(table(curves, a.seeds, names))


if __name__ == "__main__":
    main()
