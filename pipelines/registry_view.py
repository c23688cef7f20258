"""The registry for a person on a terminal, and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from components.register_model.card import NAMES
from components.register_model.lineage import DIGEST_TAG, Artifact, Version, facts, pick, read_lineage, read_versions
from components.register_model.page import AUDIT_COLUMNS, VERSION_COLUMNS, audit_rows, registry_page, version_row
from components.register_model.promotion import Registry
from components.register_model.verdict import read_verdict
from components.services.exits import DoNotRetry

PARENTS = {"sft": "snapshot", "reward_model": "sft", "judge_model": "sft", "policy": "reward_model", "evaluation": "policy"}


def versions_table(registry: Registry) -> Table | str:
    """The versions, newest first, with aliases, gate and win rates."""
    versions = read_versions(registry.client, registry.policy)
    if not versions:
        return f"{registry.policy} has no versions yet; `rankloop run` makes one"
    return _table(registry.policy, VERSION_COLUMNS, [version_row(each) for each in versions])


def show_version(console: Console, registry: Registry, wanted: str, card: bool) -> None:
    """Prints a version's lineage and gate, or its card as it stands in the registry."""
    version = pick(read_versions(registry.client, registry.policy), registry.policy, wanted)
    if card:
        print(version.card)
        return
    console.print(lineage_tree(registry.policy, version, read_lineage(registry.storage, version.tags)), highlight=False)
    rows = gate_rows(registry, version)
    columns = ("measure", "value", "low", "high", "required", "threshold", "verdict")
    keys = ("measure", "value", "low", "high", "relation", "threshold", "verdict")
    if rows:
        console.print(_table("Gate", columns, [[_cell(row[key]) for key in keys] for row in rows]), highlight=False)
    for row in rows:
        if row["verdict"] == "fail":
            console.print(f"fails: {row['sentence']}", highlight=False, markup=False)


def gate_rows(registry: Registry, version: Version) -> list[dict[str, Any]]:
    """The gate of a version, decided from its evaluation's numbers; no rows if there is no evaluation any more."""
    try:
        return read_verdict(registry.storage, version.tags.get("evaluation_uri", "")).rows
    except DoNotRetry:
        return []


def lineage_tree(name: str, version: Version, lineage: Mapping[str, Artifact]) -> Tree:
    """Data snapshot → SFT → reward model and judge → policy → evaluation, each with what is known of it."""
    carried = f" ({', '.join(version.aliases)})" if version.aliases else ""
    reward = version.tags.get("reward_model_version")
    pair = f", with {version.tags.get('reward_model_name')} version {reward}" if reward else ""
    root = Tree(Text(f"{name} version {version.number}{carried}{pair}, gate {version.tags.get('gate', 'unknown')}", style="bold"))
    nodes: dict[str, Tree] = {}
    for key, artifact in lineage.items():
        parent = PARENTS.get(key, "")
        while parent and parent not in nodes:  # DPO's policy has no reward model, a lost tag no parent
            parent = PARENTS.get(parent, "")
        nodes[key] = (nodes[parent] if parent else root).add(_node(artifact, version.tags))
    return root


def _node(artifact: Artifact, tags: Mapping[str, str]) -> Text:
    text = Text(NAMES[artifact.name], style="bold")
    text.append(f"  {facts(artifact)}", style="not bold")
    text.append(f"\n{artifact.uri}", style="not bold")
    noted = tags.get(DIGEST_TAG.format(artifact.name), "")
    state = artifact.digest[:16] or "missing: its rankloop.json is gone"
    if noted and artifact.digest and noted != artifact.digest:
        state += f", but {noted[:16]} was registered"
    text.append(f"\ndigest {state}", style="not bold")
    return text


def write_page(registry: Registry, wanted: str, path: Path) -> None:
    """Writes versions, lineage, gate and audit as one HTML page."""
    versions = read_versions(registry.client, registry.policy)
    version = pick(versions, registry.policy, wanted)
    lineage = read_lineage(registry.storage, version.tags)
    records = registry.audit.records()
    html = registry_page(registry.policy, versions, version, lineage, gate_rows(registry, version), records)
    path.write_text(html, encoding="utf-8")


def print_audit(console: Console, registry: Registry, as_json: bool) -> None:
    """Prints every record, the oldest first."""
    records = registry.audit.records()
    if as_json:
        for record in records:
            print(json.dumps(record.content, sort_keys=True))
    elif not records:
        console.print(f"no alias of {registry.policy} has been moved yet", highlight=False)
    else:
        console.print(_table("Audit", AUDIT_COLUMNS, audit_rows(records)), highlight=False)


def _table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=any("\n" in cell for row in rows for cell in row))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
