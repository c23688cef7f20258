"""Events of object stores and brokers, as they send them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.services.exits import DoNotRetry
from pipelines.cluster.events import Created, parse


def notification(key: str, name: str = "ObjectCreated:Put", sequencer: str = "0055AED6DCD90281E5") -> dict[str, Any]:
    """A record of S3's documentation, cut."""
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventTime": "2026-01-02T03:04:05.000Z",
        "eventName": name,
        "s3": {
            "bucket": {"name": "labels", "arn": "arn:aws:s3:::labels"},
            "object": {"key": key, "size": 1024, "eTag": "d41d8cd98f00b204e9800998ecf8427e", "sequencer": sequencer},
        },
    }


def event_bridge(key: str) -> dict[str, Any]:
    return {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": "Object Created",
        "source": "aws.s3",
        "detail": {"bucket": {"name": "labels"}, "object": {"key": key, "etag": "b1946ac9", "sequencer": "00617F08299329D189"}},
    }


def seaweed(path: str, kind: str = "create", mtime: int = 1767323045, modified_ns: int = 0) -> dict[str, Any]:
    """What the filer of SeaweedFS 4.48 sends, but for what nobody reads."""
    chunk = {"size": 12, "modified_ts_ns": mtime * 10**9 + modified_ns, "e_tag": "pKoyCBJpdAKeqJcGgG5B9Q=="}
    entry = {"name": path.rpartition("/")[2], "chunks": [chunk], "attributes": {"mtime": mtime, "file_size": 12}}
    return {"key": path, "event_type": kind, "message": {"new_entry": entry}}


def one(value: Any) -> Created:
    ((created,), _) = parse(json.dumps(value).encode())
    return created


def test_each_form_tells_its_object() -> None:
    minio = {"EventName": "s3:ObjectCreated:Put", "Records": [notification("in/a+b%28c%29.jsonl", "s3:ObjectCreated:Put")]}
    assert one(minio).uri == "s3://labels/in/a b(c).jsonl", "S3's notifications encode the key"
    assert one(event_bridge("in/a+b.jsonl")).uri == "s3://labels/in/a+b.jsonl", "EventBridge does not"
    assert one(seaweed("/buckets/labels/in/a.jsonl")).uri == "s3://labels/in/a.jsonl"
    cloud = {"specversion": "1.0", "id": "1", "source": "/s3", "type": "com.example.created"}
    assert one({**cloud, "data": {"Records": [notification("a")]}}).uri == "s3://labels/a"
    assert one({**cloud, "data": {"bucket": "labels", "key": "a"}}).uri == "s3://labels/a"
    assert one({**cloud, "data": json.dumps({"bucket": "labels", "name": "a"})}).uri == "s3://labels/a"


def test_the_same_event_has_the_same_key_and_another_has_another() -> None:
    put, again = notification("a"), notification("a", sequencer="0055AED6DCD90281E6")
    assert one({"Records": [put]}).key == one({"Records": [dict(reversed(put.items()))], "more": 1}).key
    keys = {one({"Records": [each]}).key for each in (put, again, notification("b"))}
    assert len(keys) == 3
    cloud = {"specversion": "1.0", "source": "/s3", "type": "created", "data": {"bucket": "labels", "key": "a"}}
    assert len({one({**cloud, "id": identity}).key for identity in ("1", "2", "1")}) == 2
    assert len({one(seaweed("/buckets/labels/a", mtime=mtime)).key for mtime in (1, 2, 1)}) == 2
    assert len({one(seaweed("/buckets/labels/a", "update", 1, ns)).key for ns in (1, 2, 1)}) == 2, "twice in a second"


def test_records_that_repeat_count_once_and_others_are_counted() -> None:
    records = [notification("a"), notification("a"), notification("b"), notification("a", "ObjectRemoved:Delete")]
    created, others = parse(json.dumps({"Records": records}).encode())
    assert ([each.uri for each in created], others) == (["s3://labels/a", "s3://labels/b"], 1)


@pytest.mark.parametrize(
    "value",
    [
        {"Event": "s3:TestEvent", "Bucket": "labels"},
        {**event_bridge("a"), "detail-type": "Object Deleted"},
        seaweed("/buckets/labels/a", "delete"),
        seaweed("/etc/seaweedfs/filer.conf"),
        {"specversion": "1.0", "id": "1", "source": "s", "type": "deleted", "data": {"bucket": "labels", "key": "a"}},
    ],
)
def test_what_creates_no_object_starts_nothing(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == ([], 1)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "a JSON list"),
        (b'{"a": 1}', "no known form; its keys: a"),
        (b'{"Records": [{}]}', "lacks what tells its object: 'eventName'"),
        (b'{"Records": 5}', "Records is no list"),
        (json.dumps({"Records": [notification("")]}).encode(), "names no object"),
        (
            json.dumps({"Records": [{**notification("a"), "s3": {"bucket": {"name": "l"}, "object": {"key": "a"}}}]}).encode(),
            "second",
        ),
        (b'{"specversion": "1.0", "id": "1", "source": "s", "data": 5}', "no data"),
        (b'{"specversion": "1.0", "id": "1", "source": "s", "data": "{"}', "not JSON|lacks"),
    ],
)
def test_what_is_no_event_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(DoNotRetry, match=told):
        parse(data)


NAMES = "Records s3 bucket object key name eventName detail-type detail specversion id source data event_type message type"
KEYS = st.sampled_from(NAMES.split())
LEAVES = st.sampled_from([None, True, 5, "", "a", "{", "ObjectCreated:Put", "create", "/buckets/a/b", "Object Created"])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)


@settings(deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=4))
def test_nothing_but_a_refusal_comes_of_what_nobody_sends(value: Any) -> None:
    try:
        created, _ = parse(json.dumps(value).encode())
    except DoNotRetry:
        return
    assert all(each.uri.startswith("s3://") for each in created)
