"""What one annotation of Label Studio says: its rater, and the side that a Pairwise tag holds for the better one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal


def rater_of(completed_by: Any) -> Any:
    """The user's number; some exports hold the whole user, whose e-mail address is left out."""
    return completed_by.get("id") if isinstance(completed_by, dict) else completed_by


def results_of(annotation: Mapping[str, Any], *kinds: str) -> list[dict[str, Any]] | None:
    """The results of an annotation that are of one of these types; None if its result is not a list of objects."""
    results = annotation.get("result")
    if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
        return None
    return [each for each in results if each.get("type") in kinds]


def side_of(result: Mapping[str, Any]) -> Literal["left", "right"] | None:
    """What a result of the type pairwise has selected; None if it is neither side."""
    value = result.get("value")
    selected = value.get("selected") if isinstance(value, dict) else None
    return selected if selected in ("left", "right") else None
