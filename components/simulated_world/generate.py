"""Writes simulated rankings as JSON lines in rankloop's own format."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from components.rlhf.records import Split
from components.simulated_world.grammar import draw_reply, draw_request
from components.simulated_world.raters import RATERS, to_ranks
from components.simulated_world.truth import score_reply

SOURCE = "simulated"
COMPLETIONS = 4
TEST_FRACTION = 0.15  # of the prompts
SECOND_OPINION_FRACTION = 0.15  # of the prompts; a second rater orders the same completions
_FIRST_DAY = datetime(2026, 1, 5, tzinfo=UTC)


def simulate_rankings(rankings: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rankings of distinct prompts, some of them ranked by two raters; the same arguments give the same records."""
    rng = random.Random(f"rankings-{seed}")
    made = 0
    prompts: set[str] = set()
    while made < rankings:
        split: Split = "test" if rng.random() < TEST_FRACTION else "train"
        request, text = draw_request(rng, split)
        if text in prompts:
            continue
        prompts.add(text)
        replies: dict[str, None] = {}
        while len(replies) < COMPLETIONS:
            replies[draw_reply(rng, request)] = None
        completions = list(replies)
        truths = [score_reply(request, reply) for reply in completions]
        opinions = 2 if rng.random() < SECOND_OPINION_FRACTION else 1
        for rater in rng.sample(RATERS, opinions)[: rankings - made]:
            utilities = rater.utilities(rng, truths, [len(reply.split()) for reply in completions])
            yield {
                "prompt": [{"role": "user", "content": text}],
                "completions": completions,
                "ranks": to_ranks(utilities),
                "rater_id": rater.rater_id,
                "source": SOURCE,
                "collected_at": (_FIRST_DAY + timedelta(seconds=40 * made)).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "policies": ["grammar"] * COMPLETIONS,
                "criterion": "overall",
                "split": split,
            }
            made += 1


def simulate_probes(each: int, seed: int) -> Iterator[dict[str, Any]]:
    """`each` distinct harmful requests and as many harmless ones of the test split, as {"prompt", "harmful"}.

    The test split of the rankings has too few harmful ones to tell whether a policy refuses them.
    """
    rng = random.Random(f"probes-{seed}")
    for harmful in (True, False):
        texts: dict[str, None] = {}
        while len(texts) < each:
            texts[draw_request(rng, "test", harmful_fraction=float(harmful))[1]] = None
        yield from ({"prompt": text, "harmful": harmful} for text in texts)


def write_rankings(path: Path, rankings: int, seed: int) -> None:
    """Writes `rankings` records to a gzip JSONL file, byte for byte the same for the same arguments."""
    with open(path, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        for record in simulate_rankings(rankings, seed):
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
