"""PPO's rollouts, and the engine that samples them: the trainer's own model, or vLLM as a process beside it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from components.ppo_finetune import memory
from components.ppo_finetune.roles import POLICY, Roles
from components.rlhf.distributed import processes, rank, summed
from components.rlhf.rollout import PREFILL_MICRO_BATCHES, Completion, sample_tokens, to_completion
from components.rlhf.vllm_sampler import SEEDS, VllmSampler, save_untied, start_request, worker_command, worker_environment
from components.services.line_process import LineProcess

_log = logging.getLogger(__name__)


class Knobs(memory.Knobs, Protocol):
    """What the engine needs of the stage's configuration; meanings and units stand there."""

    lora_alpha: int
    threads: int
    vllm_python: str
    vllm_sleep: bool
    vllm_timeout_seconds: float


class RolloutKnobs(Protocol):
    """What a rollout needs of the stage's configuration."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    micro_batch_tokens: int


@contextmanager
def rollout_engine(
    knobs: Knobs, roles: Roles, sft: Path, prompts: Sequence[Sequence[int]], scratch: Path
) -> Iterator[VllmSampler | None]:
    """The sampler, gone at the end; None: the policy samples in this process.

    Args:
        sft: folder of the policy that PPO starts from.
        prompts: all that may come.
        scratch: where weights and the engine's log are written.

    Raises:
        DoNotRetry: there is no such interpreter, no vLLM in it, or vLLM cannot serve this model.
        Retry: it died or did not start in time.
    """
    if knobs.rollout_engine == "torch":
        yield None
        return
    started = time.monotonic()
    folder, log = scratch / f"rollout-weights-{rank()}", scratch / f"vllm-{rank()}.log"
    base = sft
    if not knobs.lora_rank:
        base = folder / "0"
        save_untied(roles.model, base)
    config = roles.model.config
    rows, tokens = knobs.batch_prompts * knobs.samples_per_prompt, max(map(len, prompts)) + knobs.max_new_tokens
    request = start_request(
        base,
        config,
        precision=knobs.precision,
        lora_rank=knobs.lora_rank,
        memory_fraction=knobs.vllm_memory_fraction,
        sleeps=knobs.vllm_sleep,
        cpu_cache_bytes=memory.vllm_cache_bytes(knobs, config, tokens),
        max_tokens=tokens,
        rows=rows,
    )
    command, environment = worker_command(knobs.vllm_python, os.getpid()), worker_environment(knobs.threads)
    with LineProcess(command, "vLLM", log, environment) as line:
        found = line.ask(request, knobs.vllm_timeout_seconds)
        seconds = time.monotonic() - started
        _log.info("vLLM %s samples, on %s (process %d, started in %.0f s)", found["version"], found["device"], line.pid, seconds)
        shape = (knobs.lora_rank, knobs.lora_alpha, knobs.lora_layers)
        adapter = POLICY if knobs.lora_rank else ""
        yield VllmSampler(line, knobs.vllm_timeout_seconds, roles.model, roles.tokenizer, adapter, shape, folder)


def roll_out(
    knobs: RolloutKnobs,
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    generator: torch.Generator,
    engine: VllmSampler | None = None,
) -> list[Completion]:
    """`samples_per_prompt` completions of each prompt from the current policy, prompt by prompt; from `engine` if there is one.

    Each process samples every n-th prompt, and draws the numbers, or the engine's seeds, of all.
    """
    own = slice(rank(), None, processes())
    samples = knobs.samples_per_prompt
    drawn: list[tuple[list[int], Tensor]] = []
    if engine is not None:
        seeds = torch.randint(SEEDS, (len(prompts), samples), generator=generator)[own].flatten().tolist()
        asked = [prompt for prompt in prompts[own] for _ in range(samples)]
        drawn = engine(asked, seeds, max_new_tokens=knobs.max_new_tokens, temperature=knobs.temperature) if asked else []
    elif prompts[own]:
        drawn = sample_tokens(
            roles.policy,
            prompts[own],
            max_new_tokens=knobs.max_new_tokens,
            temperature=knobs.temperature,
            pad_id=roles.tokenizer.pad_token_id,
            eos_id=roles.tokenizer.eos_token_id,
            generator=generator,
            samples=samples,
            among=(len(prompts), own),
            prefill_tokens=PREFILL_MICRO_BATCHES * knobs.micro_batch_tokens,
        )
    if processes() > 1:
        drawn = _of_all(knobs, drawn, len(prompts), generator if engine is None else None)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    return [to_completion(roles.tokenizer, prompt, *each) for prompt, each in zip(repeated, drawn, strict=True)]


def _of_all(
    knobs: RolloutKnobs, own: Sequence[tuple[list[int], Tensor]], prompts: int, generator: torch.Generator | None
) -> list[tuple[list[int], Tensor]]:
    """What all processes have sampled, prompt by prompt; the generator, if there is one, is left as if this one had sampled all."""
    samples, budget = knobs.samples_per_prompt, knobs.max_new_tokens
    ids, logprobs = torch.zeros((prompts, samples, budget), dtype=torch.long), torch.zeros((prompts, samples, budget))
    lengths = torch.zeros((prompts, samples), dtype=torch.long)
    for number, (tokens, values) in enumerate(own):
        prompt, sample = rank() + number // samples * processes(), number % samples
        ids[prompt, sample, : len(tokens)] = torch.tensor(tokens)
        logprobs[prompt, sample, : len(tokens)] = values
        lengths[prompt, sample] = len(tokens)
    for each in (ids, logprobs, lengths):
        summed(each)
    for _ in range(int(lengths.max()) - max((len(tokens) for tokens, _ in own), default=0) if generator else 0):
        torch.rand(prompts * samples, generator=generator, dtype=torch.float64)
    return [
        (row_ids[:length].tolist(), row_logprobs[:length].clone())
        for row_ids, row_logprobs, length in zip(ids.flatten(0, 1), logprobs.flatten(0, 1), lengths.flatten().tolist(), strict=True)
    ]
