"""What an object store says when an object was created, in the forms that stores and brokers send, as one record.

| form | known by | its identity |
|---|---|---|
| S3 notification (AWS, MinIO, Ceph) | `Records[].s3` | bucket, key, version or ETag, sequencer |
| EventBridge | `detail-type: Object Created` | the same, from `detail` |
| CloudEvents, structured JSON | `specversion` | `source` and `id` |
| SeaweedFS's filer webhook | `event_type` and `key: /buckets/…` | bucket, key, its time of change |

A CloudEvent's `data` is one of the others, or has `bucket` and `object` or `key`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from components.services.exits import DoNotRetry
from components.services.launch import json_digest

MAX_RECORDS = 100
_BUCKETS = "/buckets/"  # where SeaweedFS has its buckets
_FORMS = "an S3 notification (Records), an EventBridge or CloudEvents object, or SeaweedFS's (key, event_type)"


class Created(NamedTuple):
    """An object that was created or replaced. Two deliveries of the same event have the same `key`; two events have not."""

    uri: str
    key: str


def parse(data: bytes) -> tuple[list[Created], int]:
    """The objects that were created, and how many records tell of something else.

    Raises:
        DoNotRetry: no JSON, no known form, or a record without bucket or key.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DoNotRetry(f"the event is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DoNotRetry(f"the event is a JSON {type(value).__name__}", f"send {_FORMS}")
    try:
        records = list(_records(value))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:  # a CloudEvent's data is JSON again
        raise DoNotRetry(f"the event lacks what tells its object: {error}", f"send {_FORMS}") from error
    found = [each for each in records if each is not None]
    return list({each.key: each for each in found}.values()), len(records) - len(found)


def _records(value: Mapping[str, Any]) -> Iterator[Created | None]:
    if "specversion" in value:
        yield from _cloud_event(value)
    elif "Records" in value:
        if not isinstance(value["Records"], list) or len(value["Records"]) > MAX_RECORDS:
            raise DoNotRetry(f"Records is no list, or of more than {MAX_RECORDS}")
        for record in value["Records"]:
            yield _notification(record)
    elif "detail-type" in value:
        yield _object(value["detail"]) if value["detail-type"] == "Object Created" else None
    elif "event_type" in value and "key" in value:
        yield _seaweed(value)
    elif value.get("Event") == "s3:TestEvent":  # AWS sends it when a notification is set up
        yield None
    else:
        raise DoNotRetry(f"the event has no known form; its keys: {', '.join(sorted(map(str, value))[:10])}", f"send {_FORMS}")


def _notification(record: Mapping[str, Any]) -> Created | None:
    if "ObjectCreated:" not in str(record["eventName"]):  # MinIO has s3: in front
        return None
    s3 = record["s3"]
    # In this form alone the key is encoded as in a form: "a b" is "a+b".
    return _object({"bucket": s3["bucket"], "object": {**s3["object"], "key": unquote_plus(s3["object"]["key"])}})


def _object(detail: Mapping[str, Any]) -> Created:
    bucket, item = detail["bucket"], detail.get("object", detail.get("key"))
    name = bucket["name"] if isinstance(bucket, dict) else bucket
    item = item if isinstance(item, dict) else {"key": item}
    uri = _uri(name, item["key"])
    which = [item.get(key) for key in ("versionId", "version-id", "eTag", "etag", "sequencer")]
    if not any(which):
        raise DoNotRetry(f"the event of {uri} has neither version, ETag nor sequencer, so a second delivery could not be told")
    return Created(uri, json_digest(["object", uri, which]))


def _cloud_event(value: Mapping[str, Any]) -> Iterator[Created | None]:
    identity = [value["source"], value["id"]]
    data = value.get("data")
    data = json.loads(data) if isinstance(data, str) else data
    if not isinstance(data, dict):
        raise DoNotRetry("the CloudEvent has no data that tells its object")
    if "bucket" in data:
        kind = str(value.get("type", "")).lower()
        if not any(word in kind for word in ("created", "finalized", "put")):
            yield None
            return
        item = data.get("object", data.get("key", data.get("name")))
        item = item["key"] if isinstance(item, dict) else item
        bucket = data["bucket"]["name"] if isinstance(data["bucket"], dict) else data["bucket"]
        yield Created(_uri(bucket, item), json_digest(["cloud event", *identity]))
        return
    for number, record in enumerate(_records(data)):
        yield record and Created(record.uri, json_digest(["cloud event", *identity, number]))


def _seaweed(value: Mapping[str, Any]) -> Created | None:
    path, message = str(value["key"]), value.get("message") or {}
    entry = message.get("new_entry") or message.get("newEntry") or {}
    if value["event_type"] not in ("create", "update") or not path.startswith(_BUCKETS) or _flag(entry, "is_directory"):
        return None
    bucket, _, key = path.removeprefix(_BUCKETS).partition("/")
    if not key:
        return None
    attributes = entry.get("attributes") or {}
    which = [attributes.get(each) for each in ("mtime", "md5", "file_size")]  # mtime is in seconds, so:
    which += [[each.get("modified_ts_ns"), each.get("e_tag")] for each in entry.get("chunks") or []]
    if not any(which):
        raise DoNotRetry(f"the event of {path} has no attributes of its entry, so a second delivery could not be told")
    uri = _uri(bucket, key)
    return Created(uri, json_digest(["entry", uri, which]))


def _flag(entry: Mapping[str, Any], name: str) -> bool:
    return bool(entry.get(name) or entry.get("isDirectory"))


def _uri(bucket: Any, key: Any) -> str:
    if not isinstance(bucket, str) or not isinstance(key, str) or not bucket or not key:
        raise DoNotRetry(f"the event names no object: bucket {bucket!r}, key {key!r}")
    return f"s3://{bucket}/{key}"
