"""Runs commands in turn, A B A B …, and prints what each reached and the ratios, round by round.

    python -m tests.benchmarks.compare --rounds 5 --ours "…" --theirs "…"

Each command prints one JSON line last. Machines are noisy, so only runs that stood side by side are compared, and the median of the
ratios is the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys

HIGHER_IS_BETTER = ("samples_per_second", "rankings_per_second", "pairs_per_second")


def measured(command: str) -> dict[str, float]:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ours", required=True, action="append", help="command; more than one: each is compared with each of theirs"
    )
    parser.add_argument("--theirs", required=True, action="append", help="command")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {command: [] for command in (*a.ours, *a.theirs)}
    for number in range(a.rounds):
        for command, runs in found.items():
            runs.append(measured(command))
            print(f"round {number + 1}: {command}: {json.dumps(runs[-1])}", file=sys.stderr, flush=True)
    for ours, theirs in itertools.product(a.ours, a.theirs):
        print(f"\n    ours:   {ours}\n    theirs: {theirs}\n")
        print("| | ours, median [min, max] | theirs | ratio, median [min, max] |\n|---|---|---|---|")
        pairs = list(zip(found[ours], found[theirs], strict=True))
        for key in (*HIGHER_IS_BETTER, "peak_gib"):
            if key in pairs[0][0] and key in pairs[0][1]:
                left, right = ([pair[side][key] for pair in pairs] for side in (0, 1))
                ratios = [x / y for x, y in zip(left, right, strict=True)]
                print(f"| {key} | {_spread(left)} | {_spread(right)} | {_spread(ratios)} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
