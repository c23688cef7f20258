"""The policy that is in service: the version of the registered model that carries the alias `champion`."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from components.services.exits import DoNotRetry
from components.services.tracking import carrier_of

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
    if (found := carrier_of(policy_name, ALIAS)) is None:
        return None
    version, tags = found
    if not tags.get(URI_TAG):
        raise DoNotRetry(
            f"version {version} of {policy_name} is {ALIAS} but has no tag {URI_TAG}, so its policy cannot be loaded",
            f"set the tag to the s3:// folder of that policy, or take the alias {ALIAS} off it",
        )
    return Champion(version, tags[URI_TAG])
