"""`rankloop bucket apply`: gives the bucket its versioning, lifecycle and policy, as `bucket_rules` has them.

    rankloop bucket apply --check    # says what it would change; exit code 65 if that is anything
    rankloop bucket apply            # changes it, and reads back whether the store holds it now

It runs with an administrator's key. A second time it changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from components.services.exits import DoNotRetry, Retry
from pipelines.display import console_of

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

    from pipelines.cluster.bucket_rules import Settings

ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL_S3"
SEAWEEDFS = "arn:aws:iam::000000000000:user/"  # how SeaweedFS names an identity in a policy
_NONE_YET = ("NoSuchBucketPolicy", "NoSuchLifecycleConfiguration")

app = typer.Typer(
    help="The bucket of a cluster: its versioning, lifecycle and policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _group() -> None:
    """Keeps `apply` a command of its own: typer would else drop the name of a single one."""


@app.command()
def apply(
    storage: Annotated[str, typer.Option(envvar="RANKLOOP_STORAGE", help="s3://bucket[/prefix] below which every artifact lies.")],
    stage: Annotated[
        list[str] | None, typer.Option(help="ARN of the stages' role or user; repeatable. SeaweedFS: rankloop-stage.")
    ] = None,
    reader: Annotated[
        list[str] | None, typer.Option(help="ARN of a role or user that only reads; repeatable. SeaweedFS: rankloop-reader.")
    ] = None,
    checkpoint_days: Annotated[int, typer.Option(min=1, help="Days until a checkpoint that nobody replaced goes.")] = 30,
    version_days: Annotated[int, typer.Option(min=1, help="Days until what was overwritten or deleted goes.")] = 90,
    backup_days: Annotated[int, typer.Option(min=1, help="Days until a back-up of MLflow's database goes.")] = 35,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; end with 65 if anything differs.")] = False,
) -> None:
    """Gives the bucket its versioning, lifecycle and policy, after showing what that changes. It needs an administrator's key."""
    from components.services.storage import split_uri
    from pipelines.cluster.bucket_rules import Days, Principals, difference, merged, wanted

    endpoint = os.environ.get(ENDPOINT_VARIABLE, "")
    principals = Principals(*_principals(stage or [], reader or [], endpoint))
    days = Days(checkpoint_days, version_days, backup_days)
    ours = wanted(storage, principals, days, tls=not endpoint.startswith("http://"))
    bucket, _ = split_uri(storage)
    console, client = console_of(), _client()
    with _errors(bucket):
        there = _exists(client, bucket)
        found = read(client, bucket) if there else {"versioning": "Disabled", "lifecycle": [], "policy": []}
        to_be = merged(found, ours)
        lines = difference(found, to_be) if there else [f"+ bucket {bucket}", *difference(found, to_be)]
        if not lines:
            console.print(f"{bucket}: all as it should be", highlight=False)
            return
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if check:
            raise DoNotRetry(f"the bucket {bucket} is not as it should be", "run the same without --check")
        write(client, bucket, found if there else None, to_be)
        if left := difference(read(client, bucket), to_be):
            raise DoNotRetry(
                f"the store took the settings of {bucket} but does not hold them:\n" + "\n".join(left), "does it know them?"
            )
    console.print(f"{bucket}: done", highlight=False)


def read(client: S3Client, bucket: str) -> Settings:
    """The bucket's settings as they are, in the form of `bucket_rules`."""
    from pipelines.cluster.bucket_rules import canonical

    versioning = client.get_bucket_versioning(Bucket=bucket).get("Status", "Disabled")
    lifecycle = _or_none(lambda: client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]) or []
    policy = json.loads(_or_none(lambda: client.get_bucket_policy(Bucket=bucket)["Policy"]) or '{"Statement": []}')
    return canonical({"versioning": versioning, "lifecycle": lifecycle, "policy": policy["Statement"]})


def write(client: S3Client, bucket: str, found: Settings | None, to_be: Settings) -> None:
    """Changes what differs, the versioning first: a rule on old versions has no meaning before it.

    Args:
        found: what `read` gave, or None if there is no bucket yet.
    """
    if found is None:
        region = client.meta.region_name
        place = {} if region in ("us-east-1", "aws-global") else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        client.create_bucket(Bucket=bucket, **cast(Any, place))
    before = found or {}
    if before.get("versioning") != to_be["versioning"]:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": to_be["versioning"]})
    if before.get("lifecycle") != to_be["lifecycle"]:
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": to_be["lifecycle"]})
    if before.get("policy") != to_be["policy"]:
        document = {"Version": "2012-10-17", "Statement": to_be["policy"]}
        client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(document))


def _principals(stage: list[str], reader: list[str], endpoint: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ARNs of both, those of SeaweedFS where there is an endpoint and none is named."""
    if endpoint:
        stage, reader = stage or [f"{SEAWEEDFS}rankloop-stage"], reader or [f"{SEAWEEDFS}rankloop-reader"]
    for option, given in (("--stage", stage), ("--reader", reader)):
        if not given:
            raise DoNotRetry(
                f"{option} is not given, and {ENDPOINT_VARIABLE} is not set, so this is AWS",
                f"name the role: {option} arn:aws:iam::ACCOUNT:role/NAME",
            )
        for arn in given:
            if not arn.startswith("arn:"):
                raise DoNotRetry(f"{option} {arn!r} is no ARN", "give it as arn:aws:iam::ACCOUNT:role/NAME (or :user/NAME)")
    return tuple(stage), tuple(reader)


def _client() -> S3Client:
    import boto3
    from botocore.config import Config

    settings = Config(
        connect_timeout=5, read_timeout=30, retries={"max_attempts": 4, "mode": "standard"}, s3={"addressing_style": "path"}
    )
    return boto3.session.Session().client("s3", config=settings)


def _exists(client: S3Client, bucket: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:
            raise
        return False
    return True


def _or_none(call: Any) -> Any:
    """What the call returns, or None where the bucket has no such setting."""
    from botocore.exceptions import ClientError

    try:
        return call()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in _NONE_YET:
            raise
        return None


@contextmanager
def _errors(bucket: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as BotoConnectionError

    try:
        yield
    except ClientError as error:
        reply = error.response
        code, status = reply.get("Error", {}).get("Code", ""), reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status >= 500:
            raise Retry(f"S3 failed on the bucket {bucket}: {error}", "run again when the object store is healthy") from error
        remedy = "this needs an administrator's key; check the AWS_* variables" if status in (401, 403) else "see what it says"
        raise DoNotRetry(f"S3 refuses the settings of the bucket {bucket} ({code}): {error}", remedy) from error
    except (BotoConnectionError, HTTPClientError) as error:
        raise Retry(f"the object store cannot be reached: {error}", f"check {ENDPOINT_VARIABLE} and the network") from error
    except BotoCoreError as error:  # no credentials, no region
        raise DoNotRetry(f"S3 request for the bucket {bucket} is not possible: {error}", "check the AWS_* variables") from error
