"""Memory of PPO in two processes, layers divided and not, beside its plan, as JSON lines; on a CPU.

    python -m tests.benchmarks.sharded_memory
    python -m tests.benchmarks.sharded_memory --ways lora --hidden 512

What is measured is the most memory that a process has, seen every two milliseconds. Undivided, weights that are not trained stay in
their files' pages; divided ones are copies, and the files' pages, which the system may take back, are left out. glibc gives back
what is freed at once: it would keep the holes that layers leave, where a GPU's allocator fills them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from components.rlhf.memory import GIB
from components.services.storage import MARKER, Storage
from components.services.tracking import client
from pipelines.local_services import LocalServices, environment_of
from tests.stage_processes import publish_snapshot

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000", "MALLOC_TRIM_THRESHOLD_": "4000000", "MALLOC_ARENA_MAX": "1"}
WAYS = {"full": 0, "lora": 8}
RANK = "components.services.rank"


def stage(name: str, root: str, options: dict[str, Any], kinds: tuple[str, ...] = ()) -> tuple[dict[str, str], int]:
    """A stage's outputs, and the most bytes of these kinds of memory that one of its processes had."""
    command = [sys.executable, "-m", f"components.{name}", *(f"--{key.replace('_', '-')}={each}" for key, each in options.items())]
    environment = {**os.environ, **MALLOC, "RANKLOOP_STORAGE": root}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, looked, ranks = 0, 0.0, []
    while process.poll() is None:
        if time.monotonic() - looked > 1:
            ranks, looked = ranks_of(process.pid), time.monotonic()
        peak = max([peak, *(memory_bytes(pid, kinds) for pid in ranks)])
        time.sleep(0.002)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    outputs: dict[str, str] = json.loads(text[text.index("{") :])
    return outputs, peak


def ranks_of(pid: int) -> list[int]:
    """The processes below this one that share its training."""
    found = []
    for each in psutil.Process(pid).children(recursive=True):
        try:
            command = each.cmdline()
        except psutil.Error:
            continue
        if RANK in command and "torch.distributed.run" not in command:
            found.append(each.pid)
    return found


def memory_bytes(pid: int, kinds: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def lines(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for way in a.ways:
        root = f"s3://rankloop/{way}"
        snapshot, lora = publish_snapshot(root), {"lora_rank": WAYS[way], "threads": 1}
        size = {"layers": a.layers, "hidden": a.hidden, "heads": a.hidden // 64, "epochs": 0.1, "threads": 1}
        sft, _ = stage("train_sft", root, {**snapshot, **size})
        scorers, _ = stage("train_reward_model", root, {**snapshot, **sft, "max_rankings": 12, **lora})
        given = {**snapshot, "sft_uri": sft["policy_uri"], **scorers, **lora, "updates": 1, "epochs": 2}
        given |= {"batch_prompts": 16, "max_new_tokens": 16, "micro_batch_tokens": 512, "processes": 2}
        for shard in (False, True):
            # Another place each time: it is the same work, and would be found.
            kinds = ("RssAnon",) if shard else ("RssAnon", "RssFile")
            made, peak = stage("ppo_finetune", f"{root}/{shard}", {**given, "shard": str(shard).lower()}, kinds)
            run = client().get_run(Storage().get_json(f"{next(iter(made.values()))}/{MARKER}")["mlflow_run_id"])
            planned = run.data.metrics["summary/memory_planned_gib"]
            yield {
                "way": way,
                "shard": shard,
                "planned_gib": round(planned, 3),
                "peak_gib": round(peak / GIB, 3),
                "planned_of_peak": round(planned / (peak / GIB), 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=640, help="a multiple of 64")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, LocalServices(Path(home) / "home") as services, environment_of(services):
        for line in lines(a):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
