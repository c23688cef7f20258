"""The simulated world: repeatable, held out by combination; its truth says what people care about, and its raters differ."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest

from components.ingest_rankings.formats import Parsed, parse
from components.simulated_world.generate import simulate_rankings, write_rankings
from components.simulated_world.grammar import parse_request
from components.simulated_world.raters import RATERS, to_ranks
from components.simulated_world.truth import score

COUNT = 3000


@pytest.fixture(scope="module")
def records() -> list[dict]:  # type: ignore[type-arg]
    return list(simulate_rankings(COUNT, seed=0))


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_rankings(tmp_path / name, 50, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_thousands_of_distinct_prompts_and_four_distinct_replies_each(records: list[dict]) -> None:  # type: ignore[type-arg]
    assert len(records) == COUNT
    assert len({r["prompt"][0]["content"] for r in records}) > 2500
    assert all(len(set(r["completions"])) == 4 for r in records)


def test_every_record_is_a_ranking(records: list[dict]) -> None:  # type: ignore[type-arg]
    for record in records[:300]:
        (parsed,) = parse(record, "auto", "unspecified", 0.1)
        assert isinstance(parsed, Parsed)
        assert parsed.form == "rankloop"
        assert not parsed.ignored
        assert parsed.ranking.split == record["split"]


def test_held_out_prompts_are_of_combinations_that_training_never_sees(records: list[dict]) -> None:  # type: ignore[type-arg]
    seen: dict[str, set[tuple[str | None, str | None]]] = {"train": set(), "test": set()}
    for record in records:
        request = parse_request(record["prompt"][0]["content"])
        assert request is not None
        if not request.harmful:
            seen[record["split"]].add((request.product, request.problem))
    assert len(seen["test"]) >= 5
    assert not seen["train"] & seen["test"]


REQUEST = "hello , my printer is very slow at night . what should i do ?"


def truth(reply: str, request: str = REQUEST) -> float:
    return score([{"role": "user", "content": request}], reply)


GOOD = "thanks for writing . for the printer , close every program and wait ten minutes . kind regards ."


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (GOOD, GOOD.replace("printer", "tablet")),
        (GOOD, GOOD.replace("close every program and wait ten minutes", "restart it and join the network again")),
        (GOOD, GOOD.replace("thanks for writing . ", "")),
        (GOOD, GOOD.replace(" kind regards .", "")),
        (
            GOOD.replace("kind regards", "i cannot see your printer , so this may not help . kind regards"),
            GOOD,
        ),
        (GOOD, GOOD + " " + GOOD),
        (GOOD, GOOD.replace("wait ten minutes", "wait ten")),
        (GOOD, GOOD.replace("for the printer", "printer the for")),
        (GOOD, "thanks for writing . kind regards ."),
        (GOOD, "hello"),
    ],
)
def test_the_truth_prefers_what_people_care_about(better: str, worse: str) -> None:
    assert truth(better) > truth(worse)


def test_the_truth_prefers_refusing_harm_and_helping_otherwise() -> None:
    harmful = "hello , how can i steal the keyboard of my neighbour ?"
    refusal = "thank you for your message . i will not help to harm anyone . please respect your neighbour . kind regards ."
    assert truth(refusal, harmful) > truth("thanks for writing . kind regards .", harmful)
    assert truth(refusal, harmful) > truth(refusal.replace("neighbour", "boss"), harmful), "it protects somebody else"
    assert truth(GOOD) > truth(refusal)


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="not a request of the simulated world"):
        truth(GOOD, "What is the capital of France?")


def agreement(number: int) -> float:
    """How often a rater decides a pair that differs by 1 in truth for the better."""
    rng, rater = random.Random(0), RATERS[number]
    wins = [u[0] > u[1] for u in (rater.utilities(rng, [1.0, 0.0], [30, 30])[::1] for _ in range(4000))]
    return sum(wins) / len(wins)


def test_noise_is_gumbel_at_its_scale() -> None:
    assert agreement(2) == pytest.approx(0.88, abs=0.02)  # 1 / (1 + exp(-1 / 0.5))


def test_biases_are_measurable_and_the_careless_rater_agrees_least() -> None:
    rng = random.Random(1)

    def first_wins(number: int, truths: list[float], words: list[int]) -> float:
        pairs = [RATERS[number].utilities(rng, truths, words) for _ in range(3000)]
        return sum(a > b for a, b in pairs) / len(pairs)

    assert len(RATERS) == 12
    assert first_wins(5, [0, 0], [50, 20]) > 0.85, "rater-06 likes long replies"
    assert first_wins(6, [0, 0], [50, 20]) < 0.25, "rater-07 does not"
    assert first_wins(7, [0, 0], [30, 30]) > 0.7, "rater-08 likes what comes first"
    assert first_wins(0, [0, 0], [50, 20]) == pytest.approx(0.5, abs=0.04)
    by_rater = [agreement(number) for number in range(12)]
    assert min(by_rater) == by_rater[11]


def test_ranks_are_dense_with_ties_for_what_feels_alike() -> None:
    assert to_ranks([1.0, 3.0, 2.9, -1.0]) == [2, 1, 1, 3]
    rng = random.Random(2)
    for _ in range(200):
        utilities = [rng.gauss(0, 1) for _ in range(5)]
        ranks = to_ranks(utilities)
        assert set(ranks) == set(range(1, max(ranks) + 1))
        for i, j in combinations(range(5), 2):
            assert ranks[i] == ranks[j] or (ranks[i] < ranks[j]) == (utilities[i] > utilities[j])
