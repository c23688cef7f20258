"""What the bucket of a cluster is to hold as its settings: pure, from names and days to the documents that S3 takes.

    wanted("s3://rankloop", Principals(stage=(arn,), reader=(arn,)), Days(), tls=True)

Three settings, each a document of S3's API:

1. versioning: on, so that nothing that is overwritten or deleted is gone at once;
2. lifecycle: how long checkpoints, old versions and back-ups stay;
3. policy: what is denied. It grants nothing: IAM roles do on AWS, identities on SeaweedFS; a denial holds whatever these grant.

Statements and rules of others, whose names do not begin as ours do, are kept as they are.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from components.services.storage import split_uri

KEPT = (  # what stages publish, and never delete: a run may be resumed, compared, audited or rolled back to from it
    *("rankings", "validations", "policies", "reward_models", "rater_studies", "evaluations", "looks", "judge_replies", "registry"),
)
OTHERS = ("mlflow", "backups")  # written by MLflow's server and by the back-up of its database
STATEMENT = "Rankloop"  # how the Sid of our statements begins
RULE = "rankloop-"  # and the ID of our lifecycle rules

_WRITES = ("s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion")
_SETTINGS = (
    *("s3:PutBucketVersioning", "s3:PutLifecycleConfiguration", "s3:PutBucketPolicy", "s3:DeleteBucketPolicy"),
    *("s3:PutBucketAcl", "s3:DeleteBucket"),
)

Settings = dict[str, Any]


class Principals(NamedTuple):
    """ARNs by which the store knows its callers: `arn:aws:iam::ACCOUNT:role/NAME` on AWS, `.../user/NAME` on SeaweedFS."""

    stage: tuple[str, ...]
    reader: tuple[str, ...]


class Days(NamedTuple):
    """How long things stay, in days."""

    checkpoints: int = 30
    """A checkpoint that nobody has replaced: its training was given up. Its older versions stay for a day."""
    versions: int = 90
    """What was overwritten or deleted."""
    backups: int = 35
    """Dumps of MLflow's database."""
    uploads: int = 7
    """Parts of an upload that never ended."""
    runs: int = 30
    """What the stages of one pipeline run, and its retries, leave for each other."""


def wanted(storage: str, principals: Principals, days: Days, tls: bool) -> Settings:
    """The three documents.

    Args:
        storage: `s3://bucket[/prefix]`, below which every artifact lies.
        tls: whether to deny requests without TLS: yes, but for a server inside the cluster that speaks plain HTTP.

    Raises:
        DoNotRetry: `storage` is not an S3 URI.
    """
    bucket, prefix = split_uri(storage.rstrip("/"))
    below = f"{prefix}/" if prefix else ""
    everything = f"arn:aws:s3:::{bucket}/{below}*"

    def objects(names: Sequence[str]) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{below}{name}/*" for name in names]

    def deny(name: str, who: Sequence[str], actions: Sequence[str], where: Sequence[str]) -> dict[str, Any]:
        principal = {"AWS": list(who)}
        return {"Sid": STATEMENT + name, "Effect": "Deny", "Principal": principal, "Action": list(actions), "Resource": list(where)}

    statements = [
        deny("KeepArtifacts", principals.stage, ["s3:DeleteObject"], objects(KEPT)),
        deny("KeepVersions", principals.stage, ["s3:DeleteObjectVersion"], [everything]),
        deny("KeepOut", principals.stage, _WRITES, objects(OTHERS)),
        deny("KeepSettings", [*principals.stage, *principals.reader], _SETTINGS, [f"arn:aws:s3:::{bucket}"]),
        deny("ReadOnly", principals.reader, [*_WRITES, "s3:PutObjectAcl"], [everything]),
    ]
    if tls:
        statements.append(
            {
                **deny("OnlyTls", ["*"], ["s3:*"], [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]),
                "Condition": {"Bool": {"aws:SecureTransport": "false"}},
            }
        )

    def rule(name: str, place: str, **actions: dict[str, Any]) -> dict[str, Any]:
        return {"ID": RULE + name, "Status": "Enabled", "Filter": {"Prefix": below + place}, **actions}

    old_versions = {"NoncurrentDays": days.versions}
    lifecycle = [
        rule(
            "checkpoints",
            "checkpoints/",  # replaced as a whole every few minutes, so old versions would be most of the bucket
            Expiration={"Days": days.checkpoints},
            NoncurrentVersionExpiration={"NoncurrentDays": 1},
        ),
        rule("backups", "backups/", Expiration={"Days": days.backups}),
        rule("final-failures", "final-failures/", Expiration={"Days": days.runs}),  # of use to the retries of one run alone,
        rule("pipeline-runs", "pipeline-runs/", Expiration={"Days": days.runs}),  # and these to the stages of one
        rule(
            "old-versions",
            "",
            NoncurrentVersionExpiration=old_versions,
            Expiration={"ExpiredObjectDeleteMarker": True},
            AbortIncompleteMultipartUpload={"DaysAfterInitiation": days.uploads},
        ),
    ]
    return canonical({"versioning": "Enabled", "lifecycle": lifecycle, "policy": statements})


def merged(found: Settings, ours: Settings) -> Settings:
    """Our settings, with the rules and statements of others that were found."""
    others = {
        "lifecycle": [each for each in found["lifecycle"] if not str(each.get("ID", "")).startswith(RULE)],
        "policy": [each for each in found["policy"] if not str(each.get("Sid", "")).startswith(STATEMENT)],
    }
    return canonical({"versioning": ours["versioning"], **{key: others[key] + ours[key] for key in others}})


def canonical(settings: Settings) -> Settings:
    """The same settings in one form: stores return a list of one as a text, and lists in another order."""

    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(each) for key, each in sorted(value.items())}
        if isinstance(value, list):
            items = sorted((ordered(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True))
            return items[0] if len(items) == 1 and isinstance(items[0], str) else items
        return value

    policy = [{**each, "Principal": {"AWS": "*"}} if each.get("Principal") == "*" else each for each in settings["policy"]]
    return {
        "versioning": settings["versioning"],
        "lifecycle": sorted((ordered(each) for each in settings["lifecycle"]), key=lambda each: str(each.get("ID"))),
        "policy": sorted((ordered(each) for each in policy), key=lambda each: str(each.get("Sid"))),
    }


def difference(found: Settings, to_be: Settings) -> list[str]:
    """Lines of a unified diff from what is there to what is to be; empty if they are the same."""
    old, new = (json.dumps(each, indent=2, sort_keys=True).splitlines() for each in (found, to_be))
    return list(difflib.unified_diff(old, new, "bucket", "wanted", lineterm="", n=2))
