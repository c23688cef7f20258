"""The policy that is watched for: the version with the alias `champion`, and what it was made from, by its tags."""

from __future__ import annotations

from typing import NamedTuple

from components.services.exits import DoNotRetry
from components.services.tracking import client, mlflow_errors

ALIAS = "champion"
TAGS = ("policy_uri", "snapshot_uri", "reward_model_uri")  # register_model writes them on every version of a policy


class Champion(NamedTuple):
    """Version in the registry; its policy, the snapshot that it learned from, and the reward model behind it."""

    version: str
    policy_uri: str
    snapshot_uri: str
    reward_model_uri: str


def find_champion(policy_name: str) -> Champion | None:
    """The champion, or None if no such model is registered or none of its versions is champion.

    Raises:
        DoNotRetry: there is no registry, or the champion's version does not say what it was made from.
        Retry: the registry cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_errors():
        registry = client()
        try:
            aliases = registry.get_registered_model(policy_name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if ALIAS not in aliases:
            return None
        version = str(aliases[ALIAS])
        tags = registry.get_model_version(policy_name, version).tags
    if missing := [tag for tag in TAGS if not tags.get(tag)]:
        raise DoNotRetry(
            f"version {version} of {policy_name} is {ALIAS} but has no tag {', '.join(missing)}, so there is nothing to compare",
            f"register it with register_model, or take the alias {ALIAS} off it",
        )
    return Champion(version, *(tags[tag] for tag in TAGS))


def tag_version(policy_name: str, version: str, tag: str, text: str) -> None:
    """Notes something on a version of the policy."""
    with mlflow_errors():
        client().set_model_version_tag(policy_name, version, tag, text[:5000])
