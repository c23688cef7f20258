"""The drift watch by simulation: false alarms in a year without drift, delay of an alarm after one; beside Evidently's text drift.

    python -m tests.benchmarks.drift --home FOLDER --repetitions 500
    python -m tests.benchmarks.drift --home FOLDER --evidently /path/to/its/venv/bin/python

A repetition draws 1000 rankings as the champion's snapshot and then 20 a day, without replacement, from one pool of simulated
rankings that no model learned from: without drift they are exchangeable, whatever the models are. The tests are the stage's own
(`Watch`), and each new ranking is bet on. Drifts begin after 30 quiet days. Delays are in rankings after the beginning, at daily
looks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.detect_drift import units, watch
from components.detect_drift.channels import CHANNELS, Known, Watch
from components.detect_drift.units import Dated, rater_day
from components.rlhf.records import prompt_key
from components.rlhf.statistics import wilson_interval
from pipelines.local_services import LocalServices, environment_of
from tests.benchmarks.drift_streams import Pool, dated, make_pools

REFERENCE, PER_DAY, YEAR, QUIET_DAYS = 1000, 20, 365, 30
ALPHA = 0.05
ORDINARY, DRIFTED = 9500, 1500  # rankings in the pools
LONGEST_DAYS = 60  # after a drift began
EVIDENTLY_STREAMS, EVIDENTLY_DAYS = 10, 10  # without drift; a look takes it five seconds
CHANCE = watch.chance


class Drift(NamedTuple):
    """What happens to a share of the rankings after the quiet days."""

    name: str
    kind: str
    share: float


DRIFTS = (
    Drift("new topic, 10 %", "topic", 0.1),
    Drift("new topic, 25 %", "topic", 0.25),
    Drift("new topic, 50 %", "topic", 0.5),
    Drift("flipped preference, 10 %", "flip", 0.1),
    Drift("flipped preference, 25 %", "flip", 0.25),
    Drift("new rater pool", "raters", 1.0),
    Drift("longer prompts", "longer", 1.0),
)


class Stream(NamedTuple):
    """One repetition: the champion's snapshot, then days of rankings; `flipped` are the digests of those turned round."""

    reference: list[Dated]
    days: list[list[Dated]]
    flipped: set[str]


def draw(pools: dict[str, Pool], repetition: int, days: int, drift: Drift | None = None, learned: bool = False) -> Stream:
    """A stream; with `learned`, the reference is drawn from the rankings that the models learned from."""
    rng = np.random.default_rng([repetition, 7])
    ordinary = [pools["ordinary"].groups[i] for i in rng.permutation(len(pools["ordinary"].groups))]
    other = pools[drift.kind] if drift and drift.kind in pools else None
    others = iter([other.groups[i] for i in rng.permutation(len(other.groups))] if other else [])
    source = ordinary
    if learned:
        source = [pools["learned"].groups[i] for i in rng.permutation(len(pools["learned"].groups))]
    reference, used = _take(iter(source), REFERENCE)
    rest = iter(ordinary[0 if learned else used :])
    quiet, _ = _take(rest, (QUIET_DAYS if drift else days) * PER_DAY)
    groups, flipped = quiet, set()
    if drift:
        made = 0
        while made < (days - QUIET_DAYS) * PER_DAY:
            drifts = rng.uniform() < drift.share
            group = next(others) if drifts and other else next(rest)
            if drifts and drift.kind == "flip":
                group = [
                    one._replace(ranking=one.ranking._replace(ranks=[9 - rank for rank in one.ranking.ranks])) for one in group
                ]
                flipped |= {one.digest for one in group}
            if drifts and drift.kind == "raters":
                group = [one._replace(ranking=one.ranking._replace(rater_id="new " + one.ranking.rater_id)) for one in group]
            groups.append(group)
            made += len(group)
    stream = dated(groups, 0, PER_DAY)
    cut = [stream[first : first + PER_DAY] for first in range(0, days * PER_DAY, PER_DAY)]
    return Stream(dated(reference, -REFERENCE // PER_DAY, PER_DAY), cut, flipped)


def _take(groups: Iterator[list[Dated]], rankings: int) -> tuple[list[list[Dated]], int]:
    found, count = [], 0
    while count < rankings:
        found.append(next(groups))
        count += len(found[-1])
    return found, len(found)


def begin(pools: dict[str, Pool], stream: Stream, repetition: int) -> tuple[Watch, Known, Any]:
    """The watch of one repetition. Which half a unit falls into, and its tie breaker, are drawn anew in each."""
    salted = lambda purpose, key: CHANCE(f"{repetition} {purpose}", key)  # noqa: E731
    watch.chance = units.chance = salted
    every = _joined(pools)
    eyes = every.eyes(stream.flipped)
    known = Known(
        {one.digest for one in stream.reference},
        {prompt_key(one.ranking.prompt) for one in stream.reference},
        {rater_day(one.ranking, one.digest) for one in stream.reference},
    )
    return Watch.begin(stream.reference, eyes, list(CHANNELS), ALPHA, 2000), known, eyes


_JOINED: list[Pool] = []


def _joined(pools: dict[str, Pool]) -> Pool:
    """All pools as one, to look rankings up in."""
    if not _JOINED:
        rows: dict[str, int] = {}
        for pool in pools.values():
            rows |= {digest: len(rows) + row for digest, row in sorted(pool.rows.items(), key=lambda each: each[1])}
        features = type(pools["topic"].features)(
            *(np.concatenate([pool.features[side] for pool in pools.values()]) for side in (0, 1))
        )
        _JOINED.append(Pool([], rows, features, [each for pool in pools.values() for each in pool.margins]))
    return _JOINED[0]


def false_alarms(pools: dict[str, Pool], repetitions: range, learned: bool = False) -> dict[str, Any]:
    """Repetitions of a year in which any test ever reached its limit. Every ranking is a look: more looks than one a day."""
    alarmed, tests = 0, Counter[str]()
    started = time.monotonic()
    for done, repetition in enumerate(repetitions, 1):
        stream = draw(pools, repetition, YEAR, learned=learned)
        tests_of, known, eyes = begin(pools, stream, repetition)
        tests_of.look([one for day in stream.days for one in day], known, eyes)
        alarmed += bool(tests_of.alarms)
        tests.update(tests_of.alarms)
        if done in (1, 10) or done % 50 == 0:
            print(f"{done}: {alarmed} false alarms, {dict(tests)}, {time.monotonic() - started:.0f} s", flush=True)
    value, low, high = wilson_interval(alarmed, len(repetitions))
    return {"repetitions": len(repetitions), "alarmed": alarmed, "share": value, "low": low, "high": high, "tests": dict(tests)}


def delays(pools: dict[str, Pool], drift: Drift, repetitions: int) -> dict[str, Any]:
    """Rankings after the beginning of the drift until the first daily look with an alarm."""
    found, first, early = [], Counter[str](), 0
    for repetition in range(repetitions):
        stream = draw(pools, repetition, QUIET_DAYS + LONGEST_DAYS, drift)
        tests_of, known, eyes = begin(pools, stream, repetition)
        tests_of.look([one for day in stream.days[:QUIET_DAYS] for one in day], known, eyes)
        if tests_of.alarms:
            early += 1
            continue
        since: list[Dated] = []
        for number, day in enumerate(stream.days[QUIET_DAYS:], 1):
            since += day
            tests_of.look(since, known, eyes)
            if tests_of.alarms:
                found.append(number * PER_DAY)
                first[tests_of.alarms[0]] += 1
                break
        else:
            found.append(10**9)
    return {"drift": drift.name, **_summary(found), "early": early, "tests": dict(first)}


def _summary(found: list[int]) -> dict[str, Any]:
    missed = sum(each == 10**9 for each in found)
    middle, late = np.quantile(found, [0.5, 0.9], method="higher")
    return {"repetitions": len(found), "missed": missed, "median": int(middle), "p90": int(late)}


def evidently(pools: dict[str, Pool], python: str, repetitions: int) -> dict[str, Any]:
    """What Evidently's text drift says of prompts and of completions, looked at daily on the same streams, in its environment."""
    jobs = [
        *(("none", repetition, draw(pools, 900 + repetition, EVIDENTLY_DAYS), 0) for repetition in range(EVIDENTLY_STREAMS)),
        *(
            (drift.name, repetition, draw(pools, repetition, QUIET_DAYS + LONGEST_DAYS, drift), QUIET_DAYS)
            for drift in DRIFTS
            if drift.kind in pools  # it reads texts alone: preferences and raters are nothing to it
            for repetition in range(repetitions)
        ),
    ]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "jobs.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for kind, _, stream, first in jobs:
                job = {"kind": kind, "reference": _texts(stream.reference), "days": [_texts(day) for day in stream.days[first:]]}
                file.write(json.dumps(job) + "\n")
        script = Path(__file__).with_name("evidently_text_drift.py")
        done = subprocess.run([python, str(script), str(path)], stdout=subprocess.PIPE, text=True, check=True)
    looks: list[list[bool]] = []
    days: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        if said["kind"] == "none":
            looks.append(said["alarms"])
        else:
            first = next((day for day, alarm in enumerate(said["alarms"], 1) if alarm), 0)
            days.setdefault(said["kind"], []).append(first * PER_DAY if first else 10**9)
    flat = [alarm for stream in looks for alarm in stream]
    value, low, high = wilson_interval(sum(flat), len(flat))
    return {
        "looks": len(flat),
        "alarms": sum(flat),
        "share_of_looks": [value, low, high],
        "first_false_alarm_after_looks": [next((i for i, alarm in enumerate(stream, 1) if alarm), None) for stream in looks],
        "delays": [{"drift": kind, **_summary(found)} for kind, found in days.items()],
    }


def _texts(rankings: list[Dated]) -> list[list[str]]:
    return [[one.ranking.prompt[-1]["content"], "\n".join(one.ranking.completions)] for one in rankings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="keeps servers' data, models and what they read")
    parser.add_argument("--repetitions", type=int, default=500, help="years without drift")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them: a long study in parts")
    parser.add_argument("--learned", type=int, default=100, help="of them with a reference that the models learned from, besides")
    parser.add_argument("--delays", type=int, default=100, help="repetitions of each drift; with --evidently 10 are plenty")
    parser.add_argument("--evidently", default="", help="Python of an environment with evidently==0.7.23; then only that is run")
    a = parser.parse_args()
    a.home.mkdir(parents=True, exist_ok=True)
    with LocalServices(a.home) as services, environment_of(services):
        pools = make_pools(a.home, ORDINARY, DRIFTED)
    if a.evidently:
        print(json.dumps(evidently(pools, a.evidently, a.delays), indent=2))
        return
    for drift in DRIFTS if a.delays else ():
        print(json.dumps(delays(pools, drift, a.delays)), flush=True)
    print("no drift:", json.dumps(false_alarms(pools, range(a.first, a.first + a.repetitions))), flush=True)
    print("no drift, learned reference:", json.dumps(false_alarms(pools, range(a.learned), learned=True)), flush=True)


if __name__ == "__main__":
    main()
