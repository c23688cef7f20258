"""Completions from vLLM: a process of its own samples under the policy's adapter or weights, given to it anew for each rollout.

What comes back is what the torch sampler gives: token ids and log-probabilities at the sampling temperature. vLLM computes with
kernels of its own, in batches of its own, so both differ from the trainer's in the last digits: `rlhf.mismatch` measures how far.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.rlhf.adapters import save_peft_adapter
from components.rlhf.models import Precision, context_tokens
from components.rlhf.sharding import put_together
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WORKER = Path(__file__).parent / "vllm_worker.py"
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM 0.32 makes room; it takes smaller ones too
SEEDS = 2**31


class Line(Protocol):
    """The other process; `components.services.line_process` has one."""

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer, within so many seconds."""
        ...


def worker_command(python: str, parent: int) -> list[str]:
    """What starts the worker, but for the socket's number.

    Args:
        python: an interpreter that has vLLM; "": this one.
        parent: process id of the one that starts it, without which it does not go on.
    """
    # Isolated: nothing of ours is on its path, where `statistics` would be our module.
    return [python or sys.executable, "-I", str(WORKER), str(parent)]


def worker_environment(threads: int) -> dict[str, str]:
    """Variables that the worker needs: one process, no network, and the GPU that this process uses.

    Args:
        threads: of a CPU; 0: as many as it finds.
    """
    found = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if threads:
        found |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if torch.cuda.is_available():  # after torchrun each process has one of several
        found["CUDA_VISIBLE_DEVICES"] = _visible(torch.cuda.current_device())
    return found


def _visible(device: int) -> str:
    """How `CUDA_VISIBLE_DEVICES` calls this process's device of that number."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return listed.split(",")[device].strip() if listed else str(device)


def start_request(
    folder: Path,
    config: PretrainedConfig,
    *,
    precision: Precision,
    lora_rank: int,
    memory_fraction: float,
    sleeps: bool,
    cpu_cache_bytes: int,
    max_tokens: int,
    rows: int,
) -> dict[str, Any]:
    """What makes the worker load the model in `folder`.

    Args:
        lora_rank: of the adapters that will come; 0: whole weights will come.
        memory_fraction: of the GPU's memory, for weights and cache.
        sleeps: whether it gives that memory back between rollouts.
        cpu_cache_bytes: for keys and values, on a CPU.
        max_tokens: of the longest prompt with its completion.
        rows: completions of one rollout.

    Raises:
        DoNotRetry: a rank for which vLLM has no room.
    """
    options: dict[str, Any] = {
        "dtype": precision,
        "max_model_len": min(max_tokens, context_tokens(config)),
        "max_num_seqs": rows,
        "gpu_memory_utilization": memory_fraction,
    }
    if lora_rank:
        if lora_rank > ADAPTER_RANKS[-1]:
            raise DoNotRetry(
                f"ppo_finetune.lora_rank is {lora_rank}; vLLM takes adapters up to {ADAPTER_RANKS[-1]}",
                "lower it, or set rollout_engine to torch",
            )
        room = next(each for each in ADAPTER_RANKS if each >= lora_rank)
        options |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 1}
    return {"do": "start", "model": str(folder), "options": options, "cpu_cache_bytes": cpu_cache_bytes, "sleeps": sleeps}


class VllmSampler:
    """Samples from the policy as it is when it is asked.

    The policy's adapter, or all its weights, are written for each rollout, under a number that rises: after a resume as before,
    what samples is what the trainer holds. The folder of the one before is removed.

    Args:
        line: the worker, started.
        seconds: that a rollout may take.
        model: that carries the policy.
        adapter: its name; "": the policy is the whole model.
        shape: rank, alpha and number of adapted layers of that adapter.
        folder: where weights are written.
    """

    def __init__(
        self,
        line: Line,
        seconds: float,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: str,
        shape: tuple[int, int, int],
        folder: Path,
    ) -> None:
        self._line, self._seconds, self._model, self._tokenizer = line, seconds, model, tokenizer
        self._adapter, self._shape, self._folder = adapter, shape, folder
        self._number = 0

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, max_new_tokens: int, temperature: float
    ) -> list[tuple[list[int], Tensor]]:
        """One completion of each prompt, as (token ids, log-probabilities float32 [T]).

        Each has a seed of its own, below `SEEDS`: what a row draws does not depend on which others are beside it, but for rounding.
        """
        written = self._write()
        request = {
            "do": "generate",
            "prompts": [list(prompt) for prompt in prompts],
            "seeds": list(seeds),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "eos_id": self._tokenizer.eos_token_id,
            "pad_id": self._tokenizer.pad_token_id,
            "adapter": str(written) if self._adapter else "",
            "weights": "" if self._adapter else str(written),
            "number": self._number,
        }
        answers = self._line.ask(request, self._seconds)["answers"]
        return [(list(each["ids"]), torch.tensor(each["logprobs"], dtype=torch.float32)) for each in answers]

    def _write(self) -> Path:
        """The folder of the policy as it is now; the one before is removed."""
        before, self._number = self._folder / str(self._number), self._number + 1
        shutil.rmtree(before, ignore_errors=True)
        folder = self._folder / str(self._number)
        if self._adapter:
            save_peft_adapter(self._model, self._adapter, folder, *self._shape)
        else:
            save_untied(self._model, folder)
        return folder


def save_untied(model: PreTrainedModel, folder: Path) -> None:
    """A model folder without tokenizer, whose language head has weights of its own even where the model shares the embedding's.

    On a CPU vLLM 0.32 packs the head's weights when it starts, and new embeddings do not reach a head that is tied to them: after a
    reload its log-probabilities were off by 2.6 nats. Untied, they differ in the sixth digit.
    """
    head = model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules(remove_duplicate=False) if module is head]
    weights = {key: put_together(value.detach()).cpu() for key, value in model.state_dict().items()}
    weights[f"{name}.weight"] = weights[f"{name}.weight"].clone()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
