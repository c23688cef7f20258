"""The smallest GPUs on which each stage fits, with the seconds that its work takes there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from components.rlhf.memory import GIB, Share
from pipelines.capacity.gpus import GPUS, Gpu, decode_seconds, efficiency, efficiency_is_measured, vllm_decode_seconds
from pipelines.capacity.stages import Division, Job, Need

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COUNTS = (1, 2, 4, 8)
CUTS = (1, 2, 4)  # by which a micro-batch is divided where memory is short


class Timed(NamedTuple):
    """Work with its time.

    Fields:
        job: the work.
        seconds: on all GPUs of the stage together.
        extrapolated: not measured on this GPU at about this size.
        vllm_seconds: of decoding, if vLLM did it.
    """

    job: Job
    seconds: float
    extrapolated: bool
    vllm_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens / self.seconds if self.seconds else 0.0


class Placed(NamedTuple):
    """A stage on its GPUs.

    Fields:
        stage: its name.
        gpu: a name of `GPUS`; empty: it fits none.
        gpus: how many.
        division: how its layers are divided over them.
        micro_batch_tokens: that fit.
        shares: of one GPU's memory.
        timed: its work.
    """

    stage: str
    gpu: str
    gpus: int
    division: Division
    micro_batch_tokens: int
    shares: list[Share]
    timed: list[Timed]

    @property
    def gib(self) -> float:
        return sum(share.bytes for share in self.shares) / GIB

    @property
    def hours(self) -> float:
        return sum(each.seconds for each in self.timed) / 3600


def place(need: Need, names: Sequence[str], config: PretrainedConfig, parameters: int, itemsize: int) -> Placed:
    """The stage on the smallest of the named GPUs, and as few of them as hold it.

    One GPU with smaller micro-batches, which change no result, comes before several; several help where layers can be divided, or
    where a rollout's cache is what is too large.

    Args:
        itemsize: bytes of a weight while tokens are sampled.
    """
    known: dict[tuple[int, int], list[Share]] = {}

    def shares_of(micro: int, count: int) -> list[Share]:
        if (micro, count) not in known:
            known[micro, count] = need.shares(micro, count)
        return known[micro, count]

    lowest = min(need.row_tokens, need.micro_batch_tokens)
    micros = sorted({max(lowest, need.micro_batch_tokens // cut) for cut in CUTS}, reverse=True)
    for count in COUNTS:
        for name in sorted(names, key=lambda name: (GPUS[name].memory_gb, GPUS[name].tflops)):
            for micro in micros:
                shares = shares_of(micro, count)
                if sum(share.bytes for share in shares) <= GPUS[name].memory_bytes:
                    division = need.division if count > 1 else ""
                    at_once = 1 if division == "spread" else count
                    timed = [timed_on(job, name, count, at_once, config, parameters, itemsize) for job in need.jobs]
                    return Placed(need.stage, name, count, division, micro, shares, timed)
    return Placed(need.stage, "", 0, "", micros[-1], shares_of(micros[-1], COUNTS[-1]), [])


def timed_on(job: Job, name: str, count: int, at_once: int, config: PretrainedConfig, parameters: int, itemsize: int) -> Timed:
    """The work on `count` GPUs of which `at_once` share its rows, without what they send to each other."""
    found: Gpu = GPUS[name]
    extrapolated = count > 1 or not efficiency_is_measured(name, parameters)
    if job.kind:
        return Timed(job, job.flops / (found.tflops * 1e12 * efficiency(job.kind, parameters) * at_once), extrapolated)
    groups = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    weights, cache = parameters * itemsize, job.cache_bytes // at_once
    step = decode_seconds(found, config.num_hidden_layers, weights, cache, groups)
    return Timed(job, job.steps * step, extrapolated, job.steps * vllm_decode_seconds(found, weights, cache))
