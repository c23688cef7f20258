"""`rankloop schedule`: recurring runs as a file says them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from components.services.exits import EXIT_DO_NOT_RETRY, DoNotRetry
from pipelines.cluster.commands import Host, Namespace, Tags, connect

app = typer.Typer(
    help="Recurring runs in a cluster, as a file says them; see pipelines/cluster/schedules.yaml.", no_args_is_help=True
)


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(help="YAML file of schedules.")],
    check: Annotated[bool, typer.Option("--check", help="Only show what differs; exit code 65 if anything does.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Delete schedules of `apply` that the file does not name.")] = False,
    allow_tags: Tags = False,
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Makes KFP's recurring runs those of the file; shows the difference first. A second time it changes nothing."""
    from components.services.launch import STORAGE_VARIABLE
    from components.services.storage import Storage
    from pipelines.cluster.schedules import lock, make, plan, read_file, wanted

    said = read_file(file)
    root = os.environ.get(STORAGE_VARIABLE, "")
    if not root.startswith("s3://"):
        raise DoNotRetry(f"{STORAGE_VARIABLE} = {root!r} is not an S3 URI", "set it: a lock there keeps two from applying at once")
    kfp = connect(host, namespace)
    wishes = [wanted(kfp, name, each, file.parent, allow_tags, check) for name, each in said.schedules.items()]
    with nullcontext() if check else lock(Storage(), root):
        steps = plan(kfp, wishes, prune)
        for step in steps:
            print(step.name)
            for reason in step.reasons:
                print(f"  {reason}")
        if not steps:
            print("all as it should be")
        elif check:
            raise typer.Exit(EXIT_DO_NOT_RETRY)
        else:
            make(kfp, steps)
            left = plan(kfp, wishes, prune)
            if left:
                raise DoNotRetry(f"KFP does not hold what it was given: {', '.join(each.name for each in left)}", "apply again")
            print("applied")


@app.command("list")
def list_(host: Host = "", namespace: Namespace = "") -> None:
    """Lists the recurring runs that `apply` made."""
    from pipelines.cluster.schedules import is_enabled, ours

    for name, found in sorted(ours(connect(host, namespace)).items()):
        for each in found:
            cron = each.trigger.cron_schedule.cron if each.trigger and each.trigger.cron_schedule else ""
            print(f"{name}  {cron}  {'enabled' if is_enabled(each) else 'disabled'}  {each.recurring_run_id}")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Deletes a schedule that `apply` made. Its runs stay, and one that is under way goes on."""
    from pipelines.cluster.schedules import ours, remove

    kfp = connect(host, namespace)
    known = ours(kfp)
    if name not in known:
        raise DoNotRetry(f"there is no schedule {name!r}; known: {', '.join(sorted(known)) or 'none'}")
    for each in known[name]:
        remove(kfp, str(each.recurring_run_id))
        print(f"deleted {name}, recurring run {each.recurring_run_id}")
