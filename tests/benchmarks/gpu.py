"""Memory, speed and FLOP utilisation of every training and of the evaluation on this machine's accelerator, as JSON lines.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --shapes tiny --new-tokens 4    # anywhere, to see that it runs

Four minutes on an H100. For the shapes of the profiles smollm2, llm-1b and llm-8b, with weights drawn on the device: a step of the
reward model, an update of PPO, a step of DPO, one of SFT in full, and a batch of the evaluation, each as its stage does it and with
the profile's settings. No weights are read from files, and texts are token ids drawn at random; everything else is the stages' own
code. A line has the measured peak beside the planned one, times in seconds, and what was reached of a large matrix product's rate.
PPO's rollout has the profile's batch, with `--new-tokens` new ones; `--rows` of its completions are scored and optimised, in one
epoch.

What does not fit by its plan is not tried; what runs out of memory or fails is reported, and the next item follows. With
`--compile` the reward model's step is measured once more with its layers compiled, after everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from components.dpo_finetune import stage as dpo
from components.evaluate import stage as evaluate
from components.evaluate.memory import evaluation_shares
from components.ppo_finetune import roles as ppo_roles
from components.ppo_finetune import stage as ppo
from components.ppo_finetune.engine import roll_out
from components.ppo_finetune.memory import plan
from components.ppo_finetune.progress import Progress
from components.ppo_finetune.update import Experience, look_at, optimise
from components.rlhf import reward_training
from components.rlhf.activations import checkpoint_activations
from components.rlhf.likelihood import add_nll_gradient
from components.rlhf.memory import GIB, Passes, Share, held_bytes, peak_bytes, training_shares
from components.rlhf.models import device, policy_role, scorer_role
from components.rlhf.optimisation import Optimiser
from components.rlhf.rankings import join_where_it_pays
from components.rlhf.reward import score_tokens
from components.rlhf.rollout import Completion, completion_logprobs, sample_tokens
from components.rlhf.tokens import Encoded
from components.train_reward_model import stage as reward
from components.train_sft import stage as sft
from pipelines.capacity.work import forward_flops, training_flops
from tests.benchmarks.device_measures import ceilings, forget_peak, free, seconds
from tests.benchmarks.drawn_models import (
    CASES,
    Case,
    drawn,
    ids,
    make_case,
    rankings,
    save_scorer_folder,
    weights_are_drawn,
)

# -- what is measured ----------------------------------------------------------------------------------------------------


def gib(number: float) -> float:
    return round(number / GIB, 3)


def planned(shares: list[Share]) -> dict[str, Any]:
    total = sum(share.bytes for share in shares)
    return {"planned_gib": gib(total), "shares": [[each.role, each.what, gib(each.bytes)] for each in shares if each.bytes]}


def memory(shares: list[Share], peak: int) -> dict[str, Any]:
    """The plan beside the peak."""
    plan_bytes = sum(share.bytes for share in shares)
    return {"peak_gib": gib(peak), "planned_of_peak": round(plan_bytes / peak, 3), **planned(shares)}


def speed(case: Case, flops: int, took: float, tokens: int) -> dict[str, float]:
    """Tokens per second, and the share of the measured peak of matrix products that these operations reach."""
    rate = flops / took / 1e12
    return {
        "tokens_per_second": round(tokens / took, 1),
        "tflops": round(rate, 2),
        "of_matrix_product": round(rate / case.matrix_tflops, 3),
    }


# -- the trainings -------------------------------------------------------------------------------------------------------


class DoesNotFit(Exception):
    """The plan is over what the device has; the argument is what is known of it."""


def refuse(shares: list[Share]) -> None:
    if device().type == "cuda" and sum(share.bytes for share in shares) > torch.cuda.get_device_properties(0).total_memory:
        raise DoesNotFit(planned(shares))


def two_steps(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first step and of the second; the peak is of both."""
    forget_peak()
    return seconds(step), seconds(step)


def sft_step(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    config = sft.Config(**case.settings["train_sft"])
    tokens = case.settings["train_reward_model"]["max_tokens"]
    passes = Passes(config.batch_size, tokens, config.micro_batch_tokens, config.activation_checkpointing, varied=False)
    shares = training_shares(case.config, "bfloat16", passes, device().type, lora_rank=0, lora_layers=0, scorer=False)
    refuse(shares)
    role = policy_role(drawn(AutoModelForCausalLM, case.config), trainable=True)
    optimiser = Optimiser(role.trainable, learning_rate=1e-6, steps=2, weight_decay=config.weight_decay)
    examples = [Encoded(ids(case, tokens // 4, n), ids(case, tokens - tokens // 4, n)) for n in range(config.batch_size)]

    def step() -> None:
        add_nll_gradient(role, examples, case.tokenizer.pad_token_id, config.micro_batch_tokens)
        optimiser.step()

    first, second = two_steps(step)
    predicted = sum(len(each.completion_ids) for each in examples)
    forward = forward_flops(case.config, [tokens] * len(examples), predicted)
    return {
        **memory(shares, peak_bytes()),
        "first_seconds": round(first, 3),
        "seconds": round(second, 3),
        **speed(case, training_flops(forward, adapters=False), second, len(examples) * tokens),
    }


def preference_step(case: Case, kind: str, compiled: bool = False) -> dict[str, Any]:
    """A step of the reward model's training, or of DPO's."""
    name = {"reward": "train_reward_model", "dpo": "dpo_finetune"}[kind]
    common = case.settings["train_reward_model"]
    keys = ("max_tokens", "batch_rankings", "micro_batch_tokens", "lora_rank", "lora_alpha", "lora_layers", "precision")
    inherited = {key: common[key] for key in keys if key in common}
    given = case.settings.get(name) or inherited
    config: Any = reward.Config(**given) if kind == "reward" else dpo.Config(**given)
    checkpointing = getattr(config, "activation_checkpointing", False)
    rows = rankings(case, config.batch_rankings, config.max_tokens)
    pad = case.tokenizer.pad_token_id
    with weights_are_drawn(case):
        if kind == "reward":
            model, role = reward_training.new_role(reward_training.recipe_of(config.model_dump()), 0, case.folder, case.tokenizer)
        else:
            model, _ = dpo.load_policy(case.folder, config.precision)
            role = dpo._trainable(config, model)
    rows = join_where_it_pays(role, rows, pad)
    row = rows[0]
    passes = Passes(
        len(rows) * row.rows,
        row.row_tokens,
        max(config.micro_batch_tokens, row.rows * row.row_tokens),  # a ranking is never parted
        checkpointing,
        joined=row.joined,
        varied=False,
    )
    shares = training_shares(
        case.config,
        "bfloat16",
        passes,
        device().type,
        lora_rank=config.lora_rank,
        lora_layers=config.lora_layers,
        scorer=kind == "reward",
    )
    optimiser = Optimiser(role.trainable, learning_rate=1e-6, steps=2)
    if kind == "reward":
        recipe = reward_training.recipe_of(config.model_dump())

        def step() -> None:
            reward_training.accumulate(recipe, role, rows, pad)
            optimiser.step()
    else:
        reference = dpo.logprobs_of(config, role, rows, pad)

        def step() -> None:
            dpo.accumulate(config, role, rows, reference, pad)
            optimiser.step()

    if compiled:
        role.backbone.compile()
    first, second = two_steps(step)
    predicted = sum(len(c) for each in rows for c in each.completions) if kind == "dpo" else 0
    forward = forward_flops(case.config, [passes.row_tokens] * passes.rows, predicted)
    share = (config.lora_layers or case.config.num_hidden_layers) / case.config.num_hidden_layers
    flops = training_flops(forward, adapters=bool(config.lora_rank), adapted_share=share)
    if kind == "reward":
        save_scorer_folder(case, model, role.head, config)
    return {
        **memory(shares, peak_bytes()),
        "joined": row.joined,
        "row_tokens": row.row_tokens,
        "rows": passes.rows,
        "first_seconds": round(first, 3),
        "seconds": round(second, 3),
        **speed(case, flops, second, passes.rows * passes.row_tokens),
    }


def ppo_update(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The phases of an update, a line each, and the whole of its memory."""
    given = {**case.settings["ppo_finetune"], "max_new_tokens": options.new_tokens, "epochs": 1, "minibatches": 1}
    config = ppo.Config(**given)
    longest, count = config.max_prompt_tokens, config.batch_prompts
    prompts = [ids(case, longest - n * (longest // 2) // count, n) for n in range(count)]  # half as long at the least
    shares = plan(config, case.folder, [case.folder, case.folder], [longest])
    refuse(shares)
    forget_peak()
    with weights_are_drawn(case):
        roles = ppo_roles.load_roles(
            case.folder,
            case.folder,
            case.folder,
            precision=config.precision,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_layers=config.lora_layers,
            seed=0,
        )
    if config.activation_checkpointing:
        for role in (roles.policy, roles.value):
            checkpoint_activations(role.backbone)
    progress = Progress(config, roles)
    peaks = [peak_bytes()]

    def phase(name: str, **facts: Any) -> dict[str, Any]:
        peaks.append(peak_bytes())
        return {"phase": name, "peak_gib": gib(peaks[-1]), **facts}

    yield phase("roles", held_gib=gib(held_bytes()))

    def rollout(new_tokens: int, of: list[list[int]]) -> list[Completion]:
        return roll_out(config.model_copy(update={"max_new_tokens": new_tokens}), roles, of, progress.sampling)

    rollout(2, prompts[:2])  # loads the kernels
    forget_peak()
    prefill = seconds(lambda: rollout(1, prompts))
    tokens = sum(map(len, prompts))
    yield phase(
        "prefill",
        rows=count,
        padded_tokens=count * longest,
        seconds=round(prefill, 3),
        **speed(case, forward_flops(case.config, [len(each) for each in prompts]), prefill, tokens),
    )
    completions: list[Completion] = []
    forget_peak()
    decode = seconds(lambda: completions.extend(rollout(config.max_new_tokens, prompts))) - prefill
    steps = max(1, config.max_new_tokens - 1)
    yield phase(
        "decode",
        rows=count,
        new_tokens=config.max_new_tokens,
        step_seconds=round(decode / steps, 4),
        tokens_per_second=round(count * steps / decode, 1),
    )

    some = completions[: options.rows]
    lengths = [len(each.prompt_ids) + len(each.token_ids) for each in some]
    backbone = forward_flops(case.config, lengths)
    head = forward_flops(case.config, [], sum(len(each.token_ids) for each in some))
    share = (config.lora_layers or case.config.num_hidden_layers) / case.config.num_hidden_layers if roles.trunk else 1.0
    upper = int(share * backbone)  # what lies below is computed once for all
    look_at(config, roles, some[:2])
    forget_peak()
    seen: list[Experience] = []
    took = seconds(lambda: seen.append(look_at(config, roles, some)))
    yield phase(
        "score",
        rows=len(some),
        tokens=sum(lengths),
        seconds=round(took, 3),
        **speed(
            case, 5 * upper + backbone - upper + 2 * head, took, 5 * sum(lengths)
        ),  # five roles, of which two have the language head
    )

    progress.history.append({"update": 0, "judge_reward": 0.0, "reward": 0.0, "judge_error": 0.0, "kl_reference": 0.0})
    ppo.keep_best(config, progress)  # a copy of the policy

    def learn() -> None:
        optimise(config, roles, progress.optimisers, seen[0], config.beta, progress.order, critic_only=False)

    first, took = two_steps(learn)
    flops = training_flops(2 * upper + head, adapters=bool(config.lora_rank))
    yield phase(
        "optimise",
        rows=len(some),
        tokens=sum(lengths),
        first_seconds=round(first, 3),
        seconds=round(took, 3),
        recomputed=config.activation_checkpointing,
        **speed(case, flops, took, 2 * sum(lengths)),
    )
    yield {"phase": "all", **memory(shares, max(peaks))}


# -- the evaluation ------------------------------------------------------------------------------------------------------


def evaluation(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """A batch of the longest prompts answered and read by a policy, and scored by a judge, which is loaded when that is gone."""
    config = evaluate.Config(**case.settings.get("evaluate", {}))
    rows, longest, pad = config.batch_size, case.settings["ppo_finetune"]["max_prompt_tokens"], case.tokenizer.pad_token_id
    shares = evaluation_shares(case.config, "bfloat16", rows, longest, options.new_tokens, device().type)
    refuse(shares)
    forget_peak()
    model = drawn(AutoModelForCausalLM, case.config)
    prompts = [ids(case, longest, n) for n in range(rows)]
    how = {"max_new_tokens": options.new_tokens, "temperature": 1.0, "pad_id": pad, "eos_id": case.tokenizer.eos_token_id}
    answered = sample_tokens(policy_role(model), prompts, generator=torch.Generator().manual_seed(0), **how)
    answers = [Completion(p, each, "", True, logprobs) for p, (each, logprobs) in zip(prompts, answered, strict=True)]
    max_tokens = rows * (longest + options.new_tokens)
    took = seconds(lambda: completion_logprobs(model, case.tokenizer, answers, temperature=1.0, max_tokens=max_tokens))
    model = None  # before the next one is loaded
    model = drawn(AutoModelForSequenceClassification, type(case.config).from_dict({**case.config.to_dict(), "num_labels": 1}))
    model.score.float()
    score_tokens(scorer_role(model), prompts, [each.token_ids for each in answers], pad_id=pad, max_tokens=max_tokens)
    read = [len(p) + len(each.token_ids) for p, each in zip(prompts, answers, strict=True)]
    flops = forward_flops(case.config, read, sum(len(each.token_ids) for each in answers))
    return {**memory(shares, peak_bytes()), "rows": rows, "seconds": round(took, 3), **speed(case, flops, took, sum(read))}


# -- the run -------------------------------------------------------------------------------------------------------------


def items(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Iterator[dict[str, Any]]]]]:
    yield "reward", lambda: iter([preference_step(case, "reward")])
    yield "ppo", lambda: ppo_update(case, options)
    yield "dpo", lambda: iter([preference_step(case, "dpo")])
    yield "sft", lambda: iter([sft_step(case, options)])
    yield "evaluate", lambda: iter([evaluation(case, options)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(CASES), default=["smollm2", "llm-1b", "llm-8b"])
    names = ["reward", "ppo", "dpo", "sft", "evaluate"]
    parser.add_argument("--items", nargs="+", choices=names, default=names, help="PPO needs the reward model, which comes with it")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a completion of PPO")
    parser.add_argument("--rows", type=int, default=32, help="completions that are scored and optimised")
    parser.add_argument("--seconds", type=float, default=240, help="no item begins later")
    parser.add_argument("--compile", choices=list(CASES), help="measures this shape's reward model compiled, too")
    options = parser.parse_args()
    started = time.perf_counter()
    out = Path(os.environ["OUT"]) / "gpu.jsonl" if os.environ.get("OUT") else None
    failed = 0

    def tell(line: dict[str, Any]) -> None:
        text = json.dumps({**line, "at": round(time.perf_counter() - started, 1)})
        print(text, flush=True)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    rates = ceilings()
    tell(rates)
    with tempfile.TemporaryDirectory() as scratch:
        cases = [make_case(name, Path(scratch), rates["matrix_product_tflops"]) for name in options.shapes]
        todo = [
            (c, name, work)
            for c in cases
            for name, work in items(c, options)
            if name in options.items or (name == "reward" and "ppo" in options.items)
        ]
        if options.compile:
            (case,) = [each for each in cases if each.name == options.compile]
            todo.append((case, "compiled", lambda: iter([preference_step(case, "reward", compiled=True)])))
        for case, name, work in todo:
            free()
            head = {"shape": case.name, "item": name}
            if time.perf_counter() - started > options.seconds:
                tell({**head, "skipped": "no time left"})
                continue
            try:
                for line in work():
                    tell({**head, **line})
            except DoesNotFit as reason:
                tell({**head, "skipped": "does not fit by its plan", **reason.args[0]})
            except torch.OutOfMemoryError as error:
                failed += 1
                tell({**head, "failed": "out of memory", "peak_gib": gib(peak_bytes()), "reason": str(error)[:300]})
            except Exception:
                failed += 1
                tell({**head, "failed": traceback.format_exc()[-1500:]})
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
