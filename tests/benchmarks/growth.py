"""How the time of an update grows with batch, length, K and rankings: a table, with the exponent between neighbours.

    python -m tests.benchmarks.growth --model FOLDER --prompts FILE

Each number comes from a process of its own (`ours_ppo`, `ours_reward`), the median of its counted updates. Linear growth has the
exponent 1: doubling what is asked for doubles the time. What is fixed in an update makes it smaller, attention over long texts
makes it larger.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.compare import measured


class Series(NamedTuple):
    """What grows, in which benchmark's option, over which sizes; what else is given; and the seconds in the benchmark's result."""

    name: str
    module: str
    option: str
    sizes: tuple[int, ...]
    others: str
    seconds: Callable[[dict[str, Any]], float]


def update_seconds(found: dict[str, Any]) -> float:
    return statistics.median(found["seconds"][1:])


def training_seconds(found: dict[str, Any]) -> float:
    return float(found["rankings"] / found["rankings_per_second"])


SERIES = (
    Series("PPO, completions of an update", "ours_ppo", "batch", (8, 16, 32, 64), "--updates 4", update_seconds),
    Series("PPO, tokens of a completion", "ours_ppo", "new-tokens", (32, 64, 128, 256), "--updates 4", update_seconds),
    Series("reward model, K of 32 rankings", "ours_reward", "k", (2, 4, 8, 16), "--rankings 32", training_seconds),
    Series("reward model, rankings of K = 4", "ours_reward", "rankings", (32, 64, 128, 256), "--k 4", training_seconds),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--prompts", type=Path, required=True, help='JSON lines {"prompt", "chosen", "rejected"}, each messages')
    parser.add_argument("--others", default="", help='further options of both benchmarks, such as "--lora-rank 16"')
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    print("| what grows | sizes | seconds | exponents |\n|---|---|---|---|")
    for series in SERIES:
        texts = "--prompts" if series.module == "ours_ppo" else "--pairs"
        command = (
            f"{sys.executable} -m tests.benchmarks.{series.module} --model {a.model} {texts} {a.prompts} --threads {a.threads}"
        )
        command += f" {series.others} {a.others} --{series.option} "
        seconds = [series.seconds(measured(command + str(size))) for size in series.sizes]
        exponents = [
            math.log(after / before) / math.log(larger / smaller)
            for (smaller, larger), (before, after) in zip(
                itertools.pairwise(series.sizes), itertools.pairwise(seconds), strict=True
            )
        ]
        cells = (", ".join(f"{each:.3g}" for each in numbers) for numbers in (series.sizes, seconds, exponents))
        print(f"| {series.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
