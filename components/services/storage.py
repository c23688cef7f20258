"""Artifacts on S3, addressed by `s3://bucket/key` URIs, through boto3.

Endpoint and credentials come from boto3's own environment variables (`AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`, ...).
A folder is published by writing its marker object last: a folder without its marker does not exist for any reader, so a
stage that dies half-way leaves nothing that can be mistaken for a result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import boto3
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config as BotoConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from components.services.exits import DoNotRetry, Retry

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MARKER = "rankloop.json"  # written last; a folder is complete when it is there
FILES = "sha256"  # the marker's key of the digests: {name of a file below the folder: SHA-256 of its bytes}

_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired"}
_FORBIDDEN = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class StoredObject(NamedTuple):
    """One object of a listing. `size_bytes` as stored; `etag` changes whenever the content does."""

    uri: str
    size_bytes: int
    etag: str


class StoredVersion(NamedTuple):
    """One object's content. `age_seconds` is told by the server's own clock, in whole seconds."""

    data: bytes
    etag: str
    age_seconds: float


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> `("bucket", "a/b")`.

    Raises:
        DoNotRetry: `uri` is not an S3 URI with a bucket.
    """
    scheme, separator, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not separator or not bucket:
        raise DoNotRetry(f"{uri!r} is not an S3 URI", "give it as s3://bucket/prefix")
    return bucket, key


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/a/", "c")` -> `s3://b/a/c`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


class Storage:
    """An S3 client whose errors are `DoNotRetry` (credentials, bucket, key) or `Retry` (network, server) with the URI."""

    def __init__(self, client: S3Client | None = None) -> None:
        self._client: S3Client = client or boto3.session.Session().client(  # the default session keeps old credentials
            "s3",
            config=BotoConfig(
                connect_timeout=5,
                read_timeout=60,
                retries={"max_attempts": 4, "mode": "standard"},
                s3={"addressing_style": "path"},
            ),
        )
        self.seconds = 0.0  # spent in requests so far, streams excluded
        self._transfer = TransferConfig(multipart_threshold=64 * 2**20, multipart_chunksize=32 * 2**20, max_concurrency=4)

    @contextmanager
    def _errors(self, uri: str, streaming: bool = False) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
            if not streaming:  # a stream's time is mostly its reader's
                self.seconds += time.perf_counter() - started
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code == "NoSuchBucket":
                raise DoNotRetry(
                    f"bucket {split_uri(uri)[0]!r} of {uri} does not exist", "create it, or correct the URI"
                ) from error
            if code in _SKEWED:
                raise Retry(
                    f"S3 refuses {uri}: this machine's clock and the store's are too far apart ({code})",
                    "set the clock (NTP) of the node that ran this, or of the store",
                ) from error
            if code in _FORBIDDEN or status == 403:
                raise DoNotRetry(
                    f"S3 refuses access to {uri} ({code})",
                    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and the rights of that key",
                ) from error
            if code in _NOT_FOUND:
                raise DoNotRetry(f"{uri} does not exist", "check the URI, or run the stage that writes it") from error
            raise Retry(f"S3 failed on {uri}: {code} {error}", "run again when the object store is healthy") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise DoNotRetry(f"no S3 credentials for {uri}", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except (BotoConnectionError, HTTPClientError, IncompleteReadError, RetriesExceededError) as error:
            raise Retry(
                f"the object store cannot be reached for {uri}: {error}", "check AWS_ENDPOINT_URL_S3 and the network"
            ) from error
        except BotoCoreError as error:
            raise DoNotRetry(f"S3 request for {uri} is not possible: {error}", "check the AWS_* environment") from error

    def exists(self, uri: str) -> bool:
        """Whether the object is there. A missing bucket or a refused key is an error, not "no"."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            try:
                self._client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") not in _NOT_FOUND:
                    raise
                self._client.head_bucket(Bucket=bucket)  # HEAD has no body: this tells a missing bucket from a missing key
                return False
        return True

    def list(self, uri: str) -> Iterator[StoredObject]:
        """Every object below the prefix, in key order, page by page."""
        bucket, key = split_uri(uri)
        with self._errors(uri, streaming=True):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
                for item in page.get("Contents", []):
                    yield StoredObject(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))

    def get_bytes(self, uri: str) -> bytes:
        with self.open_read(uri) as body:
            return body.read()

    def get_json(self, uri: str) -> Any:
        return json.loads(self.get_bytes(uri))

    @contextmanager
    def open_read(self, uri: str, etag: str = "") -> Iterator[BinaryIO]:
        """The object's body as a stream; nothing is held in memory or on disk.

        Raises:
            Retry: the object has another etag than the one given.
        """
        bucket, key = split_uri(uri)
        with self._errors(uri, streaming=True):
            try:
                client = self._client
                got = client.get_object(Bucket=bucket, Key=key, IfMatch=etag) if etag else client.get_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                    raise Retry(f"{uri} changed since it was listed", "run again") from error
                raise
            try:
                yield cast(BinaryIO, got["Body"])
            finally:
                got["Body"].close()

    def put_bytes(self, uri: str, data: bytes) -> None:
        bucket, key = split_uri(uri)
        with self._errors(uri):
            self._client.put_object(Bucket=bucket, Key=key, Body=data)

    def put_json(self, uri: str, value: Any) -> None:
        self.put_bytes(uri, json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode())

    def put_if(self, uri: str, data: bytes, etag: str = "") -> str:
        """Writes the object if what is there has this etag, or if nothing is there (""); of many callers exactly one succeeds.

        A request whose reply was lost is sent again and then refused for its own success; so what is there is compared with `data`,
        which must therefore differ from what any other caller writes.

        Returns:
            The new etag, or "" if the condition did not hold.
        """
        bucket, key = split_uri(uri)
        with self._errors(uri):
            try:
                if etag:
                    response = self._client.put_object(Bucket=bucket, Key=key, Body=data, IfMatch=etag)
                else:
                    response = self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status not in (409, 412) and not (etag and status == 404):
                    raise
                if error.response["ResponseMetadata"].get("RetryAttempts") and status != 404:
                    found = self.get_version(uri)
                    return found.etag if found.data == data else ""
                return ""
        return response["ETag"]

    def get_version(self, uri: str) -> StoredVersion:
        """An object's bytes with their etag and age."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            response = self._client.get_object(Bucket=bucket, Key=key)
            now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
            return StoredVersion(response["Body"].read(), response["ETag"], (now - response["LastModified"]).total_seconds())

    def delete(self, uri: str) -> None:
        """Removes one object; a missing one is not an error."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            self._client.delete_object(Bucket=bucket, Key=key)

    def upload_file(self, path: Path, uri: str) -> None:
        bucket, key = split_uri(uri)
        with self._errors(uri):
            try:
                self._client.upload_file(str(path), bucket, key, Config=self._transfer)
            except S3UploadFailedError as error:  # hides the ClientError that tells what is wrong
                raise error.__context__ or error from None

    def download_file(self, uri: str, path: Path) -> None:
        bucket, key = split_uri(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(uri):
            self._client.download_file(bucket, key, str(path), Config=self._transfer)

    def publish_folder(self, folder: Path, uri: str, marker: dict[str, Any]) -> None:
        """Uploads every file of `folder`, then the marker. On any failure what was uploaded is removed again.

        Args:
            folder: files and sub-folders to upload.
            uri: where they go; `<uri>/rankloop.json` must not be among the files.
            marker: the content of `rankloop.json`: role, resolved config, digests of parents, code version. The digest of every
                file is added to it (`FILES`), so that whoever has the marker's digest can tell whether any byte has changed.
        """
        done: list[str] = []
        digests: dict[str, str] = {}
        try:
            with ThreadPoolExecutor(1) as beside:
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    name = path.relative_to(folder).as_posix()
                    digest = beside.submit(_sha256, path)
                    done.append(join(uri, name))
                    self.upload_file(path, done[-1])
                    digests[name] = digest.result()
            self.put_json(join(uri, MARKER), {**marker, FILES: digests})
        except BaseException:
            for target in done:
                try:
                    self.delete(target)
                except (DoNotRetry, Retry):
                    break  # the store is gone; without its marker the folder does not count
            raise

    def is_published(self, uri: str) -> bool:
        return self.exists(join(uri, MARKER))

    def fetch_folder(self, uri: str, folder: Path) -> dict[str, Any]:
        """Downloads a published folder and returns its marker.

        Raises:
            DoNotRetry: there is no marker, so no complete folder.
        """
        marker: dict[str, Any] = self.get_json(join(uri, MARKER))
        prefix = uri.rstrip("/") + "/"
        for item in self.list(prefix):
            self.download_file(item.uri, folder / item.uri.removeprefix(prefix))
        return marker


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
