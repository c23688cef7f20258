"""Reports as one self-contained HTML page: inline style, inline SVG, no remote link, readable on a phone and on paper.

Everything that is not a plot is escaped, so that what a model or a rater wrote is shown and never run; the page's content security
policy allows its own script alone, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from components.rlhf.plots import lines

_FOLDER = Path(__file__).parent
SIMULATED = "simulated"  # the source of rankings of the simulated world
SIMULATED_BANNER = ("simulated", "Simulated data: requests, replies and raters come from a program, not from people.")
SHORT_CHARACTERS = 28  # a cell up to this stays on one line
NOT_A_CURVE = {"step", "update", "epoch"}

Cell = str | float | int | bool | None


class Table(NamedTuple):
    """Rows of cells under named columns."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Section(NamedTuple):
    """A heading with paragraphs, then tables, then plots (of `plots`; empty ones are left out)."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Markup] = ()


class Samples(NamedTuple):
    """A table that a reader can sort by any column and filter by words; `choice` names the column with a menu of its own."""

    title: str
    paragraphs: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    choice: str

    def choice_index(self) -> int:
        return list(self.columns).index(self.choice)

    def options(self) -> list[str]:
        return sorted({str(row[self.choice_index()]) for row in self.rows})


def render_page(
    title: str,
    subtitle: str,
    banners: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    samples: Samples | None = None,
) -> str:
    """The page as HTML text.

    Args:
        title: heading, and the browser's title.
        subtitle: one line below it.
        banners: (kind, text) with kind "pass", "warn", "fail", "simulated" or "note".
        sections: in order.
        samples: the table at the end, if any.
    """
    script = _script()
    return _template().render(
        title=title,
        subtitle=subtitle,
        banners=banners,
        sections=sections,
        samples=samples,
        script=Markup(script),
        script_digest=Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
        cell=format_cell,
        cell_class=_cell_class,
        column_class=_column_class,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report_page.html")


@cache
def _script() -> str:
    return (_FOLDER / "report_page.js").read_text(encoding="utf-8")


def format_cell(value: Cell) -> str:
    """Text as it is, yes and no, integers in full, other numbers to four digits; what is not finite or not there as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return str(value)


def _cell_class(value: Cell, sample: bool = False) -> str:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return "number"
    if value in ("pass", "warn", "fail"):
        return str(value)
    if isinstance(value, bool) or len(value) <= (12 if sample else SHORT_CHARACTERS):
        return "short"
    return "text"


def _column_class(table: Table, column: int) -> str:
    return "number" if any(_cell_class(row[column]) == "number" for row in table.rows) else ""


def interval_text(estimate: Mapping[str, Any]) -> str:
    """`0.81 (0.75 to 0.86)`; the value alone where there is no interval, a dash where there is no value."""
    value, low, high = (estimate.get(end) for end in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} ({low:.3g} to {high:.3g})"


def learning_curves(history: Sequence[Mapping[str, Any]], vertical: Mapping[str, float] | None = None) -> list[Markup]:
    """One plot for each numeric key of the records, over their `update` or `step` (or their place in the list)."""
    names = list(dict.fromkeys(name for record in history for name, value in record.items() if _is_number(value)))
    axis = next((name for name in ("update", "step") if name in names), "")
    x = [record.get(axis) if axis else place for place, record in enumerate(history)]
    return [
        lines(name, axis or "record", "", {name: (x, [_number(record.get(name)) for record in history])}, vertical=vertical)
        for name in names
        if name not in NOT_A_CURVE
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
