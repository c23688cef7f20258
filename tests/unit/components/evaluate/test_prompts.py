"""Which held-out prompts are asked."""

from __future__ import annotations

from components.evaluate.answers import choose_prompts
from components.rlhf.records import Ranking


def ranking(text: str, source: str = "desk", rater: str = "ann") -> Ranking:
    prompt = [{"role": "user", "content": text}]
    return Ranking(f"{text}-{rater}", prompt, ["a", "b"], [1, 2], rater, source, None, None, None, None, "test")


RANKINGS = [ranking(f"prompt {number}") for number in range(200)]


def texts(rankings: list[Ranking], count: int, seed: int = 0) -> list[str]:
    return [prompt[0]["content"] for prompt in choose_prompts(rankings, count, seed)[0]]


def test_prompts_are_distinct_and_sources_are_all_seen() -> None:
    twice = [*RANKINGS[:3], *(ranking(f"prompt {number}", "simulated", "bob") for number in range(3))]
    prompts, sources = choose_prompts(twice, 10, 0)
    assert sorted(prompt[0]["content"] for prompt in prompts) == ["prompt 0", "prompt 1", "prompt 2"]
    assert sources == {"desk", "simulated"}
    assert choose_prompts([], 10, 0) == ([], set())


def test_choice_depends_on_seed_and_content_and_not_on_order() -> None:
    assert texts(RANKINGS, 50) == texts(RANKINGS[::-1], 50)
    assert texts(RANKINGS, 50)[:20] == texts(RANKINGS, 20)
    assert texts(RANKINGS, 50) != texts(RANKINGS, 50, seed=1)


def test_a_snapshot_that_grew_keeps_most_prompts() -> None:
    grown = [*RANKINGS, *(ranking(f"new {number}") for number in range(20))]
    assert len(set(texts(RANKINGS, 100)) & set(texts(grown, 100))) >= 80
