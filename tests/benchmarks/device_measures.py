"""Times on an accelerator, which runs behind the program, its peak of memory, and the rates that nothing on it exceeds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from components.rlhf.models import device


def synchronise() -> None:
    if device().type != "cpu":
        torch.accelerator.synchronize()


def seconds(work: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def forget_peak() -> None:
    """On a CPU the peak is that of the process since its start, whatever is done here."""
    if device().type != "cpu":
        torch.accelerator.reset_peak_memory_stats()


def free() -> None:
    gc.collect()
    if device().type != "cpu":
        torch.accelerator.empty_cache()


def ceilings() -> dict[str, Any]:
    """Rates of a large matrix product in bfloat16, and of a large copy, bytes read and written."""
    size = 8192 if device().type != "cpu" else 512
    a, b = (torch.randn((size, size), device=device(), dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn((2**30 if device().type != "cpu" else 2**22,), device=device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    rates = []
    for work in (lambda: torch.mm(a, b), lambda: target.copy_(source)):
        work()
        rates.append(min(seconds(work) for _ in range(5)))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else device().type,
        "torch": torch.__version__,
        "matrix_product_tflops": round(2 * size**3 / rates[0] / 1e12, 3),
        "copy_gb_per_second": round(2 * source.nbytes / rates[1] / 1e9),
    }
