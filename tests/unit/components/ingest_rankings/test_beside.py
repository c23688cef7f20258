"""Threads beside the reading: bytes and errors in their order, nothing left running."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ingest_rankings.beside import Beside, ReadAhead


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=60), chunk=st.integers(1, 9), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_bytes_are_those_of_the_stream(data: bytes, chunk: int, sizes: list[int]) -> None:
    ahead, found, turn = ReadAhead(io.BytesIO(data), chunk), b"", 0
    while part := ahead.read(sizes[turn % len(sizes)]):
        found, turn = found + part, turn + 1
    assert found == data
    assert ahead.read(5) == ahead.read(5) == b""
    ahead.close()


class Breaks(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        return super().read(size) or self._break()

    def _break(self) -> bytes:
        raise EOFError("cut off")


def test_an_error_comes_behind_the_bytes_before_it() -> None:
    ahead = ReadAhead(Breaks(b"abcdef"), 4)
    assert [ahead.read(4), ahead.read(4)] == [b"abcd", b"ef"]
    with pytest.raises(EOFError, match="cut off"):
        ahead.read(4)


def test_closing_ends_the_thread_of_an_endless_stream() -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            return b"x" * size

    before = threading.active_count()
    ahead = ReadAhead(Endless(), 10)
    assert ahead.read(3) == b"xxx"
    ahead.close()
    assert threading.active_count() == before


def test_calls_keep_their_order_and_an_error_is_not_lost() -> None:
    beside, done = Beside(), list[Any]()
    for number in range(20):
        beside.call(done.append, number)
    beside.finish()
    assert done == list(range(20))
    beside.call(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        beside.finish()
    beside.close()


def test_closing_leaves_out_what_has_not_begun() -> None:
    beside, done, begun = Beside(), list[int](), threading.Event()
    beside.call(lambda: (begun.set(), time.sleep(0.05), done.append(1)))
    beside.call(done.append, 2)
    begun.wait(5)
    beside.close()
    assert done == [1]
