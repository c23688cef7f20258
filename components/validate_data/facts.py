"""Numbers about a snapshot: one flat row per ranking, and one row about the whole. What the expectations look at.

The snapshot is read as a stream; of each ranking a dozen numbers are kept, and of each compared pair of completions 32 bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from components.rlhf.records import ROLES, Ranking, prompt_key


class Facts(NamedTuple):
    """What is known of a snapshot.

    Fields:
        rankings: a dict per ranking, with `ranking_id` and `rater_id` to find it again.
        whole: shares and counts of the snapshot; a share without anything to divide by is 0.
        contradictions: examples, each with prompt, raters and the two completions.
    """

    rankings: list[dict[str, Any]]
    whole: dict[str, float]
    contradictions: list[str]


def is_ranking(ranks: list[int], completions: int) -> bool:
    """Whether ranks order the completions: one each, from 1, ties equal, dense ("1, 1, 2") or competition style ("1, 1, 3")."""
    if len(ranks) != completions or not ranks or any(rank is None for rank in ranks):
        return False
    distinct = sorted(set(ranks))
    dense = list(range(1, len(distinct) + 1))
    competition = [1 + sum(other < rank for other in ranks) for rank in distinct]
    return distinct in (dense, competition)


def collect(rankings: Iterable[Ranking], ingest: Mapping[str, Any]) -> Facts:
    """Reads every ranking once.

    A contradiction is a comparison of the same two completions of the same prompt, under the same criterion, that two rankings
    decide in opposite ways; its share is over all comparisons that were made at least twice and not tied.

    Args:
        ingest: the ingest report, for the share of rows in quarantine.
    """
    rows: list[dict[str, Any]] = []
    splits: dict[str, set[str]] = defaultdict(set)
    verdicts: dict[bytes, Counter[int]] = defaultdict(Counter)
    examples: dict[bytes, str] = {}
    raters: Counter[str] = Counter()
    pairs = ties = 0
    for ranking in rankings:
        key = prompt_key(ranking.prompt)
        splits[key].add(ranking.split)
        raters[ranking.rater_id] += 1
        rows.append(_row(ranking, key))
        if rows[-1]["ranks_valid"]:
            for i, j in combinations(range(len(ranking.completions)), 2):
                pairs += 1
                ties += ranking.ranks[i] == ranking.ranks[j]
                _compare(ranking, key, i, j, verdicts, examples)
    for row in rows:
        row["prompt_splits"] = len(splits[row.pop("prompt_key")])
    repeated = {pair: votes for pair, votes in verdicts.items() if votes.total() > 1}
    against = {pair for pair, votes in repeated.items() if len(votes) > 1}
    read = int(ingest["read"])
    whole = {
        "rankings": float(len(rows)),
        "test_rankings": float(sum(row["split"] == "test" for row in rows)),
        "prompts": float(len(splits)),
        "raters": float(len(raters)),
        "largest_rater_fraction": max(raters.values(), default=0) / max(1, len(rows)),
        "quarantined_fraction": int(ingest["quarantined"]) / read if read else 1.0,
        "tie_fraction": ties / pairs if pairs else 0.0,
        "repeated_comparisons": float(len(repeated)),
        "contradiction_fraction": len(against) / len(repeated) if repeated else 0.0,
    }
    return Facts(rows, whole, [examples[pair] for pair in list(against)[:5]])


def _row(ranking: Ranking, key: str) -> dict[str, Any]:
    lengths = [len((text or "").strip()) for text in ranking.completions]
    contents = [(message["content"] or "").strip() for message in ranking.prompt]
    return {
        "ranking_id": ranking.ranking_id,
        "rater_id": ranking.rater_id,
        "split": ranking.split,
        "prompt_key": key,
        "completions": len(ranking.completions),
        "ranks_valid": int(is_ranking(ranking.ranks, len(ranking.completions))),
        "shortest_completion_characters": min(lengths, default=0),
        "longest_completion_characters": max(lengths, default=0),
        "identical_completions": len(ranking.completions) - len(set(ranking.completions)),
        "shortest_message_characters": min((len(text) for text in contents), default=0),
        "prompt_characters": sum(len(text) for text in contents),
        "prompt_is_chat": int(
            all(message["role"] in ROLES for message in ranking.prompt) and ranking.prompt[-1]["role"] == "user"
            if ranking.prompt
            else False
        ),
    }


def _compare(ranking: Ranking, key: str, i: int, j: int, verdicts: dict[bytes, Counter[int]], examples: dict[bytes, str]) -> None:
    """Counts one strict preference under a name of the pair that does not depend on the order in which it was shown."""
    if ranking.ranks[i] == ranking.ranks[j]:
        return
    one, other = ranking.completions[i], ranking.completions[j]
    first_wins = ranking.ranks[i] < ranking.ranks[j]
    if one > other:
        one, other, first_wins = other, one, not first_wins
    name = hashlib.sha256("\0".join((key, ranking.criterion or "", one, other)).encode("utf-8", "surrogatepass")).digest()
    votes = verdicts[name]
    if votes and first_wins not in votes:
        examples[name] = f"{ranking.ranking_id} by {ranking.rater_id}: {_short(one)} against {_short(other)}"
    votes[int(first_wins)] += 1


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
