"""The command line: `rankloop run`, `watch`, `plan`, `compile`, `services`, `models`; those for a cluster are below `cluster/`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from components.services.exits import EXIT_INTERRUPTED, StageFailure
from pipelines import models
from pipelines.arguments import Sources
from pipelines.capacity.command import plan
from pipelines.cluster import bucket, commands, schedule_commands
from pipelines.display import Home, console_of

app = typer.Typer(
    help="Human rankings → reward model → PPO or DPO → a gated, registered policy, as a Kubeflow pipeline or on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(models.app, name="models")
app.command()(plan)
app.add_typer(bucket.app, name="bucket")
app.add_typer(commands.app)
app.add_typer(schedule_commands.app, name="schedule")


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="Profile: a name (tiny, smollm2, llm-1b, llm-8b) or a YAML file.")] = "tiny",
    rankings: Annotated[
        str, typer.Option(help="File, folder, s3://bucket/prefix or hf://name. Default: the profile's simulated rankings.")
    ] = "",
    demonstrations: Annotated[str, typer.Option(help='JSONL of {"prompt", "completion"} for SFT: file or s3:// object.')] = "",
    pretraining: Annotated[
        str, typer.Option(help='JSONL of {"text"} that PPO must not forget: file or s3:// object; needs pretraining_coefficient.')
    ] = "",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="A stage's setting, as stage.key=value; repeatable.", metavar="STAGE.KEY=VALUE"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="What fine-tunes the policy: ppo, dpo, or both, of which the evaluation chooses. Default: the profile's."
        ),
    ] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of every stage and of the simulation.")] = None,
    home: Home = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every task again instead of taking KFP's cached results.")] = False,
) -> None:
    """Runs the whole loop on this machine: KFP's local runner, a real S3 server, a real MLflow server.

    Each stage's keys are listed by `python -m components.STAGE --help`. Exit codes: 0 done, 65 do not retry (bad data or
    configuration, gate failed, diverged), 75 retry (a service or the disk failed), 130 interrupted.
    """
    from pipelines import laptop
    from pipelines import profile as profile_file
    from pipelines.local_services import default_home

    resolved = profile_file.load(profile, assignments or (), seed, method, own_rankings=bool(rankings))
    sources = Sources(*map(_absolute, (rankings, demonstrations, pretraining)))
    code = laptop.run(resolved, sources, home or default_home(), fresh, console_of())
    raise typer.Exit(code)


@app.command()
def watch(
    rankings: Annotated[str, typer.Option(help="File, folder, s3://bucket/prefix or hf://name: all rankings, old and new.")],
    profile: Annotated[str, typer.Option(help="Profile: a name (tiny, smollm2, llm-1b, llm-8b) or a YAML file.")] = "tiny",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="A stage's setting, as stage.key=value; repeatable.", metavar="STAGE.KEY=VALUE"),
    ] = None,
    method: Annotated[str, typer.Option(help="What fine-tunes the policy in a retrain: ppo, dpo or both.")] = "",
    home: Home = None,
) -> None:
    """Looks whether the rankings that are new since the champion are still like its own, and retrains if not. Run it on a schedule.

    `--set detect_drift.dry_run=true` only looks. Exit codes are those of `rankloop run`; waiting is a success.
    """
    from pipelines import laptop
    from pipelines import profile as profile_file
    from pipelines.local_services import default_home

    resolved = profile_file.load(profile, assignments or (), None, method, own_rankings=True)
    sources = Sources(_absolute(rankings), "", "")
    raise typer.Exit(laptop.run(resolved, sources, home or default_home(), False, console_of(), "drift_watch"))


@app.command()
def compile(
    output: Annotated[Path | None, typer.Option(help="File to write. Default: the graph's name and .yaml.")] = None,
    graph: Annotated[
        str,
        typer.Option(help="rlhf; drift_watch: to be scheduled, runs rlhf if rankings drifted; sharded_ingest: many pods read."),
    ] = "rlhf",
    resources: Annotated[
        str,
        typer.Option(help="gpu: every stage a GPU pod; lean: those that use them; or a YAML file, see pipelines/resources.yaml."),
    ] = "gpu",
    form: Annotated[
        str, typer.Option("--format", help="kfp: to upload; kubernetes: Pipeline and PipelineVersion objects to apply.")
    ] = "kfp",
    namespace: Annotated[str, typer.Option(help="Namespace of the Kubernetes objects.")] = "rankloop",
    allow_tags: Annotated[
        bool, typer.Option("--allow-tags", help="Take images by tag, to try something out; otherwise a digest is demanded.")
    ] = False,
) -> None:
    """Writes a graph for a Kubeflow cluster, checked against the policy that every pod has to keep.

    The images are those of RANKLOOP_DATA_IMAGE and RANKLOOP_TRAIN_IMAGE, by digest: REGISTRY/NAME@sha256:…
    """
    from pipelines.package import write_package
    from pipelines.resources import load

    table = load(resources)
    path = output or Path(f"{graph}.yaml")
    written = write_package(graph, table, path, form, allow_tags, namespace)
    pods = [written.stage(label) for label in written.executors()]
    with_gpus = sum(table.gpus(stage) > 0 for stage in pods)
    console_of().print(f"wrote {path}: {len(pods)} tasks, {with_gpus} with GPUs, {path.stat().st_size:,} bytes", highlight=False)


@app.command()
def services(home: Home = None) -> None:
    """Starts the local S3 and MLflow servers and keeps them up until Ctrl-C."""
    from pipelines.local_services import QUIET, LocalServices, default_home

    console, interrupted = console_of(), threading.Event()
    with LocalServices(home or default_home()) as running:
        # A shell script starts what it puts in the background with SIGINT ignored, and then Python raises no KeyboardInterrupt.
        signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        console.print(f"MLflow: {running.tracking_uri}\nS3 bucket: {running.storage_root}\n", highlight=False)
        console.print("For stages in another shell:", highlight=False)
        for key, value in running.environment.items():
            if key not in QUIET:
                print(f"export {key}={value}")
        console.print("\nCtrl-C stops them." if not running.attached else "\nThey belong to another process.", highlight=False)
        sys.stdout.flush()
        while not running.attached and not interrupted.wait(1):
            running.check()
        if interrupted.is_set():
            raise KeyboardInterrupt


def _absolute(place: str) -> str:
    """A local path as one that does not depend on the current folder; a URI, or nothing, as it is."""
    return place if "://" in place or not place else str(Path(os.path.expanduser(place)).resolve())


def _version(value: bool) -> None:
    if value:
        print(version("rankloop"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Shows the version and ends.")] = False,
) -> None:
    pass


def main() -> None:
    """The console script. A failure is a message and an exit code, never a traceback."""
    try:
        app()
    except StageFailure as failure:
        print(f"rankloop: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
