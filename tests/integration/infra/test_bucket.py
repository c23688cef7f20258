"""`rankloop bucket apply` on a real SeaweedFS, with the identities of infra/secrets.sh: what each of them can and cannot do.

Who refuses: without our policy (`test_what_the_identities_alone_refuse`) SeaweedFS's identities keep the reader from writing, and
MLflow and the back-up in their folders. But there the right to write is the right to delete, and even to switch versioning off;
from that the policy alone keeps the stages. `test_the_policy_alone_refuses` shows that it does not lean on the identities. On AWS,
IAM roles take the place of the identities.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from typer.testing import CliRunner

from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage
from pipelines.cli import app
from pipelines.cluster.bucket_rules import KEPT
from tests.cluster_servers import seaweedfs, status
from tests.cluster_tools import Secrets, run_secrets_script, secrets_in

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

BUCKET = "rankloop"
Clients = Callable[[str], "S3Client"]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    folder = tmp_path_factory.mktemp("secrets")
    assert run_secrets_script(folder).returncode == 0
    return secrets_in(folder)


@pytest.fixture(scope="module")
def endpoint(secrets: Secrets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with seaweedfs(tmp_path_factory.mktemp("s3") / "server", secrets["rankloop-seaweedfs"]["s3.json"]) as (address, metrics):
        assert status(metrics) == 200
        yield address


@pytest.fixture(scope="module")
def client(endpoint: str, secrets: Secrets) -> Clients:
    """A client by the name of its secret."""
    settings = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})

    @functools.cache
    def made(name: str) -> S3Client:
        key = secrets[name]
        return boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=settings,
        )

    return made


@pytest.fixture(scope="module")
def rankloop(endpoint: str, secrets: Secrets) -> Iterator[Callable[..., str]]:
    """Runs the command line with the administrator's variables; gives what it prints."""

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["bucket", "apply", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    place = {"AWS_ENDPOINT_URL_S3": endpoint, "RANKLOOP_STORAGE": f"s3://{BUCKET}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_DEFAULT_REGION", raising=False)
        for key, value in {**place, **secrets["rankloop-s3-admin"]}.items():
            patch.setenv(key, value)
        yield run


@pytest.fixture(scope="module")
def bucket(rankloop: Callable[..., str], client: Clients) -> str:
    """The bucket as it should be, with an object in each folder that is kept and in one that is not."""
    rankloop()
    for name in (*KEPT, "checkpoints", "ingests"):
        client("rankloop-s3-admin").put_object(Bucket=BUCKET, Key=f"{name}/a/data", Body=b"first")
    return BUCKET


def refused(call: Callable[..., Any], **arguments: Any) -> bool:
    """Whether the store says 403."""
    try:
        call(Bucket=BUCKET, **arguments)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 403:
            raise
        return True
    return False


def test_a_check_shows_what_is_missing_and_makes_nothing(rankloop: Callable[..., str], client: Clients) -> None:
    with pytest.raises(DoNotRetry, match="the bucket rankloop is not as it should be"):
        rankloop("--check")
    assert client("rankloop-s3-admin").list_buckets()["Buckets"] == []


def test_what_the_identities_alone_refuse(client: Clients) -> None:
    """Before there is a policy."""
    admin, stage, reader = (client(f"rankloop-s3{name}") for name in ("-admin", "", "-reader"))
    admin.create_bucket(Bucket=BUCKET)
    admin.put_object(Bucket=BUCKET, Key="rankings/a/data", Body=b"first")
    assert refused(reader.put_object, Key="x", Body=b"")
    assert refused(reader.delete_object, Key="rankings/a/data")
    assert refused(client("rankloop-s3-mlflow").put_object, Key="rankings/x", Body=b"")
    assert refused(client("rankloop-s3-backup").put_object, Key="mlflow/x", Body=b"")
    assert not refused(client("rankloop-s3-mlflow").put_object, Key="mlflow/x", Body=b"")
    assert not refused(client("rankloop-s3-backup").put_object, Key="backups/x", Body=b"")
    # the right to write is the right to delete, and to change settings
    assert not refused(stage.delete_object, Key="rankings/a/data")
    assert not refused(stage.put_bucket_versioning, VersioningConfiguration={"Status": "Suspended"})
    for each in admin.list_objects_v2(Bucket=BUCKET)["Contents"]:
        admin.delete_object(Bucket=BUCKET, Key=each["Key"])
    admin.delete_bucket(Bucket=BUCKET)


def test_it_is_done_once(rankloop: Callable[..., str], client: Clients) -> None:
    shown = rankloop()
    assert shown.startswith("+ bucket rankloop\n")
    assert '+  "versioning": "Enabled"' in shown
    assert shown.endswith("rankloop: done\n")
    assert rankloop() == rankloop("--check") == "rankloop: all as it should be\n"
    assert '-        "Days": 30' in rankloop("--checkpoint-days", "7").replace('Days": 30', 'Days": 30')
    assert rankloop() != rankloop("--check")


def test_the_stage_cannot_delete_what_is_kept(bucket: str, client: Clients) -> None:
    stage = client("rankloop-s3")
    for name in KEPT:
        key = f"{name}/a/data"
        version = stage.head_object(Bucket=bucket, Key=key)["VersionId"]
        assert refused(stage.delete_object, Key=key)
        assert refused(stage.delete_object, Key=key, VersionId=version)
        several = [{"Key": key}, {"Key": key, "VersionId": version}]
        errors = stage.delete_objects(Bucket=bucket, Delete={"Objects": several})["Errors"]  # type: ignore[typeddict-item]
        assert [each["Code"] for each in errors] == ["AccessDenied"] * 2
        assert stage.get_object(Bucket=bucket, Key=key)["Body"].read() == b"first"


def test_the_stage_does_its_work(bucket: str, client: Clients, tmp_path: Path) -> None:
    """It publishes, reads, replaces checkpoints and removes them; of twenty that take a lock one gets it, also with versions."""
    stage = client("rankloop-s3")
    storage = Storage(stage)
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    storage.publish_folder(tmp_path, f"s3://{bucket}/policies/new", {"role": "policy"})
    assert storage.fetch_folder(f"s3://{bucket}/policies/new", tmp_path / "back")["role"] == "policy"
    for content in (b"one", b"two"):
        storage.put_bytes(f"s3://{bucket}/checkpoints/k/policy.safetensors", content)
    storage.delete(f"s3://{bucket}/checkpoints/k/policy.safetensors")
    storage.delete(f"s3://{bucket}/ingests/a/data")
    assert not storage.exists(f"s3://{bucket}/checkpoints/k/policy.safetensors")
    lock = f"s3://{bucket}/registry/lock"
    with ThreadPoolExecutor(8) as many:
        assert len([etag for etag in many.map(lambda n: storage.put_if(lock, b"%d" % n), range(20)) if etag]) == 1
        held = storage.get_version(lock).etag
        assert len([etag for etag in many.map(lambda n: storage.put_if(lock, b"next %d" % n, held), range(20)) if etag]) == 1


def test_the_stage_stays_out_of_what_others_write_and_of_the_settings(bucket: str, client: Clients) -> None:
    stage = client("rankloop-s3")
    assert refused(stage.put_object, Key="mlflow/x", Body=b"")
    assert refused(stage.put_object, Key="backups/postgres/x", Body=b"")
    assert refused(stage.put_bucket_versioning, VersioningConfiguration={"Status": "Suspended"})
    rule = {"ID": "x", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}
    assert refused(stage.put_bucket_lifecycle_configuration, LifecycleConfiguration={"Rules": [rule]})
    assert refused(stage.delete_bucket_lifecycle)
    assert refused(stage.put_bucket_policy, Policy='{"Version": "2012-10-17", "Statement": []}')
    assert refused(stage.delete_bucket_policy)
    assert refused(stage.delete_bucket)


def test_the_reader_reads_and_writes_nothing(bucket: str, client: Clients) -> None:
    reader = client("rankloop-s3-reader")
    assert reader.get_object(Bucket=bucket, Key="rankings/a/data")["Body"].read() == b"first"
    assert [each["Key"] for each in reader.list_objects_v2(Bucket=bucket, Prefix="rankings/a/")["Contents"]] == ["rankings/a/data"]
    assert refused(reader.put_object, Key="x", Body=b"")
    assert refused(reader.create_multipart_upload, Key="x")
    assert refused(reader.copy_object, Key="x", CopySource=f"{bucket}/rankings/a/data")
    assert refused(reader.delete_object, Key="checkpoints/a/data")
    assert refused(reader.put_bucket_versioning, VersioningConfiguration={"Status": "Suspended"})
    (error,) = reader.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "checkpoints/a/data"}]})["Errors"]
    assert error["Code"] == "AccessDenied"


def test_the_policy_alone_refuses(bucket: str, rankloop: Callable[..., str], client: Clients) -> None:
    """An identity with the right to write, named as a reader, writes no more; and the stage is free when another one is named."""
    user = "arn:aws:iam::000000000000:user/"
    writer, stage = client("rankloop-s3-mlflow"), client("rankloop-s3")
    assert not refused(writer.put_object, Key="mlflow/x", Body=b"")
    rankloop("--reader", f"{user}rankloop-mlflow", "--stage", f"{user}somebody-else")
    assert refused(writer.put_object, Key="mlflow/x", Body=b"")
    assert not refused(stage.delete_object, Key="rankings/a/data")
    rankloop()
    assert not refused(writer.put_object, Key="mlflow/x", Body=b"")
    assert refused(stage.delete_object, Key="rankings/a/data")


def test_what_was_overwritten_comes_back(bucket: str, client: Clients) -> None:
    """A stage may write over a snapshot; it loses nothing."""
    stage = client("rankloop-s3")
    stage.put_object(Bucket=bucket, Key="rankings/a/data", Body=b"spoilt")
    versions = stage.list_object_versions(Bucket=bucket, Prefix="rankings/a/data")["Versions"]
    (before, *_) = [each["VersionId"] for each in versions if not each["IsLatest"]]
    source = {"Bucket": bucket, "Key": "rankings/a/data", "VersionId": before}
    client("rankloop-s3-admin").copy_object(Bucket=bucket, Key="rankings/a/data", CopySource=source)  # type: ignore[arg-type]
    assert stage.get_object(Bucket=bucket, Key="rankings/a/data")["Body"].read() == b"first"


def test_a_change_by_hand_is_found_and_another_ones_rule_stays(bucket: str, rankloop: Callable[..., str], client: Clients) -> None:
    admin = client("rankloop-s3-admin")
    theirs = {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 9}}
    rules = admin.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    admin.put_bucket_lifecycle_configuration(
        Bucket=bucket,
        LifecycleConfiguration={"Rules": [theirs, *rules[1:]]},  # type: ignore[list-item]
    )
    with pytest.raises(DoNotRetry, match="run the same without --check"):
        rankloop("--check")
    shown = rankloop()
    assert '-  "versioning": "Suspended"' in shown
    kept = admin.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert {each["ID"] for each in kept} == {"logs", *(each["ID"] for each in rules)}
    assert rankloop("--check") == "rankloop: all as it should be\n"


def test_what_goes_wrong_is_told(
    bucket: str, rankloop: Callable[..., str], secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DoNotRetry, match="--stage 'rankloop-stage' is no ARN"):
        rankloop("--stage", "rankloop-stage")
    for key, value in secrets["rankloop-s3-backup"].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(DoNotRetry, match="S3 refuses the settings of the bucket rankloop") as failure:
        rankloop("--checkpoint-days", "3")
    assert "administrator's key" in failure.value.remedy
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(Retry, match="the object store cannot be reached"):
        rankloop()
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    with pytest.raises(DoNotRetry, match="--stage is not given, and AWS_ENDPOINT_URL_S3 is not set, so this is AWS"):
        rankloop()
