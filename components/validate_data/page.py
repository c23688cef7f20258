"""The Data Docs page: a table of the checks, and below it what Great Expectations itself says; one file, no network."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from jinja2 import Environment
from markupsafe import Markup

from components.validate_data.suite import Check

if TYPE_CHECKING:
    from great_expectations.core.expectation_validation_result import ExpectationSuiteValidationResult

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rankings: {{ gate }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
td, th { border: 1px solid #d0d7de; padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { white-space: nowrap }
.pass { color: #1a7f37 } .fail { color: #cf222e; font-weight: 600 } .warn { color: #9a6700; font-weight: 600 }
.not { color: #57606a }
details { margin-top: 2rem } summary { cursor: pointer; font-weight: 600 }
.gx .d-none, .gx nav, .gx .modal, .gx svg, .gx img { display: none }
</style>
<h1>Rankings: gate <span class="{{ gate }}">{{ gate }}</span></h1>
<p>Snapshot {{ snapshot_uri }}</p>
<p>{{ counts }}. A warning goes on. What is not known, because nothing in the data tells it, is no failure.
Intervals are at 95 %.</p>
<table><tr><th>expectation<th>observed<th>threshold<th>verdict<th>examples</tr>
{% for check in checks %}<tr><td>{{ check.name }}<td>{{ check.value }}<td>{{ check.threshold }}
<td class="{{ check.verdict }}">{{ check.verdict }}
<td>{% for example in check.examples %}{{ example }}<br>{% endfor %}</tr>
{% endfor %}</table>
{% for name, html in details %}
<details><summary>Great Expectations on {{ name }}</summary><div class="gx">{{ html }}</div></details>
{% endfor %}</html>
"""


def data_docs(checks: list[Check], results: list[ExpectationSuiteValidationResult], gate: str, snapshot_uri: str) -> str:
    """The page as HTML; text from the data is escaped."""
    details = [(result.suite_name, _body(_rendered(result))) for result in results]
    verdicts = Counter(check.verdict for check in checks)
    counts = ", ".join(f"{verdict}: {verdicts[verdict]}" for verdict in ("pass", "warn", "fail", "not known"))
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(checks=checks, details=details, gate=gate, snapshot_uri=snapshot_uri, counts=counts)


def _rendered(result: ExpectationSuiteValidationResult) -> str:
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    html: str = DefaultJinjaPageView().render(ValidationResultsPageRenderer(run_info_at_end=True).render(result))
    return html


def _body(html: str) -> Markup:
    """What Great Expectations puts between its body tags, without scripts, styles and whatever would be fetched."""
    body = re.search(r"<body.*?>(.*)</body>", html, re.DOTALL)
    text = body.group(1) if body else ""
    text = re.sub(r"<(script|style|svg|iframe)\b.*?</\1>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(r"<(link|img|meta|base)\b[^>]*>", "", text, flags=re.IGNORECASE)
    return Markup(re.sub(r"\s(on\w+|href|src)\s*=\s*(\"[^\"]*\"|'[^']*')", "", text, flags=re.IGNORECASE))
