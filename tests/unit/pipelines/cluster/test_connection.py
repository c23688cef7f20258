"""Who asks KFP, and what a person is told when it does not answer. The server is the stand-in of `tests/kfp_stand_in.py`."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.services.exits import DoNotRetry, Retry
from pipelines.cluster import connection
from pipelines.cluster.connection import Address, Connection, Refused, expiry_of
from pipelines.cluster.status import run_of
from pipelines.cluster.submit import experiment_of
from tests.kfp_stand_in import StandIn, stand_in


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOST", "NAMESPACE", "TOKEN", "TOKEN_FILE", "CA", "UI"):
        monkeypatch.delenv(f"RANKLOOP_KFP_{name}", raising=False)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "projected"))
    monkeypatch.setattr(connection, "WAIT_SECONDS", 0.01)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


def token(expires: float) -> str:
    body = base64.urlsafe_b64encode(json.dumps({"exp": expires}).encode()).decode().rstrip("=")
    return f"e30.{body}.c2ln"


def test_the_token_comes_from_the_environment_then_its_file_then_the_service_account(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.token = "right"
    with pytest.raises(Refused, match=r"does not know who asks \(401\): no token was sent"):
        experiment_of(Connection.of(Address(server.url)), "a")
    (tmp_path / "projected").write_text("right\n", encoding="utf-8")
    assert experiment_of(Connection.of(Address(server.url)), "a")
    (tmp_path / "token").write_text("wrong\n", encoding="utf-8")
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(Refused, match=r"the token is wrong, or has expired\n  remedy: put a fresh token into RANKLOOP_KFP_TOKEN"):
        experiment_of(Connection.of(Address(server.url)), "a")
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", "right")
    assert experiment_of(Connection.of(Address(server.url)), "a")


def test_the_service_accounts_token_is_read_anew_for_each_call(server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "projected").write_text("first", encoding="utf-8")
    server.token = "first"
    kfp = Connection.of(Address(server.url))
    experiment_of(kfp, "a")
    server.token = "second"
    with pytest.raises(Refused, match="the service account's token is refused"):
        experiment_of(kfp, "a")
    (tmp_path / "projected").write_text("second", encoding="utf-8")
    experiment_of(kfp, "a")


def test_an_expired_token_is_told_as_such(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "another"
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", token(1_700_000_000))
    with pytest.raises(Refused, match="the token expired at 2023-11-14 22:13 UTC"):
        experiment_of(Connection.of(Address(server.url)), "a")
    assert expiry_of(token(5)) == 5
    assert [expiry_of(each) for each in ("", "a.b", "a.bm8.c", "a.e30.c")] == [None] * 4


@pytest.mark.parametrize("bad", ["two words", "\x1b[0m", "ümlaut"])
def test_what_is_no_token_is_refused_before_it_is_sent(bad: str, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", bad)
    with pytest.raises(DoNotRetry, match="the token for KFP is none"):
        Connection.of(Address(server.url))
    assert not server.asked


def test_a_token_does_not_travel_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", "secret-token")
    with pytest.raises(DoNotRetry, match=r"would travel to http://kfp.example in clear text") as refused:
        Connection.of(Address("http://kfp.example"))
    assert "secret-token" not in str(refused.value)


@pytest.mark.parametrize("host", ["kfp.example", "ftp://kfp", "https://"])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(DoNotRetry, match="is no address of KFP"):
        Connection.of(Address(host))


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (403, Refused, r"refuses run r1 \(no token was sent\) \(403\): told to fail\n  remedy: ask for the role rankloop-client"),
        (404, Refused, r"has no run r1 \(404\): told to fail"),
        (400, Refused, r"refuses run r1 \(400\): told to fail"),
        (503, Retry, r"failed on run r1 \(503\): told to fail\n  remedy: run again"),
        (429, Retry, r"failed on run r1 \(429\)"),
    ],
)
def test_what_the_server_refuses_is_told_in_a_line(status: int, kind: type[Exception], told: str, server: StandIn) -> None:
    server.failures["GET runs"] = (9, status, False)
    with pytest.raises(kind, match=told) as failure:
        run_of(Connection.of(Address(server.url)), "r1")
    assert str(failure.value).count("\n") <= 1, "a line, and what to do"


def test_a_server_that_failed_is_asked_again_but_not_to_create(server: StandIn) -> None:
    server.failures["GET experiments"] = (2, 503, False)
    experiment_of(Connection.of(Address(server.url)), "a")
    assert server.asked.count("GET /apis/v2beta1/experiments") == 3
    server.failures["POST experiments"] = (1, 503, False)
    with pytest.raises(Retry, match=r"experiment b \(503\)"):
        experiment_of(Connection.of(Address(server.url)), "b")
    assert server.asked.count("POST /apis/v2beta1/experiments") == 2


def test_an_unreachable_server_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(Retry, match=f"KFP at {url} cannot be reached: .*refused.*\n  remedy: is it running"):
            run_of(Connection.of(Address(url)), "r1")


def test_an_authority_that_nobody_knows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"run_id": "r1"}')

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        url = f"https://localhost:{server.server_address[1]}"
        with pytest.raises(DoNotRetry, match=r"no trusted connection to KFP at .*certificate.*\n  remedy: name"):
            run_of(Connection.of(Address(url)), "r1")
        monkeypatch.setenv("RANKLOOP_KFP_CA", str(tmp_path / "cert"))
        assert run_of(Connection.of(Address(url)), "r1").run_id == "r1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_page_to_log_in_is_not_taken_for_kfp(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kfp_stand_in._Handler._do", lambda *_: (200, "<html>Log in</html>"))
    with pytest.raises(DoNotRetry, match=r"what answers at .* is not KFP's API"):
        Connection.of(Address(server.url)).namespace  # noqa: B018


def test_listings_are_read_to_their_last_page(server: StandIn) -> None:
    kfp = Connection.of(Address(server.url))
    ids = [experiment_of(kfp, f"e{number}") for number in range(5)]
    server.page = 2
    assert [experiment_of(kfp, f"e{number}") for number in range(5)] == ids


def test_the_namespace_is_named_only_where_kfp_serves_many(server: StandIn) -> None:
    assert Connection.of(Address(server.url, "team")).namespace == ""
    server.multi_user = True
    assert Connection.of(Address(server.url, "team")).namespace == "team"
    assert Connection.of(Address(server.url)).namespace == "rankloop"


def test_nothing_is_printed_and_nothing_is_written_to_the_home(
    server: StandIn, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfp import Client

    monkeypatch.setattr(Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "config" / "kfp" / "context.json"))
    server.multi_user = True
    experiment_of(Connection.of(Address(server.url)), "a")
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "config").exists()
