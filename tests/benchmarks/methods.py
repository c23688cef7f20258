"""PPO against DPO against best-of-n at equal KL, by the true preference of the simulated world.

    python -m tests.benchmarks.methods --home FOLDER --seeds 0 1 2 3 4

For each seed the stages of the profile `tiny` make rankings, SFT policy, reward model and judge. PPO and DPO are then run once for
each of a few settings that let them go more or less far from SFT; best-of-n draws n answers of SFT and takes the one that the
reward model scores highest. All answer the same held-out prompts. KL is in nats per answer, of best-of-n by its formula
log n - (n-1)/n (Stiennon 2020, appendix G). Between the settings, truth is interpolated linearly in the square root of KL (Gao
2022), from SFT at 0, never beyond the farthest setting. A run that was stopped goes on: FOLDER keeps every artifact, and a line for
each result.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.evaluate.answers import choose_prompts
from components.rlhf.models import load_policy, load_scorer, policy_role
from components.rlhf.records import Message, iterate_snapshot
from components.rlhf.reward import score
from components.rlhf.rollout import Completion, completion_logprobs, prompt_limit, sample_tokens, to_completion
from components.rlhf.tokens import encode_prompt
from components.services.launch import Context, json_digest, parse_settings
from components.services.storage import Storage
from components.simulated_world import truth
from components.simulated_world.generate import write_rankings
from pipelines.local_services import LocalServices, environment_of
from pipelines.profile import Profile, load

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ppo": [{"kl_target": target} for target in (1.0, 4.0, 8.0)],
    "dpo": [{"beta": beta} for beta in (1.0, 0.5, 0.2, 0.1)],
    "best-of-n": [{"n": n} for n in (1, 2, 4, 8, 16, 32)],
}
GRID = (0.25, 0.5, 1.0, 1.5, 2.0, 2.4, 4.0)  # nats; the best of 32 is at 2.497
MOST = 32
BATCH = 128

Row = dict[str, Any]


class World(NamedTuple):
    """What every method of one seed starts from: URIs, and the held-out prompts."""

    snapshot: str
    sft: str
    reward: str
    judge: str
    prompts: list[list[Message]]


def run_stage(stage: str, config: dict[str, Any], inputs: dict[str, str]) -> Any:
    """One stage in this process; what is on the store already is not made again."""
    module = importlib.import_module(f"components.{stage}.stage")
    settings, given = parse_settings(module.Config, config, stage), parse_settings(module.Inputs, inputs, stage)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(stage, settings, given, Path(scratch))
        started = time.monotonic()
        outputs = module.run(settings, given, context)
    print(f"{stage} {time.monotonic() - started:.0f} s {context.summary}", file=sys.stderr, flush=True)
    return outputs


def world_of(profile: Profile, prompts: int) -> World:
    assert profile.simulated is not None
    stages = profile.stages
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rankings.jsonl.gz"
        write_rankings(path, profile.simulated.rankings, profile.simulated.seed)
        snapshot = run_stage("ingest_rankings", stages["ingest_rankings"], {"rankings": str(path)}).snapshot_uri
        Storage().fetch_folder(snapshot, Path(folder) / "snapshot")
        asked, _ = choose_prompts(iterate_snapshot(Path(folder) / "snapshot", "test"), prompts, profile.simulated.seed)
    sft = run_stage("train_sft", stages["train_sft"], {"snapshot_uri": snapshot}).policy_uri
    scorers = run_stage("train_reward_model", stages["train_reward_model"], {"snapshot_uri": snapshot, "policy_uri": sft})
    return World(snapshot, sft, scorers.reward_model_uri, scorers.judge_model_uri, asked)


def trained(method: str, profile: Profile, world: World, setting: dict[str, Any]) -> str:
    """URI of the policy that a method makes with a setting."""
    inputs = {"snapshot_uri": world.snapshot, "sft_uri": world.sft, "judge_model_uri": world.judge}
    if method == "ppo":
        inputs["reward_model_uri"] = world.reward
    stage = f"{method}_finetune"
    return str(run_stage(stage, {**profile.stages[stage], **setting}, inputs).policy_uri)


def fetched(uri: str, folder: Path, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    Storage().fetch_folder(uri, folder)
    return load_policy(folder) if kind == "policy" else load_scorer(folder)


def draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, samples: int, budget: int) -> list[Completion]:
    """`samples` answers to each prompt, prompt by prompt."""
    limit = prompt_limit(model.config, budget, 0)
    prompts = [encode_prompt(tokenizer, prompt, limit)[0] for prompt in world.prompts]
    generator = torch.Generator().manual_seed(1)
    found: list[Completion] = []
    per_batch = max(1, BATCH // samples)
    for first in range(0, len(prompts), per_batch):
        batch = prompts[first : first + per_batch]
        drawn = sample_tokens(
            policy_role(model),
            batch,
            max_new_tokens=budget,
            temperature=1.0,
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
            generator=generator,
            samples=samples,
        )
        repeated = [prompt for prompt in batch for _ in range(samples)]
        found += [to_completion(tokenizer, prompt, *each) for prompt, each in zip(repeated, drawn, strict=True)]
    return found


def true_scores(world: World, answers: Sequence[Completion], samples: int) -> list[float]:
    asked = [prompt for prompt in world.prompts for _ in range(samples)]
    return [truth.score(prompt, answer.text) for prompt, answer in zip(asked, answers, strict=True)]


def rewards(world: World, answers: Sequence[Completion], samples: int) -> list[float]:
    """The reward model's centred scores of answers, in deviations."""
    with tempfile.TemporaryDirectory() as name:
        model, tokenizer = fetched(world.reward, Path(name) / "reward", "scorer")
    asked = [prompt for prompt in world.prompts for _ in range(samples)]
    found: list[float] = []
    for first in range(0, len(answers), 1024):
        part = slice(first, first + 1024)
        found += score(model, tokenizer, asked[part], [a.text for a in answers[part]], batch_size=BATCH).tolist()
    return found


def measured(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, samples: int, budget: int) -> Row:
    """Mean reward, truth and KL to SFT of a policy's own answers."""
    answers = draw(policy, tokenizer, world, samples, budget)
    with tempfile.TemporaryDirectory() as name:
        sft, _ = fetched(world.sft, Path(name) / "sft", "policy")
    longest = max(len(each.prompt_ids) + len(each.token_ids) for each in answers)
    reference = completion_logprobs(sft, tokenizer, answers, temperature=1.0, max_tokens=BATCH * longest)
    kl = statistics.fmean(float((a.logprobs - b).double().sum()) for a, b in zip(answers, reference, strict=True))
    reward, true = (statistics.fmean(of(world, answers, samples)) for of in (rewards, true_scores))
    return {"kl": kl, "reward": reward, "truth": true}


def best_of_n(world: World, budget: int) -> list[Row]:
    """Truth of the best of n by the reward model, the mean over all disjoint groups of n among the answers drawn."""
    with tempfile.TemporaryDirectory() as name:
        sft, tokenizer = fetched(world.sft, Path(name) / "sft", "policy")
    answers = draw(sft, tokenizer, world, MOST, budget)
    proxy, true = rewards(world, answers, MOST), true_scores(world, answers, MOST)
    rows = []
    for setting in SETTINGS["best-of-n"]:
        n = setting["n"]
        best = [max(range(first, first + n), key=lambda i: proxy[i]) for first in range(0, len(answers), n)]
        rows.append({"setting": setting, "kl": math.log(n) - (n - 1) / n, "truth": statistics.fmean(true[i] for i in best)})
    return rows


def at_equal_kl(rows: Iterable[Row], kl: float, start: float, key: str = "truth") -> float | None:
    """`key` of one method and seed at a KL, between its settings and SFT (`start` at 0); None beyond the farthest."""
    points = sorted([(0.0, start), *((math.sqrt(max(0.0, row["kl"])), row[key]) for row in rows)])
    x = math.sqrt(kl)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def spread(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def tables(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Markdown: truth at equal KL, and what each setting reached. Means over seeds with their standard errors."""
    start = {row["seed"]: row["truth"] for row in rows if row["method"] == "best-of-n" and row["setting"] == {"n": 1}}
    lines = [
        f"Truth at equal KL, {len(seeds)} seeds (SFT: {spread([start[s] for s in seeds])}); – where a seed did not go so far",
        "",
    ]
    lines += ["| KL, nats | " + " | ".join(SETTINGS) + " |", "|---|" + "---|" * len(SETTINGS)]
    for kl in GRID:
        cells = []
        for method in SETTINGS:
            found = [at_equal_kl([r for r in rows if r["method"] == method and r["seed"] == s], kl, start[s]) for s in seeds]
            known = [value for value in found if value is not None]
            cells.append(spread(known) if len(known) == len(seeds) else "–")
        lines.append(f"| {kl:g} | " + " | ".join(cells) + " |")
    lines += ["", "| method | setting | KL, nats | truth |", "|---|---|---|---|"]
    for method, settings in SETTINGS.items():
        for setting in settings:
            own = [r for r in rows if r["method"] == method and r["setting"] == setting and r["seed"] in seeds]
            said = ", ".join(f"{key} {value}" for key, value in setting.items())
            lines.append(f"| {method} | {said} | {spread([r['kl'] for r in own])} | {spread([r['truth'] for r in own])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="folder of the local store and of results.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=4, help="answers of PPO's and DPO's policies to each prompt")
    parser.add_argument("--set", dest="assignments", action="append", default=[], help="stage.key=value, on top of tiny")
    a = parser.parse_args()
    results = a.home / "results.jsonl"
    a.home.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with LocalServices(a.home) as services, environment_of(services):
        for seed in a.seeds:
            rows += of_seed(load("tiny", a.assignments, seed), seed, a.prompts, a.samples, results)
    print(tables(rows, a.seeds))


def of_seed(profile: Profile, seed: int, prompts: int, samples: int, results: Path) -> list[Row]:
    """All rows of one seed; those of the same work that are in the file are taken from it."""
    work = json_digest([profile.model_dump(mode="json"), prompts, samples])[:16]
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    known: dict[str, Row] = {row["method"] + str(row["setting"]): row for row in map(json.loads, lines) if row["work"] == work}
    todo = [(method, setting) for method, each in SETTINGS.items() for setting in each if method + str(setting) not in known]
    if not todo:
        return list(known.values())
    torch.set_num_threads(profile.stages["ppo_finetune"]["threads"] or torch.get_num_threads())
    world = world_of(profile, prompts)
    budget = profile.stages["evaluate"]["max_new_tokens"]
    with open(results, "a", encoding="utf-8") as file:

        def keep(method: str, found: Row) -> None:
            row = {"work": work, "seed": seed, "method": method, **found}
            known[method + str(row["setting"])] = row
            file.write(json.dumps(row) + "\n")
            file.flush()

        if any(method == "best-of-n" for method, _ in todo):
            for row in best_of_n(world, budget):
                keep("best-of-n", row)
        for method, setting in todo:
            if method != "best-of-n":
                uri = trained(method, profile, world, setting)
                with tempfile.TemporaryDirectory() as name:
                    policy, tokenizer = fetched(uri, Path(name) / "policy", "policy")
                keep(method, {"setting": setting, **measured(policy, tokenizer, world, samples, budget)})
    return list(known.values())


if __name__ == "__main__":
    main()
