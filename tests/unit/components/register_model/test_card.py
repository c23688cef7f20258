"""The model card: what it says, and that nothing which comes from data is more than text in it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from components.register_model.card import DESCRIPTION_CHARACTERS, description, escape, model_card
from components.register_model.lineage import Artifact
from components.rlhf.gate import decide

HOSTILE = "](javascript:alert(1)) <img src=x onerror=alert(1)> | **x** `y` \n# heading ![i](http://e.invalid/i.png) www.e.invalid"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_markdown = MarkdownIt("js-default", {"html": True, "linkify": False}).enable("table")


def card(texts: dict[str, str] | None = None, source: str = "desk", **marker: Any) -> str:
    snapshot = {
        "rankings": 30,
        "prompts": 20,
        "raters": 3,
        "pairs": 60,
        "splits": {"train": 25, "test": 5},
        "sources": {source: 30},
    }
    scorer = {"rankings": 15, "accuracy": {"value": 0.75, "low": 0.7, "high": 0.8}}
    lineage = {
        "snapshot": Artifact("snapshot", "s3://b/rankings/5a", "a" * 64, {**snapshot, "sources": {source: 30}}),
        "sft": Artifact("sft", "s3://b/policies/5f", "b" * 64, {"config": {"base_model": source}, **marker}),
        "reward_model": Artifact("reward_model", "s3://b/reward", "c" * 64, scorer),
        "policy": Artifact("policy", "s3://b/policies/60", "", {"stage": "ppo_finetune"}),
    }
    measures: dict[str, Any] = {
        "win_rate_over_sft": {"value": 0.8, "low": 0.7, "high": 0.9},
        "kl_reference": {"value": 3.0, "low": None, "high": None},
    }
    rows, gate = decide(measures, {"min_win_rate_over_sft": 0.5, "max_kl_reference": 2.0})
    return model_card("support", lineage, {"measures": measures, "simulated": False}, rows, gate, texts or {})


def shown(markdown: str) -> list[tuple[str, str]]:
    """(kind, content) of everything in a text that is more or less than a paragraph."""
    found = []
    for token in _markdown.parse(markdown):
        found += [(token.type, token.content)] + [(child.type, child.content) for child in token.children or ()]
    return found


def test_it_tells_base_model_data_gate_measures_and_lineage() -> None:
    text = card({"intended_use": "Answers **support** requests.", "licence": "Apache-2.0"})
    for said in (
        "Gate: **fail**",
        "Answers **support** requests.",
        "Apache-2.0",
        "## Base model\n\ndesk",
        "- 30 rankings, 20 prompts, 3 raters, 60 pairs",
        "- splits: 5 test, 25 train",
        "- reward model: 15 rankings, accuracy 0\\.75 \\(0\\.7 to 0\\.8\\)",
        "| win\\_rate\\_over\\_sft | 0\\.8 \\(0\\.7 to 0\\.9\\) | low \\> 0\\.5 | pass |",
        "| kl\\_reference | 3 | value \\<\\= 2 | fail |",
        "| policy | s3\\:\\/\\/b\\/policies\\/60 | unknown | ppo\\_finetune |",
    ):
        assert said in text
    assert "Not stated (`register_model.licence`)" in card()
    assert "trained from scratch" in card(source="")


@given(st.text(st.characters() | st.sampled_from(PUNCTUATION)))
def test_escaped_text_shows_just_itself_wherever_it_stands(text: str) -> None:
    for place in ("{}", "a {}", "- {}", "**{}**"):
        tokens = _markdown.parse(place.format("x" + escape(text) + "x"))
        inline = next(token for token in tokens if token.type == "inline")
        assert {child.type for child in inline.children or ()} <= {"text", "text_special", "strong_open", "strong_close"}
        seen = "".join(child.content for child in inline.children or ())
        assert visible(seen).removeprefix("a" if place == "a {}" else "") == f"x{visible(text)}x"


def visible(text: str) -> str:
    return "".join(
        each for each in text if not each.isspace() and unicodedata.category(each) != "Cc" and each not in "\u2028\u2029"
    )


def test_names_from_data_make_no_link_image_html_heading_or_column() -> None:
    hostile, harmless = (
        Counter(kind for kind, _ in shown(card(source=source)) if not kind.startswith("text")) for source in (HOSTILE, "desk")
    )
    assert hostile == harmless
    assert not {"link_open", "image", "html_inline", "html_block", "fence"} & set(hostile)


def test_the_registry_gets_as_much_as_it_takes_at_a_whole_line() -> None:
    assert description("short\n") == "short\n"
    long = description(card({"limits": "one line of text\n" * 400}))
    assert len(long) <= DESCRIPTION_CHARACTERS
    assert long.endswith("registered this version.*\n")
    assert "\n\n*Cut here" in long
