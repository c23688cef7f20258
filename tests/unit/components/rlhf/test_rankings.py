"""Rankings as token ids, divided by prompt, in batches of whole rankings."""

from __future__ import annotations

from typing import Any

import pytest

from components.rlhf.rankings import encode_rankings, pack, split_for_judge
from components.rlhf.records import Message, Ranking
from components.rlhf.scratch_model import train_tokenizer
from components.services.exits import DoNotRetry
from components.simulated_world.generate import simulate_rankings


def rankings(count: int) -> list[Ranking]:
    empty = {"confidence": None}
    return [Ranking(**{**empty, **r, "ranking_id": str(i)}) for i, r in enumerate(simulate_rankings(count, seed=0))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for r in rankings(60) for text in (r.prompt[0]["content"], *r.completions)], 400, 128)


def test_line_05_no_prompt_teaches_both_models(tokenizer: Any) -> None:
    encoded = encode_rankings(tokenizer, rankings(300), 128).rankings
    reward, judge = split_for_judge(encoded, 0.3)
    keys = [{each.ranking.prompt[0]["content"] for each in side} for side in (reward, judge)]
    assert not keys[0] & keys[1]
    assert len(reward) + len(judge) == len(encoded)
    assert len(judge) / len(encoded) == pytest.approx(0.3, abs=0.08)


def test_a_single_prompt_cannot_teach_two_models(tokenizer: Any) -> None:
    with pytest.raises(DoNotRetry, match="do not suffice"):
        split_for_judge(encode_rankings(tokenizer, rankings(1), 128).rankings, 0.5)


def test_line_04_all_completions_of_a_ranking_follow_the_same_prompt_and_none_is_cut(tokenizer: Any) -> None:
    long = rankings(1)[0]
    turns = [Message(role=role, content="my printer is slow .") for role in ("user", "assistant") * 4]
    long = long._replace(prompt=[*turns, *long.prompt])
    whole = encode_rankings(tokenizer, [long], 100_000).rankings[0]
    limit = whole.row_tokens - 10
    found = encode_rankings(tokenizer, [long], limit)
    assert (found.left_out, found.cut_prompts) == (0, 1)
    cut = found.rankings[0]
    assert all(prompt == cut.prompts[0] for prompt in cut.prompts)
    assert cut.completions == whole.completions
    assert cut.row_tokens <= limit
    assert encode_rankings(tokenizer, [long], max(map(len, whole.completions)) + 1).left_out == 1


def test_packs_hold_every_ranking_once_and_whole(tokenizer: Any) -> None:
    encoded = encode_rankings(tokenizer, rankings(40), 128).rankings
    encoded = [each._replace(joined=number % 3 == 0) for number, each in enumerate(encoded)]
    packs = pack(encoded, 1000)
    assert sorted(id(each) for group in packs for each in group) == sorted(map(id, encoded))
    for group in packs:
        assert len({each.joined for each in group}) == 1
        longest = max(each.row_tokens for each in group)
        assert len(group) == 1 or sum(1 if each.joined else 4 for each in group) * longest <= 1000


def test_line_03_every_completion_of_a_ranking_ends_with_eos(tokenizer: Any) -> None:
    for each in encode_rankings(tokenizer, rankings(5), 128).rankings:
        assert [ids.index(tokenizer.eos_token_id) for ids in each.completions] == [len(ids) - 1 for ids in each.completions]
