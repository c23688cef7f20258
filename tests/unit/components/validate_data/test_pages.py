"""Both pages show every check with its verdict, and every rater; text from the data is escaped, and nothing is fetched."""

from __future__ import annotations

import re

import pytest

from components.rlhf.records import Ranking
from components.validate_data.page import data_docs
from components.validate_data.rater_page import rater_report
from components.validate_data.stage import Config
from components.validate_data.suite import Suite
from tests.unit.components.validate_data.snapshots import facts_of, ranking, user

EVIL = "<script>alert(1)</script>"


def pages(rankings: list[Ranking]) -> tuple[str, str, dict[str, str]]:
    suite = Suite(Config())
    facts = facts_of(rankings, config=Config(), look=suite.look)
    checks = suite.checks(facts)
    docs = data_docs(checks, suite.results, "fail", "s3://x/rankings")
    return docs, rater_report(facts, checks, "s3://x/rankings"), {check.name: check.verdict for check in checks}


@pytest.fixture(scope="module")
def shown() -> tuple[str, str, dict[str, str]]:
    """Three raters on 30 prompts, of whom one has an evil name and puts the longer one first."""
    rankings = []
    for i in range(30):
        for rater in ("ann", "bob", EVIL):
            ranks = [1, 2] if rater == EVIL or i % 3 == 0 else [2, 1]
            times = f"2026-01-01T00:{i:02}:{'0' if rater == 'ann' else '3'}0Z"
            rankings.append(
                ranking(
                    len(rankings),
                    prompt=user(f"question {i}"),
                    completions=[f"a longer answer {i}", EVIL[:3]],
                    ranks=ranks,
                    rater_id=rater,
                    collected_at=times,
                )
            )
    return pages(rankings)


def test_every_check_is_on_the_data_docs_with_its_verdict(shown: tuple[str, str, dict[str, str]]) -> None:
    docs, _, verdicts = shown
    rows = dict(re.findall(r"<tr><td>(.*?)<td>.*?<td class=\"[a-z ]+\">([a-z ]+)\n", docs, re.S))
    assert rows == verdicts
    assert {"pass", "warn", "fail", "not known"} == set(verdicts.values())


def test_every_rater_is_in_the_report(shown: tuple[str, str, dict[str, str]]) -> None:
    _, report, _ = shown
    table = report[report.index("Each rater") : report.index("Leanings")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    by_name = {row[0]: row for row in rows if row}
    assert set(by_name) == {"ann", "bob", "&lt;script&gt;alert(1)&lt;/script&gt;"}
    ann = by_name["ann"]
    assert ann[1:3] == ["30", "0.3333"]
    assert ann[3].startswith("0.667 ("), "with bob always, with the third in 10 of 30: 40 of 60"
    assert ann[4].startswith("0.333 (")
    assert ann[-1] == "60"
    assert "Agreement of two raters" in report
    assert ">33</text>" in report
    assert ">100</text>" in report


def test_the_report_flags_the_rater_who_prefers_the_longer(shown: tuple[str, str, dict[str, str]]) -> None:
    flags = shown[1][shown[1].index("<h2>Flags") : shown[1].index("Each rater")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in flags
    assert "prefers the longer" in flags


def test_nothing_runs_and_nothing_is_fetched(shown: tuple[str, str, dict[str, str]]) -> None:
    for page in shown[:2]:
        assert EVIL not in page
        assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
        assert "<image" not in page, "plots are drawings"


def test_of_unknown_raters_the_report_says_so() -> None:
    rankings = [ranking(i, rater_id="unknown", completions=["better", "worse"], ranks=[1, 2]) for i in range(30)]
    _, report, verdicts = pages(rankings)
    assert "of raters nothing is known" in report
    assert "Leanings" not in report
    assert verdicts["no rater at random level"] == verdicts["being shown first does not decide"] == "not known"
