"""Every line of the checklist, and every mistake read elsewhere, has a test that is named after it."""

from __future__ import annotations

import pytest

from tests.checklist import LINES, MISTAKES, TABLE, named_tests, table


def test_the_lines_are_numbered_without_a_gap() -> None:
    assert list(LINES) == list(range(1, 42))


@pytest.mark.parametrize("topic", [*LINES, *MISTAKES])
def test_each_line_and_each_mistake_has_a_test(topic: int | str) -> None:
    wanted = f"test_line_{topic:02d}_..." if isinstance(topic, int) else f"test_mistake_{topic}_..."
    assert named_tests().get(topic), f"there is no {wanted}"


def test_each_name_belongs_to_a_line_or_a_mistake() -> None:
    assert named_tests().get("", []) == [], "test_line_NN_... has two digits of a line, test_mistake_WORD_... the word of a mistake"


def test_the_table_is_the_one_that_would_be_written() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "run `python -m tests.checklist` and review the diff"
