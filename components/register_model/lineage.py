"""What a version was made from: its artifacts on S3 with their digests, and the facts about them that a reader asks first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from components.register_model.aliases import OWNED
from components.services.exits import DoNotRetry
from components.services.storage import MARKER, Storage, join
from components.services.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Name of an artifact: the tag of a policy's version that holds its URI.
ARTIFACTS = {
    "snapshot": "snapshot_uri",
    "sft": "sft_uri",
    "reward_model": "reward_model_uri",
    "judge_model": "judge_model_uri",
    "policy": "policy_uri",
    "evaluation": "evaluation_uri",
}
DIGEST_TAG = "digest.{}"  # of an artifact: SHA-256 of its rankloop.json, which holds the digests of its files


class Artifact(NamedTuple):
    """A published folder.

    Fields:
        name: key of `ARTIFACTS`.
        digest: SHA-256 of its marker's bytes; "" if there is none.
        marker: the content of its `rankloop.json`; empty if there is none.
    """

    name: str
    uri: str
    digest: str
    marker: dict[str, Any]


class Version(NamedTuple):
    """A version in the registry, with the aliases that it carries."""

    number: str
    aliases: list[str]
    tags: dict[str, str]
    card: str


def read_lineage(storage: Storage, tags: Mapping[str, str]) -> dict[str, Artifact]:
    """The artifacts that a version's tags name, in the order in which they were made."""
    return {name: read_artifact(storage, name, tags[tag]) for name, tag in ARTIFACTS.items() if tags.get(tag)}


def read_artifact(storage: Storage, name: str, uri: str) -> Artifact:
    """One artifact; without digest if its folder is gone."""
    place = join(uri, MARKER)
    if not storage.exists(place):
        return Artifact(name, uri, "", {})
    data = storage.get_bytes(place)
    return Artifact(name, uri, hashlib.sha256(data).hexdigest(), json.loads(data))


def digest_tags(lineage: Mapping[str, Artifact]) -> dict[str, str]:
    """Tags that hold the digest of each artifact, and through it of every file of every artifact."""
    return {DIGEST_TAG.format(name): each.digest for name, each in lineage.items() if each.digest}


def facts(artifact: Artifact) -> str:
    """What a reader asks first about an artifact, in one line; "" if nothing is known."""
    marker, said = artifact.marker, []
    if artifact.name == "snapshot":
        said = [f"{marker[key]} {key}" for key in ("rankings", "prompts", "raters", "pairs") if key in marker]
        said += ["sources " + ", ".join(marker["sources"])] if marker.get("sources") else []
    elif artifact.name in ("reward_model", "judge_model"):
        said = [f"{marker['rankings']} rankings"] if "rankings" in marker else []
        said += [f"accuracy {interval(marker['accuracy'])}"] if "accuracy" in marker else []
    elif artifact.name in ("sft", "policy"):
        said = [marker["stage"]] if marker.get("stage") else []
        summary = marker.get("summary", {})
        shown = ("examples", "loss", "test_loss", "updates", "reward", "judge_reward", "kl_reference", "accuracy", "margin")
        said += [f"{key.replace('_', ' ')} {_number(summary[key])}" for key in shown if key in summary]
    elif artifact.name == "evaluation":
        said = [f"gate {marker['gate']}"] if "gate" in marker else []
    return ", ".join(said)


def interval(estimate: Mapping[str, Any]) -> str:
    """`0.781 (0.761 to 0.801)`."""
    value, low, high = (estimate.get(end) for end in ("value", "low", "high"))
    if value is None:
        return "unknown"
    return f"{value:.3g}" + ("" if low is None or high is None else f" ({low:.3g} to {high:.3g})")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def read_versions(client: MlflowClient, name: str) -> list[Version]:
    """Every version of a registered model, the newest first; none if it is not registered."""
    with mlflow_errors():
        registered = client.search_registered_models(f"name = '{name}'")
        found = client.search_model_versions(f"name = '{name}'") if registered else []
    carried: dict[str, list[str]] = {}
    for alias, number in registered[0].aliases.items() if registered else ():
        carried.setdefault(str(number), []).append(alias)
    order = {alias: place for place, alias in enumerate(OWNED)}
    return [
        Version(
            str(each.version),
            sorted(carried.get(str(each.version), []), key=lambda alias: (order.get(alias, len(order)), alias)),
            dict(each.tags),
            each.description or "",
        )
        for each in sorted(found, key=lambda version: -int(version.version))
    ]


def pick(versions: list[Version], name: str, wanted: str) -> Version:
    """The version with this number or alias.

    Raises:
        DoNotRetry: there is none; the message lists what there is.
    """
    for version in versions:
        if wanted in (version.number, *version.aliases):
            return version
    if not versions:
        raise DoNotRetry(f"{name} has no versions yet", "`rankloop run` makes one")
    there = ", ".join(f"{each.number} ({' '.join(each.aliases)})" if each.aliases else each.number for each in versions)
    raise DoNotRetry(f"{name} has no version or alias {wanted!r}", f"there are: {there}")
