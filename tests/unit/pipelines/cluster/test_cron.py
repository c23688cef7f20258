"""Cron as KFP reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cluster.cron import FIELDS, check


@pytest.mark.parametrize(
    "good", ["0 0 3 * * *", "0 0 9 ? * 2-6", "0 */5 * * * *", "0 0 0 1,15 jan-mar MON", "30 10-20/2 1/3 * * sun,sat"]
)
def test_what_kfp_takes_is_taken(good: str) -> None:
    assert check(f"  {good.replace(' ', '   ')} ") == good


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("0 3 * * *", "has 5 fields, not six; a crontab's five fields need the second in front"),
        ("@daily", "has 1 fields"),
        ("60 0 3 * * *", "second = '60': 60 is not between 0 and 59"),
        ("0 0 24 * * *", "hour = '24'"),
        ("0 0 3 0 * *", "day of month = '0': 0 is not between 1 and 31"),
        ("0 0 3 * * 7", "day of week = '7'"),
        ("0 0 5-3 * * *", "hour = '5-3' ends before it begins"),
        ("0 */0 3 * * *", "minute = '\\*/0' has a step of 0"),
        ("0 0 3 * mon *", "month = 'mon'"),
        ("0 0 3 , * *", "day of month = ''"),
        ("0 0 *-5 * * *", "no range"),
    ],
)
def test_what_kfp_would_never_run_is_refused(bad: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(bad)


@given(st.tuples(*(st.tuples(st.integers(low, high), st.integers(low, high)) for _, low, high, _ in FIELDS)))
def test_every_range_within_its_bounds_is_taken(ranges: tuple[tuple[int, int], ...]) -> None:
    text = " ".join(f"{min(pair)}-{max(pair)}/2" for pair in ranges)
    assert check(text) == text
