"""Bias, contradictions and cycles, by hand on a few rankings, and against slow loops on many."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import combinations
from typing import Any

import networkx
import pytest

from components.rlhf.records import Ranking
from tests.unit.components.validate_data.snapshots import CONFIG, INGEST, facts_of, good, ranking, user


def rank(number: int, order: str, rater: str = "ann", prompt: str = "p", **changes: Any) -> Ranking:
    """Completions by their letters in the order shown, "b a c: a > b > c"."""
    shown, _, ranked = order.partition(":")
    groups = [group.split("=") for group in ranked.replace(" ", "").split(">")]
    ranks = [next(place for place, group in enumerate(groups, 1) if text in group) for text in shown.split()]
    return ranking(number, completions=shown.split(), ranks=ranks, rater_id=rater, prompt=user(prompt), split="train", **changes)


def test_contradictions_are_counted_over_repeated_comparisons() -> None:
    """Of three comparisons made twice (good-fair, good-bad, fair-bad of question 1) two are turned round by another rater."""
    again = ranking(8, prompt=user("question 1"), ranks=[3, 1, 2], rater_id="rater-9")
    facts = facts_of([*good(), again])
    assert facts.whole["contradiction_fraction"] == pytest.approx(2 / 3)
    examples = facts.examples["contradiction_fraction"]
    assert len(examples) == 2
    assert all("r8 by rater-9" in example and "r1 by rater-1" in example and "'good' against " in example for example in examples)
    assert "self_contradiction_fraction" in facts.unknown


def test_the_order_in_which_completions_were_shown_does_not_matter_to_a_contradiction() -> None:
    agreeing = ranking(8, prompt=user("question 1"), completions=["bad", "fair", "good"], ranks=[3, 2, 1])
    assert facts_of([*good(), agreeing]).whole["contradiction_fraction"] == 0
    same_rater = ranking(8, prompt=user("question 1"), completions=["bad", "fair", "good"], ranks=[1, 2, 3], rater_id="rater-1")
    facts = facts_of([*good(), same_rater])
    assert facts.whole["contradiction_fraction"] == 1
    assert facts.estimates["self_contradiction_fraction"].value == 1
    assert facts.examples["self_contradiction_fraction"][0].count("by rater-1") == 2
    other_criterion = same_rater._replace(criterion="tone")
    assert "contradiction_fraction" in facts_of([*good(), other_criterion]).unknown


def test_of_raters_who_are_not_known_nothing_is_said() -> None:
    rankings = [rank(0, "a b: a > b", "unknown"), rank(1, "a b: b > a", "unknown"), rank(2, "b c: b > c", "unknown")]
    rankings += [rank(3, "c a: c > a", "unknown")]
    facts = facts_of(rankings)
    assert facts.whole["contradiction_fraction"] == 1, "somebody decided it both ways"
    of_raters = {"self_contradiction_fraction", "cycle_fraction", "agreement", "alpha", "human_ceiling", "largest_rater_fraction"}
    of_raters |= {"small_rater_fraction", "random_rater_fraction", "copying_fraction"}
    assert of_raters <= set(facts.unknown)
    assert not of_raters & set(facts.whole)
    assert not facts.pool.raters


@pytest.mark.parametrize(
    ("orders", "cycles"),
    [
        (["a b: a > b", "b c: b > c", "a c: c > a"], 1),
        (["a b: a > b", "b c: b > c", "a c: a > c"], 0),
        (["a b: a > b", "b c: b > c", "a c: a = c"], 0),  # a tie closes none
        (["a b c: a > b > c", "a c: c > a"], 0),  # a contradiction, which is counted as one
        (["a b c: a > b > c", "c d: c > d", "d a: d > a"], 1),
        (["a b: a > b", "a b: b > a"], None),  # two completions have no cycle to make
        (["a b c: a > b > c"], None),  # nor has one ranking
    ],
)
def test_cycles_in_the_orderings_of_a_rater(orders: list[str], cycles: int | None) -> None:
    facts = facts_of([rank(number, order) for number, order in enumerate(orders)])
    if cycles is None:
        assert "cycle_fraction" in facts.unknown
        return
    assert facts.estimates["cycle_fraction"].value == cycles
    assert bool(facts.examples["cycle_fraction"]) == bool(cycles)


def test_two_raters_make_no_cycle_together() -> None:
    rankings = [rank(0, "a b: a > b"), rank(1, "b c: b > c"), rank(2, "a c: c > a", "bob"), rank(3, "b c: b > c", "bob")]
    assert facts_of(rankings).estimates["cycle_fraction"].value == 0


def test_the_longer_and_the_first_shown_by_hand() -> None:
    rankings = [
        ranking(0, completions=["a", "bbb", "cc"], ranks=[3, 1, 2], prompt=user("p")),  # longer wins 3 of 3, first shown 0 of 2
        ranking(1, completions=["aaa", "b"], ranks=[2, 1], prompt=user("q")),  # 0 of 1, 0 of 1
        ranking(2, completions=["aa", "bb"], ranks=[1, 2], prompt=user("r")),  # equally long; 1 of 1
        ranking(3, completions=["aa", "b"], ranks=[1, 1], prompt=user("s")),  # a tie prefers nothing
    ]
    facts = facts_of(rankings)
    assert facts.estimates["length_bias"].value == pytest.approx(3 / 4)
    assert facts.estimates["position_bias"].value == pytest.approx(1 / 4)
    assert "refusal_bias" in facts.unknown
    ours = {rater.name: rater.shares["longer"].value for rater in facts.pool.raters}
    assert ours == {"rater-0": 1.0, "rater-1": 0.0}
    refusing = ranking(4, completions=["I cannot help with that.", "Sure."], ranks=[2, 1], prompt=user("t"))
    facts = facts_of([*rankings, refusing])
    assert facts.estimates["refusal_bias"].value == 0
    assert facts.whole["refusal_fraction"] == pytest.approx(1 / 11)


def pair(number: int, first_wins: bool, **changes: Any) -> Ranking:
    return ranking(number, completions=["aa", "bb"], ranks=[1, 2] if first_wins else [2, 1], **changes)


def test_position_is_not_known_where_the_better_one_always_stands_first() -> None:
    """Public sets of pairs store the chosen completion first: that is no rater's bias."""
    facts = facts_of([pair(i, True) for i in range(40)])
    assert "better completion first" in facts.unknown["position_bias"]
    assert not any("shown first" in flag for rater in facts.pool.raters for flag in rater.flags)
    mixed = [pair(i, True, source="public") for i in range(40)] + [pair(40 + i, i % 2 == 0, source="ours") for i in range(40)]
    assert facts_of(mixed).estimates["position_bias"].value == 0.5


def test_position_is_not_known_of_pairs_of_an_ingest_with_chosen_and_rejected() -> None:
    rankings = [pair(i, i != 3) for i in range(40)]  # one that somebody wrote the other way round
    for form in ("hh", "pairs"):
        facts = facts_of(rankings, {**INGEST, "files": [{"formats": {"rankloop": 1, form: 39}}]})
        assert "better completion first" in facts.unknown["position_bias"]
    facts = facts_of(rankings, {**INGEST, "files": [{"formats": {"rankloop": 40}}]})
    assert facts.estimates["position_bias"].value == pytest.approx(39 / 40)
    more = [*rankings, *(ranking(50 + i, completions=["a", "b", "c"], ranks=[2, 1, 3]) for i in range(4))]
    facts = facts_of(more, {**INGEST, "files": [{"formats": {"kway": 4, "hh": 40}}]})
    assert facts.estimates["position_bias"].value == 0.5, "of three completions the order is known: one of two each"


def test_position_bias_is_seen_where_there_is_one() -> None:
    facts = facts_of([pair(i, i % 5 != 0) for i in range(200)], config=CONFIG.model_copy(update={"max_position_bias": 0.1}))
    assert facts.estimates["position_bias"].value == 0.8
    assert facts.whole["position_bias"] == pytest.approx(facts.estimates["position_bias"].low - 0.5)
    assert all("prefers what is shown first" in rater.flags for rater in facts.pool.raters)
    assert facts.examples["position_bias"][0].startswith("rater-")


def test_everything_against_slow_loops() -> None:
    """400 rankings of 40 prompts by 6 raters, some of them tied, of 2 to 4 completions out of five."""
    rng = random.Random(0)
    rankings = []
    for number in range(400):
        texts = rng.sample(["a", "bb", "ccc", "dddd", "eeeee"], rng.randint(2, 4))
        ranks = [rng.randint(1, 2) for _ in texts] if rng.random() < 0.2 else rng.sample(range(1, len(texts) + 1), len(texts))
        if not {1} <= set(ranks):
            ranks = [1] * len(texts)
        prompt, rater = f"prompt {rng.randrange(40)}", f"rater-{rng.randrange(6)}"
        rankings.append(ranking(number, prompt=user(prompt), completions=texts, ranks=ranks, rater_id=rater, split="train"))
    facts = facts_of(rankings)

    pairs = ties = longer = strict = 0
    anybody, own, graphs = defaultdict(set), defaultdict(list), defaultdict(lambda: defaultdict(int))
    votes: dict[Any, list[tuple[str, int]]] = defaultdict(list)
    times: dict[Any, int] = defaultdict(int)
    for each in rankings:
        prompt = each.prompt[0]["content"]
        times[prompt, each.rater_id] += 1
        for i, j in combinations(range(len(each.ranks)), 2):
            pairs += 1
            one, other = sorted((i, j), key=lambda place: each.completions[place])
            key = (prompt, each.completions[one], each.completions[other])
            sign = (each.ranks[other] > each.ranks[one]) - (each.ranks[other] < each.ranks[one])
            graphs[prompt, each.rater_id][key[1:]] += sign
            if sign == 0:
                ties += 1
                continue
            strict += 1
            longer += sign < 0  # the texts grow with the alphabet
            anybody[key].add((each.ranking_id, sign))
            own[key, each.rater_id].append(sign)
            votes[key].append((each.rater_id, sign))
    assert facts.whole["tie_fraction"] == pytest.approx(ties / pairs)
    assert facts.estimates["length_bias"].value == pytest.approx(longer / strict)
    repeated = [signs for signs in anybody.values() if len(signs) > 1]
    assert facts.whole["contradiction_fraction"] == pytest.approx(
        sum(len({sign for _, sign in signs}) > 1 for signs in repeated) / len(repeated)
    )
    alone = [signs for signs in own.values() if len(signs) > 1]
    assert facts.estimates["self_contradiction_fraction"].value == pytest.approx(sum(len(set(s)) > 1 for s in alone) / len(alone))
    found = []
    for (prompt, rater), edges in graphs.items():
        graph = networkx.DiGraph()
        for (one, other), net in edges.items():
            graph.add_nodes_from((one, other))
            if net:
                graph.add_edge(*((one, other) if net > 0 else (other, one)))
        if times[prompt, rater] > 1 and len(graph) > 2:
            found.append(any(len(component) > 2 for component in networkx.strongly_connected_components(graph)))
    assert facts.estimates["cycle_fraction"].value == pytest.approx(sum(found) / len(found))
    assert 0 < sum(found) < len(found)
    agreed = [a[1] == b[1] for each in votes.values() for a, b in combinations(each, 2) if a[0] != b[0]]
    assert facts.estimates["agreement"].value == pytest.approx(sum(agreed) / len(agreed))
    pool = facts.pool
    for (i, one), (j, other) in combinations(enumerate(pool.compared), 2):
        both = [a[1] == b[1] for each in votes.values() for a, b in combinations(each, 2) if {a[0], b[0]} == {one, other}]
        assert pool.agreement[i][j] == pool.agreement[j][i] == pytest.approx(sum(both) / len(both))
