"""The engine that samples PPO's completions: the trainer's own model, or vLLM as a process beside it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from components.ppo_finetune import memory
from components.ppo_finetune.roles import POLICY, Roles
from components.rlhf.distributed import rank
from components.rlhf.vllm_sampler import VllmSampler, save_untied, start_request, worker_command, worker_environment
from components.services.line_process import LineProcess

_log = logging.getLogger(__name__)


class Knobs(memory.Knobs, Protocol):
    """What the engine needs of the stage's configuration; meanings and units stand there."""

    lora_alpha: int
    threads: int
    vllm_python: str
    vllm_sleep: bool
    vllm_timeout_seconds: float


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
