"""How work is shared, and what sums are made of: two real processes over Gloo where more than one is needed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from components.rlhf import distributed
from components.rlhf.distributed import any_of, check_same, passes, share, sum_gradients, summed, total
from components.services.exits import Retry


def in_two(look: Callable[[int], Any], tmp_path: Any) -> list[Any]:
    """What `look` gives in each of two processes."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def run(number: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=number, world_size=2)
        answers.put((number, look(number)))
        torch.distributed.destroy_process_group()

    started = [context.Process(target=run, args=(number,)) for number in (0, 1)]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=60) for _ in started)
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return [found[0], found[1]]


@given(st.lists(st.integers(1, 50)), st.integers(1, 5))
def test_every_item_belongs_to_one_process_and_their_costs_are_alike(costs: list[int], count: int) -> None:
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "processes", lambda: count)
        for number in range(count):
            patch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(share(costs))
    assert sorted(i for each in shares for i in each) == list(range(len(costs)))
    assert all(each == sorted(each) for each in shares)
    sums = [sum(costs[i] for i in each) for each in shares]
    assert max(sums) - min(sums) <= max(costs, default=0)
    if count == 1:
        assert shares == [list(range(len(costs)))]


def test_alone_nothing_is_shared_or_summed() -> None:
    weight = nn.Parameter(torch.ones(2))
    sum_gradients([weight])
    assert weight.grad is None
    assert passes("abc", [3, 1, 2], list) == [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    assert passes("", [], list) == []
    assert total(0.1, 2) == (0.1, 2)
    assert any_of(False, True) == (False, True)


def test_gradients_numbers_and_rows_of_two_processes_are_added(tmp_path: Any) -> None:
    def look(number: int) -> Any:
        both, one, none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
        both.grad = torch.tensor([1.0, 2.0, 3.0]) * (number + 1)
        if number == 1:
            one.grad = torch.full((3,), 7.0)
        sum_gradients([both, one, none])
        assert both.grad is not None
        assert one.grad is not None
        rows = torch.zeros(2)
        rows[number] = 5.0 + number
        numbers = total(0.5, number), any_of(number == 1, False), summed(rows).tolist()
        return both.grad.tolist(), one.grad.tolist(), none.grad, numbers

    expected = ([3.0, 6.0, 9.0], [7.0, 7.0, 7.0], None, ((1.0, 1.0), (True, False), [5.0, 6.0]))
    assert in_two(look, tmp_path) == [expected, expected]


def test_together_each_makes_as_many_passes_and_repeated_ones_do_not_count(tmp_path: Any) -> None:
    def look(number: int) -> Any:
        return [passes(items, [1] * len(items), lambda own: [[each] for each in own], together=True) for items in ("abc", "a", "")]

    first, second = in_two(look, tmp_path)
    assert first == [[(["a"], 1.0), (["c"], 1.0)], [(["a"], 1.0)], []]
    assert second == [[(["b"], 1.0), (["b"], 0.0)], [(["a"], 0.0)], []]


def test_processes_with_different_weights_do_not_go_on(tmp_path: Any) -> None:
    def look(number: int) -> str:
        same, other = torch.tensor([0.1, torch.nan]), torch.tensor([0.1 + 1e-8 * number])
        check_same("SFT", [same])
        try:
            check_same("SFT", [same, other])
        except Retry as error:
            return error.message
        return ""

    assert in_two(look, tmp_path) == ["SFT: process 1 of 2 has other weights than process 0"] * 2
