"""Rankings for the simulation of drift: a pool of ordinary ones and one of each drift, read once by the champion's models.

The pools are made by the simulated world's grammar and, for the new topic, by one about cooking that shares no noun with it. The
models are those of the profile `tiny` with 64 hidden units instead of 160, trained on other rankings than these.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.detect_drift.channels import Eyes
from components.detect_drift.features import Judgement, TextFeatures, judge, text_features
from components.detect_drift.units import Dated, digest_of
from components.rlhf.models import load_policy, load_scorer
from components.rlhf.records import Ranking, iterate_snapshot, prompt_key
from components.services.launch import Context
from components.services.storage import Storage
from components.simulated_world.generate import simulate_rankings, write_rankings
from pipelines.profile import load
from tests.benchmarks.methods import run_stage

TEST_FRACTION = 0.15
SMALLER = ["train_sft.hidden=64", "train_sft.heads=2", "train_sft.threads=1", "train_reward_model.threads=1"]
LEARNED = 3000  # rankings that the models learned from
FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)
DISHES = "bread soup omelette lasagne risotto pancakes goulash curry dumplings stew pie salad".split()
INGREDIENTS = "flour butter garlic onions yeast basil lemon mushrooms lentils cream pepper honey".split()
ASKED = (
    "how long do i bake",
    "what goes well with",
    "can i freeze",
    "how much salt needs",
    "why is it so dry , my",
    "how do i thicken",
)
ADVICE = ("knead it gently", "let it rest overnight", "simmer it slowly", "roast it twice", "season it late", "whisk it firmly")
EXTRAS = (
    "it was fine before i moved it to another room .",
    "i have tried everything that my friend told me .",
    "the same thing happened to my neighbour two weeks ago .",
    "please answer in full , because i do not know much about these things .",
    "i bought it in your shop and i still have the bill .",
    "i have already cleaned it and waited for a whole day .",
)


class Pool(NamedTuple):
    """Prompts with their one or two rankings, in groups, and what the models see in each ranking, by its digest."""

    groups: list[list[Dated]]
    rows: dict[str, int]
    features: TextFeatures
    margins: list[list[float]]

    def eyes(self, flipped: frozenset[str] | set[str] = frozenset()) -> Eyes:
        """Eyes that look rankings up. A ranking that was turned round has the margins of the other sign."""

        def read(rankings: Sequence[Ranking]) -> TextFeatures:
            rows = [self.rows[each.ranking_id] for each in rankings]
            return TextFeatures(self.features.prompts_ND[rows], self.features.completions_ND[rows])

        def judged(rankings: Sequence[Ranking]) -> list[Judgement]:
            return [
                Judgement([(-1 if each.ranking_id in flipped else 1) * m for m in self.margins[self.rows[each.ranking_id]]])
                for each in rankings
            ]

        return Eyes(read, judged)


def cooking(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rankings about another topic, by the same raters."""
    rng = random.Random(f"cooking-{seed}")
    for number in range(count):
        dish, ingredient = rng.choice(DISHES), rng.choice(INGREDIENTS)
        text = f"{rng.choice(ASKED)} {dish} with {rng.randrange(2, 900)} grams of {ingredient} ?"
        completions = [f"{advice} , then add {rng.choice(INGREDIENTS)} to the {dish} ." for advice in rng.sample(ADVICE, 4)]
        yield {
            "prompt": [{"role": "user", "content": text}],
            "completions": completions,
            "ranks": rng.sample(range(1, 5), 4),
            "rater_id": f"rater-{number % 12 + 1:02d}",
            "split": "test" if rng.random() < TEST_FRACTION else "train",
        }


def longer(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Ordinary requests with two more sentences."""
    rng = random.Random(f"longer-{seed}")
    for record in simulate_rankings(count, seed):
        request = record["prompt"][0]["content"]
        yield {**record, "prompt": [{"role": "user", "content": " ".join([request, *rng.sample(EXTRAS, 2)])}]}


def make_pools(home: Path, ordinary: int, drifted: int) -> dict[str, Pool]:
    """Trains the models and reads the pools; the arrays are kept in `home`."""
    sources: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "ordinary": lambda: simulate_rankings(ordinary, 1001),
        "topic": lambda: cooking(drifted, 1),
        "longer": lambda: longer(drifted, 1002),
        "learned": lambda: iter(()),
    }
    profile = load("tiny", SMALLER, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rankings(folder / "rankings.jsonl.gz", LEARNED, 0)
        snapshot = run_stage(
            "ingest_rankings", profile.stages["ingest_rankings"], {"rankings": str(folder / "rankings.jsonl.gz")}
        ).snapshot_uri
        sft = run_stage("train_sft", profile.stages["train_sft"], {"snapshot_uri": snapshot}).policy_uri
        scorers = run_stage(
            "train_reward_model", profile.stages["train_reward_model"], {"snapshot_uri": snapshot, "policy_uri": sft}
        )
        for kind, uri in (("snapshot", snapshot), ("sft", sft), ("reward", scorers.reward_model_uri)):
            Storage().fetch_folder(uri, folder / kind)
        pools = {}
        for kind, source in sources.items():
            rankings = [_ranking(record) for record in source()]
            if kind == "learned":  # what the models learned from, as a reference
                rankings = [each._replace(ranking_id=digest_of(each)) for each in iterate_snapshot(folder / "snapshot")]
            pools[kind] = _read(rankings, folder, home / f"pool-{kind}-{len(rankings)}.npz")
    return pools


def _ranking(record: dict[str, Any]) -> Ranking:
    empty = dict.fromkeys(Ranking._fields)
    ranking = Ranking(**{**empty, "ranking_id": "", "source": "simulated", **record})
    return ranking._replace(ranking_id=digest_of(ranking))


def _read(rankings: list[Ranking], folder: Path, kept: Path) -> Pool:
    if not kept.exists():
        context = _Quiet()
        features = text_features(context, *load_policy(folder / "sft"), rankings, 16384)
        margins = [each.margins for each in judge(*load_scorer(folder / "reward"), rankings, 16384)]
        flat = np.array([m for each in margins for m in each])
        np.savez(kept, p=features.prompts_ND, c=features.completions_ND, m=flat, sizes=np.array([len(each) for each in margins]))
    found = np.load(kept)
    parts = np.split(found["m"], np.cumsum(found["sizes"])[:-1])
    groups: dict[str, list[Dated]] = {}
    for ranking in rankings:
        groups.setdefault(prompt_key(ranking.prompt), []).append(Dated(ranking.ranking_id, ranking))
    rows = {ranking.ranking_id: row for row, ranking in enumerate(rankings)}
    return Pool(list(groups.values()), rows, TextFeatures(found["p"], found["c"]), [each.tolist() for each in parts])


class _Quiet(Context):
    """Reading shows its progress through a context; this one shows nothing."""

    def __init__(self) -> None:
        from components.services.progress import Progress

        self.progress = Progress("drift")


def dated(groups: Sequence[Sequence[Dated]], first_day: int, per_day: int) -> list[Dated]:
    """The rankings of the groups in this order, so many a day; a group is not divided by time."""
    found = []
    for number, each in enumerate(one for group in groups for one in group):
        moment = FIRST_DAY + timedelta(days=first_day + number // per_day, seconds=60 * (number % per_day))
        found.append(each._replace(ranking=each.ranking._replace(collected_at=moment.strftime("%Y-%m-%dT%H:%M:%SZ"))))
    return found
