"""Writes simulated rankings to a file: `python -m components.simulated_world --rankings 3000 --output rankings.jsonl.gz`."""

from __future__ import annotations

import argparse
from pathlib import Path

from components.simulated_world.generate import write_rankings

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.simulated_world", description=__doc__)
    parser.add_argument("--rankings", type=int, default=3000, help="number of rankings of 4 replies each (default 3000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same file (default 0)")
    parser.add_argument("--output", type=Path, required=True, help="file to write, gzip JSON lines")
    arguments = parser.parse_args()
    write_rankings(arguments.output, arguments.rankings, arguments.seed)
    print(f"{arguments.rankings} simulated rankings -> {arguments.output}")
