"""Plots of the reports as inline SVG: no file, no script, no remote link; the same numbers give the same text.

Each plot is small (a phone's width at full size) and keeps its text as text. Colours are Okabe and Ito's, which colour-blind
readers can tell apart, and series differ in marker and dash as well. Numbers that are not finite are left out.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH_INCHES, HEIGHT_INCHES = 4.8, 3.1
NAME_CHARACTERS = 30
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "x")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rankloop",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "text.parse_math": False,  # a rater may be called "$"
    "text.usetex": False,
}

Series = Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]]  # name -> (x, y)


def lines(
    title: str, x_label: str, y_label: str, series: Series, *, join: bool = True, vertical: Mapping[str, float] | None = None
) -> Markup:
    """Curves, or clouds of points if not `join`; `vertical` draws named lines at x. Empty if there is no finite point."""
    drawn = {name: _finite_points(*points) for name, points in series.items()}
    if not any(len(x) for x, _ in drawn.values()):
        return Markup("")
    figure, axes = _figure(title, x_label, y_label)
    for number, (name, (x, y)) in enumerate(drawn.items()):
        crowded = len(x) > 40
        axes.plot(
            x,
            y,
            label=_short(name) if len(drawn) > 1 else None,
            color=COLOURS[number % 6],
            linestyle=DASHES[number % 6] if join else "",
            marker="" if join and crowded else MARKERS[number % 6],
            markersize=3,
            linewidth=1.4,
            alpha=1.0 if join else 0.75,
        )
    for name, place in (vertical or {}).items():
        axes.axvline(place, color="#555555", linewidth=1, linestyle=":", label=_short(name))
    if len(drawn) > 1 or vertical:
        axes.legend(frameon=False, fontsize=8.5)
    return _svg(figure, title)


def intervals(title: str, x_label: str, rows: Sequence[tuple[str, Mapping[str, Any]]], *, reference: float) -> Markup:
    """One line per (name, {value, low, high}), top to bottom, and a vertical one at `reference`. Empty without a finite one."""
    found = [(name, *(_number(each.get(end)) for end in ("value", "low", "high"))) for name, each in rows]
    known = [row for row in found if None not in row]
    if not known:
        return Markup("")
    figure, axes = _figure(title, x_label, "", height=1.1 + 0.3 * len(known))
    for place, (_, value, low, high) in enumerate(known):
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
        axes.plot([value], [place], color=COLOURS[0], marker="o", markersize=5)
    axes.axvline(reference, color=COLOURS[1], linewidth=1, linestyle="--")
    axes.set_yticks(range(len(known)), [_short(str(row[0])) for row in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return _svg(figure, title)


def scaling_curve(title: str, x_label: str, y_label: str, points: Sequence[tuple[int, Mapping[str, Any]]]) -> Markup:
    """(x, {value, low, high}) joined over a logarithmic axis, each x > 0 a tick. Empty without a finite one."""
    found = [(x, *(_number(each.get(end)) for end in ("value", "low", "high"))) for x, each in points]
    known = [row for row in found if None not in row]
    if not known:
        return Markup("")
    figure, axes = _figure(title, x_label, y_label)
    places, values, lows, highs = zip(*known, strict=True)
    axes.plot(places, values, color=COLOURS[0], marker="o", markersize=5, linewidth=1.4)
    axes.vlines(places, lows, highs, color=COLOURS[0], linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(x) for x in places])
    axes.minorticks_off()
    return _svg(figure, title)


def histogram(title: str, x_label: str, values: Mapping[str, Sequence[float]], bins: int = 24) -> Markup:
    """Outlines of the share of items in each bin, one per name, with common bins. Empty without a finite value."""
    kept = {name: [float(v) for v in items if math.isfinite(v)] for name, items in values.items()}
    everything = [value for items in kept.values() for value in items]
    if not everything:
        return Markup("")
    low, high = min(everything), max(everything)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    figure, axes = _figure(title, x_label, "share of completions")
    for number, (name, items) in enumerate(kept.items()):
        heights = np.histogram(items, edges)[0] / max(1, len(items))
        axes.stairs(heights, edges, label=_short(name), color=COLOURS[number % 6], linestyle=DASHES[number % 6], linewidth=1.6)
    axes.legend(frameon=False, fontsize=8.5)
    return _svg(figure, title)


def reliability_plot(title: str, bins: Sequence[Mapping[str, float]]) -> Markup:
    """Accuracy against confidence, and the diagonal of perfect calibration; a point's area is its share of predictions."""
    if not bins:
        return Markup("")
    figure, axes = _figure(title, "confidence of the model", "share it got right")
    total = sum(each["predictions"] for each in bins)
    sizes = [20 + 300 * each["predictions"] / total for each in bins]
    axes.plot([0.5, 1], [0.5, 1], color="#555555", linewidth=1, linestyle=":")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=COLOURS[0], linewidth=1)
    axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], s=sizes, color=COLOURS[0], alpha=0.6)
    axes.set_xlim(0.48, 1.02)
    return _svg(figure, title)


def matrix(title: str, names: Sequence[str], shares: Sequence[Sequence[float]]) -> Markup:
    """A square of shares in [0, 1] as coloured cells with their per cent; NaN cells stay empty. Empty without any number."""
    values = np.asarray(shares, dtype=np.float64)
    if not np.isfinite(values).any():
        return Markup("")
    figure, axes = _figure(title, "", "", height=1.4 + 0.27 * len(names), width=max(WIDTH_INCHES, 1.9 + 0.34 * len(names)))
    edges = np.arange(len(names) + 1) - 0.5
    axes.pcolormesh(edges, edges, np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="PuOr_r", edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "white" if abs(value - 0.5) > 0.35 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    short = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), short, fontsize=8)
    axes.grid(visible=False)
    axes.set_aspect("equal")
    return _svg(figure, title)


def _figure(
    title: str, x_label: str, y_label: str, height: float = HEIGHT_INCHES, width: float = WIDTH_INCHES
) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return figure, axes


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an `<svg>` element that scales with the page. Its ids get a prefix, so that two on a page do not clash."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"p{zlib.crc32(text.encode()):08x}"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", text)
    label = f' role="img" aria-label="{escape(title)}"'
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda match: match[1] + label, text, count=1)
    return Markup(text)


def _short(name: str) -> str:
    """A name that leaves room for the plot."""
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"


def _finite_points(x: Sequence[float | None], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    points = [(a, b) for a, b in zip(map(_number, x), map(_number, y), strict=True) if a is not None and b is not None]
    return [a for a, _ in points], [b for _, b in points]


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None
