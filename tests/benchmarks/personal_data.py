"""Microseconds a ranking of 1 KB (K = 4) that the search for personal data takes, by what is in one of its texts.

    python -m tests.benchmarks.personal_data [--repetitions 15]

CPU time of one core, the least of the repetitions: neighbours only add to it. The texts are made of words, numbers and marks, each
ranking its own.
"""

from __future__ import annotations

import argparse
import random
import time

from components.ingest_rankings.formats import Parsed, parse
from components.ingest_rankings.personal_data.policy import PersonalData, Policy

RANKINGS = 400
TEXT_CHARACTERS = 200
WORDS = (
    "the of and I you parcel late number please what model answer sorry yes no in order 2024 help with don't because, Well. "
    "(really) customer delivery Monday, address street tomorrow 3.5 10%"
).split()
PLACED = {
    "nothing": "",
    "a date and a time": " on 2024-01-31 10:00",
    "a long URL": " https://example.com/a-long-path/of-some-words ",
    "curly quotes": " “naïve” — café … ",
    "an e-mail address": " jane.doe@example.org ",
    "a phone number": " +1 202 555 0143 ",
    "a card": " 4111 1111 1111 1111 ",
    "an IBAN": " DE89 3704 0044 0532 0130 00 ",
    "a key": " ghp_a1B2c3D4e5F6a1B2c3D4e5F6a1B2c3D4e5F6 ",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    columns: tuple[tuple[Policy, str], ...] = (("report", ""), ("mask", ""), ("report", "US"))
    print("| in one of five texts | report | mask | report, phone_region US |\n| --- | --- | --- | --- |")
    for name, placed in PLACED.items():
        rankings = [parsed for seed in range(RANKINGS) for parsed in _ranking(seed, placed)]
        print(f"| {name} | {' | '.join(f'{_microseconds(rankings, *column, repetitions):.1f}' for column in columns)} |")


def _ranking(seed: int, placed: str) -> list[Parsed]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=TEXT_CHARACTERS))[:TEXT_CHARACTERS] for _ in range(5)]
    texts[1] = texts[1][len(placed) :] + placed
    row = {"prompt": texts[0], "completions": texts[1:], "ranks": [1, 2, 3, 4]}
    return [parsed for parsed in parse(row, "auto", "made", 0.1) if isinstance(parsed, Parsed)]


def _microseconds(rankings: list[Parsed], policy: Policy, region: str, repetitions: int) -> float:
    least = float("inf")
    for _ in range(repetitions):
        personal = PersonalData(policy, region, 0.1)
        start = time.process_time()
        for parsed in rankings:
            personal.applied("made", 1, parsed)
        least = min(least, time.process_time() - start)
    return least / len(rankings) * 1e6


if __name__ == "__main__":
    main()
