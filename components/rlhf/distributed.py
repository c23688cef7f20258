"""Several processes that train one model: who computes what, and what all of them then know. With one process all of it is free.

Every process holds the same state and sees the same global batch. Each computes its own share of the rows, divides by counts of the
whole batch, and sums of gradients, losses and counts over the processes take the place of its own. So a step is that of one process
but for the order in which numbers are added. What is drawn at random is drawn by all alike.

`torch.distributed` is joined by `components.services.rank`, which torchrun starts; nothing here asks who did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as group
from torch.distributed.tensor import DTensor

from components.services.exits import Retry

BUCKET_NUMBERS = 2**24  # of gradients in one message: 64 MiB; fewer messages gain nothing, and the copy takes memory

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def processes() -> int:
    """How many processes train together."""
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0; the first one writes what others read."""
    return group.get_rank() if processes() > 1 else 0


def share(costs: Sequence[float]) -> list[int]:
    """Indices of the items that this process computes, ascending: of the items sorted by cost each process takes every n-th."""
    if processes() == 1:
        return list(range(len(costs)))
    by_cost = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    return sorted(by_cost[rank() :: processes()])


def passes(
    items: Sequence[Item], costs: Sequence[float], batches: Callable[[Sequence[Item]], Iterable[Batch]], together: bool = False
) -> list[tuple[Batch, float]]:
    """This process's forward passes over its share of the items, each with the factor by which its result counts.

    Args:
        costs: of the items, by which they are shared out.
        batches: makes batches of some items.
        together: every process must make as many passes, because the layers are divided over them (`rlhf.sharding`). One that has
            fewer repeats a batch, with factor 0.
    """
    own = [items[i] for i in share(costs)]
    found = list(batches(own)) if own else []
    if not together or not items:
        return [(batch, 1.0) for batch in found]
    return as_many(found, found[0] if found else next(iter(batches(items[:1]))))


def as_many(own: Sequence[Batch], spare: Batch) -> list[tuple[Batch, float]]:
    """This process's batches with factor 1, then `spare` with factor 0 until there are as many as in the process that has most."""
    found = [(batch, 1.0) for batch in own]
    if processes() > 1:
        found += [(spare, 0.0)] * (_highest(len(own)) - len(own))
    return found


def total(*numbers: float) -> tuple[float, ...]:
    """Each number summed over the processes."""
    if processes() == 1:
        return numbers
    return tuple(summed(torch.tensor(numbers, dtype=torch.float64)).tolist())


def summed(tensor: Tensor) -> Tensor:
    """The tensor summed over the processes, in place.

    Where each process has filled its own rows of zeros, the sum is what all of them have found.
    """
    if processes() > 1:
        group.all_reduce(tensor)
    return tensor


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Whether any process says so, flag by flag: what all must do at the same step, such as to stop, is agreed on here."""
    return tuple(number > 0 for number in total(*flags))


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gives every process the sum of all gradients. A parameter without one gets it if another process has one.

    Gradients of layers that are divided over the processes are summed by their own backward pass.
    """
    if processes() == 1:
        return
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    having = summed(torch.tensor([p.grad is not None for p in whole], dtype=torch.float32)).tolist()
    learning = [p for p, processes_having in zip(whole, having, strict=True) if processes_having]
    for bucket in _buckets(learning):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def check_same(what: str, parameters: Sequence[Tensor]) -> None:
    """Every process must hold the same weights, bit by bit: before the first step, and wherever they are saved.

    Raises:
        Retry: they differ. A checkpoint was replaced while it was read, or a machine computes wrongly.
    """
    if processes() == 1:
        return
    own = [float(p.detach().double().sum()) for p in parameters if not isinstance(p, DTensor)]
    sums = torch.zeros((processes(), len(own)), dtype=torch.float64)
    sums[rank()] = torch.tensor(own, dtype=torch.float64)
    found = summed(sums)
    others = [number for number, row in enumerate(found) if not torch.equal(row.nan_to_num(), found[0].nan_to_num())]
    if others:
        raise Retry(
            f"{what}: process {others[0]} of {processes()} has other weights than process 0",
            "run again: it continues from the last checkpoint; if it comes back, look at that machine",
        )


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if processes() > 1:
        group.barrier()


def _highest(number: int) -> int:
    """The highest of the processes' numbers."""
    found = torch.tensor(number)
    group.all_reduce(found, group.ReduceOp.MAX)
    return int(found)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    numbers = 0
    for parameter in parameters:
        if bucket and (numbers + parameter.numel() > BUCKET_NUMBERS or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(parameter)
        numbers += parameter.numel()
    if bucket:
        yield bucket
