"""What is counted, and that it is counted once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components.detect_drift.units import (
    Dated,
    agreement_units,
    digest_of,
    disagreement,
    halves,
    rarity,
    rater_counts,
    rater_units,
    sample,
    text_units,
)
from components.rlhf.records import Ranking, prompt_key


def ranking(prompt: str, rater: str = "r1", at: str | None = "2026-01-01T10:00:00Z", ranks: Any = (1, 2), **fields: Any) -> Dated:
    values: dict[str, Any] = {
        "ranking_id": "x",
        "prompt": [{"role": "user", "content": prompt}],
        "completions": ["a", "b", "c", "d"][: len(ranks)],
        "ranks": list(ranks),
        "rater_id": rater,
        "source": "test",
        "collected_at": at,
        "confidence": None,
        "policies": None,
        "criterion": None,
        "split": "train",
    }
    made = Ranking(**{**values, **fields})
    return Dated(digest_of(made), made)


def key(text: str) -> str:
    return prompt_key([{"role": "user", "content": text}])


def test_a_prompt_is_one_unit_with_its_first_ranking_and_known_ones_are_none() -> None:
    late = ranking("p", "r1", "2026-01-02T00:00:00Z")
    early = ranking("p", "r2", "2026-01-01T00:00:00Z")
    other = ranking("q", "r1", "2026-01-01T12:00:00Z")
    units = text_units([late, other, early, ranking("old")], {key("old")})
    assert [(unit.key, unit.dated) for unit in units] == [(key("p"), early), (key("q"), other)]


def test_the_split_is_no_part_of_the_digest_and_everything_else_is() -> None:
    one = ranking("p")
    assert ranking("p", split="test").digest == one.digest
    assert len({one.digest, ranking("p", "r2").digest, ranking("p", ranks=(2, 1)).digest, ranking("p", at=None).digest}) == 4


def test_a_rater_is_one_unit_a_day_and_without_time_each_ranking_is_one() -> None:
    day = [ranking(f"p{i}", "r1", f"2026-01-01T0{i}:00:00Z") for i in range(3)]
    units = rater_units([*day, ranking("p9", "r1", "2026-01-02T00:00:00Z"), ranking("p8", "r2", "2026-01-01T05:00:00Z")])
    assert [(u.dated.ranking.rater_id, u.dated.order[0][:10]) for u in units] == [
        ("r1", "2026-01-01"),
        ("r2", "2026-01-01"),
        ("r1", "2026-01-02"),
    ]
    assert units[0].dated == day[0]
    assert len(rater_units([ranking(f"p{i}", "r1", None) for i in range(3)])) == 3
    assert not rater_units(day, {units[0].key, units[1].key})
    assert rater_counts(units) == {"r1": 2, "r2": 1}


def test_agreement_takes_the_first_two_raters_of_a_prompt() -> None:
    a = ranking("p", "r1", "2026-01-01T00:00:00Z", (1, 2, 3))
    b = ranking("p", "r1", "2026-01-02T00:00:00Z", (3, 2, 1))  # the same rater once more is no second opinion
    c = ranking("p", "r2", "2026-01-03T00:00:00Z", (2, 1, 3))
    (unit,) = agreement_units([c, b, a, ranking("q")])
    assert unit.dated == c
    assert unit.disagreement == pytest.approx(1 / 3)
    assert agreement_units([a, b]) == []
    assert agreement_units([a, c], {key("p")}) == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((1, 2, 3), (1, 2, 3), 0.0), ((1, 2, 3), (3, 2, 1), 1.0), ((1, 1, 2), (1, 2, 2), 0.0), ((1, 1), (1, 2), math.nan)],
)
def test_disagreement_by_hand(one: tuple[int, ...], other: tuple[int, ...], expected: float) -> None:
    found = disagreement(ranking("p", ranks=one).ranking, ranking("p", ranks=other).ranking)
    assert found == pytest.approx(expected, nan_ok=True)


def test_disagreement_matches_completions_by_their_text_not_by_their_place() -> None:
    one = ranking("p", ranks=(1, 2)).ranking
    assert disagreement(one, one._replace(completions=["b", "a"], ranks=[2, 1])) == 0.0
    assert math.isnan(disagreement(one, one._replace(completions=["x", "y"])))


def test_an_unknown_rater_is_the_rarest() -> None:
    counts = {"often": 90, "seldom": 10}
    assert rarity("often", counts) < rarity("seldom", counts) < rarity("nobody", counts) < math.inf


def test_halves_and_samples_depend_on_keys_alone() -> None:
    keys = [f"k{i}" for i in range(400)]
    teaching, bagged = halves(keys)
    assert sorted([*teaching, *bagged]) == list(range(400))
    assert 150 < len(teaching) < 250
    units = text_units([ranking(f"p{i}") for i in range(50)])
    chosen = sample(units, 20)
    assert {unit.key for unit in chosen} == {unit.key for unit in sample(units[::-1], 20)}
    assert {unit.key for unit in sample(units, 10)} < {unit.key for unit in chosen}, "a smaller sample is part of a larger one"
