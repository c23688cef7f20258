"""Pages are self-contained, escape what models and raters wrote, and hold the numbers that they were given."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest

from components.rlhf import plots
from components.rlhf.accuracy_report import ScoredRanking, accuracy_report
from components.rlhf.records import Ranking
from components.rlhf.report_page import (
    Samples,
    Section,
    Table,
    format_cell,
    interval_text,
    learning_curves,
    render_page,
)
from components.train_reward_model.page import reward_model_page

ATTACK = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>{{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser would make of a page: tags with their attributes, the text of cells, and nesting that must close."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def attacked_page() -> str:
    return render_page(
        ATTACK,
        ATTACK,
        [("note", ATTACK)],
        [
            Section(ATTACK, [ATTACK], [Table(ATTACK, [ATTACK], [[ATTACK]])], [
                plots.lines(ATTACK, ATTACK, ATTACK, {ATTACK: ([0, 1], [0, 1]), "$": ([0, 1], [1, 0])}, vertical={ATTACK: 0.5}),
                plots.intervals(ATTACK, ATTACK, [(ATTACK, {"value": 0.5, "low": 0.4, "high": 0.6})], reference=0.5),
                plots.histogram(ATTACK, ATTACK, {ATTACK: [1, 2, 3]}),
                plots.reliability_plot(ATTACK, [{"confidence": 0.6, "accuracy": 0.7, "predictions": 3}]),
            ]),
        ],
        Samples(ATTACK, [ATTACK], ["verdict", ATTACK], [["won", ATTACK], [ATTACK, 1.5]], "verdict"),
    )  # fmt: skip


def test_what_models_wrote_is_shown_and_never_run() -> None:
    page = Page(attacked_page())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.cells.count(ATTACK) == 3  # whole, with the braces that a template would have evaluated


def test_page_loads_nothing_and_allows_its_own_script_alone() -> None:
    text = attacked_page()
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = next(a["content"] or "" for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_ids_are_unique_and_links_meet_them() -> None:
    text = attacked_page()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)
    assert targets
    assert set(targets) <= set(ids)


def test_same_numbers_give_the_same_page() -> None:
    assert attacked_page() == attacked_page()


def test_plots_leave_out_what_is_not_finite() -> None:
    assert plots.lines("t", "x", "y", {"a": ([0, 1], [math.nan, None])}) == ""
    assert plots.intervals("t", "x", [("a", {"value": None, "low": None, "high": None})], reference=0.5) == ""
    assert plots.histogram("t", "x", {"a": [math.inf]}) == ""
    assert plots.reliability_plot("t", []) == ""
    drawn = plots.lines("t", "x", "y", {"a": ([0, 1, 2], [1.0, math.inf, 3.0])})
    assert drawn.startswith("<svg")
    assert "inf" not in drawn
    assert "nan" not in drawn


def test_curves_are_over_the_update_and_skip_text() -> None:
    history = [{"update": i, "loss": 1.0 / (i + 1), "chosen": i == 1, "note": "x"} for i in range(3)]
    curves = learning_curves(history)
    assert len(curves) == 1
    assert ">update</text>" in curves[0]
    assert learning_curves([]) == []


def test_cells() -> None:
    assert [format_cell(value) for value in (None, math.nan, 0.123456, 12, True, "a", 1e-9)] == [
        "–", "–", "0.1235", "12", "yes", "a", "1e-09",
    ]  # fmt: skip
    assert interval_text({"value": 0.8123, "low": 0.75, "high": 0.8611}) == "0.812 (0.75 to 0.861)"
    assert interval_text({"value": 0.8, "low": None, "high": None}) == "0.8"
    assert interval_text({"value": None, "low": None, "high": None}) == "–"


@pytest.mark.parametrize("source", ["simulated", "desk"])
def test_reward_model_page_holds_the_reports_numbers(source: str) -> None:
    scored = [
        ScoredRanking(
            Ranking(f"r{i}", [{"role": "user", "content": f"p{i}"}], ["a", "b", "c"], [1, 2, 3], f"<rater {i % 2}>", source,
                    None, None, None, None, "test"),
            [float(i % 3), 1.0, 0.5],
            [3, 4, 5],
        )
        for i in range(12)
    ]  # fmt: skip
    report = accuracy_report(scored, seed=0)
    text = reward_model_page(report, accuracy_report([], seed=0), [{"step": i, "loss": 0.7 - 0.1 * i} for i in range(4)])
    page = Page(text)
    assert interval_text(report["overall"]) in page.cells
    assert "<rater 0>" in page.cells
    assert ("Simulated data" in text) == (source == "simulated")
    assert text.count("<svg") == 3  # calibration of the first (the empty judge has none), raters, loss
