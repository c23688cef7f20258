"""Which held-out prompts are asked, and which text people liked."""

from __future__ import annotations

from components.evaluate.answers import choose_prompts, first_ranked
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


def test_text_ranked_first_is_of_every_rater_with_ties_and_in_the_order_of_the_prompts() -> None:
    rankings = [
        ranking("p")._replace(completions=["d", "b", "c"], ranks=[1, 1, 2]),
        ranking("q")._replace(completions=["x", "y"], ranks=[2, 1]),
        ranking("p", rater="bob")._replace(completions=["d", "b", "a"], ranks=[2, 3, 1]),
        ranking("not asked"),
    ]
    prompts = [rankings[1].prompt, rankings[0].prompt]
    assert first_ranked(rankings, prompts) == first_ranked(rankings[::-1], prompts) == [["y"], ["a", "b", "d"]]
