"""A plan of capacity as a person reads it: tables in the terminal, one self-contained HTML page, and a table of resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table as Grid

from components.rlhf.memory import GIB
from components.rlhf.report_page import Cell, Section, Table, render_page
from pipelines.capacity.gpus import GPUS, MEASURED
from pipelines.capacity.placing import Placed
from pipelines.capacity.stages import Data

MARK = "≈"  # before what is extrapolated
_HOST_GIB = 16  # of a pod beside the weights that it reads
_LONGEST_GPUS = 16


class Plan(NamedTuple):
    """A plan for a model under a profile; price for an hour of one GPU, or None."""

    model: str
    profile: str
    parameters: int
    itemsize: int
    data: Data
    names: Sequence[str]
    price: float | None
    stages: list[Placed]


def notes_of(plan: Plan) -> list[str]:
    """What a reader has to know of the numbers."""
    data = plan.data
    return [
        f"Rows are as long as they may be: prompts of {data.prompt_tokens} and completions of {data.completion_tokens} tokens,"
        f" {data.completions} to a ranking. Hours are for {data.rankings} rankings, and less where texts are shorter.",
        "Memory is the stages' own plan, counted tensor by tensor on shapes. It was within 9 % of the peaks on an H100 (reward"
        " model, PPO and DPO with adapters, SFT of all weights; 135 M to 8 B), and within 15 % on a CPU at small sizes.",
        f"Speed was measured on one {MEASURED} at 135 M, 1.2 B and 8 B parameters, with adapters. {MARK} marks what is"
        " extrapolated: another GPU at the same share of its data sheet's rate, another size, or several without the time of"
        " their messages.",
        "Decoding is the torch sampler's. vLLM's time was not measured: it is what reading weights and cache once takes.",
        "With sharding it was within 6 % of the peaks of PPO in two CPU processes (60 M parameters, all weights and adapters)."
        " The evaluation's memory (two models and a cache) was not compared with a peak.",
    ]


def cost(plan: Plan, placed: Placed) -> float | None:
    """Hours times GPUs times the price of one."""
    return None if plan.price is None else placed.hours * placed.gpus * plan.price


def overview(plan: Plan) -> Table:
    rows: list[list[Cell]] = []
    for each in plan.stages:
        if not each.gpu:
            rows.append([each.stage, "none fits", None, each.gib, _micro(each), None, None])
            continue
        mark = MARK if any(timed.extrapolated for timed in each.timed) else ""
        hours = f"{mark}{each.hours:.3g}" if each.timed else "0"
        price = cost(plan, each)
        where = f"{each.gpus} × {each.gpu}" + (f", {each.division}" if each.division else "")
        rows.append([each.stage, where, GPUS[each.gpu].memory_bytes / GIB, each.gib, _micro(each), hours, price])
    columns = ("stage", "smallest GPUs", "GiB there", "GiB planned", "micro_batch_tokens", "hours", "cost")
    return Table("Each stage on the smallest of the named GPUs that hold it", columns, rows)


def _micro(placed: Placed) -> int | None:
    """Of stages that have it, and train."""
    return placed.micro_batch_tokens if placed.timed and placed.stage != "evaluate" else None


def memory_table(placed: Placed) -> Table:
    rows: list[list[Cell]] = [[each.role, each.what, each.bytes / GIB] for each in placed.shares if each.bytes]
    where = f"{placed.gpus} × {placed.gpu}" if placed.gpu else "fits none of the named GPUs"
    return Table(f"{placed.stage}: memory of one GPU ({where})", ("role", "what", "GiB"), [*rows, ["all", "sum", placed.gib]])


def speed_table(plan: Plan) -> Table:
    rows: list[list[Cell]] = []
    for placed in plan.stages:
        for each in placed.timed:
            mark = MARK if each.extrapolated else ""
            vllm = None if each.vllm_seconds is None else f"{MARK}{each.vllm_seconds / 3600:.3g}"
            rate = f"{mark}{each.tokens_per_second:,.0f}"
            rows.append([placed.stage, each.job.what, each.job.tokens, rate, f"{mark}{each.seconds / 3600:.3g}", vllm])
    return Table("Work, speed and time", ("stage", "work", "tokens", "tokens/s", "hours", "hours with vLLM"), rows)


def gpu_table(names: Sequence[str]) -> Table:
    rows: list[list[Cell]] = [
        [name, GPUS[name].memory_gb, GPUS[name].tflops, GPUS[name].gb_per_second, GPUS[name].sheet] for name in names
    ]
    return Table("The GPUs, from their data sheets", ("GPU", "GB", "dense bf16 TFLOP/s", "GB/s", "source"), rows)


def html(plan: Plan) -> str:
    """The page."""
    left_out = [each.stage for each in plan.stages if not each.gpu]
    banners = [("fail", f"No named GPU holds {', '.join(left_out)}, not even eight of them.")] if left_out else []
    banners.append(("note", f"A plan, not a measurement. {MARK} marks what is extrapolated."))
    subtitle = f"{plan.parameters:,} parameters · profile {plan.profile}"
    sections = [
        Section("Stages", notes_of(plan), [overview(plan)]),
        Section("Memory by role", (), [memory_table(each) for each in plan.stages]),
        Section("Speed", (), [speed_table(plan), gpu_table(plan.names)]),
    ]
    return render_page(f"Capacity for {plan.model}", subtitle, banners, sections)


def show(plan: Plan, console: Console) -> None:
    """The tables on the terminal."""
    console.print(f"{plan.model}: {plan.parameters:,} parameters, profile {plan.profile}", highlight=False)
    for table in (overview(plan), *(memory_table(each) for each in plan.stages), speed_table(plan)):
        grid = Grid(title=table.caption, title_justify="left")
        for column in table.columns:
            grid.add_column(column)
        for row in table.rows:
            grid.add_row(*("" if cell is None else f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in row))
        console.print(grid)
    for note in notes_of(plan):
        console.print(note, highlight=False, style="dim")


def resources(plan: Plan) -> str:
    """A file for `rankloop compile --resources`: one kind of GPU for all large stages, the smallest on which each fits.

    A pod's memory holds the weights twice for each process that reads them, its scratch eight times (model, checkpoints, what is
    uploaded); the time-out is three times the planned hours. These three are rules of thumb.
    """
    stages: dict[str, Any] = {}
    weights = plan.parameters * plan.itemsize / GIB
    largest = max((each for each in plan.stages if each.gpu), key=lambda each: GPUS[each.gpu].memory_gb, default=None)
    for each in plan.stages:
        if each.gpu:
            readers = 1 if each.division == "spread" else each.gpus
            stages[each.stage] = {
                "gpus": min(each.gpus, _LONGEST_GPUS),
                "memory": f"{math.ceil(2 * weights * readers) + _HOST_GIB}Gi",
                "scratch": f"{math.ceil(8 * weights) + 50}Gi",
                "timeout_seconds": max(3600, math.ceil(3 * 3600 * each.hours)),
            }
            stages[each.stage]["shared_memory"] = f"{_HOST_GIB // 2}Gi"
    table: dict[str, Any] = {"extends": "gpu", "stages": stages}
    if largest:
        table["pools"] = {"large": {"node_selector": {"nvidia.com/gpu.product": GPUS[largest.gpu].product}}}
    head = f"# Written by `rankloop plan` for {plan.model} under the profile {plan.profile}. Settings that belong to it:\n"
    for each in plan.stages:
        if each.gpu and each.timed and each.stage != "evaluate":
            shard = f", {each.stage}.shard=true" if each.division == "sharded" else ""
            processes = f", {each.stage}.processes={each.gpus}" if each.gpus > 1 else ""
            head += f"# {each.stage}.micro_batch_tokens={each.micro_batch_tokens}{processes}{shard}\n"
    return head + yaml.safe_dump(table, sort_keys=False)
