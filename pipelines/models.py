"""`rankloop models`: what the registry holds."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from components.services.tracking import client, mlflow_errors


def list_versions(console: Console, name: str) -> None:
    """Prints the versions of a registered model, newest first, with aliases, gate and win rates."""
    with mlflow_errors():
        mlflow = client()
        found = mlflow.search_registered_models(f"name = '{name}'")
        versions = mlflow.search_model_versions(f"name = '{name}'") if found else []
    if not versions:
        console.print(f"{name} has no versions yet; `rankloop run` makes one", highlight=False)
        return
    aliases: dict[str, list[str]] = {}
    for alias, number in found[0].aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    listing = Table(title=name, title_justify="left")
    for column in ("version", "aliases", "gate", "win rate over SFT", "over champion", "policy"):
        listing.add_column(column, overflow="fold")
    for version in sorted(versions, key=lambda v: -int(v.version)):
        tags = version.tags
        listing.add_row(
            str(version.version),
            " ".join(sorted(aliases.get(str(version.version), []))),
            tags.get("gate", ""),
            tags.get("gate.win_rate_over_sft", ""),
            tags.get("gate.win_rate_over_champion", ""),
            tags.get("policy_uri", ""),
        )
    console.print(listing)
