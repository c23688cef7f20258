"""What an export is: how its rows are told from others, and what rankings are in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from components.ingest_rankings.rows import Rejected

Native = dict[str, Any]  # a row of a native form: prompt, completions, ranks or scores, and what else is known


class Export(NamedTuple):
    """Fields:
    fields: those of its rows that are read, or that say nothing of a ranking; others are reported as left out. None: any may be.
    recognises: whether a row is its own, by the row's fields (those that are not None) and their types.
    rankings: the rankings of such a row in their order; what is not a ranking comes as a `Rejected` in its place. May raise
        `Rejected` where nothing of the row can be read.
    """

    fields: frozenset[str] | None
    recognises: Callable[[dict[str, Any]], bool]
    rankings: Callable[[dict[str, Any]], Iterator[Native | Rejected]]
