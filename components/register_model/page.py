"""The registry's page: every version with its aliases, one version's lineage and gate, and the audit. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.register_model.aliases import CHAMPION
from components.register_model.audit import Record
from components.register_model.card import NAMES
from components.register_model.lineage import Artifact, Version, facts
from components.rlhf.report_page import Cell, Section, Table, render_page

CHANGES_SHOWN = 100
VERSIONS_SHOWN = 100


def registry_page(
    name: str,
    versions: Sequence[Version],
    shown: Version,
    lineage: Mapping[str, Artifact],
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[Record],
) -> str:
    """One HTML page.

    Args:
        versions: the newest first.
        shown: the version whose lineage and gate are shown.
        lineage: of that version, as `read_lineage` gives it.
        rows: of its gate.
        records: of the audit, the oldest first.
    """
    champion = next((each for each in versions if CHAMPION in each.aliases), None)
    note = f"Version {champion.number} is champion." if champion else "No version is champion yet."
    banner = ("pass" if shown.tags.get("gate") == "pass" else "fail", f"Gate of version {shown.number}: {shown.tags.get('gate')}.")
    return render_page(
        f"{name}: versions",
        f"{note} Below: version {shown.number}.",
        [banner],
        [
            Section("Versions", (), [Table("", VERSION_COLUMNS, [version_row(each) for each in versions[:VERSIONS_SHOWN]])]),
            Section(
                f"Lineage of version {shown.number}",
                ["Each artifact was made from those above it. The digest is of its rankloop.json, which holds those of its files."],
                [Table("", ["artifact", "what", "digest", "where"], _lineage(lineage))],
            ),
            Section(f"Gate of version {shown.number}", (), [Table("", ["measure", "verdict", "in words"], _gate(rows))]),
            Section(
                "Audit",
                ["The newest first; times in UTC."],
                [Table("", AUDIT_COLUMNS, audit_rows(records)[::-1][:CHANGES_SHOWN])],
            ),
        ],
    )


VERSION_COLUMNS = ("version", "aliases", "gate", "win rate over SFT", "over champion", "policy")


def version_row(version: Version) -> list[str]:
    """One version in a line, under `VERSION_COLUMNS`."""
    tags = version.tags
    gate = tags.get("gate", "") + (", rolled back" if tags.get("rolled_back_at") else "")
    rates = (tags.get(f"gate.win_rate_over_{other}", "") for other in ("sft", "champion"))
    return [version.number, " ".join(version.aliases), gate, *rates, tags.get("policy_uri", "")]


AUDIT_COLUMNS = ("record", "when", "what", "moves", "who", "evidence", "reason")


def audit_rows(records: Sequence[Record]) -> list[list[str]]:
    """A line for each change under `AUDIT_COLUMNS`; the record of its end is told with that of its beginning."""
    ends = {record.content["of"]: record.content for record in records if "of" in record.content}
    return [_audit_row(record, ends.get(record.number, {})) for record in records if "of" not in record.content]


def _audit_row(record: Record, end: Mapping[str, Any]) -> list[str]:
    content = record.content
    what = content["action"]
    if content["event"] == "begun":
        if not end:
            what += ", not ended"
        elif end["event"] != "done":
            what += f", {end['event']}"
        elif end["session"] != content["session"]:
            what += f", ended by {_who(end['by'])}"
    moves = [f"{each['model']} {each['alias']}: {each['from'] or 'none'} → {each['to'] or 'none'}" for each in content["moves"]]
    evidence = content.get("evidence", {})
    told = [f"{key} {evidence[key]}" for key in ("gate", "evaluation") if evidence.get(key)]
    told += [f"overruled: {each}" for each in evidence.get("objections", [])]
    when = content.get("at", "")[:19].replace("T", " ")
    return [str(record.number), when, what, "\n".join(moves), _who(content["by"]), "\n".join(told), content.get("reason", "")]


def _who(by: Mapping[str, str]) -> str:
    more = [by[key] for key in ("service_account", "command") if by.get(key)]
    return ", ".join([f"{by.get('user', '?')}@{by.get('host', '?')}", *more])


def _lineage(lineage: Mapping[str, Artifact]) -> list[list[Cell]]:
    return [[NAMES[key], facts(each), each.digest[:16] or None, each.uri] for key, each in lineage.items()]


def _gate(rows: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    return [[row["measure"], row["verdict"], row["sentence"]] for row in rows]
