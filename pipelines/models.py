"""`rankloop models`: what the registry holds, what it was made from, and who moved its aliases; and the commands that move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.services.exits import EXIT_DO_NOT_RETRY, DoNotRetry
from pipelines.display import Home, console_of

if TYPE_CHECKING:
    from components.register_model.promotion import Registry

app = typer.Typer(
    help="Versions of the policy: list, show, compare and verify them; promote one, or roll back. Without a command: list.\n\n"
    "Works on the servers of `--home`, or on those in the environment if MLFLOW_TRACKING_URI and RANKLOOP_STORAGE are set "
    "(with the AWS_* variables; `rankloop services` prints all of them) and `--home` is not given.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Name = Annotated[str, typer.Option("--name", help="Name of the registered policy.")]
Wanted = Annotated[str, typer.Argument(metavar="VERSION", help="Number of a version, or an alias.")]
LOCK_SECONDS = 60.0
POLICY = "rankloop-policy"


@contextmanager
def _registry(home: Path | None, name: str, command: str) -> Iterator[Registry]:
    """The registry on the servers that the command works on."""
    import os

    from components.register_model.audit import acting
    from components.register_model.promotion import Registry
    from components.services.launch import STORAGE_VARIABLE
    from components.services.storage import Storage, join
    from components.services.tracking import client
    from pipelines.local_services import LocalServices, default_home, environment_of

    given = {key: os.environ.get(key, "") for key in ("MLFLOW_TRACKING_URI", STORAGE_VARIABLE)}
    if home is None and any(given.values()) and not all(given.values()):
        missing = next(key for key, value in given.items() if not value)
        raise DoNotRetry(f"{missing} is not set, but {next(k for k, v in given.items() if v)} is", "set both, or neither")
    remote = home is None and all(given.values())
    with nullcontext() if remote else LocalServices(home or default_home()) as running:
        with environment_of(running) if running else nullcontext():
            uri = join(os.environ[STORAGE_VARIABLE], "registry", name)
            yield Registry(client(), Storage(), uri, name, LOCK_SECONDS, acting(f"rankloop models {command}"))


@app.callback()
def _default(context: typer.Context, name: Name = POLICY, home: Home = None) -> None:
    if context.invoked_subcommand is None:
        list_(name, home)
        return
    # What is given before the command counts for the command.
    context.default_map = {context.invoked_subcommand: {"name": name, **({"home": str(home)} if home else {})}}


@app.command("list")
def list_(name: Name = POLICY, home: Home = None) -> None:
    """Lists the versions, the newest first, with aliases, gate and win rates."""
    from pipelines.registry_view import versions_table

    with _registry(home, name, "list") as registry:
        console_of().print(versions_table(registry), highlight=False, markup=False)


@app.command()
def show(
    version: Wanted = "champion",
    card: Annotated[bool, typer.Option("--card", help="Print the model card (Markdown) instead.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write all of it, with the audit, as an HTML page.", metavar="FILE")] = None,
    name: Name = POLICY,
    home: Home = None,
) -> None:
    """Shows a version: its lineage as a tree with digests and metrics, and the table of its gate."""
    from pipelines.registry_view import show_version, write_page

    with _registry(home, name, "show") as registry:
        if page is not None:
            write_page(registry, version, page)
            console_of().print(f"wrote {page}", highlight=False)
        else:
            show_version(console_of(), registry, version, card)


@app.command()
def promote(
    version: Wanted,
    reason: Annotated[str, typer.Option(help="Why; kept in the audit.")],
    force: Annotated[bool, typer.Option("--force", help="Though its gate failed, or compared it with another champion.")] = False,
    name: Name = POLICY,
    home: Home = None,
) -> None:
    """Makes a version champion by hand, with its reward model.

    Refuses (exit code 65) if its gate failed, if it was compared with another champion than the present one, or if it was rolled
    back, unless `--force`. Who did it, why, and what was overruled stand in the audit.
    """
    from pipelines.registry_moves import promote_by_hand

    with _registry(home, name, "promote") as registry:
        console_of().print(promote_by_hand(registry, version, reason, force), highlight=False, markup=False)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the audit.")] = "",
    name: Name = POLICY,
    home: Home = None,
) -> None:
    """Makes `previous_champion` champion again, with its reward model.

    The two change places, so a second rollback undoes the first. What is rolled back is promoted by hand only: a pipeline
    that meets it again leaves it as challenger.
    """
    from pipelines.registry_moves import roll_back

    with _registry(home, name, "rollback") as registry:
        console_of().print(roll_back(registry, reason), highlight=False, markup=False)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Version or alias.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Version or alias.")],
    prompts: Annotated[
        str, typer.Option(help='JSONL of {"prompt"}: file or s3:// object. Default: held-out ones of A\'s data.')
    ] = "",
    count: Annotated[int, typer.Option(min=2, help="Prompts to ask, at most.")] = 64,
    judge: Annotated[str, typer.Option(help="s3:// folder of the judge. Default: A's.")] = "",
    shown: Annotated[int, typer.Option("--show", min=0, help="Prompts to show with both answers.")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSONL file for all answers and scores.", metavar="FILE")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of prompts, of sampling and of the bootstrap.")] = 0,
    name: Name = POLICY,
    home: Home = None,
) -> None:
    """Lets two versions answer the same prompts, with the same random numbers: both answers, and A's win rate by the judge."""
    from pipelines.compare_models import compare_versions

    with _registry(home, name, "compare") as registry:
        compare_versions(console_of(), registry, (a, b), prompts, count, judge, shown, output, seed)


@app.command()
def verify(
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help="Number or alias. Default: every version.")] = "",
    name: Name = POLICY,
    home: Home = None,
) -> None:
    """Recomputes every digest from S3: data, models, evaluation, what MLflow serves, and the chain of the audit.

    Exit code 65 if anything differs; each file that does is named.
    """
    from pipelines.verify_models import verify_registry

    with _registry(home, name, "verify") as registry:
        if not verify_registry(console_of(), registry, version):
            raise typer.Exit(EXIT_DO_NOT_RETRY)


@app.command()
def audit(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, as on S3.")] = False,
    name: Name = POLICY,
    home: Home = None,
) -> None:
    """Tells who or what moved which alias when, on which evidence; the oldest first."""
    from pipelines.registry_view import print_audit

    with _registry(home, name, "audit") as registry:
        print_audit(console_of(), registry, as_json)
