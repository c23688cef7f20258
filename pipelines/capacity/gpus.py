"""GPUs by name, from their makers' data sheets, and what they were seen to reach.

Memory is taken as 10^9 bytes for each GB of the data sheet: what a card has beyond that (5 GiB of an H100) is left to CUDA's
context and to memory in fragments. The rates are those without sparsity; the data sheets print twice as much, with a footnote.
"""

from __future__ import annotations

import difflib
import itertools
import math
from typing import NamedTuple

from components.services.exits import DoNotRetry


class Gpu(NamedTuple):
    """One GPU.

    Fields:
        memory_gb: of the data sheet.
        tflops: of dense matrix products in bfloat16.
        gb_per_second: of its memory.
        product: its label nvidia.com/gpu.product, as NVIDIA's feature discovery writes it.
        sheet: where these numbers stand.
    """

    memory_gb: int
    tflops: float
    gb_per_second: int
    product: str
    sheet: str

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * 10**9


_SITE = "https://www.nvidia.com/en-us/data-center/"
GPUS = {
    "L4": Gpu(24, 121, 300, "NVIDIA-L4", _SITE + "l4/"),
    "A10": Gpu(24, 125, 600, "NVIDIA-A10", _SITE + "products/a10-gpu/"),
    "L40S": Gpu(48, 362, 864, "NVIDIA-L40S", _SITE + "l40s/"),
    "A100-40": Gpu(40, 312, 1555, "NVIDIA-A100-SXM4-40GB", _SITE + "a100/"),
    "A100-80": Gpu(80, 312, 2039, "NVIDIA-A100-SXM4-80GB", _SITE + "a100/"),
    "H100": Gpu(80, 989, 3350, "NVIDIA-H100-80GB-HBM3", _SITE + "h100/"),
    "H200": Gpu(141, 989, 4800, "NVIDIA-H200", _SITE + "h200/"),
    "B200": Gpu(180, 2250, 8000, "NVIDIA-B200", _SITE + "dgx-b200/"),  # an eighth of a DGX B200
}
MEASURED = "H100"

# Share of its 989 TFLOP/s that an H100 reached in tests/benchmarks/gpu.py: parameters, training with adapters, scoring, prefill.
# The smallest had small batches as well (the profile smollm2), and there the launch of kernels is what takes the time.
_REACHED = (
    (0.135e9, 0.0035, 0.0036, 0.0037),
    (1.24e9, 0.129, 0.141, 0.200),
    (8.03e9, 0.206, 0.356, 0.309),
)
TRAINING, SCORING, PREFILL = 1, 2, 3

LAYER_SECONDS = 0.0032  # of a decoding step whatever its batch: launches of kernels; 89 ms for 30 layers with adapters
COPY_SHARE = 2965 / 3350  # of the data sheet's bandwidth that a large copy reached


def gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        DoNotRetry: there is none in the table.
    """
    for known, found in GPUS.items():
        if known.lower() == name.strip().lower():
            return found
    near = difflib.get_close_matches(name.strip().upper(), list(GPUS), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DoNotRetry(f"unknown GPU {name!r}{hint}", f"name one or several of {', '.join(GPUS)}")


def efficiency(kind: int, parameters: int) -> float:
    """Share of a GPU's peak that work of this kind reaches; between the measured sizes by logarithms, outside the nearest."""
    points = [(math.log(row[0]), math.log(row[kind])) for row in _REACHED]
    size = math.log(parameters)
    if size <= points[0][0]:
        return math.exp(points[0][1])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if size <= x1:
            return math.exp(y0 + (y1 - y0) * (size - x0) / (x1 - x0))
    return math.exp(points[-1][1])


def efficiency_is_measured(name: str, parameters: int) -> bool:
    """Whether this GPU was measured at about this size; else what `efficiency` gives is extrapolated."""
    return gpu(name) == GPUS[MEASURED] and _REACHED[0][0] * 0.8 <= parameters <= _REACHED[-1][0] * 1.2


def decode_seconds(found: Gpu, layers: int, weights_bytes: int, cache_bytes: int, groups: int) -> float:
    """Seconds of one step of the torch sampler: launches, and what is read and written meanwhile.

    The sum fits the three measured sizes within 10 %; the larger of the two does not.

    Args:
        groups: query heads of one key-value head. With padding the library copies keys and values for each of them.
    """
    copies = 3 + (2 * groups if groups > 1 else 0)  # read to attend; read and written to append; written and read for each group
    return layers * LAYER_SECONDS + (weights_bytes + copies * cache_bytes) / (found.gb_per_second * 1e9 * COPY_SHARE)


def vllm_decode_seconds(found: Gpu, weights_bytes: int, cache_bytes: int) -> float:
    """Seconds of one step of vLLM, if it reads weights and cache once and all else is free. Not measured: a lower bound."""
    return (weights_bytes + cache_bytes) / (found.gb_per_second * 1e9 * COPY_SHARE)
