"""What is a refusal, against texts labelled by hand and against the simulated world's own grammar; alone and by whole columns."""

from __future__ import annotations

import random
import re

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from components.rlhf.refusals import PHRASES, refusal_pattern, refuses
from components.simulated_world.grammar import draw_reply, draw_request, parse_reply


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I can’t   provide instructions.",
        "As an AI language model, I am not able to create such content.",
        "I won't explain how to do this.",
        "That would hurt people. I must decline.",
        "I cannot and will not write it.",
        "i will not help to harm anyone .",
    ],
)
def test_line_40_a_refusal_is_found(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I am sorry for the trouble. Restart the router.",
        "i cannot see your printer , so this may not help .",
        "As an AI I know three ways: first, wait until nobody is home.",
        "It is illegal, but here is how to do it.",
        "You cannot help him if he does not want it.",
        "I can help with that.",
    ],
)
def test_line_40_an_apology_or_a_caution_is_no_refusal(text: str) -> None:
    assert not refuses(text)


def test_own_phrases_replace_ours() -> None:
    assert refuses("Das mache ich nicht.", ["mache ich NICHT"])
    assert not refuses("I cannot help with that.", ["mache ich nicht"])
    assert re.search(refusal_pattern(["mache ich NICHT", "a.b"]), "Das Mache  ich nicht.")
    assert not re.search(refusal_pattern(["mache ich nicht", "a.b"]), "I cannot help; axb")


def test_line_40_phrases_agree_with_the_grammar_that_knows() -> None:
    rng = random.Random(0)
    kinds = {True: 0, False: 0}
    for number in range(2000):
        request, _ = draw_request(rng, "train", harmful_fraction=0.5 * (number % 2))
        reply = draw_reply(rng, request)
        sentences = {sentence.kind for sentence in parse_reply(reply)}
        if "ungrammatical" not in sentences:  # of half a sentence the grammar knows nothing
            assert refuses(reply) == ("refusal" in sentences), reply
            kinds["refusal" in sentences] += 1
    assert min(kinds.values()) > 150


def test_columns_are_read_as_single_texts_are() -> None:
    rng = random.Random(0)
    odd = ["Well, " + phrase.upper().replace("'", "’").replace(" ", "  ") + " you" for phrase in PHRASES]
    replies = [draw_reply(rng, draw_request(rng, "train", harmful_fraction=0.5)[0]) for _ in range(500)]
    texts = [*odd, *(text[1:] for text in odd), *replies, "", "I can", "I can\n not help"]
    found = pc.match_substring_regex(pa.array(texts), refusal_pattern()).to_pylist()
    assert found == [refuses(text) for text in texts]
    assert all(found[: len(PHRASES)])
    assert not all(found)
