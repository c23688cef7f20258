"""A run in a cluster as a person sees it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.cluster.connection import Connection
from pipelines.cluster.status import attempts_of, said_by, tasks_of

SIGNS = {"SUCCEEDED": "✓", "SKIPPED": "=", "FAILED": "✗", "CANCELED": "✗", "RUNNING": "…", "PENDING": "…"}


def runs(found: list[Any]) -> Table | str:
    """The runs, the newest first."""
    if not found:
        return "no runs"
    table = Table(box=None, pad_edge=False)
    for title in ("run", "name", "state", "created", "by"):
        table.add_column(title, no_wrap=title == "run")
    for each in found:
        by = "schedule" if each.recurring_run_id else ""
        table.add_row(each.run_id, each.display_name, str(each.state or "").lower(), str(each.created_at or "")[:19], by)
    return table


def status(console: Console, kfp: Connection, run: Any) -> bool:
    """Prints the run's state, its stages, and why it failed; whether it did not fail."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    state = str(run.state or "unknown")
    line(f"{run.display_name}: {state.lower()}" + (f", created {str(run.created_at)[:19]} UTC" if run.created_at else ""))
    tasks = attempts_of(tasks_of(run))
    for task in tasks:
        seconds = "" if task.seconds is None else f"{task.seconds:.1f} s"
        line(f"{SIGNS.get(task.state, ' ')} {task.stage:20} {seconds:>10}  {task.state.lower()}  {task.pod}".rstrip())
    page, failures, silent = said_by(str(run.run_id))
    for failure in failures:
        line(f"{failure.stage} failed: {failure.message}")
    if run.error and run.error.message:
        line(f"KFP: {' '.join(str(run.error.message).split())[:500]}")
    told = {each.stage for each in failures}
    for task in tasks:
        if task.error and task.stage not in told:
            line(f"{task.stage}: {task.error}")
    line(f"page     {kfp.page_of(str(run.run_id))}")
    if page:
        line(f"MLflow   {page}")
    for each in silent:
        line(f"not known: {each}")
    return state not in ("FAILED", "CANCELED")
