"""The receiver of events: who is let in, how much is read, and what the sender is told. Real HTTP, with a recorder for the runs."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from components.services.exits import DoNotRetry, Retry
from pipelines.cluster.events import Created
from pipelines.cluster.trigger import Triggered
from pipelines.cluster.webhook import AT_ONCE, BODY_BYTES, SIGNATURE, Receiver, secret, signature_of
from tests.unit.pipelines.cluster.test_events import notification

KEY = b"k" * 32
EVENT = json.dumps({"Records": [notification("in/a.jsonl")]}).encode()


class Bench:
    """A receiver that runs; `does` is what starts a run."""

    def __init__(self) -> None:
        self.seen: list[Created] = []
        self.failure: Exception | None = None
        self.gate: threading.Event | None = None
        self.receiver = Receiver(("127.0.0.1", 0), KEY, self.start)

    def start(self, created: Created) -> Triggered:
        self.seen.append(created)
        if self.gate is not None:
            self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        return Triggered("r1", "http://kfp/#/runs/details/r1", True)

    def ask(self, method: str = "POST", path: str = "/events", body: bytes = EVENT, **headers: str) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.receiver.server_address[1], timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        return reply.status, json.loads(text), reply.headers


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    threading.Thread(target=made.receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield made
    made.receiver.shutdown()
    made.receiver.server_close()


def signed(body: bytes = EVENT, key: bytes = KEY) -> dict[str, str]:
    return {SIGNATURE: signature_of(body, key)}


def test_a_signed_event_starts_a_run(bench: Bench) -> None:
    status, content, _ = bench.ask(**signed())
    assert status == 200
    assert content["runs"] == [
        {"object": "s3://labels/in/a.jsonl", "run_id": "r1", "page": "http://kfp/#/runs/details/r1", "new": True}
    ]
    assert bench.ask(Authorization=f"Bearer {KEY.decode()}")[0] == 200, "MinIO signs nothing, and sends its token"


def test_the_signature_is_the_published_one() -> None:
    """RFC 4231, test case 2."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert signature_of(b"what do ya want for nothing?", b"Jefe") == f"sha256={expected}"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {SIGNATURE: "sha256="},
        {SIGNATURE: signature_of(EVENT + b" ", KEY)},
        {SIGNATURE: signature_of(EVENT, b"x" * 32)},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEY.decode()}"},
    ],
)
def test_who_does_not_know_the_secret_starts_nothing(headers: dict[str, str], bench: Bench) -> None:
    assert bench.ask(**headers)[0] == 401
    assert not bench.seen


def test_what_is_too_large_is_refused_before_it_is_read(bench: Bench) -> None:
    with socket.create_connection(("127.0.0.1", bench.receiver.server_address[1]), timeout=10) as raw:
        raw.sendall(f"POST /events HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY_BYTES + 1}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(100)


@pytest.mark.parametrize("header", ["Transfer-Encoding: chunked", "Content-Length: -5", "X: y"])
def test_a_body_of_unknown_length_is_refused(header: str, bench: Bench) -> None:
    with socket.create_connection(("127.0.0.1", bench.receiver.server_address[1]), timeout=10) as raw:
        raw.sendall(f"POST /events HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
        assert b" 411 " in raw.recv(100)


def test_the_sender_learns_whether_to_come_back(bench: Bench) -> None:
    assert bench.ask(body=b"{}", **signed(b"{}"))[0] == 400
    bench.failure = Retry("KFP is away")
    status, content, headers = bench.ask(**signed())
    assert (status, content["error"], headers["Retry-After"]) == (503, "KFP is away", "30")
    bench.failure = DoNotRetry("no such profile")
    assert bench.ask(**signed())[0] == 422
    assert (bench.ask("GET", "/healthz")[0], bench.ask("GET", "/events")[0], bench.ask(path="/", **signed())[0]) == (200, 404, 404)


def test_more_at_once_than_it_works_on_are_told_to_come_back(bench: Bench) -> None:
    bench.gate = threading.Event()
    replies: list[int] = []
    threads = [threading.Thread(target=lambda: replies.append(bench.ask(**signed())[0])) for _ in range(AT_ONCE)]
    for each in threads:
        each.start()
    while len(bench.seen) < AT_ONCE:
        threading.Event().wait(0.01)
    assert bench.ask(**signed())[0] == 503
    bench.gate.set()
    for each in threads:
        each.join()
    assert replies == [200] * AT_ONCE


@pytest.mark.parametrize("value", ["", "short"])
def test_a_secret_that_can_be_guessed_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOOP_WEBHOOK_SECRET", value)
    with pytest.raises(DoNotRetry, match=r"RANKLOOP_WEBHOOK_SECRET (is not set|has 5 characters)") as refused:
        secret()
    assert value not in str(refused.value) or not value
