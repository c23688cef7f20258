"""A run as a person sees it: bars on a terminal, one line per stage anywhere else, and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the local servers' data and of the runs.", envvar="RANKLOOP_HOME")
]

# What a stage's line shows of its summary; everything else is in MLflow.
SHOWN = {
    "ingest_rankings": ("read", "accepted", "duplicates", "quarantined"),
    "detect_drift": ("decision", "reason"),
    "validate_data": ("gate", "rankings", "raters", "prompts"),
    "train_sft": ("examples", "loss", "test_loss"),
    "train_reward_model": ("rankings", "reward_accuracy", "judge_accuracy"),
    "rater_study": ("folds", "never_seen", "usual", "difference"),
    "ppo_finetune": ("updates", "reward_before", "reward", "judge_reward", "kl_reference"),
    "dpo_finetune": ("rankings", "loss", "accuracy", "margin", "first_log_ratio"),
    "evaluate": ("gate", "win_rate_over_sft", "true_win_rate_over_sft", "win_rate_over_champion"),
    "register_model": ("version", "alias"),
}
HIDDEN = ("close_run",)


class Display:
    """Shows a run on a console; a context manager, so that the bar is taken down whatever happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def started(self, stage: str) -> None:
        if self._bars and stage not in HIDDEN:
            self._drop()
            self._task = self._bars.add_task(stage, total=None)

    def progress(self, stage: str, done: int, total: int | None, what: str) -> None:
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, description=f"{stage} {what}")

    def ended(self, event: dict[str, Any]) -> None:
        self._drop()
        stage = event["stage"]
        if stage not in HIDDEN:
            self._line("✓", stage, f"{event['seconds']:6.1f} s", describe(stage, event["summary"]))

    def reused(self, stage: str) -> None:
        self._line("=", stage, "  reused", "")

    def failed(self, event: dict[str, Any]) -> None:
        self._drop()
        self._line("✗", event["stage"], "", event["message"].splitlines()[0])

    def _drop(self) -> None:
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _line(self, sign: str, stage: str, time: str, text: str) -> None:
        self._console.print(f"{sign} {stage:20} {time:>8}  {text}", highlight=False, markup=False, soft_wrap=True)


def console_of() -> Console:
    """The terminal, or 140 columns where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def describe(stage: str, summary: Mapping[str, Any]) -> str:
    """`{"loss": 0.3123}` -> `loss 0.312`, for the keys that the stage's line shows."""
    shown = [(key, summary[key]) for key in SHOWN.get(stage, tuple(summary)) if key in summary]
    return "  ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in shown)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.3f}"
    return str(value)


def estimate(found: Mapping[str, Any] | None) -> str:
    """`{"value": .78, "low": .73, "high": .83}` -> `0.780 [0.730, 0.830]`."""
    if not found or found.get("value") is None:
        return "–"
    low, high = found.get("low"), found.get("high")
    return f"{found['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def table(title: str, rows: list[tuple[str, str]]) -> Table:
    result = Table(title=title, show_header=False, title_justify="left")
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows:
        result.add_row(name, value)
    return result
