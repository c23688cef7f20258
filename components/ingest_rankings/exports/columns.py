"""Rows of any shape, read by a column map: for each field of a ranking a JMESPath expression over the row.

    prompt: question
    completions: "[answer_a, answer_b]"
    ranks: "(choice == 'A' && [`1`, `2`]) || (choice == 'B' && [`2`, `1`]) || (choice == 'tie' && [`1`, `1`])"
    rater_id: worker

Cells of CSV and TSV are texts: `to_number(score_a)` makes a number of one. With `each`, which gives a list, every element of it
is a ranking, and stands in the row as `each` for the other expressions. https://jmespath.org/specification.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError

from components.ingest_rankings.exports.export import Export, Native
from components.ingest_rankings.rows import Rejected, shown

EACH = "each"
TARGETS = (
    *("prompt", "completions", "ranks", "scores", "chosen", "rejected", "ranking_id", "rater_id", "source", "collected_at"),
    *("confidence", "policies", "criterion", "split", EACH),
)


def column_map(columns: Mapping[str, str]) -> Export:
    """The export that a map describes.

    Raises:
        ValueError: a field that no ranking has, an expression that is none, or a map without a prompt.
    """
    if unknown := sorted(columns.keys() - set(TARGETS)):
        raise ValueError(f"no field {unknown[0]!r} in a ranking; there are {', '.join(TARGETS)}")
    try:
        expressions = {field: jmespath.compile(expression) for field, expression in columns.items()}
    except JMESPathError as error:
        raise ValueError(f"not a JMESPath expression: {error}") from error
    each = expressions.pop(EACH, None)

    def rankings(row: dict[str, Any]) -> Iterator[Native | Rejected]:
        if each is None:
            yield _native(expressions, row)
            return
        elements = _found(EACH, each, row)
        if not isinstance(elements, list) or not elements:
            raise Rejected("the column map finds no list", f"{EACH}: {shown(elements)}")
        for element in elements:
            try:
                yield _native(expressions, {**row, EACH: element})
            except Rejected as problem:
                yield problem

    return Export(fields=None, recognises=lambda row: False, rankings=rankings)


def _native(expressions: Mapping[str, Any], row: dict[str, Any]) -> Native:
    return {field: _found(field, expression, row) for field, expression in expressions.items()}


def _found(field: str, expression: Any, row: dict[str, Any]) -> Any:
    try:
        return expression.search(row)
    except JMESPathError as error:
        raise Rejected("the column map does not fit", f"{field}: {error}") from error
