"""`rankloop trigger --serve`: takes events over HTTP from who knows the secret.

    POST /events    an event (`events.py`); {"runs": [{"run_id": …, "new": true}]}
    GET  /healthz   200

A request carries `X-Rankloop-Signature: sha256=<HMAC-SHA256 of the body, in hex>`, or, for stores that sign nothing (MinIO's
`auth_token`), the secret itself as `Authorization: Bearer …`. A body sent again starts nothing anew: its event has its run. It
listens on loopback unless told otherwise, and speaks no TLS: to be reached from elsewhere it needs something in front that does.

| answer | what the sender should do |
|---|---|
| 200 | nothing |
| 400, 401, 411, 413 | mend the request |
| 422 | nothing helps but mending the configuration; the message says which |
| 503 with Retry-After | send it again |
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from components.services.exits import DoNotRetry, StageFailure
from pipelines.cluster.events import Created, parse
from pipelines.cluster.trigger import Triggered

SECRET_VARIABLE = "RANKLOOP_WEBHOOK_SECRET"
SECRET_CHARACTERS = 32
SIGNATURE = "X-Rankloop-Signature"
BODY_BYTES = 2**20
READ_SECONDS = 10  # for a request to come in
AT_ONCE = 8  # requests; one more is told to come back
RETRY_AFTER_SECONDS = 30


def secret() -> bytes:
    """The secret from the environment.

    Raises:
        DoNotRetry: there is none, or one that can be guessed.
    """
    found = os.environ.get(SECRET_VARIABLE, "")
    if len(found) < SECRET_CHARACTERS:
        raise DoNotRetry(
            f"{SECRET_VARIABLE} " + (f"has {len(found)} characters" if found else "is not set"),
            f"put {SECRET_CHARACTERS} or more random ones there, such as of `openssl rand -hex 32`, and give the sender the same",
        )
    return found.encode()


def signature_of(body: bytes, key: bytes) -> str:
    """What the header has to be for this body."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()


class Receiver(ThreadingHTTPServer):
    """The server; `start_run` is called for each object that was created, and gives None for one that starts nothing."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], key: bytes, start_run: Callable[[Created], Triggered | None]) -> None:
        super().__init__(address, _Handler)
        self.key = key
        self.start_run = start_run
        self.slots = threading.BoundedSemaphore(AT_ONCE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender who went away is no error of ours."""
        error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(error, OSError):
            _note(f"unexpected failure: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    server: Receiver
    timeout = READ_SECONDS
    server_version = "rankloop"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._reply(HTTPStatus.OK, {"status": "ok"})
        else:
            self._reply(HTTPStatus.NOT_FOUND, {"error": "POST /events"})

    def do_POST(self) -> None:
        if self.path != "/events":
            self._reply(HTTPStatus.NOT_FOUND, {"error": "POST /events"})
            return
        body = self._body()
        if body is None:
            return
        if not self._allowed(body):
            self._reply(HTTPStatus.UNAUTHORIZED, {"error": f"no valid {SIGNATURE}, and no valid bearer token"})
            return
        if not self.server.slots.acquire(blocking=False):
            self._reply(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too many events at once"})
            return
        try:
            self._start(body)
        finally:
            self.server.slots.release()

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            self._reply(HTTPStatus.LENGTH_REQUIRED, {"error": "a Content-Length is needed"})
            return None
        if len(length) > 12 or int(length) > BODY_BYTES:
            self._reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"at most {BODY_BYTES} bytes"})
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _allowed(self, body: bytes) -> bool:
        signed = self.headers.get(SIGNATURE, "").encode(errors="replace")
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        # Both are compared whatever the first says: how long the answer takes tells nothing about either.
        by_signature = hmac.compare_digest(signed, signature_of(body, self.server.key).encode())
        by_token = hmac.compare_digest(token.strip().encode(errors="replace"), self.server.key)
        return by_signature or (scheme.lower() == "bearer" and by_token)

    def _start(self, body: bytes) -> None:
        try:
            created, _ = parse(body)
        except DoNotRetry as error:
            self._reply(HTTPStatus.BAD_REQUEST, {"error": error.message})
            return
        runs = []
        try:
            for each in created:
                started = self.server.start_run(each)
                if started is not None:
                    _note(f"{each.uri}: run {started.run_id}" + ("" if started.new else ", started before"))
                    runs.append({"object": each.uri, "run_id": started.run_id, "page": started.page, "new": started.new})
        except StageFailure as error:
            _note(f"failed: {error.message}")
            final = isinstance(error, DoNotRetry)
            status = HTTPStatus.UNPROCESSABLE_ENTITY if final else HTTPStatus.SERVICE_UNAVAILABLE
            self._reply(status, {"error": error.message, "runs": runs})
            return
        self._reply(HTTPStatus.OK, {"runs": runs})

    def _reply(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", str(RETRY_AFTER_SECONDS))
        self.send_header("Connection", "close")  # a body that was not read must not be taken for the next request
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Only what started or failed is told: the path and the headers are the sender's, not ours to repeat."""


def serve(receiver: Receiver) -> None:
    """Serves until SIGTERM or SIGINT; what is under way is finished."""

    def stop(*_: object) -> None:
        threading.Thread(target=receiver.shutdown).start()  # it waits for the loop, which this signal has interrupted

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    receiver.serve_forever(poll_interval=0.2)
    for _ in range(AT_ONCE):
        receiver.slots.acquire(timeout=READ_SECONDS)
    receiver.server_close()


def _note(text: str) -> None:
    print(f"rankloop: {' '.join(text.split())[:500]}", file=sys.stderr, flush=True)
