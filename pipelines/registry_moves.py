"""What a person does to the registry: promote a version, or go back to the one before."""

from __future__ import annotations

from components.register_model.aliases import CHAMPION, companion_of
from components.register_model.lineage import pick, read_versions
from components.register_model.promotion import Registry
from components.register_model.verdict import objections
from components.services.exits import DoNotRetry


def promote_by_hand(registry: Registry, wanted: str, reason: str, force: bool) -> str:
    """Makes a version champion; says what was done.

    Raises:
        DoNotRetry: no reason was given; or something speaks against it and it is not forced; nothing was moved.
    """
    if not reason.strip():
        raise DoNotRetry("no reason was given", "say why: --reason TEXT")
    champion = registry.settle()[registry.policy].get(CHAMPION, "")
    version = pick(read_versions(registry.client, registry.policy), registry.policy, wanted)
    if version.number == champion:
        return f"version {champion} of {registry.policy} is champion already"
    against = objections(registry.storage, version.tags, champion)
    if against and not force:
        raise DoNotRetry(
            f"version {version.number} of {registry.policy} is not promoted:\n" + "\n".join(f"  - {each}" for each in against),
            "run the pipeline again, or overrule this with --force; the audit will say so",
        )
    evidence = {
        "gate": version.tags.get("gate", ""),
        "evaluation": version.tags.get("evaluation_uri", ""),
        "policy": version.tags.get("policy_uri", ""),
        "objections": against,
    }
    # The champion that was looked at above: if it has changed since, so has what speaks against this.
    record = registry.promote(version.number, companion_of(version.tags), champion, evidence, reason, by_hand=True)
    number = f", record {record.number} of the audit" if record else ""
    return f"champion of {registry.policy}: version {champion or 'none'} → {version.number}{number}"


def roll_back(registry: Registry, reason: str) -> str:
    """Makes the previous champion champion again; says what was done."""
    record = registry.rollback(reason)
    if record is None:
        return "nothing was moved"
    evidence = record.content["evidence"]
    return f"champion of {registry.policy}: version {evidence['from']} → {evidence['to']}, record {record.number} of the audit"
