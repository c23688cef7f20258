"""vLLM as a process that samples what it is asked for: one JSON line in, one out, on the socket whose number is its last argument.

It runs under an interpreter that has vLLM, whose packages exclude ours, so it imports nothing of rankloop. `rlhf.vllm_sampler`
speaks to it. It ends when the other end of the line does, and the kernel kills it if that is while it is busy.

Requests:
    {"do": "start", "model": FOLDER, "options": keywords of vllm.LLM, "cpu_cache_bytes", "sleeps"}
        -> {"version", "device"}
    {"do": "generate", "prompts": [[token, ...], ...], "seeds": one per prompt, "max_new_tokens", "temperature", "eos_id", "pad_id",
     "adapter": FOLDER in peft's format or "", "weights": FOLDER of a whole model or "", "number": of the adapter or the weights}
        -> {"answers": [{"ids", "logprobs"}, ...]}
Where it fails: {"error": what, "again": whether another try may help, "remedy"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
FORBIDDEN = -100.0  # vLLM takes no more off a logit; it leaves e-44 of the probability, which float32 cannot tell from nothing
STEP_TOKENS = 4096  # that vLLM computes at once on a CPU, unless one prompt has more
SET_UP = (ValueError, TypeError, NotImplementedError, OSError)  # at the start: a wrong value, a model that vLLM does not serve


class Worker:
    """The engine, and which weights it has: 0 are those it started with."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.number = 0
        self.sleeps = False

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Loads the model, and samples one token: what it cannot serve it may say only then, and the first one takes long.

        Log-probabilities are those of the distribution that is sampled from. The model folder's sampling defaults are not taken.
        """
        import vllm
        from vllm.platforms import current_platform

        options = dict(request["options"])
        self.sleeps = bool(request["sleeps"])
        if current_platform.is_cpu():
            self.sleeps = False
            # Compiling needs a C++ compiler. And a prompt is computed whole: where vLLM 0.32 computes one with a seed in parts, it
            # moves a generator's offset, which on a CPU has none.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(STEP_TOKENS, options["max_model_len"])}
            options |= {"kv_cache_memory_bytes": request["cpu_cache_bytes"], "enforce_eager": True, **whole}
        self.engine = vllm.LLM(
            model=request["model"],
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_sleep_mode=self.sleeps,
            **options,
        )
        one = vllm.SamplingParams(max_tokens=1, detokenize=False)
        self.engine.generate([vllm.TokensPrompt(prompt_token_ids=[0])], one, use_tqdm=False)
        self._sleep()
        return {"version": vllm.__version__, "device": current_platform.device_type}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Samples a completion of each prompt, under the adapter or the weights that the request names."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        if self.sleeps:
            self.engine.wake_up()
        number, adapter = int(request["number"]), None
        if request["adapter"]:
            # A name and a number of its own: the cached keys and values of another adapter are never taken for this one's.
            adapter = LoRARequest(f"policy-{number}", number, request["adapter"])
        elif number != self.number:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": request["weights"]})
            self.engine.reset_prefix_cache()
        self.number = number
        sampling = [
            SamplingParams(
                temperature=request["temperature"],
                max_tokens=request["max_new_tokens"],
                seed=seed,
                logprobs=0,
                ignore_eos=True,
                stop_token_ids=[request["eos_id"]],
                logit_bias={request["pad_id"]: FORBIDDEN},
                detokenize=False,
            )
            for seed in request["seeds"]
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
        found = [each.outputs[0] for each in self.engine.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)]
        self._sleep()
        return {"answers": [_answer(list(each.token_ids), each.logprobs) for each in found]}

    def _sleep(self) -> None:
        """Gives the GPU's memory back: weights go to the host's memory, cached keys and values are dropped."""
        if self.sleeps:
            self.engine.sleep(level=1)


def _answer(ids: list[int], logprobs: list[dict[int, Any]]) -> dict[str, Any]:
    return {"ids": ids, "logprobs": [at[token].logprob for at, token in zip(logprobs, ids, strict=True)]}


def failure(error: Exception, starting: bool) -> dict[str, Any]:
    """What is told of an exception."""
    what = f"{type(error).__name__}: {error}"[:4000]
    if isinstance(error, ImportError):
        remedy = "name an interpreter that has vllm in ppo_finetune.vllm_python, or set rollout_engine to torch"
        return {"error": f"{sys.executable}: {what}", "again": False, "remedy": remedy}
    if "memory" in what.lower():
        return {"error": what, "again": True, "remedy": "lower ppo_finetune.vllm_memory_fraction, or free memory"}
    refused = starting and (isinstance(error, SET_UP) or "support" in what.lower())
    return {"error": what, "again": not refused, "remedy": "set ppo_finetune.rollout_engine to torch" if refused else ""}


def main() -> None:
    parent, line = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before that call
    worker = Worker()
    with line.makefile("r", encoding="utf-8") as requests:
        for text in requests:
            request = json.loads(text)
            starting = request["do"] == "start"
            try:
                answer = worker.start(request) if starting else worker.generate(request)
            except Exception as error:
                traceback.print_exc()
                answer = failure(error, starting)
            line.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
