"""`rankloop submit`, `status`, `logs` and `trigger`: runs in a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.services.exits import EXIT_DO_NOT_RETRY, DoNotRetry
from pipelines.arguments import Sources
from pipelines.display import console_of

if TYPE_CHECKING:
    from pipelines.cluster.connection import Connection
    from pipelines.cluster.events import Created
    from pipelines.cluster.submit import Order
    from pipelines.cluster.trigger import Triggered

app = typer.Typer()

Host = Annotated[
    str,
    typer.Option(help="KFP's address. Default: in a cluster its service, else http://localhost:8888.", envvar="RANKLOOP_KFP_HOST"),
]
Namespace = Annotated[
    str, typer.Option(help="Namespace, where KFP serves many. Default: the pod's, else rankloop.", envvar="RANKLOOP_KFP_NAMESPACE")
]
Profile = Annotated[str, typer.Option(help="Profile: a name (tiny, smollm2, llm-1b, llm-8b) or a YAML file.")]
Graph = Annotated[str, typer.Option(help="rlhf, or drift_watch, which runs it if the rankings drifted.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A stage's setting; repeatable.", metavar="STAGE.KEY=VALUE")]
Method = Annotated[str, typer.Option(help="What fine-tunes the policy: ppo, dpo or both. Default: the profile's.")]
Table = Annotated[str, typer.Option("--resources", help="gpu, lean, or a YAML file, see pipelines/resources.yaml.")]
Tags = Annotated[bool, typer.Option("--allow-tags", help="Take images by tag, to try something out.")]
Experiment = Annotated[str, typer.Option(help="KFP's experiment.")]
Account = Annotated[str, typer.Option(help="Service account of the stages' pods; empty: KFP's own.")]
Demonstrations = Annotated[str, typer.Option(help="JSONL for SFT, s3://.")]
Pretraining = Annotated[str, typer.Option(help="JSONL of text that PPO must not forget, s3://.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Id that `rankloop submit` printed.")]


def connect(host: str, namespace: str) -> Connection:
    from pipelines.cluster.connection import Address, Connection

    return Connection.of(Address(host, namespace))


def _order(
    graph: str, profile: str, sources: Sources, settings: list[str] | None, seed: int | None, method: str, table: str,
    tags: bool, experiment: str, account: str,
) -> Order:  # fmt: skip
    from pipelines import profile as profiles
    from pipelines import resources
    from pipelines.cluster.submit import Order

    resolved = profiles.load(profile, settings or (), seed, method, own_rankings=bool(sources.rankings))
    return Order(graph, resolved, sources, resources.load(table), tags, experiment, account)


@app.command()
def submit(
    rankings: Annotated[str, typer.Option(help="s3://bucket/prefix or hf://name. Default: the profile's simulated rankings.")] = "",
    profile: Profile = "tiny",
    graph: Graph = "rlhf",
    demonstrations: Demonstrations = "",
    pretraining: Pretraining = "",
    settings: Set = None,
    method: Method = "",
    seed: Annotated[int | None, typer.Option(help="Seed of every stage and of the simulation.")] = None,
    table: Table = "gpu",
    allow_tags: Tags = False,
    name: Annotated[str, typer.Option(help="Name of the run. Default: graph, profile and time.")] = "",
    experiment: Experiment = "rankloop",
    service_account: Account = "rankloop-stage",
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Starts a run in a cluster: uploads the graph if this content of it is not there yet, and prints the run's id and page."""
    from pipelines.cluster.submit import start

    sources = Sources(rankings, demonstrations, pretraining)
    order = _order(graph, profile, sources, settings, seed, method, table, allow_tags, experiment, service_account)
    started = start(connect(host, namespace), order, name)
    if started.version:
        print(f"version  {started.version.name}" + (", uploaded" if started.version.uploaded else ", there already"))
    print(f"run      {started.run_id}  {started.name}\npage     {started.page}")


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Id of a run. Default: list the newest.")] = "",
    count: Annotated[int, typer.Option(min=1, max=100, help="Runs to list.")] = 10,
    experiment: Experiment = "rankloop",
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Shows a run's stages, why one failed, and its MLflow run; or lists the newest runs. Exit code 65 if the run failed.

    The stages' own messages and MLflow's page are shown where RANKLOOP_STORAGE and MLFLOW_TRACKING_URI are set.
    """
    from pipelines.cluster import show
    from pipelines.cluster.status import newest_runs, run_of
    from pipelines.cluster.submit import experiment_named

    kfp, console = connect(host, namespace), console_of()
    if not run:
        found = experiment_named(kfp, experiment)
        console.print(show.runs(newest_runs(kfp, count, found) if found else []), highlight=False, markup=False)
        return
    if not show.status(console, kfp, run_of(kfp, run)):
        raise typer.Exit(EXIT_DO_NOT_RETRY)


@app.command()
def logs(
    run: Run,
    stage: Annotated[str, typer.Argument(metavar="[STAGE]", help="Stage, such as train_sft. Default: all that have a pod.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the last pod ends.")] = False,
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Prints the logs of a run's stages, each attempt after the other."""
    from pipelines.cluster.status import log_or_remedy, pods_of, run_of

    kfp = connect(host, namespace)
    pods = pods_of(run_of(kfp, run), stage)
    for pod in pods:
        if len(pods) > 1:
            print(f"==> {pod.stage}, pod {pod.pod}, {pod.state.lower()}", flush=True)
        for line in log_or_remedy(kfp, run, pod.pod, follow and pod is pods[-1]):
            print(line, flush=follow)


@app.command()
def trigger(
    below: Annotated[
        str, typer.Option(help="s3:// prefix: an event of an object elsewhere starts nothing. Without an event: what is read.")
    ],
    event: Annotated[Path | None, typer.Argument(help="File of the event; - for standard input.")] = None,
    key: Annotated[str, typer.Option(help="Instead of an event: names the occasion, such as a date; one run a key.")] = "",
    serve: Annotated[bool, typer.Option("--serve", help="Receive events over HTTP, signed with RANKLOOP_WEBHOOK_SECRET.")] = False,
    listen: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any.")] = 8787,
    rankings: Annotated[str, typer.Option(help="What the run reads: s3:// or hf://. Default: all that is below --below.")] = "",
    graph: Graph = "rlhf",
    profile: Profile = "tiny",
    settings: Set = None,
    method: Method = "",
    table: Table = "gpu",
    allow_tags: Tags = False,
    experiment: Experiment = "rankloop",
    service_account: Account = "rankloop-stage",
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Starts a run for an event: a new object in S3, MinIO or SeaweedFS, a CloudEvent, a date. The same event starts one run only.

    `--key` and an event can be given once each; cron: `rankloop trigger --below s3://labels/support --key $(date +%F)`.
    """
    from components.services.launch import STORAGE_VARIABLE
    from components.services.storage import Storage, split_uri
    from pipelines.cluster.trigger import Claims
    from pipelines.cluster.trigger import trigger as run_once

    if (event is not None) + bool(key) + serve != 1:
        raise DoNotRetry(
            "nothing, or too much, says what happened", "give a file of an event (- for standard input), --key, or --serve"
        )
    split_uri(below)
    root = os.environ.get(STORAGE_VARIABLE, "")
    if not root.startswith("s3://"):
        raise DoNotRetry(f"{STORAGE_VARIABLE} = {root!r} is not an S3 URI", "set it: what was started is kept there")
    sources = Sources(rankings or below, "", "")
    order = _order(graph, profile, sources, settings, None, method, table, allow_tags, experiment, service_account)
    kfp, claims = connect(host, namespace), Claims(Storage(), root)

    def start(created: Created) -> Triggered | None:
        if not created.uri.startswith(below.rstrip("/") + "/") and created.uri != below:
            return None
        return run_once(kfp, claims, order, f"{order.graph}\n{created.key}")

    if serve:
        _serve(listen, port, start)
    elif key:
        _told(below, run_once(kfp, claims, order, f"{order.graph}\n{below}\n{key}"))
    else:
        _from_event(sys.stdin.buffer.read() if str(event) == "-" else _read(event), start, below)


def _from_event(data: bytes, start: Callable[[Created], Triggered | None], below: str) -> None:
    from pipelines.cluster.events import parse

    created, others = parse(data)
    for each in created:
        started = start(each)
        if started is None:
            print(f"{each.uri} is not below {below}: nothing is started")
        else:
            _told(each.uri, started)
    if not created:
        print(f"no object was created ({others} other records): nothing is started")


def _told(uri: str, started: Triggered) -> None:
    print(f"{uri}: run {started.run_id}" + ("" if started.new else ", started before") + f"\n  {started.page}")


def _read(path: Path | None) -> bytes:
    from pipelines.cluster.webhook import BODY_BYTES

    assert path is not None
    try:
        with open(path, "rb") as file:
            data = file.read(BODY_BYTES + 1)
    except OSError as error:
        raise DoNotRetry(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > BODY_BYTES:
        raise DoNotRetry(f"{path} has more than {BODY_BYTES} bytes, which no event has")
    return data


def _serve(listen: str, port: int, start: Callable[[Created], Triggered | None]) -> None:
    from pipelines.cluster.webhook import Receiver, secret, serve

    key = secret()
    try:
        receiver = Receiver((listen, port), key, start)
    except OSError as error:
        raise DoNotRetry(
            f"{listen}:{port} cannot be listened on: {error.strerror or error}", "give another --listen or --port"
        ) from error
    print(f"listening on http://{listen}:{receiver.server_address[1]}/events", flush=True)
    serve(receiver)
