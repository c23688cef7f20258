"""A stand-in for the vLLM worker: it speaks the protocol of `components/rlhf/vllm_worker.py`, and draws random tokens.

What it draws depends on the seeds and on every byte of the adapter or the weights that it is given, so that two runs that gave it
the same are told from two that did not. Its log-probabilities are made up. In `STAND_IN_ENDS` a test says how it ends at
its fourth rollout: "exit", "kill" or "hang".

`interpreter` writes a script that stands where a Python interpreter with vLLM is asked for, and runs this instead of the worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

FATAL_ROLLOUT = 4
TOKENS = range(5, 250)  # of the vocabularies in the tests: neither padding nor EOS


def interpreter(folder: Path) -> str:
    script = folder / "stand-in-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{__file__}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def main() -> None:
    line = socket.socket(fileno=int(sys.argv[-1]))
    rollouts = 0
    for text in line.makefile("r", encoding="utf-8"):
        request = json.loads(text)
        if request["do"] == "start":
            answer = {"version": "none: a stand-in of the tests", "device": "cpu"}
        else:
            rollouts += 1
            if rollouts == FATAL_ROLLOUT and (how := os.environ.get("STAND_IN_ENDS")):
                end(how)
            answer = {"answers": answers(request)}
        line.sendall(json.dumps(answer).encode() + b"\n")


def answers(request: dict) -> list[dict]:  # type: ignore[type-arg]
    folder = Path(request["adapter"] or request["weights"])
    assert [each.name for each in folder.parent.iterdir()] == [folder.name], "weights of earlier rollouts lie about"
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()
    print(f"rollout {request['number']} under {weights[:16]}", flush=True)
    found = []
    for seed in request["seeds"]:
        rng = random.Random(f"{seed} {weights}")
        ids = rng.choices(TOKENS, k=rng.randint(1, request["max_new_tokens"]))
        if len(ids) < request["max_new_tokens"]:
            ids.append(request["eos_id"])
        found.append({"ids": ids, "logprobs": [-5.0 - rng.random() for _ in ids]})
    return found


def end(how: str) -> None:
    print("the stand-in was told to end here", flush=True)
    if how == "exit":
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


if __name__ == "__main__":
    main()
