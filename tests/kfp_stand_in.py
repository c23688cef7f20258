"""A small stand-in for KFP's API server, not KFP: it keeps in memory what a contract mock cannot, and fails when it is told to.

It has the calls that `pipelines/cluster` makes, pages, names that are there once, ids, and bearer tokens. It runs nothing.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KINDS = {
    "pipelines": ("pipelines", "pipeline_id"),
    "experiments": ("experiments", "experiment_id"),
    "runs": ("runs", "run_id"),
    "recurringruns": ("recurringRuns", "recurring_run_id"),
}
API = "/apis/v2beta1/"
LOG = "/apis/v1alpha1/runs/"


class StandIn(ThreadingHTTPServer):
    """The server.

    Attributes:
        kept: what was created, by kind.
        token: the only one that is let in; "" lets everybody in.
        page: items a page, at most.
        failures: for "METHOD kind", how often to fail, with which status, and whether it is done before the failure is told.
        asked: every request as "METHOD path".
        logs: by pod.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kept: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*KINDS, "versions")}
        self.token = ""
        self.page = 100
        self.multi_user = False
        self.failures: dict[str, tuple[int, int, bool]] = {}
        self.asked: list[str] = []
        self.logs: dict[str, str] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.server.lock:
            self.server.asked.append(f"{method} {url.path}")
            kind = url.path.removeprefix(API).split("/")[0]
            count, status, done = self.server.failures.get(f"{method} {kind}", (0, 0, False))
            if count:
                self.server.failures[f"{method} {kind}"] = (count - 1, status, done)
            if self.server.token and self.headers.get("authorization") != f"Bearer {self.server.token}":
                code, reply = 401, {"message": "Unauthenticated"}
            elif count and not done:
                code, reply = status, {"message": "told to fail"}
            elif url.path.startswith(LOG):
                code, reply = self._log(url.path)
            else:
                code, reply = self._do(method, url.path.removeprefix(API).split("/"), query, body)
                if count:
                    code, reply = status, {"message": "told to fail after it was done"}
        data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if not isinstance(reply, str) else "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _log(self, path: str) -> tuple[int, Any]:
        pod = path.split("/")[-2]
        if pod not in self.server.logs:
            return 500, {"error_message": f"Failed to read logs: pods {pod} not found"}
        return 200, self.server.logs[pod]

    def _do(self, method: str, parts: list[str], query: dict[str, str], body: bytes) -> tuple[int, Any]:
        kept = self.server.kept
        if parts == ["healthz"]:
            return 200, {"multi_user": self.server.multi_user}
        if parts == ["pipelines", "upload_version"]:
            return self._upload(query, body)
        if len(parts) == 3 and parts[2] == "versions":
            mine = [each for each in kept["versions"] if each["pipeline_id"] == parts[1]]
            return self._page("pipeline_versions", [{**each, "body": None} for each in mine[::-1]], query)
        if parts[0] not in KINDS:
            return 404, {"message": f"no such path {parts}"}
        field, identity = KINDS[parts[0]]
        if len(parts) == 1 and method == "POST":
            return self._create(parts[0], identity, json.loads(body))
        if len(parts) == 1:
            found = kept[parts[0]]
            if "filter" in query:
                (wanted,) = json.loads(query["filter"])["predicates"]
                found = [each for each in found if each[wanted["key"]] == wanted["string_value"]]
            newest_first = query.get("sort_by", "").endswith("desc")
            return self._page(field, found[::-1] if newest_first else found, query)
        found = [each for each in kept[parts[0]] if each[identity] == parts[1]]
        if not found:
            return 404, {"message": f"{parts[1]} not found"}
        if method == "DELETE":
            kept[parts[0]].remove(found[0])
            return 200, {}
        return 200, found[0]

    def _page(self, field: str, items: list[Any], query: dict[str, str]) -> tuple[int, Any]:
        first = int(query.get("page_token") or 0)
        end = first + min(self.server.page, int(query.get("page_size", 10)))
        return 200, {field: items[first:end], "next_page_token": str(end) if end < len(items) else ""}

    def _create(self, kind: str, identity: str, value: dict[str, Any]) -> tuple[int, Any]:
        kept = self.server.kept[kind]
        unique = kind in ("pipelines", "experiments")
        if unique and any(each["display_name"] == value["display_name"] for each in kept):
            return 409, {"message": f"{kind} {value['display_name']} already exists"}
        made = {**value, identity: str(uuid.uuid4()), "created_at": "2026-01-02T03:04:05Z"}
        if kind == "recurringruns":
            made["status"] = value["mode"] + "D"
        if kind == "runs":
            made["state"] = "PENDING"
        kept.append(made)
        return 200, made

    def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        kept = self.server.kept["versions"]
        if any(each["name"] == query["name"] for each in kept):
            return 409, {"message": f"version {query['name']} already exists"}
        made = {"pipeline_version_id": str(uuid.uuid4()), "pipeline_id": query["pipelineid"], "name": query["name"]}
        kept.append({**made, "display_name": query["name"], "body": body.decode(errors="replace")})
        return 200, made


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """One that runs."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
