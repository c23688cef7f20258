"""The policy that is in service: the version of the registered model that carries the alias `champion`."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from components.services.exits import DoNotRetry
from components.services.tracking import client, mlflow_errors

ALIAS = "champion"
URI_TAG = "policy_uri"  # register_model writes it on every version of a policy

_log = logging.getLogger(__name__)


class Champion(NamedTuple):
    """Version in the registry, and the policy's folder on S3."""

    version: str
    uri: str


def find_champion(policy_name: str) -> Champion | None:
    """The champion, or None if no such model is registered, none of its versions is champion, or there is no registry.

    Raises:
        DoNotRetry: the champion's version does not say where its policy is.
        Retry: the registry cannot be reached; an evaluation that does not know the champion must not pass for one without.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        _log.warning("MLFLOW_TRACKING_URI is not set: there is no registry, so no champion to compare with")
        return None
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
    if not tags.get(URI_TAG):
        raise DoNotRetry(
            f"version {version} of {policy_name} is {ALIAS} but has no tag {URI_TAG}, so its policy cannot be loaded",
            f"set the tag to the s3:// folder of that policy, or take the alias {ALIAS} off it",
        )
    return Champion(version, tags[URI_TAG])
